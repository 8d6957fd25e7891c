// The K-way losses of one prompt: value, implicit rewards and derivative. Shared by the CPU's loop and the GPU's lanes.
//
// With l = logp - ref_logp, r = beta * l, s = score and w = softmax(s / alpha) over the prompt's K valid responses:
//   info_nca       - sum_i w_i log softmax(r)_i                              d/dr_i = softmax(r)_i - w_i
//   nca            - sum_i [w_i log sigmoid(r_i) + log sigmoid(-r_i) / K]    d/dr_i = sigmoid(r_i) / K - w_i sigmoid(-r_i)
//   biased_nca     the same with (1 - w_i) / (K - 1) in place of 1 / K
//   dpo            mean over pairs of -(1 - e) log sigmoid(r_i - r_j) - e log sigmoid(r_j - r_i), e = label_smoothing
//   ipo            mean over pairs of (l_i / n_i - l_j / n_j - 1 / (2 beta))^2, n = length
//   kto            mean of 1 - sigmoid(+-beta (l - z)), + for the desirable, z >= 0 a detached baseline
//   plackett_luce  mean of log sum_{s_j <= s_i} exp(r_j - r_i) over those i that have such a j other than i
// - nll_weight sum_i w_i logp_i / n_i is added to each. docs/math.md, section 6, has the derivations.
//
// K has no bound: values are recomputed from the inputs, which are in the nearest cache. What a loss needs twice is kept in the
// outputs.
#pragma once
#include "nca.h"
#include "row_math.h"

namespace nca {

// The lanes that share a prompt: one here, up to a warp on a GPU. Lane `lane` computes the responses lane, lane + size, ...
// All lanes of a warp must call sum, max and sync equally often, for any prompts. So no loss returns early.
struct Alone {
  static constexpr std::int64_t lane = 0, size = 1;
  float sum(float own) const { return own; }
  float max(float own) const { return own; }
  void sync() const {}
};

// A sum of many terms in float32, in groups of sixteen: added one after the other, the pairs of K = 67 were 10 ulp off. Float64 is
// slow on a GPU.
struct Sum {
  float sixteens = 0, rest = 0;
  int terms = 0;
  NCA_HOST_DEVICE void add(float term) {
    rest += term;
    if (++terms % 16) return;
    sixteens += rest;
    rest = 0;
  }
  NCA_HOST_DEVICE float total() const { return sixteens + rest; }
};

// sigmoid(x), sigmoid(-x), log(1 + exp(x)) = -log sigmoid(-x) and log(1 + exp(-x)), all from one exponential that does not
// overflow, and without cancellation.
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

// The inputs of one prompt, the same on each of its lanes; masked responses are never read.
// A prompt past the last one has no responses.
template <class Lanes>
struct Prompt {
  const GroupLoss& p;
  const Lanes& lanes;
  std::int64_t first, K;
  float valid;        // number of valid responses
  float best;         // best score
  float weights_sum;  // of score_exp
  bool has_nan;       // a NaN is among the valid inputs: all results of the prompt are NaN

  NCA_HOST_DEVICE Prompt(const GroupLoss& loss, std::int64_t b, const Lanes& lanes_)
      : p(loss), lanes(lanes_), first(b * loss.K), K(b < loss.B ? loss.K : 0) {
    float own_valid = 0, own_best = -INFINITY, own_nan = p.baseline && is_nan(*p.baseline) ? 1.f : 0.f;
    for (std::int64_t i = lanes.lane; i < K; i += lanes.size) {
      if (!is_valid(i)) continue;
      ++own_valid;
      own_best = fmaxf(own_best, score(i));
      if (is_nan(score(i)) || is_nan(log_ratio(i)) || is_nan(length(i))) own_nan = 1;
    }
    valid = lanes.sum(own_valid);
    best = lanes.max(own_best);
    has_nan = lanes.max(own_nan) > 0;
    float own_weights = 0;
    for (std::int64_t i = lanes.lane; i < K; i += lanes.size) own_weights += is_valid(i) ? score_exp(i) : 0.f;
    weights_sum = lanes.sum(own_weights);
  }

  NCA_HOST_DEVICE static bool is_nan(float x) { return x != x; }
  NCA_HOST_DEVICE bool is_valid(std::int64_t i) const { return !p.mask || p.mask[first + i]; }
  NCA_HOST_DEVICE float score(std::int64_t i) const { return p.scores[first + i]; }
  NCA_HOST_DEVICE float log_ratio(std::int64_t i) const { return p.logps[first + i] - p.ref_logps[first + i]; }
  NCA_HOST_DEVICE float reward(std::int64_t i) const { return p.beta * log_ratio(i); }
  NCA_HOST_DEVICE float length(std::int64_t i) const {
    const float n = p.lengths ? p.lengths[first + i] : 1.f;
    return n < 1.f ? 1.f : n;
  }

