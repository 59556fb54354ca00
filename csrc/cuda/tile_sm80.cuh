// Tiles of 16-bit rows in shared memory: their layout, how they get there and how mma.sync reads
// them.
#pragma once

#include "ptx_sm80.cuh"

namespace fastattn {

struct alignas(16) Chunk {
  uint32_t words[4];  // 8 values
};

// Rows of kD values. Chunks of 16 bytes are swapped within a row so that 8 rows' chunks of one
// column, which is what ldmatrix reads at once, lie in all 32 banks.
template <int kD>
struct Tile {
  static_assert(kD % 32 == 0, "a row is a multiple of 4 chunks");
  static constexpr int kChunks = kD / 8;

  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    // Rows of 64 values start in the same bank; those of 32, 96, ... in one of two.
    const int turn = kD % 64 == 0 ? row & 7 : row >> 1 & 3;
    return static_cast<uint32_t>(2 * kD * row + 16 * (chunk ^ turn));
  }
  // The same for row + lane's and column / 8 + lane's, said so that all but `column` is one
  // register.
  static __device__ __forceinline__ uint32_t of_lane(int row, int lane_row, int chunk,
                                                     int lane_chunk) {
    constexpr int kTurns = kD % 64 == 0 ? 8 : 4;
    const int turn = kD % 64 == 0 ? lane_row & 7 : lane_row >> 1 & 3;
    const auto base = static_cast<uint32_t>(2 * kD * lane_row + 16 * (lane_chunk ^ turn));
    const auto low = static_cast<uint32_t>(16 * (chunk & (kTurns - 1)));
    return (base ^ low) + static_cast<uint32_t>(2 * kD * row + 16 * (chunk & -kTurns));
  }
  // A operand, 16 rows by 16 columns.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row,
                                                int column, int lane) {
    ptx::ldmatrix_x4(a, tile + of_lane(row, lane & 15, column / 8, lane >> 4));
  }
  // B operands of two products, b[0..1] and b[2..3]: 16 columns of the tile are the sum's terms,
  // its rows are those products' columns.
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int row,
                                                int column, int lane) {
    ptx::ldmatrix_x4(b,
                     tile + of_lane(row, (lane & 7) + (lane >> 4) * 8, column / 8, lane >> 3 & 1));
  }
  // The same where the tile's rows are the sum's terms.
  static __device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], uint32_t tile, int row,
                                                      int column, int lane) {
    ptx::ldmatrix_x4_trans(b, tile + of_lane(row, lane & 15, column / 8, lane >> 4));
  }
};

// Rows of a tensor: `rows` of `columns` values, of which there may be fewer than a tile holds.
struct Rows {
  const uint16_t* data;
  int64_t stride;
  int rows, columns;
  bool aligned;  // data to 16 bytes, stride and columns to 8 values
};

// Fills a tile with rows [first, first + kRows), zeros where there are none; the caller commits and
// waits. Rows that are not aligned go through registers.
template <int kRows, int kD, int kThreads>
__device__ __forceinline__ void copy_rows(uint32_t tile, const Rows& x, int first) {
  using Tile = Tile<kD>;
#pragma unroll 1
  for (int i = ptx::thread_id(); i < kRows * Tile::kChunks; i += kThreads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool inside = first + row < x.rows && 8 * chunk < x.columns;
    const uint16_t* from = x.data + (inside ? (first + row) * x.stride + 8 * chunk : 0);
    const uint32_t to = tile + Tile::at(row, chunk);
    if (x.aligned) {
      ptx::cp_async_16(to, from, inside ? 16 : 0);
      continue;
    }
    Chunk values = {};
    for (int j = 0; j < 8; ++j) {
      const bool there = inside && 8 * chunk + j < x.columns;
      const uint32_t value = there ? ptx::load_global(from + j) : 0;
      values.words[j / 2] |= value << 16 * (j % 2);
    }
    ptx::store_shared(to, values);
  }
}

}  // namespace fastattn
