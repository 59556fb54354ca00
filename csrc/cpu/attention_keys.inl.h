// Where the keys and values of a sequence lie: row by row, or in the pages of a cache, in the
// call's type or in one of the cache's own.
#pragma once

#include "../attention.h"
#include "gemm.inl.h"

namespace fastattn::FASTATTN_ISA {

// Elements from the tensor's start to a key's row of one head.
inline int64_t key_offset(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key) {
  const Sequences& s = p.sequences;
  if (!s.pages) return key * x.stride[1] + hk * x.stride[2];
  return s.pages[key / s.page_size] * x.stride[0] + key % s.page_size * x.stride[1] +
         hk * x.stride[2];
}

// Pointers to n rows from a key on.
template <class TK>
void point_at_rows(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key, int64_t n,
                   const TK** rows) {
  const TK* data = static_cast<const TK*>(x.data);
  for (int64_t i = 0; i < n;) {
    const int64_t page = p.sequences.pages ? p.sequences.page_size : n;
    // As far as this page goes.
    const int64_t run = p.sequences.pages ? smaller(n - i, page - (key + i) % page) : n;
    const TK* row = data + key_offset(p, x, hk, key + i);
    for (int64_t end = i + run; i < end; ++i, row += x.stride[1]) rows[i] = row;
  }
}

inline float scale_of(const AttentionParams& p, const Strided& scale, int64_t hk, int64_t key) {
  return static_cast<const float*>(scale.data)[key_offset(p, scale, hk, key)];
}

template <class TK, class T>
void convert_row(const TK* from, int64_t n, float scale, T* to) {
  for (int64_t c = 0; c < n; c += kWidth) {
    const int lanes = static_cast<int>(smaller(n - c, kWidth));
    store(to + c, load(from + c, lanes) * broadcast(scale), lanes);
  }
}

// Rows [key, key + n) of one head, in T, at a distance of kMaxHeadDim.
template <class T>
void gather_rows(const AttentionParams& p, const Strided& x, const Strided& scale, int64_t hk,
                 int64_t key, int64_t n, int64_t columns, T* to) {
  for (int64_t i = 0; i < n; ++i, to += kMaxHeadDim) {
    const int64_t at = key_offset(p, x, hk, key + i);
    const float by = scale.data ? scale_of(p, scale, hk, key + i) : 1.0f;
    switch (p.cache_type) {
      case Type::kBFloat16:
        convert_row(static_cast<const BF16*>(x.data) + at, columns, by, to);
        break;
      case Type::kFloat16:
        convert_row(static_cast<const F16*>(x.data) + at, columns, by, to);
        break;
      case Type::kInt8:
        convert_row(static_cast<const int8_t*>(x.data) + at, columns, by, to);
        break;
      default: convert_row(static_cast<const float*>(x.data) + at, columns, by, to);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
