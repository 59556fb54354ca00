// From Python's view of a call to AttentionParams. A tensor crosses the border as None or as
// (data_ptr, strides); its type and sizes were checked in fastattn/ops/attention.py.
#include "attention.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fastattn {

namespace {

Strided strided(py::handle tensor) {
  Strided x;
  if (tensor.is_none()) return x;
  const auto pair = py::reinterpret_borrow<py::tuple>(tensor);
  x.data = reinterpret_cast<void*>(pair[0].cast<uintptr_t>());
  const auto strides = py::reinterpret_borrow<py::tuple>(pair[1]);
  for (size_t i = 0; i < strides.size() && i < 4; ++i) x.stride[i] = strides[i].cast<int64_t>();
  return x;
}

float* floats(py::handle pointer) {
  return pointer.is_none() ? nullptr : reinterpret_cast<float*>(pointer.cast<uintptr_t>());
}

// `call` in the order of fastattn/cpu/attention.py.
AttentionParams params_of(const py::tuple& sizes, const py::tuple& types, const py::tuple& tensors,
                          const py::tuple& options) {
  AttentionParams p = {};
  int64_t* const fields[] = {&p.batch,    &p.nheads,   &p.nheads_k,  &p.seqlen_q,
                             &p.seqlen_k, &p.head_dim, &p.head_dim_v};
  for (size_t i = 0; i < 7; ++i) *fields[i] = sizes[i].cast<int64_t>();
  p.type = static_cast<Type>(types[0].cast<int>());
  p.bias_type = static_cast<Type>(types[1].cast<int>());
  p.sinks_type = static_cast<Type>(types[2].cast<int>());
  Strided* const inputs[] = {&p.q, &p.k, &p.v, &p.out, &p.mask, &p.bias, &p.alibi, &p.sinks};
  for (size_t i = 0; i < 8; ++i) *inputs[i] = strided(tensors[i]);
  p.lse = floats(tensors[8]);
  p.softmax_scale = options[0].cast<float>();
  p.window_left = options[1].cast<int64_t>();
  p.window_right = options[2].cast<int64_t>();
  p.softcap = options[3].cast<float>();
  p.dropout_threshold = options[4].cast<uint32_t>();
  p.dropout_scale = options[5].cast<float>();
  p.seed = options[6].cast<uint64_t>();
  // A broadcast key dimension is known by its stride; one key has no use for another.
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
  p.dout = strided(gradients[0]);
  p.dlse = floats(gradients[1]);
  p.dq = strided(gradients[2]);
  p.dk = strided(gradients[3]);
  p.dv = strided(gradients[4]);
  p.dbias = strided(gradients[5]);
  p.dsinks = floats(gradients[6]);
  p.delta = floats(gradients[7]);
  p.dq_sum = strided(gradients[8]);
  const py::gil_scoped_release release;
  attention_bwd_cpu(p, threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &fwd);
  m.def("attention_bwd", &bwd);
}

}  // namespace fastattn
