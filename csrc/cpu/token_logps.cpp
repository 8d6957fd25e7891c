// The row kernels on the CPU. Compiled once for each instruction set, NCA_ISA names its namespace; see dispatch.cpp.
#include "row_math.h"
#include "vector_math.h"

namespace nca {
namespace {

constexpr int64_t kCacheLine = 64;
// One loop sums the exponentials of a block and finds the maximum of the next. The size is no power of 2: with 4096 bytes, the
// lines of both blocks seem to compete for the same sets of the first-level cache of Zen 4, and forward takes 9 to 22% longer.
constexpr int64_t kBlockBytes = 3072;

// z and dz/dlogits / scale. Without a softcap z is scale * logits.
template <bool kCapped>
struct Transform {
  float scale, softcap;
  struct Value {
    Vec z, slope;
  };
  explicit Transform(const TokenLogps& p) : scale(p.scale), softcap(p.softcap) {}
  Value operator()(Vec logits) const {
    const Vec scaled = logits * scale;
    if (!kCapped) return {scaled, splat(1.f)};
    const Tanh t = tanh(scaled / softcap);
    return {softcap * t.value, t.slope};
  }
};

// The number of columns before the first start of a cache line: a vector load across two lines takes twice the time.
template <class Type>
int64_t count_unaligned(const Type* at, int64_t count) {
  const int64_t ahead = (int64_t)(-(uintptr_t)at % kCacheLine / sizeof(Type));
  return ahead < count ? ahead : count;
}

Vec only_first(Vec v, int64_t count) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)count ? v : splat(-INFINITY);
}

struct RowStats {
  RowSum sum;
  float weighted;  // A = sum (z - max) exp(z - max); 0 unless kWeighted
};

// Sums over columns of exp(scale * (x - top)) = 2^t, t = rate * (x - top), and of t 2^t if kWeighted.
template <class Dtype, bool kWeighted>
class RunningSums {
  using Type = typename Dtype::Type;
  using Top = typename Dtype::Top;

 public:
  explicit RunningSums(float scale) : scale_(scale), rate_(scale * kLog2E) {}

  void add(const Type* x, int64_t count) {
    constexpr int64_t kBlock = kBlockBytes / sizeof(Type);
    const int64_t head = count_unaligned(x, count), end = count - (count - head) % kPair;
    add_few(x, head);
    add_few(x + end, count - end);
    int64_t first = head, next = end - first < kBlock ? end : first + kBlock;
    Top top;
    for (int64_t i = first; i < next; i += kPair) top.add(x + i);
    while (first < next) {
      const int64_t next_end = end - next < kBlock ? end : next + kBlock;
      raise(top.value());
      top = Top();
      if (fabsf(offset_) < kLargestOffset) {
        add_block(x + first, next - first, next_end - next, top);
      } else {
        add_few(x + first, next - first);
        for (int64_t i = next; i < next_end; i += kPair) top.add(x + i);
      }
      first = next;
      next = next_end;
    }
  }

  RowStats stats() const { return {{scale_ * top_, (float)sum_}, (float)(weighted_ * M_LN2)}; }

 private:
  static constexpr bool kFast = sizeof(Type) == 2;
  static constexpr float kLargestOffset = 0x1p24f;  // rounded to a multiple of 1, so that no t is above 1

  // Adds a block of whole pairs, none above top_. `next_count` columns follow it, whose largest goes into `next_top`.
  void add_block(const Type* block, int64_t count, int64_t next_count, Top& next_top) {
    const Vec rate = splat(rate_), shift = splat(shift_), offset = splat(offset_);
    Vec powers[2] = {}, weighted[2] = {};
    const auto add = [&](Vec x, int which) {
      const Vec t = kFused ? fma(x, rate, offset) : (x - shift) * rate, power = exp2<kFast>(t);
      powers[which] += power;
      if (kWeighted) weighted[which] = fma(finite(t), power, weighted[which]);
    };
    const auto add_pair = [&](int64_t i) {
      const Pair x = Dtype::get_pair(block + i);
      add(x.a, 0);
      add(x.b, 1);
    };
    const int64_t both = next_count < count ? next_count : count;
    for (int64_t i = 0; i < both; i += kPair) {
      next_top.add(block + count + i);
      add_pair(i);
    }
    for (int64_t i = both; i < count; i += kPair) add_pair(i);
    const double sum = correction_ * reduce_sum(powers[0] + powers[1]);
    sum_ += sum;
    if (kWeighted) weighted_ += correction_ * reduce_sum(weighted[0] + weighted[1]) - surplus_ * sum;
  }

