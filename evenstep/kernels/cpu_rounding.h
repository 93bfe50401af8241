// How a result in fp32 gets into a bf16 parameter.
#pragma once

#include "cpu_memory.h"

namespace {

inline uint32_t mixed(uint32_t signed_x) { // as evenstep.transforms.rounding: shifts keep the sign
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
