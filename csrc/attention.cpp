// From Python's view of a call to AttentionParams. A tensor crosses the border as None or as
// (data_ptr, strides), with its shape where it broadcasts; its type and sizes were checked in
// fastattn/ops/attention.py.
#include "attention.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fastattn {

namespace {

// Straight from CPython: a call passes some 60 numbers, and a checked cast of each costs 20 ns.
int64_t integer(PyObject* x) { return PyLong_AsLongLong(x); }
float real(PyObject* x) { return static_cast<float>(PyFloat_AsDouble(x)); }
PyObject* item(py::handle tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

void* pointer(PyObject* x) { return x == Py_None ? nullptr : PyLong_AsVoidPtr(x); }
float* floats(PyObject* x) { return static_cast<float*>(pointer(x)); }

Strided strided(PyObject* tensor) {
  Strided x;
  if (tensor == Py_None) return x;
  x.data = pointer(PyTuple_GET_ITEM(tensor, 0));
  PyObject* strides = PyTuple_GET_ITEM(tensor, 1);
  const Py_ssize_t n = PyTuple_GET_SIZE(strides);
  for (Py_ssize_t i = 0; i < n && i < 4; ++i) x.stride[i] = integer(PyTuple_GET_ITEM(strides, i));
  if (PyTuple_GET_SIZE(tensor) == 3) {
    PyObject* shape = PyTuple_GET_ITEM(tensor, 2);
    for (Py_ssize_t i = 0; i < n && i < 4; ++i) {
      if (integer(PyTuple_GET_ITEM(shape, i)) == 1) x.stride[i] = 0;
    }
  }
  return x;
}

// `call` in the order of fastattn/cpu/attention.py.
AttentionParams params_of(const py::tuple& sizes, const py::tuple& types, const py::tuple& tensors,
                          const py::tuple& options) {
  AttentionParams p = {};
  int64_t* const fields[] = {&p.batch,    &p.nheads,   &p.nheads_k,  &p.seqlen_q,
                             &p.seqlen_k, &p.head_dim, &p.head_dim_v};
  for (Py_ssize_t i = 0; i < 7; ++i) *fields[i] = integer(item(sizes, i));
  p.type = static_cast<Type>(integer(item(types, 0)));
  p.bias_type = static_cast<Type>(integer(item(types, 1)));
  p.sinks_type = static_cast<Type>(integer(item(types, 2)));
  Strided* const inputs[] = {&p.q, &p.k, &p.v, &p.out, &p.mask, &p.bias, &p.alibi, &p.sinks};
  for (Py_ssize_t i = 0; i < 8; ++i) *inputs[i] = strided(item(tensors, i));
  p.lse = floats(item(tensors, 8));
  p.lse_rest = floats(item(tensors, 9));
  p.softmax_scale = real(item(options, 0));
  p.window_left = integer(item(options, 1));
  p.window_right = integer(item(options, 2));
  p.softcap = real(item(options, 3));
  p.dropout_threshold = static_cast<uint32_t>(integer(item(options, 4)));
  p.dropout_scale = real(item(options, 5));
  p.seed = static_cast<uint64_t>(integer(item(options, 6)));
  if (PyErr_Occurred()) throw py::error_already_set();
  return p;
}

void fwd(const py::tuple& sizes, const py::tuple& types, const py::tuple& tensors,
         const py::tuple& options, int threads) {
  const AttentionParams p = params_of(sizes, types, tensors, options);
  const py::gil_scoped_release release;
  attention_fwd_cpu(p, threads);
}

void bwd(const py::tuple& sizes, const py::tuple& types, const py::tuple& tensors,
         const py::tuple& options, const py::tuple& gradients, int threads) {
  AttentionParams p = params_of(sizes, types, tensors, options);
  p.dout = strided(item(gradients, 0));
  p.dlse = floats(item(gradients, 1));
  p.dq = strided(item(gradients, 2));
  p.dk = strided(item(gradients, 3));
  p.dv = strided(item(gradients, 4));
  p.dbias = strided(item(gradients, 5));
  p.dsinks = floats(item(gradients, 6));
  p.delta = floats(item(gradients, 7));
  p.dq_sum = strided(item(gradients, 8));
  const py::gil_scoped_release release;
  attention_bwd_cpu(p, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &fwd);
  m.def("attention_bwd", &bwd);
}

}  // namespace fastattn
