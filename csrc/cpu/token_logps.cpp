// The row kernels on the CPU. Compiled once per instruction set, NCA_ISA names the namespace of each; see dispatch.cpp.
#include "row_math.h"
#include "vector_math.h"

namespace nca {
namespace {

// Elements held in the first-level cache between the look for the maximum and the sum of exponentials.
constexpr int64_t kBlock = 2048;

// z and dz/dlogits / scale. Its first form is the identity in all but the scale.
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

Vec only_first(Vec v, int64_t count) {
  Int lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < (int32_t)count ? v : splat(-INFINITY);
}

struct RowStats {
  RowSum sum;
  float weighted;  // A = sum (z - max) exp(z - max); 0 unless asked for
};

template <class Dtype, bool kCapped, bool kWeighted>
RowStats row_stats(const typename Dtype::Type* logits, int64_t V, const Transform<kCapped>& transform) {
  alignas(64) float z[kBlock];
  float top = -INFINITY;
  // In float32, a column near p = 1 would swallow the tail of a large vocabulary.
  double sum = 0, weighted = 0;
  for (int64_t first = 0; first < V; first += kBlock) {
    const auto* block = logits + first;
    const int64_t count = V - first < kBlock ? V - first : kBlock;
    const int64_t whole = count - count % kLanes;
    Vec block_top = splat(-INFINITY);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec v = transform(Dtype::get(block + i)).z;
      block_top = max(v, block_top);
      store(z + i, v);
    }
    if (whole < count) {
      // The lanes past the end become -inf after the transform: a softcap would turn -inf into -softcap.
      const Vec v = only_first(transform(get_some<Dtype>(block + whole, count - whole)).z, count - whole);
      block_top = max(v, block_top);
      store(z + whole, v);
    }
    const float new_top = reduce_max(max(block_top, splat(top)));
    // With nothing but -inf so far, any finite shift gives exp = 0 and keeps -inf - (-inf) = NaN out.
    const Vec shift = splat(new_top == -INFINITY ? 0.f : new_top);
    if (new_top > top) {
      const float factor = expf(top - new_top);
      // Every z - max shrinks by as much as the maximum grows. From -inf there is nothing to shrink: 0 or NaN stays.
      if (kWeighted) weighted = factor * (weighted + (top == -INFINITY ? 0.f : top - new_top) * sum);
      sum *= factor;
      top = new_top;
    }
    Vec block_sum = splat(0.f), block_weighted = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
      // The next block comes in from memory while this one keeps the arithmetic busy.
      __builtin_prefetch(block + kBlock + i);
      const Vec gap = load<Vec>(z + i) - shift;
      const Vec power = exp(gap);
      block_sum += power;
      if (kWeighted) block_weighted = fma(finite(gap), power, block_weighted);
    }
    sum += reduce_sum(block_sum);
    if (kWeighted) weighted += reduce_sum(block_weighted);
  }
  return {{top, (float)sum}, (float)weighted};
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
    found = row_stats<Dtype, kCapped, kWeighted>(logits, p.V, transform);
    const int64_t column = label - p.vocab_start;
    if (column >= 0 && column < p.V) target = transform(get_some<Dtype>(logits + column, 1)).z[0];
    p.logps[row] = row_logp(found.sum, target);
  }
  stats[0] = found.sum.max;
  stats[rows] = found.sum.sum;
  stats[2 * rows] = target;
  if (kWeighted) stats[3 * rows] = found.weighted;
}

// kStats: of lse and entropy, too, not of the log-prob alone.
template <class Dtype, bool kCapped, bool kStats>
void bwd_row(const TokenLogps& p, int64_t row) {
  using Type = typename Dtype::Type;
  const int64_t rows = p.N * p.T;
  const int64_t n = row / p.T, t = row % p.T;
  const int64_t label = p.labels[row];
  Type* const dlogits = static_cast<Type*>(p.dlogits) + n * p.dstride_n + t * p.dstride_t;
  if (label == p.ignore_index) {
    memset(dlogits, 0, p.V * sizeof(Type));
    return;
  }
  const Type* const logits = static_cast<const Type*>(p.logits) + n * p.stride_n + t * p.stride_t;
  const Transform<kCapped> transform(p);
  const RowSum sum{quiet(p.stats[row]), quiet(p.stats[rows + row])};
  const float dlogp = quiet(p.dlogps[row] * p.scale);
  const float dlse = kStats && p.dlse ? quiet(p.dlse[row] * p.scale) : 0.f;
  const float dentropy = kStats && p.dentropy ? quiet(p.dentropy[row] * p.scale) : 0.f;
  const float mean = kStats && p.dentropy ? quiet(p.stats[3 * rows + row] / sum.sum) : 0.f;  // of z - max
  // dz = dlogp * onehot + p * (dlse - dlogp - dentropy * (z - max - mean)), where log p + entropy = z - max - mean.
  const float factor = (dlse - dlogp) / sum.sum, slant = -dentropy / sum.sum;
  const auto gradient = [&](Vec x) {
    const auto value = transform(x);
    const Vec gap = value.z - sum.max;
    const Vec rate = kStats ? fma(splat(slant), finite(gap) - mean, splat(factor)) : splat(factor);
    return rate * exp(gap) * value.slope;
  };

  // First what the label's column needs: the gradient may overwrite the logits.
  const int64_t column = label - p.vocab_start;
  const bool here = column >= 0 && column < p.V;
  Vec at_label = splat(0.f);
  if (here) {
    const float slope = transform(get_some<Dtype>(logits + column, 1)).slope[0];
    const float target = p.stats[2 * rows + row], logp = row_logp(sum, target);
    float dz = dlogp * one_minus_p(logp);
    if (kStats) dz += expf(logp) * (dlse - dentropy * (fmaxf(target - sum.max, kNothing) - mean));
    at_label = splat(dz * slope);
  }
  const int64_t whole = p.V - p.V % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Dtype::put(dlogits + i, gradient(Dtype::get(logits + i)));
  if (whole < p.V) {
    put_some<Dtype>(dlogits + whole, gradient(get_some<Dtype>(logits + whole, p.V - whole)), p.V - whole);
  }
  if (here) put_some<Dtype>(dlogits + column, at_label, 1);
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
  // Less work than this is done before another thread has woken up.
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
