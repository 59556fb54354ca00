// Activations and their derivatives on vectors.
#pragma once

#include "product.h"
#include "vec.h"

namespace fastattn::FASTATTN_ISA {

template <int kDegree>
inline Vec sigmoid(Vec x) {
  // 2^126 is finite, and its reciprocal is as good as 0.
  const Vec power = min(broadcast(126.0f), x * broadcast(-1.44269504f));
  return broadcast(1.0f) / (broadcast(1.0f) + exp2<kDegree>(power));
}

// The normal distribution's share below x, to 3e-7: a rational fit of erf(x / sqrt 2) on the range
// in which it is not 1 in float.
inline Vec normal_below(Vec x) {
  const Vec u = max(broadcast(-5.55f), min(broadcast(5.55f), x));
  const Vec s = u * u;
  Vec p = broadcast(4.487684958e-08f);
  p = fma(p, s, broadcast(1.270514759e-05f));
  p = fma(p, s, broadcast(3.425990425e-04f));
  p = fma(p, s, broadcast(9.383934879e-03f));
  p = fma(p, s, broadcast(6.822401748e-02f));
  p = fma(p, s, broadcast(7.978844568e-01f));
  Vec q = broadcast(1.188478572e-06f);
  q = fma(q, s, broadcast(7.435521475e-05f));
  q = fma(q, s, broadcast(1.898479765e-03f));
  q = fma(q, s, broadcast(2.879125055e-02f));
  q = fma(q, s, broadcast(2.521719459e-01f));
  q = fma(q, s, broadcast(1.0f));
  const Vec half = broadcast(0.5f);
  // What is left over in the far tail would show, multiplied by x.
  return select_less(x, broadcast(-5.5f), zero(), fma(half * u, p / q, half));
}

template <int kDegree>
inline Vec normal_density(Vec x) {
  return broadcast(0.398942280f) * exp2<kDegree>(x * x * broadcast(-0.721347520f));
}

// Each: value(x), and slope(x), its derivative.
template <Activation, int kDegree>
struct Activate;

template <int kDegree>
struct Activate<Activation::kNone, kDegree> {
  static Vec value(Vec x) { return x; }
  static Vec slope(Vec) { return broadcast(1.0f); }
};

template <int kDegree>
struct Activate<Activation::kRelu, kDegree> {
  static Vec value(Vec x) { return max(zero(), x); }
  static Vec slope(Vec x) { return select_less(zero(), x, broadcast(1.0f), zero()); }
};

template <int kDegree>
struct Activate<Activation::kRelu2, kDegree> {
  static Vec value(Vec x) {
    const Vec y = max(zero(), x);
    return y * y;
  }
  static Vec slope(Vec x) { return broadcast(2.0f) * max(zero(), x); }
};

template <int kDegree>
struct Activate<Activation::kGelu, kDegree> {
  static Vec value(Vec x) { return x * normal_below(x); }
  static Vec slope(Vec x) { return fma(x, normal_density<kDegree>(x), normal_below(x)); }
};

// x sigmoid(2 u), which is x (1 + tanh u) / 2, with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <int kDegree>
struct Activate<Activation::kGeluTanh, kDegree> {
  static constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // of 2 u
  static Vec share(Vec x) {
    return sigmoid<kDegree>(x * fma(x * x, broadcast(kCubic), broadcast(kLinear)));
  }
  static Vec value(Vec x) { return x * share(x); }
  static Vec slope(Vec x) {
    const Vec s = share(x);
    const Vec inner = x * fma(x * x, broadcast(3.0f * kCubic), broadcast(kLinear));
    return s * fma(inner, broadcast(1.0f) - s, broadcast(1.0f));
  }
};

template <int kDegree>
struct Activate<Activation::kSilu, kDegree> {
  static Vec value(Vec x) { return x * sigmoid<kDegree>(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid<kDegree>(x);
    return s * fma(x, broadcast(1.0f) - s, broadcast(1.0f));
  }
};

template <int kDegree>
struct Activate<Activation::kSigmoid, kDegree> {
  static Vec value(Vec x) { return sigmoid<kDegree>(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid<kDegree>(x);
    return s * (broadcast(1.0f) - s);
  }
};

template <int kDegree>
struct Activate<Activation::kTanh, kDegree> {
  static Vec value(Vec x) { return tanh(x); }
  static Vec slope(Vec x) {
    const Vec t = tanh(x);
    return broadcast(1.0f) - t * t;
  }
};

// Runs f(Activate<activation>{}).
template <int kDegree, class F>
inline void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(Activate<Activation::kNone, kDegree>{});
    case Activation::kRelu:
      return f(Activate<Activation::kRelu, kDegree>{});
    case Activation::kRelu2:
      return f(Activate<Activation::kRelu2, kDegree>{});
    case Activation::kGelu:
      return f(Activate<Activation::kGelu, kDegree>{});
    case Activation::kGeluTanh:
      return f(Activate<Activation::kGeluTanh, kDegree>{});
    case Activation::kSilu:
      return f(Activate<Activation::kSilu, kDegree>{});
    case Activation::kSigmoid:
      return f(Activate<Activation::kSigmoid, kDegree>{});
    case Activation::kTanh:
      return f(Activate<Activation::kTanh, kDegree>{});
  }
}

}  // namespace fastattn::FASTATTN_ISA
