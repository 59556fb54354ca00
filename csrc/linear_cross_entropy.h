// The border between host and kernels: what one call of linear_cross_entropy is, in raw pointers.
#pragma once

#include "linear.h"

namespace fastattn {

struct CrossEntropyParams {
  Type type;
  int64_t m, n, k;            // tokens, classes, values
  Matrix x;                   // [m, k]
  Matrix weight;              // [n, k]
  const void* bias;           // [n]; null: none
  const int64_t* target;      // [m]
  const float* class_weight;  // [n]; null: none
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;  // 0: none
};

struct CrossEntropyGradients {
  const float* dloss;  // [m]
  const double* lse;   // [m]
  Matrix dx;           // [m, k]; null: not wanted, like all that follow
  Matrix dweight;      // [n, k]
  void* dbias;         // [n]
};

// [m]: the loss of each token, before the reduction, and the log of the sum of exp(logit): in
// double, since backward makes the softmax again from their difference.
void linear_cross_entropy_fwd_cpu(const CrossEntropyParams& p, float* loss, double* lse,
                                  int threads);
void linear_cross_entropy_bwd_cpu(const CrossEntropyParams& p, const CrossEntropyGradients& g,
                                  int threads);

}  // namespace fastattn
