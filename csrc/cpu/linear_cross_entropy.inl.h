// The end of a tile whose outputs are classes: what a token's loss needs of them, or the gradient
// of the logits. Lanes are tokens, so nothing is summed across a vector.
#pragma once

#include "product_tile.inl.h"

namespace fastattn::FASTATTN_ISA {

inline void cap(const Place& at, float softcap, float* tile) {
  if (softcap == 0.0f) return;
  const Vec bound = broadcast(softcap), inverse = broadcast(1.0f / softcap);
  for_tile(at,
           [&](int64_t, int64_t x) { store(tile + x, bound * tanh(load(tile + x) * inverse)); });
}

// Runs f(lane, class of this tile) for each token whose target is here.
template <class F>
inline void for_targets(const Product& p, const Place& at, const F& f) {
  for (int64_t j = 0; j < at.lanes; ++j) {
    const int64_t i = p.loss.target[p.first_row + at.j + j] - p.first_output - at.i;
    if (i >= 0 && i < at.h) f(j, i);
  }
}

// Adds this tile's classes to what its part knows of the tokens.
inline void add_classes(const Product& p, const Place& at, const float* tile) {
  constexpr float kLog2E = 1.44269504f;
  const ClassLoss& loss = p.loss;
  const int64_t first = p.first_output + at.i;
  float* states = loss.states + first / loss.part_rows * ClassLoss::kStates * loss.stride;
  const auto state = [&](int which) { return states + which * loss.stride + p.first_row + at.j; };
  const bool begins = first % loss.part_rows == 0;
  for (int64_t j = 0; j < at.vectors(); j += kWidth) {
    const Vec before = begins ? broadcast(-3.0e38f) : load(state(ClassLoss::kLargest) + j);
    Vec top = before, weighted = begins ? zero() : load(state(ClassLoss::kWeighted) + j);
    for (int64_t i = 0; i < at.h; ++i) {
      const Vec x = load(tile + i * kPanel + j);
      top = max(top, x);
      weighted = loss.class_weight ? fma(broadcast(loss.class_weight[first + i]), x, weighted)
                                   : weighted + x;
    }
    Vec total = zero();
    if (!begins)
      total = load(state(ClassLoss::kSum) + j) * exp2<6>((before - top) * broadcast(kLog2E));
    for (int64_t i = 0; i < at.h; ++i) {
      total = total + exp2<6>((load(tile + i * kPanel + j) - top) * broadcast(kLog2E));
    }
    store(state(ClassLoss::kLargest) + j, top);
    store(state(ClassLoss::kSum) + j, total);
    store(state(ClassLoss::kWeighted) + j, weighted);
    if (begins) store(state(ClassLoss::kTarget) + j, zero());
  }
  for_targets(p, at,
              [&](int64_t j, int64_t i) { state(ClassLoss::kTarget)[j] = tile[i * kPanel + j]; });
}

// The gradient of the logits in their place.
inline void take_slope(const Product& p, const Place& at, float* tile) {
  constexpr float kLog2E = 1.44269504f;
  const ClassLoss& loss = p.loss;
  const int64_t first = p.first_output + at.i, token = p.first_row + at.j;
  float logits[kGroupFloats];
  for (int64_t j = 0; j < at.lanes; j += kWidth) {
    const int n = static_cast<int>(smaller(at.lanes - j, kWidth));
    const Vec lse = load(loss.lse + token + j, n), share = load(loss.by_share + token + j, n);
    const Vec even = load(loss.by_weight + token + j, n);
    const Vec rest = load(loss.lse_rest + token + j, n);
    for (int64_t i = 0; i < at.h; ++i) {
      const Vec x = load(tile + i * kPanel + j);
      store(logits + i * kPanel + j, x);
      const float weight = loss.class_weight ? loss.class_weight[first + i] : 1.0f;
      const Vec d =
          share * exp2<6>((x - lse - rest) * broadcast(kLog2E)) - even * broadcast(weight);
      store(tile + i * kPanel + j, d);
    }
  }
  for_targets(p, at,
              [&](int64_t j, int64_t i) { tile[i * kPanel + j] -= loss.by_target[token + j]; });
  if (loss.softcap == 0.0f) return;
  const Vec inverse = broadcast(1.0f / loss.softcap);
  for_tile(at, [&](int64_t, int64_t x) {
    const Vec share = load(logits + x) * inverse;
    store(tile + x, load(tile + x) * (broadcast(1.0f) - share * share));
  });
}

template <class T>
void finish_loss(const Product& p, const Place& at, float* tile) {
  cap(at, p.loss.softcap, tile);
  if (p.loss.states) return add_classes(p, at, tile);
  take_slope(p, at, tile);
  store_tile<T>(at, tile, {}, p.finish.out);
}

}  // namespace fastattn::FASTATTN_ISA
