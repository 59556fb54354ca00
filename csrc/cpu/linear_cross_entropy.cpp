// linear_cross_entropy: products whose logits are used where they arise. Forward keeps four numbers
// a token and part of the classes; backward makes the logits again, a slice of the classes at a
// time.
#include "../linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "products.h"

namespace fastattn {

namespace {

// Classes of a slice: whole groups of tiles on every tier.
constexpr int64_t kSlice = 1008;
constexpr int64_t kTokens = 64;  // of a task that works by token

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Product logits(const CrossEntropyParams& p) {
  Product product = product_of(p.type, p.m, p.n, p.k, p.x, p.weight);
  product.finish.bias = p.bias;
  product.loss.target = p.target;
  product.loss.class_weight = p.class_weight;
  product.loss.softcap = p.softcap;
  return product;
}

float weight_of(const CrossEntropyParams& p, int64_t i) {
  return p.class_weight ? p.class_weight[i] : 1.0f;
}

double all_weights(const CrossEntropyParams& p) {
  double total = 0.0;
  for (int64_t i = 0; i < p.n; ++i) total += weight_of(p, i);
  return total;
}

// The parts' sums in the order of the parts.
void finish_token(const CrossEntropyParams& p, const ClassLoss& parts, int64_t count,
                  double weights, int64_t token, float* loss, double* lse) {
  float state[ClassLoss::kStates] = {-std::numeric_limits<float>::infinity(), 0.0f, 0.0f, 0.0f};
  for (int64_t part = 0; part < count; ++part) {
    const float* other = parts.states + part * ClassLoss::kStates * parts.stride + token;
    const auto value = [&](int which) { return other[which * parts.stride]; };
    const float top = std::max(state[ClassLoss::kLargest], value(ClassLoss::kLargest));
    state[ClassLoss::kSum] = state[ClassLoss::kSum] * std::exp(state[ClassLoss::kLargest] - top) +
                             value(ClassLoss::kSum) * std::exp(value(ClassLoss::kLargest) - top);
    state[ClassLoss::kLargest] = top;
    state[ClassLoss::kTarget] += value(ClassLoss::kTarget);
    state[ClassLoss::kWeighted] += value(ClassLoss::kWeighted);
  }
  const double sum = std::log(static_cast<double>(state[ClassLoss::kSum]));
  const double all = state[ClassLoss::kLargest] + sum;
  lse[token] = all;
  const int64_t target = p.target[token];
  if (target == p.ignore_index) {
    loss[token] = 0.0f;
    return;
  }
  // Largest and target logit may be the same: their difference first.
  const double miss = (state[ClassLoss::kLargest] - state[ClassLoss::kTarget]) + sum;
  double result = (1.0 - p.label_smoothing) * weight_of(p, target) * miss;
  if (p.label_smoothing > 0.0f) {
    result += p.label_smoothing / p.n * (weights * all - state[ClassLoss::kWeighted]);
  }
  loss[token] = static_cast<float>(result + p.z_loss * all * all);
}

// How much of the softmax, of the target and of all classes alike is in a token's gradient.
struct TokenGradients {
  float *lse, *lse_rest, *by_share, *by_target, *by_weight;

