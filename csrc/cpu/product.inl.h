// A product in register tiles: packing, sums, and what becomes of them.
//
// Cost of a tile, AVX-512, in cycles: 14 for each element of the sum's length. Beside that, a is
// copied once for the panels of a task, b is packed once, and a tile's end is 28 vectors'
// activation and four 16 x 16 transposes, some 400.
#pragma once

#include "linear_cross_entropy.inl.h"
#include "product_tile.inl.h"

namespace fastattn::FASTATTN_ISA {

inline int64_t even_share(int64_t n, int64_t most) {
  const int64_t parts = ceil_div(n, most);
  return round_up(ceil_div(n, parts), 2);
}

// How a tile is packed.
inline bool by_rows(const Matrix& a) { return a.column_stride == 1; }

template <class T>
struct ProductSizes {
  using Math = typename MathOf<T>::type;
  static constexpr int64_t kStep = Math::kStep;

  explicit ProductSizes(const Product& p)
      : steps(ceil_div(p.kk, kStep)),
        chunks(larger(ceil_div(steps, kChunk), 1)),
        chunk(larger(round_up(ceil_div(steps, chunks), 16), 16)),
        rows(p.n ? even_share(p.n, kMaxTileRows) : 2),
        packed_chunk(by_rows(p.a) || (p.gate.data && by_rows(p.gate))
                         ? larger(kMaxTileRows * kChunkStride, kTileLanes * chunk)
                         : kTileLanes * chunk) {}

  int64_t first_step(int64_t c) const { return c * chunk; }
  int64_t steps_of(int64_t c) const { return larger(smaller(chunk, steps - c * chunk), 0); }
  int64_t panel_floats() const { return steps * kPanel; }

