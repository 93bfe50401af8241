// Adam's step on blocks that the loop in cpu_adam.h cannot update in place: tensors are unpacked into fp32 buffers on the stack,
// updated by the same loop, and packed again.

#include "cpu_adam.h"
#include "cpu_low_precision.h"

namespace evenstep {

// ---- bf16 and 8-bit tensors ----

// Entries unpacked at a time. With more of them, one core waits for each tensor in turn: the loop that unpacks m reads nothing
// else, and the hardware prefetcher has lost the other tensors when the loop over them goes on.
constexpr int64_t UNPACKED = 2 * QBLOCK;

void unpacked_adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, Sums &sums) {
  std::shared_ptr<const Coder> m_coder, v_coder;
  if (job.m_type == INT8) m_coder = coder_of(job.m_map);
  if (job.v_type == INT8) v_coder = coder_of(job.v_map);
  float p[UNPACKED], g[UNPACKED], m[UNPACKED], v[UNPACKED];
  // Blocks and chunks begin at multiples of 256 entries (QBLOCK), so that scales of 8-bit moments are this block's alone.
  for (int64_t i = block.start; i < block.end; i += UNPACKED) {
    int64_t n = std::min(UNPACKED, block.end - i);
    float *mm = open_moment(job.m, job.m_type, job.m_scale, m_coder.get(), i, n, m);
    float *vv = open_moment(job.v, job.v_type, job.v_scale, v_coder.get(), i, n, v);
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
    close_moment(job.m, job.m_type, job.m_scale, m_coder.get(), i, n, mm);
    close_moment(job.v, job.v_type, job.v_scale, v_coder.get(), i, n, vv);
    if (job.p_type == BF16)
      write_bf16(job, i, n, pp, i);
  }
}

// ---- masks ----

namespace {

// Vector stores of `pick` write whole vectors, so buffers have room for SPARE more entries.
constexpr int64_t SPARE = 16;

inline bool bit_of(const uint8_t *mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

#if defined(__AVX512F__)
inline __mmask16 bits_at(const uint8_t *mask, int64_t i) { uint16_t bits; std::memcpy(&bits, mask + i / 8, 2); return bits; }
#elif defined(__AVX2__)
// Permutations for every byte of a mask, for processors without compress and expand instructions: `places` gathers the set
// entries to the front, `ranks` scatters them back, `all` enables the lanes to store.
struct Moves {
  alignas(32) int32_t places[256][8] = {}, ranks[256][8] = {}, all[256][8] = {};
  Moves() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, k = 0; bit < 8; bit++)
        if (byte >> bit & 1) {
          all[byte][bit] = -1;
          ranks[byte][bit] = k;
          places[byte][k++] = bit;
        }
  }
};
const Moves moves;
inline __m256i row(const int32_t *numbers) { return _mm256_load_si256(reinterpret_cast<const __m256i *>(numbers)); }
#endif

// Compacts the entries of two tensors whose bits are set; returns how many they are. 16 entries at a time with AVX-512, 8 with
// AVX2, else one by one.
int64_t pick(const float *__restrict from, const float *__restrict other, const uint8_t *mask, int64_t n, float *__restrict to, float *__restrict other_to) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    fetch(from + i + AHEAD);
    fetch(other + i + AHEAD);
    const __mmask16 bits = bits_at(mask, i);
    _mm512_storeu_ps(to + count, _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(from + i)));
    _mm512_storeu_ps(other_to + count, _mm512_maskz_compress_ps(bits, _mm512_loadu_ps(other + i)));
    count += __builtin_popcount(bits);
  }
#elif defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    fetch(from + i + AHEAD);
    fetch(other + i + AHEAD);
    const uint8_t byte = mask[i / 8];
    _mm256_storeu_ps(to + count, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + i), row(moves.places[byte])));
    _mm256_storeu_ps(other_to + count, _mm256_permutevar8x32_ps(_mm256_loadu_ps(other + i), row(moves.places[byte])));
    count += __builtin_popcount(byte);
  }
#endif
  for (; i < n; i++) {
    to[count] = from[i];
    other_to[count] = other[i];
    count += bit_of(mask, i);
  }
  return count;
}

// The inverse of `pick` for one tensor: the first `count` entries of `from` return to the set places, other entries of `to`
// stay as they are. Bits beyond `count` are ignored.
void put(const float *from, const uint8_t *mask, int64_t n, int64_t count, float *to) {
  int64_t done = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n && done + 16 <= count; i += 16) {
    const __mmask16 bits = bits_at(mask, i);
    _mm512_mask_storeu_ps(to + i, bits, _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(from + done)));
    done += __builtin_popcount(bits);
  }
