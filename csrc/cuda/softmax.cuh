// Online softmax on the accumulators of mma.sync, in units of log2.
#pragma once

#include <limits>

#include "ptx_sm80.cuh"

namespace fastattn {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// The four lanes that share rows lane / 4 and lane / 4 + 8 of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, ptx::shuffle_xor(x, 1));
  return fmaxf(x, ptx::shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// What a warp's rows carry from one block of keys to the next: [tiles of 16 rows][upper, lower
// half].
template <int kRowTiles>
struct RowState {
  float m[kRowTiles][2];  // maximum of the scores before `scale`
  float l[kRowTiles][2];  // this lane's part of the sum of weights

  __device__ __forceinline__ void init() {
    for (int r = 0; r < kRowTiles; ++r) {
      m[r][0] = m[r][1] = -kInfinity;
      l[r][0] = l[r][1] = 0.0f;
    }
  }
};

// Scores s become weights 2^(s * scale - m * scale); `scale` is positive. Raises m, and rescales l
// and the unscaled output with it.
template <int kRowTiles, int kKeyTiles, int kValueTiles>
__device__ __forceinline__ void softmax_step(float (&s)[kRowTiles][kKeyTiles][4],
                                             float (&out)[kRowTiles][kValueTiles][4],
                                             RowState<kRowTiles>& state, float scale) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.m[r][half];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        top = fmaxf(top, fmaxf(s[r][n][2 * half], s[r][n][2 * half + 1]));
      }
      top = quad_max(top);
      const float base = top == -kInfinity ? 0.0f : top * scale;
      const float shrink = ptx::ex2(state.m[r][half] * scale - base);
      state.m[r][half] = top;
      float sum = state.l[r][half] * shrink;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          s[r][n][j] = ptx::ex2(fmaf(s[r][n][j], scale, -base));
          sum += s[r][n][j];
        }
      }
      state.l[r][half] = sum;
#pragma unroll
      for (int d = 0; d < kValueTiles; ++d) {
        out[r][d][2 * half] *= shrink;
        out[r][d][2 * half + 1] *= shrink;
      }
    }
  }
}

// A row at the end: m in units of log2 (-inf: it saw nothing), l the whole sum of weights.
struct RowEnd {
  float m, l, factor;  // of the unscaled output
};

// One more score, in units of log2, that takes weight and gives no value; -inf: none.
__device__ __forceinline__ RowEnd finish_row(float m, float l, float sink) {
  const float top = fmaxf(m, sink);
  if (top == -kInfinity) return {top, 0.0f, 0.0f};
  const float shrink = ptx::ex2(m - top);
  const float sum = l * shrink + ptx::ex2(sink - top);
  return {top, sum, sum > 0.0f ? shrink / sum : 0.0f};
}

}  // namespace fastattn
