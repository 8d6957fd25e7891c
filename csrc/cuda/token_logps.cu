// Log-probs of labels from logits: one read of each scored row forward, one read and one write backward.
//
// A row belongs to one block (to one warp while it is short), so nothing is summed across blocks: no atomics, the same
// bits every time. Each thread has kInFlight loads of 16 bytes under way: 1536 threads on an SM make 96 KB, where an
// H100 needs about 20 KB in flight (3.35 TB/s over 132 SMs, 0.8 us of latency).
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
constexpr int kBlocksPerSM = 2;
constexpr int kShortRowsPerBlock = 8;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x) {
  return static_cast<T>(x);
}

// The hardware's 2^x, within 2 ulp. The maximum is subtracted before the product with log2(e), so it stays exact for
// logits of 1e4; results below 1e-38 are flushed to 0, which no float32 sum or gradient beside a maximum of 1 can tell.
__device__ float fast_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
}

// z of a logit and d z / d logit, the latter without its factor scale. Each product is rounded on its own: contracted
// with the later subtraction of the maximum, the sum's terms would not be those of the (rounded) maximum and target.
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

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T value[kWidth];
};

// A pack as it travels: whole words, taken apart when their turn comes. Apart they would fill twice the registers.
template <int kBytes>
using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 4, unsigned, unsigned short>>;

template <class To, class From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// A row's columns: whole 16-byte packs from the first boundary on, and single ones before and after them.
template <class T>
struct Columns {
  static constexpr int kWidth = 16 / sizeof(T);
  int V, head, packs;

  __device__ Columns(const T* row, int V) : Columns(row, row, V) {}

  // Two rows that meet a boundary at different columns have no packs in common.
  __device__ Columns(const T* row, const T* other, int V) : V(V) {
    const auto past = reinterpret_cast<std::uintptr_t>(row) % 16, other_past = reinterpret_cast<std::uintptr_t>(other) % 16;
    head = past == other_past ? min(V, static_cast<int>((16 - past) % 16 / sizeof(T))) : V;
    packs = (V - head) / kWidth;
  }

  template <int kPackWidth>
  __device__ int count() const {
    return kPackWidth == 1 ? V - packs * kWidth : packs;
  }
  template <int kPackWidth>
  __device__ int column(int i) const {
    if (kPackWidth == 1) return i < head ? i : i + packs * kWidth;
    return head + i * kWidth;
  }
};

// This thread's share of a row's packs of one width, loaded kInFlight at a time: visit(first column, pack).
template <int kWidth, class T, class Visit>
__device__ void visit_packs(const T* row, const Columns<T>& columns, const Visit& visit) {
  using Loaded = Word<kWidth * sizeof(T)>;
  const int count = columns.template count<kWidth>();
  const T* base = kWidth == 1 ? row : row + columns.head;
  for (int first = threadIdx.x; first < count; first += kInFlight * blockDim.x) {
    Loaded words[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = first + u * blockDim.x;
      if (i < count) words[u] = reinterpret_cast<const Loaded*>(base)[kWidth == 1 ? columns.template column<kWidth>(i): i];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int i = first + u * blockDim.x;
      if (i < count) visit(columns.template column<kWidth>(i), bits_as<Pack<T, kWidth>>(words[u]));
    }
  }
}

template <class T, class Visit>
__device__ void visit_row(const T* row, const Columns<T>& columns, const Visit& visit) {
  visit_packs<1>(row, columns, visit);
  visit_packs<Columns<T>::kWidth>(row, columns, visit);
}

template <int kWidth, class T>
__device__ void fill_packs(T* row, const Columns<T>& columns, T value) {
  Pack<T, kWidth> pack;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) pack.value[k] = value;
  for (int i = threadIdx.x; i < columns.template count<kWidth>(); i += blockDim.x) {
    *reinterpret_cast<Pack<T, kWidth>*>(row + columns.template column<kWidth>(i)) = pack;
  }
}

