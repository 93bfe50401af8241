// Measuring a gradient: largest magnitude, sum of squares, and sum of squares after AdaClip.
#pragma once

#include "cpu_threads.h"

namespace evenstep {

// ---- lanes: W independent sums or maxima, which the compiler keeps in vector registers ----

// Pairwise, in a fixed order; overwrites `lanes`.
template <class T> static inline T sum_of(T *lanes) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++)
      lanes[j] += lanes[j + half];
  return lanes[0];
}

static inline float max_of(const float *lanes) {
  float top[W];
  std::memcpy(top, lanes, sizeof top);
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++)
      top[j] = top[j + half] > top[j] ? top[j + half] : top[j];
  return top[0];
}

// ---- largest magnitude and sum of squares ----

struct Measured { float peak = 0; double squares = 0; };

// Squares are summed in fp32 over at most PART entries in W lanes (relative error 1e-7), and once more in fp64 where the
// sum left the range of fp32. A NaN or Inf among the entries makes the sum NaN or Inf, while `peak` ignores NaN.
static inline __attribute__((always_inline)) void accumulate(const float *__restrict g, int width, float *__restrict sum, float *__restrict peak) {
#pragma omp simd
  for (int j = 0; j < width; j++) {
    float x = g[j], y = std::fabs(x);
    sum[j] += x * x;
    peak[j] = y > peak[j] ? y : peak[j];
  }
}

// Whether a sum of squares in fp32 is accurate: neither overflow nor entries whose squares underflow.
static inline bool trusted(float total, const float *peak) {
  return (total > 1e-20f && total < 1e37f) || (total == 0 && max_of(peak) == 0);
}

static inline double squares_of(const float *g, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++)
    sum += double(g[i]) * g[i];
  return sum;
}

// Entries that AdaClip may clip, collected while measuring: those above `low`, a lower bound of this step's limit. The norm
// after clipping follows from them and from the squares of the rest, without a second pass over the gradient.
struct LargeEntries {
  static constexpr size_t MOST = 512; // per block; a block with more is read again
  float low = INFINITY;
  double rest = 0; // sum of squares of the other entries
  std::vector<float> above;

  bool complete() const { return above.size() <= MOST; }

  void sift(const float *g, int64_t n) {
    float sum[W] = {0};
      // `most` decides once per W entries whether any of them has to be collected, which is rare.
    for (int64_t i = 0; i < n; i += W) {
      const int width = int(std::min<int64_t>(W, n - i));
      float most = 0;
#pragma omp simd reduction(max : most)
      for (int j = 0; j < width; j++) {
        const float x = std::fabs(g[i + j]), y = x > low ? 0 : x;
        sum[j] += y * y;
        most = x > most ? x : most;
      }
      if (most > low)
        for (int j = 0; j < width; j++)
          if (std::fabs(g[i + j]) > low && complete()) above.push_back(g[i + j]);
    }
    const float total = sum_of(sum);
    if (total > 1e-20f && total < 1e37f) {
      rest += total;
      return;
    }
    for (int64_t i = 0; i < n; i++)
      rest += std::fabs(g[i]) > low ? 0 : double(g[i]) * g[i];
  }
};

static inline void merge(const float *some, float *peak) {
  for (int j = 0; j < W; j++)
    peak[j] = some[j] > peak[j] ? some[j] : peak[j];
}

// At most PART entries at each of PLACES places, which are `apart` entries from one another, read in turn. The rest of fewer
// than W entries has its own lanes: a loop of variable width on the same arrays would force those out of registers.
template <int PLACES> static inline void measure_part(const float *__restrict g, int64_t apart, int64_t n, Measured *found) {
  float sum[PLACES][W] = {{0}}, top[PLACES][W] = {{0}};
  int64_t i = 0;
  for (; i + W <= n; i += W)
    for (int place = 0; place < PLACES; place++) {
      if (PLACES == 1) {
        fetch(g + i + AHEAD);
        fetch(g + i + AHEAD + 16);
      }
      accumulate(g + place * apart + i, W, sum[place], top[place]);
    }
  for (int place = 0; place < PLACES; place++) {
    const float *here = g + place * apart;
    float total = sum_of(sum[place]);
    if (i < n) {
      float rest[W] = {0}, rest_top[W] = {0};
      accumulate(here + i, int(n - i), rest, rest_top);
      merge(rest_top, top[place]);
      total += sum_of(rest);
    }
    found[place] = {max_of(top[place]), trusted(total, top[place]) ? total : squares_of(here, n)};
  }
}

