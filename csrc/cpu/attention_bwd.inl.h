// Attention backward for one block of keys of one KV head, all its rows in turn.
//
// With P = 2^(score - lse) and delta = sum(dout * out) - dlse, for a block of rows:
//     S = Q K^T, dP = dO V^T        per tile of kMaxTileRows rows
//     dS = P (dP - delta)           bias gradient; then times softcap's slope and the scale
//     dQ += dS K                    into memory, blocks of keys in their order
//     dV += P^T dO, dK += dS^T Q    kept in L2 until the block of keys is done
// Five products, nothing computed twice. Q and dO are copied anew for each block of keys, two loads
// and two stores an element (four for pairs) against 5 N / 32 cycles of FMA with N keys to a block.
//
// Deterministic: dQ rows take the blocks of keys in order (cpu/attention.cpp makes them wait), dK
// and dV take the rows in order.
#pragma once

#include "../attention.h"
#include "attention_fwd.inl.h"

namespace fastattn::FASTATTN_ISA {

// The most rows of a block.
constexpr int64_t kBwdTileRows = 112;

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
    key_block = dims <= 256 ? 224 : dims <= 512 ? 96 : 32;
    tiles = (dims <= 256 ? kBwdTileRows : kBwdTileRows / 2) / kMaxTileRows;
    row_block = tiles * kMaxTileRows;
  }
  int64_t row_steps() const { return ceil_div(row_block, Math::kStep); }
  int64_t key_steps() const { return key_block / Math::kStep; }
  int64_t total() const {
    return key_block * (d_steps + dv_steps + d_columns + dv_columns) + key_steps() * d_columns +
           (Math::kStep == 2 ? row_steps() * (d_columns + dv_columns) : 0) +
           4 * row_block * kTileStride + kMaxTileRows * (3 * kTileStride + d_columns);
  }
};

// One call's share of a thread's scratch.
template <class T>
struct BwdScratch {
  float *k_t, *v_t, *k_rows, *dk, *dv;                         // one block of keys
  float *q, *dout, *weights, *dscores, *q_pairs, *dout_pairs;  // one block of rows
  float *s_tile, *dp_tile, *slope, *dq_tile;                   // one tile
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
    q = take(size.row_block * kTileStride);
    dout = take(size.row_block * kTileStride);
    weights = take(size.row_block * kTileStride);
    dscores = take(size.row_block * kTileStride);
    constexpr bool kPairs = BwdSizes<T>::Math::kStep == 2;
    q_pairs = kPairs ? take(size.row_steps() * size.d_columns) : nullptr;
    dout_pairs = kPairs ? take(size.row_steps() * size.dv_columns) : nullptr;
    s_tile = take(kMaxTileRows * kTileStride);
    dp_tile = take(kMaxTileRows * kTileStride);
    slope = take(kMaxTileRows * kTileStride);
    dq_tile = take(kMaxTileRows * size.d_columns);
  }
};

// lse in units of log2, as it was before it was rounded.
inline double unrounded_lse(const AttentionParams& p, int64_t flat) {
  return p.lse[flat] * kLog2EDouble + p.lse_rest[flat];
}

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
    const int64_t at = (b * p.nheads + h) * p.lse_stride + i;
    p.delta[at] = sum(total) - p.dlse[at];
  }
}

// The weight that the sink takes of a row; 0 without one.
inline float sink_weight(const AttentionParams& p, float sink, int64_t flat) {
  return sink == -kInfinity ? 0.0f : exp2_scalar(static_cast<float>(sink - unrounded_lse(p, flat)));
}

// A sink takes its weight and gives no value, so its gradient is -weight * delta.
template <class T>
void attention_bwd_sinks(const AttentionParams& p, int64_t h) {
  const float sink = sink_log2<T>(p, h);
  double total = 0.0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = 0; i < p.seqlen_q; ++i) {
      const int64_t flat = (b * p.nheads + h) * p.lse_stride + i;
      total -= sink_weight(p, sink, flat) * p.delta[flat];
    }
  }
  p.dsinks[h] = static_cast<float>(total);
}

// A bias that all keys of a row share only moves the row against its sink: the sum over keys of
// P (dP - delta) is dlse + weight of the sink * delta.
template <class T>
void attention_bwd_key_bias(const AttentionParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.nheads; ++h) {
      const float sink = sink_log2<T>(p, h);
      float* dbias =
          static_cast<float*>(p.dbias.data) + b * p.dbias.stride[0] + h * p.dbias.stride[1];
      for (int64_t i = 0; i < p.seqlen_q; ++i) {
        const int64_t flat = (b * p.nheads + h) * p.lse_stride + i;
        if (p.lse[flat] == -kInfinity) continue;
        dbias[i * p.dbias.stride[2]] += p.dlse[flat] + sink_weight(p, sink, flat) * p.delta[flat];
      }
    }
  }
}

