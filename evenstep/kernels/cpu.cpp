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

namespace {

constexpr int64_t CHUNK = 1024;       // entries: four fp32 buffers of it are 16 KiB
constexpr int64_t SPAN = 4 * CHUNK;   // entries that are worked through at once where nothing is unpacked
constexpr int64_t BLOCK = 16 * CHUNK; // entries of a unit of work, and of the maxima that a clipping pass looks at
constexpr int64_t BATCH = 16 * BLOCK; // entries that are measured and then updated while they are still in cache
constexpr int64_t AHEAD = 1024;       // entries
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

template <class F> void parallel(int64_t n, int64_t threads, F f) {
#ifdef _OPENMP
  // One thread does not enter OpenMP at all, whose pool does not survive a fork.
  if (threads > 1 && n > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++)
      f(i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; i++)
    f(i);
}

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

inline void fetch(const void *address) { __builtin_prefetch(address, 0); }
inline void fetch_to_write(const void *address) { __builtin_prefetch(address, 1); }

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

  int32_t search(float x) const { // the nearest value, by halving
    int32_t c = int32_t(std::upper_bound(map, map + 256, x) - map) - 1;
    c = c < 0 ? 0 : c;
    return c < 255 && x - map[c] >= (map[c + 1] - map[c]) * 0.5f ? c + 1 : c;
  }

  void decode(const uint8_t *codes, const float *scale, int64_t n, float *to) const {
    for (int64_t start = 0; start < n; start += QBLOCK) {
      const float unit = scale[start / QBLOCK];
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        to[start + i] = map[codes[start + i]] * unit;
    }
  }

