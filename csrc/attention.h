// The border between host and kernels: what one call of attention is, in raw pointers.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int kTypes = 3;

// A tensor without its type. Strides are in elements; a broadcast dimension has stride 0.
struct Strided {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

struct AttentionParams {
  int64_t batch, nheads, nheads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;
  Type type;        // of q, k, v, out and their gradients
  Strided q;        // [B, Sq, H, D], last stride 1
  Strided k;        // [B, Sk, Hk, D], last stride 1
  Strided v;        // [B, Sk, Hk, Dv], last stride 1
  Strided out;      // [B, Sq, H, Dv], last stride 1
  float* lse;       // [B, H, Sq], natural logarithm; null: not wanted (forward)
  float* lse_rest;  // [B, H, Sq], what lse lacks of its unrounded self, in units of log2; null:
                    // no backward follows
  Strided mask;     // bool [B, H, Sq, Sk], last stride 0 or 1; data null: none
  Strided bias;     // [B, H, Sq, Sk], last stride 0 or 1; data null: none
  Type bias_type;   // type, or kFloat32
  Strided alibi;    // float [B, H]; data null: none
  Strided sinks;    // [H]; data null: none
  Type sinks_type;  // type, or kFloat32
  float softmax_scale;
  int64_t window_left, window_right;  // tokens; -1: unbounded; causal is right = 0
  float softcap;                      // 0: none
  uint32_t dropout_threshold;         // a position whose random word is below is dropped; 0: none
  float dropout_scale;                // 1 / (1 - p)
  uint64_t seed;

  // Backward only.
  Strided dout;   // [B, Sq, H, Dv], last stride 1
  float* dlse;    // [B, H, Sq]
  Strided dq;     // [B, Sq, H, D]
  Strided dk;     // [B, Sk, Hk, D]
  Strided dv;     // [B, Sk, Hk, Dv]
  Strided dbias;  // float, strides of the gradient's own [B, H, Sq, Sk], 0 where summed; null: none
  float* dsinks;  // [H]; null: none
  float* delta;   // workspace [B, H, Sq]: sum of dout * out, less dlse
  Strided dq_sum;  // workspace, float [B, Sq, H, D]; dq itself where its type is float

  // The keys [begin, end) that query i may see by causality and window.
  int64_t visible_begin(int64_t i) const {
    if (window_left < 0) return 0;
    const int64_t at = i + seqlen_k - seqlen_q - window_left;
    return at < 0 ? 0 : (at < seqlen_k ? at : seqlen_k);
  }
  int64_t visible_end(int64_t i) const {
    if (window_right < 0) return seqlen_k;
    const int64_t at = i + seqlen_k - seqlen_q + window_right + 1;
    return at < 0 ? 0 : (at < seqlen_k ? at : seqlen_k);
  }
  int64_t groups() const { return nheads_k ? nheads / nheads_k : 1; }
  int64_t rows() const { return groups() * seqlen_q; }  // query rows of one KV head
};

// out and lse from q, k, v, on at most so many threads.
void attention_fwd_cpu(const AttentionParams& p, int threads);
// dq, dk, dv, dbias, dsinks. dq_sum and dbias must hold zeros.
void attention_bwd_cpu(const AttentionParams& p, int threads);

}  // namespace fastattn
