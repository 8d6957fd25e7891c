// Runs a kernel on the CPU: block after block, each thread of a block a fiber with a stack of its own, which runs until it
// waits for its warp (a shuffle) or its block (__syncthreads).
//
// Emulated: block and thread indices, block-shared memory, shuffles and barriers. A wait that not all of the warp or block
// come to is an error. Every other block runs its threads from last to first, so that a missing barrier shows.
// Not emulated: blocks at the same time, several launches at once, streams and other devices, the limits of registers and
// shared memory, the memory model, the rounding of the special function unit; nvcc contracts to fused multiply-adds where
// the stand-in does not.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
// How many blocks have run in all. The tests read it from the extension, whose other names are hidden.
extern "C" {
__attribute__((visibility("default"))) inline std::uint64_t emulated_blocks = 0;
}

namespace emulated {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kStackBytes = 64 << 10;

enum State { kReady, kAtShuffle, kAtBarrier, kExited };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  dim3 index;
  State state;
  // Of a shuffle: what this lane gives, whose it takes, and what that is.
  std::uint64_t given, taken;
  unsigned lanes_apart;
};
inline std::vector<Fiber> fibers;
inline Fiber* running;
inline ucontext_t scheduler;
inline std::function<void()> thread_body;

inline void wait(State state) {
  Fiber& self = *running;
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

inline void thread_entry() {
  thread_body();
  wait(kExited);
}

inline bool all(State state, unsigned first, unsigned count) {
  if (first + count > fibers.size()) return false;
  for (unsigned i = first; i < first + count; ++i) {
    if (fibers[i].state != state) return false;
  }
  return true;
}

inline void set_ready(unsigned first, unsigned count) {
  for (unsigned i = first; i < first + count; ++i) fibers[i].state = kReady;
}

inline void run_ready(bool backwards) {
  const unsigned count = fibers.size();
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[backwards ? count - 1 - i : i];
    if (fiber.state != kReady) continue;
    running = &fiber;
    threadIdx = fiber.index;
    swapcontext(&scheduler, &fiber.context);
  }
}

// Whether anybody who waited may go on.
inline bool release() {
  const unsigned count = fibers.size();
  bool released = false;
  for (unsigned warp = 0; warp < count; warp += kWarp) {
    if (!all(kAtShuffle, warp, kWarp)) continue;
    for (unsigned i = warp; i < warp + kWarp; ++i) fibers[i].taken = fibers[i ^ fibers[i].lanes_apart].given;
    set_ready(warp, kWarp);
    released = true;
  }
  if (all(kAtBarrier, 0, count)) {
    set_ready(0, count);
    released = true;
  }
  return released;
}

inline void run_block() {
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    fiber.state = kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_entry, 0);
  }
  do {
    run_ready(blockIdx.x % 2 == 1);
  } while (release());
  if (!all(kExited, 0, fibers.size())) {
    throw std::logic_error("emulated CUDA: some threads wait where others of their warp or block never come");
  }
}

template <class Kernel, class Argument>
void launch(dim3 grid, dim3 block, Kernel kernel, const Argument& argument) {
  const unsigned threads = block.x * block.y;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || threads == 0 || threads > kMaxThreads || block.z != 1) {
    throw std::logic_error("emulated CUDA: a launch that is illegal, or of dimensions that are not emulated");
  }
  blockDim = block;
  gridDim = grid;
  thread_body = [&] { kernel(argument); };
  fibers.resize(threads);
  for (blockIdx = dim3(0); blockIdx.x < grid.x; ++blockIdx.x) run_block();
  emulated_blocks += grid.x;
}

}  // namespace emulated

// The shuffle of a warp that exchanges nothing.
inline void __syncwarp() {
  emulated::running->lanes_apart = 0;
  emulated::wait(emulated::kAtShuffle);
}

inline void __syncthreads() { emulated::wait(emulated::kAtBarrier); }

// The mask must be that of the whole warp.
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes_apart) {
  emulated::Fiber& self = *emulated::running;
  self.lanes_apart = lanes_apart;
  std::memcpy(&self.given, &value, sizeof(T));
  emulated::wait(emulated::kAtShuffle);
  std::memcpy(&value, &self.taken, sizeof(T));
  return value;
}
