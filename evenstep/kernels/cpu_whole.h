// The numbers of whole tensors in a step: AdaClip, AdaGN and the factors of Adam, twins of evenstep/optim/functional.py.
#pragma once

#include "cpu_adam.h"

namespace {

struct How { // STEP_OPTIONS of interface.py, in that order
  double sign, lr, beta1, beta2, eps, decay, decay_after, warmup;
  double reset, forget, forget_after; // 1 or 0: the age starts anew; the moments do, before or after the update
  double eps_first;                   // eps enters before the bias is corrected
  double stable, gamma1, gamma2, gamma3, one_counter; // AdaClip and AdaGN
  double capped, cap_factor, cap_spread, zero_history; // SPAM's clipping
};

double bias_correction(double beta, double count) { return -std::expm1(count * std::log(beta)); }

// Scalars of a tensor's state: `AGE`, and for Stable-SPAM the others.
enum Kept { AGE, PEAK, NORM, NORM_RMS, COUNT };
// Statistics of a tensor, STATS of interface.py in that order.
enum Stat { GRAD_MAX, GRAD_NORM, NORM_AFTER, CLIP_LIMIT, CLIPPED, GAIN, UPDATE_RMS, SKIPPED, NUM_STATS };

struct Tensor {
  double kept[5] = {0};
  double sum = 0; // of squares
  float peak = 0, norm = 0, clipped_norm = 0, limit = INFINITY, rescale = 1, gain = 1;
  int64_t clipped = 0;
  bool finite = true;
  Numbers numbers;

  double &operator[](Kept which) { return kept[which]; }

  // AdaClip's limit can be no less than this, whatever the gradient holds.
  float least_limit(const How &how) const {
    return float(how.gamma3 * kept[PEAK] / bias_correction(how.gamma3, kept[COUNT] + 1)) * (1 - 1e-6f);
  }

  void adaclip(const How &how) {
    kept[PEAK] = how.gamma3 * kept[PEAK] + (1 - how.gamma3) * peak;
    limit = float(kept[PEAK] / bias_correction(how.gamma3, kept[COUNT]));
    rescale = limit < peak ? limit / peak : 1;
  }

  void adagn(const How &how) {
    kept[NORM] = how.gamma1 * kept[NORM] + (1 - how.gamma1) * clipped_norm;
    kept[NORM_RMS] = std::hypot(std::sqrt(how.gamma2) * kept[NORM_RMS], std::sqrt(1 - how.gamma2) * clipped_norm);
    const double mean = kept[NORM] / bias_correction(how.gamma1, kept[COUNT]);
    const double root = kept[NORM_RMS] / std::sqrt(bias_correction(how.gamma2, kept[COUNT])) + how.eps;
    gain = clipped_norm >= FLT_MIN ? float(std::min(mean / root / clipped_norm, double(FLT_MAX))) : 0;
  }

  void plan(const How &how) {
    const double root_bias2 = std::sqrt(bias_correction(how.beta2, kept[AGE])), keep = 1 - how.forget;
    const double step = how.lr * how.warmup / bias_correction(how.beta1, kept[AGE]);
    Numbers &c = numbers;
    c.finite = finite;
    c.gain = float(gain * how.sign);
    c.limit = limit;
    c.reduced = float(rescale * gain * how.sign);
    c.keep1 = float(keep * how.beta1);
    c.keep2 = float(keep * how.beta2);
    c.add1 = float(1 - how.beta1);
    c.add2 = float(1 - how.beta2);
    c.step_size = float(how.eps_first != 0 ? step * root_bias2 : step);
    c.inverse_root2 = how.eps_first != 0 ? 1 : float(1 / root_bias2);
    c.eps = float(how.eps);
    c.shrink = float(1 - how.lr * how.decay);
    c.shrink_after = float(1 - how.lr * how.decay_after);
    c.after = float(1 - how.forget_after);
    c.cap_factor = float(how.cap_factor);
    c.cap_spread = float(how.cap_spread);
  }
};

// One job's column of `stats`, [NUM_STATS][k].
void report(const Job &job, const Tensor &t, const How &how, const Sums &sums, int64_t k, int64_t i, float *stats) {
  const double size = double(std::max<int64_t>(job.mask ? job.trained : job.size, 1));
  const bool stable = how.stable != 0, capped = how.capped != 0, entries = std::isfinite(t.sum); // all are finite
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

} // namespace
