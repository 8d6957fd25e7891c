// exp and tanh of a vector of float32. Both start from e^x = 2^n e^r, |r| <= log(2) / 2, for x <= 0.
#pragma once
#include "simd.h"

namespace nca {
namespace {

constexpr float kNothing = -120.f;  // e^-120 is 0 in float32

// -inf becomes a number whose exponential is 0 as well; the order of the operands lets a NaN through.
Vec finite(Vec x) { return max(splat(kNothing), x); }

struct Reduced {
  Vec n, r, p;  // e^r = 1 + r + r^2 p
};

Reduced reduce(Vec x) {
  x = finite(x);
  const Vec n = round(x * 1.44269504f);
  // x - n log(2). Fused, the product is exact and log(2)'s own rounding costs half an ulp at x = -20. Else in two parts
  // (Cody and Waite), the first with so few bits that n times it is exact.
  const Vec r = kFused ? fma(n, splat(-0.693147181f), x)
                       : fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  // Minimax in relative error over |r| <= log(2) / 2, by Remez' exchange with 1 + r fixed: 3.1e-9.
  Vec p = splat(1.38145406e-3f);
  p = fma(p, r, splat(8.36874545e-3f));
  p = fma(p, r, splat(4.16683890e-2f));
  p = fma(p, r, splat(1.66665211e-1f));
  p = fma(p, r, splat(4.99999940e-1f));
  return {n, r, p};
}

// For x <= 0.
Vec exp(Vec x) {
  const Reduced e = reduce(x);
  return scale_pow2(fma(fma(e.p, e.r, splat(1.f)), e.r, splat(1.f)), e.n);
}

struct Tanh {
  Vec value, slope;  // slope = 1 - tanh^2, from e^-2|x|: no cancellation where tanh is near 1
};

Tanh tanh(Vec x) {
  const Vec magnitude = (Vec)((Bits)x & 0x7fffffff);
  const Reduced e = reduce(-2.f * magnitude);
  const Vec pow2 = scale_pow2(splat(1.f), e.n);
  const Vec q = fma(e.p, e.r * e.r, e.r);       // e^r - 1
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
