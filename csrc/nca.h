// The declarations of the kernels, which nca::cpu and nca::cuda both define.
// They take plain addresses, sizes and strides and include no PyTorch header, so one build serves every PyTorch version.
// The caller checks every argument, except the values of the labels; the kernels do not check again.
#pragma once
#include <cstdint>
#include <string>

namespace nca {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Where to run: CPU threads (cpu), or the device index and its stream (cuda).
struct Launch {
  int threads;
  int device;
  std::uintptr_t stream;
};

// Log-probs of labels under softmax(z), z = softcap * tanh(scale * logits / softcap), for rows (n, t) of [N, T, V].
struct TokenLogps {
  const void* logits;           // [N, T, V], dtype, last stride 1
  DType dtype;
  std::int64_t N, T, V;
  std::int64_t stride_n, stride_t;  // in elements
  const std::int64_t* labels;   // [N, T] contiguous
  std::int64_t ignore_index;    // rows with this label are not read: logp 0, stats (0, 1, 0, 0), gradient 0
  float scale;
  float softcap;                // 0: none
  // The logits hold the columns [vocab_start, vocab_start + V) of a vocabulary of vocab_total (vocabulary-parallel heads).
  // A label in [0, vocab_total) that another slice holds is legal: its target is 0 here, and no column here is its onehot.
  std::int64_t vocab_start, vocab_total;
  float* logps;                 // [N, T], an output of forward: target - max - log(sum)
  // [stat_rows, N, T], an output of forward and an input of backward: max z, sum exp(z - max), target z and, as a fourth,
  // A = sum (z - max) exp(z - max), to which columns of -inf add 0. The entropy is log(sum) - A / sum.
  float* stats;
  int stat_rows;                // 3, or 4 for A as well
  // Backward only.
  const float* dlogps;          // [N, T] contiguous
  const float* dlse;            // [N, T] contiguous, gradient of max + log(sum); null: 0
  const float* dentropy;        // [N, T] contiguous, needs stat_rows = 4; null: 0
  void* dlogits;                // [N, T, V], dtype; may be logits itself
  std::int64_t dstride_n, dstride_t;
};

// The names are in the order of the enumerators: Python takes the number of an enumerator from the position of its name.
enum Loss : int { kInfoNCA, kNCA, kDPO, kIPO, kKTO, kPlackettLuce, kBiasedNCA };
constexpr const char* kLosses[] = {"info_nca", "nca", "dpo", "ipo", "kto", "plackett_luce", "biased_nca"};
static_assert(sizeof(kLosses) / sizeof(kLosses[0]) == kBiasedNCA + 1);
enum Pairs : int { kBestVsRest, kAll };
constexpr const char* kPairs[] = {"best_vs_rest", "all"};
enum Reduction : int { kMean, kSum, kNone };
constexpr const char* kReductions[] = {"mean", "sum", "none"};

// The K-way loss of every prompt, its implicit rewards and its derivative, in one launch. All [B, K] contiguous.
struct GroupLoss {
  Loss name;
  Pairs pairs;
  Reduction reduction;
  std::int64_t B, K;
  const float* logps;
  const float* ref_logps;
  const float* scores;
  const bool* mask;        // null: every response is valid
  const float* lengths;    // null: log-probs are averages over tokens already (IPO, the negative log-likelihood)
  const bool* desirable;   // null: the best-scored responses (KTO)
  const float* baseline;   // one value, null: 0 (KTO); taken as max(baseline, 0)
  float beta;
  float alpha;             // 0: uniform weights over the best-scored responses
  float label_smoothing;   // 0 for every loss but DPO
  float nll_weight;        // 0: no negative log-likelihood
  float* loss;             // [1], the sum or mean; not written with kNone
  float* losses;           // [B], the loss of each prompt; null: only their sum is needed
  float* rewards;          // [B, K]
  float* dlogps;           // [B, K]: d loss / d logps, the reduction's factor included
};

namespace cpu {
// Why the kernels cannot run on this machine; empty if they can.
std::string unusable(int device);
// The instruction set of the row kernels here; throws if NCA_KERNELS_ISA names one that this machine or build lacks.
std::string instruction_set();
// Both return the first row whose label is neither ignore_index nor in [0, vocab_total), or -1.
std::int64_t token_logps_fwd(const TokenLogps&, const Launch&);
std::int64_t token_logps_bwd(const TokenLogps&, const Launch&);
void group_loss_fwd(const GroupLoss&, const Launch&);
}  // namespace cpu

namespace cuda {
// Why the kernels cannot run on that GPU (-1: the current one); empty if they can.
std::string unusable(int device);
// The architectures with machine code in this build, and the lowest compute capability that its PTX serves.
std::string instruction_set();
// No host sync: a row with a bad label gets NaN (logp and gradient), and both return -1.
std::int64_t token_logps_fwd(const TokenLogps&, const Launch&);
std::int64_t token_logps_bwd(const TokenLogps&, const Launch&);
void group_loss_fwd(const GroupLoss&, const Launch&);
}  // namespace cuda

}  // namespace nca
