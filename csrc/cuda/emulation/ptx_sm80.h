// The instructions of ptx_sm80.cuh on the host: same names, same results, on machine.h.
#pragma once

#include <cmath>
#include <cstring>

#include "machine.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)

namespace fastattn::ptx {

using emulation::Access;
using emulation::kLanes;
using emulation::Where;

inline int thread_id() { return emulation::thread_id(); }
inline int block_id() { return emulation::block_id(); }
inline uint32_t shared_base() { return 0; }

template <class T>
T load_shared(uint32_t address, Where at = Where::here()) {
  T value;
  std::memcpy(&value, emulation::shared_plain(address, sizeof(T), Access::kRead, at), sizeof(T));
  return value;
}
template <class T>
void store_shared(uint32_t address, T value, Where at = Where::here()) {
  std::memcpy(emulation::shared_plain(address, sizeof(T), Access::kWrite, at), &value, sizeof(T));
}
template <class T>
T load_global(const T* from, Where at = Where::here()) {
  emulation::check_global(from, sizeof(T), Access::kRead, at);
  return *from;
}
template <class T>
void store_global(T* to, T value, Where at = Where::here()) {
  emulation::check_global(to, sizeof(T), Access::kWrite, at);
  *to = value;
}

inline void cp_async_16(uint32_t to, const void* from, int bytes, Where at = Where::here()) {
  emulation::copy_async(to, from, bytes, at);
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::copy_wait(kPending);
}

inline void sync_block(int threads, Where at = Where::here()) {
  emulation::barrier(0, threads, true, at);
}
inline void sync_warp(Where at = Where::here()) { emulation::sync_warp(at); }
inline void barrier_sync(int id, int threads, Where at = Where::here()) {
  emulation::barrier(id, threads, true, at);
}
inline void barrier_arrive(int id, int threads, Where at = Where::here()) {
  emulation::barrier(id, threads, false, at);
}

template <class T>
T shuffle_xor(T value, int mask, Where at = Where::here()) {
  static_assert(sizeof(T) == 4);
  struct Lane {
    T value, result;
    int mask;
  } lane = {value, value, mask};
  emulation::converge(
      "shfl.sync.bfly", &lane,
      [](void* const* lanes) {
        for (int i = 0; i < kLanes; ++i) {
          auto* to = static_cast<Lane*>(lanes[i]);
          to->result = static_cast<Lane*>(lanes[(i ^ to->mask) & (kLanes - 1)])->value;
        }
      },
      at);
  return lane.result;
}

struct LdmatrixLane {
  uint32_t address, words[4];
  Where at;
};

// Register i of lane t holds row t / 4, columns 2 (t % 4) and the next, of matrix i, whose rows
// start where lanes 8 i to 8 i + 7 say; transposed: column t / 4 and those two rows.
template <bool kTransposed>
void run_ldmatrix(void* const* lanes) {
  std::vector<uint32_t> addresses;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto* lane = static_cast<const LdmatrixLane*>(lanes[8 * matrix + row]);
      addresses.push_back(lane->address);
      std::memcpy(values[row],
                  emulation::shared(lane->address, 16, Access::kRead, 0xffffffffu, lane->at), 16);
    }
    for (int i = 0; i < kLanes; ++i) {
      const int a = i / 4, b = 2 * (i % 4);
      const uint32_t low = kTransposed ? values[b][a] : values[a][b];
      const uint32_t high = kTransposed ? values[b + 1][a] : values[a][b + 1];
      static_cast<LdmatrixLane*>(lanes[i])->words[matrix] = low | high << 16;
    }
  }
  ++emulation::counters().ldmatrix;
  emulation::counters().ldmatrix_conflicts += emulation::conflicts(addresses, 16);
}

inline void ldmatrix_x4(uint32_t (&words)[4], uint32_t address, Where at = Where::here()) {
  LdmatrixLane lane = {address, {}, at};
  emulation::converge("ldmatrix", &lane, run_ldmatrix<false>, at);
  std::memcpy(words, lane.words, sizeof(words));
}
inline void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t address, Where at = Where::here()) {
  LdmatrixLane lane = {address, {}, at};
  emulation::converge("ldmatrix.trans", &lane, run_ldmatrix<true>, at);
  std::memcpy(words, lane.words, sizeof(words));
}

struct Bf16 {
  static float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  static uint16_t round(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
  }
};

struct Fp16 {
  static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return bits >> 15 ? -size : size;
  }
  static uint16_t round(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size < std::ldexp(1.0f, -14)) {  // subnormal, or it becomes the smallest normal number
      return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(size, 24))));
    }
    int exponent;
    const float fraction = std::frexp(size, &exponent);                           // [0.5, 1)
    const int bits = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));  // [1024, 2048]
    return static_cast<uint16_t>(sign | (((exponent + 13) << 10) + bits));
  }
};

// Two values in one word, the first in the low half.
template <class T>
uint32_t pack(float low, float high) {
  return T::round(low) | static_cast<uint32_t>(T::round(high)) << 16;
}
template <class T>
float widen(uint16_t bits) {
  return T::widen(bits);
}

struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

// c += a b for a [16, 16], b [16, 8], c [16, 8], with g = lane / 4 and t = 2 (lane % 4):
//   a0 to a3: rows g, g + 8, g, g + 8; columns t, t, t + 8, t + 8, each with the next in the high
//   half b0, b1: rows t, t + 8, each with the next in the high half; column g c0 to c3: (g, t), (g,
//   t + 1), (g + 8, t), (g + 8, t + 1)
template <class T>
void run_mma(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int i = 0; i < kLanes; ++i) {
    const auto* lane = static_cast<const MmaLane*>(lanes[i]);
    const int g = i / 4, t = 2 * (i % 4);
    for (int half = 0; half < 2; ++half) {
      for (int j = 0; j < 4; ++j) {
        a[g + 8 * (j % 2)][t + 8 * (j / 2) + half] = T::widen(lane->a[j] >> 16 * half & 0xffff);
      }
      for (int j = 0; j < 2; ++j) {
        b[t + 8 * j + half][g] = T::widen(lane->b[j] >> 16 * half & 0xffff);
      }
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    const auto* lane = static_cast<const MmaLane*>(lanes[i]);
    for (int j = 0; j < 4; ++j) {
      const int row = i / 4 + 8 * (j / 2), column = 2 * (i % 4) + j % 2;
      float sum = lane->c[j];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      lane->c[j] = sum;
    }
  }
  ++emulation::counters().mma;
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where at = Where::here()) {
  const uint32_t b[2] = {b0, b1};
  MmaLane lane = {c, a, b};
  emulation::converge("mma.sync", &lane, run_mma<T>, at);
}

// Without the last two bits and without subnormal numbers: what approx and ftz may cost.
inline float approximate(float exact) {
  uint32_t word;
  std::memcpy(&word, &exact, 4);
  if (std::isfinite(exact)) word &= word >> 23 & 255 ? ~3u : 0x80000000u;
  std::memcpy(&exact, &word, 4);
  return exact;
}
inline float ex2(float x) { return approximate(std::exp2(x)); }
inline float lg2(float x) { return approximate(std::log2(x)); }
inline float divide(float a, float b) { return approximate(a / b); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

}  // namespace fastattn::ptx
