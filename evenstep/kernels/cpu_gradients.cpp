// Reading and transforming gradients outside of a step, for `stabilize` and the telemetry. Vectors have k entries, one per
// tensor; those of blocks have one entry per block of all tensors, in order.

#include "cpu_low_precision.h"
#include "cpu_measure.h"

using namespace evenstep;

// Largest magnitude (Inf where an entry is not finite) and 2-norm of each gradient, and the same of its blocks.
PUBLIC void evenstep_measure(const Job *jobs, int64_t k, int64_t threads, float *peak, float *norm, float *block_peak, double *block_squares) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
    Measured found = measure_block(jobs[blocks[b].job], blocks[b]);
    block_peak[b] = found.peak;
    block_squares[b] = found.squares;
  });
  for (int64_t i = 0, b = 0; i < k; i++) {
    Measured whole;
    for (const int64_t end = b + blocks_of(jobs[i]); b < end; b++) {
      whole.peak = std::max(whole.peak, block_peak[b]);
      whole.squares += block_squares[b];
    }
    peak[i] = std::isfinite(whole.squares) ? whole.peak : INFINITY;
    norm[i] = float(std::sqrt(whole.squares));
  }
}

// 2-norm of each gradient after clipping, and clipped entries. A block without an entry above the limit is not read again.
PUBLIC void evenstep_clip_norms(const Job *jobs, int64_t k, int64_t threads, const float *block_peak, const double *block_squares, const float *limit, const float *rescale, float *norm, float *count) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  std::vector<Sums> sums(blocks.size()); // a slot per block, added in order: no locks, deterministic
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

namespace {

// Writes W entries past the caches, which saves reading `to` first. `to` is aligned to 64 bytes.
inline void stream(float *to, const float *from) {
#if defined(__AVX512F__)
  for (int j = 0; j < W; j += 16)
    _mm512_stream_ps(to + j, _mm512_load_ps(from + j));
#elif defined(__AVX__)
  for (int j = 0; j < W; j += 8)
    _mm256_stream_ps(to + j, _mm256_load_ps(from + j));
#else
  std::memcpy(to, from, W * sizeof(float));
#endif
}

// A whole block in fp32, PLACES of it in turn.
void transform_in_turn(const float *g, float gain, float limit, float reduced, float *out) {
  alignas(64) float turn[W];
  for (int64_t i = 0; i < PART; i += W)
    for (int64_t at = i; at < BLOCK; at += PART) {
#pragma omp simd
      for (int j = 0; j < W; j++)
        turn[j] = clipped_and_scaled(g[at + j], gain, limit, reduced);
      stream(out + at, turn);
    }
#if defined(__AVX__)
  _mm_sfence(); // other threads read these entries after the barrier that follows
#endif
}

} // namespace

// p <- clipped and scaled g in p's dtype, 0 where the gain is 0. table: fp32 [3, k], rows gain, limit and reduced gain.
PUBLIC void evenstep_transformed(const Job *jobs, int64_t k, int64_t threads, const float *table) {
  std::vector<Block> blocks = cut(jobs, 0, k, 0);
  parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
    const Block &block = blocks[b];
    const Job &job = jobs[block.job];
    const float gain = table[block.job], limit = table[k + block.job], reduced = table[2 * k + block.job];
    const bool floats = job.p_type == F32 && job.g_type == F32, aligned = reinterpret_cast<uintptr_t>(job.p) % 64 == 0;
    if (in_turn && floats && aligned && gain != 0 && block.end - block.start == BLOCK) {
      transform_in_turn(static_cast<const float *>(job.g) + block.start, gain, limit, reduced, static_cast<float *>(job.p) + block.start);
      return;
    }
    float g[CHUNK], buffer[CHUNK]; // unpacked bf16 entries
    for (int64_t i = block.start; i < block.end; i += CHUNK) {
      const int64_t n = std::min(CHUNK, block.end - i);
      const float *x = g;
      if (job.g_type == F32)
        x = static_cast<const float *>(job.g) + i;
      else
        load(job.g, job.g_type, i, n, g);
      float *__restrict out = job.p_type == F32 ? static_cast<float *>(job.p) + i : buffer;
#pragma omp simd
      for (int64_t j = 0; j < n; j++)
        out[j] = gain == 0 ? 0 : clipped_and_scaled(x[j], gain, limit, reduced);
      if (job.p_type != F32) write_bf16(job, i, n, out, i);
    }
  });
}
