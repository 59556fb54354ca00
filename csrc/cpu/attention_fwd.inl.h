// Attention forward for a block of rows of one KV head: one pass over the keys, scores never
// stored.
//
//   for each block of keys, for each tile of kMaxTileRows rows:
//     S = Q K^T            gemm; S [rows, keys] lives in L1
//     m, l, P              online softmax in units of log2, P over S in place
//     O += P V             gemm; O [rows, Dv] lives in L2
//
// A row's maximum m is raised, and its sum l and O rescaled, only when a score passes it by more
// than 2^8: P stays below 2^8, which float and bfloat16 hold, and almost every block skips the
// rescale.
//
// Cost of a tile, AVX-512, R rows, N keys: R N (D + Dv) / 32 cycles of FMA (half for bfloat16
// pairs), R N / 16 * 6 for exp2, 2 for maximum, loads and stores; reads N (D + Dv) elements of
// packed K and V from L2, 128 bytes every R cycles. At D = Dv = 64 that bounds the share of peak to
// 64 / 72 = 89 % (bfloat16: 32 / 38 = 83 %), at 128 to 94 % (91 %).
//
// Each row goes through the same blocks in the same order whatever the tiles around it, so its bits
// do not depend on threads, batch or the size of a task.
#pragma once

#include "../attention.h"
#include "attention_keys.inl.h"
#include "attention_scores.inl.h"
#include "kernels.h"

