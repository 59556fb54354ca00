// The two roofs of this machine: multiply-adds from registers, and reading memory in order.
#pragma once

#include <chrono>

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// GFLOP/s of one thread that does nothing but multiply-adds, in as many chains as hide the latency.
template <class Math>
double peak_of(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int kChains = kMaxTileRows * 2;
  constexpr int kRepeats = 20000;
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = zero();
  // Not constants to the compiler, and never subnormal.
  volatile float seed = 1.0f;
  const Vec a = broadcast(seed), b = broadcast(seed);
  double best = 0.0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    for (int r = 0; r < kRepeats; ++r) {
#pragma GCC unroll 32
      for (int i = 0; i < kChains; ++i) sums[i] = Math::mul_add(a, b, sums[i]);
    }
    const std::chrono::duration<double> took = Clock::now() - begin;
    const double rate = 2.0 * kRepeats * kChains * kWidth * Math::kStep / took.count() * 1e-9;
    best = rate > best ? rate : best;
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  Vec total = zero();
  for (int i = 0; i < kChains; ++i) total = total + sums[i];
  volatile float sink = sum(total);
  (void)sink;
  return best;
}

inline double fma_peak(bool bf16, double seconds) {
  return bf16 ? peak_of<PairMath>(seconds) : peak_of<FloatMath>(seconds);
}

inline float read_all(const float* p, int64_t n) {
  Vec sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = zero();
  for (int64_t c = 0; c + 8 * kWidth <= n; c += 8 * kWidth) {
    for (int i = 0; i < 8; ++i) sums[i] = sums[i] + load(p + c + i * kWidth);
  }
  Vec total = zero();
  for (int i = 0; i < 8; ++i) total = total + sums[i];
  return sum(total);
}

}  // namespace fastattn::FASTATTN_ISA
