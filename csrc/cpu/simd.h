// Vectors of float32, and the instructions that the vector extensions of GCC and Clang do not offer.
// Each object that includes this is compiled for one instruction set. Everything here has internal linkage: the linker may
// merge an inline function, and AVX-512 code would end up in the object that runs on a machine without it.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
// GCC 12's own AVX-512 header trips this warning in whatever it is inlined into (GCC bug 105593).
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "nca.h"

namespace nca {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Int __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));
// Twice as many lanes, of 16-bit numbers.
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint16_t UShorts __attribute__((vector_size(4 * kLanes)));
constexpr int kPair = 2 * kLanes;

template <class V>
V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

Vec splat(float x) { return x - Vec{}; }  // x - 0 keeps -0 and NaN

// a > b ? a : b: the result is NaN if b is; a NaN in a may be dropped.
Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#elif defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a * b + c, rounded once if kFused.
Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// Adding 1.5 * 2^23 leaves no bits for a fraction.
constexpr float kRounder = 12582912.f;

// To the nearest integer, for |x| < 2^22.
Vec round(Vec x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (x + kRounder) - kRounder;
#endif
}

#if !defined(__AVX512F__)
// An integer n with x - 1 <= n <= x, for |x| < 2^22.
Vec floor(Vec x) {
#if defined(__AVX2__)
  return _mm256_floor_ps(x);
#elif defined(__aarch64__)
  return vrndmq_f32(x);
#else
  return round(x - 0.5f);
#endif
}
#endif

// a * 2^n for integers n in [-190, 63], denormal results included. With AVX-512 n may be any number; its floor counts.
Vec scale_pow2(Vec a, Vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(a, n);
#else
  // The low bits of n + kRounder + bias are the exponent; 64 is added to it, which keeps it above the denormals until the
  // product. It is a product and not a sum of exponents, because for a NaN n is arbitrary, and NaN times any number is NaN.
  const Vec pow2 = (Vec)((Bits)(n + (kRounder + 127 + 64)) << 23);
  return a * pow2 * 0x1p-64f;
#endif
}

// 16 bits to 32 and back. GCC 12 compiles its own builtin for this conversion into halves and shuffles.
Bits widen(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(load<__m256i>(from));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(load<__m128i>(from));
#else
  return __builtin_convertvector(load<Half>(from), Bits);
#endif
}

void narrow(uint16_t* to, Bits v) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  store(to, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  store(to, __builtin_convertvector(v, Half));
#endif
}