  void encode(const float *from, int64_t n, uint8_t *codes, float *scale) const {
    const Coder c = *this; // a copy: stores of bytes cannot change it
    for (int64_t start = 0; start < n; start += QBLOCK) {
      float top = 0;
#pragma omp simd reduction(max : top)
      for (int64_t i = 0; i < QBLOCK; i++) {
        float x = std::fabs(from[start + i]);
        top = x > top ? x : top;
      }
      const float unit = top > 1e-12f ? top : 1e-12f;
      scale[start / QBLOCK] = unit;
      if (!known) {
        for (int64_t i = 0; i < QBLOCK; i++)
          codes[start + i] = uint8_t(search(from[start + i] / unit));
        continue;
      }
      int32_t found[QBLOCK];
#pragma omp simd
      for (int64_t i = 0; i < QBLOCK; i++)
        found[i] = c.code(from[start + i] / unit);
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
      fetch_to_write(codes + i + AHEAD);
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

Size size_of(const float *__restrict g, int64_t n) {
  Size found;
  float peak[W] = {0};
  for (int64_t i = 0; i < n; i += SPAN) {
    const int64_t end = std::min(i + SPAN, n);
    float sum[W] = {0}, rest[W] = {0}, rest_peak[W] = {0};
    int64_t c = i;
    for (; c + W <= end; c += W)
      take(g + c, W, sum, peak);
    if (c < end)
      take(g + c, int(end - c), rest, rest_peak);
    for (int j = 0; j < W; j++)
      peak[j] = rest_peak[j] > peak[j] ? rest_peak[j] : peak[j];
    const float total = sum_of(sum) + sum_of(rest);
    found.squares += trusted(total, peak) ? total : squares_of(g + i, end - i);
  }
  found.peak = max_of(peak);
  return found;
}

// The same for a block in memory, read at STREAMS places in turn: a core that reads at one place only waits for the
// prefetcher, which starts anew at every page. A third faster.
Size size_of_stored_block(const float *__restrict g) {
  constexpr int64_t STREAMS = 8, PART = BLOCK / STREAMS, TURN = 256;
  Size found;
  float peak[W] = {0};
  for (int64_t i = 0; i < PART; i += TURN) {
    float sum[W] = {0};
    for (int64_t c = i; c < i + TURN; c += W)
      for (int64_t s = 0; s < STREAMS; s++) {
        const float *x = g + s * PART + c;
        fetch(x + BLOCK);
        fetch(x + BLOCK + 16);
        take(x, W, sum, peak);
      }
    const float total = sum_of(sum);
    if (trusted(total, peak))
      found.squares += total;
    else
      for (int64_t s = 0; s < STREAMS; s++)
        found.squares += squares_of(g + s * PART + i, TURN);
  }
  found.peak = max_of(peak);
  return found;
}

Size size_of_block(const Job &job, const Block &block) {
  if (job.g_type == F32) {
    const float *g = static_cast<const float *>(job.g) + block.start;
    return block.end - block.start == BLOCK ? size_of_stored_block(g) : size_of(g, block.end - block.start);
  }
  Size found;
  float buffer[CHUNK];
  for (int64_t i = block.start; i < block.end; i += CHUNK) {
    int64_t n = std::min(CHUNK, block.end - i);
    load(job.g, job.g_type, i, n, buffer);
    Size part = size_of(buffer, n);
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

inline float read(float g, float gain, float limit, float reduced) {
  float x = std::fabs(g) > limit ? g * reduced : g * gain;
  x = x < FLT_MAX ? x : FLT_MAX; // a gain may overflow; as the plain code, which also reads 0 * Inf as 0
  x = x > -FLT_MAX ? x : -FLT_MAX;
  return g == 0 ? 0 : x;
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
      fetch_to_write(p + i + j + AHEAD);
      fetch_to_write(m + i + j + AHEAD);
      fetch_to_write(v + i + j + AHEAD);
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

// For every byte of a mask, the places of its bits, then rubbish.
struct Places {
  uint16_t at[256][8];
  uint8_t number[256];
  Places() {
    for (int byte = 0; byte < 256; byte++)
      for (int bit = 0, k = 0; bit < 8; bit++) {
        at[byte][bit] = 0;
        if (byte >> bit & 1)
          at[byte][k++] = uint16_t(bit);
        number[byte] = uint8_t(k);
      }
  }
};
const Places places;

// The entries start..start+n-1 that are trained, relative to start; returns how many. start is a multiple of 8. On the way
// what the next span needs of g is fetched.
int64_t trained(const Job &job, int64_t start, int64_t n, uint16_t *found) {
  const uint8_t *bytes = job.mask + start / 8;
  const char *g = static_cast<const char *>(job.g) + (start + SPAN) * (job.g_type == F32 ? 4 : 2);
  int64_t count = 0, b = 0;
  auto turn = [&](uint32_t byte) __attribute__((always_inline)) {
    for (int j = 0; j < 8; j++)
      found[count + j] = uint16_t(places.at[byte][j] + b * 8);
    count += places.number[byte];
  };
  for (; (b + 2) * 8 <= n; b++) {
    fetch(g + b * (job.g_type == F32 ? 32 : 16));
    turn(bytes[b]);
    b++;
    turn(bytes[b]);
  }
  for (; b * 8 < n; b++)
    turn(b * 8 + 8 > n ? bytes[b] & ((1u << (n - b * 8)) - 1) : bytes[b]); // bits beyond the last entry mean nothing
  return count;
}

// Keeps a loop from being vectorised: scattered loads and stores in vectors are slower than one by one.
inline void one_by_one() {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
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
  uint16_t where[SPAN + 8];
  float p[SPAN], g[SPAN], m[SPAN], v[SPAN];
  uint16_t halves[SPAN], lost[SPAN];
  for (int64_t i = block.start; i < block.end; i += SPAN) {
    int64_t size = std::min(SPAN, block.end - i);
    int64_t n = trained(job, i, size, where);
    if (done + n > job.trained) // a mask of more bits than it has moments
      n = std::max<int64_t>(job.trained - done, 0);
    if (job.g_type == F32) {
      const float *from = static_cast<const float *>(job.g) + i;
      for (int64_t j = 0; j < n; j++) {
        g[j] = from[where[j]];
        one_by_one();
      }
    } else {
      const uint16_t *from = static_cast<const uint16_t *>(job.g) + i;
      for (int64_t j = 0; j < n; j++) g[j] = from_bf16(from[where[j]]);
    }
    float *mm = open_moment(job.m, job.m_type, nullptr, nullptr, done, n, m);
    float *vv = open_moment(job.v, job.v_type, nullptr, nullptr, done, n, v);
    if (job.p_type == F32) {
      float *to = static_cast<float *>(job.p) + i;
      const uint64_t ahead = n ? (uint64_t(SPAN) << 16) / uint64_t(n) : 0; // entries of the next span per entry here
      for (int64_t j = 0; j < n; j++) {
        p[j] = to[where[j]];
        fetch_to_write(to + SPAN + ((uint64_t(j) * ahead) >> 16));
        one_by_one();
      }
      chunk(p, g, mm, vv, n, c, zero_history, sums);
      for (int64_t j = 0; j < n; j++) {
        to[where[j]] = p[j];
        one_by_one();
      }
    } else {
      uint16_t *to = static_cast<uint16_t *>(job.p) + i;
      for (int64_t j = 0; j < n; j++) {
        p[j] = from_bf16(to[where[j]]);
        if (job.lost) lost[j] = job.lost[i + where[j]];
      }
      chunk(p, g, mm, vv, n, c, zero_history, sums);
      Job compact = job; // rounded together, then put back; numbered as the compact tensor is
      compact.p = halves;
      compact.lost = job.lost ? lost : nullptr;
      write_bf16(compact, 0, n, p, done);
      for (int64_t j = 0; j < n; j++) {
        to[where[j]] = halves[j];
        if (job.lost) job.lost[i + where[j]] = lost[j];
      }
    }
    close_moment(job.m, job.m_type, nullptr, nullptr, done, n, mm);
    close_moment(job.v, job.v_type, nullptr, nullptr, done, n, vv);
    done += n;
  }
}

// ---- SCALE: rows or columns divided by their norms ----

struct Rates { // rows of the table RATES of interface.py, in its order
  float finite, gain, keep, add, rate, shrink, root;
};

// One row; returns the sum of squares of its direction.
double step_row(const Job &job, int64_t row, int64_t length, const Rates &c, const float *divisors, float floor, const Coder *coder) {
  float g[CHUNK], m[CHUNK], p[CHUNK];
  const int64_t begin = row * length;
  // What is normalised, chunk by chunk: the gradient, or the average that takes it in the first time.
  auto source = [&](int64_t at, int64_t n, bool fresh) -> const float * {
    const float *x = g;
    if (!job.m || fresh) {
      if (job.g_type == F32)
        x = static_cast<const float *>(job.g) + at;
      else
        load(job.g, job.g_type, at, n, g);
    }
    if (!job.m)
      return x;
    float *average = open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
    if (fresh) {
      const float keep = c.keep, add = c.add * c.gain;
#pragma omp simd
      for (int64_t i = 0; i < n; i++)
        average[i] = average[i] * keep + x[i] * add;
      close_moment(job.m, job.m_type, job.m_scale, coder, at, n, average);
      if (job.m_type != F32) // what was stored is what is used
        average = open_moment(job.m, job.m_type, job.m_scale, coder, at, n, m);
    }
    return average;
  };
  const float sign = job.m ? 1 : c.gain;
  float inverse = 0;
  if (!divisors) {
    double squares = 0;
    for (int64_t i = 0; i < length; i += CHUNK) {
      int64_t n = std::min(CHUNK, length - i);
      for (int64_t j = 0; j < n; j += 16) {
        if (job.p_type == F32) fetch_to_write(static_cast<const float *>(job.p) + begin + i + j + AHEAD);
        if (job.m && job.m_type == F32) fetch_to_write(static_cast<const float *>(job.m) + begin + i + j + AHEAD);
        if (job.g_type == F32) fetch(static_cast<const float *>(job.g) + begin + i + j + AHEAD);
      }
      squares += size_of(source(begin + i, n, true), n).squares;
    }
    inverse = 1 / std::max(float(std::sqrt(squares)) / c.root, floor);
  }
  double sum = 0;
  for (int64_t i = 0; i < length; i += CHUNK) {
    int64_t n = std::min(CHUNK, length - i), at = begin + i;
    if (divisors)
      for (int64_t j = 0; j < n; j += 16) {
        if (job.p_type == F32) fetch_to_write(static_cast<const float *>(job.p) + at + j + AHEAD);
        if (job.g_type == F32) fetch(static_cast<const float *>(job.g) + at + j + AHEAD);
      }
    const float *x = source(at, n, divisors != nullptr);
    float *pp = p;
    if (job.p_type == F32)
      pp = static_cast<float *>(job.p) + at;
    else
      load(job.p, job.p_type, at, n, p);
    float part = 0;
    if (divisors) {
      const float *d = divisors + i;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; j++) {
        float u = x[j] * sign / d[j];
        part += u * u;
        pp[j] = pp[j] * c.shrink - c.rate * u;
      }
    } else {
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < n; j++) {
        float u = x[j] * sign * inverse;
        part += u * u;
        pp[j] = pp[j] * c.shrink - c.rate * u;
      }
    }
    sum += part;
    if (job.p_type == BF16)
      write_bf16(job, at, n, pp, at);
  }
  return sum;
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
    const Block &block = blocks[b];
    const Job &job = jobs[block.job];
    const float top = limit[block.job];
    const double factor = rescale[block.job];
    if (!(block_peak[b] > top)) {
      sums[b].clipped = block_squares[b];
      return;
    }
    float buffer[CHUNK];
    for (int64_t i = block.start; i < block.end; i += CHUNK) {
      int64_t n = std::min(CHUNK, block.end - i), over = 0;
      load(job.g, job.g_type, i, n, buffer);
      double squares = 0;
#pragma omp simd reduction(+ : squares, over)
      for (int64_t j = 0; j < n; j++) {
        bool above = std::fabs(buffer[j]) > top;
        double x = above ? buffer[j] * factor : double(buffer[j]);
        squares += x * x;
        over += above;
      }
      sums[b].clipped += squares;
      sums[b].count += over;
    }
  });
  for (int64_t i = 0, b = 0; i < k; i++) {
    double squares = 0;
    int64_t over = 0;
    for (int64_t left = blocks_of(jobs[i]); left > 0; left--, b++) {
      squares += sums[b].clipped;
      over += sums[b].count;
    }
    norm[i] = float(std::sqrt(squares));
    count[i] = float(over);
  }
}

// peak, norm and the numbers of blocks are written where `measure` is set; otherwise block_peak may be given or null.
PUBLIC void evenstep_adam(const Job *jobs, int64_t k, int64_t threads, const float *table, int64_t capped, int64_t zero_history, int64_t measure, float *update_norm, float *clipped_norm, float *clipped, float *peak, float *norm, float *block_peak, double *block_squares) {
  std::vector<Coders> coders(k);
  for (int64_t i = 0; i < k; i++) {
    if (jobs[i].m_type == INT8) coders[i].m = coder_of(jobs[i].m_map);
    if (jobs[i].v_type == INT8) coders[i].v = coder_of(jobs[i].v_map);
  }
  in_batches(jobs, k, measure, [&](int64_t first, int64_t last, int64_t number) {
    std::vector<Block> blocks = cut(jobs, first, last, number);
    const int64_t size = int64_t(blocks.size());
    std::vector<Sums> sums(size);
    std::vector<int64_t> done(size);
    if (measure) {
      parallel(size, threads, [&](int64_t b) {
        Size found = size_of_block(jobs[blocks[b].job], blocks[b]);
        block_peak[blocks[b].number] = found.peak;
        block_squares[blocks[b].number] = found.squares;
      });
      gather(jobs, first, last, number, block_peak, block_squares, peak, norm);
    }
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
    parallel(size, threads, [&](int64_t b) {
      const int64_t i = blocks[b].job;
      const Numbers c = column<Numbers>(table, k, i);
      if (measure ? !std::isfinite(peak[i]) : c.finite == 0) return;
      const Chunk chunk = version(c, capped, block_peak ? block_peak[blocks[b].number] : INFINITY);
      if (jobs[i].mask)
        masked_adam_block(jobs[i], blocks[b], c, chunk, zero_history, done[b], sums[b]);
      else
        adam_block(jobs[i], blocks[b], c, chunk, zero_history, coders[i], sums[b]);
    });
    for (int64_t i = first, b = 0; i < last; i++) {
      Sums whole;
      for (int64_t left = blocks_of(jobs[i]); left > 0; left--, b++) {
        whole.update += sums[b].update;
        whole.clipped += sums[b].clipped;
        whole.count += sums[b].count;
      }
      update_norm[i] = float(std::sqrt(whole.update));
      clipped_norm[i] = float(std::sqrt(whole.clipped));
      clipped[i] = float(whole.count);
    }
  });
}

// Squared norms of columns: squares[i] points to size / rows numbers.
PUBLIC void evenstep_columns(const Job *jobs, int64_t k, int64_t threads, double *const *squares, float *peak, float *norm) {
  for (int64_t i = 0; i < k; i++) {
    const Job &job = jobs[i];
    const int64_t length = job.rows ? job.size / job.rows : 0, groups = std::min(GROUPS, job.rows);
    std::vector<double> sums(groups * length, 0.0);
    std::vector<float> peaks(groups, 0.0f);
    parallel(groups, threads, [&](int64_t part) {
      double *to = sums.data() + part * length;
      float buffer[CHUNK];
      float top = 0;
      for (int64_t row = job.rows * part / groups; row < job.rows * (part + 1) / groups; row++)
        for (int64_t at = 0; at < length; at += CHUNK) {
          const int64_t n = std::min(CHUNK, length - at), from = row * length + at;
          const float *x = buffer;
          if (job.g_type == F32) {
            x = static_cast<const float *>(job.g) + from;
            for (int64_t j = 0; j < n; j += 16)
              fetch(x + j + AHEAD);
          } else {
            load(job.g, job.g_type, from, n, buffer);
          }
#pragma omp simd reduction(max : top)
          for (int64_t j = 0; j < n; j++) {
            float y = std::fabs(x[j]);
            top = y > top ? y : top;
            to[at + j] += double(x[j]) * x[j];
          }
        }
      peaks[part] = top;
    });
    double whole = 0;
    float top = 0;
    for (int64_t column = 0; column < length; column++) {
      double sum = 0;
      for (int64_t part = 0; part < groups; part++)
        sum += sums[part * length + column];
      squares[i][column] = sum;
      whole += sum;
    }
    for (float x : peaks)
      top = std::max(top, x);
    peak[i] = std::isfinite(whole) ? top : INFINITY;
    norm[i] = float(std::sqrt(whole));
  }
}

// divisors[i] is null where rows are divided by their own norms.
PUBLIC void evenstep_rows(const Job *jobs, int64_t k, int64_t threads, const float *table, const float *const *divisors, float floor, int64_t measure, float *direction_norm, float *peak, float *norm, float *block_peak, double *block_squares) {
  in_batches(jobs, k, measure, [&](int64_t first, int64_t last, int64_t number) {
    if (measure) {
      std::vector<Block> blocks = cut(jobs, first, last, number);
      parallel(int64_t(blocks.size()), threads, [&](int64_t b) {
        Size found = size_of_block(jobs[blocks[b].job], blocks[b]);
        block_peak[blocks[b].number] = found.peak;
        block_squares[blocks[b].number] = found.squares;
      });
      gather(jobs, first, last, number, block_peak, block_squares, peak, norm);
    }
    for (int64_t i = first; i < last; i++) {
      const Job &job = jobs[i];
      const Rates c = column<Rates>(table, k, i);
      direction_norm[i] = 0;
      if (job.size == 0 || (measure ? !std::isfinite(peak[i]) : c.finite == 0)) continue;
      std::shared_ptr<const Coder> coder = job.m_type == INT8 ? coder_of(job.m_map) : nullptr;
      const int64_t length = job.size / job.rows, several = std::max<int64_t>(BLOCK / length, 1);
      const int64_t parts = (job.rows + several - 1) / several;
      std::vector<double> sums(parts);
      parallel(parts, threads, [&](int64_t part) {
        double sum = 0;
        for (int64_t row = part * several; row < std::min((part + 1) * several, job.rows); row++)
          sum += step_row(job, row, length, c, divisors[i], floor, coder.get());
        sums[part] = sum;
      });
      double whole = 0;
      for (double sum : sums)
        whole += sum;
      direction_norm[i] = float(std::sqrt(whole));
    }
  });
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
