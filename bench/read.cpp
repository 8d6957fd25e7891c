// The ceiling of a forward pass on the CPU: read so many bytes once, with the threads that the kernels get.
#include <cstdint>

extern "C" std::uint64_t read_all(const std::uint64_t* words, std::int64_t count, int threads) {
  std::uint64_t sum = 0;  // returned, or the compiler would drop the reads
#pragma omp parallel for simd reduction(+ : sum) num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < count; ++i) sum += words[i];
  return sum;
}
