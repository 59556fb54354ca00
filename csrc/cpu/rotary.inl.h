// Turns the pairs of each head by the angles of its token. Products that are added to something say
// fma, so that no compiler chooses where results are streamed and another time elsewhere.
#pragma once

#include "../rotary.h"
#include "kernels.h"
#include "rows.inl.h"

namespace fastattn::FASTATTN_ISA {

// Where a token's angles start in a table.
inline int64_t angles_at(const RotaryParams& p, const Strided& table, int64_t b, int64_t s) {
  if (p.own_angles) return b * table.stride[0] + s * table.stride[1];
  if (!p.positions.data) return s * table.stride[0];
  const int64_t at = b * p.positions.stride[0] + s * p.positions.stride[1];
  const bool is_long = p.position_type == Type::kInt64;
  return table.stride[0] * (is_long ? static_cast<const int64_t*>(p.positions.data)[at]
                                    : static_cast<const int32_t*>(p.positions.data)[at]);
}

template <class T>
void load_angles(const RotaryParams& p, const Strided& table, int64_t b, int64_t s, float* to) {
  const int64_t at = angles_at(p, table, b, s);
  if (p.table_type == Type::kFloat32) {
    row_as_floats(static_cast<const float*>(table.data) + at, p.rotary_dim / 2, to);
  } else {
    row_as_floats(static_cast<const T*>(table.data) + at, p.rotary_dim / 2, to);
  }
}

// The angles of both values of a pair, so that out = x * cos + x's neighbour * sin. From the end,
// since they lie in the same place.
inline void spread_pairs(float* cos, float* sin, int64_t pairs) {
  for (int64_t i = pairs - 1; i >= 0; --i) {
    const float c = cos[i], s = sin[i];
    cos[2 * i] = cos[2 * i + 1] = c;
    sin[2 * i] = -s;
    sin[2 * i + 1] = s;
  }
}

template <bool kStream, class T>
void turn_neighbours(const T* x, const float* cos, const float* sin, int64_t n, T* out) {
  for_vectors(n, [&](int64_t c, auto lanes, int) {
    const Vec v = load(x + c, lanes);
    const Vec turned = swap_neighbours(v) * load(sin + c, lanes);
    put<kStream>(out + c, fma(v, load(cos + c, lanes), turned), lanes);
  });
}

template <bool kStream, class T>
void turn_halves(const T* x, const float* cos, const float* sin, int64_t pairs, T* out) {
  for_vectors(pairs, [&](int64_t i, auto lanes, int) {
    const Vec a = load(x + i, lanes), b = load(x + pairs + i, lanes);
    const Vec c = load(cos + i, lanes), s = load(sin + i, lanes);
    put<kStream>(out + i, fma(b, zero() - s, a * c), lanes);
    put<kStream>(out + pairs + i, fma(b, c, a * s), lanes);
  });
}

template <class T, bool kStream>
void rotary_tokens(const RotaryParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t turned = p.rotary_dim, pairs = turned / 2;
  float *cos = scratch, *sin = scratch + turned;
  T* out = static_cast<T*>(p.out) + begin * p.nheads * p.head_dim;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.seqlen, s = token % p.seqlen;
    load_angles<T>(p, p.cos, b, s, cos);
    load_angles<T>(p, p.sin, b, s, sin);
    if (p.inverse) {
      for (int64_t i = 0; i < pairs; ++i) sin[i] = -sin[i];
    }
    if (p.interleaved) spread_pairs(cos, sin, pairs);
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + s * p.x.stride[1];
    for (int64_t h = 0; h < p.nheads; ++h, x += p.x.stride[2], out += p.head_dim) {
      if (p.interleaved) {
        turn_neighbours<kStream>(x, cos, sin, turned, out);
      } else {
        turn_halves<kStream>(x, cos, sin, pairs, out);
      }
      for_vectors(p.head_dim - turned, [&](int64_t c, auto lanes, int) {
        put<kStream>(out + turned + c, load(x + turned + c, lanes), lanes);
      });
    }
  }
  if constexpr (kStream) finish_streams();
}

template <class T>
void rotary_turn(const RotaryParams& p, bool stream, int64_t begin, int64_t end, float* scratch) {
  (stream ? rotary_tokens<T, true> : rotary_tokens<T, false>)(p, begin, end, scratch);
}

template <class T>
constexpr RotaryKernels rotary_kernels() {
  return {rotary_turn<T>};
}

}  // namespace fastattn::FASTATTN_ISA
