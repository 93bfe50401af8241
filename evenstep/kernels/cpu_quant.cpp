// A tensor through a low-bit format and back, on CPUs: the twin of evenstep/lowbit/formats.py, to the bit.
//
// Rows are worked through in segments of whole groups that stay in the first-level cache: the peaks of all groups of a
// segment, then all their scales, then the entries. Every operation on a number is the one that formats.py does, in the
// same order and in fp32, so that nothing differs. (Where the compiler may join a product and a sum, the product is exact.)
//
// The (k+1)-th largest magnitude of a group is found in one pass: each lane of a vector keeps its k+1 largest in order, and
// the lanes are merged in the end. Magnitudes are compared as integers, which puts NaN above everything.

#include "cpu_quant_groups.h"

namespace {

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
