// A group of register tiles on its way between the sums and memory.
#pragma once

#include "activation.inl.h"
#include "gemm.inl.h"
#include "philox.inl.h"
#include "product.h"

namespace fastattn::FASTATTN_ISA {

// Elements of a sum that are added up at once, panels of a task, and tiles that end together: the
// chunks of so many panels and tiles stay in the L2 cache.
constexpr int64_t kChunk = 512;
constexpr int64_t kTaskPanels = 5;
// Also so many that their rows together are whole cache lines of a float output (half a line more
// in 16-bit types), of which neighbours may fall into one set.
constexpr int64_t kGroup = 8;

// A packed tile is rows of kChunkStride elements where a's rows lie that way, else columns of
// kTileLanes. 16 more than the chunk, or all rows would fall into the same sets of the L1 cache.
constexpr int64_t kChunkStride = kChunk + 16;
constexpr int64_t kTileLanes = (kMaxTileRows + kWidth - 1) / kWidth * kWidth;
constexpr int64_t kGroupRows = kGroup * kMaxTileRows;
constexpr int64_t kGroupFloats = kGroupRows * kPanel;
static_assert(kGroupRows % 16 == 0, "groups begin at whole vectors");
// Outputs that run_few works on together.
constexpr int64_t kFewBlock = 1024;
// Steps that a task packs at once.
constexpr int64_t kPackSteps = 32;

// Rows [i, i + h) of a, those of a group of tiles, by `lanes` rows of b from j on. Its numbers lie
// in rows of kPanel lanes.
struct Place {
  int64_t i, h, j, lanes;

  int64_t vectors() const { return ceil_div(lanes, kWidth) * kWidth; }
};

// x[j, i] into lane j of row i, 0 in lanes past the last.
template <class T>
void load_tile(const Place& at, const Matrix& x, float* tile) {
  const T* from = static_cast<const T*>(x.data) + at.j * x.row_stride + at.i * x.column_stride;
  if (x.column_stride != 1) {
    for (int64_t i = 0; i < at.h; ++i) {
      for (int64_t j = 0; j < at.lanes; j += kWidth) {
        const int n = static_cast<int>(smaller(at.lanes - j, kWidth));
        store(tile + i * kPanel + j, load(from + i * x.column_stride + j, n));
      }
    }
    return;
  }
  for (int64_t i = 0; i < at.h; i += kWidth) {
    const int n = static_cast<int>(smaller(at.h - i, kWidth));
    for (int64_t j = 0; j < at.lanes; j += kWidth) {
      Vec r[kWidth];
      for (int64_t l = 0; l < kWidth; ++l) {
        r[l] = j + l < at.lanes ? load(from + (j + l) * x.row_stride + i, n) : zero();
      }
      transpose(r);
      for (int l = 0; l < n; ++l) store(tile + (i + l) * kPanel + j, r[l]);
    }
  }
}

// The other way round, with the residual added, which only an output row by row may have.
template <class T>
void store_tile(const Place& at, const float* tile, const Matrix& residual, const Matrix& x) {
  T* to = static_cast<T*>(x.data) + at.j * x.row_stride + at.i * x.column_stride;
  if (x.column_stride != 1) {
    for (int64_t i = 0; i < at.h; ++i) {
      for (int64_t j = 0; j < at.lanes; j += kWidth) {
        const int n = static_cast<int>(smaller(at.lanes - j, kWidth));
        store(to + i * x.column_stride + j, load(tile + i * kPanel + j), n);
      }
    }
    return;
  }
  const T* add = static_cast<const T*>(residual.data);
  if (add) add += at.j * residual.row_stride + at.i;
  for (int64_t i = 0; i < at.h; i += kWidth) {
    const int n = static_cast<int>(smaller(at.h - i, kWidth));
    for (int64_t j = 0; j < at.lanes; j += kWidth) {
      Vec r[kWidth];
      for (int l = 0; l < kWidth; ++l) r[l] = l < n ? load(tile + (i + l) * kPanel + j) : zero();
      transpose(r);
      for (int64_t l = 0; l < smaller(at.lanes - j, kWidth); ++l) {
        if (add) r[l] = r[l] + load(add + (j + l) * residual.row_stride + i, n);
        store(to + (j + l) * x.row_stride + i, r[l], n);
      }
    }
  }
}

// Rows become terms of the next product's sums.
template <class T>
void store_panel(const Product& p, const Place& at, const float* tile) {
  using Math = typename MathOf<T>::type;
  const int64_t steps = ceil_div(p.outputs, Math::kStep);
  const int64_t step = (p.first_output + at.i) / Math::kStep;
  float* to = p.finish.panels + (at.j / kPanel * steps + step) * kPanel;
  for (int64_t i = 0; i < at.h; i += Math::kStep, to += kPanel) {
    for (int64_t j = 0; j < kPanel; j += kWidth) {
      const float* row = tile + i * kPanel + j;
      const bool there = j < at.lanes, pair = there && Math::kStep == 2 && i + 1 < at.h;
      store(to + j, Math::zip_rows(there ? load(row) : zero(), pair ? load(row + kPanel) : zero()));
    }
  }
}

// 0 where a position is dropped, else the scale. A group begins at a multiple of 16.
inline void draw_tile(const Product& p, const Place& at, const Dropout& dropout, float* factors) {
  for (int64_t j = 0; j < at.lanes; ++j) {
    for (int64_t i = 0; i < at.h; i += 16) {
      uint32_t words[16];
      philox_row<16>(dropout.seed, dropout.plane, static_cast<uint32_t>(p.first_row + at.j + j),
                     static_cast<uint32_t>(p.first_output + at.i + i), words);
      for (int64_t l = 0; l < smaller(at.h - i, 16); ++l) {
        factors[(i + l) * kPanel + j] = words[l] >= dropout.threshold ? dropout.scale : 0.0f;
      }
    }
  }
}

// The same for kWidth columns of one row.
inline Vec draw_row(const Dropout& dropout, int64_t row, int64_t column) {
  uint32_t words[kWidth];
  philox_row<kWidth>(dropout.seed, dropout.plane, static_cast<uint32_t>(row),
                     static_cast<uint32_t>(column), words);
  float factors[kWidth];
  for (int l = 0; l < kWidth; ++l) {
    factors[l] = words[l] >= dropout.threshold ? dropout.scale : 0.0f;
  }
  return load(factors);
}

// Runs f(row, place in the tile) for each vector of a tile.
template <class F>
inline void for_tile(const Place& at, const F& f) {
  for (int64_t i = 0; i < at.h; ++i) {
    for (int64_t j = 0; j < at.vectors(); j += kWidth) f(i, i * kPanel + j);
  }
}

template <class T>
void add_bias(const Place& at, const void* bias, float* tile) {
  if (!bias) return;
  float values[kGroupRows];
  const T* from = static_cast<const T*>(bias) + at.i;
  for (int64_t i = 0; i < at.h; i += kWidth) {
    store(values + i, load(from + i, static_cast<int>(smaller(at.h - i, kWidth))));
  }
  for_tile(at,
           [&](int64_t i, int64_t x) { store(tile + x, load(tile + x) + broadcast(values[i])); });
}

inline void drop(const Product& p, const Place& at, const Dropout& dropout, float* tile) {
  if (!dropout.threshold) return;
  float factors[kGroupFloats];
  draw_tile(p, at, dropout, factors);
  for_tile(at, [&](int64_t, int64_t x) { store(tile + x, load(tile + x) * load(factors + x)); });
}

}  // namespace fastattn::FASTATTN_ISA
