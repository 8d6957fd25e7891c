// The extension loads on any machine, and beside a driver too old for its runtime every launch would fail.
#include <cuda_runtime.h>

#include "nca.h"

#define NCA_SPELLED(...) #__VA_ARGS__
#define NCA_TEXT(...) NCA_SPELLED(__VA_ARGS__)

namespace nca {
namespace cuda {

const char* unusable() {
  int devices;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* instruction_set() { return NCA_TEXT(__CUDA_ARCH_LIST__); }

}  // namespace cuda
}  // namespace nca