  // Adds any number of columns, for the ends of a row.
  void add_few(const Type* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i < kLanes ? count - i : kLanes;
      const Vec v = only_first(get_partial<Dtype>(x + i, left), left);
      raise(reduce_max(v));
      const Vec t = (v - shift_) * rate_, power = exp2<kFast>(t);
      sum_ += reduce_sum(power);
      if (kWeighted) weighted_ += reduce_sum(finite(t) * power);
    }
  }

  void raise(float new_top) {
    if (!(new_top > top_)) return;
    // Each t falls by as much as the maximum rises. If the maximum was -inf, the sums are 0 or NaN and stay so.
    const double fall = ((double)top_ - new_top) * rate_, factor = ::exp2(fall);
    if (kWeighted && top_ > -INFINITY) weighted_ += fall * sum_;
    weighted_ *= factor;
    sum_ *= factor;
    top_ = shift_ = new_top;
    // rate * x + offset is rounded once; the rounding of offset adds the same to each t, and correction_ takes it out.
    offset_ = -top_ * rate_;
    surplus_ = kFused ? (double)top_ * rate_ + offset_ : 0.;
    correction_ = ::exp2(-surplus_);
  }

  const float scale_, rate_;
  float top_ = -INFINITY;
  // While all columns are -inf, any finite shift gives 2^t = 0 and avoids -inf - (-inf) = NaN.
  float shift_ = 0.f, offset_ = 0.f;
  double surplus_ = 0, correction_ = 1;
  // In float32, the tail of a large vocabulary would be rounded away next to a column near p = 1.
  double sum_ = 0, weighted_ = 0;
};

template <class Dtype, bool kWeighted>
RowStats row_stats(const typename Dtype::Type* logits, int64_t V, const Transform<false>& transform) {
  RunningSums<Dtype, kWeighted> sums(transform.scale);
  sums.add(logits, V);
  return sums.stats();
}

template <class Dtype, bool kWeighted>
RowStats row_stats(const typename Dtype::Type* logits, int64_t V, const Transform<true>& transform) {
  constexpr int64_t kBlock = kBlockBytes / sizeof(float);
  alignas(kCacheLine) float z[kBlock];
  RunningSums<Float32, kWeighted> sums(1.f);
  for (int64_t first = 0; first < V; first += kBlock) {
    const int64_t count = V - first < kBlock ? V - first : kBlock;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(z + i, transform(Dtype::get(logits + first + i)).z);
    if (i < count) store(z + i, transform(get_partial<Dtype>(logits + first + i, count - i)).z);
    sums.add(z, count);
  }
  return sums.stats();
}

template <class Dtype, bool kCapped, bool kWeighted>
void fwd_row(const TokenLogps& p, int64_t row) {
  const int64_t rows = p.N * p.T;
  const int64_t label = p.labels[row];
  float* const stats = p.stats + row;
  RowStats found{{0.f, 1.f}, 0.f};
  float target = 0.f;
  p.logps[row] = 0.f;
  if (label != p.ignore_index) {
    const Transform<kCapped> transform(p);
    const auto* logits = static_cast<const typename Dtype::Type*>(p.logits);
    logits += row / p.T * p.stride_n + row % p.T * p.stride_t;
    found = row_stats<Dtype, kWeighted>(logits, p.V, transform);
    const int64_t column = label - p.vocab_start;
    if (column >= 0 && column < p.V) target = transform(get_partial<Dtype>(logits + column, 1)).z[0];
    p.logps[row] = row_logp(found.sum, target);
  }
  stats[0] = found.sum.max;
  stats[rows] = found.sum.sum;
  stats[2 * rows] = target;
  if (kWeighted) stats[3 * rows] = found.weighted;
}

// d z of a row's columns from the upstream gradients of log-prob, lse and entropy, times the scale:
//   scale * (dlogp * onehot + p * (dlse - dlogp - dentropy * (z - max - mean))), mean = A / sum,
// where log p + entropy = z - max - mean. It is computed from t = (z - max) log2(e), p = 2^t / sum.
// dlse and dentropy are read with kStats only.
template <bool kFast, bool kStats>
class Gradient {
 public:
  Gradient(const TokenLogps& p, int64_t row) {
    const int64_t rows = p.N * p.T;
    sum_ = {quiet(p.stats[row]), quiet(p.stats[rows + row])};
    target_ = p.stats[2 * rows + row];
    dlogp_ = quiet(p.dlogps[row] * p.scale);
    if (kStats && p.dlse) dlse_ = quiet(p.dlse[row] * p.scale);
    if (kStats && p.dentropy) {
      dentropy_ = quiet(p.dentropy[row] * p.scale);
      mean_ = quiet(p.stats[3 * rows + row] / sum_.sum);
    }
    factor_ = (dlse_ - dlogp_) / sum_.sum;
    slant_ = -dentropy_ / sum_.sum * kLn2;
  }

  // For columns other than the label's.
  Vec operator()(Vec z) const {
    const Vec t = (z - sum_.max) * kLog2E;
    const Vec rate = kStats ? fma(splat(slant_), finite(t) - mean_ * kLog2E, splat(factor_)) : splat(factor_);
    return rate * exp2<kFast>(t);
  }

