// pybind11 and nothing else: integers and addresses in, the kernels' structs made of them, so that a call is one crossing.
// Compiled once for each extension module: NCA_MODULE is _cpu or _cuda, NCA_DEVICE the namespace it binds.
#include <pybind11/pybind11.h>

#include "nca.h"

namespace py = pybind11;
using std::int64_t;
using std::uintptr_t;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <auto kernel>
int64_t token_logps(uintptr_t logits, int dtype, int64_t N, int64_t T, int64_t V, int64_t stride_n, int64_t stride_t,
                    uintptr_t labels, int64_t ignore_index, float scale, float softcap, int64_t vocab_start,
                    int64_t vocab_total, uintptr_t logps, uintptr_t stats, uintptr_t dlogps, uintptr_t dlogits,
                    int64_t dstride_n, int64_t dstride_t, int threads, int device, uintptr_t stream) {
  return kernel(nca::TokenLogps{at<const void>(logits), static_cast<nca::DType>(dtype), N, T, V, stride_n, stride_t,
                                at<const int64_t>(labels), ignore_index, scale, softcap, vocab_start, vocab_total,
                                at<float>(logps), at<float>(stats), at<const float>(dlogps), at<void>(dlogits),
                                dstride_n, dstride_t},
                nca::Launch{threads, device, stream});
}

void group_loss(int name, int pairs, int reduction, int64_t B, int64_t K, uintptr_t logps, uintptr_t ref_logps,
                uintptr_t scores, uintptr_t mask, uintptr_t lengths, uintptr_t desirable, uintptr_t baseline, float beta,
                float alpha, uintptr_t loss, uintptr_t rewards, uintptr_t dlogps, int threads, int device,
                uintptr_t stream) {
  nca::NCA_DEVICE::group_loss_fwd(
      nca::GroupLoss{static_cast<nca::Loss>(name), static_cast<nca::Pairs>(pairs), static_cast<nca::Reduction>(reduction),
                     B, K, at<const float>(logps), at<const float>(ref_logps), at<const float>(scores),
                     at<const bool>(mask), at<const float>(lengths), at<const bool>(desirable), at<const float>(baseline),
                     beta, alpha, at<float>(loss), at<float>(rewards), at<float>(dlogps)},
      nca::Launch{threads, device, stream});
}

}  // namespace

PYBIND11_MODULE(NCA_MODULE, m) {
  // The kernels touch no Python object, so other Python threads may run meanwhile.
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("unusable", &nca::NCA_DEVICE::unusable, nogil());
  m.def("instruction_set", &nca::NCA_DEVICE::instruction_set, nogil());
  m.def("token_logps_fwd", &token_logps<&nca::NCA_DEVICE::token_logps_fwd>, nogil());
  m.def("token_logps_bwd", &token_logps<&nca::NCA_DEVICE::token_logps_bwd>, nogil());
  m.def("group_loss_fwd", &group_loss, nogil());
}
