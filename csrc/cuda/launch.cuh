// For the host code of every kernel: the device and the error check.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace nca {
namespace cuda {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes `device` the current one while this object lives, and restores the caller's device afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&caller_));
    if (device == caller_) return;
    check(cudaSetDevice(device));
    moved_ = true;
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(caller_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int caller_ = 0;
  bool moved_ = false;
};

}  // namespace cuda
}  // namespace nca
