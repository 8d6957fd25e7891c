#include <vector>

#include "loss_math.h"

namespace nca {
namespace cpu {

void group_loss_fwd(const GroupLoss& p, const Launch& launch) {
  const bool reduced = p.reduction != kNone;
  std::vector<float> kept(reduced ? p.B : 0);
  float* losses = reduced ? kept.data() : p.loss;
  // A prompt of four responses takes about 0.2 us, waking a thread several.
#pragma omp parallel for num_threads(launch.threads) schedule(static) if (p.B * p.K > 4096)
  for (std::int64_t b = 0; b < p.B; ++b) losses[b] = group_loss_prompt(p, b);
  if (!reduced) return;
  double sum = 0;
  for (float loss : kept) sum += loss;
  *p.loss = static_cast<float>(p.reduction == kMean ? sum / p.B : sum);
}

}  // namespace cpu
}  // namespace nca