// One position of [N, T] and its label. Signed 64 bits: N * T * V passes 2^31.
struct Position {
  std::int64_t row, n, t, label;

  __device__ explicit Position(const TokenLogps& p)
      : row(blockIdx.x * static_cast<std::int64_t>(blockDim.y) + threadIdx.y) {
    if (outside(p)) return;
    n = row / p.T;
    t = row - n * p.T;
    label = p.labels[row];
  }
  __device__ bool outside(const TokenLogps& p) const { return row >= p.N * p.T; }
  __device__ bool ignored(const TokenLogps& p) const { return label == p.ignore_index; }
  __device__ bool illegal(const TokenLogps& p) const { return label < 0 || label >= p.vocab_total; }

  // The label's column in this slice of the vocabulary, -1 if another slice holds it.
  __device__ int column(const TokenLogps& p) const {
    const std::int64_t column = label - p.vocab_start;
    return column >= 0 && column < p.V ? static_cast<int>(column) : -1;
  }
};

// No column yet. Not -inf: z - max is then never NaN for a z of -inf, and needs no check.
__device__ RowSum empty_sum() { return {-FLT_MAX, 0.f}; }

__device__ RowSum warp_merge(RowSum own) {
  float max = own.max;
  for (int lanes = 16; lanes > 0; lanes /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, lanes));
  float sum = row_merge(own, {max, 0.f}).sum;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return {max, sum};
}

// Of all of the row's threads. The result is whole in the first warp.
__device__ RowSum row_threads_merge(RowSum own) {
  __shared__ RowSum warps[kMaxThreads / 32];
  own = warp_merge(own);
  if (blockDim.x == 32) return own;
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 32) return own;
  return warp_merge(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : empty_sum());
}

__device__ void put_row(const TokenLogps& p, std::int64_t row, float logp, RowSum sum, float target) {
  const std::int64_t rows = p.N * p.T;
  p.logps[row] = logp;
  p.stats[row] = sum.max;
  p.stats[rows + row] = sum.sum;
  p.stats[2 * rows + row] = target;
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM) token_logps_fwd_kernel(const __grid_constant__ TokenLogps p) {
  const Position at(p);
  if (at.outside(p)) return;
  if (at.ignored(p) || at.illegal(p)) {
    if (threadIdx.x > 0) return;
    if (at.ignored(p)) return put_row(p, at.row, 0.f, {0.f, 1.f}, 0.f);
    return put_row(p, at.row, NAN, {NAN, NAN}, NAN);
  }
  const T* row = static_cast<const T*>(p.logits) + at.n * p.stride_n + at.t * p.stride_t;
  float target = 0.f;
  if (threadIdx.x == 0 && at.column(p) >= 0) {
    target = transform<kSoftcap>(p, to_float(row[at.column(p)])).value;
  }

  RowSum own = empty_sum();
  visit_row(row, Columns<T>(row, static_cast<int>(p.V)), [&](int, const auto& pack) {
    constexpr int kWidth = sizeof(pack) / sizeof(T);
    float z[kWidth], max = own.max, sum = 0.f;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) max = fmaxf(max, z[k] = transform<kSoftcap>(p, to_float(pack.value[k])).value);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += fast_exp(z[k] - max);  // a NaN, which fmaxf drops, stays in the sum
    own = {max, own.sum * fast_exp(own.max - max) + sum};
  });
  RowSum whole = row_threads_merge(own);
  if (threadIdx.x > 0) return;
  if (whole.sum == 0.f) whole.max = -INFINITY;  // nothing but -inf
  put_row(p, at.row, row_logp(whole, target), whole, target);
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSM) token_logps_bwd_kernel(const __grid_constant__ TokenLogps p) {
  const Position at(p);
  if (at.outside(p)) return;
  T* out = static_cast<T*>(p.dlogits) + at.n * p.dstride_n + at.t * p.dstride_t;
  if (at.ignored(p) || at.illegal(p)) {
    const Columns<T> columns(out, static_cast<int>(p.V));
    const T value = from_float<T>(at.ignored(p) ? 0.f : NAN);
    fill_packs<1>(out, columns, value);
    fill_packs<Columns<T>::kWidth>(out, columns, value);
    return;
  }
  const T* row = static_cast<const T*>(p.logits) + at.n * p.stride_n + at.t * p.stride_t;
  const std::int64_t rows = p.N * p.T;
  const RowSum whole = {p.stats[at.row], p.stats[rows + at.row]};
  const float target = p.stats[2 * rows + at.row];
  const float upstream = p.dlogps[at.row] * p.scale;
  const float factor = -upstream / whole.sum;
  // p - 1 is formed before any rounding to T.
  const float at_label = upstream * one_minus_p(row_logp(whole, target));
  const int label = at.column(p);

  // Each thread writes only what it has read, so dlogits may be logits.
  visit_row(row, Columns<T>(row, out, static_cast<int>(p.V)), [&](int column, auto pack) {
    constexpr int kWidth = sizeof(pack) / sizeof(T);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Z z = transform<kSoftcap>(p, to_float(pack.value[k]));
      const float dz = column + k == label ? at_label : factor * fast_exp(z.value - whole.max);
      pack.value[k] = from_float<T>(dz * z.slope);
    }
    *reinterpret_cast<Word<sizeof(pack)>*>(out + column) = bits_as<Word<sizeof(pack)>>(pack);
  });
}

