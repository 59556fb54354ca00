// layer_norm and rms_norm on a block of rows. Each tensor is passed over once in memory; the second
// and third pass over a row find it in L1.
//
// Products that are added to something say fma. A compiler that may choose would choose differently
// where results are streamed, and a row's bits would depend on how many others there are.
#pragma once

#include "../norm.h"
#include "kernels.h"
#include "rows.inl.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
const T* row_of(const Strided& x, int64_t row) {
  return static_cast<const T*>(x.data) + row * x.stride[0];
}

// A row to be normalised, as floats: rounded to T, as what is stored in total.
template <class T, bool kStream>
const float* gather_row(const NormParams& p, int64_t row, float* values) {
  const T* x = row_of<T>(p.x, row);
  if (!p.total) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
    row_as_floats(x, p.columns, values);
    return values;
  }
  const T* residual = row_of<T>(p.residual, row);
  T* total = static_cast<T*>(p.total) + row * p.columns;
  for_vectors(p.columns, [&](int64_t c, auto lanes, int) {
    const Vec t = load(x + c, lanes) + load(residual + c, lanes);
    put<kStream>(total + c, t, lanes);
    store(values + c, rounded(t, T{}), lanes);
  });
  return values;
}

struct Moments {
  float mean, variance;
};

// The mean in one pass; in the next, what it was off by and the squares around it: a difference of
// squares would cancel where the mean is large. Not inlined, for one choice of instructions.
[[gnu::noinline]] inline Moments moments_of(const float* x, int64_t n) {
  const float count = static_cast<float>(n);
  Sums sums, offsets, squares;
  for_vectors(
      n, [&](int64_t c, auto lanes, int i) { sums.chain[i] = sums.chain[i] + load(x + c, lanes); });
  const float guess = sums.total() / count;
  const Vec middle = broadcast(guess);
  const int64_t whole = n - n % kWidth;
  for_vectors(whole, [&](int64_t c, auto lanes, int i) {
    const Vec d = load(x + c, lanes) - middle;
    offsets.chain[i] = offsets.chain[i] + d;
    squares.chain[i] = fma(d, d, squares.chain[i]);
  });
  float offset = offsets.total(), square = squares.total();
  for (int64_t c = whole; c < n; ++c) {
    offset += x[c] - guess;
    square += (x[c] - guess) * (x[c] - guess);
  }
  offset /= count;
  return {guess + offset, square / count - offset * offset};
}

// Around 0.
[[gnu::noinline]] inline Moments squares_of(const float* x, int64_t n) {
  Sums squares;
  for_vectors(n, [&](int64_t c, auto lanes, int i) {
    const Vec v = load(x + c, lanes);
    squares.chain[i] = fma(v, v, squares.chain[i]);
  });
  return {0.0f, squares.total() / static_cast<float>(n)};
}

template <class T, bool kCentered, bool kStream>
void norm_fwd_rows(const NormParams& p, const NormScale& scale, int64_t begin, int64_t end,
                   float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = gather_row<T, kStream>(p, row, scratch);
    const Moments found = kCentered ? moments_of(x, p.columns) : squares_of(x, p.columns);
    const float rstd = 1.0f / __builtin_sqrtf(found.variance + p.eps);
    const Vec mean = broadcast(found.mean), by = broadcast(rstd);
    T* out = static_cast<T*>(p.out) + row * p.columns;
    for_vectors(p.columns, [&](int64_t c, auto lanes, int) {
      const Vec weight = load(scale.weight + c, lanes), v = load(x + c, lanes);
      if constexpr (kCentered) {
        const Vec bias = load(scale.bias + c, lanes);
        put<kStream>(out + c, fma((v - mean) * by, weight, bias), lanes);
      } else {
        put<kStream>(out + c, v * by * weight, lanes);
      }
    });
    if (kCentered && p.mean) p.mean[row] = found.mean;
    if (p.rstd) p.rstd[row] = rstd;
  }
  if constexpr (kStream) finish_streams();
}

// One row of backward, of which both passes need the same: g = dout * weight, and the normalised
// value h.
template <class T, bool kCentered>
struct NormRow {
  const T *x, *dout, *dtotal;
  const float* weight;
  Vec mean, rstd;

  NormRow(const NormParams& p, const NormScale& scale, int64_t row)
      : x(row_of<T>(p.x, row)),
        dout(row_of<T>(p.dout, row)),
        dtotal(p.dtotal.data ? row_of<T>(p.dtotal, row) : nullptr),
        weight(scale.weight),
        mean(broadcast(kCentered ? p.mean[row] : 0.0f)),
        rstd(broadcast(p.rstd[row])) {}

  template <class Lanes>
  Vec normalised(int64_t c, Lanes lanes) const {
    const Vec v = load(x + c, lanes);
    return kCentered ? (v - mean) * rstd : v * rstd;
  }
};

