// What every op's Params is made of.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Type : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt8 = 3,
  kBool = 4,
  kInt32 = 5,
  kInt64 = 6,
  kOther = 7
};
constexpr int kTypes = 3;       // those that kernels compute in
constexpr int kCacheTypes = 4;  // those that keys and values may be kept in

inline int64_t size_of(Type type) {
  constexpr int64_t bytes[] = {4, 2, 2, 1, 1, 4, 8, 0};
  return bytes[static_cast<int>(type)];
}

// A tensor without its type. Strides are in elements; a broadcast dimension has stride 0.
struct Strided {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  // Moves so many steps along a dimension.
  void advance(int dim, int64_t steps, Type type) {
    if (data) data = static_cast<char*>(data) + steps * stride[dim] * size_of(type);
  }
};

}  // namespace fastattn
