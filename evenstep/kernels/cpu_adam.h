// Adam's step on a block, behind clipping and scaling.
#pragma once

#include "cpu_moments.h"
#include "cpu_size.h"

namespace {

struct Numbers { // the factors of one tensor, as ADAM_ROWS in interface.py describes them
  float finite, gain, limit, reduced, keep1, keep2, add1, add2, step_size, inverse_root2, eps, shrink, shrink_after, after, cap_factor, cap_spread;
};

struct Sums { double update = 0, clipped = 0; int64_t count = 0; };

// Those of `n` blocks, in order; `b` moves on.
Sums sum_of(const std::vector<Sums> &sums, int64_t &b, int64_t n) {
  Sums whole;
  for (; n > 0; n--, b++) {
    whole.update += sums[b].update;
    whole.clipped += sums[b].clipped;
    whole.count += sums[b].count;
  }
  return whole;
}

// Squares of a block after clipping, and how many entries are clipped.
Sums clipped_block(const Job &job, const Block &block, float limit, double rescale) {
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

inline float read(float g, float gain, float limit, float reduced) {
  float x = std::fabs(g) > limit ? g * reduced : g * gain;
  x = x > FLT_MAX ? FLT_MAX : x; // a gain may overflow; as the plain code, which also reads 0 * Inf and NaN as 0
  x = x < -FLT_MAX ? -FLT_MAX : x;
  return g == 0 || x != x ? 0 : x;
}

struct Lanes {
  float update[W] = {0};
  double squares[W] = {0}; // entries of any size, beside each other
  int32_t count[W] = {0};

  void add_to(Sums &sums, bool capped) {
    sums.update += sum_of(update);
    if (capped) {
      sums.clipped += sum_of(squares);
      sums.count += sum_of(count);
    }
  }
};

// The equation, on at most W entries. CAP: SPAM's clipping by the second moment. SIMPLE: nothing is above the limit, near
// overflow, or forgotten afterwards.
template <bool CAP, bool SIMPLE>
inline __attribute__((always_inline)) void adam_turn(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, int width, const Numbers &c, bool clips, bool zero_history, Lanes &lanes) {
#pragma omp simd
  for (int j = 0; j < width; j++) {
    float x = SIMPLE ? g[j] * c.gain : read(g[j], c.gain, c.limit, c.reduced), mm = m[j], vv = v[j];
    if (CAP && clips) {
      float cap = std::sqrt(vv * c.cap_factor) + c.cap_spread;
      cap = cap == 0 && !zero_history ? FLT_MAX : cap;
      float y = x > cap ? cap : x < -cap ? -cap : x;
      lanes.count[j] += y != x;
      x = y;
    }
    if (CAP)
      lanes.squares[j] += double(x) * x;
    mm = mm * c.keep1 + x * c.add1;
    vv = vv * c.keep2 + x * x * c.add2;
    if (!SIMPLE)
      vv = vv > FLT_MAX ? FLT_MAX : vv;
    float u = c.step_size * (mm / (std::sqrt(vv) * c.inverse_root2 + c.eps)), pp = p[j] * c.shrink - u;
    lanes.update[j] += u * u;
    m[j] = SIMPLE ? mm : mm * c.after;
    v[j] = SIMPLE ? vv : vv * c.after;
    p[j] = SIMPLE ? pp : pp * c.shrink_after;
  }
}

// At most SPAN entries. What SPAM's clipping does not touch, which is nearly all, is spared the roots.
template <bool CAP, bool SIMPLE>
void adam_chunk(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, int64_t n, const Numbers &numbers, bool zero_history, Sums &sums) {
  const Numbers c = numbers;
  Lanes lanes;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    for (int j = 0; j < W; j += 16) {
      fetch(g + i + j + AHEAD);
      fetch(p + i + j + AHEAD);
      fetch(m + i + j + AHEAD);
      fetch(v + i + j + AHEAD);
    }
    float most = 0; // above 0 where anything may be clipped; a little too strict, which costs nothing but time
    if (CAP) {
#pragma omp simd reduction(max : most)
      for (int j = 0; j < W; j++) {
        float x = g[i + j] * c.gain, over = x * x * 1.0001f - v[i + j] * c.cap_factor;
        most = over > most ? over : most;
      }
    }
    if (CAP && most > 0 && c.cap_spread == 0)
      adam_turn<CAP, SIMPLE>(p + i, g + i, m + i, v + i, W, c, true, zero_history, lanes);
    else
      adam_turn<CAP, SIMPLE>(p + i, g + i, m + i, v + i, W, c, false, zero_history, lanes);
  }
  lanes.add_to(sums, CAP);
  if (i < n) { // lanes of its own: those above stay in registers
    Lanes rest;
    adam_turn<CAP, SIMPLE>(p + i, g + i, m + i, v + i, int(n - i), c, true, zero_history, rest);
    rest.add_to(sums, CAP);
  }
}

using Chunk = void (*)(float *, const float *, float *, float *, int64_t, const Numbers &, bool, Sums &);

// The version for a block whose largest gradient is `peak`.
Chunk version(const Numbers &c, bool capped, float peak) {
  const bool simple = peak <= c.limit && peak * std::fabs(c.gain) < 1e17f && c.after == 1 && c.shrink_after == 1;
  return capped ? simple ? adam_chunk<true, true> : adam_chunk<true, false>
                : simple ? adam_chunk<false, true> : adam_chunk<false, false>;
}

struct Coders { std::shared_ptr<const Coder> m, v; };

void adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, const Coders &coders, Sums &sums) {
  float p[CHUNK], g[CHUNK], m[CHUNK], v[CHUNK];
  const int64_t step = job.p_type | job.g_type | job.m_type | job.v_type ? CHUNK : SPAN;
  for (int64_t i = block.start; i < block.end; i += step) {
    int64_t n = std::min(step, block.end - i);
    float *mm = open_moment(job.m, job.m_type, job.m_scale, coders.m.get(), i, n, m);
    float *vv = open_moment(job.v, job.v_type, job.v_scale, coders.v.get(), i, n, v);
    const float *gg = g;
    if (job.g_type == F32)
      gg = static_cast<const float *>(job.g) + i;
    else
      load(job.g, job.g_type, i, n, g);
    float *pp = p;
    if (job.p_type == F32)
      pp = static_cast<float *>(job.p) + i;
    else
      load(job.p, job.p_type, i, n, p);
    chunk(pp, gg, mm, vv, n, c, zero_history, sums);
    close_moment(job.m, job.m_type, job.m_scale, coders.m.get(), i, n, mm);
    close_moment(job.v, job.v_type, job.v_scale, coders.v.get(), i, n, vv);
    if (job.p_type == BF16)
      write_bf16(job, i, n, pp, i);
  }
}

} // namespace
