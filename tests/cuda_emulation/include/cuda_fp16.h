// float16, rounded to nearest even. In integers: not every C++ compiler has the type.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  std::uint16_t bits;

  __half() = default;
  explicit __half(float x) {
    std::uint32_t word;
    std::memcpy(&word, &x, 4);
    const std::uint16_t sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    std::memcpy(&x, &word, 4);
    if (x != x) {
      bits = 0x7fff;
    } else if (x >= 65520.f) {
      bits = sign | 0x7c00;
    } else if (x < 0x1p-14f) {
      x += 0.5f;  // its last bit is then worth 2^-24, as that of float16's subnormals
      std::memcpy(&word, &x, 4);
      bits = sign | (word - 0x3f000000);
    } else {
      word += 0xfff + (word >> 13 & 1);
      bits = sign | ((word >> 13) - (112 << 10));  // the exponents' biases are 112 apart
    }
  }
};

inline float __half2float(__half x) {
  std::uint32_t word = std::uint32_t(x.bits & 0x7fff) << 13;
  float result;
  std::memcpy(&result, &word, 4);
  result *= 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) result = x.bits & 0x3ff ? NAN : INFINITY;
  return x.bits & 0x8000 ? -result : result;
}
