// Numbers in memory: dtypes, prefetches, stores past the caches.
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

} // namespace
