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

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__SSE__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t CHUNK = 1024;       // entries: four fp32 buffers of it are 16 KiB
constexpr int64_t SPAN = 4 * CHUNK;   // entries that are worked through at once where nothing is unpacked
constexpr int64_t BLOCK = 16 * CHUNK; // entries of a unit of work, and of the maxima that a clipping pass looks at
constexpr int64_t BATCH = 16 * BLOCK; // entries that are measured and then updated while they are still in cache
constexpr int64_t WARM = 8;            // blocks whose update finds its gradients in a cache of 2 MiB, beside p, m and v
constexpr int64_t AHEAD = 512;        // entries
constexpr int64_t QBLOCK = 256;       // entries that share a scale, for 8-bit moments
constexpr int64_t GROUPS = 16;        // parts into which rows are dealt where columns are summed
constexpr int W = 32;                 // entries per turn of a vectorised loop

enum Type : int64_t { F32 = 0, BF16 = 1, INT8 = 2 };

} // namespace

// One tensor: 64-bit fields, so that a table of integers describes all of them. Fields that do not apply are 0.
struct Job {
  int64_t size, rows;
  int64_t p_type, g_type, m_type, v_type;
  void *p;
  const void *g;
  void *m, *v;
  float *m_scale, *v_scale;
  const float *m_map, *v_map; // the 256 values of 8-bit codes
  const uint8_t *mask;        // packed bits
  int64_t trained;            // entries of the mask
  uint16_t *lost;             // Kahan's compensation
  const int32_t *seed;        // of stochastic rounding
};

namespace {

// ---- threads ----

// f(i) for all i < n. Each thread has a run of its own and begins with the last `warm` of it, which, when the same work was
// shared out just before, are what it has seen last and what its caches still hold.
template <class F> void parallel(int64_t n, int64_t threads, int64_t warm, F f) {
  auto run = [&](int64_t first, int64_t last) {
    const int64_t start = std::max(first, last - warm);
    for (int64_t i = start; i < last; i++)
      f(i);
    for (int64_t i = first; i < start; i++)
      f(i);
  };
#ifdef _OPENMP
  // One thread does not enter OpenMP at all, whose pool does not survive a fork.
  if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t here = omp_get_thread_num(), all = omp_get_num_threads();
      run(n * here / all, n * (here + 1) / all);
    }
    return;
  }
#endif
  run(0, n);
}

template <class F> void parallel(int64_t n, int64_t threads, F f) { parallel(n, threads, n, f); }

struct Block { int64_t job, start, end, number; }; // number: its place among all blocks of the call

int64_t blocks_of(const Job &job) { return (job.size + BLOCK - 1) / BLOCK; }

// The blocks of jobs first..last-1, of which the first has the number `number`.
std::vector<Block> cut(const Job *jobs, int64_t first, int64_t last, int64_t number) {
  std::vector<Block> found;
  for (int64_t i = first; i < last; i++)
    for (int64_t start = 0; start < jobs[i].size; start += BLOCK)
      found.push_back({i, start, std::min(start + BLOCK, jobs[i].size), number++});
  return found;
}

// Calls f(first, last, number of the first block) for runs of whole jobs of about BATCH entries.
template <class F> void in_batches(const Job *jobs, int64_t k, bool small, F f) {
  int64_t number = 0;
  for (int64_t first = 0; first < k;) {
    int64_t last = first, entries = 0, blocks = 0;
    do {
      entries += jobs[last].size;
      blocks += blocks_of(jobs[last++]);
    } while (last < k && (!small || entries + jobs[last].size <= BATCH));
    f(first, last, number);
    first = last;
    number += blocks;
  }
}

// ---- numbers in memory ----

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float from_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }
inline uint16_t to_bf16(float x) { // to nearest, ties to even
  uint32_t bits = as_bits(x);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : 0x7fc0;
}

inline void fetch(const void *address) { __builtin_prefetch(address, 0); } // to read: asking to write is 4 % slower here

// Unpack n entries from `start` on.
void load(const void *from, int64_t type, int64_t start, int64_t n, float *to) {
  if (type == F32) {
    std::memcpy(to, static_cast<const float *>(from) + start, n * 4);
  } else {
    const uint16_t *x = static_cast<const uint16_t *>(from) + start;
    for (int64_t i = 0; i < n; i += 32)
      fetch(x + i + AHEAD);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      to[i] = from_bf16(x[i]);
  }
}

// Copy n entries to where nobody reads soon: past the caches, which spares the reading of what is overwritten.
inline void store_past_caches(const float *from, int64_t n, float *to) {
#if defined(__SSE__)
  if ((reinterpret_cast<uintptr_t>(to) & 15) == 0) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
    for (; i < n; i++)
      to[i] = from[i];
    _mm_sfence();
    return;
  }
