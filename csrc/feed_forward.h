// What one call of feed_forward or gated_feed_forward is, in raw pointers.
#pragma once

#include "linear.h"

namespace fastattn {

struct FeedForwardParams {
  Type type;
  int64_t m, n, k, hidden;
  Matrix x;               // [m, k]
  Matrix gate;            // [hidden, k]; null: not gated
  Matrix up;              // [hidden, k]
  Matrix down;            // [n, hidden]
  const void* gate_bias;  // [hidden]; null: none
  const void* up_bias;    // [hidden]; null: none
  const void* down_bias;  // [n]; null: none
  Matrix residual;        // [m, n], last stride 1
  Matrix out;             // [m, n], last stride 1
  Matrix pre;             // [m, hidden] (gated: [m, 2 hidden], gates first), last stride 1: what is
                          // activated; null: not kept, and made again backward
  Activation activation;
  Dropout dropout;  // of the output
  Dropout hidden_dropout;
};

struct FeedForwardGradients {
  Matrix dout;  // [m, n], last stride 1
  Matrix dx;    // [m, k], last stride 1; null: not wanted, like all that follow
  Matrix dgate, dup, ddown;
  void *dgate_bias, *dup_bias, *ddown_bias;
};

void feed_forward_fwd_cpu(const FeedForwardParams& p, int threads);
void feed_forward_bwd_cpu(const FeedForwardParams& p, const FeedForwardGradients& g, int threads);

}  // namespace fastattn
