// The K-way losses of one prompt: value, implicit rewards and derivative. Once for the CPU's loop and the GPU's thread.
//
// With l = logp - ref_logp, r = beta * l, s = score and w = softmax(s / alpha) over the prompt's K valid responses:
//   info_nca  - sum_i w_i log softmax(r)_i                              d/dr_i = softmax(r)_i - w_i
//   nca       - sum_i [w_i log sigmoid(r_i) + log sigmoid(-r_i) / K]    d/dr_i = sigmoid(r_i) / K - w_i sigmoid(-r_i)
//   dpo       mean over pairs of -log sigmoid(r_i - r_j)
//   ipo       mean over pairs of (l_i / n_i - l_j / n_j - 1 / (2 beta))^2, n = length
//   kto       mean of 1 - sigmoid(+-beta (l - z)), + for the desirable, z >= 0 a detached baseline
// Any K: everything is recomputed from the inputs, which sit in the nearest cache, so there is no scratch memory.
#pragma once
#include "nca.h"
#include "row_math.h"

namespace nca {

// sigmoid(x), sigmoid(-x), log(1 + exp(x)) = -log sigmoid(-x) and log(1 + exp(-x)), all from one exponential that never
// overflows and without a cancellation.
struct Logistic {
  float sigmoid, sigmoid_minus, softplus, softplus_minus;
  NCA_HOST_DEVICE explicit Logistic(float x) {
    const float e = expf(-fabsf(x)), large = 1.f / (1.f + e), small = e / (1.f + e), rest = log1pf(e);
    sigmoid = x >= 0 ? large : small;
    sigmoid_minus = x >= 0 ? small : large;
    softplus = (x > 0 ? x : 0.f) + rest;
    softplus_minus = (x < 0 ? -x : 0.f) + rest;
  }
};

// One prompt's rows of the inputs; the masked responses are never looked at, whatever they hold.
struct Prompt {
  const GroupLoss& p;
  std::int64_t first;
  std::int64_t valid = 0;      // number of valid responses
  float best = -INFINITY;      // best score

  NCA_HOST_DEVICE Prompt(const GroupLoss& loss, std::int64_t b) : p(loss), first(b * loss.K) {
    for (std::int64_t i = 0; i < p.K; ++i) {
      if (!is_valid(i)) continue;
      const float s = score(i);
      ++valid;
      best = s > best || s != s ? s : best;  // a NaN stays
    }
  }

  NCA_HOST_DEVICE bool is_valid(std::int64_t i) const { return !p.mask || p.mask[first + i]; }
  NCA_HOST_DEVICE float score(std::int64_t i) const { return p.scores[first + i]; }
  NCA_HOST_DEVICE float log_ratio(std::int64_t i) const { return p.logps[first + i] - p.ref_logps[first + i]; }
  NCA_HOST_DEVICE float reward(std::int64_t i) const { return p.beta * log_ratio(i); }

  // The best themselves are 1 without the division: right for alpha = 0 and for an infinite best score.
  NCA_HOST_DEVICE float score_exp(std::int64_t i) const {
    const float s = score(i);
    if (s == best) return 1.f;
    return p.alpha > 0 || s != s ? expf((s - best) / p.alpha) : 0.f;
  }
  NCA_HOST_DEVICE float score_exp_sum() const {
    float sum = 0;
    for (std::int64_t i = 0; i < p.K; ++i) sum += is_valid(i) ? score_exp(i) : 0.f;
    return sum;
  }

  NCA_HOST_DEVICE bool is_pair(std::int64_t i, std::int64_t j) const {
    return is_valid(j) && score(i) > score(j) && (p.pairs == kAll || score(i) == best);
  }

  // What a pair compares (r, or l / n for IPO) and its derivative by logp.
  NCA_HOST_DEVICE float length(std::int64_t i) const {
    const float n = p.lengths ? p.lengths[first + i] : 1.f;
    return n < 1.f ? 1.f : n;  // not fmaxf, which would hide NaN
  }
  NCA_HOST_DEVICE float margin(std::int64_t i) const { return p.name == kIPO ? log_ratio(i) / length(i) : reward(i); }
  NCA_HOST_DEVICE float dmargin(std::int64_t i) const { return p.name == kIPO ? 1.f / length(i) : p.beta; }

  NCA_HOST_DEVICE bool is_desirable(std::int64_t i) const {
    return p.desirable ? p.desirable[first + i] : score(i) == best;
  }

