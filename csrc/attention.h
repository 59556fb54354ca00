// The border between host and kernels: what one call of attention is, in raw pointers.
#pragma once

#include "params.h"

namespace fastattn {

// Sequences that differ in length or whose keys lie in a cache. All null: a dense batch.
struct Sequences {
  int64_t count;                // B
  const int32_t* cu_seqlens_q;  // [B + 1]; q, out, lse and their gradients are one run of Tq rows
  const int32_t* cu_seqlens_k;  // [B + 1]; k, v and their gradients are one run of Tk rows
  const int32_t* seqlens_k;     // [B], keys of the cache that are in use
  const int32_t* first_keys;    // [B], the first of them that is seen
  const int32_t* cache_rows;    // [B], the row of the cache that a sequence uses
  const int32_t* pages;         // [B, pages_stride], where page i of a sequence lies
  int64_t pages_stride, page_size;

  bool ragged() const { return cu_seqlens_q || seqlens_k; }
};

struct AttentionParams {
  int64_t batch, nheads, nheads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;
  Type type;        // of q, k, v, out and their gradients
  Type cache_type;  // of k and v where they are a cache, else type
  Strided q;        // [B, Sq, H, D], last stride 1
  Strided k;        // [B, Sk, Hk, D], last stride 1; pages [N, page_size, Hk, D]
  Strided v;        // [B, Sk, Hk, Dv], last stride 1; pages [N, page_size, Hk, Dv]
  Strided
      k_scale;  // float [B, Sk, Hk] or pages, what an int8 key is multiplied by; data null: none
  Strided v_scale;
  Strided out;         // [B, Sq, H, Dv], last stride 1
  float* lse;          // [B, H, Sq], natural logarithm; null: not wanted (forward)
  float* lse_rest;     // [B, H, Sq], what lse lacks of its unrounded self, in units of log2; null:
                       // no backward follows
  int64_t lse_stride;  // of a head in lse, lse_rest, dlse and delta
  Strided mask;        // bool [B, H, Sq, Sk], last stride 0 or 1; data null: none
  Strided bias;        // [B, H, Sq, Sk], last stride 0 or 1; data null: none
  Type bias_type;      // type, or kFloat32
  Strided alibi;       // float [B, H]; data null: none
  Strided sinks;       // [H]; data null: none
  Type sinks_type;     // type, or kFloat32
  float softmax_scale;
  int64_t window_left, window_right;  // tokens; -1: unbounded; causal is right = 0
  float softcap;                      // 0: none
  uint32_t dropout_threshold;         // a position whose random word is below is dropped; 0: none
  float dropout_scale;                // 1 / (1 - p)
  uint64_t seed;
  int64_t first_plane;  // head h of sequence b draws from plane first_plane + b * H + h
  int64_t num_splits;   // pieces that few rows' keys are cut into; 0: by their number
  Sequences sequences;

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

  int64_t count() const { return sequences.ragged() ? sequences.count : batch; }
  constexpr int64_t groups() const { return nheads_k ? nheads / nheads_k : 1; }
  int64_t rows() const { return groups() * seqlen_q; }  // query rows of one KV head

  // The keys [begin, end) that query i of a sequence may see by causality and window.
  constexpr int64_t visible_begin(int64_t i) const {
    if (window_left < 0) return 0;
    const int64_t at = i + seqlen_k - seqlen_q - window_left;
    return at < 0 ? 0 : (at < seqlen_k ? at : seqlen_k);
  }
  constexpr int64_t visible_end(int64_t i) const {
    if (window_right < 0) return seqlen_k;
    const int64_t at = i + seqlen_k - seqlen_q + window_right + 1;
    return at < 0 ? 0 : (at < seqlen_k ? at : seqlen_k);
  }
};

// Keys that are written into a cache before it is read, and the rotation of new keys and queries.
struct CacheUpdate {
  int64_t new_keys;        // 0: none
  Strided k;               // [B, new_keys, Hk, D], in q's type
  Strided v;               // [B, new_keys, Hk, Dv]
  const int32_t* seqlens;  // [B], keys in the cache before
  int64_t rotary_dim;      // the first values of a head, which are rotated; 0: none
  Strided cos, sin;        // [positions, rotary_dim / 2]
  Type rotary_type;        // q's, or kFloat32
  bool interleaved;        // pairs are neighbours, not halves
  bool in_steps;           // query i stands at seqlens + i, else all at seqlens
};

// out and lse from q, k, v, on at most so many threads.
void attention_fwd_cpu(const AttentionParams& p, int threads);
// dq, dk, dv, dbias, dsinks. dq_sum and dbias must hold zeros.
void attention_bwd_cpu(const AttentionParams& p, int threads);
// Updates the cache, then runs forward on it; sequences.seqlens_k counts the new keys too.
void attention_decode_cpu(const AttentionParams& p, const CacheUpdate& update, int threads);
// out and lse of a dense batch on a CUDA device, in order with what else is on the stream.
void attention_fwd_cuda(const AttentionParams& p, void* stream);

}  // namespace fastattn
