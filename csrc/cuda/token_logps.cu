// Log-probs of labels from logits: one read of each labelled row forward, one read and one write backward.
//
// A row belongs to one block (a short row to one warp), so nothing is summed across blocks: no atomics, the same bits every time.
// Each thread has kInFlight loads of 16 bytes in flight. The 1024 to 1536 threads that fit on an SM have 64 to 96 KB in flight, and
// an H100 needs about 20 KB (3.35 TB/s over 132 SMs at 0.8 us of latency). So blocks that start or end a row leave no gap.
//
// The parts for the entropy (the moment of a row, its gradient) depend on a template argument and are not compiled without it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstring>
#include <type_traits>

#include "launch.cuh"
#include "nca.h"
#include "row_math.h"

namespace nca {
namespace cuda {
namespace {

constexpr int kInFlight = 4;
constexpr int kMaxThreads = 512;
constexpr int kBlocksPerSM = 2;  // at kMaxThreads: caps the registers at 64
constexpr int kShortRowsPerBlock = 8;
// A gap z - max whose exponential is 0. Gaps are clamped to it before they are multiplied by their exponential: -inf * 0 is NaN.
constexpr float kGone = -128.f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// The hardware's 2^x, within 2 ulp. The maximum is subtracted before the product with log2(e), so logits of 1e4 lose nothing.
// Results below 1e-38 are flushed to 0, which changes no float32 sum that holds a 1.
__device__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

// z of a logit, and d z / d logit without the factor scale. Each product is rounded on its own: if it were contracted with the
// later subtraction of the maximum, the terms of the sum would not match the (rounded) maximum and target.
struct Z {
  float value, slope;
};

template <bool kSoftcap>
__device__ Z transform(const TokenLogps& p, float logit) {
  const float scaled = __fmul_rn(p.scale, logit);
  if (!kSoftcap) return {scaled, 1.f};
  const float tanh = tanhf(scaled * (1.f / p.softcap));
  return {__fmul_rn(p.softcap, tanh), (1.f - tanh) * (1.f + tanh)};
}

// Neighbouring columns, as values and as one word of memory. They stay a word until they are used: unpacked at the load, kInFlight
// packs of bf16 would take twice the registers.
template <class T, int kWidth>
struct Pack {
  static constexpr int kBytes = kWidth * sizeof(T);
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 4, unsigned, unsigned short>>;

  T value[kWidth];

  Pack() = default;
  __device__ explicit Pack(const Word& word) { memcpy(value, &word, kBytes); }
  __device__ void store(T* to) const {
    Word word;
    memcpy(&word, value, kBytes);
    *reinterpret_cast<Word*>(to) = word;
  }
};

// The columns of a row: whole 16-byte packs from the first boundary on, single columns before and after them.
template <class T>
struct Columns {
  static constexpr int kWidth = 16 / sizeof(T);
  int V, head, packs;

  // For two rows at once (in and out): if they reach the boundary at different columns, all columns are single ones.
  __device__ Columns(const T* row, const T* other, int V) : V(V) {
    const int past = reinterpret_cast<std::uintptr_t>(row) % 16;
    const int other_past = reinterpret_cast<std::uintptr_t>(other) % 16;
    head = past == other_past ? min(V, static_cast<int>((16 - past) % 16 / sizeof(T))) : V;
    packs = (V - head) / kWidth;
  }