double reduce_sum(Vec v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// The largest lane; a NaN among the lanes may be dropped.
float reduce_max(Vec v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// The dtypes: memory to float32 and back, rounding to nearest even.
//
// `get` and `put` move kLanes neighbouring columns in order. `get_pair` and `put_pair` move kPair of them in another order, which
// depends on the dtype and is the same for both. `Top` finds the largest of the columns added, kPair at a time; it may return or
// drop a NaN.

struct Pair {
  Vec a, b;
};

struct Float32 {
  using Type = float;
  static Vec get(const Type* from) { return load<Vec>(from); }
  static void put(Type* to, Vec v) { store(to, v); }
  static Pair get_pair(const Type* from) { return {get(from), get(from + kLanes)}; }
  static void put_pair(Type* to, Pair v) {
    put(to, v.a);
    put(to + kLanes, v.b);
  }
  class Top {
   public:
    void add(const Type* from) {
      a_ = max(get(from), a_);
      b_ = max(get(from + kLanes), b_);
    }
    float value() const { return reduce_max(max(a_, b_)); }

   private:
    Vec a_ = splat(-INFINITY), b_ = a_;
  };
};

// The largest of 16-bit floats, found by comparing their bits as integers, with twice as many lanes in a vector. As signed
// integers, the bits of positive numbers grow with the number and are above those of all negative numbers, whose bits fall as the
// number grows. So the largest number has the largest signed or the smallest unsigned bits of its lane.
template <class Dtype>
class Top16 {
 public:
  void add(const uint16_t* from) {
    const Shorts bits = load<Shorts>(from);
    most_ = bits > most_ ? bits : most_;
    least_ = (UShorts)bits < least_ ? (UShorts)bits : least_;
  }
  float value() const {
    uint16_t lanes[2][kPair];
    store(lanes[0], most_);
    store(lanes[1], least_);
    const Pair most = Dtype::get_pair(lanes[0]), least = Dtype::get_pair(lanes[1]);
    return reduce_max(max(max(most.a, most.b), max(least.a, least.b)));
  }

 private:
  Shorts most_ = Shorts{} + (int16_t)INT16_MIN;
  UShorts least_ = UShorts{} + (uint16_t)UINT16_MAX;
};

// A NaN needs no test here if its low 16 bits are 0. This holds for a NaN that arithmetic makes and for one of bfloat16; quiet()
// makes it hold for any other.
struct BFloat16 {
  using Type = uint16_t;
  static Vec get(const Type* from) { return (Vec)(widen(from) << 16); }
  // The even columns and the odd ones; this takes half as many instructions as columns in order.
  static Pair get_pair(const Type* from) {
    const Bits bits = load<Bits>(from);
    return {(Vec)(bits << 16), (Vec)(bits & 0xffff0000)};
  }
  static Bits rounded(Vec v) { return (Bits)v + 0x7fff + (((Bits)v >> 16) & 1); }
  static void put(Type* to, Vec v) { narrow(to, rounded(v) >> 16); }
  static void put_pair(Type* to, Pair v) {
#if defined(__AVX512BF16__)
    // The instruction turns denormal numbers into 0.
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    const auto denormals = _mm512_testn_epi32_mask((__m512i)v.a, exponent) | _mm512_testn_epi32_mask((__m512i)v.b, exponent);
    if (__builtin_expect(denormals == 0, true)) {
      Shorts columns;
      for (int i = 0; i < kPair; ++i) columns[i] = (int16_t)(i / 2 + i % 2 * kLanes);
      store(to, _mm512_permutexvar_epi16((__m512i)columns, (__m512i)_mm512_cvtne2ps_pbh(v.b, v.a)));
      return;
    }
#endif
    store(to, (rounded(v.a) >> 16) | (rounded(v.b) & 0xffff0000));
  }
  using Top = Top16<BFloat16>;
};

float quiet(float x) { return x == x ? x : NAN; }

struct Float16 {
  using Type = uint16_t;
#if defined(__AVX512F__)
  static Vec get(const Type* from) { return _mm512_cvtph_ps(load<__m256i>(from)); }
  static void put(Type* to, Vec v) { store(to, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__AVX2__)
  static Vec get(const Type* from) { return _mm256_cvtph_ps(load<__m128i>(from)); }
  static void put(Type* to, Vec v) { store(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__aarch64__)
  static Vec get(const Type* from) { return vcvt_f32_f16(load<float16x4_t>(from)); }
  static void put(Type* to, Vec v) { store(to, vcvt_f16_f32(v)); }
#else
  // Shifted to the position of a float32's bits, those of a half are its value * 2^-112; the product corrects that, also for
  // denormals.
  static Vec get(const Type* from) {
    const Bits half = widen(from);
    const Bits magnitude = (half & 0x7fff) << 13;
    const Bits value = (Bits)((Vec)magnitude * 0x1p112f);
    const Bits inf_or_nan = magnitude | 0x7f800000;
    return (Vec)((magnitude >= 0x0f800000 ? inf_or_nan : value) | ((half & 0x8000) << 16));
  }
  // Adding 0.5, whose ulp is a half's smallest denormal, rounds a denormal to a multiple of it.
  static void put(Type* to, Vec v) {
    const Bits sign = ((Bits)v >> 16) & 0x8000;
    const Bits bits = (Bits)v & 0x7fffffff;
    const Bits denormal = (Bits)((Vec)bits + 0.5f) - 0x3f000000;
    const Bits normal = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
    const Bits finite = bits < 0x38800000 ? denormal : normal;
    const Bits overflow = bits > 0x7f800000 ? Bits{} + 0x7e00 : Bits{} + 0x7c00;
    narrow(to, (bits >= 0x47800000 ? overflow : finite) | sign);
  }
#endif
  static Pair get_pair(const Type* from) { return {get(from), get(from + kLanes)}; }
  static void put_pair(Type* to, Pair v) {
    put(to, v.a);
    put(to + kLanes, v.b);
  }
  using Top = Top16<Float16>;
};

// Only the first `count` <= kLanes lanes are accessed in memory; the others are 0.
template <class Dtype>
Vec get_partial(const typename Dtype::Type* from, int64_t count) {
  typename Dtype::Type lanes[kLanes] = {};
  memcpy(lanes, from, count * sizeof *lanes);
  return Dtype::get(lanes);
}

template <class Dtype>
void put_partial(typename Dtype::Type* to, Vec v, int64_t count) {
  typename Dtype::Type lanes[kLanes];
  Dtype::put(lanes, v);
  memcpy(to, lanes, count * sizeof *lanes);
}

}  // namespace
}  // namespace nca