// dx = rstd * (g - mean(g) - h * mean(g * h)) + dtotal; rms_norm has no mean(g).
// `sums` collects dweight [N] and, where centered, dbias [N]; null: not wanted.
template <class T, bool kCentered, bool kStream>
void norm_bwd_row(const NormParams& p, const NormScale& scale, int64_t at, float* sums) {
  const NormRow<T, kCentered> row(p, scale, at);
  const int64_t n = p.columns;
  Sums of_g, of_gh;
  for_vectors(n, [&](int64_t c, auto lanes, int i) {
    const Vec d = load(row.dout + c, lanes), h = row.normalised(c, lanes);
    const Vec weight = load(row.weight + c, lanes);
    if constexpr (kCentered) of_g.chain[i] = fma(d, weight, of_g.chain[i]);
    of_gh.chain[i] = fma(d * weight, h, of_gh.chain[i]);
    if (sums) {
      store(sums + c, fma(d, h, load(sums + c, lanes)), lanes);
      if constexpr (kCentered) store(sums + n + c, load(sums + n + c, lanes) + d, lanes);
    }
  });
  const Vec minus_g = broadcast(-of_g.total() / static_cast<float>(n));
  const Vec minus_gh = broadcast(-of_gh.total() / static_cast<float>(n));
  T* dx = static_cast<T*>(p.dx) + at * n;
  for_vectors(n, [&](int64_t c, auto lanes, int) {
    const Vec g = load(row.dout + c, lanes) * load(row.weight + c, lanes);
    Vec of_norm = fma(row.normalised(c, lanes), minus_gh, g);
    if constexpr (kCentered) of_norm = of_norm + minus_g;
    const Vec before = row.dtotal ? load(row.dtotal + c, lanes) : zero();
    put<kStream>(dx + c, fma(of_norm, row.rstd, before), lanes);
  });
}

template <class T, bool kCentered, bool kStream>
void norm_bwd_rows(const NormParams& p, const NormScale& scale, int64_t begin, int64_t end,
                   float* sums) {
  if (sums) {
    for_vectors(kCentered ? 2 * p.columns : p.columns,
                [&](int64_t c, auto lanes, int) { store(sums + c, zero(), lanes); });
  }
  for (int64_t row = begin; row < end; ++row) {
    norm_bwd_row<T, kCentered, kStream>(p, scale, row, sums);
  }
  if constexpr (kStream) finish_streams();
}

// A gradient [N] from the sums of the blocks, `step` floats apart: columns [begin, end), added in
// the blocks' order.
template <class T>
void norm_add_blocks(const float* sums, int64_t blocks, int64_t step, int64_t begin, int64_t end,
                     T* gradient) {
  for_vectors(end - begin, [&](int64_t c, auto lanes, int) {
    Vec total = zero();
    for (int64_t b = 0; b < blocks; ++b) total = total + load(sums + b * step + begin + c, lanes);
    store(gradient + begin + c, total, lanes);
  });
}

template <class T>
void norm_store_gradient(Type type, const NormSums& of, int64_t begin, int64_t end,
                         void* gradient) {
  if (type == Type::kFloat32) {
    norm_add_blocks(of.sums, of.blocks, of.step, begin, end, static_cast<float*>(gradient));
  } else {
    norm_add_blocks(of.sums, of.blocks, of.step, begin, end, static_cast<T*>(gradient));
  }
}

// A parameter [N] as floats, plus an offset.
template <class T>
void norm_load_parameter(const void* from, Type type, int64_t n, float offset, float* to) {
  const Vec more = broadcast(offset);
  for_vectors(n, [&](int64_t c, auto lanes, int) {
    const Vec x = type == Type::kFloat32 ? load(static_cast<const float*>(from) + c, lanes)
                                         : load(static_cast<const T*>(from) + c, lanes);
    store(to + c, x + more, lanes);
  });
}

template <class T>
void norm_fwd(const NormParams& p, const NormScale& scale, bool stream, int64_t begin, int64_t end,
              float* scratch) {
  const auto rows = p.centered
                        ? (stream ? norm_fwd_rows<T, true, true> : norm_fwd_rows<T, true, false>)
                        : (stream ? norm_fwd_rows<T, false, true> : norm_fwd_rows<T, false, false>);
  rows(p, scale, begin, end, scratch);
}

template <class T>
void norm_bwd(const NormParams& p, const NormScale& scale, bool stream, int64_t begin, int64_t end,
              float* sums) {
  const auto rows = p.centered
                        ? (stream ? norm_bwd_rows<T, true, true> : norm_bwd_rows<T, true, false>)
                        : (stream ? norm_bwd_rows<T, false, true> : norm_bwd_rows<T, false, false>);
  rows(p, scale, begin, end, sums);
}

template <class T>
constexpr NormKernels norm_kernels() {
  return {norm_load_parameter<T>, norm_fwd<T>, norm_bwd<T>, norm_store_gradient<T>};
}

}  // namespace fastattn::FASTATTN_ISA