  template <int kPackWidth>
  __device__ int count() const {
    return kPackWidth == 1 ? V - packs * kWidth : packs;
  }
  // The first column of the i-th pack.
  template <int kPackWidth>
  __device__ int column(int i) const {
    if (kPackWidth == 1) return i < head ? i : i + packs * kWidth;
    return head + i * kWidth;
  }
};

// Calls visit(first column, pack) for this thread's packs of one width, loaded kInFlight at a time.
template <int kWidth, class T, class Visit>
__device__ void visit_packs(const T* row, const Columns<T>& columns, const Visit& visit) {
  using Word = typename Pack<T, kWidth>::Word;
  // Indexed by the pack where possible: indexed by the column, the addresses would cost the loop ten more registers.
  const Word* at = reinterpret_cast<const Word*>(kWidth == 1 ? row : row + columns.head);
  const int count = columns.template count<kWidth>();
  for (int first = threadIdx.x; first < count; first += kInFlight * blockDim.x) {
    Word words[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = first + u * blockDim.x;
      if (i < count) words[u] = at[kWidth == 1 ? columns.template column<1>(i) : i];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = first + u * blockDim.x;
      if (i < count) visit(columns.template column<kWidth>(i), Pack<T, kWidth>(words[u]));
    }
  }
}

template <class T, class Visit>
__device__ void visit_row(const T* row, const Columns<T>& columns, const Visit& visit) {
  visit_packs<1>(row, columns, visit);
  visit_packs<Columns<T>::kWidth>(row, columns, visit);
}

template <int kWidth, class T>
__device__ void fill_packs(T* row, const Columns<T>& columns, float value) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) pack.value[k] = T(value);
  const int count = columns.template count<kWidth>();
  for (int i = threadIdx.x; i < count; i += blockDim.x) pack.store(row + columns.template column<kWidth>(i));
}

// One position of [N, T] and its label.
struct Position {
  std::int64_t index, n, t, label;

  __device__ Position(const TokenLogps& p, std::int64_t index)
      : index(index), n(index / p.T), t(index - n * p.T), label(p.labels[index]) {}

  __device__ bool ignored(const TokenLogps& p) const { return label == p.ignore_index; }
  __device__ bool illegal(const TokenLogps& p) const { return label < 0 || label >= p.vocab_total; }

  // The label's column in this slice of the vocabulary, -1 if another slice holds it.
  __device__ int column(const TokenLogps& p) const {
    const std::int64_t column = label - p.vocab_start;
    return column >= 0 && column < p.V ? static_cast<int>(column) : -1;
  }
};

__device__ std::int64_t position_index() {
  return blockIdx.x * static_cast<std::int64_t>(blockDim.y) + threadIdx.y;
}

// max z, sum exp(z - max) and, with kMoment, sum (z - max) exp(z - max) over some of a row's columns.
struct RowStats {
  float max, sum, moment;
};

// No column yet. The maximum is not -inf, so that z - max is never NaN for a z of -inf and the loop needs no check.
__device__ RowStats empty_stats() { return {-FLT_MAX, 0.f, 0.f}; }

// The moment with the gaps to a maximum that is higher by -drop, still with the exponentials of the old one.
__device__ float moved_moment(RowStats row, float drop) { return row.moment + fmaxf(drop, kGone) * row.sum; }

template <bool kMoment>
__device__ RowStats warp_merge(RowStats own) {
  float max = own.max;
  for (int lanes = 16; lanes > 0; lanes /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, lanes));
  RowStats all = {max, row_merge({own.max, own.sum}, {max, 0.f}).sum, 0.f};
  for (int lanes = 16; lanes > 0; lanes /= 2) all.sum += __shfl_xor_sync(0xffffffffu, all.sum, lanes);
  if (!kMoment) return all;
  const float drop = own.max - max;
  all.moment = moved_moment(own, drop) * expf(fmaxf(drop, kGone));
  for (int lanes = 16; lanes > 0; lanes /= 2) all.moment += __shfl_xor_sync(0xffffffffu, all.moment, lanes);
  return all;
}

// Merges over all threads of the row; its first warp gets the result.
template <bool kMoment>
__device__ RowStats row_threads_merge(RowStats own) {
  __shared__ RowStats warps[kMaxThreads / 32];
  own = warp_merge<kMoment>(own);
  if (blockDim.x == 32) return own;
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 32) return own;
  return warp_merge<kMoment>(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : empty_stats());
}

