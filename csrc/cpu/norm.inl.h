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

// What the first pass over a row leaves: the values as floats, rounded to T as in total, and the
// sum of them or, where nothing is taken off, of their squares.
struct FirstPass {
  const float* values;
  float sum;
};

template <class T, bool kCentered, bool kStream>
FirstPass gather_row(const NormParams& p, int64_t row, float* scratch) {
  Sums sums;
  const auto count = [&](Vec x, int i) {
    sums.chain[i] = kCentered ? sums.chain[i] + x : fma(x, x, sums.chain[i]);
  };
  const T* x = row_of<T>(p.x, row);
  if (p.total) {
    const T* residual = row_of<T>(p.residual, row);
    T* total = static_cast<T*>(p.total) + row * p.columns;
    for_vectors(p.columns, [&](int64_t c, auto lanes, int i) {
      const Vec t = load(x + c, lanes) + load(residual + c, lanes);
      const Vec v = rounded(t, T{});
      put<kStream>(total + c, t, lanes);
      store(scratch + c, v, lanes);
      count(v, i);
    });
  } else if constexpr (sizeof(T) == sizeof(float)) {
    for_vectors(p.columns, [&](int64_t c, auto lanes, int i) { count(load(x + c, lanes), i); });
    return {x, sums.total()};
  } else {
    for_vectors(p.columns, [&](int64_t c, auto lanes, int i) {
      const Vec v = load(x + c, lanes);
      store(scratch + c, v, lanes);
      count(v, i);
    });
  }
  return {scratch, sums.total()};
}

struct Moments {
  float mean, variance;
};

// Around a first guess of the mean, which the same pass corrects: a difference of squares would
// cancel where the mean is large. Not inlined, for one choice of instructions.
[[gnu::noinline]] inline Moments moments_around(float guess, const float* x, int64_t n) {
  const float count = static_cast<float>(n);
  Sums offsets, squares;
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

// Asks for the next row while this one is worked on in L1: memory would idle.
template <class T>
struct NextRow {
  const T *x, *residual;

  NextRow(const NormParams& p, int64_t row)
      : x(row < p.rows ? row_of<T>(p.x, row) : nullptr),
        residual(x && p.total ? row_of<T>(p.residual, row) : x) {}

  void ask(int64_t c) const {
    if (!x) return;
    __builtin_prefetch(x + c);
    if (residual != x) __builtin_prefetch(residual + c);
  }
};

template <class T, bool kCentered, bool kStream>
void norm_fwd_rows(const NormParams& p, const NormScale& scale, int64_t begin, int64_t end,
                   float* scratch) {
  const float *weight = scale.weight, *bias = scale.bias;
  for (int64_t row = begin; row < end; ++row) {
    const auto [x, sum] = gather_row<T, kCentered, kStream>(p, row, scratch);
    const float first = sum / static_cast<float>(p.columns);
    const Moments found = kCentered ? moments_around(first, x, p.columns) : Moments{0.0f, first};
    const float rstd = 1.0f / __builtin_sqrtf(found.variance + p.eps);
    const Vec mean = broadcast(found.mean), by = broadcast(rstd);
    const NextRow<T> next(p, row + 1);
    T* out = static_cast<T*>(p.out) + row * p.columns;
    const float* values = x;  // a structured binding cannot be captured
    for_vectors(p.columns, [&](int64_t c, auto lanes, int) {
      const Vec w = load(weight + c, lanes), v = load(values + c, lanes);
      next.ask(c);
      if constexpr (kCentered) {
        put<kStream>(out + c, fma((v - mean) * by, w, load(bias + c, lanes)), lanes);
      } else {
        put<kStream>(out + c, v * by * w, lanes);
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
  Vec mean, rstd;

  NormRow(const NormParams& p, int64_t row)
      : x(row_of<T>(p.x, row)),
        dout(row_of<T>(p.dout, row)),
        dtotal(p.dtotal.data ? row_of<T>(p.dtotal, row) : nullptr),
        mean(broadcast(kCentered ? p.mean[row] : 0.0f)),
        rstd(broadcast(p.rstd[row])) {}

  template <class Lanes>
  Vec normalised(int64_t c, Lanes lanes) const {
    const Vec v = load(x + c, lanes);
    return kCentered ? (v - mean) * rstd : v * rstd;
  }
};

// dx = rstd * (g - mean(g) - h * mean(g * h)) + dtotal; rms_norm has no mean(g).
// With kSums, dweight [N] and dbias [N] get the row's share; rms_norm has no dbias.
template <class T, bool kCentered, bool kStream, bool kSums>
void norm_bwd_row(const NormParams& p, const float* weight, int64_t at, float* dweight,
                  float* dbias) {
  const NormRow<T, kCentered> row(p, at);
  const int64_t n = p.columns;
  Sums of_g, of_gh;
  for_vectors(n, [&](int64_t c, auto lanes, int i) {
    const Vec d = load(row.dout + c, lanes), h = row.normalised(c, lanes);
    const Vec w = load(weight + c, lanes);
    if constexpr (kCentered) of_g.chain[i] = fma(d, w, of_g.chain[i]);
    of_gh.chain[i] = fma(d * w, h, of_gh.chain[i]);
    if constexpr (kSums) {
      store(dweight + c, fma(d, h, load(dweight + c, lanes)), lanes);
      if constexpr (kCentered) store(dbias + c, load(dbias + c, lanes) + d, lanes);
    }
  });
  const Vec minus_g = broadcast(-of_g.total() / static_cast<float>(n));
  const Vec minus_gh = broadcast(-of_gh.total() / static_cast<float>(n));
  T* dx = static_cast<T*>(p.dx) + at * n;
  for_vectors(n, [&](int64_t c, auto lanes, int) {
    const Vec g = load(row.dout + c, lanes) * load(weight + c, lanes);
    Vec of_norm = fma(row.normalised(c, lanes), minus_gh, g);
    if constexpr (kCentered) of_norm = of_norm + minus_g;
    const Vec before = row.dtotal ? load(row.dtotal + c, lanes) : zero();
    put<kStream>(dx + c, fma(of_norm, row.rstd, before), lanes);
  });
}

// `sums` gets dweight [N] and, where centered, dbias [N]; null: not wanted.
template <class T, bool kCentered, bool kStream>
void norm_bwd_rows(const NormParams& p, const NormScale& scale, int64_t begin, int64_t end,
                   float* sums) {
  if (sums) {
    for_vectors(kCentered ? 2 * p.columns : p.columns,
                [&](int64_t c, auto lanes, int) { store(sums + c, zero(), lanes); });
  }
  float* of_bias = kCentered && sums ? sums + p.columns : nullptr;
  const auto run =
      sums ? norm_bwd_row<T, kCentered, kStream, true> : norm_bwd_row<T, kCentered, kStream, false>;
  for (int64_t row = begin; row < end; ++row) run(p, scale.weight, row, sums, of_bias);
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
