// The largest entry and the norm of a tensor.
#pragma once

#include "cpu_memory.h"

namespace {

// ---- lanes: W sums or maxima side by side ----

template <class T> inline T sum_of(T *lanes) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++)
      lanes[j] += lanes[j + half];
  return lanes[0];
}

inline float max_of(const float *lanes) {
  float top[W];
  std::memcpy(top, lanes, sizeof top);
  for (int half = W / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++)
      top[j] = top[j + half] > top[j] ? top[j + half] : top[j];
  return top[0];
}

// ---- largest entry and norm ----

struct Size { float peak = 0; double squares = 0; };

// Squares are summed in fp32 over some thousand entries in W lanes, which is right to 1e-7, and again in fp64 where they
// left the range of fp32. A NaN or Inf makes the sum NaN or Inf.
inline __attribute__((always_inline)) void take(const float *__restrict g, int width, float *__restrict sum, float *__restrict peak) {
#pragma omp simd
  for (int j = 0; j < width; j++) {
    float x = g[j], y = std::fabs(x);
    sum[j] += x * x;
    peak[j] = y > peak[j] ? y : peak[j];
  }
}

// Whether a sum of squares in fp32 may be trusted.
inline bool trusted(float total, const float *peak) {
  return (total > 1e-20f && total < 1e37f) || (total == 0 && max_of(peak) == 0);
}

double squares_of(const float *g, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++)
    sum += double(g[i]) * g[i];
  return sum;
}

// What AdaClip may clip, found while measuring: entries above `low`, which no limit of this step will be below. The norm
// after clipping follows from them and the squares of the rest, without another pass.
struct High {
  static constexpr size_t MOST = 512; // of a block; one that has more is read again
  float low = INFINITY;
  double rest = 0; // squares of the others
  std::vector<float> above;

  bool complete() const { return above.size() <= MOST; }

  void sift(const float *g, int64_t n) {
    float sum[W] = {0};
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

inline void merge(const float *some, float *peak) {
  for (int j = 0; j < W; j++)
    peak[j] = some[j] > peak[j] ? some[j] : peak[j];
}

Size size_of(const float *__restrict g, int64_t n, High *high = nullptr) {
  Size found;
  float peak[W] = {0};
  for (int64_t i = 0; i < n; i += SPAN) {
    const int64_t end = std::min(i + SPAN, n);
    float sum[W] = {0}, top[W] = {0}, rest[W] = {0}, rest_top[W] = {0};
    int64_t c = i;
    for (; c + W <= end; c += W)
      take(g + c, W, sum, top);
    if (c < end)
      take(g + c, int(end - c), rest, rest_top);
    merge(rest_top, top);
    merge(top, peak);
    float total = sum_of(sum) + sum_of(rest);
    const double squares = trusted(total, top) ? total : squares_of(g + i, end - i);
    found.squares += squares;
    if (high && max_of(top) > high->low)
      high->sift(g + i, end - i);
    else if (high)
      high->rest += squares;
  }
  found.peak = max_of(peak);
  return found;
}

// The same for a block in memory, read at STREAMS places in turn: a core that reads at one place only waits for the
// prefetcher, which starts anew at every page. A third faster.
Size size_of_stored_block(const float *__restrict g, High *high) {
  constexpr int64_t STREAMS = 8, PART = BLOCK / STREAMS, TURN = 256;
  Size found;
  float peak[W] = {0};
  for (int64_t i = 0; i < PART; i += TURN) {
    float sum[W] = {0}, top[W] = {0};
    for (int64_t c = i; c < i + TURN; c += W)
      for (int64_t s = 0; s < STREAMS; s++) {
        const float *x = g + s * PART + c;
        fetch(x + BLOCK);
        fetch(x + BLOCK + 16);
        take(x, W, sum, top);
      }
    merge(top, peak);
    double squares = sum_of(sum);
    if (!trusted(float(squares), top)) {
      squares = 0;
      for (int64_t s = 0; s < STREAMS; s++)
        squares += squares_of(g + s * PART + i, TURN);
    }
    found.squares += squares;
    if (high && max_of(top) > high->low)
      for (int64_t s = 0; s < STREAMS; s++)
        high->sift(g + s * PART + i, TURN);
    else if (high)
      high->rest += squares;
  }
  found.peak = max_of(peak);
  return found;
}

Size size_of_block(const Job &job, const Block &block, High *high = nullptr) {
  if (job.g_type == F32) {
    const float *g = static_cast<const float *>(job.g) + block.start;
    return block.end - block.start == BLOCK ? size_of_stored_block(g, high) : size_of(g, block.end - block.start, high);
  }
  Size found;
  float buffer[CHUNK];
  for (int64_t i = block.start; i < block.end; i += CHUNK) {
    int64_t n = std::min(CHUNK, block.end - i);
    load(job.g, job.g_type, i, n, buffer);
    Size part = size_of(buffer, n, high);
    found.peak = std::max(found.peak, part.peak);
    found.squares += part.squares;
  }
  return found;
}

// The numbers of tensors from those of their blocks, in order.
void gather(const Job *jobs, int64_t first, int64_t last, int64_t number, const float *block_peak, const double *block_squares, float *peak, float *norm) {
  for (int64_t i = first; i < last; i++) {
    Size whole;
    for (int64_t b = blocks_of(jobs[i]); b > 0; b--, number++) {
      whole.peak = std::max(whole.peak, block_peak[number]);
      whole.squares += block_squares[number];
    }
    peak[i] = std::isfinite(whole.squares) ? whole.peak : INFINITY;
    norm[i] = float(std::sqrt(whole.squares));
  }
}

} // namespace
