// Attention forward for a few rows, straight from k and v: with so little work per key, packing
// would cost more than it saves, and the goal is to read memory at full speed.
//
//   for each block of keys: S = Q K^T by dot products; softmax; O += P V.
//
// Bytes: K and V once for all rows, (D + Dv) * sizeof(T) per key. Instructions per key, AVX-512, 4
// rows of float: D / 4 loads and as many FMAs for S, 3 for the sums over lanes; Dv / 16 loads and
// Dv / 4 FMAs for O. Pairs of bfloat16: half of that, and Dv / 32 to make pairs of two keys.
#pragma once

#include "attention_fwd.inl.h"

namespace fastattn::FASTATTN_ISA {

// How far ahead memory is asked for, so that the two streams K and V never start cold after each
// other's block: so many bytes, but at most so many keys.
constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kMaxAhead = 32;
// Values that are summed before the rows' outputs are put away.
constexpr int64_t kValueKeys = 32;
// Rows that share one pass over the keys.
constexpr int kMaxGroupRows = kWidth / 4;

// What a row of the cache must be made of to be read as it is.
template <class Math>
struct RowOf {
  using type = float;
  static constexpr Type kType = Type::kFloat32;
};
#if defined(__AVX512BF16__)
template <>
struct RowOf<PairMath> {
  using type = BF16;
  static constexpr Type kType = Type::kBFloat16;
};
#endif

// Rows of one block of keys, found before they are read, and of the next, which are only asked for.
struct BlockRows {
  const char* rows[kMaxKeyBlock + 2 * kMaxAhead + kWidth];
  int64_t bytes, ahead;

  void find(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key, int64_t columns) {
    const int64_t left = p.seqlen_k - key;
    bytes = columns * size_of(p.cache_type);
    ahead = left > kWidth ? larger(smaller(kAheadBytes / bytes, kMaxAhead), 1) : 0;
    const int64_t known = smaller(kMaxKeyBlock + ahead, left);
    point_at_rows(p, x, hk, key, known, rows);
    for (int64_t i = 0; i < kWidth + ahead; ++i) rows[known + i] = rows[known - 1];
  }
};

// The sizes of a call: elements of q and k in groups of lanes, of which a vector holds one for each
// of kRows rows.
struct FewSizes {
  int rows;       // of a group: 1, 2 or 4
  int64_t steps;  // vectors of q
  int64_t lanes() const { return kWidth / rows; }
};

// Rows [0, m) of a group as vectors [steps], each with `lanes` elements of one row after the other;
// rows past m repeat the last one, and nobody reads their scores.
template <class T, class Math>
void pack_queries(const HeadRows& rows, int64_t row_begin, int64_t m, FewSizes size, float* q) {
  float row[kTileStride];
  for (int r = 0; r < size.rows; ++r) {
    const int64_t at = row_begin + smaller(r, m - 1);
    copy_rows<Math>([&](int64_t) { return rows.at<const T>(rows.p.q, at); }, 1, rows.p.head_dim,
                    row);
    const int64_t filled = round_up(ceil_div(rows.p.head_dim, Math::kStep), kPanel);
    for (int64_t step = 0; step < size.steps; ++step) {
      for (int64_t g = 0; g < size.lanes(); ++g) {
        const int64_t from = step * size.lanes() + g;
        q[step * kWidth + r * size.lanes() + g] = from < filled ? row[from] : 0.0f;
      }
    }
  }
}

// Scores of a group of rows and kWidth keys, asking for the keys `ahead` rows further on.
template <class Math, int kRows>
void dot_products(const float* q, int64_t steps, const char* const* keys, int64_t ahead, float* s) {
  constexpr int kLanes = kWidth / kRows;
  constexpr int kLineSteps = kLanes >= 16 ? 1 : 16 / kLanes;
  // Two keys at a time share what is loaded of q; more would be faster on keys in the cache, but
  // memory comes fastest row by row.
  constexpr int kKeys = kRows == 1 ? 1 : 2;
  Vec sums[kWidth];
#pragma GCC unroll 16
  for (int first = 0; first < kWidth; first += kKeys) {
    const float* rows[kKeys];
#pragma GCC unroll 8
    for (int j = 0; j < kKeys; ++j) {
      rows[j] = reinterpret_cast<const float*>(keys[first + j]);
      sums[first + j] = zero();
    }
    for (int64_t step = 0; step < steps; ++step) {
      if (step % kLineSteps == 0) {
#pragma GCC unroll 8
        for (int j = 0; j < kKeys; ++j) {
          __builtin_prefetch(keys[ahead + first + j] + step * kLanes * 4);
        }
      }
      const Vec row = load(q + step * kWidth);
#pragma GCC unroll 8
      for (int j = 0; j < kKeys; ++j) {
        const Vec key = load_group<kLanes>(rows[j] + step * kLanes);
        sums[first + j] = Math::mul_add(row, key, sums[first + j]);
      }
    }
  }
  sum_groups<kRows>(sums);
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) store(s + i * kTileStride, sums[i]);
}

