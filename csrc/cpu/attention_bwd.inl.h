// Attention backward for one block of keys of one KV head, all its rows in turn.
//
// With P = 2^(score - lse) and delta = sum(dout * out) - dlse, for a block of rows:
//     S = Q K^T, dP = dO V^T        per tile of kMaxTileRows rows
//     dS = P (dP - delta)           bias gradient; then times softcap's slope and the scale
//     dQ += dS K                    into memory, blocks of keys in their order
//     dV += P^T dO, dK += dS^T Q    kept in L2 until the block of keys is done
// Five products, nothing computed twice. Q and dO are packed anew for each block of keys: with N
// keys to a block that is about 4 passes over them against 5 N / 32 cycles of FMA an element, 2 to
// 5 %.
//
// Deterministic: dQ rows take the blocks of keys in order (cpu/attention.cpp makes them wait), dK
// and dV take the rows in order.
#pragma once

#include "../attention.h"
#include "attention_fwd.inl.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
struct BwdSizes {
  using Math = typename MathOf<T>::type;
  int64_t key_block, row_block, tiles;
  int64_t d_steps, dv_steps, d_columns, dv_columns;
  explicit BwdSizes(const AttentionParams& p)
      : d_steps(ceil_div(p.head_dim, Math::kStep)),
        dv_steps(ceil_div(p.head_dim_v, Math::kStep)),
        d_columns(round_up(p.head_dim, kPanel)),
        dv_columns(round_up(p.head_dim_v, kPanel)) {
    const int64_t dims = p.head_dim + p.head_dim_v;
    // 224 = 16 tiles of 14; the rest of the table keeps all operands of a block within 1 MB of L2.
    key_block = dims <= 128 ? 224 : dims <= 256 ? 128 : dims <= 512 ? 64 : 32;
    tiles = (dims <= 256 ? 112 : 56) / kMaxTileRows;
    row_block = tiles * kMaxTileRows;
  }
  int64_t row_steps() const { return ceil_div(row_block, Math::kStep); }
  int64_t key_steps() const { return key_block / Math::kStep; }
  int64_t total() const {
    return key_block * (d_steps + dv_steps + d_columns + dv_columns) + key_steps() * d_columns +
           row_block * (d_steps + dv_steps) + row_steps() * (d_columns + dv_columns) +
           2 * (row_block + kMaxTileRows) * kScoreStride +
           kMaxTileRows * (3 * kScoreStride + d_columns);
  }
};

// One call's share of a thread's scratch.
template <class T>
struct BwdScratch {
  float *k_t, *v_t, *k_rows, *dk, *dv;                       // one block of keys
  float *q_t, *do_t, *q_rows, *do_rows, *weights, *dscores;  // one block of rows
  float *s_tile, *dp_tile, *slope, *dq_tile;                 // one tile
  BwdScratch(const BwdSizes<T>& size, float* p) {
    const auto take = [&](int64_t n) {
      float* at = p;
      p += n;
      return at;
    };
    dk = take(size.key_block * size.d_columns);
    dv = take(size.key_block * size.dv_columns);
    k_t = take(size.key_block * size.d_steps);
    v_t = take(size.key_block * size.dv_steps);
    k_rows = take(size.key_steps() * size.d_columns);
    q_t = take(size.row_block * size.d_steps);
    do_t = take(size.row_block * size.dv_steps);
    q_rows = take(size.row_steps() * size.d_columns);
    do_rows = take(size.row_steps() * size.dv_columns);
    weights = take((size.row_block + kMaxTileRows) * kScoreStride);
    dscores = take((size.row_block + kMaxTileRows) * kScoreStride);
    s_tile = take(kMaxTileRows * kScoreStride);
    dp_tile = take(kMaxTileRows * kScoreStride);
    slope = take(kMaxTileRows * kScoreStride);
    dq_tile = take(kMaxTileRows * size.d_columns);
  }
};

