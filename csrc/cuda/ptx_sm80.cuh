// One function per instruction: all that kernels know of a device of sm_80 or later. Compiled by
// another compiler than nvcc, it is emulation/ptx_sm80.h, which runs the same kernels on the host.
// Kernels reach memory through these functions alone, so that the emulator sees every access.
#pragma once

#ifndef __CUDACC__
#include "emulation/ptx_sm80.h"
#else

#include <cstdint>

namespace fastattn::ptx {

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_id() { return static_cast<int>(blockIdx.x); }

// Shared memory is addressed by bytes from here.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(128) char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <class T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  T value;
  if constexpr (sizeof(T) == 4) {
    uint32_t word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    memcpy(&value, &word, 4);
  } else {
    uint32_t w[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(address)
                 : "memory");
    memcpy(&value, w, 16);
  }
  return value;
}

template <class T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  uint32_t w[sizeof(T) / 4];
  memcpy(w, &value, sizeof(T));
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(w[0]) : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]),
                 "r"(w[2]), "r"(w[3])
                 : "memory");
  }
}

template <class T>
__device__ __forceinline__ T load_global(const T* from) {
  return *from;
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
  *to = value;
}

// 16 bytes from global to shared memory: the first `bytes` from there, then zeros.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// All threads of a block, of which there are so many.
__device__ __forceinline__ void sync_block(int threads) {
  asm volatile("bar.sync 0, %0;" ::"r"(threads) : "memory");
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Whole warps; `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Four 8 x 8 matrices of 16-bit values; lane 8 i + j says where row j of matrix i starts. Register
// i of lane t gets row t / 4, columns 2 (t % 4) and the next, of matrix i; transposed: column t
// / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// The 16-bit types, as bits in a uint16_t.
struct Bf16 {
  static __device__ __forceinline__ float widen(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Fp16 {
  static __device__ __forceinline__ float widen(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Two values in one word, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return T::pack(low, high);
}
template <class T>
__device__ __forceinline__ float widen(uint16_t bits) {
  return T::widen(bits);
}

// c [16, 8] += a [16, 16] b [16, 8], with g = lane / 4 and t = 2 (lane % 4):
//   a0 to a3: rows g, g + 8, g, g + 8; columns t, t, t + 8, t + 8, each with the next in the high
//   half b0, b1: rows t, t + 8, each with the next in the high half; column g c0 to c3: (g, t), (g,
//   t + 1), (g + 8, t), (g + 8, t + 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  T::mma(c, a, b0, b1);
}

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace fastattn::ptx

#endif
