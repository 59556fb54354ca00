// AVX2 with FMA and F16C: 8 floats.
#pragma once

#include <immintrin.h>

namespace fastattn::FASTATTN_ISA {

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kMaxTileRows = 6;  // 6 x 2 vectors of sums in 16 registers
constexpr bool kHasPairs = false;

inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec from_halves(__m128i x, BF16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Vec from_halves(__m128i x, F16) { return _mm256_cvtph_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
template <class T>
inline Vec load(const T* p) {
  return from_halves(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
inline Vec from_bytes(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
inline Vec load(const int8_t* p) {
  return from_bytes(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
// The first n lanes; n <= kWidth. Nothing past them is touched, the other lanes are 0.
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
template <class T>
inline Vec load(const T* p, int n) {
  alignas(16) T lanes[8] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return from_halves(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)), T{});
}
inline Vec load(const int8_t* p, int n) {
  alignas(8) int8_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n));
  return load(lanes);
}
inline void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), x); }
inline void store(int8_t* p, Vec x, int n) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cvtps_epi32(x));
  for (int i = 0; i < n; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
inline __m128i to_halves(Vec x, F16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_halves(Vec x, BF16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC00000), nan);
  const __m256i half = _mm256_srli_epi32(up, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
  return _mm256_castsi256_si128(packed);
}
// Of halves.
template <class T>
inline void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_halves(x, T{}));
}
template <class T>
inline void store(T* p, Vec x, int n) {
  alignas(16) T lanes[8];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}
// As a store and a load would leave it.
inline Vec rounded(Vec x, float) { return x; }
template <class T>
inline Vec rounded(Vec x, T) {
  return from_halves(to_halves(x, T{}), T{});
}
// Stores past the caches, to where a vector is aligned; other threads see them after
// finish_streams.
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
template <class T>
inline void stream(T* p, Vec x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_halves(x, T{}));
}
inline void finish_streams() { _mm_sfence(); }

inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand where either is NaN.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec x) { return _mm256_andnot_ps(broadcast(-0.0f), x); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(magnitude, _mm256_and_ps(broadcast(-0.0f), sign));
}
inline Vec round_even(Vec x) { return _mm256_round_ps(x, 0x08); }
// x * 2^whole for x near 1; exactly 0 for whole < -126, so that -inf in exp2 gives 0.
inline Vec scale_by_power(Vec x, Vec whole) {
  const __m256i power = _mm256_cvtps_epi32(max(broadcast(-127.0f), whole));
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23);
  return x * _mm256_castsi256_ps(bits);
}
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
// yes where the byte is not 0; reads n bytes.
inline Vec select_bytes(const uint8_t* bytes, int n, Vec yes, Vec no) {
  alignas(8) uint8_t lanes[8] = {};
  std::memcpy(lanes, bytes, static_cast<size_t>(n));
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes));
  const __m256i off = _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(x), _mm256_setzero_si256());
  return _mm256_blendv_ps(yes, no, _mm256_castsi256_ps(off));
}
// Lane 2 i changes places with lane 2 i + 1.
inline Vec swap_neighbours(Vec x) { return _mm256_permute_ps(x, 0xB1); }
inline float sum(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// The same kLanes floats in every group of as many lanes.
template <int kLanes>
inline Vec load_group(const float* p) {
  if constexpr (kLanes == 8) return load(p);
  if constexpr (kLanes == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
}
// r[i], for i < 8, has kGroups groups of lanes, g after g; r[g] becomes the sums over group g of
// each, lane i from r[i].
template <int kGroups>
inline void sum_groups(Vec* r) {
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[i] = _mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44) +
           _mm256_shuffle_ps(r[2 * i], r[2 * i + 1], 0xEE);
  }
  const Vec low = _mm256_permute2f128_ps(r[0], r[1], 0x20);
  r[1] = _mm256_permute2f128_ps(r[0], r[1], 0x31);
  r[0] = kGroups == 1 ? low + r[1] : low;
}

// lane j of row i becomes lane i of row j.
inline void transpose(Vec* r) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    const Vec low = r[i], high = r[i + 4];
    r[i] = _mm256_permute2f128_ps(low, high, 0x20);
    r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

}  // namespace fastattn::FASTATTN_ISA
