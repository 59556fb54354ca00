// One small call of the attention kernel on the emulator; prints "right", "wrong" or what was
// found.
#include <cstdio>
#include <random>
#include <vector>

#include "csrc/cuda/attention_sm80.cuh"
#include "csrc/cuda/launch.h"

using namespace fastattn;
using ptx::Bf16;

namespace {

constexpr int kQ = 50, kK = 70,
              kD = 64;  // one block of rows; keys: 3 blocks of 32, the last not full
using Config = AttentionConfig<Bf16, kD, 4, 1, 32, 2, false>;

Strided rows(std::vector<uint16_t>& x) {
  Strided result;
  result.data = x.data();
  result.stride[1] = kD;
  return result;
}

}  // namespace

int main() {
  std::mt19937 random;
  std::vector<uint16_t> q(kQ * kD), k(kK * kD), v(kK * kD), out(kQ * kD);
  for (auto* x : {&q, &k, &v}) {
    for (uint16_t& value : *x)
      value = Bf16::round(static_cast<float>(random() % 2001) / 500.0f - 2);
  }
  AttentionParams p = {};
  p.batch = p.nheads = p.nheads_k = 1;
  p.seqlen_q = kQ;
  p.seqlen_k = kK;
  p.head_dim = p.head_dim_v = kD;
  p.q = rows(q);
  p.k = rows(k);
  p.v = rows(v);
  p.out = rows(out);
  p.softmax_scale = 0.125f;
  p.window_left = p.window_right = -1;
  p.dropout_scale = 1.0f;
  emulation::Session session;
  session.ranges = {{"q", q.data(), 2 * q.size(), false},
                    {"k", k.data(), 2 * k.size(), false},
                    {"v", v.data(), 2 * v.size(), false},
                    {"out", out.data(), 2 * out.size(), true}};
  try {
    launch(attention_fwd_kernel<Config>, 1, Config::kThreads, Config::kSharedBytes, &session, p,
           true);
  } catch (const emulation::Fault& problem) {
    std::printf("fault: %s\n", problem.what());
    return 0;
  }
  uint32_t hash = 2166136261u;
  for (const uint16_t bits : out) hash = (hash ^ bits) * 16777619u;
  std::printf("out: %08x\n", hash);
}
