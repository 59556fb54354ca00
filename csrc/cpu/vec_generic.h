// Any machine, in the compilers' portable vector types: 4 floats.
#pragma once

namespace fastattn::FASTATTN_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kWidth = 4;
constexpr int kMaxTileRows = 6;  // 6 x 2 vectors of sums in 16 registers
constexpr bool kHasPairs = false;

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float to_float(BF16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return bits_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // 2^112 moves the exponent's bias from 15 to 127 and makes a subnormal half normal.
  return bits_float(float_bits(bits_float(rest << 13) * 0x1p112f) | sign);
}
inline float to_float(int8_t x) { return x; }
inline void from_float(float x, int8_t* out) { *out = static_cast<int8_t>(x); }
inline void from_float(float x, BF16* out) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline void from_float(float x, F16* out) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (rest > 0x7F800000u) {
    half = 0x7E00u;
  } else if (rest >= 0x477FF000u) {  // rounds past the largest half
    half = 0x7C00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 1/2 lets the float unit round
    half = float_bits(bits_float(rest) + 0.5f) - 0x3F000000u;
  } else {
    half = (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec load(const float* p) {
  Vec x{};
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
inline Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
// The first n lanes; n <= kWidth. Nothing past them is touched, the other lanes are 0.
inline Vec load(const float* p, int n) {
  Vec x{};
  std::memcpy(&x, p, static_cast<size_t>(n) * 4);
  return x;
}
template <class T>
inline Vec load(const T* p, int n) {
  float lanes[4] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}
inline void store(float* p, Vec x, int n) { std::memcpy(p, &x, static_cast<size_t>(n) * 4); }
template <class T>
inline void store(T* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) from_float(x[i], p + i);
}
template <class T>
inline void store(T* p, Vec x) {
  store(p, x, kWidth);
}
// As a store and a load would leave it.
inline Vec rounded(Vec x, float) { return x; }
template <class T>
inline Vec rounded(Vec x, T) {
  T halves[kWidth];
  store(halves, x);
  return load(halves);
}
// There is no way past the caches here.
template <class T>
inline void stream(T* p, Vec x) {
  store(p, x);
}
inline void finish_streams() {}

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// The second operand where either is NaN.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec abs(Vec x) { return (Vec)((IntVec)x & 0x7FFFFFFF); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return (Vec)((IntVec)magnitude | ((IntVec)sign & INT32_MIN));
}
inline Vec round_even(Vec x) {
  // Adding and taking away 1.5 * 2^23 rounds |x| < 2^22; exp2 clamps to that range from below, and
  // a larger x overflows in any case. volatile-free: -ffast-math is never used.
  const Vec magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}
// x * 2^whole for x near 1; exactly 0 for whole < -126, so that -inf in exp2 gives 0.
inline Vec scale_by_power(Vec x, Vec whole) {
  const Vec clamped = max(broadcast(-127.0f), min(whole, broadcast(128.0f)));
  IntVec bits;
  for (int i = 0; i < 4; ++i) {
    bits[i] = (clamped[i] == clamped[i] ? static_cast<int32_t>(clamped[i]) + 127 : 255) << 23;
  }
  return x * (Vec)bits;
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
// yes where the byte is not 0; reads n bytes.
inline Vec select_bytes(const uint8_t* bytes, int n, Vec yes, Vec no) {
  Vec x = no;
  for (int i = 0; i < n; ++i) x[i] = bytes[i] ? yes[i] : no[i];
  return x;
}
// Lane 2 i changes places with lane 2 i + 1.
inline Vec swap_neighbours(Vec x) { return Vec{x[1], x[0], x[3], x[2]}; }
inline float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float largest(Vec x) {
  const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// The same kLanes floats in every group of as many lanes.
template <int kLanes>
inline Vec load_group(const float* p) {
  static_assert(kLanes == kWidth, "one group");
  return load(p);
}
// r[i], for i < 4, has one group of lanes; r[0] becomes the sums, lane i from r[i].
template <int kGroups>
inline void sum_groups(Vec* r) {
  r[0] = Vec{sum(r[0]), sum(r[1]), sum(r[2]), sum(r[3])};
}

// lane j of row i becomes lane i of row j.
inline void transpose(Vec* r) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