  int64_t steps, chunks, chunk;
  int64_t rows;          // of a tile
  int64_t packed_chunk;  // a chunk of a tile
};

template <class T>
ProductPlan product_plan(const Product& p) {
  const ProductSizes<T> size(p);
  ProductPlan plan = {};
  plan.tiles = ceil_div(p.n, size.rows);
  plan.panels = ceil_div(p.m, kPanel);
  plan.tile_rows = size.rows;
  plan.panel_lanes = kPanel;
  plan.packed_group = size.chunks * kGroup * size.packed_chunk;
  plan.packed_panel = size.panel_floats();
  plan.panel_tasks = p.b.column_stride == 1 ? plan.panels : ceil_div(size.steps, kPackSteps);
  // Each task copies its tiles. Weights that lie across are packed once, where there are many
  // tasks: to change their order costs more.
  const bool across = !by_rows(p.a) || (p.gate.data && !by_rows(p.gate));
  const bool copied = !across || plan.panels <= kTaskPanels;
  plan.tile_tasks = copied ? 0 : ceil_div(plan.tiles, kGroup) * size.chunks;
  plan.group = kGroup;
  plan.scratch = 2 * (kGroup * size.packed_chunk + kTaskPanels * kGroupFloats);
  plan.task_panels = kTaskPanels;
  plan.few_panels = p.m * round_up(size.steps, kWidth);
  plan.few_scratch = 2 * kFewTokens * kFewBlock;
  return plan;
}

// The elements of step s of n neighbouring rows of x from `from` on.
template <class Math, class T>
inline Vec load_step(const Matrix& x, const T* from, int64_t s, int64_t kk, int64_t n) {
  const int64_t k = s * Math::kStep;
  const T* low = from + k * x.column_stride;
  const int lanes = static_cast<int>(smaller(n, kWidth));
  if (Math::kStep == 1 || k + 1 >= kk) return Math::zip_row(low, lanes);
  return Math::zip_rows(low, low + x.column_stride, lanes);
}

// Task t of packing b: a panel, where tokens are rows; where they are columns, some steps of all
// panels, so that b is read in order.
template <class T>
void product_pack_panels(const Product& p, int64_t t, float* panels) {
  using Math = typename MathOf<T>::type;
  const ProductSizes<T> size(p);
  const T* b = static_cast<const T*>(p.b.data);
  if (p.b.column_stride == 1) {
    b += t * kPanel * p.b.row_stride;
    pack_transposed<Math>([&](int64_t j) { return b + j * p.b.row_stride; },
                          smaller(kPanel, p.m - t * kPanel), p.kk,
                          panels + t * size.panel_floats());
    return;
  }
  const int64_t end = smaller((t + 1) * kPackSteps, size.steps);
  for (int64_t s = t * kPackSteps; s < end; ++s) {
    for (int64_t j = 0; j < p.m; j += kWidth) {
      store(panels + j / kPanel * size.panel_floats() + s * kPanel + j % kPanel,
            load_step<Math>(p.b, b + j, s, p.kk, p.m - j));
    }
  }
}

// One chunk of a group of tiles of a, from tile t on: rows of kChunkStride elements where a's lie
// that way, else columns of kTileLanes.
template <class T>
void copy_chunk(const Product& p, const ProductSizes<T>& size, const Matrix& a, int64_t t,
                int64_t count, int64_t c, float* out) {
  using Math = typename MathOf<T>::type;
  const int64_t first = t * size.rows, end = smaller(first + count * size.rows, p.n);
  const T* from = static_cast<const T*>(a.data) + first * a.row_stride;
  if (by_rows(a)) {
    const int64_t k = size.first_step(c) * Math::kStep;
    const int64_t values = smaller(p.kk - k, size.chunk * Math::kStep);
    for (int64_t i = first; i < end; ++i, from += a.row_stride) {
      float* row = out + (i - first) / size.rows * size.packed_chunk +
                   (i - first) % size.rows * kChunkStride;
      for (int64_t v = 0; v < values; v += kWidth * Math::kStep) {
        store(row + v / Math::kStep, Math::load_row(from + k + v, static_cast<int>(values - v)));
      }
    }
    return;
  }
  // Each step is a jump in memory, which nobody foresees.
  const int64_t ahead = 16 * Math::kStep * a.column_stride;
  for (int64_t s = 0; s < size.steps_of(c); ++s, out += kTileLanes) {
    const T* row = from + (size.first_step(c) + s) * Math::kStep * a.column_stride;
    for (int64_t i = 0; i < end - first; i += 64 / int64_t{sizeof(T)}) {
      for (int64_t k = 0; k < Math::kStep; ++k) {
        __builtin_prefetch(row + ahead + k * a.column_stride + i);
      }
    }
    for (int64_t i = first; i < end; i += size.rows) {
      float* column = out + (i - first) / size.rows * size.packed_chunk;
      const int64_t h = smaller(size.rows, end - i);
      for (int64_t r = 0; r < h; r += kWidth) {
        store(column + r,
              load_step<Math>(a, from + i - first + r, size.first_step(c) + s, p.kk, h - r));
      }
    }
  }
}

// Task t of packing all tiles of a: one chunk of a group, which lies together.
template <class T>
void product_pack_tiles(const Product& p, const Matrix& a, int64_t t, float* tiles) {
  const ProductSizes<T> size(p);
  const int64_t tile = t / size.chunks * kGroup, count = ceil_div(p.n, size.rows) - tile;
  copy_chunk<T>(p, size, a, tile, smaller(kGroup, count), t % size.chunks,
                tiles + t * kGroup * size.packed_chunk);
}

// ---- what becomes of a tile's sums ----

// dhidden -> dz in place (gated: of up in place, of the gate in `gate`), and the hidden values.
template <class T>
void apply_slope(const Product& p, const Place& at, float* tile, float* gate) {
  constexpr int kDegree = MathOf<T>::type::kExpDegree;
  const Slope& s = p.slope;
  float z[kGroupFloats], up[kGroupFloats], hidden[kGroupFloats];
  drop(p, at, s.dropout, tile);
  load_tile<T>(at, s.pre, z);
  if (gate) load_tile<T>(at, s.pre.from_column(p.outputs, p.type), up);
  with_activation<kDegree>(s.activation, [&](auto activation) {
    for_tile(at, [&](int64_t, int64_t x) {
      const Vec dh = load(tile + x), value = activation.value(load(z + x));
      Vec dz = dh * activation.slope(load(z + x));
      if (gate) {
        const Vec u = load(up + x);
        store(tile + x, dh * value);
        store(gate + x, dz * u);
        store(hidden + x, value * u);
      } else {
        store(tile + x, dz);
        store(hidden + x, value);
      }
    });
  });
  if (s.hidden.data) {
    drop(p, at, s.dropout, hidden);
    store_tile<T>(at, hidden, {}, s.hidden);
  }
}

template <class T>
void finish_slope(const Product& p, const Place& at, float* tile) {
  float gate[kGroupFloats];
  const bool gated = p.slope.gated;
  apply_slope<T>(p, at, tile, gated ? gate : nullptr);
  if (gated) store_tile<T>(at, gate, {}, p.finish.out);
  store_tile<T>(at, tile, {}, gated ? p.finish.out.from_column(p.outputs, p.type) : p.finish.out);
}

template <class T>
void finish_tile(const Product& p, const Place& at, float* tile, float* gate) {
  constexpr int kDegree = MathOf<T>::type::kExpDegree;
  if (p.slope.pre.data) return finish_slope<T>(p, at, tile);
  const Finish& f = p.finish;
  add_bias<T>(at, f.bias, tile);
  if (p.loss.target) return finish_loss<T>(p, at, tile);
  if (gate) {
    add_bias<T>(at, f.gate_bias, gate);
    if (f.pre.data) {
      store_tile<T>(at, gate, {}, f.pre);
      store_tile<T>(at, tile, {}, f.pre.from_column(p.outputs, p.type));
    }
  } else if (f.pre.data) {
    store_tile<T>(at, tile, {}, f.pre);
  }
  if (!f.panels && !f.out.data && !f.to_sums.data) return;
  if (gate || f.activation != Activation::kNone) {
    const float* z = gate ? gate : tile;
    with_activation<kDegree>(f.activation, [&](auto activation) {
      for_tile(at, [&](int64_t, int64_t x) {
        const Vec value = activation.value(load(z + x));
        store(tile + x, gate ? value * load(tile + x) : value);
      });
    });
  }
  drop(p, at, f.dropout, tile);
  if (f.sums.data) {
    float sums[kGroupFloats];
    load_tile<float>(at, f.sums, sums);
    for_tile(at, [&](int64_t, int64_t x) { store(tile + x, load(tile + x) + load(sums + x)); });
  }
  if (f.to_sums.data) return store_tile<float>(at, tile, {}, f.to_sums);
  if (f.panels) {
    store_panel<T>(p, at, tile);
  } else {
    store_tile<T>(at, tile, f.residual, f.out);
  }
}

// ---- the sums ----

// A task's tiles of one factor.
template <class T>
struct Tiles {
  const Matrix* a;
  const float* packed;  // for all tasks; null: copied for this one
  float* copy;

