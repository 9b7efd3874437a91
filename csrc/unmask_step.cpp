// One denoising commit (igpo/ops/unmask_step.py). The vocabulary is cut into slices of kSlice by position alone; each
// leaves its maximum and its sums relative to that maximum, and they are combined in float64 in slice order. So a row's
// result depends neither on the number of threads nor on the rows beside it, and a draw first picks a slice by the
// totals, then recomputes that slice only.
#include <cstdlib>
#include <new>

#include "ops.h"
#include "parallel.h"
#include "sampling.h"

namespace igpo::IGPO_ISA {
namespace {

constexpr int64_t kSlice = 4096;  // 8 KiB of bfloat16: the second sweep over a slice hits L1
constexpr int kChains = 4;        // independent accumulators; a group of values is one vector for each
constexpr int64_t kGroup = 64;    // values; a multiple of kChains * kLanes for every instruction set
static_assert(kGroup % (kChains * kLanes) == 0 && kSlice % kGroup == 0, "slices are whole groups");

enum Confidence { kProb, kMargin, kEntropy, kRandom };  // igpo/ops/unmask_step.py

// Which exponentials a slice needs: e^y only, e^(y/T) only, or both.
enum Need { kPlain, kTempered, kBoth };

struct Slice {
  float max, second;      // second: the runner-up, counting a repeated maximum twice
  float sum, weighted;    // of e^y and y e^y, y = (x - max) / temperature
  float sum1, weighted1;  // the same at temperature 1, when that is another one
};

// Memory of a call: operator new[] would be fine, std::vector would not (simd.h).
template <class T>
struct Array {
  T* data;
  explicit Array(int64_t count) : data(static_cast<T*>(std::malloc(static_cast<size_t>(count + 1) * sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }
  T& operator[](int64_t i) const { return data[i]; }
};

struct Call {
  const void* logits;
  int64_t stride_b, stride_l, length, vocab, num_slices;
  const int64_t* row_ids;
  double temperature, inverse;  // inverse: 1 / (temperature or 1)
  float inv_t;
  Confidence confidence;
  Need need;
  bool draws, gumbel;
  uint64_t token_key, score_key, gumbel_key;
  const bool* suppressed;         // (V,)
  const bool* slice_suppressed;   // per slice: holds a suppressed token
  const int64_t* rows;            // flat positions to work on
  Slice* slices;                  // per row to work on, num_slices of each
  Winner* winners;
  int64_t* candidate;             // (B, L)
  float *score, *logprob, *entropy;

  uint64_t row_id(int64_t flat) const {
    const int64_t b = flat / length;
    return static_cast<uint64_t>(row_ids ? row_ids[b] : b);
  }
  uint32_t position(int64_t flat) const { return static_cast<uint32_t>(flat % length); }
  template <class T>
  const T* row(int64_t flat) const {
    return static_cast<const T*>(logits) + flat / length * stride_b + flat % length * stride_l;
  }
};

// body(values, count) with the values of slice s, count a multiple of kGroup: in place where possible, else from a
// copy with -inf for suppressed tokens and for the padding.
template <class T, class Body>
IGPO_INLINE void with_slice(const Call& call, const T* row, int64_t s, Body&& body) {
  const int64_t begin = s * kSlice;
  const int64_t n = call.vocab - begin < kSlice ? call.vocab - begin : kSlice;
  if (n % kGroup == 0 && !call.slice_suppressed[s]) return body(row + begin, n);
  alignas(64) float copy[kSlice];
  const int64_t padded = (n + kGroup - 1) / kGroup * kGroup;
  for (int64_t i = 0; i < n; ++i) copy[i] = call.suppressed[begin + i] ? -kInf : to_float(row[begin + i]);
  for (int64_t i = n; i < padded; ++i) copy[i] = -kInf;
  body(static_cast<const float*>(copy), padded);
}

// (max, second) becomes the two largest of itself and (other_max, other_second).
inline void keep_two(float other_max, float other_second, float& max, float& second) {
  if (other_max > max) {
    second = max > other_second ? max : other_second;
    max = other_max;
  } else if (other_max > second) {
    second = other_max;
  }
}

// The largest two values. A NaN may be lost here; the sums keep it.
template <bool kTwo, class T>
inline void scan_max(const T* x, int64_t n, Slice& out) {
  F first[kChains], second[kChains];
  for (int c = 0; c < kChains; ++c) first[c] = second[c] = splat(-kInf);
  const auto add = [&](int c, F value) {
    if (kTwo) second[c] = max(second[c], select(value < first[c], value, first[c]));
    first[c] = max(first[c], value);
  };
  for (int64_t i = 0; i < n; i += kChains * kLanes)
    for (int c = 0; c < kChains; c += 2) {
      F a, b;
      load_pair(x + i + c * kLanes, a, b);
      add(c, a);
      add(c + 1, b);
    }
  out.max = out.second = -kInf;
  for (int c = 0; c < kChains; ++c) {
    if (!kTwo) {
      const float best = max_lanes(first[c]);
      out.max = best > out.max ? best : out.max;
      continue;
    }
    for (int lane = 0; lane < kLanes; ++lane) keep_two(first[c][lane], second[c][lane], out.max, out.second);
  }
}

struct Moments {
  F sum[kChains] = {}, weighted[kChains] = {};
  IGPO_INLINE void add(int c, F y) {
    y = max(splat(-100.0f), y);  // e^-100 is 0 here, and 0 * -inf must not be formed; keeps a NaN
    const F e = exp_nonpositive(y);
    sum[c] += e;
    weighted[c] += y * e;
  }
  IGPO_INLINE void total(float& s, float& w) const {
    s = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    w = sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
  }
};

template <Need kNeed, class T>
inline void scan_sums(const T* x, int64_t n, float inv_t, Slice& out) {
  const float base = out.max == -kInf ? 0.0f : out.max;
  Moments moments, moments1;
  const auto add = [&](int c, F y) {
    moments.add(c, kNeed == kPlain ? y : y * inv_t);
    if (kNeed == kBoth) moments1.add(c, y);
  };
  for (int64_t i = 0; i < n; i += kChains * kLanes)
    for (int c = 0; c < kChains; c += 2) {
      F a, b;
      load_pair(x + i + c * kLanes, a, b);
      __builtin_prefetch(x + i + c * kLanes + kSlice);  // memory works on the next slice while this one is summed
      add(c, a - base);
      add(c + 1, b - base);
    }
  moments.total(out.sum, out.weighted);
  if (kNeed == kBoth) moments1.total(out.sum1, out.weighted1);
}

template <Need kNeed, bool kTwo, class T>
void scan_slice(const Call& call, int64_t r, int64_t s, Winner& winner) {
  const int64_t flat = call.rows[r];
  Slice& slice = call.slices[r * call.num_slices + s];
  with_slice(call, call.row<T>(flat), s, [&](auto* x, int64_t n) {
    scan_max<kTwo>(x, n, slice);
    scan_sums<kNeed>(x, n, call.inv_t, slice);
    if (call.gumbel)
      gumbel_argmax({call.gumbel_key, call.row_id(flat), call.position(flat), call.temperature}, x, n, s * kSlice,
                    winner);
  });
}

// What the slices of a row say together, in float64 and in slice order.
struct Total {
  double sum = 0, weighted = 0;
  void add(float slice_sum, float slice_weighted, double shift) {  // shift: (slice max - max) / temperature
    if (slice_sum == 0) return;                                    // nothing finite; shift may be -inf or NaN
    const double scale = std::exp(shift);
    sum += scale * slice_sum;
    weighted += scale * (slice_weighted + shift * slice_sum);
  }
  double entropy() const {
    const double nats = std::log(sum) - weighted / sum;
    return nats > 0 ? nats : 0;
  }
};

template <class T>
int64_t first_equal(const Call& call, int64_t flat, const Slice* slices, float value) {
  int64_t s = 0, found = 0;
  while (slices[s].max != value) ++s;
  with_slice(call, call.row<T>(flat), s, [&](auto* x, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes)
      if (any(load(x + i) == value)) {
        while (to_float(x[i]) != value) ++i;
        found = s * kSlice + i;
        return;
      }
  });
  return found;
}

// Which of `count` masses the fraction u in [0, 1) of their sum falls in, and where in it. Rounding may overshoot: then
// it is the last one with mass.
template <class Mass>
IGPO_INLINE int64_t pick(int64_t count, double sum, Mass&& mass, double& u) {
  const double target = u * sum;
  double before = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double m = mass(i);
    if (m == 0) continue;
    last = i;
    u = (target - before) / m;
    before += m;
    if (target < before) return i;
  }
  u = 0x1.fffffffffffffp-1;
  return last;
}

// Inverse CDF by slice, group of kGroup tokens, token. Each level divides its own sum, so that a token's probability is
// right to float32 relative accuracy however small it is.
template <class T>
int64_t draw(const Call& call, int64_t flat, const Slice* slices, float max, double sum) {
  const Words words = philox(call.token_key, call.position(flat), 0, call.row_id(flat));
  double u = uniform53(words.w[0], words.w[1]);
  const int64_t s = pick(call.num_slices, sum, [&](int64_t i) {
    return slices[i].sum == 0 ? 0.0 : slices[i].sum * std::exp((static_cast<double>(slices[i].max) - max) * call.inverse);
  }, u);
  int64_t token = s * kSlice;
  with_slice(call, call.row<T>(flat), s, [&](auto* x, int64_t n) {
    alignas(64) float mass[kSlice];
    double group_mass[kSlice / kGroup], slice_mass = 0;
    for (int64_t g = 0; g < n / kGroup; ++g) {
      F group{};
      for (int64_t i = g * kGroup; i < (g + 1) * kGroup; i += kLanes) {
        const F e = exp_nonpositive((load(x + i) - slices[s].max) * call.inv_t);
        store(mass + i, e);
        group += e;
      }
      slice_mass += group_mass[g] = sum_lanes(group);
    }
    const int64_t g = pick(n / kGroup, slice_mass, [&](int64_t i) { return group_mass[i]; }, u);
    double exact = 0;
    for (int64_t i = 0; i < kGroup; ++i) exact += mass[g * kGroup + i];
    token += g * kGroup + pick(kGroup, exact, [&](int64_t i) { return static_cast<double>(mass[g * kGroup + i]); }, u);
  });
  return token;
}

template <class T>
void finish_row(const Call& call, int64_t r, const Winner& winner) {
  const int64_t flat = call.rows[r];
  const Slice* slices = call.slices + r * call.num_slices;
  float top = -kInf, second = -kInf;
  for (int64_t s = 0; s < call.num_slices; ++s) keep_two(slices[s].max, slices[s].second, top, second);
  const double max = top;
  Total total, total1;
  for (int64_t s = 0; s < call.num_slices; ++s) {
    const double shift = slices[s].max - max;
    total.add(slices[s].sum, slices[s].weighted, shift * call.inverse);
    if (call.need == kBoth) total1.add(slices[s].sum1, slices[s].weighted1, shift);
  }
  if (!(total.sum > 0)) {  // NaN, +inf, or nothing finite
    call.score[flat] = __builtin_nanf("");
    call.logprob[flat] = call.entropy[flat] = 0;
    return;
  }
  const Total& plain = call.need == kBoth ? total1 : total;
  const int64_t token = !call.draws   ? first_equal<T>(call, flat, slices, top)
                        : call.gumbel ? winner.token
                                      : draw<T>(call, flat, slices, top, total.sum);
  const double below = static_cast<double>(to_float(call.row<T>(flat)[token])) - max;
  double score = 0;
  if (call.confidence == kProb) score = std::exp(below) / plain.sum;
  if (call.confidence == kMargin) score = -std::expm1(static_cast<double>(second) - max) / plain.sum;
  if (call.confidence == kEntropy) score = 0.0 - plain.entropy();
  if (call.confidence == kRandom)
    score = ((philox(call.score_key, call.position(flat), 0, call.row_id(flat)).w[0] >> 9) + 0.5) * 0x1p-23;
  call.candidate[flat] = token;
  call.score[flat] = static_cast<float>(score);
  call.logprob[flat] = static_cast<float>(below * call.inverse - std::log(total.sum));
  call.entropy[flat] = static_cast<float>(total.entropy());
}

using ScanSlice = void (*)(const Call&, int64_t, int64_t, Winner&);

template <class T>
ScanSlice scan_for(Need need, bool two) {
  if (need == kPlain) return two ? scan_slice<kPlain, true, T> : scan_slice<kPlain, false, T>;
  if (need == kTempered) return scan_slice<kTempered, false, T>;
  return two ? scan_slice<kBoth, true, T> : scan_slice<kBoth, false, T>;
}

template <class T>
void score_rows(const Call& call, int64_t num_rows, int threads) {
  const ScanSlice scan = scan_for<T>(call.need, call.confidence == kMargin);
  const int64_t slices = call.num_slices;
  if (num_rows >= 4 * threads) {  // enough rows to share: the end of a row finds its slices in the cache
    parallel_for(num_rows, threads, [&](int64_t r) {
      Winner winner;
      for (int64_t s = 0; s < slices; ++s) scan(call, r, s, winner);
      finish_row<T>(call, r, winner);
    });
    return;
  }
  parallel_for(num_rows * slices, threads, [&](int64_t i) {
    Winner winner;
    scan(call, i / slices, i % slices, winner);
    call.winners[i] = winner;
  });
  parallel_for(num_rows, threads, [&](int64_t r) {
    Winner winner;
    for (const Winner* w = call.winners + r * slices; w < call.winners + (r + 1) * slices; ++w)
      if (w->score > winner.score) winner = *w;
    finish_row<T>(call, r, winner);
  });
}

// Greater for a higher score, then for a lower position.
inline uint64_t rank_key(float score, int64_t position) {
  uint32_t bits;
  score += 0.0f;  // -0 and +0 are one score
  std::memcpy(&bits, &score, 4);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | static_cast<uint32_t>(~position);
}

// The k-th greatest of count keys (k in [1, count]), by a heap of the k greatest so far with the least on top.
uint64_t kth_greatest(const uint64_t* keys, int64_t count, int64_t k, uint64_t* heap) {
  const auto sink = [&](int64_t node, int64_t size) {
    for (int64_t child; (child = 2 * node + 1) < size; node = child) {
      if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
      if (heap[node] <= heap[child]) return;
      const uint64_t moved = heap[node];
      heap[node] = heap[child];
      heap[child] = moved;
    }
  };
  for (int64_t i = 0; i < k; ++i) heap[i] = keys[i];
  for (int64_t node = k / 2; node-- > 0;) sink(node, k);
  for (int64_t i = k; i < count; ++i)
    if (keys[i] > heap[0]) {
      heap[0] = keys[i];
      sink(0, k);
    }
  return heap[0];
}

// Commits the k best of the `count` given positions of a sequence, and those at or above the threshold.
void commit(const Call& call, const int64_t* rows, int64_t count, int64_t k, float threshold, uint64_t* keys,
            uint64_t* heap, bool* committed) {
  int64_t valid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float score = call.score[rows[i]];
    if (score == score) keys[valid++] = rank_key(score, rows[i] % call.length);
  }
  if (k > valid) k = valid;
  const uint64_t least = k > 0 ? kth_greatest(keys, valid, k, heap) : ~uint64_t{0};
  for (int64_t i = 0; i < count; ++i) {
    const float score = call.score[rows[i]];
    if (score == score)
      committed[rows[i]] = score >= threshold || rank_key(score, rows[i] % call.length) >= least;
  }
}

}  // namespace