template <class T>
void attention_bwd_begin(const AttentionParams& p, int64_t hk, int64_t key_begin, float* scratch) {
  using Math = typename MathOf<T>::type;
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const int64_t n = smaller(size.key_block, p.seqlen_k - key_begin);
  const T* k = static_cast<const T*>(p.k.data) + key_begin * p.k.stride[1] + hk * p.k.stride[2];
  const T* v = static_cast<const T*>(p.v.data) + key_begin * p.v.stride[1] + hk * p.v.stride[2];
  for (int64_t c = 0; c < n; c += kPanel) {
    pack_transposed<Math>([&](int64_t i) { return k + (c + i) * p.k.stride[1]; }, n - c, p.head_dim,
                          local.k_t + c * size.d_steps);
    pack_transposed<Math>([&](int64_t i) { return v + (c + i) * p.v.stride[1]; }, n - c,
                          p.head_dim_v, local.v_t + c * size.dv_steps);
  }
  pack_rows<Math>([&](int64_t i) { return k + i * p.k.stride[1]; }, n, p.head_dim, size.key_steps(),
                  local.k_rows);
  std::memset(local.dk, 0, static_cast<size_t>(n * size.d_columns) * 4);
  std::memset(local.dv, 0, static_cast<size_t>(n * size.dv_columns) * 4);
}

// What turns one row's S and dP into P and dS, kWidth columns at a time.
class RowGradient {
 public:
  RowGradient(const HeadRows& rows, int64_t row, int64_t key, Columns columns, float factor)
      : p_(rows.p), key_(key), scale_(broadcast(factor)) {
    const int64_t flat = rows.flat(row);
    const double lse = unrounded_lse(p_, flat);
    // A row that saw nothing has no scores but -inf; what keeps it so is any number.
    const float high = lse == -kInfinity ? 0.0f : static_cast<float>(lse);
    shift_ = broadcast(-high);
    rest_ = broadcast(lse == -kInfinity ? 0.0f : static_cast<float>(lse - high));
    delta_ = broadcast(p_.delta[flat]);
    if (p_.dropout_threshold) {
      for (int64_t c = columns.begin; c < columns.end; ++c) kept_[c] = 1.0f;
      drop_row(rows, row, key, columns, kept_);
    }
    dbias_ = static_cast<float*>(p_.dbias.data);
    if (dbias_) {
      dbias_ += rows.head(row) * p_.dbias.stride[1] + rows.query(row) * p_.dbias.stride[2];
    }
  }

  template <int kDegree>
  void step(int64_t c, const float* s, const float* dp, const float* slope, Vec* weight, Vec* ds) {
    Vec w = exp2<kDegree>(fma(load(s + c), scale_, shift_) - rest_);
    Vec dw = load(dp + c);
    if (p_.dropout_threshold) {
      const Vec kept = load(kept_ + c);
      *ds = w * (dw * kept - delta_);
      w = w * kept;
    } else {
      *ds = w * (dw - delta_);
    }
    *weight = w;
    if (dbias_) add_bias(c, *ds);
    if (slope) *ds = *ds * load(slope + c);
    *ds = *ds * broadcast(p_.softmax_scale);
  }

 private:
  void add_bias(int64_t c, Vec ds) {
    const int n = static_cast<int>(smaller(p_.seqlen_k - key_ - c, kWidth));
    if (n <= 0) return;
    float* to = dbias_ + key_ + c;
    store(to, load(to, n) + ds, n);
  }

  const AttentionParams& p_;
  int64_t key_;
  float* dbias_;
  Vec scale_, shift_, rest_, delta_;
  alignas(64) float kept_[kMaxKeyBlock];
};

inline void clear_outside(float* row, Columns columns, int64_t n) {
  for (int64_t c = 0; c < columns.begin; c += kWidth) store(row + c, zero());
  for (int64_t c = columns.end; c < n; c += kWidth) store(row + c, zero());
}

// The tile of a block that is being worked on.
struct BwdTile {
  int64_t row, t, m;  // its first row, the same within the block, its height
  int64_t key, keys;  // first key of the block, and how many, in whole panels
  Columns columns;
  float *s, *dp;  // its products, [m, kTileStride]
};