  // A group's, from tile t on, one every size.packed_chunk.
  const float* chunk(const Product& p, const ProductSizes<T>& size, int64_t t, int64_t count,
                     int64_t c) const {
    if (packed) return packed + (t / kGroup * size.chunks + c) * kGroup * size.packed_chunk;
    copy_chunk<T>(p, size, *a, t, count, c, copy);
    return copy;
  }
  // What is copied after chunk c of the group that begins at row i: the part for its tile t, of h
  // rows, to ask for. Rows 0 where nothing is.
  RowsAhead next(const Product& p, const ProductSizes<T>& size, int64_t i, int64_t c, int64_t t,
                 int64_t h) const {
    const bool same_rows = c + 1 < size.chunks;
    const int64_t row = same_rows ? i : i + kGroup * size.rows;
    const int64_t k = same_rows ? size.first_step(c + 1) * size.kStep : 0;
    if (packed || row + t * size.rows >= p.n) return {nullptr, 0, 0};
    const T* from = static_cast<const T*>(a->data) + row * a->row_stride + k * a->column_stride;
    const int64_t bytes = sizeof(T);
    if (by_rows(*a)) {
      from += t * size.rows * a->row_stride;
      return {reinterpret_cast<const char*>(from), a->row_stride * bytes, h};
    }
    // Each tile asks for one line of every step, which has kStep rows.
    constexpr int64_t kLines = kGroup / size.kStep;
    from += t / kLines * a->column_stride;
    return {reinterpret_cast<const char*>(from) + t % kLines * 64,
            a->column_stride * size.kStep * bytes, size.steps};
  }
};

// Adds the terms of one chunk to a group's sums, or begins with them. `last`: of the task's panels,
// during which it asks for the tiles that come next.
template <class T>
void add_chunk(const Product& p, const ProductSizes<T>& size, const Tiles<T>& tiles,
               const Place& at, int64_t c, bool last, const float* a, float* sums) {
  using Math = typename MathOf<T>::type;
  const int64_t panel = at.j / kPanel, steps = size.steps_of(c), rows = size.rows;
  const Panels b = {p.panels + panel * size.panel_floats() + size.first_step(c) * kPanel, kPanel,
                    0};
  const auto add = [&](int64_t h, const float* tile, float* to, auto ahead) {
    if (by_rows(*tiles.a)) {
      gemm_rows<Math, kChunkStride>(h, at.lanes, steps, tile, 1, b, to, kPanel, c > 0, ahead);
    } else {
      gemm_rows<Math, 1>(h, at.lanes, steps, tile, kTileLanes, b, to, kPanel, c > 0, ahead);
    }
  };
  for (int64_t i = 0; i < at.h; i += rows, a += size.packed_chunk, sums += rows * kPanel) {
    const int64_t h = smaller(rows, at.h - i);
    RowsAhead ahead = {nullptr, 0, 0};
    if (last) ahead = tiles.next(p, size, at.i, c, i / rows, h);
    ahead.rows ? add(h, a, sums, ahead) : add(h, a, sums, NothingAhead{});
  }
}

template <class T>
void product_run(const Product& p, const ProductTask& task, float* scratch) {
  const ProductSizes<T> size(p);
  const int factors = p.gate.data ? 2 : 1;
  const Tiles<T> tiles[2] = {{&p.a, p.tiles, scratch},
                             {&p.gate, p.gate_tiles, scratch + kGroup * size.packed_chunk}};
  float* all_sums = scratch + 2 * kGroup * size.packed_chunk;
  for (int64_t t = task.tile_begin; t < task.tile_end; t += kGroup) {
    const int64_t count = smaller(kGroup, task.tile_end - t), i = t * size.rows;
    for (int64_t c = 0; c < size.chunks; ++c) {
      const float* a[2] = {};
      for (int w = 0; w < factors; ++w) a[w] = tiles[w].chunk(p, size, t, count, c);
      for (int64_t panel = task.panel_begin; panel < task.panel_end; ++panel) {
        const Place at = {i, smaller(count * size.rows, p.n - i), panel * kPanel,
                          smaller(kPanel, p.m - panel * kPanel)};
        // With more than one chunk, each panel's sums wait for the next.
        const int64_t slot = size.chunks > 1 ? panel - task.panel_begin : 0;
        float* sums = all_sums + slot * 2 * kGroupFloats;
        for (int w = 0; w < factors; ++w) {
          add_chunk<T>(p, size, tiles[w], at, c, panel + 1 == task.panel_end, a[w],
                       sums + w * kGroupFloats);
        }
        if (c + 1 == size.chunks) {
          finish_tile<T>(p, at, sums, factors == 2 ? sums + kGroupFloats : nullptr);
        }
      }
    }
  }
}

// ---- the gradient of what was activated, where dout is its start ----

// Rows [begin, end); their sums go to sums [n], unless null.
template <class T>
void product_bwd_rows(const LinearParams& p, const Matrix& dout, const Matrix& dz, float* sums,
                      int64_t begin, int64_t end) {
  constexpr int kDegree = MathOf<T>::type::kExpDegree;
  with_activation<kDegree>(p.activation, [&](auto activation) {
    for (int64_t j = begin; j < end; ++j) {
      const T* from = static_cast<const T*>(dout.data) + j * dout.row_stride;
      const T* pre = static_cast<const T*>(p.pre.data) + j * p.pre.row_stride;
      T* to = static_cast<T*>(dz.data) + j * dz.row_stride;
      for (int64_t i = 0; i < p.n; i += kWidth) {
        const int n = static_cast<int>(smaller(kWidth, p.n - i));
        Vec d = n == kWidth ? load(from + i) : load(from + i, n);
        if (dz.data) {
          if (p.dropout.threshold) d = d * draw_row(p.dropout, j, i);
          if (p.pre.data) d = d * activation.slope(load(pre + i, n));
          store(to + i, d, n);
        }
        if (sums) store(sums + i, j == begin ? d : load(sums + i, n) + d, n);
      }
    }
  });
}

// db [begin, end) from the sums of blocks of rows, [blocks, n], in the order of the blocks.
template <class T>
void product_add_sums(const LinearParams& p, const float* sums, int64_t blocks, void* db,
                      int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int n = static_cast<int>(smaller(kWidth, end - i));
    Vec total = zero();
    for (int64_t block = 0; block < blocks; ++block)
      total = total + load(sums + block * p.n + i, n);
    store(static_cast<T*>(db) + i, total, n);
  }
}

}  // namespace fastattn::FASTATTN_ISA
