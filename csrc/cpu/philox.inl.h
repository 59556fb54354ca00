// Random words by position (Philox4x32-10); what and why: fastattn/dropout.py.
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// Words of columns [column, column + kCount) of one row; column is a multiple of 4.
template <int kCount>
void philox_row(uint64_t seed, uint32_t plane, uint32_t row, uint32_t column, uint32_t* words) {
  static_assert(kCount % 4 == 0, "four words come from one counter");
  constexpr int kQuads = kCount / 4;
  uint32_t c0[kQuads], c1[kQuads], c2[kQuads], c3[kQuads];
  for (int i = 0; i < kQuads; ++i) {
    c0[i] = column / 4 + static_cast<uint32_t>(i);
    c1[i] = row;
    c2[i] = plane;
    c3[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kQuads; ++i) {
      const uint64_t a = 0xD2511F53ull * c0[i], b = 0xCD9E8D57ull * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kQuads; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

}  // namespace fastattn::FASTATTN_ISA
