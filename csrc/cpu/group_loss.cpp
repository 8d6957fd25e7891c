#include <vector>

#include "loss_math.h"

namespace nca {
namespace cpu {

void group_loss_fwd(const GroupLoss& p, const Launch& launch) {
  std::vector<float> kept(p.losses ? 0 : p.B);
  float* const losses = p.losses ? p.losses : kept.data();
  // A prompt of four responses takes about 0.2 us; waking a thread takes several.
#pragma omp parallel for num_threads(launch.threads) schedule(static) if (p.B * p.K > 4096)
  for (std::int64_t b = 0; b < p.B; ++b) losses[b] = group_loss_prompt(p, b, Alone());
  if (p.reduction == kNone) return;
  double sum = 0;
  for (std::int64_t b = 0; b < p.B; ++b) sum += losses[b];
  *p.loss = static_cast<float>(p.reduction == kMean ? sum / p.B : sum);
}

}  // namespace cpu
}  // namespace nca
