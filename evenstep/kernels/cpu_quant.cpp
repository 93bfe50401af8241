// A tensor through a low-bit format and back, on CPUs: the twin of evenstep/lowbit/formats.py, to the bit.
//
// Rows are worked through in segments of whole groups that stay in the first-level cache: the peaks of all groups of a
// segment, then all their scales, then the entries. Every operation on a number is the one that formats.py does, in the
// same order and in fp32, so that nothing differs. (Where the compiler may join a product and a sum, the product is exact.)
//
// The (k+1)-th largest magnitude of a group is found in one pass: each lane of a vector keeps its k+1 largest in order, and
// the lanes are merged in the end. Magnitudes are compared as integers, which puts NaN above everything.

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
constexpr float TINY = 0x1p-126f; // the smallest normal number: no scale is below it, so no quotient is infinite

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

// A scale rounded to 21 bits: its products with values of a grid are exact, so that quantising twice equals quantising once.
inline float shortened(float scale) {
  const uint32_t bits = uint32_t(as_bits(scale));
  return scale == scale ? as_float(int32_t((bits + 4) & ~7u)) : scale;
}

// Values that a format can hold, up to `top` in magnitude. To round y to one of them, a number is added that is so large that
// fp32 has no bits left below one step of the grid, and subtracted again: the addition rounds to nearest, ties to even.
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

// Smallest and largest of n entries; both NaN where an entry is, since comparisons drop a NaN.
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

// The E8M0 scale (OCP MX): a power of two as its biased exponent; 255 is NaN. A Rule says how it is rounded.
int32_t exponent_of(float peak, const QuantPlan &q, float top) {
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

// ---- entries ----

// N: entries of a group where known to the compiler, else 0.
template <bool integer, bool multiply, int N> void entries(const float *x, int64_t n, float into, float back, const Grid &g, float *out) {
  n = N ? N : n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    out[i] = on_grid<integer>(multiply ? x[i] * into : x[i] / into, g) * back;
}

template <bool integer, bool multiply> void entries(const float *x, int64_t n, float into, float back, const Grid &g, float *out) {
  if (n == 16)
    entries<integer, multiply, 16>(x, n, into, back, g, out);
  else if (n == 32)
    entries<integer, multiply, 32>(x, n, into, back, g, out);
  else
    entries<integer, multiply, 0>(x, n, into, back, g, out);
}

template <bool integer> void official_entries(const float *x, int64_t n, float into, float back, const Grid &g, float *out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    out[i] = on_grid<integer>((x[i] * g.top) / into, g) * back / g.top;
}

// Integers 0..levels with a zero point: scale = (max - min) / levels, zero = -round(min / scale).
void asymmetric_entries(const float *x, int64_t n, const QuantPlan &q, float levels, float *out) {
  float low, high;
  range(x, n, &low, &high);
  const float span = high - low;
  const float scale = q.official ? at_least(span, 1e-5f) / levels : shortened(at_least(span / levels, TINY));
  const float zero = at_most(at_least(-to_integer(low / scale), 0.0f), levels);
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    out[i] = (at_most(at_least(to_integer(x[i] / scale) + zero, 0.0f), levels) - zero) * scale;
}

// Puts outliers, which are above the limit, back as they were. `out` was computed for all entries: no branch in that loop.
void keep(const float *x, int64_t n, int32_t limit, float *out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    out[i] = magnitude(x[i]) > limit ? x[i] : out[i];
}

void group(const float *x, int64_t n, const QuantPlan &q, const Grid &g, float into, float back, float *out) {
  const bool multiply = q.scale == E4M3;
  if (q.official)
    q.integer ? official_entries<true>(x, n, into, back, g, out) : official_entries<false>(x, n, into, back, g, out);
  else if (q.integer)
    multiply ? entries<true, true>(x, n, into, back, g, out) : entries<true, false>(x, n, into, back, g, out);
  else
    multiply ? entries<false, true>(x, n, into, back, g, out) : entries<false, false>(x, n, into, back, g, out);
}

int32_t limit_of(const float *x, int64_t n, int64_t outliers) {
  switch (outliers) {
  case 0: return n == 16 ? peak<16>(x, n) : n == 32 ? peak<32>(x, n) : peak<0>(x, n);
  case 1: return ranked<1>(x, n);
  case 2: return ranked<2>(x, n);
  case 3: return ranked<3>(x, n);
  default: return ranked<4>(x, n);
  }
}

// ---- rows ----

// Scratch memory of one thread.
struct Buffers { std::vector<float> x, out, into, back; std::vector<int32_t> limits; };

void unpack(const uint16_t *x, int64_t n, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    to[i] = as_float(int32_t(uint32_t(x[i]) << 16));
}

void pack(const float *x, int64_t n, uint16_t *to) { // to nearest, ties to even
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = uint32_t(as_bits(x[i]));
    to[i] = x[i] == x[i] ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
  }
}

