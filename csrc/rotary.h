// The border between host and kernels: what one call of rotary is.
#pragma once

#include "params.h"

namespace fastattn {

struct RotaryParams {
  int64_t batch, seqlen, nheads, head_dim;
  int64_t rotary_dim;  // the first values of a head, which are turned; even
  Type type;           // of x and out
  Type table_type;     // type, or kFloat32
  Type position_type;  // kInt32 or kInt64
  Strided x;           // [B, S, H, D], last stride 1
  Strided cos, sin;    // [positions, R / 2] or, with own_angles, [B, S, R / 2]; last stride 1
  Strided positions;   // [B, S]; data null: 0 ... S - 1
  void* out;           // [B, S, H, D], row by row
  bool own_angles;     // the tables have a row for each token
  bool interleaved;    // pairs are neighbours, not halves
  bool inverse;        // turns back: by minus the angle
};

void rotary_cpu(const RotaryParams& p, int threads);

}  // namespace fastattn
