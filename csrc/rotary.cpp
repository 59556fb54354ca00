// From Python's view of a call to RotaryParams. What a call may be was checked in
// fastattn/ops/rotary.py.
#include "rotary.h"

#include <pybind11/pybind11.h>

#include "program.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {

namespace {

// A Call of fastattn/ops/rotary.py.
void fwd(const py::tuple& tuple, const py::object& out, int threads) {
  PyObject* call = tuple.ptr();
  const Tensor x = tensor_of(item(call, 0)), cos = tensor_of(item(call, 1));
  const Tensor positions = tensor_of(item(call, 3));
  RotaryParams p = {};
  p.batch = x.shape[0];
  p.seqlen = x.shape[1];
  p.nheads = x.shape[2];
  p.head_dim = x.shape[3];
  p.rotary_dim = 2 * cos.shape[cos.ndim - 1];
  p.type = x.type;
  p.table_type = cos.type;
  p.position_type = positions.type;
  p.x = x.strided();
  p.cos = cos.strided();
  p.sin = tensor_of(item(call, 2)).strided();
  p.positions = positions.strided();
  p.out = tensor_of(out.ptr()).data;
  p.own_angles = cos.ndim == 3;
  p.interleaved = item(call, 4) == Py_True;
  p.inverse = item(call, 5) == Py_True;
  launch([=] { rotary_cpu(p, threads); }, tuple, out);
}

}  // namespace

void bind_rotary(py::module_& m) { m.def("rotary_fwd", &fwd); }

}  // namespace fastattn
