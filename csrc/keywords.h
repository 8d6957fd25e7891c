// Fills a C++ struct from the keyword arguments of a Python call. Missing and unknown fields are errors.
// pybind11's keyword arguments would repeat each field's name and position in a signature and an initializer.
#pragma once
#include <Python.h>

#include <cstddef>
#include <type_traits>

namespace nca {

// An address is an integer, 0 is null. On failure a Python exception is set.
template <class T>
T from_python(PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(PyLong_AsVoidPtr(value));
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(value));
  } else {
    return static_cast<T>(PyLong_AsLongLong(value));
  }
}

template <class Struct>
struct Field {
  const char* name;
  void (*set)(Struct&, PyObject*);
};

template <class Struct, auto member>
void set_field(Struct& to, PyObject* value) {
  to.*member = from_python<std::decay_t<decltype(to.*member)>>(value);
}

#define NCA_FIELD(Struct, field) \
  nca::Field<Struct> { #field, nca::set_field<Struct, &Struct::field> }

inline bool is_name(PyObject* text, const char* name) { return PyUnicode_CompareWithASCIIString(text, name) == 0; }

// Takes the arguments of a METH_FASTCALL | METH_KEYWORDS function. On false, a TypeError is set.
template <class Struct, std::size_t kCount>
bool fill(Struct& to, const Field<Struct> (&fields)[kCount], PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  if (positional > 0) {
    PyErr_Format(PyExc_TypeError, "got %zd positional arguments, wanted keyword arguments alone", positional);
    return false;
  }
  bool filled[kCount] = {};
  const std::size_t given = names ? PyTuple_GET_SIZE(names) : 0;
  for (std::size_t i = 0; i < given; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names, i);
    std::size_t at = i % kCount, tried = 0;  // tries the field at the same position first: callers keep to the order of the table
    while (tried < kCount && !is_name(name, fields[at].name)) at = (at + 1) % kCount, ++tried;
    if (tried == kCount) {
      PyErr_Format(PyExc_TypeError, "%U: no such field", name);
      return false;
    }
    fields[at].set(to, values[i]);
    if (PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "%U: got %R, wanted a number of the field's type", name, values[i]);
      return false;
    }
    filled[at] = true;
  }
  for (std::size_t at = 0; at < kCount; ++at) {
    if (filled[at]) continue;
    PyErr_Format(PyExc_TypeError, "%s: missing", fields[at].name);
    return false;
  }
  return true;
}

}  // namespace nca