// About four batches of loads for each thread: fewer, and starting a row costs more than reading it; more, and the last
// rows of a launch leave the SMs waiting.
int row_threads(std::int64_t row_bytes) {
  int threads = 32;
  while (threads < kMaxThreads && threads * 16 * kInFlight * 4 < row_bytes) threads *= 2;
  return threads;
}

using Kernel = void (*)(TokenLogps);

struct Forward {
  template <class T, bool kSoftcap>
  static constexpr Kernel kernel = token_logps_fwd_kernel<T, kSoftcap>;
};

struct Backward {
  template <class T, bool kSoftcap>
  static constexpr Kernel kernel = token_logps_bwd_kernel<T, kSoftcap>;
};

template <class Direction, class T>
std::int64_t run(const TokenLogps& p, const Launch& launch) {
  const std::int64_t rows = p.N * p.T;
  if (rows == 0) return -1;
  const DeviceGuard guard(launch.device);
  const int threads = row_threads(p.V * static_cast<std::int64_t>(sizeof(T)));
  const dim3 block(threads, threads == 32 ? kShortRowsPerBlock : 1);
  // Only a grid's first dimension goes past 65,535: up to 2^31 - 1, more blocks than rows fit into any memory.
  const dim3 grid(static_cast<unsigned>((rows + block.y - 1) / block.y));
  const auto stream = reinterpret_cast<cudaStream_t>(launch.stream);
  const Kernel kernel = p.softcap > 0 ? Direction::template kernel<T, true> : Direction::template kernel<T, false>;
  kernel<<<grid, block, 0, stream>>>(p);
  check(cudaGetLastError());
  return -1;
}

template <class Direction>
std::int64_t run(const TokenLogps& p, const Launch& launch) {
  switch (p.dtype) {
    case kBFloat16: return run<Direction, __nv_bfloat16>(p, launch);
    case kFloat16: return run<Direction, __half>(p, launch);
    default: return run<Direction, float>(p, launch);
  }
}

}  // namespace

std::int64_t token_logps_fwd(const TokenLogps& p, const Launch& launch) { return run<Forward>(p, launch); }
std::int64_t token_logps_bwd(const TokenLogps& p, const Launch& launch) { return run<Backward>(p, launch); }

}  // namespace cuda
}  // namespace nca
