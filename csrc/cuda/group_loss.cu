// The K-way losses. The responses of a prompt, and so its pairs, are spread over the lanes of a warp.
#include "launch.cuh"
#include "loss_math.h"

namespace nca {
namespace cuda {
namespace {

constexpr int kThreads = 512, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The lanes of a warp that share a prompt, a power of two of them.
struct WarpLanes {
  int lane, size;
  __device__ float sum(float own) const {
    for (int apart = size / 2; apart > 0; apart /= 2) own += __shfl_xor_sync(kAllLanes, own, apart);
    return own;
  }
  __device__ float max(float own) const {
    for (int apart = size / 2; apart > 0; apart /= 2) own = fmaxf(own, __shfl_xor_sync(kAllLanes, own, apart));
    return own;
  }
  __device__ void sync() const { __syncwarp(); }
};

// As many lanes as a prompt has responses, or a warp.
__host__ __device__ int lanes_of_prompt(std::int64_t K) {
  int lanes = 1;
  while (lanes < K && lanes < kWarp) lanes *= 2;
  return lanes;
}

// The sum of `own` over the threads of the block, on its first thread.
__device__ double block_sum(double own) {
  __shared__ double warps[kThreads / kWarp];
  for (int apart = kWarp / 2; apart > 0; apart /= 2) own += __shfl_xor_sync(kAllLanes, own, apart);
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = own;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (double warp : warps) sum += warp;
  }
  return sum;
}

__device__ void put_total(const GroupLoss& p, double sum) {
  if (threadIdx.x == 0) *p.loss = static_cast<float>(p.reduction == kMean ? sum / p.B : sum);
}

// The 1 tells ptxas that one block at a time runs on a multiprocessor: with room for three, it spilled.
__global__ void __launch_bounds__(kThreads, 1) group_loss_fwd_kernel(const __grid_constant__ GroupLoss p) {
  const int size = lanes_of_prompt(p.K), prompts = kThreads / size;
  const WarpLanes lanes{static_cast<int>(threadIdx.x) % size, size};
  double own = 0;
  for (std::int64_t start = std::int64_t(blockIdx.x) * prompts; start < p.B; start += std::int64_t(gridDim.x) * prompts) {
    const std::int64_t b = start + threadIdx.x / size;
    const float loss = group_loss_prompt(p, b, lanes);
    if (lanes.lane > 0 || b >= p.B) continue;
    own += loss;
    if (p.losses) p.losses[b] = loss;
  }
  if (!p.losses) put_total(p, block_sum(own));
}

__global__ void __launch_bounds__(kThreads, 1) sum_losses_kernel(const __grid_constant__ GroupLoss p) {
  double own = 0;
  for (std::int64_t b = threadIdx.x; b < p.B; b += kThreads) own += p.losses[b];
  put_total(p, block_sum(own));
}

}  // namespace

// Without `losses`, one block takes all prompts and adds them up in a fixed order, without a second launch.
void group_loss_fwd(const GroupLoss& p, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  const std::int64_t prompts = kThreads / lanes_of_prompt(p.K);
  const unsigned blocks = p.losses ? (p.B + prompts - 1) / prompts : 1, one = 1;
  group_loss_fwd_kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(launch.stream)>>>(p);
  if (p.losses && p.reduction != kNone) {
    sum_losses_kernel<<<one, kThreads, 0, reinterpret_cast<cudaStream_t>(launch.stream)>>>(p);
  }
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace nca