  float at_label() const {
    const float logp = row_logp(sum_, target_), dz = dlogp_ * one_minus_p(logp);
    return kStats ? dz + expf(logp) * (dlse_ - dentropy_ * (fmaxf(target_ - sum_.max, kNothing) - mean_)) : dz;
  }

 private:
  RowSum sum_;
  float target_, dlogp_, dlse_ = 0.f, dentropy_ = 0.f, mean_ = 0.f, factor_, slant_;
};

template <class Dtype, bool kCapped, bool kStats>
void bwd_row(const TokenLogps& p, int64_t row) {
  using Type = typename Dtype::Type;
  const int64_t n = row / p.T, t = row % p.T;
  const int64_t label = p.labels[row];
  Type* const dlogits = static_cast<Type*>(p.dlogits) + n * p.dstride_n + t * p.dstride_t;
  if (label == p.ignore_index) {
    memset(dlogits, 0, p.V * sizeof(Type));
    return;
  }
  const Type* const logits = static_cast<const Type*>(p.logits) + n * p.stride_n + t * p.stride_t;
  const Transform<kCapped> transform(p);
  const Gradient<sizeof(Type) == 2, kStats> dz(p, row);
  const auto gradient = [&](Vec x) {
    const auto value = transform(x);
    return dz(value.z) * value.slope;
  };

  // The label's column is computed first, because the gradient may overwrite the logits.
  const int64_t column = label - p.vocab_start;
  const bool here = column >= 0 && column < p.V;
  Vec at_label = splat(0.f);
  if (here) at_label = dz.at_label() * transform(get_partial<Dtype>(logits + column, 1)).slope;
  const auto visit_partial = [&](int64_t i, int64_t end) {
    for (; i < end; i += kLanes) {
      const int64_t left = end - i < kLanes ? end - i : kLanes;
      put_partial<Dtype>(dlogits + i, gradient(get_partial<Dtype>(logits + i, left)), left);
    }
  };
  const int64_t head = count_unaligned(dlogits, p.V);
  visit_partial(0, head);
  int64_t i = head;
  for (; i + kPair <= p.V; i += kPair) {
    const Pair x = Dtype::get_pair(logits + i);
    Dtype::put_pair(dlogits + i, {gradient(x.a), gradient(x.b)});
  }
  visit_partial(i, p.V);
  if (here) put_partial<Dtype>(dlogits + column, at_label, 1);
}

using Row = void (*)(const TokenLogps&, int64_t);

struct Forward {
  template <class Dtype, bool kCapped, bool kStats>
  static constexpr Row row = fwd_row<Dtype, kCapped, kStats>;
};

struct Backward {
  template <class Dtype, bool kCapped, bool kStats>
  static constexpr Row row = bwd_row<Dtype, kCapped, kStats>;
};

template <class Direction>
Row pick(DType dtype, bool capped, bool stats) {
  const auto of = [&](auto d) {
    using Dtype = decltype(d);
    static constexpr Row rows[2][2] = {
        {Direction::template row<Dtype, false, false>, Direction::template row<Dtype, false, true>},
        {Direction::template row<Dtype, true, false>, Direction::template row<Dtype, true, true>}};
    return rows[capped][stats];
  };
  return dtype == kFloat32 ? of(Float32{}) : dtype == kBFloat16 ? of(BFloat16{}) : of(Float16{});
}

void for_each_row(const TokenLogps& p, const Launch& launch, Row kernel) {
  // Less work than this is finished before another thread has woken up.
  [[maybe_unused]] constexpr int64_t kWorthwhile = 1 << 16;
  // Threads take the next rows when they are done, since ignored ones cost little. About a huge page of float32 at a
  // time: two threads at the same untouched page would both clear it (backward 7% slower). Eight turns each at least.
  constexpr int64_t kHugePage = 1 << 19;
  const int64_t rows = p.N * p.T;
  const int64_t fair = rows / (8 * launch.threads) + 1, page = kHugePage / p.V + 1;
  [[maybe_unused]] const int64_t chunk = fair < page ? fair : page;
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic, chunk) if (rows * p.V > kWorthwhile)
  for (int64_t row = 0; row < rows; ++row) kernel(p, row);
}

}  // namespace

namespace cpu {
namespace NCA_ISA {

void token_logps_fwd(const TokenLogps& p, const Launch& launch) {
  for_each_row(p, launch, pick<Forward>(p.dtype, p.softcap != 0.f, p.stat_rows == 4));
}

void token_logps_bwd(const TokenLogps& p, const Launch& launch) {
  for_each_row(p, launch, pick<Backward>(p.dtype, p.softcap != 0.f, p.dlse || p.dentropy));
}

}  // namespace NCA_ISA
}  // namespace cpu
}  // namespace nca