#elif defined(__AVX2__)
  for (; i + 8 <= n && done + 8 <= count; i += 8) {
    const uint8_t byte = mask[i / 8];
    _mm256_maskstore_ps(to + i, row(moves.all[byte]), _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + done), row(moves.ranks[byte])));
    done += __builtin_popcount(byte);
  }
#endif
  for (; i < n && done < count; i++)
    if (bit_of(mask, i)) to[i] = from[done++];
}

// The same for bf16 numbers, whose bits are copied.
void pick_halves(const uint16_t *from, const uint8_t *mask, int64_t n, uint16_t *to) {
  for (int64_t i = 0, count = 0; i < n; i++) {
    to[count] = from[i];
    count += bit_of(mask, i);
  }
}

void put_halves(const uint16_t *from, const uint8_t *mask, int64_t n, int64_t count, uint16_t *to) {
  for (int64_t i = 0, done = 0; i < n && done < count; i++)
    if (bit_of(mask, i)) to[i] = from[done++];
}

// Set bits of entries start..end-1; `start` is a multiple of 8.
int64_t bits_in(const uint8_t *mask, int64_t start, int64_t end) {
  int64_t count = 0, b = start / 8;
  for (; (b + 8) * 8 <= end; b += 8) {
    uint64_t word;
    std::memcpy(&word, mask + b, 8);
    count += __builtin_popcountll(word);
  }
  for (; b * 8 < end; b++) {
    uint32_t byte = mask[b];
    if (b * 8 + 8 > end)
      byte &= (1u << (end - b * 8)) - 1;
    count += __builtin_popcount(byte);
  }
  return count;
}

} // namespace

// The buffers of a whole block take 256 KiB of the second-level cache. Smaller pieces are slower on Intel: the prefetcher has
// to find the tensors again after each update of the moments.
void masked_adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, int64_t before, Sums &sums) {
  float p[BLOCK + SPARE], g[BLOCK + SPARE], m[BLOCK], v[BLOCK];
  uint16_t halves[BLOCK + SPARE], lost[BLOCK + SPARE];
  const int64_t start = block.start, size = block.end - start;
  const uint8_t *mask = job.mask + start / 8; // `start` is a multiple of 8: BLOCK is
  auto floats = [&](const void *from, int64_t type, float *buffer) -> const float * {
    if (type == F32)
      return static_cast<const float *>(from) + start;
    load(from, type, start, size, buffer);
    return buffer;
  };
  // Unpacked entries, if any, lie where the moments will.
  const int64_t in_mask = pick(floats(job.g, job.g_type, m), floats(job.p, job.p_type, v), mask, size, g, p);
  // A mask that was changed by hand may have more bits than there are moments.
  const int64_t n = std::min(in_mask, std::max<int64_t>(job.trained - before, 0));
  float *mm = open_moment(job.m, job.m_type, nullptr, nullptr, before, n, m);
  float *vv = open_moment(job.v, job.v_type, nullptr, nullptr, before, n, v);
  if (job.p_type == BF16 && job.lost)
    pick_halves(job.lost + start, mask, size, lost);
  Numbers numbers = c;
  numbers.unit = unit_of(measure_entries(g, n).peak); // of the trained entries alone
  for (int64_t i = 0; i < n; i += SPAN)
    chunk(p + i, g + i, mm + i, vv + i, std::min(SPAN, n - i), numbers, zero_history, sums);
  if (job.p_type == F32) {
    put(p, mask, size, n, static_cast<float *>(job.p) + start);
  } else {
    Job compact = job; // rounded as a compact tensor, entry numbers of stochastic rounding included
    compact.p = halves;
    compact.lost = job.lost ? lost : nullptr;
    write_bf16(compact, 0, n, p, before);
    put_halves(halves, mask, size, n, static_cast<uint16_t *>(job.p) + start);
    if (job.lost)
      put_halves(lost, mask, size, n, job.lost + start);
  }
  close_moment(job.m, job.m_type, nullptr, nullptr, before, n, mm);
  close_moment(job.v, job.v_type, nullptr, nullptr, before, n, vv);
}

std::vector<int64_t> trained_before(const Job *jobs, const std::vector<Block> &blocks, int64_t threads) {
  const int64_t size = int64_t(blocks.size());
  if (std::none_of(blocks.begin(), blocks.end(), [&](const Block &block) { return jobs[block.job].mask != nullptr; })) return {};
  std::vector<int64_t> before(size);
  parallel(size, threads, [&](int64_t b) {
    const Job &job = jobs[blocks[b].job];
    before[b] = job.mask ? bits_in(job.mask, blocks[b].start, blocks[b].end) : 0;
  });
  // From counts to an exclusive prefix sum that starts anew at every tensor.
  for (int64_t b = 0, sum = 0; b < size; b++) {
    if (blocks[b].start == 0) sum = 0;
    const int64_t here = before[b];
    before[b] = sum;
    sum += here;
  }
  return before;
}

} // namespace evenstep
