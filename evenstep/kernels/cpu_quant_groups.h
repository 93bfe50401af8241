// The grid of a low-bit format, the peaks of its groups, and their scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// What evenstep/kernels/cpu_quant.py passes, a 64-bit integer each.
struct QuantPlan {
  int64_t rows, width, group;     // group: entries that share a scale, at most width
  int64_t x_type, out_type;       // 0: fp32, 1: bf16
  int64_t integer, mantissa, low; // the grid: integers, or a float's mantissa bits and exponent of the smallest normal
  int64_t top_exponent;           // of the largest power of two on the grid
  int64_t scale;                  // a Scale
  int64_t rule;                   // a Rule, for E8M0
  int64_t total;                  // a Total, for E4M3
  int64_t asymmetric, official, outliers;
};

namespace {

enum Scale : int64_t { FP32 = 0, E8M0 = 1, E4M3 = 2 };
enum Rule : int64_t { FLOOR = 0, CEIL = 1, EVEN = 2, RCEIL = 3 };
enum Total : int64_t { NONE = 0, ROW = 1, TENSOR = 2 };

constexpr int64_t SEGMENT = 4096; // entries worked through at once: 16 KiB
constexpr int64_t SHARE = 1 << 15; // entries of a unit of work
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int32_t SIGN_OFF = 0x7fffffff, EXPONENT = 0x7f800000;
constexpr float TINY = 0x1p-126f;

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

inline float as_float(int32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline int32_t as_bits(float x) { int32_t bits; std::memcpy(&bits, &x, 4); return bits; }
inline int32_t magnitude(float x) { return as_bits(x) & SIGN_OFF; }

// NaN passes, as in torch.
inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }

inline float to_integer(float y) { // to nearest, ties to even; keeps the sign of zero
#if defined(__SSE4_1__) || defined(__aarch64__)
  return __builtin_rintf(y);
#else
  const float a = std::fabs(y), whole = 8388608.0f; // 2 ** 23: beyond it all are integers
  return std::copysign(a < whole ? (a + whole) - whole : a, y);
#endif
}

inline float shortened(float scale) { // 21 bits
  const uint32_t bits = uint32_t(as_bits(scale));
  return scale == scale ? as_float(int32_t((bits + 4) & ~7u)) : scale;
}

struct Grid {
  float top, anchor; // anchor: times a power of two it is a number whose last bit is one step of the grid there
  int32_t lowest;    // bits of the smallest normal power of two
};

inline Grid grid(float top, int64_t mantissa, int64_t low) {
  return {top, 1.5f * float(1 << (23 - mantissa)), int32_t(low + 127) << 23};
}

template <bool integer> inline float on_grid(float y, const Grid &g) {
  y = at_most(at_least(y, -g.top), g.top);
  if (integer)
    return to_integer(y);
  const float anchor = as_float(std::max(as_bits(y) & EXPONENT, g.lowest)) * g.anchor;
  return (y + anchor) - anchor;
}

// ---- the peaks of groups ----

// Vectors are passed by reference: how they are returned depends on the instruction set.
template <class T> inline void load(const float *x, int64_t n, T &v) { // n <= LANES entries, then zeros
  v = T{};
  std::memcpy(&v, x, 4 * n);
}

template <class T> inline T larger(T a, T b) { return a > b ? a : b; }
template <class T> inline T smaller(T a, T b) { return a > b ? b : a; }

// Puts v among the K + 1 largest of each lane, which are in order.
template <int K> inline void insert(const Ints &v, Ints *top) {
  for (int k = K; k > 0; k--)
    top[k] = larger(top[k], smaller(top[k - 1], v));
  top[0] = larger(top[0], v);
}

// The K + 1 largest of a and b, each in order, into a.
template <int K> inline void merge(int32_t *a, const int32_t *b, int64_t stride) {
  for (int k = K; k >= 0; k--) {
    int32_t best = std::max(a[k * stride], b[k * stride]);
    for (int i = 0; i < k; i++)
      best = std::max(best, std::min(a[i * stride], b[(k - 1 - i) * stride]));
    a[k * stride] = best;
  }
}

// The (K + 1)-th largest magnitude, equal ones counted one by one; 0 where there are fewer.
template <int K> int32_t ranked(const float *x, int64_t n) {
  Ints top[K + 1] = {};
  for (int64_t i = 0; i < n; i += LANES) {
    Ints v;
    i + LANES <= n ? load(x + i, LANES, v) : load(x + i, n - i, v);
    v &= SIGN_OFF;
    insert<K>(v, top);
  }
  int32_t lanes[K + 1][LANES];
  std::memcpy(lanes, top, sizeof lanes);
  for (int half = LANES / 2; half; half /= 2)
#pragma omp simd
    for (int lane = 0; lane < half; lane++)
      merge<K>(&lanes[0][lane], &lanes[0][lane + half], LANES);
  return lanes[K][0];
}

// The largest one; N: entries where known to the compiler, else 0.
template <int N> inline int32_t peak(const float *x, int64_t n) {
  n = N ? N : n;
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++)
    most = std::max(most, magnitude(x[i]));
  return most;
}