#endif
  std::memcpy(to, from, n * 4);
}

// ---- 8-bit moments: blocks of 256 codes with a scale, a code standing for one of 256 sorted values ----

// torchao's map: seven decades, 10^-7 to 1, each cut evenly into cells, 1, 2, 4, ... of them with sign and 2, 4, 8, ...
// without, whose middles are the values; also 0 and 1. A number gets the code of its cell, which is arithmetic on vectors.
// Codes of any other map are searched for, which is slow.
struct Coder {
  float map[256];
  bool known = true; // torchao's
  int32_t zero;      // the code of 0; those below are of negative numbers
  float border[7], low[7], cells[7], base[7], last[7], least, most;
#if defined(__AVX512F__)
  // By exponent, from 2^-24 on: the border within that power of two, if any, and the decade below it. Then by decade.
  alignas(64) float edge[32], from[16], per[16];
  alignas(64) int32_t decade[32], first_code[16], last_cell[16];
#endif

  explicit Coder(const float *values) : zero(values[0] < 0 ? 127 : 0) {
    std::memcpy(map, values, sizeof map);
    for (int i = 0, first = zero + 1; i < 7; i++) {
      const int count = zero ? 1 << i : 2 << i;
      const double top = std::pow(10.0, i - 6);
      border[i] = 0.5f * (map[first - 1] + map[first]);
      low[i] = float(0.1 * top);
      cells[i] = float(count / (0.9 * top));
      base[i] = float(first - zero);
      last[i] = float(count - 1);
      first += count;
    }
    least = border[0];
    most = 0.5f * (map[254] + map[255]);
#if defined(__AVX512F__)
    for (int e = 0; e < 32; e++) {
      const float start = std::ldexp(1.0f, e - 24), end = 2 * start;
      edge[e] = INFINITY;
      decade[e] = 0;
      for (int i = 1; i < 7; i++) {
        decade[e] += border[i] <= start;
        if (border[i] > start && border[i] < end) edge[e] = border[i];
      }
    }
    for (int i = 0; i < 16; i++) {
      const int d = std::min(i, 6);
      from[i] = low[d], per[i] = cells[d], first_code[i] = int32_t(base[d]), last_cell[i] = int32_t(last[d]);
    }
#endif
    for (int32_t c = 0; c < 256; c++)
      known = known && code(map[c]) == c;
  }

