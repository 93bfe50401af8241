// The cross entropy of rows of logits and its derivative on a CPU. The plain version is `_terms` in evenstep/models/ops.py.
//
// With p = softmax(x) and lse = log sum exp(x), the loss of a row with target t is lse - x_t, its z-loss is z lse^2, and the
// derivative of their sum is (1 + 2 z lse) p - onehot(t), which is written over the logits. Each row is read from memory
// once: a row of 32,000 logits takes 64 KiB in bf16 and 125 KiB in fp32, so the later passes find it in the second-level
// cache.

#include "cpu_low_precision.h"
#include "cpu_measure.h"

using namespace evenstep;

namespace {

inline float read(float x) { return x; }
inline float read(uint16_t x) { return from_bf16(x); }
inline void write(float x, float *to) { *to = x; }
inline void write(float x, uint16_t *to) { *to = to_bf16(x); }

// exp(x) for x <= 0, within 2 units in the last place, and 0 below exp(-86), which is nothing beside a sum of at least 1. NaN
// stays NaN. exp(x) = 2^k exp(r) with x = k log 2 + r and |r| <= log(2) / 2, and exp(r) by its Taylor series, whose first
// omitted term is below 6e-9.
inline float exp_of(float x) {
  const float far = 12582912.0f; // 1.5 * 2^23: the sum rounds to an integer, which is then in the lowest bits
  const float at = x < -86 ? -86 : x, sum = at * 1.44269504f + far, k = sum - far;
  const float r = (at - k * 0.693359375f) + k * 2.12194440e-4f; // log 2 in two parts: k times the first one is exact
  float y = 1 / 5040.0f;
  y = y * r + 1 / 720.0f;
  y = y * r + 1 / 120.0f;
  y = y * r + 1 / 24.0f;
  y = y * r + 1 / 6.0f;
  y = y * r + 0.5f;
  y = y * r + 1;
  y = y * r + 1;
  y = as_float(as_bits(y) + (as_bits(sum) << 23));
  return x < -86 ? 0 : y;
}

template <class T> float largest(const T *x, int64_t n) {
  float top[W], rest = -INFINITY;
  std::fill(top, top + W, rest);
  int64_t i = 0;
  for (; i + W <= n; i += W)
#pragma omp simd
    for (int j = 0; j < W; j++) {
      const float y = read(x[i + j]);
      top[j] = y > top[j] ? y : top[j];
    }
  for (; i < n; i++)
    rest = std::max(rest, read(x[i]));
  return std::max(max_of(top), rest);
}

// The sum of exp(x - peak), in fp32 in W lanes.
template <class T> float sum_of_exp(const T *x, int64_t n, float peak) {
  float sum[W] = {0}, rest = 0;
  int64_t i = 0;
  for (; i + W <= n; i += W)
#pragma omp simd
    for (int j = 0; j < W; j++)
      sum[j] += exp_of(read(x[i + j]) - peak);
  for (; i < n; i++)
    rest += exp_of(read(x[i]) - peak);
  return sum_of(sum) + rest;
}

// One row: its cross entropy and z-loss into `loss`, and with `gradients` its derivative over the logits.
template <class T> void row_loss(T *x, int64_t n, int64_t target, double z, bool gradients, double *loss) {
  const float peak = largest(x, n), sum = sum_of_exp(x, n, peak), x_t = read(x[target]);
  const double lse = peak + std::log(double(sum));
  loss[0] = lse - x_t;
  loss[1] = z * lse * lse;
  if (!gradients) return;
  const float factor = float((1 + 2 * z * lse) / sum);
#pragma omp simd
  for (int64_t i = 0; i < n; i++)
    write(exp_of(read(x[i]) - peak) * factor, x + i);
  write(exp_of(x_t - peak) * factor - 1, x + target);
}

} // namespace

// The sums of cross entropy and z-loss over the rows that count, fp64 [2]. logits: [rows, n] of a Type; targets: one per row,
// in 0..n-1, and `counts` whether the row counts, 1 or 0.
PUBLIC void evenstep_cross_entropy(void *logits, int64_t type, int64_t rows, int64_t n, int64_t threads, const int64_t *targets,
                                   const uint8_t *counts, double z, int64_t gradients, double *sums) {
  std::vector<double> losses(2 * rows);
  parallel(rows, threads, [&](int64_t row) {
    double *loss = losses.data() + 2 * row;
    if (type == F32)
      row_loss(static_cast<float *>(logits) + row * n, n, targets[row], z, gradients != 0, loss);
    else
      row_loss(static_cast<uint16_t *>(logits) + row * n, n, targets[row], z, gradients != 0, loss);
  });
  sums[0] = sums[1] = 0;
  for (int64_t row = 0; row < rows; row++)
    for (int i = 0; i < 2; i++)
      sums[i] += counts[row] ? losses[2 * row + i] : 0;
}
