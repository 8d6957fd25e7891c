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

template <class Dtype, bool kCapped>
RowSum sum_row(const typename Dtype::Type* logits, int64_t V, const Transform<kCapped>& transform) {
  alignas(64) float z[kBlock];
  float top = -INFINITY;
  double sum = 0;  // in float32, a column near p = 1 would swallow the tail of a large vocabulary
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
      sum *= expf(top - new_top);
      top = new_top;
    }
    Vec block_sum = splat(0.f);
    for (int64_t i = 0; i < count; i += kLanes) {
      // The next block comes in from memory while this one keeps the arithmetic busy.
      __builtin_prefetch(block + kBlock + i);
      block_sum += exp(load<Vec>(z + i) - shift);
    }
    sum += reduce_sum(block_sum);
  }
  return {top, (float)sum};
}

template <class Dtype, bool kCapped>
void fwd_row(const TokenLogps& p, int64_t row) {
  const int64_t rows = p.N * p.T;
  const int64_t label = p.labels[row];
  float* const stats = p.stats + row;
  RowSum sum{0.f, 1.f};
  float target = 0.f;
  p.logps[row] = 0.f;
  if (label != p.ignore_index) {
    const Transform<kCapped> transform(p);
    const auto* logits = static_cast<const typename Dtype::Type*>(p.logits);
    logits += row / p.T * p.stride_n + row % p.T * p.stride_t;
    sum = sum_row<Dtype>(logits, p.V, transform);
    const int64_t column = label - p.vocab_start;
    if (column >= 0 && column < p.V) target = transform(get_some<Dtype>(logits + column, 1)).z[0];
    p.logps[row] = row_logp(sum, target);
  }
  stats[0] = sum.max;
  stats[rows] = sum.sum;
  stats[2 * rows] = target;
}

template <class Dtype, bool kCapped>
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
  const float dz = quiet(p.dlogps[row] * p.scale);
  const float factor = -dz / sum.sum;
  const auto gradient = [&](Vec x) {
    const auto value = transform(x);
    return factor * exp(value.z - sum.max) * value.slope;
  };

  // First what the label's column needs: the gradient may overwrite the logits.
  const int64_t column = label - p.vocab_start;
  const bool here = column >= 0 && column < p.V;
  Vec at_label = splat(0.f);
  if (here) {
    const float slope = transform(get_some<Dtype>(logits + column, 1)).slope[0];
    at_label = splat(dz * slope * one_minus_p(row_logp(sum, p.stats[2 * rows + row])));
  }
  const int64_t whole = p.V - p.V % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Dtype::put(dlogits + i, gradient(Dtype::get(logits + i)));
  if (whole < p.V) {
    put_some<Dtype>(dlogits + whole, gradient(get_some<Dtype>(logits + whole, p.V - whole)), p.V - whole);
  }
  if (here) put_some<Dtype>(dlogits + column, at_label, 1);
}

using Row = void (*)(const TokenLogps&, int64_t);

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
  static constexpr Row kernels[3][2] = {{fwd_row<Float32, false>, fwd_row<Float32, true>},
                                        {fwd_row<BFloat16, false>, fwd_row<BFloat16, true>},
                                        {fwd_row<Float16, false>, fwd_row<Float16, true>}};
  for_each_row(p, launch, kernels[p.dtype][p.softcap != 0.f]);
}

void token_logps_bwd(const TokenLogps& p, const Launch& launch) {
  static constexpr Row kernels[3][2] = {{bwd_row<Float32, false>, bwd_row<Float32, true>},
                                        {bwd_row<BFloat16, false>, bwd_row<BFloat16, true>},
                                        {bwd_row<Float16, false>, bwd_row<Float16, true>}};
  for_each_row(p, launch, kernels[p.dtype][p.softcap != 0.f]);
}

}  // namespace NCA_ISA
}  // namespace cpu
}  // namespace nca
