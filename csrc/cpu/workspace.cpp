#include "workspace.h"

#include <deque>

#include "parallel.h"

namespace fastattn {

namespace {

constexpr size_t kKept = size_t{64} << 20;

struct Buffers {
  std::deque<Buffer> all;
  size_t used = 0;
};

Buffers& buffers() {
  thread_local Buffers buffers;
  return buffers;
}

}  // namespace

Workspace::Workspace() : begin_(buffers().used) {}

Workspace::~Workspace() {
  buffers().used = begin_;
  if (begin_ > 0) return;
  size_t kept = 0;
  for (Buffer& buffer : buffers().all) {
    buffer.trim(kKept - kept);
    kept += buffer.bytes();
  }
}

float* Workspace::floats(int64_t n) {
  Buffers& b = buffers();
  if (b.used == b.all.size()) b.all.emplace_back();
  return b.all[b.used++].floats(n);
}

Matrix Workspace::matrix(int64_t rows, int64_t columns, Type type) {
  return {floats((rows * columns * size_of(type) + 3) / 4), columns, 1};
}

}  // namespace fastattn
