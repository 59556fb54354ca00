// From Python's view of a call to LinearParams. What a call may be was checked in
// fastattn/ops/linear.py.
#include "linear.h"

#include <pybind11/pybind11.h>

#include "linear_call.h"
#include "program.h"

namespace py = pybind11;

namespace fastattn {

namespace {

// A Call of fastattn/ops/linear.py.
LinearParams params_of(PyObject* call, PyObject* pre) {
  const Tensor x = tensor_of(item(call, 0)), weight = tensor_of(item(call, 1));
  LinearParams p = {};
  p.type = x.type;
  p.m = x.shape[0];
  p.k = x.shape[1];
  p.n = weight.shape[0];
  p.x = matrix(x);
  p.weight = matrix(weight);
  p.bias = tensor_of(item(call, 2)).data;
  p.residual = matrix(tensor_of(item(call, 3)));
  p.dropout = dropout(item(call, 6), item(call, 4), 0);
  p.activation = activation(item(call, 5));
  p.pre = matrix(tensor_of(pre));
  return p;
}

void fwd(const py::tuple& call, const py::object& out, const py::object& pre, int threads) {
  LinearParams p = params_of(call.ptr(), pre.ptr());
  p.out = matrix(tensor_of(out.ptr()));
  launch([=] { linear_fwd_cpu(p, threads); }, call, out, pre);
}

// gradients: dx, dweight, dbias.
void bwd(const py::object& dout, const py::object& pre, const py::tuple& call,
         const py::tuple& gradients, int threads) {
  const LinearParams p = params_of(call.ptr(), pre.ptr());
  LinearGradients g = {};
  g.dout = matrix(tensor_of(dout.ptr()));
  g.dx = matrix(tensor_of(item(gradients.ptr(), 0)));
  g.dweight = matrix(tensor_of(item(gradients.ptr(), 1)));
  g.dbias = tensor_of(item(gradients.ptr(), 2)).data;
  launch([=] { linear_bwd_cpu(p, g, threads); }, dout, pre, call, gradients);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_fwd", &fwd);
  m.def("linear_bwd", &bwd);
}

}  // namespace fastattn
