// Attention forward for a few rows, straight from k and v: with so little work per key, packing
// would cost more than it saves, and the goal is to read memory at full speed.
//
//   for each block of keys: S = Q K^T by dot products; softmax; O += P V.
//
// Bytes: K and V once for all rows, (D + Dv) * sizeof(TK) per key. Instructions per key, AVX-512
// and R rows of float: (D + Dv) / 16 loads, R (D + Dv) / 16 FMAs and R (D + Dv) / 64 loads of q or
// of sums beside them, 3 R for the sums over lanes.
#pragma once

#include "attention_fwd.inl.h"

namespace fastattn::FASTATTN_ISA {

// How many keys ahead memory is asked for: about 2 us of reading, so that the two streams K and V
// never start cold after each other's block.
constexpr int64_t kAhead = 32;

// Pairs of bfloat16 are multiplied as they are where q and the keys both have them.
template <class T, class TK>
struct FewMathOf {
  using type = FloatMath;
};
template <>
struct FewMathOf<BF16, BF16> {
  using type = PairMath;
};

template <class TK>
void prefetch_row(const TK* row, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(TK));
  for (int64_t c = 0; c < n; c += kLine) __builtin_prefetch(row + c);
}

// Scores of kRows rows and kWidth / kRows keys: one vector of sums each, which sum_lanes turns into
// one vector. Rows stand at stride kTileStride in Math's elements, 0 past head_dim.
template <class Math, int kRows, class TK>
void dot_products(const float* q, const TK* const* keys, int64_t head_dim, float* s) {
  constexpr int kKeys = kWidth / kRows;
  constexpr int kStepValues = kWidth * Math::kStep;
  Vec sums[kWidth];
  for (int i = 0; i < kWidth; ++i) sums[i] = zero();
  const auto step = [&](int64_t d, int n) {
    Vec x[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) x[j] = Math::load_row(keys[j] + d, n);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec row = load(q + i * kTileStride + d / Math::kStep);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        sums[i * kKeys + j] = Math::mul_add(row, x[j], sums[i * kKeys + j]);
      }
    }
  };
  const int64_t whole = head_dim / kStepValues * kStepValues;
  for (int64_t d = 0; d < whole; d += kStepValues) step(d, kStepValues);
  if (whole < head_dim) step(whole, static_cast<int>(head_dim - whole));
  alignas(64) float lanes[kWidth];
  store(lanes, sum_lanes(sums));
  for (int i = 0; i < kRows; ++i) std::memcpy(s + i * kTileStride, lanes + i * kKeys, kKeys * 4);
}

// Rows of one block of keys, found before they are read; `known` of them, of which those past the
// block are only asked for.
template <class TK>
struct BlockRows {
  const TK* rows[kMaxKeyBlock + kAhead + kWidth];
  int64_t known;

  void find(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key) {
    known = smaller(kMaxKeyBlock + kAhead, p.seqlen_k - key);
    point_at_rows(p, x, hk, key, known, rows);
    for (int64_t i = 0; i < kWidth; ++i) rows[known + i] = rows[known - 1];
  }
  void prefetch(int64_t i, int64_t columns) const {
    if (i < known) prefetch_row(rows[i], columns);
  }
};

// The same for the columns [begin, end) of a block; up to kWidth - 1 scores past the end are
// written too.
template <class Math, int kRows, class TK>
void score_keys(const float* q, const BlockRows<TK>& keys, int64_t begin, int64_t end,
                int64_t head_dim, float* s) {
  constexpr int kKeys = kWidth / kRows;
  for (int64_t c = begin; c < end; c += kKeys) {
    for (int j = 0; j < kKeys; ++j) keys.prefetch(c + kAhead + j, head_dim);
    dot_products<Math, kRows>(q, keys.rows + c, head_dim, s + c);
  }
}

// Rows go in groups of 1, 2, 4 or 8.
inline int64_t few_group(int64_t m) { return m <= 2 ? m : (m <= 4 || kWidth < 8 ? 4 : 8); }

template <class Math, class TK>
void score_rows(int64_t m, const float* q, const BlockRows<TK>& keys, int64_t begin, int64_t end,
                int64_t head_dim, float* s) {
  for (; m > 0; m -= kWidth, q += kWidth * kTileStride, s += kWidth * kTileStride) {
    switch (few_group(m)) {
      case 1: score_keys<Math, 1>(q, keys, begin, end, head_dim, s); break;
      case 2: score_keys<Math, 2>(q, keys, begin, end, head_dim, s); break;
      case 4: score_keys<Math, 4>(q, keys, begin, end, head_dim, s); break;
      default: score_keys<Math, (kWidth < 8 ? 4 : 8)>(q, keys, begin, end, head_dim, s);
    }
  }
}

