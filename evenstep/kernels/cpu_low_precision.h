// Numbers of fewer than 32 bits: bf16 parameters and moments, and torchao's 8-bit moments.
#pragma once

#include "cpu_threads.h"

namespace evenstep {

constexpr int64_t QBLOCK = 256; // entries that share the scale of an 8-bit moment

#if defined(__AVX512F__)
inline const bool by_bytes = __builtin_cpu_supports("avx512vbmi");
#endif

// ---- bf16 parameters ----

// Rounds to nearest, ties to even. The sum of 0x7fff would carry a NaN into Inf or 0, so NaN is a constant.
static inline uint16_t to_bf16(float x) {
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0;
}

const float BF16_MAX = from_bf16(0x7f7f);

// A hash of 32 bits, as `_mixed` in optim/rounding.py: shifts are arithmetic there, so they are here.
static inline uint32_t mixed(uint32_t signed_x) {
  int32_t x = int32_t(signed_x);
  x = int32_t(uint32_t(x ^ (x >> 16)) * uint32_t(-2048144789));
  x = int32_t(uint32_t(x ^ (x >> 13)) * uint32_t(-1028477387));
  return uint32_t(x ^ (x >> 16));
}

// Rounds n fp32 results into entries start.. of a bf16 parameter: with Kahan compensation (`lost` receives the part that was
// rounded away), stochastically, or to nearest. `where` is the first entry's number in the hash of stochastic rounding, so
// that the result depends on the seed and the entry alone, not on blocks and threads.
static inline void write_bf16(const Job &job, int64_t start, int64_t n, const float *exact, int64_t where) {
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

// ---- 8-bit moments: 256 codes per scale; a code stands for one of 256 sorted values ----

// torchao's map: seven decades from 1e-7 to 1, each divided evenly into 1, 2, 4, ... cells with sign and 2, 4, 8, ... without,
// whose middles are the values; also 0 and 1. The code of a number is computed from its decade and its place in it, which
// vectorises. Codes of any other map are searched for, which is slow.
struct Coder {
  float map[256];
  bool known = true; // the map is torchao's
  int32_t zero;      // the code of 0; smaller codes are those of negative numbers
  // Per decade: lower border, first value's cell edge, cells per unit, first code (from `zero`), last cell.
  float border[7], low[7], cells[7], base[7], last[7], least, most;
#if defined(__AVX512F__)
  // By exponent, from 2^-31 on: the border within that power of two, if any, and the interval below it. Intervals are the
  // decades from 1 on; 0 is below the smallest border and 8 above the largest. Then by interval.
  alignas(64) float edge[32], from[16] = {0}, per[16] = {0};
  alignas(64) int32_t interval[32], first_code[16] = {0}, last_cell[16] = {0};
  alignas(64) uint8_t bytes[4][256]; // the values of the map, the first byte of each, then the second, ...
#endif

  explicit Coder(const float *values) : zero(values[0] < 0 ? 127 : 0) {
    std::memcpy(map, values, sizeof map);
    for (int i = 0, first = zero + 1; i < 7; i++) {
      const int count = zero ? 1 << i : 2 << i;
      const double top = std::pow(10.0, i - 6);
      border[i] = 0.5f * (map[first - 1] + map[first]);
      low[i] = float(0.1 * top);
      cells[i] = float(count / (0.9 * top));
      base[i] = float(first - zero);
      last[i] = float(count - 1);
      first += count;
    }
    least = border[0];
    most = 0.5f * (map[254] + map[255]);
#if defined(__AVX512F__)
    for (int e = 0; e < 32; e++) {
      const float start = std::ldexp(1.0f, e - 31), end = 2 * start;
      edge[e] = INFINITY;
      interval[e] = 0;
      for (int i = 0; i < 8; i++) {
        const float at = i < 7 ? border[i] : most;
        interval[e] += at <= start;
        if (at > start && at < end) edge[e] = at;
      }
    }
    for (int i = 0; i < 7; i++)
      from[i + 1] = low[i], per[i + 1] = cells[i], first_code[i + 1] = int32_t(base[i]), last_cell[i + 1] = int32_t(last[i]);
    first_code[0] = zero ? 0 : 1; // a positive second moment never gets the code of 0 (`lifted`)
    first_code[8] = 255 - zero;
    for (int c = 0; c < 256; c++)
      for (int i = 0; i < 4; i++)
        bytes[i][c] = uint8_t(as_bits(map[c]) >> 8 * i);
#endif
    for (int32_t c = 0; c < 256; c++)
      known = known && code(map[c]) == c;
  }

  // The code of x = moment / scale. Selections instead of branches, so that the loop in `encode` is vectorised.
  inline int32_t code(float x) const {
    const float a = std::fabs(x);
    float from = low[0], per = cells[0], first = base[0], top = last[0];
    for (int i = 1; i < 7; i++) {
      const bool above = a >= border[i];
      from = above ? low[i] : from;
      per = above ? cells[i] : per;
      first = above ? base[i] : first;
      top = above ? last[i] : top;
    }
    float cell = std::floor((a - from) * per);
    cell = cell > 0 ? cell : 0;
    cell = cell < top ? cell : top;
    float found = a >= least ? first + cell : 0;
    found = x < 0 ? -found : x >= most ? found + 1 : found;
    return zero + int32_t(found);
  }

#if defined(__AVX512F__)
  // Sixteen codes at a time, looked up in 32 values of the map after the other: less than half the time of a gather.
  void decode_block(const uint8_t *codes, float unit, float *to) const {
    const __m512 units = _mm512_set1_ps(unit);
    const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64), bit7 = _mm512_set1_epi32(128);
    for (int64_t i = 0; i < QBLOCK; i += 16) {
      const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i)));
      const __mmask16 odd = _mm512_test_epi32_mask(c, bit5), second = _mm512_test_epi32_mask(c, bit6), upper = _mm512_test_epi32_mask(c, bit7);
      auto of32 = [&](int part) { return _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * part), c, _mm512_loadu_ps(map + 32 * part + 16)); };
      auto of128 = [&](int part) {
        return _mm512_mask_blend_ps(second, _mm512_mask_blend_ps(odd, of32(part), of32(part + 1)), _mm512_mask_blend_ps(odd, of32(part + 2), of32(part + 3)));
      };
      _mm512_storeu_ps(to + i, _mm512_mul_ps(units, _mm512_mask_blend_ps(upper, of128(0), of128(4))));
    }
  }

  // The same for processors that look up bytes (Ice Lake, Zen 4 and later): 64 codes at a time, in half the time. Each of the
  // four bytes of a value comes from two tables of 128 entries; unpacking joins them within lanes of 16 codes, so the codes are
  // first ordered so that the lanes of a result are neighbours.
  __attribute__((target("avx512vbmi"))) void decode_block_by_bytes(const uint8_t *codes, float unit, float *to) const {
    const __m512 units = _mm512_set1_ps(unit);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < QBLOCK; i += 64) {
      const __m512i c = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes + i));
      const __mmask64 upper = _mm512_movepi8_mask(c);
      __m512i byte[4];
      for (int b = 0; b < 4; b++) {
        const __m512i below = _mm512_permutex2var_epi8(_mm512_load_si512(bytes[b]), c, _mm512_load_si512(bytes[b] + 64));
        const __m512i above = _mm512_permutex2var_epi8(_mm512_load_si512(bytes[b] + 128), c, _mm512_load_si512(bytes[b] + 192));
        byte[b] = _mm512_mask_blend_epi8(upper, below, above);
      }
      const __m512i left[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]), _mm512_unpackhi_epi8(byte[0], byte[1])};
      const __m512i right[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]), _mm512_unpackhi_epi8(byte[2], byte[3])};
      for (int half = 0; half < 2; half++) {
        const __m512 x = _mm512_castsi512_ps(_mm512_unpacklo_epi16(left[half], right[half]));
        const __m512 y = _mm512_castsi512_ps(_mm512_unpackhi_epi16(left[half], right[half]));
        _mm512_storeu_ps(to + i + 32 * half, _mm512_mul_ps(units, x));
        _mm512_storeu_ps(to + i + 32 * half + 16, _mm512_mul_ps(units, y));
      }
    }
  }

  // The codes of x / unit for one block of QBLOCK entries, equal to `code`: seven comparisons become one look at the exponent,
  // and the division becomes a product with the reciprocal and one Newton correction, which gives the same quotient.
  void code_block(const float *x, float unit, uint8_t *codes) const {
    const __m512 edge0 = _mm512_load_ps(edge), edge1 = _mm512_load_ps(edge + 16), froms = _mm512_load_ps(from), pers = _mm512_load_ps(per);
    const __m512i interval0 = _mm512_load_si512(interval), interval1 = _mm512_load_si512(interval + 16);
    const __m512i firsts = _mm512_load_si512(first_code), lasts = _mm512_load_si512(last_cell);
    const __m512 units = _mm512_set1_ps(unit), inverse = _mm512_set1_ps(1 / unit), smallest = _mm512_set1_ps(0x1p-31f);
    const __m512i one = _mm512_set1_epi32(1), middle = _mm512_set1_epi32(zero), order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < QBLOCK; i += 64) {
      __m512i found[4];
      for (int part = 0; part < 4; part++) {
        const __m512 raw = _mm512_loadu_ps(x + i + 16 * part), near = _mm512_mul_ps(raw, inverse);
        const __m512 y = _mm512_fmadd_ps(_mm512_fnmadd_ps(near, units, raw), inverse, near), a = _mm512_max_ps(_mm512_abs_ps(y), smallest);
        const __m512i power = _mm512_srli_epi32(_mm512_castps_si512(a), 23); // its lowest 5 bits choose: 0 for 2^-31, 31 for 1
        const __mmask16 over = _mm512_cmp_ps_mask(a, _mm512_permutex2var_ps(edge0, power, edge1), _CMP_GE_OQ);
        __m512i d = _mm512_permutex2var_epi32(interval0, power, interval1);
        d = _mm512_mask_add_epi32(d, over, d, one);
        const __m512 within = _mm512_mul_ps(_mm512_sub_ps(a, _mm512_permutexvar_ps(d, froms)), _mm512_permutexvar_ps(d, pers));
        const __m512i cell = _mm512_min_epi32(_mm512_cvttps_epi32(within), _mm512_permutexvar_epi32(d, lasts)), first = _mm512_permutexvar_epi32(d, firsts);
        if (zero) {
          const __m512i c = _mm512_add_epi32(cell, first);
          found[part] = _mm512_mask_sub_epi32(_mm512_add_epi32(middle, c), _mm512_movepi32_mask(_mm512_castps_si512(y)), middle, c);
        } else {
          found[part] = _mm512_maskz_add_epi32(_mm512_cmp_ps_mask(raw, _mm512_setzero_ps(), _CMP_GT_OQ), cell, first);
        }
      }
      // Packing saturates: -1, which a negative entry of the largest magnitude has here, becomes 0, the smallest code.
      const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(found[0], found[1]), _mm512_packus_epi32(found[2], found[3]));
      _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, packed));
    }
  }
