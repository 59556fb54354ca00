// What instructions do to memory.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace fastattn::emulation {

namespace {

// Remembers a lane's access; what a warp's lanes do in one instruction is looked at at the end.
void note_access(uint32_t address, int bytes, Where at) {
  const int visit = machine->thread().visits[{at.file, at.line}]++;
  auto& seen = machine->accesses[{at.file, at.line, thread_id() / kLanes, visit}];
  seen.first = bytes;
  seen.second.resize(kLanes, kNoAddress);
  seen.second[thread_id() % kLanes] = address;
}

}  // namespace

char* shared(uint32_t address, int bytes, Access access, uint32_t lanes, Where at) {
  machine->shadow->touch(address, bytes, access, {thread_id() / kLanes, lanes}, at);
  return machine->shadow->data(address);
}

char* shared_plain(uint32_t address, int bytes, Access access, Where at) {
  note_access(address, bytes, at);
  return shared(address, bytes, access, 1u << thread_id() % kLanes, at);
}

void check_global(const void* address, int bytes, Access access, Where at) {
  const auto* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(at, "global address %p is not a multiple of %d", address, bytes);
  }
  for (const Range& range : *machine->ranges) {
    const auto* begin = static_cast<const char*>(range.begin);
    if (p < begin || p + bytes > begin + range.bytes) continue;
    if (access == Access::kWrite && !range.writable) {
      fail(at, "%s is written, and is an input", range.name.c_str());
    }
    return;
  }
  fail(at, "global address %p with %d bytes is out of bounds of every tensor", address, bytes);
}

int conflicts(const std::vector<uint32_t>& addresses, int bytes) {
  const size_t lanes = bytes <= 4 ? kLanes : kLanes * 4 / bytes;  // of a phase
  int lost = 0;
  for (size_t first = 0; first < addresses.size(); first += lanes) {
    std::vector<uint32_t> words;
    for (size_t i = first; i < std::min(first + lanes, addresses.size()); ++i) {
      if (addresses[i] == kNoAddress) continue;
      for (int byte = 0; byte < bytes; byte += 4) words.push_back((addresses[i] + byte) / 4);
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    int of_bank[32] = {};
    for (const uint32_t word : words) ++of_bank[word % 32];
    const int most = std::max(1, *std::max_element(of_bank, of_bank + 32));
    lost += most - 1;
  }
  return lost;
}

void copy_async(uint32_t to, const void* from, int bytes, Where at) {
  if (bytes < 0 || bytes > 16) fail(at, "cp.async reads 0 to 16 bytes, got %d", bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail(at, "cp.async from an unaligned address");
  if (bytes == 16) check_global(from, 16, Access::kRead, at);
  for (int i = 0; bytes < 16 && i < bytes; ++i) {
    check_global(static_cast<const char*>(from) + i, 1, Access::kRead, at);
  }
  machine->shadow->copy_begins(to, 16, thread_id(), at);
  note_access(to, 16, at);
  machine->thread().open.push_back({to, from, bytes, at});
  ++machine->counters.cp_async;
}

void copy_commit() {
  machine->thread().groups.push_back(std::move(machine->thread().open));
  machine->thread().open.clear();
}

void copy_wait(int pending_groups) {
  auto& groups = machine->thread().groups;
  while (groups.size() > static_cast<size_t>(pending_groups)) {
    for (const Copy& copy : groups.front()) {
      char* to = machine->shadow->data(copy.to);
      std::memset(to, 0, 16);
      if (copy.bytes) std::memcpy(to, copy.from, copy.bytes);
      machine->shadow->copy_ends(copy.to, 16, thread_id(), copy.at);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace fastattn::emulation