template <bool kMoment>
__device__ void put(const TokenLogps& p, std::int64_t index, float logp, RowStats row, float target) {
  const std::int64_t rows = p.N * p.T;
  p.logps[index] = logp;
  p.stats[index] = row.max;
  p.stats[rows + index] = row.sum;
  p.stats[2 * rows + index] = target;
  if (kMoment) p.stats[3 * rows + index] = row.moment;
}

template <class T, bool kSoftcap, bool kMoment>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    token_logps_fwd_kernel(const __grid_constant__ TokenLogps p) {
  const std::int64_t index = position_index();
  if (index >= p.N * p.T) return;
  const Position at(p, index);
  if (at.ignored(p)) {
    if (threadIdx.x == 0) put<kMoment>(p, index, 0.f, {0.f, 1.f, 0.f}, 0.f);
    return;
  }
  if (at.illegal(p)) {
    if (threadIdx.x == 0) put<kMoment>(p, index, NAN, {NAN, NAN, NAN}, NAN);
    return;
  }
  const T* row = static_cast<const T*>(p.logits) + at.n * p.stride_n + at.t * p.stride_t;
  const int label = at.column(p);
  // Used only after the loop: before it, the row would wait for its label, then for this load, then for its first packs.
  const bool holds_label = threadIdx.x == 0 && label >= 0;
  const T at_label = holds_label ? row[label] : T(0.f);

  RowStats own = empty_stats();
  visit_row(row, Columns<T>(row, row, static_cast<int>(p.V)), [&](int, const auto& pack) {
    constexpr int kWidth = sizeof(pack) / sizeof(T);
    float z[kWidth], max = own.max, sum = 0.f, moment = 0.f;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      z[k] = transform<kSoftcap>(p, to_float(pack.value[k])).value;
      max = fmaxf(max, z[k]);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float gap = z[k] - max, odds = fast_exp(gap);  // a NaN, which fmaxf drops, stays in the sums
      sum += odds;
      if (kMoment) moment += odds * fmaxf(gap, kGone);
    }
    const float drop = own.max - max, kept = fast_exp(drop);
    if (kMoment) own.moment = moved_moment(own, drop) * kept + moment;
    own.sum = own.sum * kept + sum;
    own.max = max;
  });
  RowStats whole = row_threads_merge<kMoment>(own);
  if (threadIdx.x > 0) return;
  if (whole.sum == 0.f) whole.max = -INFINITY;  // all columns are -inf
  const float target = holds_label ? transform<kSoftcap>(p, to_float(at_label)).value : 0.f;
  put<kMoment>(p, index, row_logp({whole.max, whole.sum}, target), whole, target);
}

// dz of a column is p (per_p + per_gap (z - max)), with the factor scale / sum here; at the label it is `at_label`.
template <bool kEntropy>
struct RowGradient {
  float max, at_label, per_p, per_gap = 0.f;

  // dlogp (onehot - p) + dlse p - dentropy p (log p + H), where log p + H = gap - moment / sum.
  __device__ RowGradient(const TokenLogps& p, std::int64_t index) {
    const std::int64_t rows = p.N * p.T;
    max = p.stats[index];
    const float sum = p.stats[rows + index], target = p.stats[2 * rows + index], dlogp = p.dlogps[index];
    at_label = dlogp * one_minus_p(row_logp({max, sum}, target));
    per_p = p.dlse ? p.dlse[index] : 0.f;
    if (kEntropy) {
      per_gap = -p.dentropy[index];
      per_p -= per_gap * (p.stats[3 * rows + index] / sum);
    }
    if (kEntropy || p.dlse) {
      const float gap = fmaxf(target - max, kGone);
      at_label += expf(gap) / sum * (per_p + per_gap * gap);
    }
    at_label *= p.scale;
    per_p = (per_p - dlogp) * p.scale / sum;
    per_gap *= p.scale / sum;
  }

  __device__ float operator()(float z) const {
    const float gap = z - max;
    return fast_exp(gap) * (kEntropy ? per_p + per_gap * fmaxf(gap, kGone) : per_p);
  }
};