template <class T>
void attention_bwd_delta(const AttentionParams& p, int64_t b, int64_t h) {
  for (int64_t i = 0; i < p.seqlen_q; ++i) {
    const T* o = static_cast<const T*>(p.out.data) + b * p.out.stride[0] + i * p.out.stride[1] +
                 h * p.out.stride[2];
    const T* d = static_cast<const T*>(p.dout.data) + b * p.dout.stride[0] + i * p.dout.stride[1] +
                 h * p.dout.stride[2];
    Vec total = zero();
    for (int64_t c = 0; c < p.head_dim_v; c += kWidth) {
      const int n = static_cast<int>(smaller(p.head_dim_v - c, kWidth));
      total = fma(load(o + c, n), load(d + c, n), total);
    }
    const int64_t at = (b * p.nheads + h) * p.seqlen_q + i;
    p.delta[at] = sum(total) - p.dlse[at];
  }
}

// A sink takes weight e^(sink - lse) and gives no value, so its gradient is -weight * delta.
template <class T>
void attention_bwd_sinks(const AttentionParams& p, int64_t h) {
  const float sink = sink_log2<T>(p, h);
  double total = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      const int64_t at = (b * p.nheads + h) * p.seqlen_q + i;
      if (sink == -kInfinity) continue;
      total -= exp2_scalar(sink - p.lse[at] * kLog2E) * p.delta[at];
    }
  }
  p.dsinks[h] = static_cast<float>(total);
}

template <class T>
void attention_bwd_begin(const AttentionParams& p, int64_t b, int64_t hk, int64_t key_begin,
                         float* scratch) {
  using Math = typename MathOf<T>::type;
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const int64_t n = smaller(size.key_block, p.seqlen_k - key_begin);
  const T* k = static_cast<const T*>(p.k.data) + b * p.k.stride[0] + key_begin * p.k.stride[1] +
               hk * p.k.stride[2];
  const T* v = static_cast<const T*>(p.v.data) + b * p.v.stride[0] + key_begin * p.v.stride[1] +
               hk * p.v.stride[2];
  for (int64_t c = 0; c < size.key_block; c += kPanel) {
    pack_transposed<Math, kPanel>([&](int64_t i) { return k + (c + i) * p.k.stride[1]; }, n - c,
                                  p.head_dim, local.k_t + c * size.d_steps);
    pack_transposed<Math, kPanel>([&](int64_t i) { return v + (c + i) * p.v.stride[1]; }, n - c,
                                  p.head_dim_v, local.v_t + c * size.dv_steps);
  }
  pack_rows<Math>([&](int64_t i) { return k + i * p.k.stride[1]; }, n, p.head_dim, size.key_steps(),
                  local.k_rows);
  std::memset(local.dk, 0, static_cast<size_t>(size.key_block * size.d_columns) * 4);
  std::memset(local.dv, 0, static_cast<size_t>(size.key_block * size.dv_columns) * 4);
}

// S and dP of one row, in place, become P and dS.
inline void differentiate_row(const HeadRows& rows, int64_t row, int64_t key, Columns columns,
                              float factor, float* s, float* dp, const float* slope) {
  const AttentionParams& p = rows.p;
  const int64_t flat = rows.flat(row);
  const float lse = p.lse[flat] == -kInfinity ? kInfinity : p.lse[flat] * kLog2E;
  const Vec shift = broadcast(-lse), scale = broadcast(factor), delta = broadcast(p.delta[flat]);
  alignas(64) float kept[kScoreStride];
  if (p.dropout_threshold) {
    for (int64_t c = columns.begin; c < columns.end; ++c) kept[c] = 1.0f;
    drop_row(rows, row, key, columns, kept);
  }
  float* dbias = static_cast<float*>(p.dbias.data);
  if (dbias) {
    dbias += rows.b * p.dbias.stride[0] + rows.head(row) * p.dbias.stride[1] +
             rows.query(row) * p.dbias.stride[2];
  }
  for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
    Vec weight = exp2<5>(fma(load(s + c), scale, shift));
    Vec dweight = load(dp + c);
    if (p.dropout_threshold) dweight = dweight * load(kept + c);
    Vec ds = weight * (dweight - delta);
    if (p.dropout_threshold) weight = weight * load(kept + c);
    store(s + c, weight);
    const int64_t n = smaller(p.seqlen_k - key - c, kWidth);
    if (dbias && n > 0) {
      float* to = dbias + (key + c) * p.dbias.stride[3];
      const int lanes = static_cast<int>(n);
      if (p.dbias.stride[3]) {
        store(to, load(to, lanes) + ds, lanes);
      } else {
        *to += sum(ds);
      }
    }
    if (slope) ds = ds * load(slope + c);
    store(dp + c, ds * broadcast(p.softmax_scale));
  }
}

