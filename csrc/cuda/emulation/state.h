// The state of a launch, shared by machine.cpp and memory.cpp.
#pragma once

#include <ucontext.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"
#include "shadow.h"

namespace fastattn::emulation {

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
  Where at;
};

struct Thread {
  ucontext_t context;
  bool done = false, waits = false;
  std::string reason;  // what it waits for
  Where at = {"", 0};
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::map<std::pair<const char*, int>, int> visits;  // of each plain access
};

struct Converging {
  const char* name = nullptr;
  Where at = {"", 0};
  int arrived = 0;
  void* arguments[kLanes] = {};
};

struct Barrier {
  int threads = 0, arrived = 0;
  std::vector<int> waiting;
  std::set<int> warps_waiting;
  std::vector<int> clock;  // of all that arrived, when they did
};

// One launch, of which one block is alive at a time.
struct Machine {
  Launch launch;
  const std::vector<Range>* ranges;
  const std::function<void()>* kernel;
  Counters counters;

  int block = 0, current = 0;
  ucontext_t scheduler;
  std::string failure;
  std::unique_ptr<Shadow> shadow;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Converging> warps;
  std::map<int, Barrier> barriers;
  // Plain accesses by line, warp and number of visit.
  std::map<std::tuple<const char*, int, int, int>, std::pair<int, std::vector<uint32_t>>> accesses;

  Thread& thread() { return *threads[current]; }
};

extern thread_local Machine* machine;

}  // namespace fastattn::emulation
