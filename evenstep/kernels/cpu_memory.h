// Numbers in memory: dtypes, prefetches, stores past the caches, rounding into bf16 parameters.
#pragma once

#include "cpu_threads.h"

namespace {

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }
inline uint16_t to_bf16(float x) { // to nearest, ties to even
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0;
}

const float BF16_MAX = from_bf16(0x7f7f);

inline void fetch(const void *address) { __builtin_prefetch(address, 0); } // to read: asking to write is 4 % slower here

// Unpack n entries from `start` on.
void load(const void *from, int64_t type, int64_t start, int64_t n, float *to) {
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

// Copy n entries to where nobody reads soon: past the caches, which spares the reading of what is overwritten.
inline void store_past_caches(const float *from, int64_t n, float *to) {
#if defined(__SSE__)
  if ((reinterpret_cast<uintptr_t>(to) & 15) == 0) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    for (; i < n; i++)
      to[i] = from[i];
    _mm_sfence();
    return;
  }
#endif
  std::memcpy(to, from, n * 4);
}

// ---- writing bf16 parameters ----

inline uint32_t mixed(uint32_t signed_x) { // as `_mixed` in optim/rounding.py: shifts keep the sign
  int32_t x = int32_t(signed_x);
  x = int32_t(uint32_t(x ^ (x >> 16)) * uint32_t(-2048144789));
  x = int32_t(uint32_t(x ^ (x >> 13)) * uint32_t(-1028477387));
  return uint32_t(x ^ (x >> 16));
}

// Round fp32 results into a bf16 parameter; `where` is the number of the first entry.
void write_bf16(const Job &job, int64_t start, int64_t n, const float *exact, int64_t where) {
  uint16_t *p = static_cast<uint16_t *>(job.p) + start;
  if (job.lost) {
    uint16_t *lost = job.lost + start;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      float x = exact[i] + from_bf16(lost[i]);
      uint16_t near = to_bf16(x);
      p[i] = near;
      lost[i] = to_bf16(x - from_bf16(near));
    }
  } else if (job.seed) {
    const uint32_t seed = uint32_t(*job.seed), golden = uint32_t(-1640531527);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      uint32_t noise = mixed(uint32_t(where + i) * golden + seed) & 0xffff;
      uint32_t bits = as_bits(exact[i]), cut = (bits + noise) & 0xffff0000;
      bool finite = (bits & 0x7f800000) != 0x7f800000;
      p[i] = finite ? uint16_t(cut >> 16) : to_bf16(exact[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      p[i] = to_bf16(exact[i]);
  }
}

} // namespace