  inline int32_t code(float x) const {
    const float a = std::fabs(x);
    float from = low[0], per = cells[0], first = base[0], top = last[0];
    for (int i = 1; i < 7; i++) {
      const bool above = a >= border[i];
      from = above ? low[i] : from;
      per = above ? cells[i] : per;
      first = above ? base[i] : first;
      top = above ? last[i] : top;
    }
    float cell = std::floor((a - from) * per);
    cell = cell > 0 ? cell : 0;
    cell = cell < top ? cell : top;
    float found = a >= least ? first + cell : 0;
    found = x < 0 ? -found : x >= most ? found + 1 : found;
    return zero + int32_t(found);
  }

#if defined(__AVX512F__)
  // Looks up 16 codes at a time, 32 values of the map after the other: less than half the time of a gather.
  void decode_block(const uint8_t *codes, float unit, float *to) const {
    const __m512 units = _mm512_set1_ps(unit);
    const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64), bit7 = _mm512_set1_epi32(128);
    for (int64_t i = 0; i < QBLOCK; i += 16) {
      const __m512i c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i)));
      const __mmask16 odd = _mm512_test_epi32_mask(c, bit5), second = _mm512_test_epi32_mask(c, bit6), upper = _mm512_test_epi32_mask(c, bit7);
      auto of32 = [&](int part) { return _mm512_permutex2var_ps(_mm512_loadu_ps(map + 32 * part), c, _mm512_loadu_ps(map + 32 * part + 16)); };
      auto of128 = [&](int part) {
        return _mm512_mask_blend_ps(second, _mm512_mask_blend_ps(odd, of32(part), of32(part + 1)), _mm512_mask_blend_ps(odd, of32(part + 2), of32(part + 3)));
      };
      _mm512_storeu_ps(to + i, _mm512_mul_ps(units, _mm512_mask_blend_ps(upper, of128(0), of128(4))));
    }
  }

  // The codes of x / unit for a block, as `code` has them: its six comparisons are a look at the exponent, and the
  // division is a product with what it misses put right, which is the same number.
  void code_block(const float *x, float unit, uint8_t *codes) const {
    const __m512 edge0 = _mm512_load_ps(edge), edge1 = _mm512_load_ps(edge + 16), froms = _mm512_load_ps(from), pers = _mm512_load_ps(per);
    const __m512i decade0 = _mm512_load_si512(decade), decade1 = _mm512_load_si512(decade + 16);
    const __m512i firsts = _mm512_load_si512(first_code), lasts = _mm512_load_si512(last_cell);
    const __m512 units = _mm512_set1_ps(unit), inverse = _mm512_set1_ps(1 / unit), leasts = _mm512_set1_ps(least), mosts = _mm512_set1_ps(most);
    const __m512i lowest = _mm512_set1_epi32(127 - 24), none = _mm512_setzero_si512(), one = _mm512_set1_epi32(1), middle = _mm512_set1_epi32(zero);
    for (int64_t i = 0; i < QBLOCK; i += 16) {
      const __m512 raw = _mm512_loadu_ps(x + i), near = _mm512_mul_ps(raw, inverse);
      const __m512 y = _mm512_fmadd_ps(_mm512_fnmadd_ps(near, units, raw), inverse, near), a = _mm512_abs_ps(y);
      const __m512i power = _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(a), 23), lowest); // of small ones: rubbish
      const __mmask16 over = _mm512_cmp_ps_mask(a, _mm512_permutex2var_ps(edge0, power, edge1), _CMP_GE_OQ);
      __m512i d = _mm512_permutex2var_epi32(decade0, power, decade1);
      d = _mm512_mask_add_epi32(d, over, d, one);
      const __m512 within = _mm512_mul_ps(_mm512_sub_ps(a, _mm512_permutexvar_ps(d, froms)), _mm512_permutexvar_ps(d, pers));
      const __m512i cell = _mm512_min_epi32(_mm512_cvttps_epi32(within), _mm512_permutexvar_epi32(d, lasts));
      const __mmask16 some = _mm512_cmp_ps_mask(a, leasts, _CMP_GE_OQ), top = _mm512_cmp_ps_mask(y, mosts, _CMP_GE_OQ);
      __m512i found = _mm512_maskz_add_epi32(some, cell, _mm512_permutexvar_epi32(d, firsts));
      found = _mm512_mask_add_epi32(found, top, found, one);
      if (zero) found = _mm512_mask_sub_epi32(found, _mm512_movepi32_mask(_mm512_castps_si512(y)), none, found);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(found, middle)));
    }
  }
#endif

  int32_t search(float x) const { // the nearest value, by halving
    int32_t c = int32_t(std::upper_bound(map, map + 256, x) - map) - 1;
    c = c < 0 ? 0 : c;
    return c < 255 && x - map[c] >= (map[c + 1] - map[c]) * 0.5f ? c + 1 : c;
  }

  void decode(const uint8_t *codes, const float *scale, int64_t n, float *to) const {
    for (int64_t start = 0; start < n; start += QBLOCK) {
      const float unit = scale[start / QBLOCK];
#if defined(__AVX512F__)
      decode_block(codes + start, unit, to + start);
      continue;
#endif
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        to[start + i] = map[codes[start + i]] * unit;
    }
  }

  void encode(const float *x, int64_t n, uint8_t *codes, float *scale) const {
    for (int64_t start = 0; start < n; start += QBLOCK) {
      float top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < QBLOCK; i++) {
        float y = std::fabs(x[start + i]);
        top = y > top ? y : top;
      }
      const float unit = top > 1e-12f ? top : 1e-12f;
      scale[start / QBLOCK] = unit;
      if (!known) {
        for (int64_t i = 0; i < QBLOCK; i++)
          codes[start + i] = uint8_t(search(x[start + i] / unit));
        continue;
      }
#if defined(__AVX512F__)
      if (unit > 1e-30f && unit < 1e30f) {
        code_block(x + start, unit, codes + start);
        continue;
      }
#endif
      const Coder c = *this; // a copy: stores of bytes cannot change it
      int32_t found[QBLOCK];
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        found[i] = c.code(x[start + i] / unit);
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        codes[start + i] = uint8_t(found[i]);
    }
  }
};

// The coder of a map, kept for the next call: a process knows two maps (with and without sign).
std::shared_ptr<const Coder> coder_of(const float *map) {
  static std::shared_ptr<const Coder> known[2];
  int which = map[0] < 0;
  std::shared_ptr<const Coder> coder = std::atomic_load(&known[which]);
  if (!coder || std::memcmp(coder->map, map, sizeof coder->map) != 0) {
    coder = std::make_shared<const Coder>(map);
    std::atomic_store(&known[which], coder);
  }
  return coder;
}

