// The CUDA attention kernels on the emulator, as a library for ctypes (test_emulated_attention.py).
#include <cstring>

#include "../../csrc/attention.h"
#include "../../csrc/cuda/launch.h"

using namespace fastattn;

extern "C" {

struct Array {
  void* data;  // null: not given
  int64_t size[4], stride[4];
  int32_t type;
};

struct EmulatedCall {
  Array q, k, v, out, lse, lse_rest, mask, bias, alibi, sinks;
  double softmax_scale, softcap, dropout_scale;
  int64_t window_left, window_right, dropout_threshold, seed;
  int64_t mma, ldmatrix_conflicts, shared_conflicts;  // what the emulator counted
  char message[1024];                                 // what it found; empty: nothing
};

void emulated_attention_fwd(EmulatedCall* call);
}

namespace {

Strided strided(const Array& x) {
  Strided result = {x.data, {}};
  for (int i = 0; i < 4; ++i) result.stride[i] = x.size[i] == 1 ? 0 : x.stride[i];
  return result;
}

void add_range(emulation::Session& session, const char* name, const Array& x, bool writable) {
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) {
    if (x.size[i] == 0) return;
    last += (x.size[i] - 1) * x.stride[i];
  }
  const int64_t bytes = (last + 1) * size_of(static_cast<Type>(x.type));
  if (x.data) session.ranges.push_back({name, x.data, static_cast<size_t>(bytes), writable});
}

AttentionParams params(const EmulatedCall& call) {
  AttentionParams p = {};
  p.batch = call.q.size[0];
  p.seqlen_q = p.lse_stride = call.q.size[1];
  p.nheads = call.q.size[2];
  p.head_dim = call.q.size[3];
  p.seqlen_k = call.k.size[1];
  p.nheads_k = call.k.size[2];
  p.head_dim_v = call.v.size[3];
  p.type = p.cache_type = static_cast<Type>(call.q.type);
  p.q = strided(call.q);
  p.k = strided(call.k);
  p.v = strided(call.v);
  p.out = strided(call.out);
  p.lse = static_cast<float*>(call.lse.data);
  p.lse_rest = static_cast<float*>(call.lse_rest.data);
  p.mask = strided(call.mask);
  p.bias = strided(call.bias);
  p.bias_type = static_cast<Type>(call.bias.type);
  p.alibi = strided(call.alibi);
  p.sinks = strided(call.sinks);
  p.sinks_type = static_cast<Type>(call.sinks.type);
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  p.softcap = static_cast<float>(call.softcap);
  p.window_left = call.window_left;
  p.window_right = call.window_right;
  p.dropout_threshold = static_cast<uint32_t>(call.dropout_threshold);
  p.dropout_scale = static_cast<float>(call.dropout_scale);
  p.seed = static_cast<uint64_t>(call.seed);
  return p;
}

}  // namespace

void emulated_attention_fwd(EmulatedCall* call) {
  emulation::Session session;
  add_range(session, "q", call->q, false);
  add_range(session, "k", call->k, false);
  add_range(session, "v", call->v, false);
  add_range(session, "mask", call->mask, false);
  add_range(session, "bias", call->bias, false);
  add_range(session, "alibi", call->alibi, false);
  add_range(session, "sinks", call->sinks, false);
  add_range(session, "out", call->out, true);
  add_range(session, "lse", call->lse, true);
  add_range(session, "lse_rest", call->lse_rest, true);
  call->message[0] = 0;
  try {
    attention_fwd_cuda(params(*call), &session);
  } catch (const std::exception& problem) {
    std::strncpy(call->message, problem.what(), sizeof(call->message) - 1);
  }
  call->mma = session.counters.mma;
  call->ldmatrix_conflicts = session.counters.ldmatrix_conflicts;
  call->shared_conflicts = session.counters.shared_conflicts;
}
