// From Python's view of a call to AttentionParams. What a call may be was checked in
// fastattn/ops/attention*.py.
#include "attention.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "program.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastattn {

namespace {

// What all ops share; a NaN-free p of a dense batch without options.
AttentionParams start(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                      PyObject* lse, PyObject* lse_rest) {
  AttentionParams p = {};
  p.type = q.type;
  p.cache_type = k.type;
  p.bias_type = p.sinks_type = Type::kFloat32;
  p.q = q.strided();
  p.k = k.strided();
  p.v = v.strided();
  p.out = out.strided();
  p.lse = array<float>(lse);
  p.lse_rest = array<float>(lse_rest);
  p.dropout_scale = 1.0f;
  return p;
}

// Rank 4: [B, S, H, D].
void set_dense_sizes(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  p.batch = q.shape[0];
  p.seqlen_q = p.lse_stride = q.shape[1];
  p.nheads = q.shape[2];
  p.head_dim = q.shape[3];
  p.seqlen_k = k.shape[1];
  p.nheads_k = k.shape[2];
  p.head_dim_v = v.shape[3];
}

// Rank 3, [T, H, D], as one sequence of a batch of 1.
Tensor as_batch(const Tensor& x) {
  Tensor batch = x;
  batch.ndim = 4;
  batch.shape[0] = 1;
  batch.stride[0] = 0;
  for (int i = 0; i < 3; ++i) {
    batch.shape[i + 1] = x.shape[i];
    batch.stride[i + 1] = x.stride[i];
  }
  return batch;
}

void set_sinks(AttentionParams& p, PyObject* sinks) {
  const Tensor x = tensor_of(sinks);
  p.sinks = x.strided();
  if (x.data) p.sinks_type = x.type;
}

// softmax_scale, window_left, window_right, softcap: four items from `at` on.
void set_options(AttentionParams& p, PyObject* call, int at) {
  p.softmax_scale = real(item(call, at));
  p.window_left = integer(item(call, at + 1));
  p.window_right = integer(item(call, at + 2));
  p.softcap = real(item(call, at + 3));
}

// As `threshold` of fastattn/dropout.py.
void set_dropout(AttentionParams& p, PyObject* dropout_p, PyObject* seed) {
  const double share = PyFloat_AsDouble(dropout_p);
  if (!(share > 0.0)) return;
  const double words = std::nearbyint(share * 4294967296.0);
  p.dropout_threshold = static_cast<uint32_t>(std::min(words, 4294967295.0));
  p.dropout_scale = static_cast<float>(1.0 / (1.0 - share));
  p.seed = static_cast<uint64_t>(*array<int64_t>(seed));
}

// A Call of fastattn/ops/attention.py.
AttentionParams dense_params(PyObject* call, PyObject* out, PyObject* lse, PyObject* lse_rest) {
  const Tensor q = tensor_of(item(call, 0)), k = tensor_of(item(call, 1));
  const Tensor v = tensor_of(item(call, 2)), bias = tensor_of(item(call, 4));
  AttentionParams p = start(q, k, v, tensor_of(out), lse, lse_rest);
  set_dense_sizes(p, q, k, v);
  p.mask = tensor_of(item(call, 3)).broadcast();
  p.bias = bias.broadcast();
  if (bias.data) p.bias_type = bias.type;
  p.alibi = tensor_of(item(call, 5)).strided();
  set_sinks(p, item(call, 6));
  set_options(p, call, 8);
  set_dropout(p, item(call, 12), item(call, 7));
  check_python();
  return p;
}

// A Call of fastattn/ops/attention_varlen.py.
AttentionParams varlen_params(PyObject* call, PyObject* out, PyObject* lse, PyObject* lse_rest) {
  const Tensor q = as_batch(tensor_of(item(call, 0))), k = as_batch(tensor_of(item(call, 1)));
  const Tensor v = as_batch(tensor_of(item(call, 2))), cu_q = tensor_of(item(call, 3));
  AttentionParams p = start(q, k, v, as_batch(tensor_of(out)), lse, lse_rest);
  set_dense_sizes(p, q, k, v);
  p.sequences.count = cu_q.shape[0] - 1;
  p.sequences.cu_seqlens_q = static_cast<const int32_t*>(cu_q.data);
  p.sequences.cu_seqlens_k = array<int32_t>(item(call, 4));
  p.alibi = tensor_of(item(call, 5)).strided();
  set_sinks(p, item(call, 6));
  set_options(p, call, 10);
  set_dropout(p, item(call, 14), item(call, 7));
  check_python();
  return p;
}

// gradients: dout, dlse, dq, dk, dv, dbias, dsinks, delta, dq_sum.
void set_gradients(AttentionParams& p, PyObject* gradients) {
  const auto tensor = [&](int i) {
    const Tensor x = tensor_of(item(gradients, i));
    return x.ndim == 3 ? as_batch(x) : x;
  };
  p.dout = tensor(0).strided();
  p.dlse = array<float>(item(gradients, 1));
  p.dq = tensor(2).strided();
  p.dk = tensor(3).strided();
  p.dv = tensor(4).strided();
  p.dbias = tensor(5).broadcast();
  p.dsinks = array<float>(item(gradients, 6));
  p.delta = array<float>(item(gradients, 7));
  p.dq_sum = tensor(8).strided();
}

using Params = AttentionParams (*)(PyObject*, PyObject*, PyObject*, PyObject*);

template <Params params>
void fwd(const py::tuple& call, const py::object& out, const py::object& lse,
         const py::object& lse_rest, int threads) {
  const AttentionParams p = params(call.ptr(), out.ptr(), lse.ptr(), lse_rest.ptr());
  launch([=] { attention_fwd_cpu(p, threads); }, call, out, lse, lse_rest);
}

template <Params params>
void bwd(const py::tuple& call, const py::object& out, const py::object& lse,
         const py::object& lse_rest, const py::tuple& gradients, int threads) {
  AttentionParams p = params(call.ptr(), out.ptr(), lse.ptr(), lse_rest.ptr());
  set_gradients(p, gradients.ptr());
  launch([=] { attention_bwd_cpu(p, threads); }, call, out, lse, lse_rest, gradients);
}

// Reads the lengths when it runs: the next time they will be others.
void run_decode(AttentionParams p, const CacheUpdate& update, int threads) {
  std::vector<int32_t> seqlens(update.seqlens, update.seqlens + p.batch);
  for (int32_t& n : seqlens) n += static_cast<int32_t>(update.new_keys);
  p.sequences.seqlens_k = seqlens.data();
  attention_decode_cpu(p, update, threads);
}

// A Call of fastattn/ops/attention_decode.py.
void decode(const py::tuple& tuple, const py::object& out, const py::object& lse, int threads) {
  PyObject* call = tuple.ptr();
  const Tensor q = tensor_of(item(call, 0)), k = tensor_of(item(call, 1));
  const Tensor v = tensor_of(item(call, 2)), new_k = tensor_of(item(call, 3));
  const Tensor pages = tensor_of(item(call, 6)), cos = tensor_of(item(call, 9));
  AttentionParams p = start(q, k, v, tensor_of(out.ptr()), lse.ptr(), Py_None);
  set_dense_sizes(p, q, k, v);
  p.k_scale = tensor_of(item(call, 11)).strided();
  p.v_scale = tensor_of(item(call, 12)).strided();
  p.alibi = tensor_of(item(call, 13)).strided();
  set_sinks(p, item(call, 14));
  set_options(p, call, 15);
  p.num_splits = integer(item(call, 21));

  CacheUpdate update = {};
  update.new_keys = new_k.data ? new_k.shape[1] : 0;
  update.k = new_k.strided();
  update.v = tensor_of(item(call, 4)).strided();
  update.seqlens = array<int32_t>(item(call, 5));
  update.rotary_dim = cos.data ? 2 * cos.shape[1] : 0;
  update.cos = cos.strided();
  update.sin = tensor_of(item(call, 10)).strided();
  update.rotary_type = cos.type;
  update.interleaved = item(call, 19) == Py_True;
  update.in_steps = item(call, 20) == Py_True;
  p.sequences.count = p.batch;
  p.sequences.pages = static_cast<const int32_t*>(pages.data);
  p.sequences.pages_stride = pages.data ? pages.stride[0] : 0;
  p.sequences.page_size = pages.data ? k.shape[1] : 0;
  p.sequences.cache_rows = array<int32_t>(item(call, 7));
  p.sequences.first_keys = array<int32_t>(item(call, 8));
  launch([=] { run_decode(p, update, threads); }, tuple, out, lse);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &fwd<dense_params>);
  m.def("attention_bwd", &bwd<dense_params>);
  m.def("attention_varlen_fwd", &fwd<varlen_params>);
  m.def("attention_varlen_bwd", &bwd<varlen_params>);
  m.def("attention_decode", &decode);
}

}  // namespace fastattn
