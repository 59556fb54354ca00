// Writing to a KV cache: new keys are rotated, converted and put where their sequence keeps them.
#pragma once

#include "../attention.h"
#include "attention_keys.inl.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
void load_row_as_float(const T* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, load(from + c, lanes), lanes);
  }
}

// Turns the pairs of a head by their angles at a position.
inline void rotate_pairs(float* x, const float* cos, const float* sin, int64_t pairs,
                         bool interleaved) {
  const int64_t next = interleaved ? 1 : pairs, step = interleaved ? 2 : 1;
  for (int64_t i = 0; i < pairs; ++i) {
    float *low = x + i * step, *high = low + next;
    const float a = *low, b = *high;
    *low = a * cos[i] - b * sin[i];
    *high = b * cos[i] + a * sin[i];
  }
}

template <class T>
void rotate_row(const CacheUpdate& update, int64_t position, float* x) {
  const int64_t pairs = update.rotary_dim / 2;
  if (!pairs) return;
  float angles[2][kMaxHeadDim / 2];
  for (int i = 0; i < 2; ++i) {
    const Strided& table = i ? update.sin : update.cos;
    const int64_t at = position * table.stride[0];
    if (update.rotary_type == Type::kFloat32) {
      load_row_as_float(static_cast<const float*>(table.data) + at, pairs, angles[i]);
    } else {
      load_row_as_float(static_cast<const T*>(table.data) + at, pairs, angles[i]);
    }
  }
  rotate_pairs(x, angles[0], angles[1], pairs, update.interleaved);
}

template <class TK>
void store_cached(const float* x, int64_t n, TK* to, float*) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, load(x + c, lanes), lanes);
  }
}

// Symmetric: the largest value of the row becomes 127.
inline void store_cached(const float* x, int64_t n, int8_t* to, float* scale) {
  Vec top = zero();
  for (int64_t c = 0; c < n; c += kWidth) {
    top = max(top, abs(load(x + c, static_cast<int>(smaller(n - c, kWidth)))));
  }
  *scale = largest(top) / 127.0f;
  const Vec by = broadcast(*scale > 0.0f ? *scale : 1.0f);
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, round_even(load(x + c, lanes) / by), lanes);
  }
}

// One row of k or v on its way to the cache: rounded to T first, as a model's own rotation would.
template <class T, class TK>
void append_row(const AttentionParams& p, const Strided& cache, const Strided& scale, int64_t hk,
                int64_t key, const T* from, int64_t n, const CacheUpdate* rotation) {
  float x[kMaxHeadDim];
  load_row_as_float(from, n, x);
  if (rotation) {
    rotate_row<T>(*rotation, key, x);
    T rounded[kMaxHeadDim];
    for (int64_t c = 0; c < n; c += kWidth) {
      const int lanes = static_cast<int>(smaller(n - c, kWidth));
      store(rounded + c, load(x + c, lanes), lanes);
    }
    load_row_as_float(rounded, n, x);
  }
  TK* to = static_cast<TK*>(cache.data) + key_offset(p, cache, hk, key);
  float* to_scale =
      scale.data ? static_cast<float*>(scale.data) + key_offset(p, scale, hk, key) : nullptr;
  store_cached(x, n, to, to_scale);
}

// `p` is the call of sequence b, whose keys are counted from the start of the cache.
template <class T, class TK>
void attention_append(const AttentionParams& p, const CacheUpdate& update, int64_t b, int64_t i) {
  const int64_t key = update.seqlens[b] + i;
  const T* k =
      static_cast<const T*>(update.k.data) + b * update.k.stride[0] + i * update.k.stride[1];
  const T* v =
      static_cast<const T*>(update.v.data) + b * update.v.stride[0] + i * update.v.stride[1];
  for (int64_t hk = 0; hk < p.nheads_k; ++hk) {
    append_row<T, TK>(p, p.k, p.k_scale, hk, key, k + hk * update.k.stride[2], p.head_dim, &update);
    append_row<T, TK>(p, p.v, p.v_scale, hk, key, v + hk * update.v.stride[2], p.head_dim_v,
                      nullptr);
  }
}

template <class T>
void attention_rotate_q(const AttentionParams& p, const CacheUpdate& update, int64_t b, int64_t i,
                        void* q) {
  const int64_t position = update.seqlens[b] + (update.in_steps ? i : 0);
  const T* from = static_cast<const T*>(p.q.data) + b * p.q.stride[0] + i * p.q.stride[1];
  T* to = static_cast<T*>(q) + (b * p.seqlen_q + i) * p.nheads * p.head_dim;
  float x[kMaxHeadDim];
  for (int64_t h = 0; h < p.nheads; ++h) {
    load_row_as_float(from + h * p.q.stride[2], p.head_dim, x);
    rotate_row<T>(update, position, x);
    convert_row(x, p.head_dim, 1.0f, to + h * p.head_dim);
  }
}

}  // namespace fastattn::FASTATTN_ISA