namespace fastattn::FASTATTN_ISA {

constexpr float kRescaleThreshold = 8.0f;

// What a block of rows carries from one block of keys to the next.
struct RowState {
  float* m;    // [rows] row maximum, log2
  float* l;    // [rows, kWidth] row sum, by lanes
  float* out;  // [rows, stride] unscaled output
  int64_t stride;
  void init(int64_t n) const {
    for (int64_t i = 0; i < n; ++i) m[i] = -kInfinity;
    std::memset(l, 0, static_cast<size_t>(n * kWidth) * 4);
    std::memset(out, 0, static_cast<size_t>(n * stride) * 4);
  }
};

inline void scale_row(float* x, int64_t n, float by) {
  for (int64_t c = 0; c < n; c += kWidth) store(x + c, load(x + c) * broadcast(by));
}

// Raises a row's maximum where its scores ask for it, and returns it, 0 while there is none.
inline float raise_maximum(const float* s, Columns columns, float factor, int64_t row,
                           const RowState& state) {
  Vec a = broadcast(-kInfinity), b = a;
  for (int64_t c = columns.begin; c < columns.end; c += kPanel) {
    a = max(a, load(s + c));
    b = max(b, load(s + c + kWidth));
  }
  const float top = largest(max(a, b)) * factor;
  float& m = state.m[row];
  if (top > m + kRescaleThreshold) {
    if (m != -kInfinity) {
      const float shrink = exp2_scalar(m - top);
      scale_row(state.l + row * kWidth, kWidth, shrink);
      scale_row(state.out + row * state.stride, state.stride, shrink);
    }
    m = top;
  }
  return m == -kInfinity ? 0.0f : m;
}

// Scores become weights 2^(score - m), in Math's elements; their sums go into l. `scales` multiply
// the weights of columns afterwards, where values are yet to be scaled.
template <class Math, bool kScaled = false>
void softmax_tile(const HeadRows& rows, int64_t row_begin, int64_t first, int64_t m, int64_t key,
                  Columns columns, float factor, float* s, const RowState& state,
                  const float* scales = nullptr) {
  const bool drop = rows.p.dropout_threshold != 0;
  for (int64_t t = 0; t < m; ++t, s += kTileStride) {
    const float top = raise_maximum(s, columns, factor, first + t, state);
    const Vec scale = broadcast(factor), shift = broadcast(-top);
    Vec sum0 = load(state.l + (first + t) * kWidth), sum1 = zero();
    for (int64_t c = columns.begin; c < columns.end; c += kPanel) {
      const Vec a = exp2<Math::kExpDegree>(fma(load(s + c), scale, shift));
      const Vec b = exp2<Math::kExpDegree>(fma(load(s + c + kWidth), scale, shift));
      sum0 = sum0 + a;
      sum1 = sum1 + b;
      if (drop) {
        FloatMath::store_row(s, c, a, b);
      } else if constexpr (kScaled) {
        Math::store_row(s, c, a * load(scales + c), b * load(scales + c + kWidth));
      } else {
        Math::store_row(s, c, a, b);
      }
    }
    store(state.l + (first + t) * kWidth, sum0 + sum1);
    if (drop) {
      drop_row(rows, row_begin + first + t, key, columns, s);
      for (int64_t c = columns.begin; c < columns.end; c += kPanel) {
        Math::store_row(s, c, load(s + c), load(s + c + kWidth));
      }
    }
  }
}

// A head's sink score in units of log2, -inf where there are no sinks.
template <class T>
float sink_log2(const AttentionParams& p, int64_t h) {
  if (!p.sinks.data) return -kInfinity;
  const int64_t at = h * p.sinks.stride[0];
  return kLog2E * (p.sinks_type == Type::kFloat32
                       ? static_cast<const float*>(p.sinks.data)[at]
                       : sum(load(static_cast<const T*>(p.sinks.data) + at, 1)));
}

// lse = ln(l 2^m), and its rest: one rounding of lse would be a factor on every weight in backward.
inline void store_lse(const AttentionParams& p, int64_t flat, float m, float l) {
  const double exact = m + __builtin_log2(l);
  p.lse[flat] = l == 0.0f ? -kInfinity : static_cast<float>(exact * kLn2);
  if (!p.lse_rest) return;
  p.lse_rest[flat] = l == 0.0f ? 0.0f : static_cast<float>(exact - p.lse[flat] * kLog2EDouble);
}

// out = O / l and lse = ln(l 2^m), after one more step of the online softmax for the sink.
template <class T>
void finish_row(const HeadRows& rows, int64_t row, float m, float l, const float* o) {
  const AttentionParams& p = rows.p;
  const float sink = sink_log2<T>(p, rows.head(row));
  float weight = 1.0f;
  if (sink > m) {
    weight = exp2_scalar(m - sink);
    l = l * weight + 1.0f;
    m = sink;
  } else if (sink != -kInfinity) {
    l += exp2_scalar(sink - m);
  }
  if (p.lse) store_lse(p, rows.flat(row), m, l);
  const Vec by = broadcast(l == 0.0f ? 0.0f : weight / l);
  T* out = rows.at<T>(p.out, row);
  for (int64_t c = 0; c < p.head_dim_v; c += kWidth) {
    const int n = static_cast<int>(smaller(p.head_dim_v - c, kWidth));
    store(out + c, load(o + c, n) * by, n);
  }
}

template <class T>
void finish_rows(const HeadRows& rows, const AttentionTask& task, const RowState& state) {
  const int64_t dv = rows.p.head_dim_v;
  for (int64_t row = task.row_begin; row < task.row_end; ++row) {
    const int64_t t = row - task.row_begin;
    const float l = sum(load(state.l + t * kWidth));
    const float* o = state.out + t * state.stride;
    if (task.partial) {
      float* to = task.partial + row * (2 + dv);
      to[0] = state.m[t];
      to[1] = l;
      std::memcpy(to + 2, o, static_cast<size_t>(dv) * 4);
    } else {
      finish_row<T>(rows, row, state.m[t], l, o);
    }
  }
}

// Joins the splits of a head's keys in their order, so that the sum does not depend on who came
// first.
template <class T>
void attention_merge(const AttentionParams& p, int64_t hk, int64_t splits, float* partial) {
  const HeadRows rows{p, hk};
  const int64_t stride = 2 + p.head_dim_v;
  for (int64_t row = 0; row < p.rows(); ++row) {
    float* first = partial + row * stride;
    for (int64_t i = 1; i < splits; ++i) {
      const float* next = first + i * p.rows() * stride;
      const float m = first[0] > next[0] ? first[0] : next[0];
      if (m == -kInfinity) continue;
      const float keep = exp2_scalar(first[0] - m), add = exp2_scalar(next[0] - m);
      first[0] = m;
      for (int64_t c = 1; c < stride; ++c) first[c] = first[c] * keep + next[c] * add;
    }
    finish_row<T>(rows, row, first[0], first[1], first + 2);
  }
}

// The sizes that follow from a call's head dims.
template <class T>
struct Packing {
  using Math = typename MathOf<T>::type;
  int64_t d_steps, v_columns, key_block;
  explicit Packing(const AttentionParams& p)
      : d_steps(ceil_div(p.head_dim, Math::kStep)), v_columns(round_up(p.head_dim_v, kPanel)) {
    const int64_t dims = p.head_dim + p.head_dim_v;
    key_block = dims <= 256 ? kMaxKeyBlock : dims <= 512 ? 128 : 64;
  }
  int64_t k_floats() const { return key_block * d_steps; }
  int64_t v_floats() const { return key_block / Math::kStep * v_columns; }
  int64_t block() const { return k_floats() + v_floats(); }
};

// A block of keys that a cache keeps in pages or in another type: they are gathered first, in
// T, so many at a time that they stay in L1.
template <class T>
void pack_cached(const AttentionParams& p, int64_t hk, int64_t key, int64_t n,
                 const Packing<T>& size, float* packed) {
  using Math = typename MathOf<T>::type;
  constexpr int64_t kGathered = kPanel;
  alignas(64) T k_rows[kGathered * kMaxHeadDim], v_rows[kGathered * kMaxHeadDim];
  for (int64_t c = 0; c < n; c += kGathered) {
    const int64_t m = smaller(kGathered, n - c);
    const char* rows[kGathered];
    point_at_rows(p, p.k, hk, key + c, m, rows);
    gather_rows(p, rows, p.k_scale, hk, key + c, m, p.head_dim, kMaxHeadDim, k_rows);
    point_at_rows(p, p.v, hk, key + c, m, rows);
    gather_rows(p, rows, p.v_scale, hk, key + c, m, p.head_dim_v, kMaxHeadDim, v_rows);
    const auto k = [&](int64_t i) { return k_rows + i * kMaxHeadDim; };
    const auto v = [&](int64_t i) { return v_rows + i * kMaxHeadDim; };
    pack_transposed<Math>(k, m, p.head_dim, packed + c * size.d_steps);
    pack_rows<Math>(v, m, p.head_dim_v, size.key_block / Math::kStep,
                    packed + size.k_floats() + c / Math::kStep * kPanel);
  }
}

template <class T>
void attention_pack(const AttentionParams& p, int64_t hk, int64_t key_begin, int64_t key_end,
                    float* packed) {
  using Math = typename MathOf<T>::type;
  const Packing<T> size(p);
  const bool plain = !p.sequences.pages && p.cache_type == p.type;
  for (int64_t key = key_begin; key < key_end; key += size.key_block, packed += size.block()) {
    const int64_t n = smaller(size.key_block, key_end - key);
    if (!plain) {
      pack_cached<T>(p, hk, key, n, size, packed);
      continue;
    }
    const T* k = static_cast<const T*>(p.k.data) + key * p.k.stride[1] + hk * p.k.stride[2];
    for (int64_t c = 0; c < n; c += kPanel) {
      pack_transposed<Math>([&](int64_t i) { return k + (c + i) * p.k.stride[1]; }, n - c,
                            p.head_dim, packed + c * size.d_steps);
    }
    const T* v = static_cast<const T*>(p.v.data) + key * p.v.stride[1] + hk * p.v.stride[2];
    pack_rows<Math>([&](int64_t i) { return v + i * p.v.stride[1]; }, n, p.head_dim_v,
                    size.key_block / Math::kStep, packed + size.k_floats());
  }
}

template <class T>
void attention_fwd(const AttentionParams& p, const AttentionTask& task, const float* packed,
                   int64_t packed_from, float* scratch) {
  using Math = typename MathOf<T>::type;
  const Packing<T> size(p);
  const HeadRows rows{p, task.hk};
  const int64_t n_rows = task.row_end - task.row_begin;
  // Tiles of equal height: 16 rows are worth more as 8 + 8 than as 14 + 2.
  const int64_t height = ceil_div(n_rows, ceil_div(n_rows, kMaxTileRows));

  float* s = scratch;
  float* q = s + kMaxTileRows * kTileStride;
  RowState state;
  state.stride = size.v_columns;
  state.m = q + n_rows * kTileStride;
  state.l = state.m + round_up(n_rows, 16);
  state.out = state.l + n_rows * kWidth;
  state.init(n_rows);
  copy_rows<Math>([&](int64_t i) { return rows.at<const T>(p.q, task.row_begin + i); }, n_rows,
                  p.head_dim, q);

  const int64_t begin = larger(task.key_begin, p.visible_begin(rows.query(task.row_begin)));
  const int64_t end = smaller(task.key_end, p.visible_end(rows.query(task.row_end - 1)));
  for (int64_t key = begin / size.key_block * size.key_block; key < end; key += size.key_block) {
    const float* k_packed = packed + (key / size.key_block - packed_from) * size.block();
    const float* v_packed = k_packed + size.k_floats();
    const int64_t key_end = smaller(key + size.key_block, end);
    for (int64_t t = 0; t < n_rows; t += height) {
      const int64_t row = task.row_begin + t, m = smaller(height, n_rows - t);
      const Columns columns = visible_columns(p, rows, row, row + m, key, key_end);
      if (columns.empty()) continue;
      const int64_t n = columns.seen - columns.begin;
      const Panels k_panels = {k_packed + columns.begin * size.d_steps, kPanel,
                               kPanel * size.d_steps};
      gemm_rows<Math, kTileStride>(m, n, size.d_steps, q + t * kTileStride, 1, k_panels,
                                   s + columns.begin, kTileStride, false);
      const float factor = finish_scores<T>(rows, row, m, key, columns, s, nullptr);
      softmax_tile<Math>(rows, task.row_begin, t, m, key, columns, factor, s, state);
      const Panels v_panels = {v_packed + columns.begin / Math::kStep * kPanel, kPanel,
                               size.key_block / Math::kStep * kPanel};
      gemm_rows<Math, kTileStride>(m, p.head_dim_v, ceil_div(n, Math::kStep),
                                   s + columns.begin / Math::kStep, 1, v_panels,
                                   state.out + t * state.stride, state.stride, true);
    }
  }
  finish_rows<T>(rows, task, state);
}

}  // namespace fastattn::FASTATTN_ISA
