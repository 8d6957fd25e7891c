// bfloat16: the upper half of a float32, rounded to nearest even.
#pragma once
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  std::uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    std::uint32_t word;
    std::memcpy(&word, &x, 4);
    bits = x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const std::uint32_t word = std::uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}