template <class T, bool kSoftcap, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM)
    token_logps_bwd_kernel(const __grid_constant__ TokenLogps p) {
  const std::int64_t index = position_index();
  if (index >= p.N * p.T) return;
  const Position at(p, index);
  T* out = static_cast<T*>(p.dlogits) + at.n * p.dstride_n + at.t * p.dstride_t;
  if (at.ignored(p) || at.illegal(p)) {
    const Columns<T> columns(out, out, static_cast<int>(p.V));
    const float value = at.ignored(p) ? 0.f : NAN;
    fill_packs<1>(out, columns, value);
    fill_packs<Columns<T>::kWidth>(out, columns, value);
    return;
  }
  const T* row = static_cast<const T*>(p.logits) + at.n * p.stride_n + at.t * p.stride_t;
  const int label = at.column(p);
  const RowGradient<kEntropy> gradient(p, index);

  // Each thread writes only the columns that it has read, so dlogits may be logits.
  visit_row(row, Columns<T>(row, out, static_cast<int>(p.V)), [&](int column, auto pack) {
    constexpr int kWidth = sizeof(pack) / sizeof(T);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Z z = transform<kSoftcap>(p, to_float(pack.value[k]));
      const float dz = column + k == label ? gradient.at_label : gradient(z.value);
      pack.value[k] = T(dz * z.slope);
    }
    pack.store(out + column);
  });
}

// About four rounds of loads for each thread. With fewer, starting a row costs more than reading it; with more, the other SMs wait
// for the last rows of a launch.
int row_threads(std::int64_t row_bytes) {
  int threads = 32;
  while (threads < kMaxThreads && threads * 16 * kInFlight * 4 < row_bytes) threads *= 2;
  return threads;
}

struct Forward {
  template <class T, bool kSoftcap, bool kEntropy>
  static constexpr auto kernel = token_logps_fwd_kernel<T, kSoftcap, kEntropy>;
  static bool entropy(const TokenLogps& p) { return p.stat_rows == 4; }
};

struct Backward {
  template <class T, bool kSoftcap, bool kEntropy>
  static constexpr auto kernel = token_logps_bwd_kernel<T, kSoftcap, kEntropy>;
  static bool entropy(const TokenLogps& p) { return p.dentropy != nullptr; }
};

template <class Direction, class T, bool kSoftcap>
auto kernel_of(const TokenLogps& p) {
  return Direction::entropy(p) ? Direction::template kernel<T, kSoftcap, true>
                               : Direction::template kernel<T, kSoftcap, false>;
}

template <class Direction, class T>
void run(const TokenLogps& p, const Launch& launch) {
  const std::int64_t rows = p.N * p.T;
  if (rows == 0) return;
  const DeviceGuard guard(launch.device);
  const int threads = row_threads(p.V * static_cast<std::int64_t>(sizeof(T)));
  const dim3 block(threads, threads == 32 ? kShortRowsPerBlock : 1);
  // The grid's first dimension takes 2^31 - 1 blocks, more than any memory holds; the others only 65,535.
  const dim3 grid(static_cast<unsigned>((rows + block.y - 1) / block.y));
  const auto kernel = p.softcap > 0 ? kernel_of<Direction, T, true>(p) : kernel_of<Direction, T, false>(p);
  kernel<<<grid, block, 0, reinterpret_cast<cudaStream_t>(launch.stream)>>>(p);
  check(cudaGetLastError());
}

template <class Direction>
std::int64_t run(const TokenLogps& p, const Launch& launch) {
  switch (p.dtype) {
    case kFloat32: run<Direction, float>(p, launch); break;
    case kBFloat16: run<Direction, __nv_bfloat16>(p, launch); break;
    case kFloat16: run<Direction, __half>(p, launch); break;
  }
  return -1;
}

}  // namespace

std::int64_t token_logps_fwd(const TokenLogps& p, const Launch& launch) { return run<Forward>(p, launch); }
std::int64_t token_logps_bwd(const TokenLogps& p, const Launch& launch) { return run<Backward>(p, launch); }

}  // namespace cuda
}  // namespace nca
