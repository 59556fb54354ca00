// What is known of every piece of a block's shared memory: who wrote it, who read it, when.
#pragma once

#include <vector>

#include "machine.h"

namespace fastattn::emulation {

constexpr int kMaxWarps = 32;
constexpr int kPiece = 2;  // bytes

// Who touches memory: these lanes of a warp, in the warp's present epoch.
struct Actor {
  int warp;
  uint32_t lanes;
};

class Shadow {
 public:
  Shadow(size_t bytes, int warps);

  // Fails where the access is out of bounds, unaligned, a race, or reads what is not there yet.
  void touch(uint32_t address, int bytes, Access access, Actor actor, Where at);
  // A copy that was issued, and one that has been waited for.
  void copy_begins(uint32_t address, int bytes, int thread, Where at);
  void copy_ends(uint32_t address, int bytes, int thread, Where at);
  // Warps that meet: what each did before happens before what any does afterwards.
  void meet(const std::vector<int>& warps);
  // One warp hands on what it did, others take it up: barriers that some only arrive at.
  std::vector<int> clock(int warp) const { return clocks_[warp]; }
  void join(int warp, const std::vector<int>& clock);
  void advance(int warp) { ++clocks_[warp][warp]; }

  char* data(uint32_t address) { return data_.data() + address; }

 private:
  enum class State : uint8_t { kNothing, kValid, kInFlight };
  struct Visit {
    int epoch = 0;  // of its warp, whose epochs start at 1; 0: none
    uint32_t lanes = 0;
  };
  struct Piece {
    State state = State::kNothing;
    int writer = -1;  // warp
    Visit write;
    Where where = {"", 0};
  };

  void check_bounds(uint32_t address, int bytes, Where at) const;
  bool ordered(const Visit& before, int warp, Actor now) const;
  void check_write(size_t piece, Actor actor, Where at);

  std::vector<char> data_;
  size_t bytes_;
  int warps_;
  std::vector<Piece> pieces_;
  std::vector<Visit> reads_;              // [pieces, warps]
  std::vector<std::vector<int>> clocks_;  // [warps, warps]
};

}  // namespace fastattn::emulation