  NCA_HOST_DEVICE void put(std::int64_t i, float dloss_dlogp) const {
    p.dlogps[first + i] = p.reduction == kMean ? dloss_dlogp / p.B : dloss_dlogp;
  }
};

// Each returns the prompt's loss, and puts d loss / d logp of every valid response.

NCA_HOST_DEVICE static inline float info_nca(const Prompt& q) {
  float top = -INFINITY, sum = 0, loss = 0;
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (q.is_valid(i)) top = fmaxf(top, q.reward(i));
  }
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (q.is_valid(i)) sum += expf(q.reward(i) - top);
  }
  const float log_sum = logf(sum), score_sum = q.score_exp_sum();
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (!q.is_valid(i)) continue;
    const float r = q.reward(i) - top, w = q.score_exp(i) / score_sum;
    loss += w * (log_sum - r);
    q.put(i, q.p.beta * (expf(r) / sum - w));
  }
  return loss;
}

NCA_HOST_DEVICE static inline float nca_loss(const Prompt& q) {
  const float score_sum = q.score_exp_sum();
  float loss = 0;
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (!q.is_valid(i)) continue;
    const Logistic at(q.reward(i));
    const float w = q.score_exp(i) / score_sum;
    loss += w * at.softplus_minus + at.softplus / q.valid;
    q.put(i, q.p.beta * (at.sigmoid / q.valid - w * at.sigmoid_minus));
  }
  return loss;
}

struct PairTerm {
  float loss, slope;
};

NCA_HOST_DEVICE static inline PairTerm pair_term(const GroupLoss& p, float margin) {
  if (p.name == kDPO) {
    const Logistic at(margin);
    return {at.softplus_minus, -at.sigmoid_minus};
  }
  const float miss = margin - 0.5f / p.beta;
  return {miss * miss, 2.f * miss};
}

// Each response gathers its own derivative, as the better and as the worse one of its pairs.
NCA_HOST_DEVICE static inline float pair_loss(const Prompt& q) {
  std::int64_t pairs = 0;
  double loss = 0;  // K^2 terms: in float32 their sum was 10 ulp off at K = 67
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (!q.is_valid(i)) continue;
    double slope = 0;
    for (std::int64_t j = 0; j < q.p.K; ++j) {
      if (!q.is_valid(j)) continue;
      if (q.is_pair(i, j)) {
        const PairTerm term = pair_term(q.p, q.margin(i) - q.margin(j));
        loss += term.loss;
        slope += term.slope;
        ++pairs;
      } else if (q.is_pair(j, i)) {
        slope -= pair_term(q.p, q.margin(j) - q.margin(i)).slope;
      }
    }
    q.put(i, q.dmargin(i) * slope);
  }
  const float n = pairs ? pairs : 1;
  for (std::int64_t i = 0; i < q.p.K; ++i) q.p.dlogps[q.first + i] /= n;
  return loss / n;
}

NCA_HOST_DEVICE static inline float kto(const Prompt& q) {
  const float baseline = q.p.baseline ? *q.p.baseline : 0.f;
  const float z = baseline <= 0 ? 0.f : baseline;
  float loss = 0;
  for (std::int64_t i = 0; i < q.p.K; ++i) {
    if (!q.is_valid(i)) continue;
    const float sign = q.is_desirable(i) ? 1.f : -1.f;
    const float x = sign * q.p.beta * (q.log_ratio(i) - z);
    const Logistic at(x);
    loss += at.sigmoid_minus / q.valid;  // 1 - sigmoid(x), without the cancellation
    q.put(i, -sign * q.p.beta * at.sigmoid_minus * at.sigmoid / q.valid);
  }
  return loss;
}

// Prompt b: writes its rewards and dlogps, returns its loss without the reduction's factor.
NCA_HOST_DEVICE static inline float group_loss_prompt(const GroupLoss& p, std::int64_t b) {
  const Prompt q(p, b);
  for (std::int64_t i = 0; i < p.K; ++i) {
    p.rewards[q.first + i] = q.is_valid(i) ? q.reward(i) : 0.f;
    p.dlogps[q.first + i] = 0.f;
  }
  if (q.valid == 0) return 0.f;
  switch (p.name) {
    case kInfoNCA: return info_nca(q);
    case kNCA: return nca_loss(q);
    case kKTO: return kto(q);
    default: return pair_loss(q);
  }
}

}  // namespace nca