// O [kRows, kVecs * kWidth] += P V over n keys; P stands at stride kTileStride.
template <int kRows, int kVecs, class TK>
void weighted_sum(const float* weights, int64_t n, const TK* const* values, int64_t column,
                  int columns, float* o, int64_t o_stride) {
  Vec sums[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) sums[i][j] = load(o + i * o_stride + j * kWidth);
  }
  const bool whole = columns == kVecs * kWidth;
  for (int64_t c = 0; c < n; ++c) {
    const TK* row = values[c] + column;
    Vec x[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      const int lanes = columns - j * kWidth;
      x[j] = whole || lanes >= kWidth ? load(row + j * kWidth)
                                      : (lanes > 0 ? load(row + j * kWidth, lanes) : zero());
    }
    for (int i = 0; i < kRows; ++i) {
      const Vec w = broadcast(weights[i * kTileStride + c]);
      for (int j = 0; j < kVecs; ++j) sums[i][j] = fma(w, x[j], sums[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) store(o + i * o_stride + j * kWidth, sums[i][j]);
  }
}

template <class TK>
using WeightedSum = void (*)(const float*, int64_t, const TK* const*, int64_t, int, float*,
                             int64_t);

// A few keys at a time, whose values then stay in L1 while all rows and columns pass by.
template <class TK>
void add_weighted(int64_t m, const float* weights, Columns keys, const BlockRows<TK>& values,
                  int64_t dv, const RowState& state) {
  constexpr int kVecs = 4, kRows = 4;
  constexpr WeightedSum<TK> sums[] = {weighted_sum<1, kVecs, TK>, weighted_sum<2, kVecs, TK>,
                                      weighted_sum<3, kVecs, TK>, weighted_sum<4, kVecs, TK>};
  for (int64_t key = keys.begin; key < keys.seen; key += kAhead) {
    const int64_t n = smaller(kAhead, keys.seen - key);
    for (int64_t c = 0; c < n; ++c) values.prefetch(key + kAhead + c, dv);
    for (int64_t c = 0; c < dv; c += kVecs * kWidth) {
      const int columns = static_cast<int>(smaller(dv - c, kVecs * kWidth));
      for (int64_t row = 0; row < m; row += kRows) {
        sums[smaller(kRows, m - row) - 1](weights + row * kTileStride + key, n, values.rows + key, c,
                                          columns, state.out + row * state.stride + c,
                                          state.stride);
      }
    }
  }
}

// What int8 keys and values of a block are multiplied by.
struct BlockScales {
  alignas(64) float k[kMaxKeyBlock + kWidth];
  alignas(64) float v[kMaxKeyBlock + kWidth];

  void find(const AttentionParams& p, int64_t hk, int64_t key, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      k[i] = scale_of(p, p.k_scale, hk, key + i);
      v[i] = scale_of(p, p.v_scale, hk, key + i);
    }
  }
};

inline void scale_columns(int64_t m, Columns columns, const float* scale, float* s) {
  for (int64_t t = 0; t < m; ++t, s += kTileStride) {
    for (int64_t c = columns.begin; c < columns.seen; c += kWidth) {
      store(s + c, load(s + c) * load(scale + c));
    }
  }
}

// In floats, at most.
inline int64_t few_scratch(const AttentionParams& p) {
  return kFewRows * (2 * kTileStride + kWidth + p.head_dim_v + 4 * kWidth) + 16;
}

template <class T, class TK>
void attention_fwd_few(const AttentionParams& p, const AttentionTask& task, float* scratch) {
  using Math = typename FewMathOf<T, TK>::type;
  const HeadRows rows{p, task.hk};
  const int64_t m = task.row_end - task.row_begin;
  float* s = scratch;
  float* q = s + kFewRows * kTileStride;
  RowState state;
  state.stride = round_up(p.head_dim_v, 4 * kWidth);
  state.m = q + kFewRows * kTileStride;
  state.l = state.m + 16;
  state.out = state.l + kFewRows * kWidth;
  state.init(m);
  // Rows that fill up a group repeat the last one; nobody reads their scores.
  copy_rows<Math>(
      [&](int64_t i) { return rows.at<const T>(p.q, task.row_begin + smaller(i, m - 1)); },
      kWidth < 8 && m > 4 ? 8 : few_group(m), p.head_dim, q);

  BlockRows<TK> k, v;
  BlockScales scales;
  const bool scaled = p.k_scale.data != nullptr;
  const int64_t begin = larger(task.key_begin, p.visible_begin(rows.query(task.row_begin)));
  const int64_t end = smaller(task.key_end, p.visible_end(rows.query(task.row_end - 1)));
  for (int64_t key = begin / kMaxKeyBlock * kMaxKeyBlock; key < end; key += kMaxKeyBlock) {
    const int64_t key_end = smaller(key + kMaxKeyBlock, end);
    const Columns columns = visible_columns(p, rows, task.row_begin, task.row_end, key, key_end);
    if (columns.empty()) continue;
    k.find(p, p.k, task.hk, key);
    v.find(p, p.v, task.hk, key);
    if (scaled) scales.find(p, task.hk, key, key_end - key);
    score_rows<Math>(m, q, k, columns.begin, columns.seen, p.head_dim, s);
    if (scaled) scale_columns(m, columns, scales.k, s);
    const float factor = finish_scores<T>(rows, task.row_begin, m, key, columns, s, nullptr);
    softmax_tile<FloatMath>(rows, task.row_begin, 0, m, key, columns, factor, s, state);
    if (scaled) scale_columns(m, columns, scales.v, s);
    add_weighted(m, s, columns, v, p.head_dim_v, state);
  }
  finish_rows<T>(rows, task, state);
}

}  // namespace fastattn::FASTATTN_ISA
