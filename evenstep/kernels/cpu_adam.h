// One step of Adam, SPAM or Stable-SPAM: the numbers of a whole tensor, then the loop over entries in fp32.
//
// The twin of evenstep/optim/functional.py, which is the reference of the tests. Symbols are those of the papers
// (Stable-SPAM, arXiv 2502.17055; SPAM, arXiv 2501.06842): g gradient, m and v moments, T, mu and nu statistics of one tensor.
#pragma once

#include "cpu_measure.h"

namespace evenstep {

// ---- numbers of a whole tensor ----

// The values of STEP_OPTIONS in interface.py, in that order: Python passes them as one fp64 vector.
struct StepOptions {
  double sign, lr, beta1, beta2, eps, decay, decay_after, warmup;
  double reset, forget, forget_after; // 1 or 0: restart the age; clear the moments before, or after the update
  double eps_first;                   // 1 or 0: eps enters before the bias is corrected
  double stable, gamma1, gamma2, gamma3, robust, one_counter; // AdaClip and AdaGN
  double capped, cap_factor, cap_spread, zero_history; // SPAM's clipping
};

// 1 - beta^count without cancellation for beta near 1.
static inline double bias_correction(double beta, double count) { return -std::expm1(count * std::log(beta)); }

// The value that enters a running mean in place of x with `robust`: at most twice the bias-corrected mean of the values
// before it, or as much as raises that mean by a tenth, from the 11th update on (functional.py, `robust_input`).
static inline double robust_input(double x, double mean, double count, double gamma) {
  if (count <= 10 || mean == 0) return x;
  const double ratio = std::max(2.0, 1 + 0.1 * bias_correction(gamma, count) / (1 - gamma));
  return std::min(x, ratio * mean / bias_correction(gamma, count - 1));
}

// Scalars of a tensor's state: the age, and for Stable-SPAM T, mu, sqrt(nu) and n.
enum Scalar { AGE, PEAK, NORM, NORM_RMS, COUNT };

// The factors of one tensor in the loop over entries, as ADAM_ROWS in interface.py describes them.
struct Numbers {
  float finite, gain, limit, reduced, keep1, keep2, add1, add2, step_size, inverse_root2, eps, shrink, shrink_after, after;
  float cap_factor, cap_spread, unit; // unit: of a block, as below
};

// What entries are multiplied by before SPAM's clipping squares them: squares of at most 1 stay in the range of fp32.
static inline float unit_of(float peak) { return std::min(1 / peak, 1e38f); }

struct TensorStep {
  double scalars[5] = {0}; // a Scalar each; stored as fp32, computed in fp64
  double sum = 0;          // of the squares of all entries
  float peak = 0, norm = 0, clipped_norm = 0, limit = INFINITY, rescale = 1, gain = 1;
  int64_t clipped = 0; // entries
  bool finite = true;  // false: the step leaves the tensor and its state unchanged
  Numbers numbers;

  double &operator[](Scalar which) { return scalars[which]; }

  // A lower bound of AdaClip's limit, known before the gradient is read: the limit with max |g| = 0. The last factor covers
  // the rounding of the limit to fp32.
  float least_limit(const StepOptions &options) const {
    return float(options.gamma3 * scalars[PEAK] / bias_correction(options.gamma3, scalars[COUNT] + 1)) * (1 - 1e-6f);
  }

  // AdaClip (Stable-SPAM, step 2): T <- gamma3 T + (1 - gamma3) max |g|, limit = T / (1 - gamma3^n), rescale = limit / max |g|.
  void adaclip(const StepOptions &options) {
    const double largest = options.robust != 0 ? robust_input(peak, scalars[PEAK], scalars[COUNT], options.gamma3) : peak;
    scalars[PEAK] = options.gamma3 * scalars[PEAK] + (1 - options.gamma3) * largest;
    limit = float(scalars[PEAK] / bias_correction(options.gamma3, scalars[COUNT]));
    rescale = limit < peak ? limit / peak : 1;
  }

