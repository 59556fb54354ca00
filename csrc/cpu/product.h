// The matrix product that linear layers are made of, as kernels see it.
//
// out[j, i] = finish(sum over k of b[j, k] a[i, k]). Row i of a is an output (a weight's row), row
// j of b is a token. A register tile has rows of a, which it broadcasts, and lanes of b, packed
// into panels: so a weight is used where it lies, and only the tokens, of which there are few
// numbers for each multiplication, change their order.
#pragma once

#include "../linear.h"

namespace fastattn {

// What becomes of the sums, in this order.
struct Finish {
  const void* bias = nullptr;       // [n]
  const void* gate_bias = nullptr;  // [n]
  Matrix pre;  // [m, n] (gated: [m, 2 outputs], gates first): the sums are kept here
  Activation activation = Activation::kNone;
  Dropout dropout;
  Matrix residual;          // [m, n], is added
  Matrix sums;              // float [m, n], are added
  Matrix to_sums;           // float [m, n], in place of out; last strides of both are 1
  Matrix out;               // [m, n]; either stride is 1
  float* panels = nullptr;  // or the result becomes panels, whose terms are all outputs
};

// Of a gradient with respect to hidden values, the one with respect to what was activated.
struct Slope {
  Matrix
      pre;  // [m, n] (gated: [m, 2 outputs], gates first), as Finish keeps it; null: no such step
  Activation activation = Activation::kNone;
  Dropout dropout;
  bool gated = false;
  Matrix hidden;  // [m, n]: the hidden values, made again; null: not wanted
};

// Outputs are classes, and what is wanted of them is each token's loss or the logits' gradient.
// target null: no such step.
struct ClassLoss {
  const int64_t* target = nullptr;      // [tokens]
  const float* class_weight = nullptr;  // [classes]; null: 1
  float softcap = 0.0f;                 // 0: none
  // Forward: what is known of a token from the classes of one part, [parts][kStates][stride].
  enum { kLargest, kSum, kTarget, kWeighted, kStates };
  float* states = nullptr;
  int64_t part_rows = 0, stride = 0;
  // Backward, by token: dlogit = by_share softmax - by_target [class is target] - by_weight weight.
  const float *lse = nullptr, *lse_rest = nullptr;
  const float *by_share = nullptr, *by_target = nullptr, *by_weight = nullptr;
};

struct Product {
  Type type;
  int64_t n, m, kk;
  Matrix a;                      // [n, kk]
  Matrix gate;                   // [n, kk]: hidden = activation(b gate^T) (b a^T); null: not gated
  Matrix b;                      // [m, kk]
  int64_t outputs = 0;           // of the whole product, of which this may be a part
  int64_t first_output = 0;      // where this part begins
  int64_t first_row = 0;         // and among the rows of b
  const float* tiles = nullptr;  // a, packed; null: each run copies what it needs
  const float* gate_tiles = nullptr;
  const float* panels = nullptr;  // b, packed
  Finish finish;
  ClassLoss loss;  // its gradient goes to finish.out
  Slope slope;     // its result goes to finish.out, [m, n] (gated: [m, 2 outputs], gates first)
};

// Tiles [tile_begin, tile_end) by panels [panel_begin, panel_end).
struct ProductTask {
  int64_t tile_begin, tile_end, panel_begin, panel_end;
};

// Sizes of one product, buffers in floats.
struct ProductPlan {
  int64_t tiles, panels;  // how many
  int64_t tile_rows;      // rows of a tile, but for the last
  int64_t panel_lanes;    // rows of b in a panel
  int64_t packed_group;   // a group of tiles of a
  int64_t packed_panel;   // a panel of b
  int64_t tile_tasks;     // tasks of packing a; 0: each run copies the tiles that it needs
  int64_t panel_tasks;    // tasks of packing b
  int64_t scratch;        // of a run
  int64_t task_panels;    // the most panels of a run
  int64_t group;          // a run begins at a multiple of so many tiles
  int64_t few_panels;     // b as run_few reads it
  int64_t few_scratch;
};

struct ProductKernels {
  ProductPlan (*plan)(const Product&);
  void (*pack_panels)(const Product&, int64_t task, float* panels);
  void (*pack_tiles)(const Product&, const Matrix& a, int64_t task, float* tiles);
  void (*run)(const Product&, const ProductTask&, float* scratch);
  // A few rows of b (m <= kFewTokens) against outputs [begin, end), begin a multiple of 16. Has no
  // slope and makes no panels.
  void (*pack_few)(const Product&, float* panels);
  void (*run_few)(const Product&, int64_t begin, int64_t end, float* scratch);
  // Of rows [begin, end) of dout [m, n]: the gradient of what was activated, dz (null: dout is it),
  // and the sum of these rows [n] (null: not wanted).
  void (*bwd_rows)(const LinearParams&, const Matrix& dout, const Matrix& dz, float* sums,
                   int64_t begin, int64_t end);
  // Columns [begin, end) of db [n] from the sums of blocks of rows, [blocks, n].
  void (*add_sums)(const LinearParams&, const float* sums, int64_t blocks, void* db, int64_t begin,
                   int64_t end);
};

// The most rows of b that run_few takes.
constexpr int64_t kFewTokens = 8;

}  // namespace fastattn