void unmask_step(const void* logits, int64_t stride_b, int64_t stride_l, int dtype, const int64_t* tokens,
                 const bool* eligible, int64_t num_unmask, const int64_t* num_unmask_rows, const int64_t* suppress,
                 int64_t num_suppress, const int64_t* row_ids, int64_t* out, bool* committed, float* score,
                 float* logprob, float* entropy, int64_t batch, int64_t length, int64_t vocab, int64_t mask_id,
                 double temperature, int confidence, bool has_threshold, float threshold, bool gumbel,
                 uint64_t token_key, uint64_t score_key, uint64_t gumbel_key, int threads) {
  const int64_t positions = batch * length, num_slices = (vocab + kSlice - 1) / kSlice;
  const Array<bool> suppressed(vocab), slice_suppressed(num_slices);
  std::memset(suppressed.data, 0, static_cast<size_t>(vocab));
  std::memset(slice_suppressed.data, 0, static_cast<size_t>(num_slices));
  for (int64_t i = 0; i < num_suppress; ++i)
    if (suppress[i] >= 0 && suppress[i] < vocab) suppressed[suppress[i]] = slice_suppressed[suppress[i] / kSlice] = true;

  const Array<int64_t> rows(positions), candidate(positions);
  int64_t num_rows = 0;
  for (int64_t i = 0; i < positions; ++i) {
    committed[i] = false;
    score[i] = logprob[i] = entropy[i] = 0;
    if (tokens[i] == mask_id && (!eligible || eligible[i])) rows[num_rows++] = i;
  }
  const bool draws = temperature > 0, tempered = draws && temperature != 1;
  const Array<Slice> slices(num_rows * num_slices);
  const Array<Winner> winners(num_rows * num_slices);

  Call call{};
  call.logits = logits;
  call.stride_b = stride_b;
  call.stride_l = stride_l;
  call.length = length;
  call.vocab = vocab;
  call.num_slices = num_slices;
  call.row_ids = row_ids;
  call.temperature = temperature;
  call.inverse = tempered ? 1 / temperature : 1;
  if (call.inverse > 1e30) call.inverse = 1e30;  // a float; any difference of logits is already infinite
  call.inv_t = static_cast<float>(call.inverse);
  call.confidence = static_cast<Confidence>(confidence);
  call.need = !tempered ? kPlain : call.confidence == kRandom ? kTempered : kBoth;
  call.draws = draws;
  call.gumbel = draws && gumbel;
  call.token_key = token_key;
  call.score_key = score_key;
  call.gumbel_key = gumbel_key;
  call.suppressed = suppressed.data;
  call.slice_suppressed = slice_suppressed.data;
  call.rows = rows.data;
  call.slices = slices.data;
  call.winners = winners.data;
  call.candidate = candidate.data;
  call.score = score;
  call.logprob = logprob;
  call.entropy = entropy;
  if (dtype == 0) score_rows<float>(call, num_rows, threads);
  if (dtype == 1) score_rows<Bf16>(call, num_rows, threads);
  if (dtype == 2) score_rows<Fp16>(call, num_rows, threads);

  const Array<uint64_t> keys(length), heap(length);
  for (int64_t b = 0, row = 0; b < batch; ++b) {
    const int64_t first = row;
    while (row < num_rows && rows[row] < (b + 1) * length) ++row;
    const int64_t k = num_unmask_rows ? num_unmask_rows[b] : num_unmask;
    commit(call, rows.data + first, row - first, has_threshold && k < 1 ? 1 : k, has_threshold ? threshold : kInf,
           keys.data, heap.data, committed);
  }
  for (int64_t i = 0; i < positions; ++i) out[i] = committed[i] ? candidate[i] : tokens[i];
}

}  // namespace igpo::IGPO_ISA
