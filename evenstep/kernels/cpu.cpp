// Fused optimizer steps for CPUs: plain C++ on raw pointers, no Python and no torch.
//
// An optimizer step only moves bytes, so each function here reads and writes every tensor once. What makes it fast:
//
// * One core reads memory about as fast as its prefetches are early. The hardware's stop at every 4 KiB page, so each loop
//   over memory asks for what it needs AHEAD entries before. That alone is a quarter of the time of a step.
// * A tensor is worked through in chunks of CHUNK entries that stay in the first-level cache. Arithmetic is in fp32 on
//   fp32 chunks; other dtypes, and tensors of which only some entries are trained, are unpacked into buffers and packed
//   again, so that there is one loop for all. fp32 tensors are worked on where they lie.
// * The loops are vectorised by the compiler. The build compiles this file once per instruction set; Python loads one.
//
// Work is shared among threads by blocks of BLOCK entries. Each block has its own place for its sums, which are added up in
// order afterwards: the result does not depend on the number of threads.

#include "cpu_masked.h"
#include "cpu_whole.h"
#include "cpu_scale.h"

// ---- what Python calls; vectors have k entries, one per job, and those of blocks one per block of all jobs ----

#if defined(_WIN32)
#define PUBLIC __declspec(dllexport)
#else
#define PUBLIC __attribute__((visibility("default")))
#endif

extern "C" {

PUBLIC int64_t evenstep_block() { return BLOCK; }

PUBLIC int64_t evenstep_job_fields() { return sizeof(Job) / 8; }

PUBLIC const char *evenstep_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "an unknown compiler";
#endif
}

// Whether this build shares work among threads.
PUBLIC int64_t evenstep_threaded() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

PUBLIC void evenstep_measure(const Job *jobs, int64_t k, int64_t threads, float *peak, float *norm, float *block_peak, double *block_squares) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
    Size found = size_of_block(jobs[blocks[b].job], blocks[b]);
    block_peak[b] = found.peak;
    block_squares[b] = found.squares;
  });
  gather(jobs, 0, k, 0, block_peak, block_squares, peak, norm);
}

PUBLIC void evenstep_clip_norms(const Job *jobs, int64_t k, int64_t threads, const float *block_peak, const double *block_squares, const float *limit, const float *rescale, float *norm, float *count) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  std::vector<Sums> sums(blocks.size());
  parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
    const int64_t i = blocks[b].job;
    sums[b] = block_peak[b] > limit[i] ? clipped_block(jobs[i], blocks[b], limit[i], rescale[i]) : Sums{0, block_squares[b], 0};
  });
  for (int64_t i = 0, b = 0; i < k; i++) {
    const Sums whole = sum_of(sums, b, blocks_of(jobs[i]));
    norm[i] = float(std::sqrt(whole.clipped));
    count[i] = float(whole.count);
  }
}