// P and dS from S and dP: where they stay, in floats; or as pairs, of rows for the products along
// rows, and for dS of neighbours too, for the product along keys.
template <class T>
void differentiate(const HeadRows& rows, const BwdScratch<T>& local, const BwdTile& tile,
                   float factor, const float* slope) {
  using Math = typename MathOf<T>::type;
  constexpr int kRows = Math::kStep;
  for (int64_t i = 0; i < tile.m; i += kRows) {
    float* weights = local.weights + (tile.t + i) / kRows * kTileStride;
    float* dscores = local.dscores + (tile.t + i) / kRows * kTileStride;
    clear_outside(weights, tile.columns, tile.keys);
    clear_outside(dscores, tile.columns, tile.keys);
    if (tile.columns.empty()) continue;
    // An odd last row has no partner; its pairs are filled with 0.
    const bool alone = i + kRows > tile.m;
    RowGradient low(rows, tile.row + i, tile.key, tile.columns, factor);
    RowGradient high(rows, tile.row + i + (alone ? 0 : kRows - 1), tile.key, tile.columns, factor);
    float *s = tile.s + i * kTileStride, *dp = tile.dp + i * kTileStride;
    const float* bend = slope ? slope + i * kTileStride : nullptr;
    for (int64_t c = tile.columns.begin; c < tile.columns.end; c += kPanel) {
      Vec w[2][2], ds[2][2];
      for (int half = 0; half < 2; ++half) {
        const int64_t at = c + half * kWidth;
        low.template step<Math::kExpDegree>(at, s, dp, bend, &w[0][half], &ds[0][half]);
        if constexpr (kRows == 2) {
          w[1][half] = ds[1][half] = zero();
          if (!alone) {
            high.template step<Math::kExpDegree>(at, s + kTileStride, dp + kTileStride,
                                                 bend ? bend + kTileStride : nullptr, &w[1][half],
                                                 &ds[1][half]);
          }
          store(weights + at, Math::zip_rows(w[0][half], w[1][half]));
          store(dscores + at, Math::zip_rows(ds[0][half], ds[1][half]));
        } else {
          store(weights + at, w[0][half]);
        }
      }
      Math::store_row(dp, c, ds[0][0], ds[0][1]);
      if (kRows == 2 && !alone) Math::store_row(dp + kTileStride, c, ds[1][0], ds[1][1]);
    }
  }
}

// One tile: fills its rows of weights and dscores over the whole block of keys, and adds to dQ.
template <class T>
void bwd_tile(const HeadRows& rows, const BwdSizes<T>& size, const BwdScratch<T>& local,
              const BwdTile& tile) {
  using Math = typename MathOf<T>::type;
  const AttentionParams& p = rows.p;
  const Columns columns = tile.columns;
  const int64_t n = columns.end - columns.begin, m = tile.m;
  float* slope = p.softcap > 0.0f ? local.slope : nullptr;
  float factor = 1.0f;
  if (!columns.empty()) {
    // dQ's lines come from far; they arrive while the products are made.
    for (int64_t i = 0; i < m; ++i) {
      const float* dq = rows.at<float>(p.dq_sum, tile.row + i);
      for (int64_t c = 0; c < p.head_dim; c += 16) __builtin_prefetch(dq + c, 1);
    }
    const Panels k_t = {local.k_t + columns.begin * size.d_steps, kPanel, kPanel * size.d_steps};
    const Panels v_t = {local.v_t + columns.begin * size.dv_steps, kPanel, kPanel * size.dv_steps};
    gemm_rows<Math, kTileStride>(m, n, size.d_steps, local.q + tile.t * kTileStride, 1, k_t,
                                 tile.s + columns.begin, kTileStride, false);
    gemm_rows<Math, kTileStride>(m, n, size.dv_steps, local.dout + tile.t * kTileStride, 1, v_t,
                                 tile.dp + columns.begin, kTileStride, false);
    factor = finish_scores<T>(rows, tile.row, m, tile.key, columns, tile.s, slope);
  }
  differentiate<T>(rows, local, tile, factor, slope);
  if (columns.empty()) return;
  const Panels k_rows = {local.k_rows + columns.begin / Math::kStep * kPanel, kPanel,
                         size.key_steps() * kPanel};
  gemm_rows<Math, kTileStride>(m, p.head_dim, ceil_div(columns.seen - columns.begin, Math::kStep),
                               tile.dp + columns.begin / Math::kStep, 1, k_rows, local.dq_tile,
                               size.d_columns, false);
  for (int64_t i = 0; i < m; ++i) {
    float* dq = rows.at<float>(p.dq_sum, tile.row + i);
    const float* add = local.dq_tile + i * size.d_columns;
    for (int64_t c = 0; c < p.head_dim; c += kWidth) {
      const int lanes = static_cast<int>(smaller(p.head_dim - c, kWidth));
      store(dq + c, load(dq + c, lanes) + load(add + c, lanes), lanes);
    }
  }
}

