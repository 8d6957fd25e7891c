// The K-way losses: one launch of one block, one thread a prompt.
#include "launch.cuh"
#include "loss_math.h"

namespace nca {
namespace cuda {
namespace {

constexpr int kThreads = 512;

__device__ double warp_sum(double own) {
  for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
  return own;
}

// One block even for thousands of prompts: a sum over several would take a second launch, or atomics and their order.
// The 1 tells ptxas that it is alone: making room for three blocks, it spilled.
__global__ void __launch_bounds__(kThreads, 1) group_loss_fwd_kernel(const __grid_constant__ GroupLoss p) {
  double own = 0;
  for (std::int64_t b = threadIdx.x; b < p.B; b += kThreads) {
    const float loss = group_loss_prompt(p, b);
    if (p.reduction == kNone) p.loss[b] = loss;
    own += loss;
  }
  if (p.reduction == kNone) return;
  __shared__ double warps[kThreads / 32];
  own = warp_sum(own);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const double sum = warp_sum(threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.);
  if (threadIdx.x == 0) *p.loss = static_cast<float>(p.reduction == kMean ? sum / p.B : sum);
}

}  // namespace

void group_loss_fwd(const GroupLoss& p, const Launch& launch) {
  const DeviceGuard guard(launch.device);
  group_loss_fwd_kernel<<<1, kThreads, 0, reinterpret_cast<cudaStream_t>(launch.stream)>>>(p);
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace nca