// A moment as fp32: where it lies, or unpacked into `buffer`.
float *open_moment(void *stored, int64_t type, const float *scale, const Coder *coder, int64_t start, int64_t n, float *buffer) {
  if (type == F32)
    return static_cast<float *>(stored) + start;
  if (type == INT8) {
    const uint8_t *codes = static_cast<const uint8_t *>(stored) + start;
    for (int64_t i = 0; i < n; i += 64)
      fetch(codes + i + AHEAD);
    coder->decode(codes, scale + start / QBLOCK, n, buffer);
  } else {
    load(stored, type, start, n, buffer);
  }
  return buffer;
}

void close_moment(void *stored, int64_t type, float *scale, const Coder *coder, int64_t start, int64_t n, const float *moment) {
  if (type == INT8) {
    coder->encode(moment, n, static_cast<uint8_t *>(stored) + start, scale + start / QBLOCK);
  } else if (type == BF16) {
    uint16_t *x = static_cast<uint16_t *>(stored) + start;
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      x[i] = to_bf16(moment[i]);
  }
}

inline uint32_t mixed(uint32_t signed_x) { // as evenstep.transforms.rounding: shifts keep the sign
  int32_t x = int32_t(signed_x);
  x = int32_t(uint32_t(x ^ (x >> 16)) * uint32_t(-2048144789));
  x = int32_t(uint32_t(x ^ (x >> 13)) * uint32_t(-1028477387));
  return uint32_t(x ^ (x >> 16));
}