void range(const float *x, int64_t n, float *low, float *high) {
  Floats least = Floats{} + x[0], most = least;
  Ints nan = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    Floats v;
    load(x + i, LANES, v);
    least = v < least ? v : least;
    most = v > most ? v : most;
    nan |= v != v;
  }
  *low = *high = x[0];
  bool spoilt = x[0] != x[0];
  for (int lane = 0; lane < LANES && n >= LANES; lane++) {
    *low = std::min(*low, least[lane]);
    *high = std::max(*high, most[lane]);
    spoilt |= nan[lane] != 0;
  }
  for (; i < n; i++) {
    *low = std::min(*low, x[i]);
    *high = std::max(*high, x[i]);
    spoilt |= x[i] != x[i];
  }
  if (spoilt)
    *low = *high = NAN;
}

// ---- scales ----

int32_t exponent_of(float peak, const QuantPlan &q, float top) { // biased; 255 is NaN
  int32_t bits;
  if (q.rule == RCEIL) {
    bits = as_bits(peak / top);
    const int32_t exponent = bits >> 23;
    const int32_t up = (bits & 0x7fffff) > (exponent == 0 ? 1 << 22 : 0);
    return bits > EXPONENT ? 255 : std::min(exponent + up, 254);
  }
  bits = as_bits(peak);
  if (bits > EXPONENT)
    return 255;
  if (q.rule == EVEN)
    bits += 1 << (22 - q.mantissa);
  const int32_t up = q.rule == CEIL && (bits & 0x7fffff) > 0;
  return std::max((bits >> 23) + up - int32_t(q.top_exponent), 0);
}

// Of each group with this peak: what entries are multiplied with or divided by (`into`) before they are rounded, and
// what they are multiplied with (`back`) after.
void factors(const int32_t *peaks, int64_t n, const QuantPlan &q, float top, float total, float *into, float *back) {
  if (q.official) {
    for (int64_t i = 0; i < n; i++)
      into[i] = back[i] = at_least(as_float(peaks[i]), 1e-6f);
  } else if (q.scale == E8M0) {
    for (int64_t i = 0; i < n; i++) {
      const int32_t e = exponent_of(as_float(peaks[i]), q, top);
      into[i] = e == 0 && q.rule == RCEIL ? 1.0f : as_float(std::max(e << 23, 1 << 23));
      back[i] = e == 255 ? NAN : as_float(std::max(e << 23, 1 << 22));
    }
  } else if (q.scale == E4M3) {
    const Grid e4m3 = grid(448.0f, 3, -6);
    const float inverse = 1.0f / total; // (a total of 1 changes nothing)
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float scale = on_grid<false>(at_least((as_float(peaks[i]) / top) / total, 0.015625f), e4m3);
      into[i] = inverse / scale;
      back[i] = total * scale;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      into[i] = back[i] = shortened(at_least(as_float(peaks[i]) / top, TINY));
  }
}

} // namespace
