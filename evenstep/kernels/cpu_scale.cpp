// The fused step of SCALE's matrices on a CPU (arXiv 2506.16659): p <- p (1 - lr wd) - lr g / size, where size is the norm of
// each row or column of the gradient g, or of its average m for the last layer. A tensor of more than two dimensions counts as
// [dimension 0, rest], row-major.
//
// Row norms: `measure_rows` takes the norms of all rows and finds out whether the gradient is finite, then `step_row` updates.
// Column norms: they are known only once the whole matrix is read, so `measure_columns` takes them first.
// Moments: the average is updated row by row inside of the second pass, and its row norms are taken from what was stored.

#include "cpu_low_precision.h"
#include "cpu_measure.h"

using namespace evenstep;

namespace {

// Parts of the rows that are summed independently for column norms. A constant, and not the number of threads: the order of
// additions, and so the result, must not depend on that.
constexpr int64_t GROUPS = 16;

// The factors of one matrix, as SCALE_ROWS in interface.py describes them.
struct Rates {
  float finite, gain, keep, add, rate, shrink, root;
};

// A unit of work: about BLOCK entries of whole rows.
int64_t rows_of_unit(int64_t length) { return std::max(BLOCK / length / PLACES, int64_t(1)) * PLACES; }

// Rows of a unit that are measured in turn: `count`, which are `apart` rows from one another. For shorter rows the sums of the
// lanes cost more than reading in turn saves.
struct Turns {
  int64_t count, apart;
  Turns(int64_t rows, int64_t length) : count(in_turn && rows % PLACES == 0 && length >= 256 ? PLACES : 1), apart(rows / count) {}
};

// Squared norms of rows first..last-1 into squares[first..last-1], fp64; returns the largest magnitude, Inf where an entry is
// not finite.
float measure_rows(const Job &job, int64_t first, int64_t last, int64_t length, double *squares) {
  const Turns turns(job.g_type == F32 ? last - first : 1, length);
  float top = 0;
  for (int64_t row = first; turns.count > 1 && row < first + turns.apart; row++)
    for (int64_t i = 0; i < length; i += PART) {
      Measured found[PLACES];
      measure_part<PLACES>(static_cast<const float *>(job.g) + row * length + i, turns.apart * length, std::min(PART, length - i), found);
      for (int64_t place = 0; place < PLACES; place++) {
        squares[row + place * turns.apart] += found[place].squares;
        top = std::max(top, found[place].peak);
      }
    }
  for (int64_t row = first; turns.count == 1 && row < last; row++) {
    const Measured found = measure_block(job, {0, row * length, (row + 1) * length, 0});
    squares[row] = found.squares;
    top = std::max(top, found.peak);
  }
  return top;
}

// What an entry is divided by. The norm of a row is one number, and a product with its inverse is cheaper; the plain code
// divides, and differs in the last bit.
struct ByColumns {
  const float *divisors;
  float operator()(int64_t column, float x) const { return x / divisors[column]; }
};
struct ByRow {
  float inverse;
  float operator()(int64_t, float x) const { return x * inverse; }
};

// p <- p (1 - lr wd) - lr x / size (SCALE, arXiv 2506.16659) for n entries from `at` on, where `column` is the column of the
// first one; returns the sum of squares of the direction x / size.
template <class F> double scale_chunk(const Job &job, int64_t at, int64_t column, int64_t n, const float *__restrict x, float sign, const Rates &rates, F divided) {
  const float shrink = rates.shrink, rate = rates.rate;
  float buffer[CHUNK], *__restrict p = buffer, sum[W] = {0}, rest = 0;
  // fp32 is updated in place, bf16 through a buffer. `__restrict`: x and p never overlap, as `struct Job` requires.
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

// One row: momentum, normalisation, update. Returns the sum of squares of its direction. `squares` is the row's where it is
// known, `divisors` are the norms of columns where those are divided by. The row is read twice, the second time from cache.
double step_row(const Job &job, int64_t row, int64_t length, const Rates &c, const float *divisors, const double *squares, float floor, const Coder *coder) {
  float g[CHUNK], m[CHUNK]; // unpacked bf16 and 8-bit entries
  const int64_t begin = row * length;
  auto gradient = [&](int64_t at, int64_t n) -> const float * {
    if (job.g_type == F32)
      return static_cast<const float *>(job.g) + at;
    load(job.g, job.g_type, at, n, g);
    return g;
  };
  // The momentum m <- b m + (1 - b) g, without bias correction, and reading it.
  auto average = [&](int64_t at, int64_t n) -> const float * {
    return open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
  };
  auto update_average = [&](int64_t at, int64_t n) {
    const float *x = gradient(at, n), keep = c.keep, add = c.add * c.gain;
    float *to = open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
    // The parameter is prefetched here: the update that follows finds everything else in cache.
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
    // Hazard: entry `at` begins a block of 256 codes, because CHUNK and, for 8-bit moments, the length of a row are multiples of
    // 256 (`refusal` in cpu.py). So no other thread writes these scales.
    close_moment(job.m, job.m_type, job.m_scale, coder, at, n, to);
  };
  double known = 0;
  if (squares) {
    known = *squares;
  } else if (!divisors) {
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = std::min(CHUNK, length - i), at = begin + i;
      if (job.m) update_average(at, n);
      known += measure_entries(job.m ? average(at, n) : gradient(at, n), n).squares;
    }
  }
  // root = sqrt(length) for the RMS, 1 for the 2-norm; the floor keeps a row of zeros from dividing by 0.
  const ByRow by_row{1 / std::max(float(std::sqrt(known)) / c.root, floor)};
  double sum = 0;
  for (int64_t i = 0; i < length; i += CHUNK) {
    const int64_t n = std::min(CHUNK, length - i), at = begin + i;
    if (job.m && divisors) update_average(at, n);
    const float *x = job.m ? average(at, n) : gradient(at, n), sign = job.m ? 1 : c.gain;
    sum += divisors ? scale_chunk(job, at, i, n, x, sign, c, ByColumns{divisors}) : scale_chunk(job, at, i, n, x, sign, c, by_row);
  }
  return sum;
}

// Squared norms of a matrix's columns, and largest magnitude (Inf where an entry is not finite) and norm of the whole. Rows
// are divided into GROUPS parts with fp64 sums of their own, [GROUPS, columns], added in order: no locks, deterministic.
Measured measure_columns(const Job &job, int64_t threads, double *squares) {
  const int64_t length = job.rows ? job.size / job.rows : 0, groups = std::min(GROUPS, job.rows);
  std::vector<double> sums(groups * length, 0.0);
  std::vector<float> peaks(groups, 0.0f);
  parallel(groups, threads, [&](int64_t part) {
    double *to = sums.data() + part * length;
    float buffer[CHUNK], peak[W] = {0};
    int64_t row = job.rows * part / groups;
    const int64_t last = job.rows * (part + 1) / groups;
    auto one = [&](const float *g, int64_t at, int64_t n) { // n entries of one row, from column `at` on
      for (int64_t j = 0; j < n; j++) {
        const float y = std::fabs(g[j]);
        peak[0] = y > peak[0] ? y : peak[0];
        to[at + j] += double(g[j]) * g[j];
      }
    };
    if (job.g_type == F32) {
      const int64_t apart = (last - row) / PLACES, whole = length / W * W;
      for (const int64_t end = row + apart; row < end; row++) {
        const float *g = static_cast<const float *>(job.g) + row * length;
        // W sums stay in registers for the rows read in turn, so that the array of sums is read and written once for them.
        for (int64_t c = 0; c < whole; c += W) {
          double sum[W];
          std::memcpy(sum, to + c, sizeof sum);
          for (int64_t place = 0; place < PLACES; place++) {
            const float *x = g + place * apart * length + c;
#pragma omp simd
            for (int j = 0; j < W; j++) {
              const float y = std::fabs(x[j]);
              peak[j] = y > peak[j] ? y : peak[j];
              sum[j] += double(x[j]) * x[j];
            }
          }
          std::memcpy(to + c, sum, sizeof sum);
        }
        for (int64_t place = 0; place < PLACES; place++)
          one(g + place * apart * length + whole, whole, length - whole);
      }
      row += (PLACES - 1) * apart;
    }
    for (; row < last; row++)
      for (int64_t at = 0; at < length; at += CHUNK) {
        const int64_t n = std::min(CHUNK, length - at);
        load(job.g, job.g_type, row * length + at, n, buffer);
        one(buffer, at, n);
      }
    peaks[part] = max_of(peak);
  });
  Measured whole;
  for (int64_t column = 0; column < length; column++) {
    double sum = 0;
    for (int64_t part = 0; part < groups; part++)
      sum += sums[part * length + column];
    squares[column] = sum;
    whole.squares += sum;
  }
  for (float x : peaks)
    whole.peak = std::max(whole.peak, x);
  if (!std::isfinite(whole.squares)) whole.peak = INFINITY; // the comparisons above drop a NaN, the sum does not
  return whole;
}

// The step of one matrix; returns the norm of its direction. Where `measured` is given, rows are measured here and the result
// is written there: the row norms of the gradient are needed for both.
float scale_tensor(const Job &job, Rates c, const float *divisors, float floor, int64_t threads, Measured *measured) {
  if (job.size == 0) return 0;
  const int64_t length = job.size / job.rows, several = rows_of_unit(length), units = (job.rows + several - 1) / several;
  std::vector<double> squares(measured ? job.rows : 0);
  if (measured) {
    std::vector<float> peaks(units);
    parallel(units, threads, [&](int64_t unit) {
      peaks[unit] = measure_rows(job, unit * several, std::min((unit + 1) * several, job.rows), length, squares.data());
    });
    for (float x : peaks)
      measured->peak = std::max(measured->peak, x);
    for (double x : squares)
      measured->squares += x;
    if (!std::isfinite(measured->squares)) measured->peak = INFINITY;
    c.finite = std::isfinite(measured->peak);
  }
  if (c.finite == 0) return 0; // the matrix and its average stay as they are
  std::shared_ptr<const Coder> coder = job.m_type == INT8 ? coder_of(job.m_map) : nullptr;
  const bool known = measured && !job.m && !divisors; // without momentum the gradient itself is normalised
  std::vector<double> sums(units);
  // Units are divided among threads as in the pass that measured, so that each begins with rows that its caches still hold.
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

// A whole step of k matrices. options: fp64 sign, lr, decay, momentum, rms (1 or 0), columns (1 or 0), floor of the norms.
// stats is as in `evenstep_step`.
PUBLIC void evenstep_scale(const Job *jobs, int64_t k, int64_t threads, const double *options, float *stats) {
  const double sign = options[0], lr = options[1], decay = options[2], momentum = options[3];
  const bool rms = options[4] != 0, columns = options[5] != 0;
  const float floor = float(options[6]);
  for (int64_t i = 0; i < k; i++) {
    const Job &job = jobs[i];
    const int64_t length = job.rows ? job.size / job.rows : 0, count = std::max<int64_t>(columns ? job.rows : length, 1);
    const float root = rms ? float(std::sqrt(double(count))) : 1;
    Rates c{1, float(sign), float(momentum), float(1 - momentum), float(lr), float(1 - lr * decay), root};
    Measured found;
    float direction;
    if (columns) {
      std::vector<double> squares(length);
      found = measure_columns(job, threads, squares.data());
      std::vector<float> divisors(length);
      for (int64_t j = 0; j < length; j++)
        divisors[j] = std::max(float(std::sqrt(squares[j])) / root, floor);
      c.finite = std::isfinite(found.peak);
      direction = scale_tensor(job, c, divisors.data(), floor, threads, nullptr);
    } else {
      direction = scale_tensor(job, c, nullptr, floor, threads, &found);
    }
    const bool finite = std::isfinite(found.peak);
    const float norm = finite ? float(std::sqrt(found.squares)) : NAN;
    stats[GRAD_MAX * k + i] = found.peak;
    stats[GRAD_NORM * k + i] = norm;
    stats[NORM_AFTER * k + i] = direction;
    stats[CLIP_LIMIT * k + i] = NAN;
    stats[CLIPPED * k + i] = 0;
    stats[GAIN * k + i] = finite ? direction / std::max(norm, FLT_MIN) : NAN;
    stats[UPDATE_RMS * k + i] = float(direction * lr / std::sqrt(double(std::max<int64_t>(job.size, 1))));
    stats[SKIPPED * k + i] = !finite;
  }
}