#endif

  // The nearest value of a map that is not torchao's, by bisection.
  int32_t search(float x) const {
    int32_t c = int32_t(std::upper_bound(map, map + 256, x) - map) - 1;
    c = c < 0 ? 0 : c;
    return c < 255 && x - map[c] >= (map[c + 1] - map[c]) * 0.5f ? c + 1 : c;
  }

  // A positive second moment never gets the code of 0: after a spike its next update would be m / eps.
  int32_t lifted(int32_t c, float x) const { return c == 0 && zero == 0 && x > 0 ? 1 : c; }

  // The n entries of whole blocks, in fp32.
  void decode(const uint8_t *codes, const float *scale, int64_t n, float *to) const {
    for (int64_t start = 0; start < n; start += QBLOCK) {
      const float unit = scale[start / QBLOCK];
#if defined(__AVX512F__)
      by_bytes ? decode_block_by_bytes(codes + start, unit, to + start) : decode_block(codes + start, unit, to + start);
      continue;
#endif
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        to[start + i] = map[codes[start + i]] * unit;
    }
  }

  // Codes and scales of n entries; x begins at a block. The scale is the largest magnitude of a block, so that codes stand for
  // [-1, 1]; 1e-12 for a block of zeros, as in torchao. Hazard: n is a multiple of QBLOCK.
  void encode(const float *x, int64_t n, uint8_t *codes, float *scale) const {
    for (int64_t start = 0; start < n; start += QBLOCK) {
      float tops[64] = {0}, top = 0; // four vectors, since one would wait for each comparison
      for (int64_t i = start; i < start + QBLOCK; i += 64)
#pragma omp simd
        for (int j = 0; j < 64; j++) {
          const float y = std::fabs(x[i + j]);
          tops[j] = y > tops[j] ? y : tops[j];
        }
#pragma omp simd reduction(max : top)
      for (int j = 0; j < 64; j++)
        top = tops[j] > top ? tops[j] : top;
      const float unit = top > 1e-12f ? top : 1e-12f;
      scale[start / QBLOCK] = unit;
      if (!known) {
        for (int64_t i = 0; i < QBLOCK; i++)
          codes[start + i] = uint8_t(lifted(search(x[start + i] / unit), x[start + i]));
        continue;
      }
#if defined(__AVX512F__)
      if (unit > 1e-30f && unit < 1e30f) { // else the reciprocal, or the correction, would leave the range of fp32
        code_block(x + start, unit, codes + start);
        continue;
      }
#endif
      const Coder c = *this; // a copy: stores of bytes cannot change it
      int32_t found[QBLOCK];
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        found[i] = c.lifted(c.code(x[start + i] / unit), x[start + i]);
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        codes[start + i] = uint8_t(found[i]);
    }
  }
};

