// A small CUDA multiprocessor in software: runs a kernel's blocks on the host and finds what a
// device would not say. csrc/cuda/emulation/ptx_sm80.h is the instruction set on top of it; a
// kernel sees neither, since it includes ptx_sm80.cuh, which picks between this and the device.
//
// Threads are fibers (ucontext), taken in order and switched only where an instruction waits.
// Blocks run one after the other. What is reported, each with file, line, block and thread:
//   - shared and global accesses that are out of bounds or unaligned, and writes to what is only
//   read;
//   - reads of shared memory that nobody wrote, or whose cp.async was not waited for;
//   - races in shared memory: happens-before by vector clocks, for barriers and __syncwarp. A copy
//     counts as a write when it is issued and when it is waited for, since it may land in between;
//   - lanes of a warp that meet different instructions where all 32 must meet one;
//   - a deadlock, with who waits where.
// Bank conflicts are counted, not reported.
//
// Limits:
//   - no races in global memory, and nobody can wait for another block: a loop that does never
//   ends;
//   - races are seen in units of two bytes, so neighbouring one-byte accesses look like one;
//   - barriers and __syncwarp are taken by whole warps, instructions with .sync by all 32 lanes;
//   - bank conflicts of plain accesses are found by line and number of visit, which fits as long as
//     the lanes of a warp run through a loop equally often;
//   - a tensor's bounds are those of all its elements: what lies between rows passes;
//   - sums in mma.sync are rounded after each product; the order and truncation of a tensor core
//   are
//     not published. ex2 and lg2 lose their last two bits, as a device may.
//   - nothing is said of time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastattn::emulation {

constexpr int kLanes = 32;

// Where in a kernel something happens. As a default argument it names the caller.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// What a device would have done wrong, in words.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that a kernel may touch.
struct Range {
  std::string name;
  const void* begin;
  size_t bytes;
  bool writable;
};

struct Launch {
  int blocks, threads;
  size_t shared_bytes;
};

// What one launch did. Conflicts are cycles that a warp spends beyond those of no conflict.
struct Counters {
  int64_t mma = 0, ldmatrix = 0, cp_async = 0, barriers = 0;
  int64_t ldmatrix_conflicts = 0, shared_conflicts = 0;
};

// Runs the kernel, a call of its function with all arguments, once per thread. Throws Fault.
Counters run(const Launch& launch, const std::vector<Range>& ranges,
             const std::function<void()>& kernel);

// What instructions are made of. Only for the threads of a launch.
enum class Access { kRead, kWrite };
using Instruction = void (*)(void* const lanes[kLanes]);

int thread_id();
int block_id();
Counters& counters();
const char* base_name(const char* file);  // without its folders
[[noreturn]] void fail(Where at, const char* format, ...) __attribute__((format(printf, 2, 3)));
// Memory behind a shared address, after all checks. Bit l of `lanes`: lane l takes part.
char* shared(uint32_t address, int bytes, Access access, uint32_t lanes, Where at);
// The same for one lane's plain access, whose bank conflicts are counted.
char* shared_plain(uint32_t address, int bytes, Access access, Where at);
void check_global(const void* address, int bytes, Access access, Where at);
// Cycles lost when lanes touch these addresses at once, in phases of 128 bytes.
constexpr uint32_t kNoAddress = 0xffffffffu;
int conflicts(const std::vector<uint32_t>& addresses, int bytes);
// Waits for all lanes of the warp, then runs once on what each of them passed.
void converge(const char* name, void* arguments, Instruction run, Where at);
void sync_warp(Where at);
void barrier(int id, int threads, bool wait, Where at);
void copy_async(uint32_t to, const void* from, int bytes, Where at);
void copy_commit();
void copy_wait(int pending_groups);

}  // namespace fastattn::emulation