// All of Adam's step, of Stable-SPAM's, or of SPAM's. kept[n * k + i] is where number n of `Kept` of tensor i lies; stats has
// NUM_STATS rows of k.
PUBLIC void evenstep_step(const Job *jobs, int64_t k, int64_t threads, const How *given, float *const *kept, float *stats) {
  const How &how = *given;
  const bool stable = how.stable != 0;
  const int numbers = stable ? 5 : 1;
  in_batches(jobs, k, [&](int64_t first, int64_t last, int64_t number) {
    const std::vector<Block> blocks = cut(jobs, first, last, number);
    std::vector<Tensor> tensors(last - first);
    auto tensor = [&](int64_t i) -> Tensor & { return tensors[i - first]; };
    for (int64_t i = first; i < last; i++)
      for (int n = 0; n < numbers; n++)
        tensor(i).kept[n] = *kept[n * k + i];

    std::vector<Size> sizes(blocks.size());
    std::vector<High> highs(stable ? blocks.size() : 0);
    parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
      if (stable) highs[b].low = tensor(blocks[b].job).least_limit(how);
      sizes[b] = size_of_block(jobs[blocks[b].job], blocks[b], stable ? &highs[b] : nullptr);
    });
    for (size_t b = 0; b < blocks.size(); b++) {
      Tensor &t = tensor(blocks[b].job);
      t.peak = std::max(t.peak, sizes[b].peak);
      t.sum += sizes[b].squares;
    }
    for (Tensor &t : tensors) {
      t.finite = std::isfinite(t.sum);
      if (!t.finite) t.peak = INFINITY;
      t.norm = t.clipped_norm = float(std::sqrt(t.sum));
      t[AGE] = t[AGE] * (1 - how.reset) + 1;
      t[COUNT] += 1;
      if (!stable && t.finite && !std::isfinite(t.peak * t.peak)) { // no mean of squares can hold it
        t.finite = false;
        t.gain = 0;
      }
      if (stable && t.finite) t.adaclip(how);
    }
    if (stable) {
      std::vector<Sums> sums(blocks.size());
      parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
        const Tensor &t = tensor(blocks[b].job);
        if (!t.finite || !(sizes[b].peak > t.limit)) {
          sums[b].clipped = sizes[b].squares;
        } else if (!highs[b].complete()) {
          sums[b] = clipped_block(jobs[blocks[b].job], blocks[b], t.limit, t.rescale);
        } else {
          sums[b].clipped = highs[b].rest;
          for (float g : highs[b].above) {
            const bool over = std::fabs(g) > t.limit;
            const double x = over ? double(g) * t.rescale : g;
            sums[b].clipped += x * x;
            sums[b].count += over;
          }
        }
      });
      for (int64_t i = first, b = 0; i < last; i++) {
        Tensor &t = tensor(i);
        const Sums whole = sum_of(sums, b, blocks_of(jobs[i]));
        t.clipped_norm = float(std::sqrt(whole.clipped));
        t.clipped = whole.count;
        if (t.finite && !std::isfinite(t.norm)) { // beyond fp32, though no entry is: nothing can be learnt from it
          t.finite = false;
          t.gain = 0;
        }
        if (t.finite) t.adagn(how);
      }
    }
    for (Tensor &t : tensors)
      t.plan(how);
    const std::vector<Sums> sums = adam_blocks(
        jobs, blocks, threads, how.capped != 0, how.zero_history != 0, [&](int64_t i) { return tensor(i).numbers; },
        [&](int64_t b) { return sizes[b].peak; });
    for (int64_t i = first, b = 0; i < last; i++) {
      Tensor &t = tensor(i);
      report(jobs[i], t, how, sum_of(sums, b, blocks_of(jobs[i])), k, i, stats);
      if (!t.finite) continue;
      if (how.one_counter != 0) t[COUNT] = t[AGE];
      for (int n = 0; n < numbers; n++)
        *kept[n * k + i] = float(t.kept[n]);
    }
  });
}

// All of SCALE's step on matrices: by their columns, or by their rows. stats is as in evenstep_step.
PUBLIC void evenstep_scale(const Job *jobs, int64_t k, int64_t threads, const double *how, float *stats) {
  const double sign = how[0], lr = how[1], decay = how[2], momentum = how[3];
  const bool rms = how[4] != 0, columns = how[5] != 0;
  const float floor = float(how[6]);
  for (int64_t i = 0; i < k; i++) {
    const Job &job = jobs[i];
    const int64_t length = job.rows ? job.size / job.rows : 0, count = std::max<int64_t>(columns ? job.rows : length, 1);
    const float root = rms ? float(std::sqrt(double(count))) : 1;
    Rates c{1, float(sign), float(momentum), float(1 - momentum), float(lr), float(1 - lr * decay), root};
    Size found;
    float direction;
    if (columns) {
      std::vector<double> squares(length);
      found = size_columns(job, threads, squares.data());
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

// p <- limited and scaled g, in p's dtype.
PUBLIC void evenstep_transformed(const Job *jobs, int64_t k, int64_t threads, const float *table) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
    const Block &block = blocks[b];
    const Job &job = jobs[block.job];
    const float gain = table[block.job], limit = table[k + block.job], reduced = table[2 * k + block.job];
    float g[CHUNK], out[CHUNK];
    for (int64_t i = block.start; i < block.end; i += CHUNK) {
      int64_t n = std::min(CHUNK, block.end - i);
      const float *x = g;
      if (job.g_type == F32)
        x = static_cast<const float *>(job.g) + i;
      else
        load(job.g, job.g_type, i, n, g);
      for (int64_t start = 0; start < n; start += W) {
        const int width = int(std::min<int64_t>(W, n - start));
        fetch(x + start + AHEAD);
        fetch(x + start + AHEAD + 16);
#pragma omp simd
        for (int j = 0; j < width; j++)
          out[start + j] = gain == 0 ? 0 : read(x[start + j], gain, limit, reduced);
      }
      if (job.p_type == F32)
        store_past_caches(out, n, static_cast<float *>(job.p) + i);
      else
        write_bf16(job, i, n, out, i);
    }
  });
}

} // extern "C"
