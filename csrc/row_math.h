// The statistics of one row of z, the same on every device. The functions are static: otherwise the linker could take the copy of
// an object compiled for a wider instruction set for all objects.
#pragma once
#include <math.h>

#ifdef __CUDACC__
#define NCA_HOST_DEVICE __host__ __device__
#else
#define NCA_HOST_DEVICE
#endif

namespace nca {

// max z and sum exp(z - max) over some of a row's columns. No column yet: (-inf, 0).
struct RowSum {
  float max, sum;
};

// Not target - lse: at max = 1e4 a float32 lse has an ulp of 1e-3.
NCA_HOST_DEVICE static inline float row_logp(RowSum row, float target) { return (target - row.max) - logf(row.sum); }

// 1 - p at the label, accurate where p is near 1.
NCA_HOST_DEVICE static inline float one_minus_p(float logp) { return -expm1f(logp); }

// Equal maxima are a case of their own: -inf - (-inf) is NaN, but columns of -inf add nothing. The sum keeps a NaN.
NCA_HOST_DEVICE static inline RowSum row_merge(RowSum a, RowSum b) {
  if (a.max == b.max) return {a.max, a.sum + b.sum};
  return a.max > b.max ? RowSum{a.max, a.sum + b.sum * expf(b.max - a.max)}
                       : RowSum{b.max, a.sum * expf(a.max - b.max) + b.sum};
}

}  // namespace nca
