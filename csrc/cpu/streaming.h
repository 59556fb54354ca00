// When results go past the caches: a plain store first reads the line that it overwrites, and
// leaves in the cache what nobody will find there any more.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr int64_t kCacheLine = 64;
// From here on it was measured faster, also where the result is read right afterwards
// (docs/layer_norm.md).
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

// For outputs of `bytes` in all whose rows, or parts of a row that are written one by one, have
// `row_bytes`: a line must be written whole.
inline bool should_stream(int64_t bytes, int64_t row_bytes, const void* out,
                          const void* other = nullptr) {
  const auto is_aligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0;
  };
  return bytes >= kStreamedBytes && row_bytes % kCacheLine == 0 && is_aligned(out) &&
         is_aligned(other);
}

}  // namespace fastattn
