// From Python's view of a call to NormParams. What a call may be was checked in
// fastattn/ops/layer_norm.py and fastattn/ops/rms_norm.py.
#include "norm.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "program.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {

namespace {

// As [M, N]: what is not is contiguous.
Strided rows_of(const Tensor& x) {
  Strided rows;
  rows.data = x.data;
  rows.stride[0] = x.ndim == 2 ? x.stride[0] : x.shape[std::max(x.ndim, 1) - 1];
  rows.stride[1] = 1;
  return rows;
}

// What a row is and what it is scaled by; both Calls begin with x and weight.
NormParams start(PyObject* call) {
  const Tensor x = tensor_of(item(call, 0)), weight = tensor_of(item(call, 1));
  NormParams p = {};
  p.rows = 1;
  for (int i = 0; i < x.ndim - 1; ++i) p.rows *= x.shape[i];
  p.columns = x.shape[x.ndim - 1];
  p.type = x.type;
  p.x = rows_of(x);
  p.weight = weight.data;
  p.weight_type = weight.type;
  return p;
}

// A Call of fastattn/ops/layer_norm.py.
NormParams layer_params(PyObject* call) {
  NormParams p = start(call);
  const Tensor bias = tensor_of(item(call, 2));
  p.centered = true;
  p.bias = bias.data;
  p.bias_type = bias.type;
  p.residual = rows_of(tensor_of(item(call, 3)));
  p.eps = real(item(call, 4));
  return p;
}

// A Call of fastattn/ops/rms_norm.py.
NormParams rms_params(PyObject* call) {
  NormParams p = start(call);
  p.residual = rows_of(tensor_of(item(call, 2)));
  p.eps = real(item(call, 3));
  p.weight_offset = real(item(call, 4));
  return p;
}

using Params = NormParams (*)(PyObject*);

template <Params params>
void fwd(const py::tuple& call, const py::object& out, const py::object& total,
         const py::object& mean, const py::object& rstd, int threads) {
  NormParams p = params(call.ptr());
  p.out = tensor_of(out.ptr()).data;
  p.total = tensor_of(total.ptr()).data;
  p.mean = array<float>(mean.ptr());
  p.rstd = array<float>(rstd.ptr());
  launch([=] { norm_fwd_cpu(p, threads); }, call, out, total, mean, rstd);
}

// gradients: dout, dtotal, mean, rstd, dx, dweight, dbias; the Call's x is what was normalised.
template <Params params>
void bwd(const py::tuple& call, const py::tuple& gradients, int threads) {
  NormParams p = params(call.ptr());
  const auto tensor = [&](int i) { return tensor_of(item(gradients.ptr(), i)); };
  p.dout = rows_of(tensor(0));
  p.dtotal = rows_of(tensor(1));
  p.mean = static_cast<float*>(tensor(2).data);
  p.rstd = static_cast<float*>(tensor(3).data);
  p.dx = tensor(4).data;
  p.dweight = tensor(5).data;
  p.dbias = tensor(6).data;
  launch([=] { norm_bwd_cpu(p, threads); }, call, gradients);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("layer_norm_fwd", &fwd<layer_params>);
  m.def("layer_norm_bwd", &bwd<layer_params>);
  m.def("rms_norm_fwd", &fwd<rms_params>);
  m.def("rms_norm_bwd", &bwd<rms_params>);
}

}  // namespace fastattn
