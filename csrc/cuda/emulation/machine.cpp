#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace fastattn::emulation {

thread_local Machine* machine = nullptr;

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

namespace {

constexpr size_t kStack = 1 << 18;

void wait(std::string reason, Where at) {
  Thread& self = machine->thread();
  self.waits = true;
  self.reason = std::move(reason);
  self.at = at;
  swapcontext(&self.context, &machine->scheduler);
}

void wake(int thread) { machine->threads[thread]->waits = false; }

void fiber() {
  (*machine->kernel)();
  machine->thread().done = true;
  setcontext(&machine->scheduler);
}

// "threads 0 to 31: wait at ...", for neighbours that wait for the same.
std::string who_waits() {
  std::string text;
  const int count = machine->launch.threads;
  const auto state = [](int i) {
    const Thread& x = *machine->threads[i];
    if (x.done) return std::string("have finished");
    return "wait for " + x.reason + " (" + base_name(x.at.file) + ":" + std::to_string(x.at.line) +
           ")";
  };
  for (int first = 0; first < count;) {
    int last = first;
    while (last + 1 < count && state(last + 1) == state(first)) ++last;
    text +=
        "; threads " + std::to_string(first) + " to " + std::to_string(last) + " " + state(first);
    first = last + 1;
  }
  return text;
}

void start_block(std::vector<std::vector<char>>& stacks) {
  Machine& m = *machine;
  m.shadow = std::make_unique<Shadow>(m.launch.shared_bytes, m.launch.threads / kLanes);
  m.warps.assign(m.launch.threads / kLanes, Converging());
  m.barriers.clear();
  m.accesses.clear();
  m.threads.clear();
  for (int i = 0; i < m.launch.threads; ++i) {
    m.threads.push_back(std::make_unique<Thread>());
    ucontext_t& context = m.threads.back()->context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = stacks[i].size();
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
  }
}

void run_block() {
  Machine& m = *machine;
  for (bool all_done = false; !all_done;) {
    bool progress = false;
    all_done = true;
    for (m.current = 0; m.current < m.launch.threads; ++m.current) {
      Thread& thread = m.thread();
      all_done = all_done && thread.done;
      if (thread.done || thread.waits) continue;
      progress = true;
      swapcontext(&m.scheduler, &thread.context);
      if (!m.failure.empty()) throw Fault(m.failure);
    }
    if (!progress && !all_done) {
      throw Fault("deadlock in block " + std::to_string(m.block) + who_waits());
    }
  }
  for (const auto& [key, access] : m.accesses) {
    m.counters.shared_conflicts += conflicts(access.second, access.first);
  }
}

// Counts so many threads of the current warp; if they are the last, all that wait go on. Whether
// so.
bool arrive(Barrier& x, int threads) {
  const std::vector<int> its = machine->shadow->clock(thread_id() / kLanes);
  x.clock.resize(its.size());
  for (size_t i = 0; i < its.size(); ++i) x.clock[i] = std::max(x.clock[i], its[i]);
  x.arrived += threads;
  if (x.arrived < x.threads) return false;
  ++machine->counters.barriers;
  for (const int warp : x.warps_waiting) {
    machine->shadow->join(warp, x.clock);
    machine->shadow->advance(warp);
  }
  for (const int thread : x.waiting) wake(thread);
  x = Barrier();
  return true;
}

}  // namespace

Counters run(const Launch& launch, const std::vector<Range>& ranges,
             const std::function<void()>& kernel) {
  if (launch.threads % kLanes != 0 || launch.threads < kLanes || launch.threads > 1024) {
    throw Fault("a block has whole warps, at most 1024 threads");
  }
  if (launch.shared_bytes > 227 * 1024) throw Fault("no device has that much shared memory");
  Machine m = {};
  m.launch = launch;
  m.ranges = &ranges;
  m.kernel = &kernel;
  machine = &m;
  std::vector<std::vector<char>> stacks(launch.threads, std::vector<char>(kStack));
  try {
    for (m.block = 0; m.block < launch.blocks; ++m.block) {
      start_block(stacks);
      run_block();
    }
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
  return m.counters;
}

int thread_id() { return machine->current; }
int block_id() { return machine->block; }
Counters& counters() { return machine->counters; }

void fail(Where at, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine->failure = std::string(base_name(at.file)) + ":" + std::to_string(at.line) + ": block " +
                     std::to_string(machine->block) + ", thread " +
                     std::to_string(machine->current) + ": " + text;
  setcontext(&machine->scheduler);
  std::abort();  // setcontext does not return
}

void converge(const char* name, void* arguments, Instruction run, Where at) {
  Converging& warp = machine->warps[machine->current / kLanes];
  if (warp.arrived > 0 && (std::strcmp(warp.name, name) != 0 || warp.at.line != at.line)) {
    fail(at, "lanes diverge: this one is at %s, others of the warp at %s (%s:%d)", name, warp.name,
         base_name(warp.at.file), warp.at.line);
  }
  warp.name = name;
  warp.at = at;
  warp.arguments[machine->current % kLanes] = arguments;
  if (++warp.arrived < kLanes) return wait(std::string("all lanes at ") + name, at);
  warp.arrived = 0;
  run(warp.arguments);
  const int first = machine->current / kLanes * kLanes;
  for (int i = first; i < first + kLanes; ++i) wake(i);
}

void sync_warp(Where at) {
  converge(
      "__syncwarp", nullptr, [](void* const*) { machine->shadow->meet({thread_id() / kLanes}); },
      at);
}

void barrier(int id, int threads, bool waits, Where at) {
  if (id < 0 || id > 15) fail(at, "there are barriers 0 to 15, got %d", id);
  if (threads % kLanes != 0 || threads > machine->launch.threads) {
    fail(at, "barrier %d for %d threads, in a block of %d", id, threads, machine->launch.threads);
  }
  Barrier& x = machine->barriers[id];
  if (x.arrived > 0 && x.threads != threads) {
    fail(at, "barrier %d for %d threads, and for %d elsewhere", id, threads, x.threads);
  }
  x.threads = threads;
  if (!waits) {  // a warp goes on as one, so what it does from now on is not handed over
    converge(
        "bar.arrive", &x,
        [](void* const* lanes) {
          arrive(*static_cast<Barrier*>(lanes[0]), kLanes);
          machine->shadow->advance(thread_id() / kLanes);
        },
        at);
    return;
  }
  x.warps_waiting.insert(thread_id() / kLanes);
  x.waiting.push_back(thread_id());
  if (!arrive(x, 1)) wait("barrier " + std::to_string(id), at);
}

}  // namespace fastattn::emulation