  // AdaGN (step 3), r = ||g|| after clipping: mu <- gamma1 mu + (1 - gamma1) r, nu <- gamma2 nu + (1 - gamma2) r^2,
  // gain = mu_hat / (sqrt(nu_hat) + eps) / r. The state holds sqrt(nu): nu itself overflows fp32 for norms above 1.8e19,
  // and `hypot` updates the root without squaring.
  void adagn(const StepOptions &options) {
    const double r = options.robust != 0 ? robust_input(clipped_norm, scalars[NORM], scalars[COUNT], options.gamma1) : clipped_norm;
    scalars[NORM] = options.gamma1 * scalars[NORM] + (1 - options.gamma1) * r;
    scalars[NORM_RMS] = std::hypot(std::sqrt(options.gamma2) * scalars[NORM_RMS], std::sqrt(1 - options.gamma2) * r);
    const double mean = scalars[NORM] / bias_correction(options.gamma1, scalars[COUNT]);
    const double root = scalars[NORM_RMS] / std::sqrt(bias_correction(options.gamma2, scalars[COUNT])) + options.eps;
    gain = clipped_norm >= FLT_MIN ? float(std::min(mean / root / clipped_norm, double(FLT_MAX))) : 0;
  }

  // Factors of Adam (step 5) with bias correction by age: p <- p - lr m_hat / (sqrt(v_hat) + eps). MoRet (step 4) clears the
  // moments through keep1 = keep2 = 0 (`forget`); official StableSPAM clears them after the update (`forget_after`).
  void plan(const StepOptions &options) {
    const double root_bias2 = std::sqrt(bias_correction(options.beta2, scalars[AGE])), keep = 1 - options.forget;
    const double step = options.lr * options.warmup / bias_correction(options.beta1, scalars[AGE]);
    Numbers &c = numbers;
    c.finite = finite;
    c.gain = float(gain * options.sign);
    c.limit = limit;
    c.reduced = float(rescale * gain * options.sign);
    c.keep1 = float(keep * options.beta1);
    c.keep2 = float(keep * options.beta2);
    c.add1 = float(1 - options.beta1);
    c.add2 = float(1 - options.beta2);
    c.step_size = float(options.eps_first != 0 ? step * root_bias2 : step);
    c.inverse_root2 = options.eps_first != 0 ? 1 : float(1 / root_bias2);
    c.eps = float(options.eps);
    c.shrink = float(1 - options.lr * options.decay);
    c.shrink_after = float(1 - options.lr * options.decay_after);
    c.after = float(1 - options.forget_after);
    c.cap_factor = float(options.cap_factor);
    c.cap_spread = float(options.cap_spread);
  }
};

// Writes one column of `stats`, fp32 [NUM_STATS, k].
static inline void report(const Job &job, const TensorStep &t, const StepOptions &options, const Sums &sums, int64_t k, int64_t i, float *stats) {
  const double size = double(std::max<int64_t>(job.mask ? job.trained : job.size, 1));
  const bool stable = options.stable != 0, capped = options.capped != 0, entries = std::isfinite(t.sum); // all are finite
  const float after = capped ? float(std::sqrt(sums.clipped)) : !entries ? NAN : stable ? t.clipped_norm * t.gain : t.norm * t.gain;
  stats[GRAD_MAX * k + i] = t.peak;
  stats[GRAD_NORM * k + i] = entries ? t.norm : NAN;
  stats[NORM_AFTER * k + i] = after;
  stats[CLIP_LIMIT * k + i] = stable ? t.limit : NAN;
  stats[CLIPPED * k + i] = float(double(capped ? sums.count : t.clipped) / size);
  stats[GAIN * k + i] = t.finite ? t.gain : 0;
  stats[UPDATE_RMS * k + i] = float(std::sqrt(sums.update / size));
  stats[SKIPPED * k + i] = !t.finite;
}

// ---- the loop over entries ----

// Sums of the loop, one per lane.
template <bool CAP> struct Lanes {
  static constexpr int CAPPED = CAP ? W : 1; // of those that SPAM's clipping alone has
  float update[W] = {0}, squares[CAPPED] = {0};
  int32_t count[CAPPED] = {0};

  void add_to(Sums &sums, double unit) {
    sums.update += sum_of(update);
    if constexpr (CAP) {
      sums.clipped += sum_of(squares) / (unit * unit);
      sums.count += sum_of(count);
    }
  }
};

// The equation on at most W entries; p, g, m and v do not overlap (__restrict lets the compiler vectorise).
// CAP: SPAM's clipping |g| <= sqrt(theta v), v from before this step; without history (v = 0) nothing is clipped unless
// `zero_history`. SIMPLE: no entry is above AdaClip's limit, near overflow, or cleared afterwards, which saves the selects.
template <bool CAP, bool SIMPLE>
static inline __attribute__((always_inline)) void adam_turn(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, int width, const Numbers &c, bool clips, bool zero_history, Lanes<CAP> &lanes) {
#pragma omp simd
  for (int j = 0; j < width; j++) {
    float x = SIMPLE ? g[j] * c.gain : clipped_and_scaled(g[j], c.gain, c.limit, c.reduced), mm = m[j], vv = v[j];
    if (CAP && clips) {
      float cap = std::sqrt(vv * c.cap_factor) + c.cap_spread;
      cap = cap == 0 && !zero_history ? FLT_MAX : cap;
      float y = x > cap ? cap : x < -cap ? -cap : x;
      lanes.count[j] += y != x;
      x = y;
    }
    if (CAP) {
      const float y = x * c.unit;
      lanes.squares[j] += y * y;
    }
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

// At most SPAN entries at each of COUNT places, which are SPAN entries from one another, updated in turn. Square roots for
// SPAM's clipping are computed only for turns in which g^2 > theta v somewhere. The factor 1.0001 covers the rounding of this
// test: it computes a root too many now and then, and changes no result.
template <bool CAP, bool SIMPLE, int COUNT>
static void adam_chunk(float *__restrict p, const float *__restrict g, float *__restrict m, float *__restrict v, int64_t n, const Numbers &numbers, bool zero_history, Sums &sums) {
  const Numbers c = numbers;
  Lanes<CAP> lanes[COUNT];
  int64_t i = 0;
  for (; i + W <= n; i += W)
    for (int place = 0; place < COUNT; place++) {
      const int64_t at = i + place * SPAN;
      for (int j = 0; j < W; j += 16) {
        fetch(g + at + j + AHEAD);
        fetch(p + at + j + AHEAD);
        fetch(m + at + j + AHEAD);
        fetch(v + at + j + AHEAD);
      }
      float most = 0; // above 0 where an entry may be clipped
      if (CAP) {
#pragma omp simd reduction(max : most)
        for (int j = 0; j < W; j++) {
          float x = g[at + j] * c.gain, over = x * x * 1.0001f - v[at + j] * c.cap_factor;
          most = over > most ? over : most;
        }
      }
      if (CAP && most > 0 && c.cap_spread == 0)
        adam_turn<CAP, SIMPLE>(p + at, g + at, m + at, v + at, W, c, true, zero_history, lanes[place]);
      else
        adam_turn<CAP, SIMPLE>(p + at, g + at, m + at, v + at, W, c, false, zero_history, lanes[place]);
    }
  for (Lanes<CAP> &those : lanes)
    those.add_to(sums, c.unit);
  if (i < n) { // lanes of its own: those above stay in registers
    Lanes<CAP> rest;
    adam_turn<CAP, SIMPLE>(p + i, g + i, m + i, v + i, int(n - i), c, true, zero_history, rest);
    rest.add_to(sums, c.unit);
  }
}

using Chunk = void (*)(float *, const float *, float *, float *, int64_t, const Numbers &, bool, Sums &);

// The version of the loop, for COUNT places, for a block whose largest magnitude is `peak`. 1e17 keeps squares of scaled
// entries in fp32.
template <int COUNT> static inline Chunk version(const Numbers &c, bool capped, float peak) {
  const bool simple = peak <= c.limit && peak * std::fabs(c.gain) < 1e17f && c.after == 1 && c.shrink_after == 1;
  return capped ? simple ? adam_chunk<true, true, COUNT> : adam_chunk<true, false, COUNT>
                : simple ? adam_chunk<false, true, COUNT> : adam_chunk<false, false, COUNT>;
}

// ---- blocks that are not fp32 throughout: defined in cpu_unpacked.cpp ----

// A block with bf16 or 8-bit tensors.
void unpacked_adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, Sums &sums);

// A block of a tensor of which only the entries of a mask are trained (SPAM's sparse momentum). `before`: trained entries of
// the tensor before this block, which is where the block's part of the compact moments starts.
void masked_adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, int64_t before, Sums &sums);

// `before` of every block; empty where no tensor has a mask.
std::vector<int64_t> trained_before(const Job *jobs, const std::vector<Block> &blocks, int64_t threads);

} // namespace evenstep
