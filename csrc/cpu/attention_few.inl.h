// Attention forward for a few rows, straight from k and v: with so little work per key, packing
// would cost more than it saves, and the goal is to read memory at full speed.
//
//   for each block of keys: S = Q K^T by dot products, kWidth keys at a time; softmax; O += P V.
//
// Bytes: K and V once for all rows, (D + Dv) * sizeof(T) per key. Cycles per key, AVX-512 and R
// rows: R (D + Dv) / 16 loads or FMAs, two at a time, and 3 R for the sum over lanes.
#pragma once

#include "attention_fwd.inl.h"

namespace fastattn::FASTATTN_ISA {

// How many keys ahead memory is asked for: about 2 us of reading, so that the two streams K and V
// never start cold after each other's block.
constexpr int64_t kAhead = 32;

template <class T>
void prefetch_row(const T* row, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t c = 0; c < n; c += kLine) __builtin_prefetch(row + c);
}

// Scores of kWidth keys and one row; 0 from key `n` on, to be masked later.
template <class Math, class T>
Vec dot_products(const T* q, const T* k, int64_t k_stride, int64_t n, int64_t head_dim) {
  Vec sums[kWidth];
  constexpr int64_t kStepValues = kWidth * Math::kStep;
  const int64_t whole = head_dim / kStepValues * kStepValues;
  const int rest = static_cast<int>(head_dim - whole);
  const int lanes = static_cast<int>(smaller(kWidth, n));
  for (int j = lanes; j < kWidth; ++j) sums[j] = zero();
  for (int j = 0; j < lanes; ++j) {
    const T* key = k + j * k_stride;
    prefetch_row(key + kAhead * k_stride, head_dim);
    Vec s = zero();
    for (int64_t d = 0; d < whole; d += kStepValues) {
      s = Math::mul_add(Math::load_row(q + d, kStepValues), Math::load_row(key + d, kStepValues),
                        s);
    }
    if (rest) {
      s = Math::mul_add(Math::load_row(q + whole, rest), Math::load_row(key + whole, rest), s);
    }
    sums[j] = s;
  }
  transpose(sums);
  for (int step = kWidth / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) sums[i] = sums[i] + sums[i + step];
  }
  return sums[0];
}

// O [kRows, kVecs * kWidth] += P V over keys [begin, end); P stands at stride kTileStride.
template <int kRows, int kVecs, class T>
void weighted_sum(const float* weights, int64_t begin, int64_t end, const T* v, int64_t v_stride,
                  int columns, float* o, int64_t o_stride) {
  Vec sums[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) sums[i][j] = load(o + i * o_stride + j * kWidth);
  }
  const bool whole = columns == kVecs * kWidth;
  for (int64_t c = begin; c < end; ++c) {
    const T* row = v + c * v_stride;
    prefetch_row(row + kAhead * v_stride, columns);
    Vec x[kVecs];
    for (int j = 0; j < kVecs; ++j) {
      const int n = columns - j * kWidth;
      x[j] = whole || n >= kWidth ? load(row + j * kWidth)
                                  : (n > 0 ? load(row + j * kWidth, n) : zero());
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

template <class T>
using WeightedSum = void (*)(const float*, int64_t, int64_t, const T*, int64_t, int, float*,
                             int64_t);

template <class T>
void add_weighted(int64_t m, const float* weights, Columns keys, const T* v, int64_t v_stride,
                  int64_t dv, const RowState& state) {
  constexpr int kVecs = 4, kRows = 4;
  constexpr WeightedSum<T> sums[] = {weighted_sum<1, kVecs, T>, weighted_sum<2, kVecs, T>,
                                     weighted_sum<3, kVecs, T>, weighted_sum<4, kVecs, T>};
  for (int64_t c = 0; c < dv; c += kVecs * kWidth) {
    const int columns = static_cast<int>(smaller(dv - c, kVecs * kWidth));
    for (int64_t row = 0; row < m; row += kRows) {
      sums[smaller(kRows, m - row) - 1](weights + row * kTileStride, keys.begin, keys.seen, v + c,
                                        v_stride, columns, state.out + row * state.stride + c,
                                        state.stride);
    }
  }
}

template <class T>
void attention_fwd_few(const AttentionParams& p, const AttentionTask& task, float* scratch) {
  using Math = typename MathOf<T>::type;
  const HeadRows rows{p, task.b, task.hk};
  const int64_t m = task.row_end - task.row_begin;
  float* s = scratch;
  RowState state;
  state.stride = round_up(p.head_dim_v, 4 * kWidth);
  state.m = s + kFewRows * kTileStride;
  state.l = state.m + 16;
  state.out = state.l + kFewRows * kWidth;
  state.init(m);

  const T* k = static_cast<const T*>(p.k.data) + task.b * p.k.stride[0] + task.hk * p.k.stride[2];
  const T* v = static_cast<const T*>(p.v.data) + task.b * p.v.stride[0] + task.hk * p.v.stride[2];
  const int64_t begin = larger(task.key_begin, p.visible_begin(rows.query(task.row_begin)));
  const int64_t end = smaller(task.key_end, p.visible_end(rows.query(task.row_end - 1)));
  constexpr int64_t kBlock = kMaxKeyBlock;
  for (int64_t key = begin / kBlock * kBlock; key < end; key += kBlock) {
    const int64_t key_end = smaller(key + kBlock, end);
    const Columns columns = visible_columns(p, rows, task.row_begin, task.row_end, key, key_end);
    if (columns.empty()) continue;
    for (int64_t c = columns.begin; c < columns.seen; c += kWidth) {
      const T* keys = k + (key + c) * p.k.stride[1];
      for (int64_t t = 0; t < m; ++t) {
        const T* q = rows.at<const T>(p.q, task.row_begin + t);
        store(s + t * kTileStride + c,
              dot_products<Math>(q, keys, p.k.stride[1], columns.seen - c, p.head_dim));
      }
    }
    const float factor = finish_scores<T>(rows, task.row_begin, m, key, columns, s, nullptr);
    softmax_tile<FloatMath>(rows, task.row_begin, 0, m, key, columns, factor, s, state);
    add_weighted<T>(m, s, columns, v + key * p.v.stride[1], p.v.stride[1], p.head_dim_v, state);
  }
  finish_rows<T>(rows, task, state);
}

}  // namespace fastattn::FASTATTN_ISA