  // The best ones are 1 without the division, which is right for alpha = 0 and for an infinite best score.
  NCA_HOST_DEVICE float score_exp(std::int64_t i) const {
    if (score(i) == best) return 1.f;
    return p.alpha > 0 ? expf((score(i) - best) / p.alpha) : 0.f;
  }
  NCA_HOST_DEVICE float weight(std::int64_t i) const { return score_exp(i) / weights_sum; }
  // A response of weight 0 may have log-prob -inf, and 0 * inf is NaN.
  NCA_HOST_DEVICE static float weighted(float w, float term) { return w > 0 ? w * term : 0.f; }

  // Whether two responses of these scores are a pair in which the first is the better one.
  NCA_HOST_DEVICE bool is_pair(float better, float worse) const {
    return better > worse && (p.pairs == kAll || better == best);
  }
  // The value that a pair compares (r, or l / n for IPO) and its derivative by logp.
  NCA_HOST_DEVICE float margin(std::int64_t i) const { return p.name == kIPO ? log_ratio(i) / length(i) : reward(i); }
  NCA_HOST_DEVICE float dmargin(std::int64_t i) const { return p.name == kIPO ? 1.f / length(i) : p.beta; }

  NCA_HOST_DEVICE bool is_desirable(std::int64_t i) const {
    return p.desirable ? p.desirable[first + i] : score(i) == best;
  }

  // Writes the derivative of a valid response; `dloss_dlogp` is without the negative log-likelihood.
  NCA_HOST_DEVICE void put(std::int64_t i, float dloss_dlogp) const {
    if (p.nll_weight > 0) dloss_dlogp -= p.nll_weight * weight(i) / length(i);
    if (has_nan) dloss_dlogp = NAN;
    p.dlogps[first + i] = p.reduction == kMean ? dloss_dlogp / p.B : dloss_dlogp;
  }
};

// Each of the following returns the prompt's loss, and writes d loss / d logp of its lane's valid responses.

template <class Lanes>
NCA_HOST_DEVICE float info_nca(const Prompt<Lanes>& q) {
  float own_top = -INFINITY, own_sum = 0, own_loss = 0;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (q.is_valid(i)) own_top = fmaxf(own_top, q.reward(i));
  }
  const float top = q.lanes.max(own_top);
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (q.is_valid(i)) own_sum += expf(q.reward(i) - top);
  }
  const float sum = q.lanes.sum(own_sum), log_sum = logf(sum);
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (!q.is_valid(i)) continue;
    const float r = q.reward(i) - top, w = q.weight(i);
    own_loss += q.weighted(w, log_sum - r);
    q.put(i, q.p.beta * (expf(r) / sum - w));
  }
  return q.lanes.sum(own_loss);
}

// nca and biased_nca, which differ in the weights of log sigmoid(-r).
template <class Lanes>
NCA_HOST_DEVICE float nca_loss(const Prompt<Lanes>& q) {
  const bool biased = q.p.name == kBiasedNCA;
  const float learns = biased && q.valid < 2 ? 0.f : 1.f;  // a single response states no preference
  float own_loss = 0;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (!q.is_valid(i)) continue;
    const Logistic at(q.reward(i));
    const float w = learns * q.weight(i), noise = learns * (biased ? (1.f - w) / fmaxf(q.valid - 1.f, 1.f) : 1.f / q.valid);
    own_loss += q.weighted(w, at.softplus_minus) + q.weighted(noise, at.softplus);
    q.put(i, q.p.beta * (noise * at.sigmoid - w * at.sigmoid_minus));
  }
  return q.lanes.sum(own_loss);
}

// A pair's loss, and its derivative by the margin. Two functions, since the worse response of a pair needs only the second.
NCA_HOST_DEVICE inline float pair_value(const GroupLoss& p, float margin) {
  const float e = p.label_smoothing, miss = margin - 0.5f / p.beta;
  if (p.name == kIPO) return miss * miss;
  const Logistic at(margin);
  return e > 0 ? (1.f - e) * at.softplus_minus + e * at.softplus : at.softplus_minus;  // avoids 0 * inf
}
NCA_HOST_DEVICE inline float pair_slope(const GroupLoss& p, float margin) {
  const float e = p.label_smoothing, miss = margin - 0.5f / p.beta;
  if (p.name == kIPO) return 2.f * miss;
  const Logistic at(margin);
  return e * at.sigmoid - (1.f - e) * at.sigmoid_minus;
}

// Each response sums its own derivative over all pairs that it is in.
template <class Lanes>
NCA_HOST_DEVICE float pair_loss(const Prompt<Lanes>& q) {
  std::int64_t own_pairs = 0;
  Sum own_loss;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (!q.is_valid(i)) continue;
    const float own_score = q.score(i), own_margin = q.margin(i);
    Sum loss, slope;
    for (std::int64_t j = 0; j < q.K; ++j) {
      if (!q.is_valid(j)) continue;
      const bool better = q.is_pair(own_score, q.score(j));
      if (!better && !q.is_pair(q.score(j), own_score)) continue;
      const float margin = better ? own_margin - q.margin(j) : q.margin(j) - own_margin;
      slope.add(better ? pair_slope(q.p, margin) : -pair_slope(q.p, margin));
      if (!better) continue;
      loss.add(pair_value(q.p, margin));
      ++own_pairs;
    }
    own_loss.add(loss.total());
    q.p.dlogps[q.first + i] = q.dmargin(i) * slope.total();  // divided by the number of pairs below, once that is known
  }
  const float pairs = fmaxf(q.lanes.sum(static_cast<float>(own_pairs)), 1.f);
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (q.is_valid(i)) q.put(i, q.p.dlogps[q.first + i] / pairs);
  }
  return q.lanes.sum(own_loss.total()) / pairs;
}

