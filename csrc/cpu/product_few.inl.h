// Few tokens (m <= kFewTokens): the weights are read once, as they lie, at the speed of memory.
#pragma once

#include "product.inl.h"

namespace fastattn::FASTATTN_ISA {

// Tokens as elements, 0 past the last: [m][few_stride], in place of panels.
template <class Math>
inline int64_t few_stride(int64_t kk) {
  return round_up(ceil_div(kk, Math::kStep), kWidth);
}

template <class T>
void product_pack_few(const Product& p, float* out) {
  using Math = typename MathOf<T>::type;
  for (int64_t t = 0; t < p.m; ++t) {
    const T* b = static_cast<const T*>(p.b.data) + t * p.b.row_stride;
    for (int64_t k = 0; k < p.kk; k += kWidth * Math::kStep, out += kWidth) {
      store(out, Math::load_row(b + k, static_cast<int>(p.kk - k)));
    }
  }
}

// Rows that are asked for so long before they are used.
constexpr int kRowsAhead = 4;

// Dot products of kRows rows with all tokens: sums[token][row].
template <class Math, int kTokens, int kRows, class T>
inline void dot_rows(const T* a, int64_t stride, int64_t kk, const float* x, Vec (*sums)[kWidth]) {
  constexpr int64_t kValues = kWidth * Math::kStep;
  const int64_t x_stride = few_stride<Math>(kk);
  Vec total[kTokens][kRows];
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) total[t][r] = zero();
  }
  const auto step = [&](int64_t k, int n) __attribute__((always_inline)) {
    Vec row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      row[r] = Math::load_row(a + r * stride + k, n);
      __builtin_prefetch(a + (r + kRowsAhead) * stride + k);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const Vec value = load(x + t * x_stride + k / Math::kStep);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) total[t][r] = Math::mul_add(row[r], value, total[t][r]);
    }
  };
  int64_t k = 0;
  for (; k + kValues <= kk; k += kValues) step(k, kValues);
  if (k < kk) step(k, static_cast<int>(kk - k));
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) sums[t][r] = total[t][r];
  }
}

// kWidth rows from i on, or those that there are: out[t][i ...] of all tokens.
template <class Math, int kTokens, class T>
void dot_block(const Product& p, const Matrix& a, int64_t i, float* out, int64_t out_stride) {
  constexpr int kRows = kTokens <= 4 ? 4 : 2;
  const T* from = static_cast<const T*>(a.data) + i * a.row_stride;
  const int64_t rows = smaller(kWidth, p.n - i);
  Vec sums[kTokens][kWidth];
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    Vec part[kTokens][kWidth];
    dot_rows<Math, kTokens, kRows>(from + r * a.row_stride, a.row_stride, p.kk, p.panels, part);
    for (int t = 0; t < kTokens; ++t) {
      for (int l = 0; l < kRows; ++l) sums[t][r + l] = part[t][l];
    }
  }
  for (; r < rows; ++r) {
    Vec part[kTokens][kWidth];
    dot_rows<Math, kTokens, 1>(from + r * a.row_stride, a.row_stride, p.kk, p.panels, part);
    for (int t = 0; t < kTokens; ++t) sums[t][r] = part[t][0];
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int64_t l = rows; l < kWidth; ++l) sums[t][l] = zero();
    sum_groups<1>(sums[t]);
    store(out + t * out_stride, sums[t][0]);
  }
}

// Where outputs lie side by side (a weight [in, out]): every term is added to all of them.
template <class Math, int kTokens, class T>
void add_terms(const Product& p, const Matrix& a, int64_t begin, int64_t end, float* out,
               int64_t out_stride) {
  constexpr int kTerms = 8;
  constexpr int64_t kAhead = 16;  // each row is a jump in memory, which nobody foresees
  const int64_t steps = ceil_div(p.kk, Math::kStep), x_stride = few_stride<Math>(p.kk);
  const T* from = static_cast<const T*>(a.data) + begin;
  for (int t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < end - begin; i += kWidth) store(out + t * out_stride + i, zero());
  }
  const auto terms = [&](int64_t s, int count, int64_t i, int n) __attribute__((always_inline)) {
    Vec sums[kTokens];
    for (int t = 0; t < kTokens; ++t) sums[t] = load(out + t * out_stride + i);
    for (int q = 0; q < count; ++q) {
      const int64_t k = (s + q) * Math::kStep;
      const T* low = from + k * a.column_stride + i;
      __builtin_prefetch(low + kAhead * a.column_stride);
      if (Math::kStep == 2) __builtin_prefetch(low + (kAhead + 1) * a.column_stride);
      const Vec row = Math::kStep == 1 || k + 1 >= p.kk
                          ? Math::zip_row(low, n)
                          : Math::zip_rows(low, low + a.column_stride, n);
      for (int t = 0; t < kTokens; ++t) {
        sums[t] = Math::mul_add(broadcast(p.panels[t * x_stride + s + q]), row, sums[t]);
      }
    }
    for (int t = 0; t < kTokens; ++t) store(out + t * out_stride + i, sums[t]);
  };
  for (int64_t s = 0; s < steps; s += kTerms) {
    const int count = static_cast<int>(smaller(kTerms, steps - s));
    int64_t i = 0;
    if (count == kTerms) {
      for (; i + kWidth <= end - begin; i += kWidth) terms(s, kTerms, i, kWidth);
    }
    for (; i < end - begin; i += kWidth) {
      terms(s, count, i, static_cast<int>(smaller(kWidth, end - begin - i)));
    }
  }
}

