// The row kernels of nca::cpu: check the labels, then run the object of the widest instruction set that this machine has.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "nca.h"

namespace nca {
namespace cpu {

#define NCA_DECLARE(ISA)                                      \
  namespace ISA {                                             \
  void token_logps_fwd(const TokenLogps&, const Launch&);     \
  void token_logps_bwd(const TokenLogps&, const Launch&);     \
  }
#ifdef NCA_HAS_AVX512BF16
NCA_DECLARE(avx512bf16)
#endif
#ifdef NCA_HAS_AVX512
NCA_DECLARE(avx512)
#endif
#ifdef NCA_HAS_AVX2
NCA_DECLARE(avx2)
#endif
#ifdef NCA_HAS_NEON
NCA_DECLARE(neon)
#endif
#ifdef NCA_HAS_PLAIN
NCA_DECLARE(plain)
#endif

namespace {

using Kernel = void (*)(const TokenLogps&, const Launch&);

struct Isa {
  const char* name;
  bool supported;
  Kernel fwd, bwd;
};

const Isa& pick_isa() {
#if defined(NCA_HAS_AVX512)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  // F16C is older than AVX2, so no machine has AVX2 and FMA without it.
  static const Isa isas[] = {
#ifdef NCA_HAS_AVX512BF16
      {"avx512bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"), avx512bf16::token_logps_fwd,
       avx512bf16::token_logps_bwd},
#endif
#ifdef NCA_HAS_AVX512
      {"avx512", has_avx512, avx512::token_logps_fwd, avx512::token_logps_bwd},
#endif
#ifdef NCA_HAS_AVX2
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::token_logps_fwd,
       avx2::token_logps_bwd},
#endif
#ifdef NCA_HAS_NEON
      {"neon", true, neon::token_logps_fwd, neon::token_logps_bwd},
#endif
#ifdef NCA_HAS_PLAIN
      {"plain", true, plain::token_logps_fwd, plain::token_logps_bwd},
#endif
  };
  const char* wish = std::getenv("NCA_KERNELS_ISA");
  std::string possible;
  for (const Isa& isa : isas) {
    if (!isa.supported) continue;
    if (!wish || std::strcmp(wish, isa.name) == 0) return isa;
    possible += (possible.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("NCA_KERNELS_ISA=" + std::string(wish) + ": this machine and build have " + possible);
}

const Isa& isa() {
  static const Isa& picked = pick_isa();
  return picked;
}

std::int64_t first_bad_row(const TokenLogps& p) {
  for (std::int64_t row = 0; row < p.N * p.T; ++row) {
    const std::int64_t label = p.labels[row];
    if ((label < 0 || label >= p.vocab_total) && label != p.ignore_index) return row;
  }
  return -1;
}

}  // namespace

std::string unusable(int) {
  try {
    isa();
    return "";
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
}

std::string instruction_set() { return isa().name; }

std::int64_t token_logps_fwd(const TokenLogps& p, const Launch& launch) {
  const std::int64_t bad_row = first_bad_row(p);
  if (bad_row < 0) isa().fwd(p, launch);
  return bad_row;
}

std::int64_t token_logps_bwd(const TokenLogps& p, const Launch& launch) {
  const std::int64_t bad_row = first_bad_row(p);
  if (bad_row < 0) isa().bwd(p, launch);
  return bad_row;
}

}  // namespace cpu
}  // namespace nca
