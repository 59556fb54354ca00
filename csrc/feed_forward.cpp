// From Python's view of a call to FeedForwardParams. What a call may be was checked in
// fastattn/ops/feed_forward.py and fastattn/ops/gated_feed_forward.py.
#include "feed_forward.h"

#include <pybind11/pybind11.h>

#include "linear_call.h"
#include "program.h"

namespace py = pybind11;

namespace fastattn {

namespace {

constexpr uint32_t kOutputPlane = 0, kHiddenPlane = 1;

void set_sizes(FeedForwardParams& p, const Tensor& x, const Tensor& down, PyObject* pre) {
  p.type = x.type;
  p.m = x.shape[0];
  p.k = x.shape[1];
  p.n = down.shape[0];
  p.hidden = down.shape[1];
  p.x = matrix(x);
  p.down = matrix(down);
  p.pre = matrix(tensor_of(pre));
}

// residual, seed, activation, dropout_p, hidden_dropout_p: five items from `at` on.
void set_options(FeedForwardParams& p, PyObject* call, int at) {
  p.residual = matrix(tensor_of(item(call, at)));
  p.activation = activation(item(call, at + 2));
  p.dropout = dropout(item(call, at + 3), item(call, at + 1), kOutputPlane);
  p.hidden_dropout = dropout(item(call, at + 4), item(call, at + 1), kHiddenPlane);
}

// A Call of fastattn/ops/feed_forward.py.
struct Plain {
  static FeedForwardParams params(PyObject* call, PyObject* pre) {
    FeedForwardParams p = {};
    set_sizes(p, tensor_of(item(call, 0)), tensor_of(item(call, 3)), pre);
    p.up = matrix(tensor_of(item(call, 1)));
    p.up_bias = tensor_of(item(call, 2)).data;
    p.down_bias = tensor_of(item(call, 4)).data;
    set_options(p, call, 5);
    return p;
  }
  // dx, dw_up, db_up, dw_down, db_down.
  static void set_gradients(FeedForwardGradients& g, PyObject* gradients,
                            const FeedForwardParams&) {
    g.dup = matrix(tensor_of(item(gradients, 1)));
    g.dup_bias = tensor_of(item(gradients, 2)).data;
    g.ddown = matrix(tensor_of(item(gradients, 3)));
    g.ddown_bias = tensor_of(item(gradients, 4)).data;
  }
};

// A Call of fastattn/ops/gated_feed_forward.py. Without w_up, w_gate holds both, gates first; so do
// its bias and their gradients.
struct Gated {
  static FeedForwardParams params(PyObject* call, PyObject* pre) {
    FeedForwardParams p = {};
    set_sizes(p, tensor_of(item(call, 0)), tensor_of(item(call, 3)), pre);
    p.gate = matrix(tensor_of(item(call, 1)));
    p.up = second(p.gate, matrix(tensor_of(item(call, 2))), p);
    p.gate_bias = tensor_of(item(call, 4)).data;
    p.up_bias = second(p.gate_bias, tensor_of(item(call, 5)).data, item(call, 2), p);
    p.down_bias = tensor_of(item(call, 6)).data;
    set_options(p, call, 7);
    return p;
  }
  // dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down.
  static void set_gradients(FeedForwardGradients& g, PyObject* gradients,
                            const FeedForwardParams& p) {
    const Tensor dgate = tensor_of(item(gradients, 1)), dgate_bias = tensor_of(item(gradients, 4));
    g.dgate = matrix(dgate);
    g.dup = matrix(tensor_of(item(gradients, 2)));
    if (dgate.shape[0] > p.hidden) g.dup = g.dgate.from_row(p.hidden, p.type);
    g.ddown = matrix(tensor_of(item(gradients, 3)));
    g.dgate_bias = dgate_bias.data;
    g.dup_bias = tensor_of(item(gradients, 5)).data;
    if (dgate_bias.shape[0] > p.hidden) {
      g.dup_bias = static_cast<char*>(g.dgate_bias) + p.hidden * size_of(p.type);
    }
    g.ddown_bias = tensor_of(item(gradients, 6)).data;
  }

 private:
  static Matrix second(const Matrix& gate, const Matrix& up, const FeedForwardParams& p) {
    return up.data ? up : gate.from_row(p.hidden, p.type);
  }
  static const void* second(const void* gate, const void* up, PyObject* w_up,
                            const FeedForwardParams& p) {
    if (w_up != Py_None || !gate) return up;
    return static_cast<const char*>(gate) + p.hidden * size_of(p.type);
  }
};

template <class Kind>
void fwd(const py::tuple& call, const py::object& out, const py::object& pre, int threads) {
  FeedForwardParams p = Kind::params(call.ptr(), pre.ptr());
  p.out = matrix(tensor_of(out.ptr()));
  launch([=] { feed_forward_fwd_cpu(p, threads); }, call, out, pre);
}

template <class Kind>
void bwd(const py::object& dout, const py::object& pre, const py::tuple& call,
         const py::tuple& gradients, int threads) {
  const FeedForwardParams p = Kind::params(call.ptr(), pre.ptr());
  FeedForwardGradients g = {};
  g.dout = matrix(tensor_of(dout.ptr()));
  g.dx = matrix(tensor_of(item(gradients.ptr(), 0)));
  Kind::set_gradients(g, gradients.ptr(), p);
  launch([=] { feed_forward_bwd_cpu(p, g, threads); }, dout, pre, call, gradients);
}

}  // namespace

void bind_feed_forward(py::module_& m) {
  m.def("feed_forward_fwd", &fwd<Plain>);
  m.def("feed_forward_bwd", &bwd<Plain>);
  m.def("gated_feed_forward_fwd", &fwd<Gated>);
  m.def("gated_feed_forward_bwd", &bwd<Gated>);
}

}  // namespace fastattn
