// The border between host and kernels: what one call of layer_norm or rms_norm is.
#pragma once

#include "params.h"

namespace fastattn {

struct NormParams {
  int64_t rows, columns;  // M, N
  bool centered;          // layer_norm, which takes the mean off; else rms_norm
  Type type;              // of x, residual, out, total and their gradients
  Type weight_type;       // type, or kFloat32
  Type bias_type;         // type, or kFloat32
  float eps;
  float weight_offset;  // added to the weight; rms_norm only
  Strided x;            // [M, N], last stride 1; backward: what was normalised
  Strided residual;     // [M, N], last stride 1; data null: none
  void* weight;         // [N]; null: all 1
  void* bias;           // [N]; null: none
  void* out;            // [M, N], row by row
  void* total;          // [M, N], row by row: x + residual; null: no residual
  float* mean;          // [M]; null: not wanted, or rms_norm
  float* rstd;          // [M], 1 / sqrt(variance + eps); null: not wanted

  // Backward only.
  Strided dout;    // [M, N], last stride 1
  Strided dtotal;  // [M, N], last stride 1; data null: none
  void* dx;        // [M, N], row by row; the residual's gradient too
  void* dweight;   // [N], in the weight's type; null: not wanted
  void* dbias;     // [N], in the bias's type; null: not wanted
};

void norm_fwd_cpu(const NormParams& p, int threads);
void norm_bwd_cpu(const NormParams& p, int threads);

}  // namespace fastattn
