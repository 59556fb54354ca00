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

// Calls f(i, offset) for n keys from a key on: offset is where row i of them begins.
template <class F>
void for_each_key(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key, int64_t n,
                  const F& f) {
  const int64_t page = p.sequences.page_size;
  for (int64_t i = 0; i < n;) {
    // As far as this page goes.
    const int64_t run = p.sequences.pages ? smaller(n - i, page - (key + i) % page) : n;
    int64_t offset = key_offset(p, x, hk, key + i);
    for (const int64_t end = i + run; i < end; ++i, offset += x.stride[1]) f(i, offset);
  }
}

// Pointers to n rows from a key on.
inline void point_at_rows(const AttentionParams& p, const Strided& x, int64_t hk, int64_t key,
                          int64_t n, const char** rows) {
  const char* data = static_cast<const char*>(x.data);
  const int64_t bytes = size_of(p.cache_type);
  for_each_key(p, x, hk, key, n,
               [&](int64_t i, int64_t offset) { rows[i] = data + offset * bytes; });
}

template <class TK, class T>
void convert_row(const TK* from, int64_t n, float scale, T* to) {
  const Vec by = broadcast(scale);
  int64_t c = 0;
  for (; c + kWidth <= n; c += kWidth) store(to + c, load(from + c) * by);
  if (c < n) store(to + c, load(from + c, static_cast<int>(n - c)) * by, static_cast<int>(n - c));
}

// n rows, keys from `key` on, in T and at a distance of `stride`.
template <class T>
void gather_rows(const AttentionParams& p, const char* const* rows, const Strided& scale,
                 int64_t hk, int64_t key, int64_t n, int64_t columns, int64_t stride, T* to) {
  const float* scales = static_cast<const float*>(scale.data);
  for (int64_t i = 0; i < n; ++i, to += stride) {
    const float by = scales ? scales[key_offset(p, scale, hk, key + i)] : 1.0f;
    const void* row = rows[i];
    switch (p.cache_type) {
      case Type::kBFloat16:
        convert_row(static_cast<const BF16*>(row), columns, by, to);
        break;
      case Type::kFloat16:
        convert_row(static_cast<const F16*>(row), columns, by, to);
        break;
      case Type::kInt8:
        convert_row(static_cast<const int8_t*>(row), columns, by, to);
        break;
      default:
        convert_row(static_cast<const float*>(row), columns, by, to);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