// n consecutive entries in fp32.
static inline Measured measure_entries(const float *g, int64_t n, LargeEntries *large = nullptr) {
  Measured whole, parts[PLACES];
  for (int64_t i = 0; i < n;) {
    const int64_t size = std::min(PART, n - i), count = in_turn && n - i >= PLACES * PART ? PLACES : 1;
    count > 1 ? measure_part<PLACES>(g + i, size, size, parts) : measure_part<1>(g + i, size, size, parts);
    for (int64_t part = 0; part < count; part++, i += size) {
      whole.peak = std::max(whole.peak, parts[part].peak);
      whole.squares += parts[part].squares;
      if (large && parts[part].peak > large->low)
        large->sift(g + i, size);
      else if (large)
        large->rest += parts[part].squares;
    }
  }
  return whole;
}

// One block of a gradient in fp32 or bf16.
static inline Measured measure_block(const Job &job, const Block &block, LargeEntries *large = nullptr) {
  if (job.g_type == F32) {
    const float *g = static_cast<const float *>(job.g) + block.start;
    return measure_entries(g, block.end - block.start, large);
  }
  Measured found;
  float buffer[CHUNK];
  for (int64_t i = block.start; i < block.end; i += CHUNK) {
    int64_t n = std::min(CHUNK, block.end - i);
    load(job.g, job.g_type, i, n, buffer);
    Measured part = measure_entries(buffer, n, large);
    found.peak = std::max(found.peak, part.peak);
    found.squares += part.squares;
  }
  return found;
}

// ---- after clipping ----

// Statistics of a tensor, STATS of interface.py in that order.
enum Stat { GRAD_MAX, GRAD_NORM, NORM_AFTER, CLIP_LIMIT, CLIPPED, GAIN, UPDATE_RMS, SKIPPED, NUM_STATS };

// Sums of one block or tensor: squares of the update, squares after clipping, and clipped entries.
struct Sums { double update = 0, clipped = 0; int64_t count = 0; };

// The sum of the next n blocks, in order; `b` advances by n.
static inline Sums sum_of(const std::vector<Sums> &sums, int64_t &b, int64_t n) {
  Sums whole;
  for (; n > 0; n--, b++) {
    whole.update += sums[b].update;
    whole.clipped += sums[b].clipped;
    whole.count += sums[b].count;
  }
  return whole;
}

// Squares of a block after AdaClip, in fp64: |g| > limit becomes g * rescale, with rescale = limit / max |g|.
static inline Sums clipped_block(const Job &job, const Block &block, float limit, double rescale) {
  Sums found;
  float buffer[CHUNK];
  for (int64_t i = block.start; i < block.end; i += CHUNK) {
    int64_t n = std::min(CHUNK, block.end - i), over = 0;
    load(job.g, job.g_type, i, n, buffer);
    double squares = 0;
#pragma omp simd reduction(+ : squares, over)
    for (int64_t j = 0; j < n; j++) {
      bool above = std::fabs(buffer[j]) > limit;
      double x = above ? buffer[j] * rescale : double(buffer[j]);
      squares += x * x;
      over += above;
    }
    found.clipped += squares;
    found.count += over;
  }
  return found;
}

// One entry as the moments receive it: clipped (`reduced` = gain * rescale above `limit`) or multiplied by `gain`. As in the
// plain code a product that overflows becomes the largest number, and 0 * Inf and NaN become 0.
static inline float clipped_and_scaled(float g, float gain, float limit, float reduced) {
  // Hazard: selections without `||`, which gcc would compile to branches, and the loops around this to scalar code.
  float x = g * (std::fabs(g) > limit ? reduced : gain);
  x = x > FLT_MAX ? FLT_MAX : x;
  x = x < -FLT_MAX ? -FLT_MAX : x;
  return x == x ? x : 0;
}

} // namespace evenstep