// dV += P^T dO and dK += dS^T Q for the keys [0, keys) of a block, each from the tiles that see it.
template <class T>
void add_key_gradients(const AttentionParams& p, const BwdSizes<T>& size,
                       const BwdScratch<T>& local, const Columns* columns, int64_t n,
                       int64_t keys) {
  using Math = typename MathOf<T>::type;
  constexpr bool kPairs = Math::kStep == 2;
  const int64_t tiles = ceil_div(n, kMaxTileRows);
  const int64_t height = ceil_div(keys, ceil_div(keys, kMaxTileRows));
  const int64_t step = kPairs ? kPanel : kTileStride;
  const int64_t panel = kPairs ? size.row_steps() * kPanel : kPanel;
  for (int64_t key = 0; key < keys; key += height) {
    const int64_t m = smaller(height, keys - key);
    int64_t first = 0, last = tiles;
    while (first < last && columns[first].end <= key) ++first;
    while (last > first && (columns[last - 1].empty() || columns[last - 1].begin >= key + m))
      --last;
    if (first == last) continue;
    const int64_t from = first * kMaxTileRows / Math::kStep;
    const int64_t steps = ceil_div(smaller(last * kMaxTileRows, n), Math::kStep) - from;
    const Panels dout = {(kPairs ? local.dout_pairs : local.dout) + from * step, step, panel};
    const Panels q = {(kPairs ? local.q_pairs : local.q) + from * step, step, panel};
    gemm_rows<Math, 1>(m, p.head_dim_v, steps, local.weights + from * kTileStride + key,
                       kTileStride, dout, local.dv + key * size.dv_columns, size.dv_columns, true);
    gemm_rows<Math, 1>(m, p.head_dim, steps, local.dscores + from * kTileStride + key, kTileStride,
                       q, local.dk + key * size.d_columns, size.d_columns, true);
  }
}

template <class T>
void attention_bwd_rows(const AttentionParams& p, int64_t hk, int64_t key_begin, int64_t row_begin,
                        int64_t row_end, float* scratch) {
  using Math = typename MathOf<T>::type;
  constexpr bool kPairs = Math::kStep == 2;
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const HeadRows rows{p, hk};
  const int64_t n = row_end - row_begin, key_end = smaller(key_begin + size.key_block, p.seqlen_k);
  const auto q = [&](int64_t i) { return rows.at<const T>(p.q, row_begin + i); };
  const auto dout = [&](int64_t i) { return rows.at<const T>(p.dout, row_begin + i); };
  copy_rows<Math>(q, n, p.head_dim, local.q);
  copy_rows<Math>(dout, n, p.head_dim_v, local.dout);
  if constexpr (kPairs) {
    pack_rows<Math>(q, n, p.head_dim, size.row_steps(), local.q_pairs);
    pack_rows<Math>(dout, n, p.head_dim_v, size.row_steps(), local.dout_pairs);
  }
  Columns columns[kBwdTileRows / kMaxTileRows];
  for (int64_t t = 0; t < n; t += kMaxTileRows) {
    const int64_t row = row_begin + t, m = smaller(kMaxTileRows, n - t);
    Columns& seen = columns[t / kMaxTileRows];
    seen = visible_columns(p, rows, row, row + m, key_begin, key_end);
    // Floats are worked on where they stay; pairs are made from a tile of floats.
    float* s = kPairs ? local.s_tile : local.weights + t * kTileStride;
    float* dp = kPairs ? local.dp_tile : local.dscores + t * kTileStride;
    bwd_tile<T>(rows, size, local,
                {row, t, m, key_begin, round_up(key_end - key_begin, kPanel), seen, s, dp});
  }
  add_key_gradients<T>(p, size, local, columns, n, key_end - key_begin);
}

template <class T>
void store_row_as(const float* from, int64_t n, T* to) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, load(from + c, lanes), lanes);
  }
}

template <class T>
void attention_bwd_end(const AttentionParams& p, int64_t hk, int64_t key_begin, float* scratch) {
  const BwdSizes<T> size(p);
  const BwdScratch<T> local(size, scratch);
  const int64_t n = smaller(size.key_block, p.seqlen_k - key_begin);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = key_begin + i;
    store_row_as(local.dk + i * size.d_columns, p.head_dim,
                 static_cast<T*>(p.dk.data) + key * p.dk.stride[1] + hk * p.dk.stride[2]);
    store_row_as(local.dv + i * size.dv_columns, p.head_dim_v,
                 static_cast<T*>(p.dv.data) + key * p.dv.stride[1] + hk * p.dv.stride[2]);
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
