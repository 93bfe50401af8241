// What all of the kernels share: sizes, a tensor as Python describes it, and the sharing out of work.
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

namespace {

constexpr int64_t CHUNK = 1024;       // entries: four fp32 buffers of it are 16 KiB
constexpr int64_t SPAN = 4 * CHUNK;   // entries that are worked through at once where nothing is unpacked
constexpr int64_t BLOCK = 16 * CHUNK; // entries of a unit of work, and of the maxima that a clipping pass looks at
constexpr int64_t BATCH = 16 * BLOCK; // entries that are measured and then updated while they are still in cache
constexpr int64_t WARM = 8;            // blocks whose update finds its gradients in a cache of 2 MiB, beside p, m and v
constexpr int64_t AHEAD = 512;        // entries
constexpr int64_t QBLOCK = 256;       // entries that share a scale, for 8-bit moments
constexpr int64_t GROUPS = 16;        // parts into which rows are dealt where columns are summed
constexpr int W = 32;                 // entries per turn of a vectorised loop

enum Type : int64_t { F32 = 0, BF16 = 1, INT8 = 2 };

} // namespace

// One tensor: 64-bit fields, so that a table of integers describes all of them. Fields that do not apply are 0.
struct Job {
  int64_t size, rows;
  int64_t p_type, g_type, m_type, v_type;
  void *p;
  const void *g;
  void *m, *v;
  float *m_scale, *v_scale;
  const float *m_map, *v_map; // the 256 values of 8-bit codes
  const uint8_t *mask;        // packed bits
  int64_t trained;            // entries of the mask
  uint16_t *lost;             // Kahan's compensation
  const int32_t *seed;        // of stochastic rounding
};

namespace {

// f(i) for all i < n. Each thread has a run of its own and begins with the last `warm` of it, which, when the same work was
// shared out just before, are what it has seen last and what its caches still hold.
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

struct Block { int64_t job, start, end, number; }; // number: its place among all blocks of the call

int64_t blocks_of(const Job &job) { return (job.size + BLOCK - 1) / BLOCK; }

// The blocks of jobs first..last-1, of which the first has the number `number`.
std::vector<Block> cut(const Job *jobs, int64_t first, int64_t last, int64_t number) {
  std::vector<Block> found;
  for (int64_t i = first; i < last; i++)
    for (int64_t start = 0; start < jobs[i].size; start += BLOCK)
      found.push_back({i, start, std::min(start + BLOCK, jobs[i].size), number++});
  return found;
}

// Calls f(first, last, number of the first block) for runs of whole jobs of about BATCH entries.
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

} // namespace