  void set(const CrossEntropyParams& p, const CrossEntropyGradients& g, double weights,
           int64_t token) {
    lse[token] = static_cast<float>(g.lse[token]);
    lse_rest[token] = static_cast<float>(g.lse[token] - lse[token]);
    by_share[token] = by_target[token] = by_weight[token] = 0.0f;
    const int64_t target = p.target[token];
    if (target == p.ignore_index) return;
    const double d = g.dloss[token], smoothing = p.label_smoothing;
    const double of_target = (1.0 - smoothing) * weight_of(p, target);
    const double of_all = smoothing / p.n;
    const double of_lse = of_target + of_all * weights + 2.0 * p.z_loss * g.lse[token];
    by_share[token] = static_cast<float>(d * of_lse);
    by_target[token] = static_cast<float>(d * of_target);
    by_weight[token] = static_cast<float>(d * of_all);
  }
};

// dx += dlogits weight: slices are added up in float.
void add_input_gradient(const CrossEntropyParams& p, const Product& slice, const Matrix& dlogits,
                        const Matrix& sums, const Matrix& dx, int threads) {
  const bool first = slice.first_output == 0, last = slice.first_output + slice.n == p.n;
  Product product = input_gradient(p.type, p.m, slice.n, p.k, dlogits, slice.a, dx);
  if (!first) product.finish.sums = sums;
  if (!last) product.finish.to_sums = sums;
  multiply_now(product, threads);
}

void slice_gradients(const CrossEntropyParams& p, const CrossEntropyGradients& g,
                     const Product& slice, const Matrix& dlogits, int threads) {
  if (g.dbias) {
    LinearParams columns = {};
    columns.type = p.type;
    columns.m = p.m;
    columns.n = slice.n;
    char* dbias = static_cast<char*>(g.dbias) + slice.first_output * size_of(p.type);
    bwd_rows_now(columns, dlogits, {}, dbias, threads);
  }
  if (g.dweight.data) {
    const Matrix dweight = g.dweight.from_row(slice.first_output, p.type);
    multiply_now(weight_gradient(p.type, p.m, slice.n, p.k, dlogits, p.x, dweight), threads);
  }
}

}  // namespace

void linear_cross_entropy_fwd_cpu(const CrossEntropyParams& p, float* loss, double* lse,
                                  int threads) {
  if (p.m == 0) return;
  Workspace workspace;
  Products products(p.type, threads);
  Product product = logits(p);
  const ProductPlan plan = products.plan(product);
  ClassLoss& parts = product.loss;
  parts.part_rows = kPartGroups * plan.group * plan.tile_rows;
  parts.stride = plan.panels * plan.panel_lanes;
  const int64_t count = ceil_div(p.n, parts.part_rows);
  parts.states = workspace.floats(count * ClassLoss::kStates * parts.stride);
  products.multiply(product);
  products.run();
  const double weights = p.label_smoothing > 0.0f ? all_weights(p) : 0.0;
  for_each(threads, ceil_div(p.m, kTokens), [&](int64_t t) {
    for (int64_t token = t * kTokens; token < std::min(p.m, (t + 1) * kTokens); ++token) {
      finish_token(p, parts, count, weights, token, loss, lse);
    }
  });
}

void linear_cross_entropy_bwd_cpu(const CrossEntropyParams& p, const CrossEntropyGradients& g,
                                  int threads) {
  Workspace workspace;
  float* of_tokens = workspace.floats(5 * p.m);
  TokenGradients tokens = {of_tokens, of_tokens + p.m, of_tokens + 2 * p.m, of_tokens + 3 * p.m,
                           of_tokens + 4 * p.m};
  const double weights = p.label_smoothing > 0.0f ? all_weights(p) : 0.0;
  for (int64_t token = 0; token < p.m; ++token) tokens.set(p, g, weights, token);
  Matrix sums = g.dx;
  if (g.dx.data && p.type != Type::kFloat32) sums = workspace.matrix(p.m, p.k, Type::kFloat32);
  for (int64_t begin = 0; begin < p.n; begin += kSlice) {
    Workspace of_slice;
    Product slice = outputs_of(logits(p), begin, std::min(kSlice, p.n - begin));
    const Matrix dlogits = of_slice.matrix(p.m, slice.n, p.type);
    slice.outputs = slice.n;
    slice.finish.out = dlogits;
    slice.loss.lse = tokens.lse;
    slice.loss.lse_rest = tokens.lse_rest;
    slice.loss.by_share = tokens.by_share;
    slice.loss.by_target = tokens.by_target;
    slice.loss.by_weight = tokens.by_weight;
    multiply_now(slice, threads);
    slice_gradients(p, g, slice, dlogits, threads);
    if (g.dx.data && p.m) add_input_gradient(p, slice, dlogits, sums, g.dx, threads);
  }
}

}  // namespace fastattn