// Round fp32 results into a bf16 parameter; `where` is the number of the first entry.
void write_bf16(const Job &job, int64_t start, int64_t n, const float *exact, int64_t where) {
  uint16_t *p = static_cast<uint16_t *>(job.p) + start;
  if (job.lost) {
    uint16_t *lost = job.lost + start;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      float x = exact[i] + from_bf16(lost[i]);
      uint16_t near = to_bf16(x);
      p[i] = near;
      lost[i] = to_bf16(x - from_bf16(near));
    }
  } else if (job.seed) {
    const uint32_t seed = uint32_t(*job.seed), golden = uint32_t(-1640531527);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      uint32_t noise = mixed(uint32_t(where + i) * golden + seed) & 0xffff;
      uint32_t bits = as_bits(exact[i]), cut = (bits + noise) & 0xffff0000;
      bool finite = (bits & 0x7f800000) != 0x7f800000;
      p[i] = finite ? uint16_t(cut >> 16) : to_bf16(exact[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      p[i] = to_bf16(exact[i]);
  }
}

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

// ---- Adam ----

struct Numbers { // rows of the table of interface.py, in its order
  float finite, gain, limit, reduced, keep1, keep2, add1, add2, step_size, inverse_root2, eps, shrink, shrink_after, after, cap_factor, cap_spread;
};
template <class T> T column(const float *table, int64_t k, int64_t i) {
  T found;
  float *to = reinterpret_cast<float *>(&found);
  for (size_t row = 0; row < sizeof(T) / sizeof(float); row++)
    to[row] = table[row * k + i];
  return found;
}

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

// ---- Adam on the entries of a mask ----

// pick: the entries of two tensors whose bits are set, side by side; what they go to has room for SPARE more. Returns how
// many. Memory is asked for both at the same time.
// put: back again, into those entries alone. Both work on 16 entries at a time where the processor can, on 8 with tables
// where it can move numbers across a vector, else one by one.
constexpr int64_t SPARE = 16;

inline bool bit_of(const uint8_t *mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

#if defined(__AVX512F__)
inline __mmask16 bits_at(const uint8_t *mask, int64_t i) { uint16_t bits; std::memcpy(&bits, mask + i / 8, 2); return bits; }
#elif defined(__AVX2__)
struct Moves { // for every byte of a mask
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

// `count`: the first so many of `from` are there; bits beyond them are ignored.
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

// The same for 16-bit numbers, whose bits are kept.
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

// `done`: trained entries before this block, which is where its moments begin.
void masked_adam_block(const Job &job, const Block &block, const Numbers &c, Chunk chunk, bool zero_history, int64_t done, Sums &sums) {
  float p[SPAN + SPARE], g[SPAN + SPARE], m[SPAN], v[SPAN], all[SPAN], all_p[SPAN];
  uint16_t halves[SPAN + SPARE], lost[SPAN + SPARE];
  for (int64_t i = block.start; i < block.end; i += SPAN) {
    const int64_t size = std::min(SPAN, block.end - i);
    const uint8_t *mask = job.mask + i / 8;
    auto floats = [&](const void *from, int64_t type, float *buffer) -> const float * {
      if (type == F32)
        return static_cast<const float *>(from) + i;
      load(from, type, i, size, buffer);
      return buffer;
    };
    const int64_t picked = pick(floats(job.g, job.g_type, all), floats(job.p, job.p_type, all_p), mask, size, g, p);
    // A mask may have more bits than there are moments, as a tensor that was changed by hand.
    const int64_t n = std::min(picked, std::max<int64_t>(job.trained - done, 0));
    float *mm = open_moment(job.m, job.m_type, nullptr, nullptr, done, n, m);
    float *vv = open_moment(job.v, job.v_type, nullptr, nullptr, done, n, v);
    if (job.p_type == BF16 && job.lost)
      pick_halves(job.lost + i, mask, size, lost);
    chunk(p, g, mm, vv, n, c, zero_history, sums);
    if (job.p_type == F32) {
      put(p, mask, size, n, static_cast<float *>(job.p) + i);
    } else {
      Job compact = job; // rounded together, then put back; numbered as the compact tensor is
      compact.p = halves;
      compact.lost = job.lost ? lost : nullptr;
      write_bf16(compact, 0, n, p, done);
      put_halves(halves, mask, size, n, static_cast<uint16_t *>(job.p) + i);
      if (job.lost)
        put_halves(lost, mask, size, n, job.lost + i);
    }
    close_moment(job.m, job.m_type, nullptr, nullptr, done, n, mm);
    close_moment(job.v, job.v_type, nullptr, nullptr, done, n, vv);
    done += n;
  }
}

// Adam's step on blocks of whole tensors; numbers(i) are those of a tensor, peak(b) the largest gradient of a block.
template <class N, class P>
std::vector<Sums> adam_blocks(const Job *jobs, const std::vector<Block> &blocks, int64_t threads, bool capped, bool zero_history, N numbers, P peak) {
  const int64_t size = int64_t(blocks.size());
  std::vector<Sums> sums(size);
  std::vector<int64_t> done(size);
  bool masked = false;
  for (const Block &block : blocks)
    masked = masked || jobs[block.job].mask;
  if (masked) {
    parallel(size, threads, [&](int64_t b) {
      const Job &job = jobs[blocks[b].job];
      done[b] = job.mask ? bits_in(job.mask, blocks[b].start, blocks[b].end) : 0;
    });
    for (int64_t b = 0, before = 0; b < size; b++) {
      if (blocks[b].start == 0) before = 0;
      int64_t here = done[b];
      done[b] = before;
      before += here;
    }
  }
  parallel(size, threads, WARM, [&](int64_t b) {
    const Job &job = jobs[blocks[b].job];
    const Numbers c = numbers(blocks[b].job);
    if (c.finite == 0) return;
    const Chunk chunk = version(c, capped, peak(b));
    if (job.mask) {
      masked_adam_block(job, blocks[b], c, chunk, zero_history, done[b], sums[b]);
      return;
    }
    Coders coders;
    if (job.m_type == INT8) coders.m = coder_of(job.m_map);
    if (job.v_type == INT8) coders.v = coder_of(job.v_map);
    adam_block(job, blocks[b], c, chunk, zero_history, coders, sums[b]);
  });
  return sums;
}

// ---- whole steps: the numbers of each tensor, as evenstep/transforms has them, and its update right after ----

struct How { // fields of WHOLE in interface.py, in its order
  double sign, lr, beta1, beta2, eps, decay, decay_after, warmup;
  double reset, forget, forget_after; // 1 or 0: the age starts anew; the moments do, before or after the update
  double eps_first;                   // eps enters before the bias is corrected
  double stable, gamma1, gamma2, gamma3, one_counter; // AdaClip and AdaGN
  double capped, cap_factor, cap_spread, zero_history; // SPAM's clipping
};

double bias_correction(double beta, double count) { return -std::expm1(count * std::log(beta)); }

// What is kept of a tensor from step to step: `AGE`, and for Stable-SPAM the others.
enum Kept { AGE, PEAK, NORM, NORM_RMS, COUNT };
// What a step tells of a tensor, in the order of STATS in interface.py.
enum Told { GRAD_MAX, GRAD_NORM, NORM_AFTER, CLIP_LIMIT, CLIPPED, GAIN, UPDATE_RMS, SKIPPED, TOLD };

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

// One job's column of `told`, [TOLD][k].
void tell(const Job &job, const Tensor &t, const How &how, const Sums &sums, int64_t k, int64_t i, float *told) {
  const double size = double(std::max<int64_t>(job.mask ? job.trained : job.size, 1));
  const bool stable = how.stable != 0, capped = how.capped != 0, entries = std::isfinite(t.sum); // all are finite
  const float after = capped ? float(std::sqrt(sums.clipped)) : !entries ? NAN : stable ? t.clipped_norm * t.gain : t.norm;
  told[GRAD_MAX * k + i] = t.peak;
  told[GRAD_NORM * k + i] = entries ? t.norm : NAN;
  told[NORM_AFTER * k + i] = after;
  told[CLIP_LIMIT * k + i] = stable ? t.limit : NAN;
  told[CLIPPED * k + i] = float(double(capped ? sums.count : t.clipped) / size);
  told[GAIN * k + i] = t.finite ? t.gain : 0;
  told[UPDATE_RMS * k + i] = float(std::sqrt(sums.update / size));
  told[SKIPPED * k + i] = !t.finite;
}

// ---- SCALE: rows or columns divided by their norms ----

struct Rates { // rows of the table RATES of interface.py, in its order
  float finite, gain, keep, add, rate, shrink, root;
};

// A unit of SCALE's work: so many rows that they are about a block, and can be read eight at a time.
int64_t rows_of_unit(int64_t length) { return std::max<int64_t>(BLOCK / length / 8 * 8, 8); }

// Squared norms of rows first..last-1; returns the largest entry. Rows are read at eight places in turn, as blocks are.
float size_rows(const Job &job, int64_t first, int64_t last, int64_t length, double *squares) {
  constexpr int64_t STREAMS = 8;
  float top = 0, buffer[CHUNK];
  int64_t row = first;
  if (job.g_type == F32)
    for (; row + STREAMS <= last && length >= W; row += STREAMS) {
      const float *g = static_cast<const float *>(job.g) + row * length;
      float peak[W] = {0};
      for (int64_t s = 0; s < STREAMS; s++)
        squares[row + s] = 0;
      for (int64_t start = 0; start < length; start += SPAN) {
        const int64_t end = std::min(start + SPAN, length), whole = start + (end - start) / W * W;
        float sum[STREAMS][W] = {{0}};
        for (int64_t c = start; c < whole; c += W)
          for (int64_t s = 0; s < STREAMS; s++) {
            const float *x = g + s * length + c;
            fetch(x + STREAMS * length);
            fetch(x + STREAMS * length + 16);
            take(x, W, sum[s], peak);
          }
        for (int64_t s = 0; s < STREAMS; s++) {
          float rest[W] = {0};
          if (whole < end)
            take(g + s * length + whole, int(end - whole), rest, peak);
          const float total = sum_of(sum[s]) + sum_of(rest);
          squares[row + s] += trusted(total, peak) ? total : squares_of(g + s * length + start, end - start);
        }
      }
      top = std::max(top, max_of(peak));
    }
  for (; row < last; row++) {
    Size found;
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = std::min(CHUNK, length - i), at = row * length + i;
      const float *x = buffer;
      if (job.g_type == F32)
        x = static_cast<const float *>(job.g) + at;
      else
        load(job.g, job.g_type, at, n, buffer);
      const Size part = size_of(x, n);
      found.peak = std::max(found.peak, part.peak);
      found.squares += part.squares;
    }
    squares[row] = found.squares;
    top = std::max(top, found.peak);
  }
  return top;
}

struct ByColumns {
  const float *divisors;
  float operator()(int64_t column, float x) const { return x / divisors[column]; }
};
struct ByRow {
  float inverse;
  float operator()(int64_t, float x) const { return x * inverse; }
};

// p <- p * shrink - rate * x / size for n entries from `at` on, `column` being the first one's; returns the direction's
// sum of squares.
template <class F> double scale_chunk(const Job &job, int64_t at, int64_t column, int64_t n, const float *__restrict x, float sign, const Rates &rates, F divided) {
  const float shrink = rates.shrink, rate = rates.rate;
  float buffer[CHUNK], *__restrict p = buffer, sum[W] = {0}, rest = 0;
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

// One row; returns the sum of squares of its direction. `squares` is that of the row where it is known.
double step_row(const Job &job, int64_t row, int64_t length, const Rates &c, const float *divisors, const double *squares, float floor, const Coder *coder) {
  float g[CHUNK], m[CHUNK];
  const int64_t begin = row * length;
  auto gradient = [&](int64_t at, int64_t n) -> const float * {
    if (job.g_type == F32)
      return static_cast<const float *>(job.g) + at;
    load(job.g, job.g_type, at, n, g);
    return g;
  };
  // The average gradient, and before that what makes it take in the new one.
  auto average = [&](int64_t at, int64_t n) -> const float * {
    return open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
  };
  auto take_in = [&](int64_t at, int64_t n) {
    const float *x = gradient(at, n), keep = c.keep, add = c.add * c.gain;
    float *to = open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
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
    close_moment(job.m, job.m_type, job.m_scale, coder, at, n, to);
  };
  double known = 0;
  if (squares) {
    known = *squares;
  } else if (!divisors) {
    for (int64_t i = 0; i < length; i += CHUNK) {
      const int64_t n = std::min(CHUNK, length - i), at = begin + i;
      if (job.m) take_in(at, n);
      known += size_of(job.m ? average(at, n) : gradient(at, n), n).squares;
    }
  }
  const ByRow by_row{1 / std::max(float(std::sqrt(known)) / c.root, floor)};
  double sum = 0;
  for (int64_t i = 0; i < length; i += CHUNK) {
    const int64_t n = std::min(CHUNK, length - i), at = begin + i;
    if (job.m && divisors) take_in(at, n);
    const float *x = job.m ? average(at, n) : gradient(at, n), sign = job.m ? 1 : c.gain;
    sum += divisors ? scale_chunk(job, at, i, n, x, sign, c, ByColumns{divisors}) : scale_chunk(job, at, i, n, x, sign, c, by_row);
  }
  return sum;
}

// Squared norms of a tensor's columns; returns the largest entry, Inf where one is not finite, and the norm of all.
Size size_columns(const Job &job, int64_t threads, double *squares) {
  const int64_t length = job.rows ? job.size / job.rows : 0, groups = std::min(GROUPS, job.rows);
  std::vector<double> sums(groups * length, 0.0);
  std::vector<float> peaks(groups, 0.0f);
  parallel(groups, threads, [&](int64_t part) {
    constexpr int64_t STREAMS = 8;
    double *to = sums.data() + part * length;
    float buffer[CHUNK], peak[W] = {0};
    int64_t row = job.rows * part / groups;
    const int64_t last = job.rows * (part + 1) / groups;
    auto one = [&](const float *g, int64_t at, int64_t n) { // of one row
      for (int64_t j = 0; j < n; j++) {
        const float y = std::fabs(g[j]);
        peak[0] = y > peak[0] ? y : peak[0];
        to[at + j] += double(g[j]) * g[j];
      }
    };
    if (job.g_type == F32)
      for (; row + STREAMS <= last; row += STREAMS) {
        const float *g = static_cast<const float *>(job.g) + row * length;
        const int64_t whole = length / W * W;
        for (int64_t c = 0; c < whole; c += W) {
          double sum[W];
          std::memcpy(sum, to + c, sizeof sum);
          for (int64_t s = 0; s < STREAMS; s++) {
            const float *x = g + s * length + c;
            fetch(x + STREAMS * length);
            fetch(x + STREAMS * length + 16);
#pragma omp simd
            for (int j = 0; j < W; j++) {
              const float y = std::fabs(x[j]);
              peak[j] = y > peak[j] ? y : peak[j];
              sum[j] += double(x[j]) * x[j];
            }
          }
          std::memcpy(to + c, sum, sizeof sum);
        }
        for (int64_t s = 0; s < STREAMS; s++)
          one(g + s * length + whole, whole, length - whole);
      }
    for (; row < last; row++)
      for (int64_t at = 0; at < length; at += CHUNK) {
        const int64_t n = std::min(CHUNK, length - at);
        load(job.g, job.g_type, row * length + at, n, buffer);
        one(buffer, at, n);
      }
    peaks[part] = max_of(peak);
  });
  Size whole;
  for (int64_t column = 0; column < length; column++) {
    double sum = 0;
    for (int64_t part = 0; part < groups; part++)
      sum += sums[part * length + column];
    squares[column] = sum;
    whole.squares += sum;
  }
  for (float x : peaks)
    whole.peak = std::max(whole.peak, x);
  if (!std::isfinite(whole.squares)) whole.peak = INFINITY;
  return whole;
}

// SCALE's step on one tensor, whose rows are measured here where `measured` asks for it, which then says what was found.
// Returns the norm of its direction.
float scale_tensor(const Job &job, Rates c, const float *divisors, float floor, int64_t threads, Size *measured) {
  if (job.size == 0) return 0;
  const int64_t length = job.size / job.rows, several = rows_of_unit(length), units = (job.rows + several - 1) / several;
  std::vector<double> squares(measured ? job.rows : 0);
  if (measured) {
    std::vector<float> peaks(units);
    parallel(units, threads, [&](int64_t unit) {
      peaks[unit] = size_rows(job, unit * several, std::min((unit + 1) * several, job.rows), length, squares.data());
    });
    for (float x : peaks)
      measured->peak = std::max(measured->peak, x);
    for (double x : squares)
      measured->squares += x;
    if (!std::isfinite(measured->squares)) measured->peak = INFINITY;
    c.finite = std::isfinite(measured->peak);
  }
  if (c.finite == 0) return 0;
  std::shared_ptr<const Coder> coder = job.m_type == INT8 ? coder_of(job.m_map) : nullptr;
  const bool known = measured && !job.m && !divisors; // the squares are those of what is divided
  std::vector<double> sums(units);
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

PUBLIC void evenstep_gather(const float *const *places, int64_t n, float *to) {
  for (int64_t i = 0; i < n; i++)
    to[i] = *places[i];
}

PUBLIC void evenstep_scatter(float *const *places, int64_t n, const float *from) {
  for (int64_t i = 0; i < n; i++)
    *places[i] = from[i];
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

// peak, norm and the numbers of blocks are written where `measure` is set; otherwise block_peak may be given or null.
PUBLIC void evenstep_adam(const Job *jobs, int64_t k, int64_t threads, const float *table, int64_t capped, int64_t zero_history, int64_t measure, float *update_norm, float *clipped_norm, float *clipped, float *peak, float *norm, float *block_peak, double *block_squares) {
  in_batches(jobs, k, measure, [&](int64_t first, int64_t last, int64_t number) {
    const std::vector<Block> blocks = cut(jobs, first, last, number);
    if (measure) {
      parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
        Size found = size_of_block(jobs[blocks[b].job], blocks[b]);
        block_peak[blocks[b].number] = found.peak;
        block_squares[blocks[b].number] = found.squares;
      });
      gather(jobs, first, last, number, block_peak, block_squares, peak, norm);
    }
    const std::vector<Sums> sums = adam_blocks(
        jobs, blocks, threads, capped, zero_history,
        [&](int64_t i) {
          Numbers c = column<Numbers>(table, k, i);
          if (measure) c.finite = std::isfinite(peak[i]);
          return c;
        },
        [&](int64_t b) { return block_peak ? block_peak[blocks[b].number] : INFINITY; });
    for (int64_t i = first, b = 0; i < last; i++) {
      const Sums whole = sum_of(sums, b, blocks_of(jobs[i]));
      update_norm[i] = float(std::sqrt(whole.update));
      clipped_norm[i] = float(std::sqrt(whole.clipped));
      clipped[i] = float(whole.count);
    }
  });
}

// All of Adam's step, of Stable-SPAM's, or of SPAM's. kept[n * k + i] is where number n of `Kept` of tensor i lies; told has
// TOLD rows of k.
PUBLIC void evenstep_step(const Job *jobs, int64_t k, int64_t threads, const How *given, float *const *kept, float *told) {
  const How &how = *given;
  const bool stable = how.stable != 0;
  const int numbers = stable ? 5 : 1;
  in_batches(jobs, k, true, [&](int64_t first, int64_t last, int64_t number) {
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
      tell(jobs[i], t, how, sum_of(sums, b, blocks_of(jobs[i])), k, i, told);
      if (!t.finite) continue;
      if (how.one_counter != 0) t[COUNT] = t[AGE];
      for (int n = 0; n < numbers; n++)
        *kept[n * k + i] = float(t.kept[n]);
    }
  });
}

// Squared norms of columns: squares[i] points to size / rows numbers.
PUBLIC void evenstep_columns(const Job *jobs, int64_t k, int64_t threads, double *const *squares, float *peak, float *norm) {
  for (int64_t i = 0; i < k; i++) {
    const Size found = size_columns(jobs[i], threads, squares[i]);
    peak[i] = found.peak;
    norm[i] = float(std::sqrt(found.squares));
  }
}

// divisors[i] is null where rows are divided by their own norms. peak and norm are written where `measure` is set.
PUBLIC void evenstep_rows(const Job *jobs, int64_t k, int64_t threads, const float *table, const float *const *divisors, float floor, int64_t measure, float *direction_norm, float *peak, float *norm) {
  for (int64_t i = 0; i < k; i++) {
    Size found;
    direction_norm[i] = scale_tensor(jobs[i], column<Rates>(table, k, i), divisors[i], floor, threads, measure ? &found : nullptr);
    if (measure) {
      peak[i] = found.peak;
      norm[i] = float(std::sqrt(found.squares));
    }
  }
}

// All of SCALE's step on matrices: by their columns, or by their rows. told is as in evenstep_step.
PUBLIC void evenstep_scale(const Job *jobs, int64_t k, int64_t threads, const double *how, float *told) {
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
    told[GRAD_MAX * k + i] = found.peak;
    told[GRAD_NORM * k + i] = norm;
    told[NORM_AFTER * k + i] = direction;
    told[CLIP_LIMIT * k + i] = NAN;
    told[CLIPPED * k + i] = 0;
    told[GAIN * k + i] = finite ? direction / std::max(norm, FLT_MIN) : NAN;
    told[UPDATE_RMS * k + i] = float(direction * lr / std::sqrt(double(std::max<int64_t>(job.size, 1))));
    told[SKIPPED * k + i] = !finite;
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
