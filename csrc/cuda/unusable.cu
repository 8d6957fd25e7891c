// The extension loads on any machine, and beside a driver too old for its runtime every launch would fail.
#include <cuda_runtime.h>

#include "nca.h"

namespace nca {
namespace cuda {

const char* unusable() {
  int devices;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace cuda
}  // namespace nca