template <class Math>
void dot_products_of(FewSizes size, const float* q, const char* const* keys, int64_t ahead,
                     float* s) {
  if constexpr (kMaxGroupRows >= 4) {
    if (size.rows == 4) return dot_products<Math, 4>(q, size.steps, keys, ahead, s);
  }
  if constexpr (kMaxGroupRows >= 2) {
    if (size.rows == 2) return dot_products<Math, 2>(q, size.steps, keys, ahead, s);
  }
  dot_products<Math, 1>(q, size.steps, keys, ahead, s);
}

// O [kRows, columns] += P V over n keys, asking for the values `ahead` rows further on. P stands at
// stride kTileStride, in Math's elements; there are kVecs vectors of columns, the last of them with
// `last` columns.
template <class Math, int kRows, int kVecs>
struct WeightedSum {
  static void run(const float* weights, int64_t n, const char* const* values, int64_t ahead,
                  int64_t column, int last, float* o, int64_t o_stride) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) sums[i][j] = load(o + i * o_stride + j * kWidth);
    }
    for (int64_t c = 0; c < n; ++c) {
      const float* row = reinterpret_cast<const float*>(values[c]) + column;
      for (int64_t at = 0; at < kVecs * kWidth * 4; at += 64) {
        __builtin_prefetch(values[c + ahead] + column * 4 + at);
      }
      Vec x[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs - 1; ++j) x[j] = load(row + j * kWidth);
      x[kVecs - 1] = last == kWidth ? load(row + (kVecs - 1) * kWidth)
                                    : load(row + (kVecs - 1) * kWidth, last);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec w = broadcast(weights[i * kTileStride + c]);
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) sums[i][j] = fma(w, x[j], sums[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) store(o + i * o_stride + j * kWidth, sums[i][j]);
    }
  }
};

#if defined(__AVX512BF16__)
// Two keys at a time, and whole pairs of vectors of columns.
template <int kRows, int kVecs>
struct WeightedSum<PairMath, kRows, kVecs> {
  static constexpr int kDoubles = (kVecs + 1) / 2;

