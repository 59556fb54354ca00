// feed_forward and gated_feed_forward, forward and backward, as products.
#include "../feed_forward.h"

#include <algorithm>

#include "products.h"

namespace fastattn {

namespace {

// hidden = activation(...), to where the caller says.
Product hidden_product(const FeedForwardParams& p) {
  Product up = product_of(p.type, p.m, p.hidden, p.k, p.x, p.up);
  up.gate = p.gate;
  up.finish.bias = p.up_bias;
  up.finish.gate_bias = p.gate_bias;
  up.finish.pre = p.pre;
  up.finish.activation = p.activation;
  up.finish.dropout = p.hidden_dropout;
  return up;
}

Product down_product(const FeedForwardParams& p, const Matrix& hidden) {
  Product down = product_of(p.type, p.m, p.n, p.hidden, hidden, p.down);
  down.finish.bias = p.down_bias;
  down.finish.dropout = p.dropout;
  down.finish.residual = p.residual;
  down.finish.out = p.out;
  return down;
}

void forward_few(const FeedForwardParams& p, int threads) {
  Workspace workspace;
  const Matrix hidden = workspace.matrix(p.m, p.hidden, p.type);
  Product up = hidden_product(p);
  up.finish.out = hidden;
  Products products(p.type, threads);
  products.multiply_few(down_product(p, hidden), products.multiply_few(up));
  products.run();
}

// In blocks of rows, whose hidden values pass from one product to the other as panels. A block's
// first product comes before the second one of the block before, so that nobody waits between them.
void forward_blocks(const FeedForwardParams& p, int threads) {
  Products products(p.type, threads);
  Product up = hidden_product(p), down = down_product(p, {});
  const int64_t rows = std::min(products.block_rows(up), products.block_rows(down));
  const int64_t blocks = (p.m + rows - 1) / rows;
  int after = products.pack_weights(up, Schedule::kNothing);
  after = products.pack_weights(down, after);
  const ProductPlan up_plan = products.plan(rows_of(up, 0, rows));
  const ProductPlan down_plan = products.plan(rows_of(down, 0, rows));
  float *panels[2] = {}, *hidden[2] = {};
  for (int64_t i = 0; i < std::min<int64_t>(blocks, 2); ++i) {
    panels[i] = products.floats(up_plan.panels * up_plan.packed_panel);
    hidden[i] = products.floats(down_plan.panels * down_plan.packed_panel);
  }
  int up_done[2] = {after, after}, down_done[2] = {after, after};
  for (int64_t block = 0; block <= blocks; ++block) {
    if (block < blocks) {
      const int at = block % 2;
      Product part = rows_of(up, block * rows, std::min(rows, p.m - block * rows));
      part.finish.panels = hidden[at];
      const int packed = products.pack_panels(part, panels[at], up_done[at]);
      up_done[at] = products.multiply_panels(part, std::max({packed, down_done[at], after}));
    }
    if (block > 0) {
      const int at = (block - 1) % 2;
      const int64_t begin = (block - 1) * rows;
      Product part = rows_of(down, begin, std::min(rows, p.m - begin));
      part.panels = hidden[at];
      down_done[at] = products.multiply_panels(part, up_done[at]);
    }
  }
  products.run();
}

// Whether gate and up are one matrix, [2 hidden, k].
bool stacked(const FeedForwardParams& p) {
  return p.gate.data && p.up.row_stride == p.gate.row_stride &&
         p.up.column_stride == p.gate.column_stride &&
         p.up.data == p.gate.from_row(p.hidden, p.type).data;
}

// dx [m, k] = dz_gate gate + dz_up up, where dz [m, hidden] (gated: [m, 2 hidden], gates first).
void input_gradients(const FeedForwardParams& p, const Matrix& dz, const Matrix& dx, int threads) {
  const auto gradient = [&](int64_t terms, const Matrix& from, const Matrix& weight) {
    return input_gradient(p.type, p.m, terms, p.k, from, weight, dx);
  };
  if (!p.gate.data) return multiply_now(gradient(p.hidden, dz, p.up), threads);
  if (stacked(p)) return multiply_now(gradient(2 * p.hidden, dz, p.gate), threads);
  multiply_now(gradient(p.hidden, dz, p.gate), threads);
  Product second = gradient(p.hidden, dz.from_column(p.hidden, p.type), p.up);
  second.finish.residual = dx;
  multiply_now(second, threads);
}

// The gradients of a weight [n, k] and its bias from dz [m, n] and x [m, k].
void parameter_gradients(const FeedForwardParams& p, int64_t n, int64_t k, const Matrix& dz,
                         const Matrix& x, const Matrix& dweight, void* dbias, int threads) {
  if (dbias) {
    LinearParams columns = {};
    columns.type = p.type;
    columns.m = p.m;
    columns.n = n;
    bwd_rows_now(columns, dz, {}, dbias, threads);
  }
  if (dweight.data) {
    multiply_now(weight_gradient(p.type, p.m, n, k, dz, x, dweight), threads);
  }
}

}  // namespace

void feed_forward_fwd_cpu(const FeedForwardParams& p, int threads) {
  if (p.m == 0 || p.n == 0) return;
  const Matrix hidden = {nullptr, p.hidden, 1};
  const bool few = has_few_tokens(hidden_product(p)) && has_few_tokens(down_product(p, hidden));
  few ? forward_few(p, threads) : forward_blocks(p, threads);
}

void feed_forward_bwd_cpu(const FeedForwardParams& p, const FeedForwardGradients& g, int threads) {
  const int64_t width = p.gate.data ? 2 * p.hidden : p.hidden;
  Workspace workspace;
  Matrix dy = g.dout;
  if (p.dropout.threshold) {
    dy = workspace.matrix(p.m, p.n, p.type);
    LinearParams output = {};
    output.type = p.type;
    output.m = p.m;
    output.n = p.n;
    output.dropout = p.dropout;
    bwd_rows_now(output, g.dout, dy, nullptr, threads);
  }
  Matrix pre = p.pre;
  if (!pre.data) {
    pre = workspace.matrix(p.m, width, p.type);
    Product up = hidden_product(p);
    up.finish.pre = pre;
    multiply_now(up, threads);
  }
  const Matrix dz = workspace.matrix(p.m, width, p.type);
  Product slope = product_of(p.type, p.m, p.hidden, p.n, dy, p.down.transposed());
  slope.slope.pre = pre;
  slope.slope.activation = p.activation;
  slope.slope.dropout = p.hidden_dropout;
  slope.slope.gated = p.gate.data != nullptr;
  if (g.ddown.data) slope.slope.hidden = workspace.matrix(p.m, p.hidden, p.type);
  slope.finish.out = dz;
  multiply_now(slope, threads);
  parameter_gradients(p, p.n, p.hidden, dy, slope.slope.hidden, g.ddown, g.ddown_bias, threads);
  const Matrix dz_up = p.gate.data ? dz.from_column(p.hidden, p.type) : dz;
  parameter_gradients(p, p.hidden, p.k, dz_up, p.x, g.dup, g.dup_bias, threads);
  parameter_gradients(p, p.hidden, p.k, dz, p.x, g.dgate, g.dgate_bias, threads);
  if (g.dx.data) input_gradients(p, dz, g.dx, threads);
}

}  // namespace fastattn
