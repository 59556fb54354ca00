#include "shadow.h"

#include <algorithm>

namespace fastattn::emulation {

Shadow::Shadow(size_t bytes, int warps)
    : data_(bytes + 16),
      bytes_(bytes),
      warps_(warps),
      pieces_(bytes / kPiece + 1),
      reads_((bytes / kPiece + 1) * warps),
      clocks_(warps, std::vector<int>(warps)) {
  for (int i = 0; i < warps; ++i) clocks_[i][i] = 1;
}

void Shadow::check_bounds(uint32_t address, int bytes, Where at) const {
  if (address % bytes != 0) {
    fail(at, "shared address %u is not a multiple of %d", address, bytes);
  }
  if (address + static_cast<size_t>(bytes) > bytes_) {
    fail(at, "shared address %u with %d bytes is out of bounds: the block has %zu", address, bytes,
         bytes_);
  }
}

bool Shadow::ordered(const Visit& before, int warp, Actor now) const {
  if (before.epoch == 0) return true;
  if (warp != now.warp) return before.epoch <= clocks_[now.warp][warp];
  // Within a warp and an epoch, only what one and the same lane did is ordered.
  const bool alone = before.lanes == now.lanes && (now.lanes & (now.lanes - 1)) == 0;
  return before.epoch < clocks_[warp][warp] || alone;
}

void Shadow::check_write(size_t piece, Actor actor, Where at) {
  const Piece& x = pieces_[piece];
  if (x.state == State::kInFlight) {
    fail(at, "shared address %zu is written while the cp.async of %s:%d is in flight",
         piece * kPiece, base_name(x.where.file), x.where.line);
  }
  if (!ordered(x.write, x.writer, actor)) {
    fail(at,
         "race: shared address %zu is written, and by warp %d in %s:%d, with no barrier between",
         piece * kPiece, x.writer, base_name(x.where.file), x.where.line);
  }
  for (int warp = 0; warp < warps_; ++warp) {
    if (!ordered(reads_[piece * warps_ + warp], warp, actor)) {
      fail(at, "race: shared address %zu is written and read by warp %d with no barrier between",
           piece * kPiece, warp);
    }
  }
}

void Shadow::touch(uint32_t address, int bytes, Access access, Actor actor, Where at) {
  check_bounds(address, bytes, at);
  const int epoch = clocks_[actor.warp][actor.warp];
  for (size_t i = address / kPiece; i < (address + bytes + kPiece - 1) / kPiece; ++i) {
    Piece& x = pieces_[i];
    if (access == Access::kWrite) {
      check_write(i, actor, at);
      x = {State::kValid, actor.warp, {epoch, actor.lanes}, at};
      continue;
    }
    if (x.state == State::kNothing) {
      fail(at, "poison: shared address %zu is read and was never written", i * kPiece);
    }
    if (x.state == State::kInFlight) {
      fail(at, "poison: shared address %zu is read before anyone waited for the cp.async of %s:%d",
           i * kPiece, base_name(x.where.file), x.where.line);
    }
    if (!ordered(x.write, x.writer, actor)) {
      fail(at, "race: shared address %zu is read and written by warp %d in %s:%d, with no barrier",
           i * kPiece, x.writer, base_name(x.where.file), x.where.line);
    }
    Visit& read = reads_[i * warps_ + actor.warp];
    read = {epoch, actor.lanes | (read.epoch == epoch ? read.lanes : 0)};
  }
}

void Shadow::copy_begins(uint32_t address, int bytes, int thread, Where at) {
  const Actor actor = {thread / kLanes, 1u << thread % kLanes};
  touch(address, bytes, Access::kWrite, actor, at);
  for (size_t i = address / kPiece; i < (address + bytes) / kPiece; ++i) {
    pieces_[i].state = State::kInFlight;
  }
}

void Shadow::copy_ends(uint32_t address, int bytes, int thread, Where at) {
  const int warp = thread / kLanes;
  for (size_t i = address / kPiece; i < (address + bytes) / kPiece; ++i) {
    pieces_[i] = {State::kValid, warp, {clocks_[warp][warp], 1u << thread % kLanes}, at};
  }
}

void Shadow::join(int warp, const std::vector<int>& clock) {
  for (int i = 0; i < warps_; ++i) clocks_[warp][i] = std::max(clocks_[warp][i], clock[i]);
}

void Shadow::meet(const std::vector<int>& warps) {
  std::vector<int> all(warps_);
  for (const int warp : warps) {
    for (int i = 0; i < warps_; ++i) all[i] = std::max(all[i], clocks_[warp][i]);
  }
  for (const int warp : warps) {
    join(warp, all);
    advance(warp);
  }
}

}  // namespace fastattn::emulation
