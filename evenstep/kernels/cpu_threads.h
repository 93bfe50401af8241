// Shared by all CPU kernels: the table that describes tensors, work for threads, and reading memory.
//
// The code is plain C++ on raw pointers, without Python and torch. An optimizer step is bound by memory bandwidth, so each
// kernel reads and writes every tensor once. Three properties make the kernels fast:
//
// * Reading in turn. On Intel Xeons one core that reads at one place waits at every page of 4 KiB, where the hardware prefetcher
//   stops. Reading a block at several places in turn, and prefetching AHEAD entries, saves a tenth of a step. On an AMD EPYC
//   (Zen 4) prefetches cost a fifth. So `in_turn` is set on Intel alone; results are the same.
// * Chunks. Arithmetic is in fp32 on at most SPAN entries that stay in the first-level cache. fp32 tensors are updated in
//   place; other dtypes and masked tensors are unpacked into buffers of the stack and packed again (cpu_unpacked.cpp).
// * Vectors. The compiler vectorises the loops. The build compiles every file once per instruction set.
//
// Determinism: work is divided into blocks of BLOCK entries. Each block writes its sums to its own slot, and one thread adds
// the slots in order, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace evenstep {

// ---- sizes, in entries ----

constexpr int64_t CHUNK = 1024;       // unpacked at a time: four fp32 buffers of it are 16 KiB
constexpr int64_t SPAN = 8 * CHUNK;   // updated at a time where nothing is unpacked
constexpr int64_t PART = 2 * CHUNK;   // of a gradient: has a sum of squares in fp32
constexpr int64_t BLOCK = 16 * CHUNK; // a unit of work, and the unit that the clipping pass may skip
constexpr int64_t PLACES = BLOCK / PART, SPANS = BLOCK / SPAN; // of a block that are measured, and updated, in turn
constexpr int64_t BATCH = 16 * BLOCK; // measured and then updated while the gradients are still in cache
constexpr int64_t AHEAD = 512;        // distance of prefetches
constexpr int W = 32;                 // one turn of a vectorised loop: two AVX-512 or four AVX2 registers
constexpr int64_t WARM = 8;           // in blocks: gradients that a cache of 2 MiB still holds beside p, m and v

// ---- the table of tensors ----

enum Type : int64_t { F32 = 0, BF16 = 1, INT8 = 2 };

// One tensor of a call. Every field has 64 bits, so that Python passes int64 [k, 18] (`job_table` in cpu.py). Fields that do
// not apply are 0. Aliasing: no two tensors of a call overlap. Alignment: that of the dtype suffices.
struct Job {
  int64_t size, rows;                       // entries; length of dimension 0
  int64_t p_type, g_type, m_type, v_type;   // a Type each
  void *p;                                  // parameter, fp32 or bf16, written
  const void *g;                            // gradient, fp32 or bf16
  void *m, *v;                              // first and second moment
  float *m_scale, *v_scale;                 // of 8-bit moments: one scale per 256 entries
  const float *m_map, *v_map;               // of 8-bit moments: the 256 values of the codes
  const uint8_t *mask;                      // packed bits, 8 entries per byte; moments are compact where it is set
  int64_t trained;                          // entries of the mask, the length of compact moments
  uint16_t *lost;                           // bf16 Kahan compensation of the parameter
  const int32_t *seed;                      // of stochastic rounding
};

// ---- threads ----

// Calls f(i) for all i < n. Each thread has a contiguous range and starts with the last `warm` items of it. When the same work
// was divided in the same way just before, those items are the ones that its caches still hold.
template <class F> void parallel(int64_t n, int64_t threads, int64_t warm, F f) {
  auto run = [&](int64_t first, int64_t last) {
    const int64_t start = std::max(first, last - warm);
    for (int64_t i = start; i < last; i++)
      f(i);
    for (int64_t i = first; i < start; i++)
      f(i);
  };
#ifdef _OPENMP
  // One thread does not enter OpenMP at all, whose pool does not survive a fork.
  if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t here = omp_get_thread_num(), all = omp_get_num_threads();
      run(n * here / all, n * (here + 1) / all);
    }
    return;
  }
#endif
  run(0, n);
}

template <class F> void parallel(int64_t n, int64_t threads, F f) { parallel(n, threads, n, f); }

// A range of entries of one tensor; `number` counts the blocks of all tensors of the call.
struct Block { int64_t job, start, end, number; };

static inline int64_t blocks_of(const Job &job) { return (job.size + BLOCK - 1) / BLOCK; }

// The blocks of the tensors first..last-1; the first block has the number `number`.
static inline std::vector<Block> cut(const Job *jobs, int64_t first, int64_t last, int64_t number) {
  std::vector<Block> found;
  for (int64_t i = first; i < last; i++)
    for (int64_t start = 0; start < jobs[i].size; start += BLOCK)
      found.push_back({i, start, std::min(start + BLOCK, jobs[i].size), number++});
  return found;
}

// Calls f(first, last, number of the first block) for runs of whole tensors of about BATCH entries.
template <class F> void in_batches(const Job *jobs, int64_t k, F f) {
  int64_t number = 0;
  for (int64_t first = 0; first < k;) {
    int64_t last = first, entries = 0, blocks = 0;
    do {
      entries += jobs[last].size;
      blocks += blocks_of(jobs[last++]);
    } while (last < k && entries + jobs[last].size <= BATCH);
    f(first, last, number);
    first = last;
    number += blocks;
  }
}

// ---- reading memory ----

// memcpy is the one conversion between floats and their bits that the aliasing rules of C++ allow.
static inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
static inline float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }

// Whether loops read several places in turn, and prefetch (see above), decided when the library is loaded. A variable, so that
// tests can try both.
#if defined(__x86_64__)
inline bool in_turn = __builtin_cpu_is("intel");
#else
inline bool in_turn = false;
#endif

// Prefetch to read. Prefetching with the intent to write is 4 % slower on Intel. Addresses beyond a tensor do not fault.
static inline void fetch(const void *address) {
  if (in_turn) __builtin_prefetch(address, 0);
}

// Convert n entries, from entry `start` on, to fp32.
static inline void load(const void *from, int64_t type, int64_t start, int64_t n, float *to) {
  if (type == F32) {
    std::memcpy(to, static_cast<const float *>(from) + start, n * 4);
  } else {
    const uint16_t *x = static_cast<const uint16_t *>(from) + start;
    for (int64_t i = 0; i < n; i += 32)
      fetch(x + i + AHEAD);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      to[i] = from_bf16(x[i]);
  }
}

} // namespace evenstep

// Functions that Python calls: C linkage, the only visible symbols of the library.
#if defined(_WIN32)
#define PUBLIC extern "C" __declspec(dllexport)
#else
#define PUBLIC extern "C" __attribute__((visibility("default")))
#endif
