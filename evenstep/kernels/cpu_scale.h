// SCALE: rows or columns divided by their norms.
#pragma once

#include "cpu_moments.h"
#include "cpu_size.h"

namespace {

struct Rates { // as SCALE_ROWS in interface.py describes them
  float finite, gain, keep, add, rate, shrink, root;
};

// A unit of SCALE's work: so many rows that they are about a block, and can be read eight at a time.
int64_t rows_of_unit(int64_t length) { return std::max<int64_t>(BLOCK / length / 8 * 8, 8); }

// Squared norms of rows first..last-1; returns the largest entry. Rows are read at eight places in turn, as blocks are.
float size_rows(const Job &job, int64_t first, int64_t last, int64_t length, double *squares) {
  constexpr int64_t STREAMS = 8;
  float top = 0, buffer[CHUNK];
  int64_t row = first;
  if (job.g_type == F32)
    for (; row + STREAMS <= last && length >= W; row += STREAMS) {
      const float *g = static_cast<const float *>(job.g) + row * length;
      float peak[W] = {0};
      for (int64_t s = 0; s < STREAMS; s++)
        squares[row + s] = 0;
      for (int64_t start = 0; start < length; start += SPAN) {
        const int64_t end = std::min(start + SPAN, length), whole = start + (end - start) / W * W;
        float sum[STREAMS][W] = {{0}};
        for (int64_t c = start; c < whole; c += W)
          for (int64_t s = 0; s < STREAMS; s++) {
            const float *x = g + s * length + c;
            fetch(x + STREAMS * length);
            fetch(x + STREAMS * length + 16);
            take(x, W, sum[s], peak);
          }
        for (int64_t s = 0; s < STREAMS; s++) {
          float rest[W] = {0};
          if (whole < end)
            take(g + s * length + whole, int(end - whole), rest, peak);
          const float total = sum_of(sum[s]) + sum_of(rest);
          squares[row + s] += trusted(total, peak) ? total : squares_of(g + s * length + start, end - start);
        }
      }
      top = std::max(top, max_of(peak));
    }
  for (; row < last; row++) {
    Size found;
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = std::min(CHUNK, length - i), at = row * length + i;
      const float *x = buffer;
      if (job.g_type == F32)
        x = static_cast<const float *>(job.g) + at;
      else
        load(job.g, job.g_type, at, n, buffer);
      const Size part = size_of(x, n);
      found.peak = std::max(found.peak, part.peak);
      found.squares += part.squares;
    }
    squares[row] = found.squares;
    top = std::max(top, found.peak);
  }
  return top;
}

struct ByColumns {
  const float *divisors;
  float operator()(int64_t column, float x) const { return x / divisors[column]; }
};
struct ByRow {
  float inverse;
  float operator()(int64_t, float x) const { return x * inverse; }
};

// p <- p * shrink - rate * x / size for n entries from `at` on, `column` being the first one's; returns the direction's
// sum of squares.
template <class F> double scale_chunk(const Job &job, int64_t at, int64_t column, int64_t n, const float *__restrict x, float sign, const Rates &rates, F divided) {
  const float shrink = rates.shrink, rate = rates.rate;
  float buffer[CHUNK], *__restrict p = buffer, sum[W] = {0}, rest = 0;
  if (job.p_type == F32)
    p = static_cast<float *>(job.p) + at;
  else
    load(job.p, job.p_type, at, n, buffer);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    fetch(x + i + AHEAD);
    fetch(x + i + AHEAD + 16);
    if (job.p_type == F32) {
      fetch(p + i + AHEAD);
      fetch(p + i + AHEAD + 16);
    }
#pragma omp simd
    for (int j = 0; j < W; j++) {
      const float u = divided(column + i + j, x[i + j] * sign);
      sum[j] += u * u;
      p[i + j] = p[i + j] * shrink - rate * u;
    }
  }
  for (; i < n; i++) {
    const float u = divided(column + i, x[i] * sign);
    rest += u * u;
    p[i] = p[i] * shrink - rate * u;
  }
  if (job.p_type == BF16)
    write_bf16(job, at, n, p, at);
  return double(sum_of(sum)) + rest;
}

// One row; returns the sum of squares of its direction. `squares` is that of the row where it is known.
double step_row(const Job &job, int64_t row, int64_t length, const Rates &c, const float *divisors, const double *squares, float floor, const Coder *coder) {
  float g[CHUNK], m[CHUNK];
  const int64_t begin = row * length;
  auto gradient = [&](int64_t at, int64_t n) -> const float * {
    if (job.g_type == F32)
      return static_cast<const float *>(job.g) + at;
    load(job.g, job.g_type, at, n, g);
    return g;
  };
  // The average gradient, and before that what makes it take in the new one.
  auto average = [&](int64_t at, int64_t n) -> const float * {
    return open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
  };
  auto take_in = [&](int64_t at, int64_t n) {
    const float *x = gradient(at, n), keep = c.keep, add = c.add * c.gain;
    float *to = open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
    const float *p = static_cast<const float *>(job.p) + (job.p_type == F32 ? at : 0);
    for (int64_t start = 0; start < n; start += W) {
      const int width = int(std::min<int64_t>(W, n - start));
      for (int j = 0; j < W; j += 16) {
        fetch(x + start + j + AHEAD);
        fetch(to + start + j + AHEAD);
        fetch(p + start + j + AHEAD);
      }
#pragma omp simd
      for (int j = 0; j < width; j++)
        to[start + j] = to[start + j] * keep + x[start + j] * add;
    }
    close_moment(job.m, job.m_type, job.m_scale, coder, at, n, to);
  };
  double known = 0;
  if (squares) {
    known = *squares;
  } else if (!divisors) {
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = std::min(CHUNK, length - i), at = begin + i;
      if (job.m) take_in(at, n);
      known += size_of(job.m ? average(at, n) : gradient(at, n), n).squares;
    }
  }
  const ByRow by_row{1 / std::max(float(std::sqrt(known)) / c.root, floor)};
  double sum = 0;
  for (int64_t i = 0; i < length; i += CHUNK) {
    const int64_t n = std::min(CHUNK, length - i), at = begin + i;
    if (job.m && divisors) take_in(at, n);
    const float *x = job.m ? average(at, n) : gradient(at, n), sign = job.m ? 1 : c.gain;
    sum += divisors ? scale_chunk(job, at, i, n, x, sign, c, ByColumns{divisors}) : scale_chunk(job, at, i, n, x, sign, c, by_row);
  }
  return sum;
}

