// The only file family with intrinsics: a vector of kWidth floats and the few operations that
// kernels are written on. Each tier's translation unit sees one implementation, in its own
// namespace.
//
// BF16 and F16 are storage types; arithmetic is always in float. A "pair" is two bfloat16 in the 32
// bits of one float lane, low half first: the operand of a bfloat16 dot product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastattn {
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
}  // namespace fastattn

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_generic.h"
#endif

namespace fastattn::FASTATTN_ISA {

// 2^x to a relative error of 2e-9 before rounding (degree 6), or of 7.5e-5 (degree 3, for results
// that are rounded to bfloat16). 0 for x < -150, -inf too; NaN stays NaN. Minimax coefficients of
// 2^f on
// [-1/2, 1/2]; degree 6 is exact at 0.
template <int kDegree>
inline Vec exp2(Vec x) {
  x = max(broadcast(-200.0f), x);
  const Vec whole = round_even(x);
  const Vec f = x - whole;
  Vec p;
  if constexpr (kDegree == 3) {
    p = broadcast(0.05517166907f);
    p = fma(p, f, broadcast(0.2426111222f));
    p = fma(p, f, broadcast(0.6932609855f));
    p = fma(p, f, broadcast(0.9999280735f));
  } else {
    static_assert(kDegree == 6, "only degrees 3 and 6 have coefficients");
    p = broadcast(1.5353362024e-4f);
    p = fma(p, f, broadcast(1.33988746504e-3f));
    p = fma(p, f, broadcast(9.61843735914e-3f));
    p = fma(p, f, broadcast(5.55033247054e-2f));
    p = fma(p, f, broadcast(0.240226479136f));
    p = fma(p, f, broadcast(0.693147202855f));
    p = fma(p, f, broadcast(1.0f));
  }
  return scale_by_power(p, whole);
}

inline float exp2_scalar(float x) {
  float lanes[kWidth];
  store(lanes, exp2<6>(broadcast(x)));
  return lanes[0];
}

// tanh to a few units in the last place: an odd polynomial near 0, where 1 - 2 / (e^2x + 1)
// cancels.
inline Vec tanh(Vec x) {
  const Vec magnitude = abs(x);
  const Vec square = x * x;
  Vec near = broadcast(-5.70501421748e-3f);
  near = fma(near, square, broadcast(2.06391155550e-2f));
  near = fma(near, square, broadcast(-5.37397254626e-2f));
  near = fma(near, square, broadcast(1.33314423537e-1f));
  near = fma(near, square, broadcast(-3.33332819498e-1f));
  near = fma(near * square, x, x);
  const Vec e = exp2<6>(min(broadcast(10.0f), magnitude) * broadcast(2.885390082f));
  const Vec far = copy_sign(broadcast(1.0f) - broadcast(2.0f) / (e + broadcast(1.0f)), x);
  return select_less(magnitude, broadcast(0.625f), near, far);
}

// How a kernel multiplies. Packed operands are made of 4-byte elements, each kStep values along the
// dimension that is summed over: floats, or pairs of bfloat16 where the tier multiplies those.
struct FloatMath {
  static constexpr int kStep = 1;
  static constexpr int kExpDegree = 6;
  static Vec mul_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  // kWidth elements along a row of n <= kWidth * kStep values, 0 past its end.
  template <class T>
  static Vec load_row(const T* p, int n) {
    return n >= kWidth ? load(p) : load(p, n);
  }
  // kStep rows as elements, lane i holding column i of each; or one row, the others being 0.
  template <class T>
  static Vec zip_rows(const T* low, const T*, int n) {
    return load_row(low, n);
  }
  static Vec zip_rows(Vec low, Vec) { return low; }
  template <class T>
  static Vec zip_row(const T* row, int n) {
    return load_row(row, n);
  }
  // 2 * kWidth neighbouring values of a row, from column c on.
  static void store_row(float* row, int64_t c, Vec a, Vec b) {
    store(row + c, a);
    store(row + c + kWidth, b);
  }
};

#if defined(__AVX512BF16__)
struct PairMath {
  static constexpr int kStep = 2;
  static constexpr int kExpDegree = 3;
  static Vec mul_add(Vec a, Vec b, Vec sum) { return fma_pairs(a, b, sum); }
  static Vec load_row(const BF16* p, int n) {
    return n >= 2 * kWidth ? load_pairs(p) : load_pairs(p, n);
  }
  static Vec zip_rows(const BF16* low, const BF16* high, int n) {
    return zip_pairs(low, high, n < kWidth ? n : kWidth);
  }
  static Vec zip_rows(Vec low, Vec high) { return zip_pairs(low, high); }
  static Vec zip_row(const BF16* row, int n) { return zip_pairs(row, n < kWidth ? n : kWidth); }
  static void store_row(float* row, int64_t c, Vec a, Vec b) {
    store(row + c / 2, join_pairs(a, b));
  }
};
#else
using PairMath = FloatMath;
#endif

template <class T>
struct MathOf {
  using type = FloatMath;
};
template <>
struct MathOf<BF16> {
  using type = PairMath;
};

}  // namespace fastattn::FASTATTN_ISA
