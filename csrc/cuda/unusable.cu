// The extension loads on any machine. On a GPU without code in it, or with too old a driver, every launch would fail.
#include <cuda_runtime.h>

#include <sstream>

#include "nca.h"


namespace nca {
namespace cuda {
namespace {

// nvcc's numbers, 100 * compute capability. setup.py defines NCA_CUDA_PTX.
constexpr int kMachineCode[] = {__CUDA_ARCH_LIST__};
constexpr int kPtx = NCA_CUDA_PTX;

// Machine code runs only on its own generation, from its own minor version on.
bool has_machine_code(int architecture) {
  for (const int built : kMachineCode) {
    if (built / 100 == architecture / 100 && built <= architecture) return true;
  }
  return false;
}

std::string decimal(int number, int unit) {
  return std::to_string(number / unit) + "." + std::to_string(number % unit / 10);
}

int attribute(cudaDeviceAttr which, int device, cudaError_t& status) {
  int value = 0;
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, which, device);
  return value;
}

}  // namespace

// Reads only properties of the device: a launch, or a kernel's attributes, would create a context on it.
std::string unusable(int device) {
  int devices = 0, driver = 0;
  cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && device < 0) status = cudaGetDevice(&device);
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device, status);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device, status);
  if (status == cudaSuccess) status = cudaDriverGetVersion(&driver);
  if (status != cudaSuccess) return cudaGetErrorString(status);

  const int architecture = 100 * major + 10 * minor;
  if (has_machine_code(architecture)) return "";
  std::ostringstream reason;
  reason << "the GPU has compute capability " << decimal(architecture, 100) << ", ";
  if (architecture < kPtx) {
    reason << "and this build serves " << instruction_set();
  } else if (driver < CUDART_VERSION) {  // the driver compiles PTX, but none that is newer than itself
    reason << "which this build serves by PTX alone; that takes a driver for CUDA " << decimal(CUDART_VERSION, 1000)
           << ", and this one is for " << decimal(driver, 1000);
  } else {
    return "";
  }
  return reason.str();
}

std::string instruction_set() {
  std::ostringstream list;
  for (const int built : kMachineCode) list << "sm_" << built / 10 << ", ";
  list << "and PTX for compute capability " << decimal(kPtx, 100) << " and later";
  return list.str();
}

}  // namespace cuda
}  // namespace nca