// The coder of a map, cached between calls: a process knows two maps (with and without sign). Thread-safe: threads that
// build the same coder at once store equal ones.
static inline std::shared_ptr<const Coder> coder_of(const float *map) {
  static std::shared_ptr<const Coder> known[2];
  int which = map[0] < 0;
  std::shared_ptr<const Coder> coder = std::atomic_load(&known[which]);
  if (!coder || std::memcmp(coder->map, map, sizeof coder->map) != 0) {
    coder = std::make_shared<const Coder>(map);
    std::atomic_store(&known[which], coder);
  }
  return coder;
}

// ---- moments in fp32 ----

// n entries of a moment, from `start` on, in fp32: in place where stored so, else unpacked into `buffer`.
static inline float *open_moment(void *stored, int64_t type, const float *scale, const Coder *coder, int64_t start, int64_t n, float *buffer) {
  if (type == F32)
    return static_cast<float *>(stored) + start;
  if (type == INT8) {
    const uint8_t *codes = static_cast<const uint8_t *>(stored) + start;
    for (int64_t i = 0; i < n; i += 64)
      fetch(codes + i + AHEAD);
    coder->decode(codes, scale + start / QBLOCK, n, buffer);
  } else {
    load(stored, type, start, n, buffer);
  }
  return buffer;
}

// Packs what `open_moment` unpacked; nothing to do for fp32, which was updated in place.
static inline void close_moment(void *stored, int64_t type, float *scale, const Coder *coder, int64_t start, int64_t n, const float *moment) {
  if (type == INT8) {
    coder->encode(moment, n, static_cast<uint8_t *>(stored) + start, scale + start / QBLOCK);
  } else if (type == BF16) {
    uint16_t *x = static_cast<uint16_t *>(stored) + start;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float y = moment[i] > BF16_MAX ? BF16_MAX : moment[i]; // a moment of Inf would stay Inf for good
      x[i] = to_bf16(y < -BF16_MAX ? -BF16_MAX : y);
    }
  }
}

} // namespace evenstep