// Squared norms of a tensor's columns; returns the largest entry, Inf where one is not finite, and the norm of all.
Size size_columns(const Job &job, int64_t threads, double *squares) {
  const int64_t length = job.rows ? job.size / job.rows : 0, groups = std::min(GROUPS, job.rows);
  std::vector<double> sums(groups * length, 0.0);
  std::vector<float> peaks(groups, 0.0f);
  parallel(groups, threads, [&](int64_t part) {
    constexpr int64_t STREAMS = 8;
    double *to = sums.data() + part * length;
    float buffer[CHUNK], peak[W] = {0};
    int64_t row = job.rows * part / groups;
    const int64_t last = job.rows * (part + 1) / groups;
    auto one = [&](const float *g, int64_t at, int64_t n) { // of one row
      for (int64_t j = 0; j < n; j++) {
        const float y = std::fabs(g[j]);
        peak[0] = y > peak[0] ? y : peak[0];
        to[at + j] += double(g[j]) * g[j];
      }
    };
    if (job.g_type == F32)
      for (; row + STREAMS <= last; row += STREAMS) {
        const float *g = static_cast<const float *>(job.g) + row * length;
        const int64_t whole = length / W * W;
        for (int64_t c = 0; c < whole; c += W) {
          double sum[W];
          std::memcpy(sum, to + c, sizeof sum);
          for (int64_t s = 0; s < STREAMS; s++) {
            const float *x = g + s * length + c;
            fetch(x + STREAMS * length);
            fetch(x + STREAMS * length + 16);
#pragma omp simd
            for (int j = 0; j < W; j++) {
              const float y = std::fabs(x[j]);
              peak[j] = y > peak[j] ? y : peak[j];
              sum[j] += double(x[j]) * x[j];
            }
          }
          std::memcpy(to + c, sum, sizeof sum);
        }
        for (int64_t s = 0; s < STREAMS; s++)
          one(g + s * length + whole, whole, length - whole);
      }
    for (; row < last; row++)
      for (int64_t at = 0; at < length; at += CHUNK) {
        const int64_t n = std::min(CHUNK, length - at);
        load(job.g, job.g_type, row * length + at, n, buffer);
        one(buffer, at, n);
      }
    peaks[part] = max_of(peak);
  });
  Size whole;
  for (int64_t column = 0; column < length; column++) {
    double sum = 0;
    for (int64_t part = 0; part < groups; part++)
      sum += sums[part * length + column];
    squares[column] = sum;
    whole.squares += sum;
  }
  for (float x : peaks)
    whole.peak = std::max(whole.peak, x);
  if (!std::isfinite(whole.squares)) whole.peak = INFINITY;
  return whole;
}

// SCALE's step on one tensor, whose rows are measured here where `measured` asks for it, which then says what was found.
// Returns the norm of its direction.
float scale_tensor(const Job &job, Rates c, const float *divisors, float floor, int64_t threads, Size *measured) {
  if (job.size == 0) return 0;
  const int64_t length = job.size / job.rows, several = rows_of_unit(length), units = (job.rows + several - 1) / several;
  std::vector<double> squares(measured ? job.rows : 0);
  if (measured) {
    std::vector<float> peaks(units);
    parallel(units, threads, [&](int64_t unit) {
      peaks[unit] = size_rows(job, unit * several, std::min((unit + 1) * several, job.rows), length, squares.data());
    });
    for (float x : peaks)
      measured->peak = std::max(measured->peak, x);
    for (double x : squares)
      measured->squares += x;
    if (!std::isfinite(measured->squares)) measured->peak = INFINITY;
    c.finite = std::isfinite(measured->peak);
  }
  if (c.finite == 0) return 0;
  std::shared_ptr<const Coder> coder = job.m_type == INT8 ? coder_of(job.m_map) : nullptr;
  const bool known = measured && !job.m && !divisors; // the squares are those of what is divided
  std::vector<double> sums(units);
  parallel(units, threads, 2 * WARM, [&](int64_t unit) {
    for (int64_t row = unit * several; row < std::min((unit + 1) * several, job.rows); row++)
      sums[unit] += step_row(job, row, length, c, divisors, known ? &squares[row] : nullptr, floor, coder.get());
  });
  double whole = 0;
  for (double sum : sums)
    whole += sum;
  return float(std::sqrt(whole));
}

} // namespace
