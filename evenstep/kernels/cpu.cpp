// The fused step of Adam, SPAM and Stable-SPAM on a CPU, and facts about the build. Read cpu_threads.h, cpu_measure.h and
// cpu_adam.h first. Other entry points: cpu_gradients.cpp (gradients outside of a step), cpu_scale.cpp, cpu_quant.cpp.

#include "cpu_adam.h"

using namespace evenstep;

// ---- facts about the build ----

PUBLIC int64_t evenstep_block() { return BLOCK; }

// Python compares this with the fields that it passes: a library of another version must not read its tables.
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

// Sets whether loops read in turn, and returns whether they did. Tests compare both.
PUBLIC int64_t evenstep_in_turn(int64_t on) {
  const bool before = in_turn;
  in_turn = on != 0;
  return before;
}

// Whether this build shares work among threads.
PUBLIC int64_t evenstep_threaded() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// ---- the step ----

namespace {

// A block whose tensors are all in fp32 is updated in place: `all` updates its spans in turn, `one` one of them.
void adam_block(const Job &job, const Block &block, const Numbers &c, Chunk one, Chunk all, bool zero_history, Sums &sums) {
  float *p = static_cast<float *>(job.p), *m = static_cast<float *>(job.m), *v = static_cast<float *>(job.v);
  const float *g = static_cast<const float *>(job.g);
  const bool whole = in_turn && block.end - block.start == BLOCK;
  for (int64_t i = block.start; i < block.end; i += whole ? BLOCK : SPAN)
    (whole ? all : one)(p + i, g + i, m + i, v + i, std::min(SPAN, block.end - i), c, zero_history, sums);
}

// The update of all blocks; numbers(i) are the factors of tensor i, sizes[b] the measurement of block b.
template <class N>
std::vector<Sums> adam_blocks(const Job *jobs, const std::vector<Block> &blocks, int64_t threads, const StepOptions &options, N numbers, const std::vector<Measured> &sizes) {
  const bool capped = options.capped != 0, zero_history = options.zero_history != 0;
  const std::vector<int64_t> before = trained_before(jobs, blocks, threads);
  std::vector<Sums> sums(blocks.size());
  parallel(int64_t(blocks.size()), threads, WARM, [&](int64_t b) {
    const Job &job = jobs[blocks[b].job];
    Numbers c = numbers(blocks[b].job);
    if (c.finite == 0) return;
    c.unit = unit_of(sizes[b].peak);
    const Chunk one = version<1>(c, capped, sizes[b].peak), all = version<SPANS>(c, capped, sizes[b].peak);
    if (job.mask)
      masked_adam_block(job, blocks[b], c, one, zero_history, before[b], sums[b]);
    else if (job.p_type | job.g_type | job.m_type | job.v_type)
      unpacked_adam_block(job, blocks[b], c, one, zero_history, sums[b]);
    else
      adam_block(job, blocks[b], c, one, all, zero_history, sums[b]);
  });
  return sums;
}

} // namespace

// A whole step of k tensors. scalars[n * k + i] is the address of Scalar n of tensor i (the age alone without `stable`), read
// and written; stats is fp32 [NUM_STATS, k], written. A tensor whose gradient is not finite keeps parameter and state.
PUBLIC void evenstep_step(const Job *jobs, int64_t k, int64_t threads, const StepOptions *given, float *const *scalars, float *stats) {
  const StepOptions &options = *given;
  const bool stable = options.stable != 0;
  const int numbers = stable ? 5 : 1;
  in_batches(jobs, k, [&](int64_t first, int64_t last, int64_t number) {
    const std::vector<Block> blocks = cut(jobs, first, last, number);
    std::vector<TensorStep> tensors(last - first);
    auto tensor = [&](int64_t i) -> TensorStep & { return tensors[i - first]; };
    for (int64_t i = first; i < last; i++)
      for (int n = 0; n < numbers; n++)
        tensor(i).scalars[n] = *scalars[n * k + i];

    // 1. Measure: one pass over the gradients of the batch.
    std::vector<Measured> sizes(blocks.size());
    std::vector<LargeEntries> large(stable ? blocks.size() : 0);
    parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
      if (stable) large[b].low = tensor(blocks[b].job).least_limit(options);
      sizes[b] = measure_block(jobs[blocks[b].job], blocks[b], stable ? &large[b] : nullptr);
    });
    for (size_t b = 0; b < blocks.size(); b++) {
      TensorStep &t = tensor(blocks[b].job);
      t.peak = std::max(t.peak, sizes[b].peak);
      t.sum += sizes[b].squares;
    }
    // 2. Per tensor: finite or skipped, the new age, and AdaClip's limit.
    for (TensorStep &t : tensors) {
      t.finite = std::isfinite(t.sum);
      if (!t.finite) t.peak = INFINITY;
      t.norm = t.clipped_norm = float(std::sqrt(t.sum));
      t[AGE] = t[AGE] * (1 - options.reset) + 1;
      t[COUNT] += 1;
      if (!stable && t.finite && !std::isfinite(t.peak * t.peak)) { // its square overflows the second moment
        t.finite = false;
        t.gain = 0;
      }
      if (stable && t.finite) t.adaclip(options);
    }
    // 3. The norm after clipping, for AdaGN. A block is read again only if more than LargeEntries::MOST may be clipped.
    if (stable) {
      std::vector<Sums> sums(blocks.size());
      parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
        const TensorStep &t = tensor(blocks[b].job);
        if (!t.finite || !(sizes[b].peak > t.limit)) {
          sums[b].clipped = sizes[b].squares;
        } else if (!large[b].complete()) {
          sums[b] = clipped_block(jobs[blocks[b].job], blocks[b], t.limit, t.rescale);
        } else {
          sums[b].clipped = large[b].rest;
          for (float g : large[b].above) {
            const bool over = std::fabs(g) > t.limit;
            const double x = over ? double(g) * t.rescale : g;
            sums[b].clipped += x * x;
            sums[b].count += over;
          }
        }
      });
      for (int64_t i = first, b = 0; i < last; i++) {
        TensorStep &t = tensor(i);
        const Sums whole = sum_of(sums, b, blocks_of(jobs[i]));
        t.clipped_norm = float(std::sqrt(whole.clipped));
        t.clipped = whole.count;
        if (t.finite && !std::isfinite(t.norm)) { // the norm overflows fp32 although no entry does: AdaGN has no statistics of it
          t.finite = false;
          t.gain = 0;
        }
        if (t.finite) t.adagn(options);
      }
    }
    // 4. Update parameters and moments. Threads start with the blocks that they measured last, which are still in cache.
    for (TensorStep &t : tensors)
      t.plan(options);
    const std::vector<Sums> sums = adam_blocks(jobs, blocks, threads, options, [&](int64_t i) { return tensor(i).numbers; }, sizes);
    // 5. Statistics, and the new state of tensors that were not skipped.
    for (int64_t i = first, b = 0; i < last; i++) {
      TensorStep &t = tensor(i);
      report(jobs[i], t, options, sum_of(sums, b, blocks_of(jobs[i])), k, i, stats);
      if (!t.finite) continue;
      if (options.one_counter != 0) t[COUNT] = t[AGE];
      for (int n = 0; n < numbers; n++)
        *scalars[n * k + i] = float(t.scalars[n]);
    }
  });
}