const float *read(const void *x, int64_t type, int64_t start, int64_t n, std::vector<float> &buffer) {
  if (type == 0)
    return static_cast<const float *>(x) + start;
  buffer.resize(n);
  unpack(static_cast<const uint16_t *>(x) + start, n, buffer.data());
  return buffer.data();
}

int32_t row_peak(const QuantPlan &q, const void *x, int64_t row, Buffers &b) {
  int32_t most = 0;
  for (int64_t start = 0; start < q.width; start += SEGMENT) {
    const int64_t n = std::min(SEGMENT, q.width - start);
    most = std::max(most, peak<0>(read(x, q.x_type, row * q.width + start, n, b.x), n));
  }
  return most;
}

// The second-level scale; the lower bound keeps its reciprocal, and that of the smallest scale below it, finite.
inline float total_of(int32_t peak, float top) { return at_least(as_float(peak) / (448.0f * top), 0x1p-120f); }

void segment(const QuantPlan &q, float top, float total, const float *x, int64_t n, float *out, Buffers &b) {
  const Grid g = grid(top, q.mantissa, q.low);
  const int64_t count = (n + q.group - 1) / q.group;
  auto size = [&](int64_t i) { return std::min(q.group, n - i * q.group); };
  if (q.asymmetric) {
    for (int64_t i = 0; i < count; i++)
      asymmetric_entries(x + i * q.group, size(i), q, float(2 * top + 1), out + i * q.group);
    return;
  }
  b.limits.resize(count);
  b.into.resize(count);
  b.back.resize(count);
  for (int64_t i = 0; i < count; i++)
    b.limits[i] = limit_of(x + i * q.group, size(i), q.outliers);
  if (q.total == ROW) { // the segment is a whole row
    const int32_t most = q.outliers ? peak<0>(x, n) : *std::max_element(b.limits.begin(), b.limits.end());
    total = shortened(total_of(most, top));
  }
  factors(b.limits.data(), count, q, top, total, b.into.data(), b.back.data());
  for (int64_t i = 0; i < count; i++) {
    group(x + i * q.group, size(i), q, g, b.into[i], b.back[i], out + i * q.group);
    if (q.outliers)
      keep(x + i * q.group, size(i), b.limits[i], out + i * q.group);
  }
}

void one_row(const QuantPlan &q, float top, float total, const void *x, void *out, int64_t row, Buffers &b) {
  const int64_t step = q.total == ROW ? q.width : q.group * std::max<int64_t>(1, SEGMENT / q.group);
  for (int64_t start = 0; start < q.width; start += step) {
    const int64_t n = std::min(step, q.width - start), at = row * q.width + start;
    const float *from = read(x, q.x_type, at, n, b.x);
    if (q.out_type == 0) {
      segment(q, top, total, from, n, static_cast<float *>(out) + at, b);
    } else {
      b.out.resize(n);
      segment(q, top, total, from, n, b.out.data(), b);
      pack(b.out.data(), n, static_cast<uint16_t *>(out) + at);
    }
  }
}

// f(first row, last row, number of the part) for parts of about SHARE entries.
template <class F> void in_parts(const QuantPlan &q, int64_t threads, F f) {
  const int64_t step = std::max<int64_t>(1, SHARE / q.width), parts = (q.rows + step - 1) / step;
#ifdef _OPENMP
  if (threads > 1 && parts > 1) { // one thread does not enter OpenMP, whose pool does not survive a fork
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < parts; i++)
      f(i * step, std::min((i + 1) * step, q.rows), i);
    return;
  }
#endif
  for (int64_t i = 0; i < parts; i++)
    f(i * step, std::min((i + 1) * step, q.rows), i);
}

} // namespace

extern "C" __attribute__((visibility("default"))) int64_t evenstep_quant_fields() { return sizeof(QuantPlan) / 8; }

// x and out: [rows, width], out may not be x. `top`: the grid's largest value.
extern "C" __attribute__((visibility("default"))) void
evenstep_fake_quantize(const QuantPlan *plan, int64_t threads, float top, const void *x, void *out) {
  const QuantPlan q = *plan;
  float total = 1.0f;
  if (q.total == TENSOR) {
    std::vector<int32_t> peaks(q.rows);
    in_parts(q, threads, [&](int64_t first, int64_t last, int64_t) {
      Buffers b;
      for (int64_t row = first; row < last; row++)
        peaks[row] = row_peak(q, x, row, b);
    });
    total = total_of(*std::max_element(peaks.begin(), peaks.end()), top);
  }
  in_parts(q, threads, [&](int64_t first, int64_t last, int64_t) {
    Buffers b;
    for (int64_t row = first; row < last; row++)
      one_row(q, top, total, x, out, row, b);
  });
}