inline void clear_outside(float* row, Columns columns, int64_t n) {
  for (int64_t c = 0; c < columns.begin; c += kWidth) store(row + c, zero());
  for (int64_t c = columns.end; c < n; c += kWidth) store(row + c, zero());
}

// One tile: fills its rows of weights and dscores over the whole block of keys, and adds to dQ.
template <class T>
void bwd_tile(const HeadRows& rows, const BwdSizes<T>& size, const BwdScratch<T>& local,
              int64_t row_begin, int64_t t, int64_t m, int64_t key, Columns columns) {
  using Math = typename MathOf<T>::type;
  constexpr bool kPairs = Math::kStep == 2;
  const AttentionParams& p = rows.p;
  const int64_t n = columns.end - columns.begin, row = row_begin + t;
  // Floats are worked on where they stay; pairs are made from a tile of floats.
  float* s = kPairs ? local.s_tile : local.weights + t * kScoreStride;
  float* dp = kPairs ? local.dp_tile : local.dscores + t * kScoreStride;
  float* slope = p.softcap > 0.0f ? local.slope : nullptr;

  if (!columns.empty()) {
    gemm_rows<Math, 1>(m, n, size.d_steps, local.q_t + t * size.d_steps, kMaxTileRows,
                       local.k_t + columns.begin * size.d_steps, kPanel * size.d_steps,
                       s + columns.begin, kScoreStride, false);
    gemm_rows<Math, 1>(m, n, size.dv_steps, local.do_t + t * size.dv_steps, kMaxTileRows,
                       local.v_t + columns.begin * size.dv_steps, kPanel * size.dv_steps,
                       dp + columns.begin, kScoreStride, false);
    const float factor = finish_scores<T>(rows, row, m, key, columns, s, slope);
    for (int64_t i = 0; i < m; ++i) {
      differentiate_row(rows, row + i, key, columns, factor, s + i * kScoreStride,
                        dp + i * kScoreStride, slope ? slope + i * kScoreStride : nullptr);
    }
  }
  for (int64_t i = 0; i < m; i += Math::kStep) {
    float* weights = local.weights + (t + i) / Math::kStep * kScoreStride;
    float* dscores = local.dscores + (t + i) / Math::kStep * kScoreStride;
    clear_outside(weights, columns, size.key_block);
    clear_outside(dscores, columns, size.key_block);
    if constexpr (kPairs) {
      const float *s0 = s + i * kScoreStride, *s1 = s0 + kScoreStride;
      float *d0 = dp + i * kScoreStride, *d1 = d0 + kScoreStride;
      const bool alone = i + 1 == m;
      for (int64_t c = columns.begin; c < columns.end; c += kPanel) {
        for (int64_t half = c; half < c + kPanel; half += kWidth) {
          store(weights + half, Math::zip_rows(load(s0 + half), alone ? zero() : load(s1 + half)));
          store(dscores + half, Math::zip_rows(load(d0 + half), alone ? zero() : load(d1 + half)));
        }
        Math::store_row(d0, c, load(d0 + c), load(d0 + c + kWidth));
        if (!alone) Math::store_row(d1, c, load(d1 + c), load(d1 + c + kWidth));
      }
    }
  }
  if (columns.empty()) return;
  gemm_rows<Math, kScoreStride>(m, p.head_dim, n / Math::kStep, dp + columns.begin / Math::kStep, 1,
                                local.k_rows + columns.begin / Math::kStep * kPanel,
                                size.key_steps() * kPanel, local.dq_tile, size.d_columns, false);
  for (int64_t i = 0; i < m; ++i) {
    float* dq = rows.at<float>(p.dq_sum, row + i);
    for (int64_t c = 0; c < p.head_dim; c += kWidth) {
      const int lanes = static_cast<int>(smaller(p.head_dim - c, kWidth));
      store(dq + c, load(dq + c, lanes) + load(local.dq_tile + i * size.d_columns + c, lanes),
            lanes);
    }
  }
}

