// 2^x and tanh of a vector of float32.
#pragma once
#include "simd.h"

namespace nca {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kNothing = -175.f;  // 2^-175 is 0 in float32

// -inf becomes a finite number whose power of 2 is also 0; the order of the operands keeps a NaN.
Vec finite(Vec x) { return max(splat(kNothing), x); }

// 2^x for x < 63. 2^x = 2^n 2^r with an integer n and 0 <= r <= 1. 2^r is a polynomial, minimax in relative error with
// 2^0 = 1 fixed (Remez' exchange): 1e-8 with six terms; with kFast, five terms and 9e-8, for 16-bit inputs or outputs.
template <bool kFast>
Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // Both instructions take -inf, and the second takes the floor by itself.
  const Vec n = x, r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  x = finite(x);
  const Vec n = floor(x), r = x - n;
#endif
  Vec p;
  if (kFast) {
    p = splat(1.86713e-3f);
    p = fma(p, r, splat(9.01703071e-3f));
    p = fma(p, r, splat(5.57999127e-2f));
    p = fma(p, r, splat(2.40164444e-1f));
    p = fma(p, r, splat(6.93151295e-1f));
  } else {
    p = splat(2.16129148e-4f);
    p = fma(p, r, splat(1.24678470e-3f));
    p = fma(p, r, splat(9.67545155e-3f));
    p = fma(p, r, splat(5.54852821e-2f));
    p = fma(p, r, splat(2.40229309e-1f));
    p = fma(p, r, splat(6.93147063e-1f));
  }
  return scale_pow2(fma(p, r, splat(1.f)), n);
}

struct Tanh {
  Vec value, slope;  // slope = 1 - tanh^2, from e^-2|x|: no cancellation where tanh is near 1
};

Tanh tanh(Vec x) {
  const Vec magnitude = (Vec)((Bits)x & 0x7fffffff);
  // e^-2|x| = 2^n e^r, |r| <= log(2) / 2. 2^-173 is 0 in float32; the order of max's operands keeps a NaN.
  const Vec y = max(splat(-120.f), -2.f * magnitude);
  const Vec n = round(y * kLog2E);
  // y - n log(2). With a fused product, which is exact, the rounding of log(2) costs half an ulp at y = -20. Otherwise log(2) is
  // in two parts (Cody and Waite), the first with so few bits that n times it is exact.
  const Vec r = kFused ? fma(n, splat(-kLn2), y) : fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
  // (e^r - 1 - r) / r^2, minimax in e^r's relative error (Remez' exchange): 3.1e-9.
  Vec p = splat(1.38145406e-3f);
  p = fma(p, r, splat(8.36874545e-3f));
  p = fma(p, r, splat(4.16683890e-2f));
  p = fma(p, r, splat(1.66665211e-1f));
  p = fma(p, r, splat(4.99999940e-1f));
  const Vec pow2 = scale_pow2(splat(1.f), n);
  const Vec q = fma(p, r * r, r);               // e^r - 1
  const Vec exp_m1 = fma(pow2, q, pow2 - 1.f);  // exact near 0, where n = 0
  // tanh |x| = (1 - e) / (1 + e), e = e^-2|x|, and one Newton step against the roundings of 1 + e and the quotient.
  const Vec sum = 2.f + exp_m1;
  const Vec inverse = 1.f / sum;
  const Vec quotient = -exp_m1 * inverse;
  const Vec lost = exp_m1 - (sum - 2.f);
  const Vec rest = fma(-quotient, lost, fma(-quotient, sum, -exp_m1));
  const Vec value = fma(rest, inverse, quotient);
  const Vec slope = 4.f * fma(pow2, q, pow2) * inverse * inverse;
  return {(Vec)((Bits)value | ((Bits)x & 0x80000000)), slope};
}

}  // namespace
}  // namespace nca
