// linear, forward and backward, as products.
#include "../linear.h"

#include "products.h"

namespace fastattn {

void linear_fwd_cpu(const LinearParams& p, int threads) {
  if (p.m == 0 || p.n == 0) return;
  Product forward = product_of(p.type, p.m, p.n, p.k, p.x, p.weight);
  forward.finish.bias = p.bias;
  forward.finish.pre = p.pre;
  forward.finish.activation = p.activation;
  forward.finish.dropout = p.dropout;
  forward.finish.residual = p.residual;
  forward.finish.out = p.out;
  multiply_now(forward, threads);
}

void linear_bwd_cpu(const LinearParams& p, const LinearGradients& g, int threads) {
  Workspace workspace;
  const bool changes = p.activation != Activation::kNone || p.dropout.threshold;
  const Matrix dz = changes ? workspace.matrix(p.m, p.n, p.type) : g.dout;
  if (changes || g.dbias) bwd_rows_now(p, g.dout, changes ? dz : Matrix{}, g.dbias, threads);
  if (g.dx.data) {
    multiply_now(input_gradient(p.type, p.m, p.n, p.k, dz, p.weight, g.dx), threads);
  }
  if (g.dweight.data) {
    multiply_now(weight_gradient(p.type, p.m, p.n, p.k, dz, p.x, g.dweight), threads);
  }
}

}  // namespace fastattn