template <class T>
void attention_bwd_rows(const AttentionParams& p, int64_t b, int64_t hk, int64_t key_begin,
                        int64_t row_begin, int64_t row_end, float* scratch) {
  using Math = typename MathOf<T>::type;
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const HeadRows rows{p, b, hk};
  const int64_t n = row_end - row_begin, key_end = smaller(key_begin + size.key_block, p.seqlen_k);
  constexpr int64_t kTiles = 112 / kMaxTileRows;
  Columns columns[kTiles];

  for (int64_t t = 0; t < n; t += kMaxTileRows) {
    const int64_t m = smaller(kMaxTileRows, n - t);
    const auto q = [&](int64_t i) { return rows.at<const T>(p.q, row_begin + t + i); };
    const auto dout = [&](int64_t i) { return rows.at<const T>(p.dout, row_begin + t + i); };
    pack_transposed<Math, kMaxTileRows>(q, m, p.head_dim, local.q_t + t * size.d_steps);
    pack_transposed<Math, kMaxTileRows>(dout, m, p.head_dim_v, local.do_t + t * size.dv_steps);
    Columns& seen = columns[t / kMaxTileRows];
    seen = visible_columns(p, rows, row_begin + t, row_begin + t + m, key_begin, key_end);
    if (seen.empty()) seen = {0, 0};
    bwd_tile<T>(rows, size, local, row_begin, t, m, key_begin, seen);
  }
  const auto q = [&](int64_t i) { return rows.at<const T>(p.q, row_begin + i); };
  const auto dout = [&](int64_t i) { return rows.at<const T>(p.dout, row_begin + i); };
  pack_rows<Math>(q, n, p.head_dim, size.row_steps(), local.q_rows);
  pack_rows<Math>(dout, n, p.head_dim_v, size.row_steps(), local.do_rows);

  const int64_t keys = key_end - key_begin, tiles = ceil_div(n, kMaxTileRows);
  const int64_t height = ceil_div(keys, ceil_div(keys, kMaxTileRows));
  for (int64_t key = 0; key < keys; key += height) {
    const int64_t m = smaller(height, keys - key);
    // Only the rows that see one of these keys.
    int64_t first = 0, last = tiles;
    while (first < last && columns[first].end <= key) ++first;
    while (last > first && (columns[last - 1].empty() || columns[last - 1].begin >= key + m))
      --last;
    if (first == last) continue;
    const int64_t from = first * kMaxTileRows / Math::kStep;
    const int64_t steps = ceil_div(smaller(last * kMaxTileRows, n), Math::kStep) - from;
    gemm_rows<Math, 1>(m, p.head_dim_v, steps, local.weights + from * kScoreStride + key,
                       kScoreStride, local.do_rows + from * kPanel, size.row_steps() * kPanel,
                       local.dv + key * size.dv_columns, size.dv_columns, true);
    gemm_rows<Math, 1>(m, p.head_dim, steps, local.dscores + from * kScoreStride + key,
                       kScoreStride, local.q_rows + from * kPanel, size.row_steps() * kPanel,
                       local.dk + key * size.d_columns, size.d_columns, true);
  }
}

template <class T>
void store_row_as(const float* from, int64_t n, T* to) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, load(from + c, lanes), lanes);
  }
}

template <class T>
void attention_bwd_end(const AttentionParams& p, int64_t b, int64_t hk, int64_t key_begin,
                       float* scratch) {
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const int64_t n = smaller(size.key_block, p.seqlen_k - key_begin);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = key_begin + i;
    store_row_as(local.dk + i * size.d_columns, p.head_dim,
                 static_cast<T*>(p.dk.data) + b * p.dk.stride[0] + key * p.dk.stride[1] +
                     hk * p.dk.stride[2]);
    store_row_as(local.dv + i * size.dv_columns, p.head_dim_v,
                 static_cast<T*>(p.dv.data) + b * p.dv.stride[0] + key * p.dv.stride[1] +
                     hk * p.dv.stride[2]);
  }
}

// dq from its float sums, for query i of all heads.
template <class T>
void attention_bwd_store_dq(const AttentionParams& p, int64_t b, int64_t i) {
  for (int64_t h = 0; h < p.nheads; ++h) {
    const float* from = static_cast<const float*>(p.dq_sum.data) + b * p.dq_sum.stride[0] +
                        i * p.dq_sum.stride[1] + h * p.dq_sum.stride[2];
    T* to =
        static_cast<T*>(p.dq.data) + b * p.dq.stride[0] + i * p.dq.stride[1] + h * p.dq.stride[2];
    store_row_as(from, p.head_dim, to);
  }
}

}  // namespace fastattn::FASTATTN_ISA
