// The CUDA runtime's stand-in: only what csrc/cuda uses, for code that emulator.h runs on the CPU.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define CUDART_VERSION 13000

using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Compiled with -ffp-contract=off, every product is rounded on its own.
inline float __fmul_rn(float a, float b) { return a * b; }

namespace emulated {

// ex2.approx.ftz.f32, whose result may be 2 ulp off; this one is rounded correctly.
inline float ex2_approx_ftz(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.f : y;
}

}  // namespace emulated

typedef struct Stream* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInsufficientDriver = 35 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "CUDA driver version is insufficient for CUDA runtime version";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Variables of the environment make another GPU and driver: EMULATED_CAPABILITY=75, EMULATED_DRIVER=12080.
inline int emulated_number(const char* variable, int otherwise) {
  const char* value = std::getenv(variable);
  return value ? std::atoi(value) : otherwise;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = emulated_number("EMULATED_CAPABILITY", 90);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulated_number("EMULATED_DRIVER", CUDART_VERSION);
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return std::getenv("EMULATED_OLD_DRIVER") ? cudaErrorInsufficientDriver : cudaSuccess;
}
