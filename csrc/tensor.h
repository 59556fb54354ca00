// A torch tensor as Python hands it over, read without torch's headers.
#pragma once

#include <Python.h>

#include "params.h"

namespace fastattn {

struct Tensor {
  static constexpr int kMaxDims = 4;
  void* data = nullptr;
  Type type = Type::kOther;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  Strided strided() const;
  Strided broadcast() const;  // dimensions of size 1 have stride 0
};

// A tensor in host memory, or an empty Tensor for None. Valid while the object is.
// Throws py::type_error, py::value_error.
Tensor tensor_of(PyObject* x);
// The same by Python's attributes alone, as with a torch that offers no exchange table.
Tensor tensor_by_attributes(PyObject* x);

// Items of the tuple that describes a call: straight from CPython, since a checked cast of each
// costs 20 ns. What Python could not convert raises in check_python().
inline PyObject* item(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i); }
inline int64_t integer(PyObject* x) { return PyLong_AsLongLong(x); }
inline float real(PyObject* x) { return static_cast<float>(PyFloat_AsDouble(x)); }
template <class T>
T* array(PyObject* x) {
  return static_cast<T*>(tensor_of(x).data);
}
void check_python();

}  // namespace fastattn
