// The matrix product under every kernel: a register tile over packed operands, and the packing.
//
// C [m, n] (+)= A [m, kk] B [kk, n], all in 4-byte elements of Math (vec.h). B lies in panels of
// kPanel columns, [n / kPanel][kk][kPanel], so that each step of the sum reads one line or two. A
// is read one element at a time and broadcast, which loads do for free: any strides will do, but a
// row stride known at compile time costs no registers.
//
// Cost of one step, AVX-512: 2 loads of B, kMaxTileRows broadcasts of A, 2 * kMaxTileRows FMAs, so
// (2 + 14) / 28 loads per FMA where the machine can do one each; 28 independent sums hide the
// latency.
#pragma once

#include <utility>

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

constexpr int kPanel = 2 * kWidth;
// Largest head dim, and the distance of rows in tiles: 16 floats more, or the lines of many rows
// would fall into the same sets of the L1 cache.
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kTileStride = kMaxHeadDim + 16;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a tile asks memory for while it works: nothing.
struct NothingAhead {
  void step() {}
};

// A line for each step, of `rows` rows in turn: what the next tile will be made of.
struct RowsAhead {
  const char* at;
  int64_t stride;  // in bytes
  int64_t rows;
  int64_t row = 0;

  void step() {
    __builtin_prefetch(at, 0, 2);
    at += stride;
    if (++row == rows) {
      at += 64 - rows * stride;
      row = 0;
    }
  }
};

// One register tile: kRows x (kVecs * kWidth) sums.
template <class Math, int kRows, int kVecs, int kRowStride, class Ahead>
void gemm_tile(int64_t kk, const float* a, int64_t a_step, const float* b, int64_t b_step, float* c,
               int64_t c_stride, bool accumulate, Ahead ahead) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums[i][j] = zero();
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < kk; ++k) {
    Vec columns[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) columns[j] = load(b + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec row = broadcast(a[i * kRowStride]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Math::mul_add(row, columns[j], sums[i][j]);
    }
    a += a_step;
    b += b_step;
    ahead.step();
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      // Added at the end: one chain through all of a long sum's pieces would round too often.
      float* to = c + i * c_stride + j * kWidth;
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <class Ahead>
using GemmTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                          bool, Ahead);

template <class Math, int kVecs, int kRowStride, class Ahead, size_t... kRows>
GemmTile<Ahead> gemm_tile_of(int rows, std::index_sequence<kRows...>) {
  static constexpr GemmTile<Ahead> tiles[] = {
      gemm_tile<Math, int(kRows) + 1, kVecs, kRowStride, Ahead>...};
  return tiles[rows - 1];
}

// B, as gemm_rows reads it: element [k, c] at data[k * step + c / kPanel * panel + c % kPanel].
struct Panels {
  const float* data;
  int64_t step, panel;
};

// A tile's rows (m <= kMaxTileRows) against n columns; C is written up to n rounded to kWidth.
template <class Math, int kRowStride, class Ahead = NothingAhead>
void gemm_rows(int64_t m, int64_t n, int64_t kk, const float* a, int64_t a_step, Panels b, float* c,
               int64_t c_stride, bool accumulate, Ahead ahead = {}) {
  constexpr auto kRows = std::make_index_sequence<kMaxTileRows>{};
  const auto wide = gemm_tile_of<Math, 2, kRowStride, Ahead>(static_cast<int>(m), kRows);
  int64_t column = 0;
  for (; column + kWidth < n; column += kPanel) {
    wide(kk, a, a_step, b.data, b.step, c + column, c_stride, accumulate, ahead);
    b.data += b.panel;
  }
  if (column < n) {
    const auto narrow = gemm_tile_of<Math, 1, kRowStride, Ahead>(static_cast<int>(m), kRows);
    narrow(kk, a, a_step, b.data, b.step, c + column, c_stride, accumulate, ahead);
  }
}

// n rows of `values` as rows of a tile, in elements; 0 from the last value up to whole panels.
template <class Math, class Rows>
void copy_rows(const Rows& rows, int64_t n, int64_t values, float* out) {
  for (int64_t i = 0; i < n; ++i, out += kTileStride) {
    const auto* p = rows(i);
    for (int64_t k = 0; k * Math::kStep < values; k += kWidth) {
      const int64_t wanted = smaller(values - k * Math::kStep, kWidth * Math::kStep);
      store(out + k, Math::load_row(p + k * Math::kStep, static_cast<int>(wanted)));
    }
    const int64_t written = round_up(ceil_div(values, Math::kStep), kWidth);
    if (written % kPanel) store(out + written, zero());
  }
}

// Rows of `values` become columns: n rows x [0, values) -> [steps][kPanel] elements, lane = row,
// where rows(i) points to row i. The last lanes are 0 where n is smaller; so is the second half of
// the last pair where values is odd.
template <class Math, class Rows>
void pack_transposed(const Rows& rows, int64_t n, int64_t values, float* out) {
  const int64_t steps = ceil_div(values, Math::kStep);
  for (int64_t k = 0; k < steps; k += kWidth) {
    const int wanted = static_cast<int>(smaller(values - k * Math::kStep, kWidth * Math::kStep));
    const int64_t written = smaller(kWidth, steps - k);
    for (int64_t lane = 0; lane < kPanel; lane += kWidth) {
      Vec r[kWidth];
      if (lane >= n) {
        for (int64_t i = 0; i < written; ++i) store(out + (k + i) * kPanel + lane, zero());
        continue;
      }
      for (int i = 0; i < kWidth; ++i) {
        r[i] = lane + i < n ? Math::load_row(rows(lane + i) + k * Math::kStep, wanted) : zero();
      }
      transpose(r);
      for (int64_t i = 0; i < written; ++i) store(out + (k + i) * kPanel + lane, r[i]);
    }
  }
}

// Rows stay rows: n rows x [0, columns) -> panels [columns / kPanel][steps][kPanel], where a step
// is a row (or a pair of rows, the last one's second half being 0 where n is odd). Steps from n on
// are left as they are; columns are 0 up to the panel.
template <class Math, class Rows>
void pack_rows(const Rows& rows, int64_t n, int64_t columns, int64_t steps, float* out) {
  const int64_t filled = ceil_div(n, Math::kStep);
  for (int64_t c = 0; c < columns; c += kPanel, out += steps * kPanel) {
    for (int64_t k = 0; k < filled; ++k) {
      const int64_t row = k * Math::kStep;
      for (int64_t v = 0; v < kPanel; v += kWidth) {
        const int wanted = static_cast<int>(smaller(columns - c - v, kWidth));
        Vec x = zero();
        if (wanted > 0) {
          const bool alone = Math::kStep == 1 || row + 1 >= n;
          x = alone ? Math::zip_row(rows(row) + c + v, wanted)
                    : Math::zip_rows(rows(row) + c + v, rows(row + 1) + c + v, wanted);
        }
        store(out + k * kPanel + v, x);
      }
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA
