// What happens to scores between the two products: softcap, ALiBi, bias, masks, window; and to
// weights: dropout. All on accumulators, element j of which stands in row lane / 4 + 8 (j / 2) and
// column 2 (lane % 4) + j % 2.
#pragma once

#include "../attention.h"
#include "softmax.cuh"

namespace fastattn {

// A query head of a sequence.
struct Head {
  int b, h;
};

// Philox4x32-10; what and why: fastattn/dropout.py. The four words of columns 4 quad to 4 quad + 3.
__device__ __forceinline__ void philox(uint64_t seed, uint32_t plane, uint32_t row, uint32_t quad,
                                       uint32_t (&words)[4]) {
  uint32_t c0 = quad, c1 = row, c2 = plane, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = ptx::multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = ptx::multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Weights of one accumulator, whose first row and column are given, become 0 where they are
// dropped. Two lanes share the columns of a counter: the even one draws for the upper row, the odd
// one for the lower, and they swap halves.
__device__ __forceinline__ void drop(const AttentionParams& p, uint32_t plane, int row, int column,
                                     int lane, float (&w)[4]) {
  const int odd = lane % 2;
  uint32_t words[4];
  philox(p.seed, plane, static_cast<uint32_t>(row + lane / 4 + 8 * odd),
         static_cast<uint32_t>(column / 4 + lane % 4 / 2), words);
  const uint32_t low = ptx::shuffle_xor(odd ? words[0] : words[2], 1);
  const uint32_t high = ptx::shuffle_xor(odd ? words[1] : words[3], 1);
  const uint32_t mine[4] = {odd ? low : words[0], odd ? high : words[1], odd ? words[2] : low,
                            odd ? words[3] : high};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (mine[j] < p.dropout_threshold) w[j] = 0.0f;
  }
}

// 1 - 2 / (e^2x + 1): tanh.approx is not good enough for float16.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - ptx::divide(2.0f, ptx::ex2(2.0f * kLog2E * x) + 1.0f);
}

// The score of query i and key j in units of log2, from q k^T.
template <class T>
__device__ __forceinline__ float finish_score(const AttentionParams& p, Head at, float slope, int i,
                                              int j, float s) {
  s *= p.softmax_scale;
  if (p.softcap > 0.0f) s = p.softcap * tanh_of(s / p.softcap);
  if (i >= p.seqlen_q || j >= p.seqlen_k) return s * kLog2E;
  if (p.alibi.data) {
    s -= slope * fabsf(static_cast<float>(i + p.seqlen_k - p.seqlen_q - j));
  }
  const auto offset = [&](const Strided& x) {
    return at.b * x.stride[0] + at.h * x.stride[1] + i * x.stride[2] + j * x.stride[3];
  };
  if (p.bias.data && p.bias_type == Type::kFloat32) {
    s += ptx::load_global(static_cast<const float*>(p.bias.data) + offset(p.bias));
  } else if (p.bias.data) {
    const auto* bias = static_cast<const uint16_t*>(p.bias.data);
    s += ptx::widen<T>(ptx::load_global(bias + offset(p.bias)));
  }
  if (p.mask.data && !ptx::load_global(static_cast<const uint8_t*>(p.mask.data) + offset(p.mask))) {
    s = -kInfinity;
  }
  return s * kLog2E;
}

// Scores outside of a row's window, or of keys that are not there, become -inf.
template <int kRowTiles, int kKeyTiles>
__device__ __forceinline__ void mask_window(const AttentionParams& p, int row, int column, int lane,
                                            float (&s)[kRowTiles][kKeyTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 16 * r + lane / 4 + 8 * half;
      const int begin = static_cast<int>(p.visible_begin(i));
      const int end = static_cast<int>(p.visible_end(i));
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int j = column + 8 * n + 2 * (lane % 4) + k;
          if (j < begin || j >= end) s[r][n][2 * half + k] = -kInfinity;
        }
      }
    }
  }
}

}  // namespace fastattn
