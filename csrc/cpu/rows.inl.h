// Passing over a row: whole vectors first, then what is left; and where its results are stored.
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// All lanes of a vector, where a number would say how many.
struct Whole {};
template <class T>
inline Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec x, Whole) {
  store(p, x);
}

// Past the caches or through them. Streamed rows start at a cache line and end at one.
template <bool kStream, class T, class Lanes>
inline void put(T* p, Vec x, Lanes lanes) {
  if constexpr (kStream) {
    stream(p, x);
  } else {
    store(p, x, lanes);
  }
}

// Sums in as many chains as hide the latency of an addition.
constexpr int kChains = 4;
struct Sums {
  Vec chain[kChains];
  Sums() {
    for (Vec& x : chain) x = zero();
  }
  float total() const { return sum((chain[0] + chain[1]) + (chain[2] + chain[3])); }
};

// f(c, lanes, chain) for the vectors of n values: at column c, so many lanes, counted in turn.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + kChains * kWidth <= n; c += kChains * kWidth) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) f(c + i * kWidth, Whole{}, i);
  }
  for (; c + kWidth <= n; c += kWidth) f(c, Whole{}, 0);
  if (c < n) f(c, static_cast<int>(n - c), 0);
}

template <class T>
void row_as_floats(const T* from, int64_t n, float* to) {
  for_vectors(n, [&](int64_t c, auto lanes, int) { store(to + c, load(from + c, lanes), lanes); });
}

}  // namespace fastattn::FASTATTN_ISA
