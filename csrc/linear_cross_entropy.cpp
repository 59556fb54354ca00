// From Python's view of a call to CrossEntropyParams. What a call may be was checked in
// fastattn/ops/linear_cross_entropy.py.
#include "linear_cross_entropy.h"

#include <pybind11/pybind11.h>

#include "linear_call.h"
#include "program.h"

namespace py = pybind11;

namespace fastattn {

namespace {

// A Call of fastattn/ops/linear_cross_entropy.py.
CrossEntropyParams params_of(PyObject* call) {
  const Tensor x = tensor_of(item(call, 0)), weight = tensor_of(item(call, 1));
  CrossEntropyParams p = {};
  p.type = x.type;
  p.m = x.shape[0];
  p.k = x.shape[1];
  p.n = weight.shape[0];
  p.x = matrix(x);
  p.weight = matrix(weight);
  p.target = array<int64_t>(item(call, 2));
  p.bias = tensor_of(item(call, 3)).data;
  p.class_weight = array<float>(item(call, 4));
  p.ignore_index = integer(item(call, 5));
  p.label_smoothing = real(item(call, 6));
  p.z_loss = real(item(call, 7));
  p.softcap = real(item(call, 8));
  return p;
}

void fwd(const py::tuple& call, const py::object& loss, const py::object& lse, int threads) {
  const CrossEntropyParams p = params_of(call.ptr());
  float* losses = array<float>(loss.ptr());
  double* sums = array<double>(lse.ptr());
  launch([=] { linear_cross_entropy_fwd_cpu(p, losses, sums, threads); }, call, loss, lse);
}

// gradients: dx, dweight, dbias.
void bwd(const py::object& dloss, const py::object& lse, const py::tuple& call,
         const py::tuple& gradients, int threads) {
  const CrossEntropyParams p = params_of(call.ptr());
  CrossEntropyGradients g = {};
  g.dloss = array<float>(dloss.ptr());
  g.lse = array<double>(lse.ptr());
  g.dx = matrix(tensor_of(item(gradients.ptr(), 0)));
  g.dweight = matrix(tensor_of(item(gradients.ptr(), 1)));
  g.dbias = tensor_of(item(gradients.ptr(), 2)).data;
  launch([=] { linear_cross_entropy_bwd_cpu(p, g, threads); }, dloss, lse, call, gradients);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_fwd", &fwd);
  m.def("linear_cross_entropy_bwd", &bwd);
}

}  // namespace fastattn
