// The border between host and kernels: what one call of linear is, in raw pointers.
#pragma once

#include "params.h"

namespace fastattn {

enum class Activation : int { kNone, kRelu, kRelu2, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh };

// [rows, columns], one of whose strides is 1. data null: none.
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0, column_stride = 0;

  Matrix transposed() const { return {data, column_stride, row_stride}; }
  Matrix from_row(int64_t row, Type type) const { return moved(row * row_stride, type); }
  Matrix from_column(int64_t column, Type type) const {
    return moved(column * column_stride, type);
  }

 private:
  Matrix moved(int64_t elements, Type type) const {
    Matrix x = *this;
    if (data) x.data = static_cast<char*>(data) + elements * size_of(type);
    return x;
  }
};

struct Dropout {
  uint32_t threshold = 0;  // a position whose random word is below is dropped; 0: none
  float scale = 1.0f;      // 1 / (1 - p)
  uint64_t seed = 0;
  uint32_t plane = 0;
};

struct LinearParams {
  Type type;
  int64_t m, n, k;
  Matrix x;          // [m, k]
  Matrix weight;     // [n, k]
  const void* bias;  // [n]; null: none
  Matrix residual;   // [m, n], last stride 1
  Matrix out;        // [m, n], last stride 1
  Matrix pre;        // [m, n], last stride 1: x weight^T + bias; written forward where it is
                     // given, read backward where there is an activation
  Activation activation;
  Dropout dropout;
};

struct LinearGradients {
  Matrix dout;     // [m, n], last stride 1
  Matrix dx;       // [m, k], last stride 1; null: not wanted
  Matrix dweight;  // [n, k]
  void* dbias;     // [n]
};

void linear_fwd_cpu(const LinearParams& p, int threads);
void linear_bwd_cpu(const LinearParams& p, const LinearGradients& g, int threads);

}  // namespace fastattn
