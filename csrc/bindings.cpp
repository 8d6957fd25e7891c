// The functions of the extension. A kernel takes keyword arguments only, one for each field of its two structs in nca.h.
// Compiled once for each extension module: NCA_MODULE is _cpu or _cuda, NCA_DEVICE the namespace it binds.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <stdexcept>

#include "keywords.h"
#include "nca.h"

namespace py = pybind11;

namespace {

// Both arguments of a kernel in one, so that one table names the fields of both.
struct TokenLogps : nca::TokenLogps, nca::Launch {};
struct GroupLoss : nca::GroupLoss, nca::Launch {};

#define F(field) NCA_FIELD(TokenLogps, field)
constexpr nca::Field<TokenLogps> kTokenLogps[] = {
    F(logits), F(dtype), F(N), F(T), F(V), F(stride_n), F(stride_t), F(labels), F(ignore_index), F(scale), F(softcap),
    F(vocab_start), F(vocab_total), F(logps), F(stats), F(stat_rows), F(dlogps), F(dlse), F(dentropy), F(dlogits),
    F(dstride_n), F(dstride_t), F(threads), F(device), F(stream)};
#undef F
#define F(field) NCA_FIELD(GroupLoss, field)
constexpr nca::Field<GroupLoss> kGroupLoss[] = {
    F(name), F(pairs), F(reduction), F(B), F(K), F(logps), F(ref_logps), F(scores), F(mask), F(lengths), F(desirable),
    F(baseline), F(beta), F(alpha), F(label_smoothing), F(nll_weight), F(loss), F(losses), F(rewards), F(dlogps), F(threads), F(device), F(stream)};
#undef F

// A Python function that fills a struct from its keyword arguments and runs a kernel on it.
template <class Struct, const auto& fields, auto kernel>
PyObject* run(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  Struct arguments{};
  if (!nca::fill(arguments, fields, values, positional, names)) return nullptr;
  try {
    std::int64_t result;
    {
      const py::gil_scoped_release others_may_run;  // a kernel touches no Python object
      result = kernel(arguments, arguments);
    }
    return PyLong_FromLongLong(result);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class Struct, const auto& fields, auto kernel>
void define(py::module_& m, const char* name) {
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&run<Struct, fields, kernel>));
  auto* const method = new PyMethodDef{name, function, METH_FASTCALL | METH_KEYWORDS, nullptr};  // lives as long as the module
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(method, nullptr, nullptr));
}

std::int64_t group_loss_fwd(const nca::GroupLoss& arguments, const nca::Launch& launch) {
  nca::NCA_DEVICE::group_loss_fwd(arguments, launch);
  return -1;
}

template <std::size_t kCount>
py::tuple names(const char* const (&all)[kCount]) {
  py::tuple result(kCount);
  for (std::size_t i = 0; i < kCount; ++i) result[i] = all[i];
  return result;
}

}  // namespace

PYBIND11_MODULE(NCA_MODULE, m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("unusable", &nca::NCA_DEVICE::unusable, py::arg("device"), nogil());
  m.def("instruction_set", &nca::NCA_DEVICE::instruction_set, nogil());
  define<TokenLogps, kTokenLogps, nca::NCA_DEVICE::token_logps_fwd>(m, "token_logps_fwd");
  define<TokenLogps, kTokenLogps, nca::NCA_DEVICE::token_logps_bwd>(m, "token_logps_bwd");
  define<GroupLoss, kGroupLoss, group_loss_fwd>(m, "group_loss_fwd");
  m.attr("LOSSES") = names(nca::kLosses);
  m.attr("PAIRS") = names(nca::kPairs);
  m.attr("REDUCTIONS") = names(nca::kReductions);
}
