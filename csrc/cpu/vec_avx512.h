// AVX-512 (F, BW, DQ, VL): 16 floats; bfloat16 dot products where the tier has AVX512-BF16.
#pragma once

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the placeholders inside its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastattn::FASTATTN_ISA {

using Vec = __m512;
constexpr int kWidth = 16;
// Rows of a register tile: 14 x 2 vectors of sums leave 2 registers for B and 2 for broadcasts of
// A.
constexpr int kMaxTileRows = 14;
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BF16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const int8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// The first n lanes; n <= kWidth. Nothing past them is touched, the other lanes are 0.
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vec load(const BF16* p, int n) {
  const __m256i x = _mm256_maskz_loadu_epi16(first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load(const F16* p, int n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
}
inline Vec load(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline void store(int8_t* p, Vec x, int n) {
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline __m256i to_halves(Vec x, F16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m256i to_halves(Vec x, BF16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  up = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
// Of halves.
template <class T>
inline void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_halves(x, T{}));
}
template <class T>
inline void store(T* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), to_halves(x, T{}));
}
// As a store and a load would leave it.
inline Vec rounded(Vec x, float) { return x; }
inline Vec rounded(Vec x, F16) { return _mm512_cvtph_ps(to_halves(x, F16{})); }
inline Vec rounded(Vec x, BF16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_halves(x, BF16{})), 16));
}
// Stores past the caches, to where a vector is aligned; other threads see them after
// finish_streams.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
template <class T>
inline void stream(T* p, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_halves(x, T{}));
}
inline void finish_streams() { _mm_sfence(); }

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand where either is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec x) { return _mm512_abs_ps(x); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN),
                                                       _mm512_castps_si512(sign),
                                                       _mm512_castps_si512(magnitude), 0xCA));
}
inline Vec round_even(Vec x) { return _mm512_roundscale_ps(x, 0x08); }
inline Vec scale_by_power(Vec x, Vec whole) { return _mm512_scalef_ps(x, whole); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// yes where the byte is not 0; reads n bytes.
inline Vec select_bytes(const uint8_t* bytes, int n, Vec yes, Vec no) {
  const __m128i x = _mm_maskz_loadu_epi8(first(n), bytes);
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(x, x), no, yes);
}
// Lane 2 i changes places with lane 2 i + 1.
inline Vec swap_neighbours(Vec x) { return _mm512_permute_ps(x, 0xB1); }
inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
inline float largest(Vec x) { return _mm512_reduce_max_ps(x); }

// The same kLanes floats in every group of as many lanes.
template <int kLanes>
inline Vec load_group(const float* p) {
  if constexpr (kLanes == 16) return load(p);
  if constexpr (kLanes == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  if constexpr (kLanes == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}
// r[i], for i < 16, has kGroups groups of lanes, g after g; r[g] becomes the sums over group g of
// each, lane i from r[i].
template <int kGroups>
inline void sum_groups(Vec* r) {
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]) + _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  // Now of four r each: lane by lane of 128 bits, the sums over four lanes.
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0x44) +
           _mm512_shuffle_ps(r[2 * i], r[2 * i + 1], 0xEE);
  }
  if constexpr (kGroups == 4) {
    const Vec a = _mm512_shuffle_f32x4(r[0], r[1], 0x44),
              b = _mm512_shuffle_f32x4(r[2], r[3], 0x44);
    const Vec c = _mm512_shuffle_f32x4(r[0], r[1], 0xEE),
              d = _mm512_shuffle_f32x4(r[2], r[3], 0xEE);
    r[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    r[1] = _mm512_shuffle_f32x4(a, b, 0xDD);
    r[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    r[3] = _mm512_shuffle_f32x4(c, d, 0xDD);
    return;
  }
  const Vec low = _mm512_shuffle_f32x4(r[0], r[1], 0x88) + _mm512_shuffle_f32x4(r[0], r[1], 0xDD);
  const Vec high = _mm512_shuffle_f32x4(r[2], r[3], 0x88) + _mm512_shuffle_f32x4(r[2], r[3], 0xDD);
  r[0] = _mm512_shuffle_f32x4(low, high, 0x88);
  r[1] = _mm512_shuffle_f32x4(low, high, 0xDD);
  if constexpr (kGroups == 1) r[0] = r[0] + r[1];
}

// lane j of row i becomes lane i of row j.
inline void transpose(Vec* r) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

#if defined(__AVX512BF16__)
inline Vec load_pairs(const BF16* p) { return _mm512_loadu_ps(p); }
// n pairs whose last may be half: `values` bfloat16 are read, the rest are 0.
inline Vec load_pairs(const BF16* p, int values) {
  const __mmask32 mask = values >= 32 ? ~0u : (1u << values) - 1u;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
// Two rows of 2 * kWidth bfloat16 as pairs, in the order that costs one instruction each: `a` has
// the first four of every eight columns, `b` the others. to_columns undoes the order.
inline void zip_columns(Vec low, Vec high, Vec* a, Vec* b) {
  const __m512i x = _mm512_castps_si512(low), y = _mm512_castps_si512(high);
  *a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
  *b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
}
inline void to_columns(Vec* a, Vec* b) {
  const Vec low = _mm512_shuffle_f32x4(*a, *b, 0x44), high = _mm512_shuffle_f32x4(*a, *b, 0xEE);
  *a = _mm512_shuffle_f32x4(low, low, 0xD8);
  *b = _mm512_shuffle_f32x4(high, high, 0xD8);
}
inline void from_columns(Vec* a, Vec* b) {
  const Vec low = _mm512_shuffle_f32x4(*a, *b, 0x88);
  *b = _mm512_shuffle_f32x4(*a, *b, 0xDD);
  *a = low;
}
inline __m512i widen(__m256i x) { return _mm512_cvtepu16_epi32(x); }
// Lane i of the result is the pair (low[i], high[i]).
inline Vec zip(__m256i low, __m256i high) {
  return _mm512_castsi512_ps(_mm512_or_si512(widen(low), _mm512_slli_epi32(widen(high), 16)));
}
inline Vec zip_pairs(const BF16* low, const BF16* high, int n) {
  return zip(_mm256_maskz_loadu_epi16(first(n), low), _mm256_maskz_loadu_epi16(first(n), high));
}
inline Vec zip_pairs(const BF16* low, int n) {
  return _mm512_castsi512_ps(widen(_mm256_maskz_loadu_epi16(first(n), low)));
}
inline Vec zip_pairs(Vec low, Vec high) {
  return zip((__m256i)_mm512_cvtneps_pbh(low), (__m256i)_mm512_cvtneps_pbh(high));
}
// Neighbours in memory order: lanes of a, then of b, as bfloat16.
inline Vec join_pairs(Vec a, Vec b) { return (__m512)_mm512_cvtne2ps_pbh(b, a); }
inline Vec fma_pairs(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif

}  // namespace fastattn::FASTATTN_ISA
