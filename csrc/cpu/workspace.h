// Memory that lives as long as a call.
#pragma once

#include <cstddef>

#include "../linear.h"

namespace fastattn {

// Buffers by the calling thread, kept for its next call up to a limit. Workspaces nest.
class Workspace {
 public:
  Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();
  float* floats(int64_t n);
  // [rows, columns] of a type.
  Matrix matrix(int64_t rows, int64_t columns, Type type);

 private:
  const size_t begin_;
};

}  // namespace fastattn