template <class Lanes>
NCA_HOST_DEVICE float kto(const Prompt<Lanes>& q) {
  const float z = q.p.baseline && *q.p.baseline > 0 ? *q.p.baseline : 0.f;
  float own_loss = 0;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (!q.is_valid(i)) continue;
    const float sign = q.is_desirable(i) ? 1.f : -1.f;
    const Logistic at(sign * q.p.beta * (q.log_ratio(i) - z));
    own_loss += at.sigmoid_minus / q.valid;  // 1 - sigmoid(x), without the cancellation
    q.put(i, -sign * q.p.beta * at.sigmoid_minus * at.sigmoid / q.valid);
  }
  return q.lanes.sum(own_loss);
}

// With D_i = log sum_j exp(r_j - r_i), the loss is the mean of D and d/dr_k = (sum_{s_i >= s_k} exp(r_k - r_i - D_i) - 1) / n.
// A response with no other one at or below it has D = 0 and adds nothing to either, so it only needs to be left out of n.
template <class Lanes>
NCA_HOST_DEVICE float plackett_luce(const Prompt<Lanes>& q) {
  float own_worst = -INFINITY, own_worst_count = 0;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (q.is_valid(i)) own_worst = fmaxf(own_worst, -q.score(i));
  }
  const float worst = -q.lanes.max(own_worst);
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) own_worst_count += q.is_valid(i) && q.score(i) == worst;
  const float n = fmaxf(q.valid - (q.lanes.sum(own_worst_count) == 1.f ? 1.f : 0.f), 1.f);
  const float learns = worst < q.best ? 1.f / n : 0.f;

  float* const D = q.p.rewards + q.first;  // the rewards overwrite it at the end
  Sum own_loss;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (!q.is_valid(i)) continue;
    float top = 0;  // r_i itself is one of the r_j
    for (std::int64_t j = 0; j < q.K; ++j) {
      if (j != i && q.is_valid(j) && q.score(j) <= q.score(i)) top = fmaxf(top, q.reward(j) - q.reward(i));
    }
    Sum others;
    for (std::int64_t j = 0; j < q.K; ++j) {
      if (j != i && q.is_valid(j) && q.score(j) <= q.score(i)) others.add(expf(q.reward(j) - q.reward(i) - top));
    }
    D[i] = top > 0 ? top + logf(others.total() + expf(-top)) : log1pf(others.total());
    own_loss.add(D[i]);
  }
  q.lanes.sync();
  for (std::int64_t k = q.lanes.lane; k < q.K; k += q.lanes.size) {
    if (!q.is_valid(k)) continue;
    Sum slope;
    slope.add(expm1f(-D[k]));  // k's own term and the - 1
    for (std::int64_t i = 0; i < q.K; ++i) {
      if (i != k && q.is_valid(i) && q.score(i) >= q.score(k)) slope.add(expf(q.reward(k) - q.reward(i) - D[i]));
    }
    q.put(k, q.p.beta * learns * slope.total());
  }
  q.lanes.sync();
  return learns * q.lanes.sum(own_loss.total());
}

template <class Lanes>
NCA_HOST_DEVICE float loss_of(const Prompt<Lanes>& q) {
  switch (q.p.name) {
    case kInfoNCA: return info_nca(q);
    case kNCA:
    case kBiasedNCA: return nca_loss(q);
    case kKTO: return kto(q);
    case kPlackettLuce: return plackett_luce(q);
    default: return pair_loss(q);
  }
}

// - sum_i w_i logp_i / n_i
template <class Lanes>
NCA_HOST_DEVICE float nll(const Prompt<Lanes>& q) {
  float own = 0;
  for (std::int64_t i = q.lanes.lane; i < q.K; i += q.lanes.size) {
    if (q.is_valid(i)) own -= q.weighted(q.weight(i), q.p.logps[q.first + i] / q.length(i));
  }
  return q.lanes.sum(own);
}

// Writes the rewards and dlogps of prompt b; returns its loss without the factor of the reduction, on each of its lanes.
template <class Lanes>
NCA_HOST_DEVICE float group_loss_prompt(const GroupLoss& p, std::int64_t b, const Lanes& lanes) {
  const Prompt<Lanes> q(p, b, lanes);
  for (std::int64_t i = lanes.lane; i < q.K; i += lanes.size) p.dlogps[q.first + i] = 0.f;
  float loss = loss_of(q);
  if (p.nll_weight > 0) loss += p.nll_weight * nll(q);
  for (std::int64_t i = lanes.lane; i < q.K; i += lanes.size) p.rewards[q.first + i] = q.is_valid(i) ? q.reward(i) : 0.f;
  return q.has_nan && q.valid > 0 ? NAN : loss;
}

}  // namespace nca