template <class T, int kTokens>
void few_sums(const Product& p, const Matrix& a, int64_t begin, int64_t end, float* out,
              int64_t out_stride) {
  using Math = typename MathOf<T>::type;
  if (!by_rows(a)) return add_terms<Math, kTokens, T>(p, a, begin, end, out, out_stride);
  for (int64_t i = begin; i < end; i += kWidth) {
    dot_block<Math, kTokens, T>(p, a, i, out + i - begin, out_stride);
  }
}

template <class T, size_t... kTokens>
void few_sums_of(std::index_sequence<kTokens...>, const Product& p, const Matrix& a, int64_t begin,
                 int64_t end, float* out, int64_t out_stride) {
  using Sums = void (*)(const Product&, const Matrix&, int64_t, int64_t, float*, int64_t);
  static constexpr Sums by_tokens[] = {few_sums<T, int(kTokens) + 1>...};
  by_tokens[p.m - 1](p, a, begin, end, out, out_stride);
}

// One token's row of a matrix, from an output on; null where there is no matrix.
template <class T>
inline T* row_from(const Matrix& x, int64_t token, int64_t output) {
  return x.data ? static_cast<T*>(x.data) + token * x.row_stride + output : nullptr;
}

template <class T>
inline Vec add_few(Vec x, const void* bias, int64_t i, int n) {
  return bias ? x + load(static_cast<const T*>(bias) + i, n) : x;
}

// One token's outputs [begin, end).
template <class T>
void finish_few(const Product& p, int64_t token, int64_t begin, int64_t end, const float* sums,
                const float* gates) {
  constexpr int kDegree = MathOf<T>::type::kExpDegree;
  const Finish& f = p.finish;
  T* out = row_from<T>(f.out, token, begin);
  T* pre = row_from<T>(f.pre, token, begin);
  const T* residual = row_from<T>(f.residual, token, begin);
  with_activation<kDegree>(f.activation, [&](auto activation) {
    for (int64_t i = 0; i < end - begin; i += kWidth) {
      const int n = static_cast<int>(smaller(kWidth, end - begin - i));
      Vec x = add_few<T>(load(sums + i), f.bias, begin + i, n);
      if (gates) {
        const Vec gate = add_few<T>(load(gates + i), f.gate_bias, begin + i, n);
        if (pre) store(pre + i, gate, n);
        if (pre) store(pre + p.outputs + i, x, n);
        x = x * activation.value(gate);
      } else {
        if (pre) store(pre + i, x, n);
        x = activation.value(x);
      }
      if (f.dropout.threshold)
        x = x * draw_row(f.dropout, p.first_row + token, p.first_output + begin + i);
      if (residual) x = x + load(residual + i, n);
      if (out) store(out + i, x, n);
    }
  });
}

template <class T>
void product_run_few(const Product& p, int64_t begin, int64_t end, float* scratch) {
  constexpr auto kTokens = std::make_index_sequence<kFewTokens>{};
  for (int64_t i = begin; i < end; i += kFewBlock) {
    const int64_t last = smaller(end, i + kFewBlock);
    float *sums = scratch, *gates = p.gate.data ? scratch + kFewTokens * kFewBlock : nullptr;
    few_sums_of<T>(kTokens, p, p.a, i, last, sums, kFewBlock);
    if (gates) few_sums_of<T>(kTokens, p, p.gate, i, last, gates, kFewBlock);
    for (int64_t t = 0; t < p.m; ++t) {
      finish_few<T>(p, t, i, last, sums + t * kFewBlock, gates ? gates + t * kFewBlock : nullptr);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
