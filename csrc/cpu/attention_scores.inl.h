// From raw products to scores: everything between q k^T and the softmax, for one tile of rows.
#pragma once

#include "../attention.h"
#include "gemm.inl.h"
#include "philox.inl.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kMaxKeyBlock = 256;
static_assert(kMaxKeyBlock < kTileStride, "a row of scores fits into a tile");

constexpr float kLog2E = 1.4426950408889634f;
constexpr double kLog2EDouble = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kInfinity = __builtin_inff();

// The rows of one KV head: row r is query r / groups of head hk * groups + r % groups.
struct HeadRows {
  const AttentionParams& p;  // of one sequence
  int64_t hk;
  int64_t groups = p.groups();
  // A division costs as much as a row of 16 scores; without grouping there is none.
  int64_t query(int64_t row) const { return groups == 1 ? row : row / groups; }
  int64_t head(int64_t row) const { return groups == 1 ? hk : hk * groups + row % groups; }
  template <class T>
  T* at(const Strided& x, int64_t row) const {
    return static_cast<T*>(x.data) + query(row) * x.stride[1] + head(row) * x.stride[2];
  }
  // Where lse keeps the row.
  int64_t flat(int64_t row) const { return head(row) * p.lse_stride + query(row); }
};

// Columns [begin, end) of a block of keys, in whole panels, which hold all that a tile can see:
// that is up to `seen`, and -inf from there on.
struct Columns {
  int64_t begin, end, seen;
  bool empty() const { return begin >= end; }
};

inline Columns visible_columns(const AttentionParams& p, const HeadRows& rows, int64_t row_begin,
                               int64_t row_end, int64_t key_begin, int64_t key_end) {
  const int64_t begin = larger(p.visible_begin(rows.query(row_begin)), key_begin) - key_begin;
  const int64_t seen = smaller(p.visible_end(rows.query(row_end - 1)), key_end) - key_begin;
  if (begin >= seen) return {0, 0, 0};
  return {begin / kPanel * kPanel, round_up(seen, kPanel), seen};
}

template <class T>
Vec load_bias(const Strided& x, int64_t at, bool is_float, int n) {
  if (is_float) {
    const float* p = static_cast<const float*>(x.data) + at;
    return x.stride[3] ? load(p, n) : broadcast(*p);
  }
  const T* p = static_cast<const T*>(x.data) + at;
  return x.stride[3] ? load(p, n) : broadcast(sum(load(p, 1)));
}

inline Vec lane_numbers() {
  alignas(64) static constexpr float lanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};
  return load(lanes);
}

// Turns one row of q k^T into scores in units of log2: scale, softcap, ALiBi, bias. `slope`, where
// given, receives the softcap's derivative.
template <class T>
void transform_row(const HeadRows& rows, int64_t row, int64_t key, Columns columns, float* s,
                   float* slope) {
  const AttentionParams& p = rows.p;
  const int64_t i = rows.query(row), h = rows.head(row);
  const bool bias_float = p.bias_type == Type::kFloat32;
  const int64_t bias_at = h * p.bias.stride[1] + i * p.bias.stride[2];
  const float* alibi = static_cast<const float*>(p.alibi.data);
  const float alibi_slope = alibi ? alibi[h * p.alibi.stride[1]] : 0.0f;
  for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
    Vec x = load(s + c) * broadcast(p.softmax_scale);
    if (p.softcap > 0.0f) {
      const Vec t = tanh(x * broadcast(1.0f / p.softcap));
      x = t * broadcast(p.softcap);
      if (slope) store(slope + c, broadcast(1.0f) - t * t);
    }
    if (alibi) {
      const float from = static_cast<float>(i + p.seqlen_k - p.seqlen_q - key - c);
      x = x - broadcast(alibi_slope) * abs(broadcast(from) - lane_numbers());
    }
    const int64_t n = smaller(p.seqlen_k - key - c, kWidth);
    if (p.bias.data && n > 0) {
      const int64_t at = bias_at + (key + c) * p.bias.stride[3];
      x = x + load_bias<T>(p.bias, at, bias_float, static_cast<int>(n));
    }
    store(s + c, x * broadcast(kLog2E));
  }
}

inline void mask_row(const HeadRows& rows, int64_t row, int64_t key, Columns columns, float* s) {
  const Strided& mask = rows.p.mask;
  const Vec never = broadcast(-kInfinity);
  const uint8_t* m = static_cast<const uint8_t*>(mask.data) + rows.head(row) * mask.stride[1] +
                     rows.query(row) * mask.stride[2];
  for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
    const int n = static_cast<int>(smaller(rows.p.seqlen_k - key - c, kWidth));
    if (n <= 0) break;
    if (mask.stride[3]) {
      store(s + c, select_bytes(m + key + c, n, load(s + c), never));
    } else if (!*m) {
      store(s + c, never);
    }
  }
}

inline void fill_never(float* s, int64_t n) {
  const Vec never = broadcast(-kInfinity);
  for (; n >= kWidth; n -= kWidth, s += kWidth) store(s, never);
  if (n > 0) store(s, never, static_cast<int>(n));
}

// Finishes the scores of a tile in place, -inf where a row may not look, and returns what they must
// be multiplied by to be in units of log2.
template <class T>
float finish_scores(const HeadRows& rows, int64_t row_begin, int64_t m, int64_t key,
                    Columns columns, float* s, float* slope) {
  const AttentionParams& p = rows.p;
  // A scale of 0 would turn a masked -inf into NaN if it were applied later.
  const bool transformed =
      p.softcap > 0.0f || p.alibi.data || p.bias.data || p.softmax_scale == 0.0f;
  for (int64_t t = 0; t < m; ++t, s += kTileStride) {
    const int64_t row = row_begin + t;
    if (transformed) transform_row<T>(rows, row, key, columns, s, slope);
    if (slope) slope += kTileStride;
    if (p.mask.data) mask_row(rows, row, key, columns, s);
    const int64_t i = rows.query(row);
    const int64_t begin = larger(smaller(p.visible_begin(i) - key, columns.end), columns.begin);
    const int64_t end = larger(smaller(p.visible_end(i) - key, columns.end), begin);
    fill_never(s + columns.begin, begin - columns.begin);
    fill_never(s + end, columns.end - end);
  }
  return transformed ? 1.0f : p.softmax_scale * kLog2E;
}

// Multiplies a row by the dropout mask: 0, or dropout_scale.
inline void drop_row(const HeadRows& rows, int64_t row, int64_t key, Columns columns, float* x) {
  const AttentionParams& p = rows.p;
  const uint32_t plane = static_cast<uint32_t>(p.first_plane + rows.head(row));
  for (int64_t c = columns.begin; c < columns.end; c += kPanel) {
    uint32_t words[kPanel];
    philox_row<kPanel>(p.seed, plane, static_cast<uint32_t>(rows.query(row)),
                       static_cast<uint32_t>(key + c), words);
    for (int j = 0; j < kPanel; ++j) {
      x[c + j] = words[j] >= p.dropout_threshold ? x[c + j] * p.dropout_scale : 0.0f;
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