  static void run(const float* weights, int64_t n, const char* const* values, int64_t ahead,
                  int64_t column, int last, float* o, int64_t o_stride) {
    // Of the last pair of vectors.
    const int rest = last + (kVecs % 2 ? 0 : kWidth);
    Vec sums[kRows][2 * kDoubles];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 2 * kDoubles; ++j) sums[i][j] = load(o + i * o_stride + j * kWidth);
#pragma GCC unroll 2
      for (int j = 0; j < kDoubles; ++j) from_columns(&sums[i][2 * j], &sums[i][2 * j + 1]);
    }
    for (int64_t c = 0; c < n; c += 2) {
      const BF16* low = reinterpret_cast<const BF16*>(values[c]) + column;
      const BF16* high = reinterpret_cast<const BF16*>(values[c + 1]) + column;
      Vec x[2 * kDoubles];
#pragma GCC unroll 2
      for (int j = 0; j < kDoubles; ++j) {
        const int64_t at = j * 2 * kWidth;
        __builtin_prefetch(values[c + ahead] + (column + at) * 2);
        __builtin_prefetch(values[c + 1 + ahead] + (column + at) * 2);
        const bool whole = j + 1 < kDoubles || rest == 2 * kWidth;
        const Vec a = whole ? load_pairs(low + at) : load_pairs(low + at, rest);
        Vec b = zero();  // the last of an odd number has no partner
        if (c + 1 < n) b = whole ? load_pairs(high + at) : load_pairs(high + at, rest);
        zip_columns(a, b, &x[2 * j], &x[2 * j + 1]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec w = broadcast(weights[i * kTileStride + c / 2]);
#pragma GCC unroll 4
        for (int j = 0; j < 2 * kDoubles; ++j) sums[i][j] = fma_pairs(w, x[j], sums[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kDoubles; ++j) to_columns(&sums[i][2 * j], &sums[i][2 * j + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < 2 * kDoubles; ++j) store(o + i * o_stride + j * kWidth, sums[i][j]);
    }
  }
};
#endif

using WeightedSumRun = void (*)(const float*, int64_t, const char* const*, int64_t, int64_t, int,
                                float*, int64_t);

template <class Math, int kRows>
WeightedSumRun weighted_sum_of(int64_t vecs) {
  constexpr WeightedSumRun sums[] = {
      WeightedSum<Math, kRows, 1>::run, WeightedSum<Math, kRows, 2>::run,
      WeightedSum<Math, kRows, 3>::run, WeightedSum<Math, kRows, 4>::run};
  return sums[vecs - 1];
}

template <class Math>
WeightedSumRun weighted_sum_of(int64_t rows, int64_t vecs) {
  switch (rows) {
    case 1:
      return weighted_sum_of<Math, 1>(vecs);
    case 2:
      return weighted_sum_of<Math, 2>(vecs);
    case 3:
      return weighted_sum_of<Math, 3>(vecs);
    default:
      return weighted_sum_of<Math, 4>(vecs);
  }
}

template <class Math>
void add_weighted(int64_t m, const float* weights, int64_t n, const char* const* values,
                  int64_t ahead, int64_t dv, const RowState& state) {
  constexpr int64_t kVecs = 4, kRows = 4;
  for (int64_t c = 0; c < dv; c += kVecs * kWidth) {
    const int64_t columns = smaller(dv - c, kVecs * kWidth), vecs = ceil_div(columns, kWidth);
    const int last = static_cast<int>(columns - (vecs - 1) * kWidth);
    for (int64_t row = 0; row < m; row += kRows) {
      weighted_sum_of<Math>(smaller(kRows, m - row), vecs)(
          weights + row * kTileStride, n, values, ahead, c, last,
          state.out + row * state.stride + c, state.stride);
    }
  }
}

// A row of the cache as Math's elements.
template <class Math, class TK>
void copy_row(const TK* from, int64_t n, float* to) {
  int64_t c = 0;
  for (; c + kPanel <= n; c += kPanel)
    Math::store_row(to, c, load(from + c), load(from + c + kWidth));
  if (c == n) return;
  const int rest = static_cast<int>(n - c);
  const Vec low = rest < kWidth ? load(from + c, rest) : load(from + c);
  Math::store_row(to, c, low, rest > kWidth ? load(from + c + kWidth, rest - kWidth) : zero());
}

// A head's keys and values on their way into the products: as they lie in the cache where their
// type and size allow it, else through a copy of a few rows that stays in L1.
template <class Math>
class FewKeys {
 public:
  using Row = typename RowOf<Math>::type;
  static constexpr int64_t kCopied = kValueKeys;  // rows

  FewKeys(const AttentionParams& p, int64_t hk, FewSizes size, float* copies)
      : p_(p), hk_(hk), copies_(reinterpret_cast<Row*>(copies)) {
    const bool same = p.cache_type == RowOf<Math>::kType;
    k_as_is_ = same && p.head_dim == size.steps * size.lanes() * Math::kStep;
    v_as_is_ = same;
    // A row of copies holds whole groups; what lies past head_dim meets zeros of q, but must be
    // finite.
    stride_ = round_up(larger(size.steps * size.lanes() * Math::kStep, p.head_dim_v), 2 * kPanel);
    if (!k_as_is_) std::memset(copies, 0, static_cast<size_t>(kCopied * stride_) * sizeof(Row));
  }

  // At most, in floats.
  static int64_t scratch(const AttentionParams& p) {
    return kCopied * round_up(larger(p.head_dim, p.head_dim_v) + kWidth * Math::kStep, 2 * kPanel);
  }

  void find(int64_t key) {
    key_ = key;
    k_.find(p_, p_.k, hk_, key, p_.head_dim);
    v_.find(p_, p_.v, hk_, key, p_.head_dim_v);
  }

  // Pointers to kWidth keys from column c of the block on, of which `n` are wanted; and to values.
  const char* const* keys(int64_t c, int64_t n) {
    return k_as_is_ ? k_.rows + c : copy(k_, c, smaller(n, kWidth), p_.head_dim);
  }
  const char* const* values(int64_t c, int64_t n) {
    return v_as_is_ ? v_.rows + c : copy(v_, c, n, p_.head_dim_v);
  }
  // How far behind these pointers those stand that are to be asked for.
  int64_t keys_ahead() const { return k_as_is_ ? k_.ahead : 0; }
  int64_t values_ahead() const { return v_as_is_ ? v_.ahead : 0; }

  // What int8 keys or values of the block's columns are multiplied by; null where they are not.
  const float* key_scales(Columns columns) { return find_scales(p_.k_scale, columns, k_scales_); }
  const float* value_scales(Columns columns) { return find_scales(p_.v_scale, columns, v_scales_); }

 private:
  const char* const* copy(const BlockRows& from, int64_t c, int64_t n, int64_t columns) {
    switch (p_.cache_type) {
      case Type::kBFloat16:
        copy_as<BF16>(from, c, n, columns);
        break;
      case Type::kFloat16:
        copy_as<F16>(from, c, n, columns);
        break;
      case Type::kInt8:
        copy_as<int8_t>(from, c, n, columns);
        break;
      default:
        copy_as<float>(from, c, n, columns);
    }
    for (int64_t i = 0; i < kCopied + 1; ++i) {
      copied_[i] = reinterpret_cast<const char*>(copies_ + smaller(i, n - 1) * stride_);
    }
    return copied_;
  }

  template <class TK>
  void copy_as(const BlockRows& from, int64_t c, int64_t n, int64_t columns) {
    for (int64_t i = 0; i < n; ++i) {
      const char* ahead = from.rows[c + i + from.ahead];
      for (int64_t at = 0; at < from.bytes; at += 64) __builtin_prefetch(ahead + at);
      copy_row<Math>(reinterpret_cast<const TK*>(from.rows[c + i]), columns,
                     reinterpret_cast<float*>(copies_ + i * stride_));
    }
  }

  const float* find_scales(const Strided& scale, Columns columns, float* scales) {
    if (!scale.data) return nullptr;
    const float* data = static_cast<const float*>(scale.data);
    float* to = scales + columns.begin;
    const int64_t n = columns.seen - columns.begin;
    for_each_key(p_, scale, hk_, key_ + columns.begin, n,
                 [&](int64_t i, int64_t offset) { to[i] = data[offset]; });
    for (int64_t c = columns.seen; c < columns.end; ++c) scales[c] = 0.0f;
    return scales;
  }

  const AttentionParams& p_;
  int64_t hk_, key_ = 0, stride_;
  bool k_as_is_, v_as_is_;
  Row* copies_;
  BlockRows k_, v_;
  const char* copied_[kCopied + 1];
  alignas(64) float k_scales_[kMaxKeyBlock], v_scales_[kMaxKeyBlock];
};

inline void scale_columns(Columns columns, const float* scales, int64_t m, float* s) {
  for (int64_t t = 0; t < m; ++t, s += kTileStride) {
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      store(s + c, load(s + c) * load(scales + c));
    }
  }
}

// In floats, at most.
template <class T>
int64_t few_scratch(const AttentionParams& p) {
  using Math = typename MathOf<T>::type;
  return kFewRows * (2 * kTileStride + kWidth + p.head_dim_v + 4 * kWidth) + 16 +
         FewKeys<Math>::scratch(p);
}

template <class T>
void attention_fwd_few(const AttentionParams& p, const AttentionTask& task, float* scratch) {
  using Math = typename MathOf<T>::type;
  const HeadRows rows{p, task.hk};
  const int64_t m = task.row_end - task.row_begin;
  const auto take = [&](int64_t n) {
    float* at = scratch;
    scratch += n;
    return at;
  };
  RowState state;
  float* s = take(kFewRows * kTileStride);
  float* q = take(kFewRows * kTileStride);
  state.m = take(16);
  state.l = take(kFewRows * kWidth);
  state.stride = round_up(p.head_dim_v, 4 * kWidth);
  state.out = take(kFewRows * state.stride);
  state.init(m);

  FewSizes size;
  size.rows = m == 1 ? 1 : static_cast<int>(smaller(m == 2 ? 2 : 4, kMaxGroupRows));
  size.steps = ceil_div(ceil_div(p.head_dim, Math::kStep), size.lanes());
  const int64_t group_floats = size.steps * kWidth;
  for (int64_t row = 0; row < m; row += size.rows) {
    pack_queries<T, Math>(rows, task.row_begin + row, smaller(m - row, size.rows), size,
                          q + row / size.rows * group_floats);
  }
  FewKeys<Math> keys(p, task.hk, size, scratch);

  const int64_t begin = larger(task.key_begin, p.visible_begin(rows.query(task.row_begin)));
  const int64_t end = smaller(task.key_end, p.visible_end(rows.query(task.row_end - 1)));
  for (int64_t key = begin / kMaxKeyBlock * kMaxKeyBlock; key < end; key += kMaxKeyBlock) {
    const int64_t key_end = smaller(key + kMaxKeyBlock, end);
    const Columns columns = visible_columns(p, rows, task.row_begin, task.row_end, key, key_end);
    if (columns.empty()) continue;
    keys.find(key);
    for (int64_t c = columns.begin; c < columns.seen; c += kWidth) {
      const char* const* k = keys.keys(c, columns.seen - c);
      for (int64_t row = 0; row < m; row += size.rows) {
        dot_products_of<Math>(size, q + row / size.rows * group_floats, k, keys.keys_ahead(),
                              s + row * kTileStride + c);
      }
    }
    const float *k_scales = keys.key_scales(columns), *v_scales = keys.value_scales(columns);
    if (k_scales) scale_columns(columns, k_scales, m, s);
    const float factor = finish_scores<T>(rows, task.row_begin, m, key, columns, s, nullptr);
    if (v_scales) {
      softmax_tile<Math, true>(rows, task.row_begin, 0, m, key, columns, factor, s, state,
                               v_scales);
    } else {
      softmax_tile<Math>(rows, task.row_begin, 0, m, key, columns, factor, s, state);
    }
    // A few keys at a time, whose values then stay in L1 while all rows and columns pass by.
    for (int64_t c = columns.begin; c < columns.seen; c += kValueKeys) {
      const int64_t n = smaller(kValueKeys, columns.seen - c);
      add_weighted<Math>(m, s + c / Math::kStep, n, keys.values(c, n), keys.values_ahead(),
                         p.head_dim_v, state);
    }
  }
  finish_rows<T>(rows, task, state);
}

}  // namespace fastattn::FASTATTN_ISA
