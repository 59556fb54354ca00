// A product of two matrices as a CUDA kernel, right and with one fault each, run by the emulator.
// Prints what the emulator says; `fault_kernels right` prints the counters.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/ptx_sm80.cuh"

using namespace fastattn;
using ptx::Bf16;

namespace {

const char* const kFaults[] = {
    "right",          "no_wait",         "no_barrier",    "copies_early",   "swapped_a",
    "swapped_b",      "not_transposed",  "out_of_shared", "out_of_global",  "unaligned",
    "unaligned_copy", "writes_input",    "unwritten",     "one_warp_waits", "lane_missing",
    "no_swizzle",     "no_warp_barrier", "other_barrier", "handover",       "arrives_early",
    "never_waits",    "waits_elsewhere"};
std::string fault;
bool has(const char* name) { return fault == name; }

constexpr int kK = 64, kSteps = 3, kThreads = 64;  // 2 warps with 16 rows each
constexpr int kATile = 32 * kK * 2, kStage = 2 * kATile;

// c [32, 32] = the sum over steps of a [steps, 32, K] b [steps, K, 32], b as [32, K] rows of its
// transpose where it is read without .trans.
struct Problem {
  const uint16_t *a, *b;
  float* c;
};

uint32_t place(int row, int chunk) {
  return static_cast<uint32_t>(row * kK * 2 + 16 * (has("no_swizzle") ? chunk : chunk ^ (row % 8)));
}

void load(const Problem& p, int step) {
  const uint32_t stage = static_cast<uint32_t>(step % 2 * kStage);
  for (int i = ptx::thread_id(); i < 32 * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int64_t from = (step * 32 + row) * kK + 8 * chunk;
    const int shift = has("unaligned_copy") ? 1 : 0;
    ptx::cp_async_16(stage + place(row, chunk), p.a + from + shift, 16);
    ptx::cp_async_16(stage + kATile + place(row, chunk), p.b + from, 16);
  }
}

void product_kernel(Problem p) {
  const int warp = ptx::thread_id() / 32, lane = ptx::thread_id() % 32;
  float c[4][4] = {};
  load(p, 0);
  ptx::cp_async_commit();
  for (int step = 0; step < kSteps; ++step) {
    if (!has("no_wait")) ptx::cp_async_wait<0>();
    if (has("one_warp_waits") && warp == 1 && step == 1) return;
    if (has("other_barrier")) ptx::barrier_sync(warp, kThreads);
    if (!has("no_barrier")) ptx::sync_block(kThreads);
    if (step + 1 < kSteps) load(p, step + 1);
    ptx::cp_async_commit();
    const uint32_t a_tile = static_cast<uint32_t>(step % 2 * kStage), b_tile = a_tile + kATile;
    for (int k = 0; k < kK / 16; ++k) {
      uint32_t a[4], b[2][4];
      ptx::ldmatrix_x4(a, a_tile + place(16 * warp + lane % 16, 2 * k + lane / 16));
      if (has("swapped_a")) std::swap(a[1], a[2]);
      for (int n = 0; n < 2; ++n) {
        const uint32_t at =
            b_tile + place(16 * n + lane % 8 + 8 * (lane / 16), 2 * k + lane / 8 % 2);
        if (has("not_transposed")) {
          ptx::ldmatrix_x4_trans(b[n], at);
        } else {
          ptx::ldmatrix_x4(b[n], at);
        }
        if (has("swapped_b")) std::swap(b[n][0], b[n][1]);
        if (has("lane_missing") && lane == 7) continue;
        ptx::mma_m16n8k16<Bf16>(c[2 * n], a, b[n][0], b[n][1]);
        ptx::mma_m16n8k16<Bf16>(c[2 * n + 1], a, b[n][2], b[n][3]);
      }
    }
    if (has("copies_early") && step == 0) {  // the next copies run into what others still read
      load(p, 0);
      ptx::cp_async_commit();
    }
  }
  if (has("out_of_shared")) ptx::store_shared<uint32_t>(2 * kStage, 0);
  if (has("unaligned")) ptx::store_shared<uint32_t>(2, 0);
  if (has("unwritten")) ptx::load_shared<uint32_t>(2 * kStage);
  if (has("writes_input")) ptx::store_global(const_cast<uint16_t*>(p.a), uint16_t{0});
  // Each warp turns its rows of c around in shared memory and writes whole rows.
  ptx::sync_block(kThreads);
  const uint32_t own = static_cast<uint32_t>(warp * 2048);
  for (int n = 0; n < 4; ++n) {
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + 8 * (j / 2), column = 8 * n + 2 * (lane % 4) + j % 2;
      ptx::store_shared(own + static_cast<uint32_t>(4 * (row * 32 + column)), c[n][j]);
    }
  }
  if (!has("no_warp_barrier")) ptx::sync_warp();
  const int rows = has("out_of_global") ? 17 : 16;
  for (int row = 0; row < 16; ++row) {
    const auto x = ptx::load_shared<float>(own + static_cast<uint32_t>(4 * (row * 32 + lane)));
    ptx::store_global(p.c + (16 * warp + row + rows - 16) * 32 + lane, x);
  }
}

// Warp 0 hands a word to warp 1: it arrives at a barrier that the other one waits at.
void handover_kernel() {
  const auto at = static_cast<uint32_t>(4 * (ptx::thread_id() % 32));
  if (ptx::thread_id() < 32) {
    if (!has("arrives_early")) ptx::store_shared(at, 1.0f);
    ptx::barrier_arrive(3, kThreads);
    if (has("arrives_early")) ptx::store_shared(at, 1.0f);
  } else {
    if (!has("never_waits")) ptx::barrier_sync(has("waits_elsewhere") ? 4 : 3, kThreads);
    ptx::load_shared<float>(at);
  }
}

int run_handover() {
  try {
    const auto counters = emulation::run({2, kThreads, 128}, {}, handover_kernel);
    std::printf("right: barriers %ld\n", static_cast<long>(counters.barriers));
  } catch (const emulation::Fault& problem) {
    std::printf("fault: %s\n", problem.what());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    for (const char* name : kFaults) std::puts(name);
    return 0;
  }
  fault = argv[1];
  for (const char* name : {"handover", "arrives_early", "never_waits", "waits_elsewhere"}) {
    if (has(name)) return run_handover();
  }
  std::mt19937 random;
  std::vector<uint16_t> a(kSteps * 32 * kK + 8), b(a.size());  // one copy may start late
  for (auto* x : {&a, &b}) {
    for (uint16_t& value : *x) value = Bf16::round(static_cast<float>(random() % 17) - 8.0f);
  }
  std::vector<float> c(32 * 32);
  const size_t bytes = a.size() * 2;
  const std::vector<emulation::Range> ranges = {
      {"a", a.data(), bytes, false}, {"b", b.data(), bytes, false}, {"c", c.data(), 4096, true}};
  const size_t shared_bytes = 2 * kStage + (has("unwritten") ? 256 : 0);
  emulation::Counters counters;
  try {
    counters = emulation::run({1, kThreads, shared_bytes}, ranges,
                              [&] { product_kernel({a.data(), b.data(), c.data()}); });
  } catch (const emulation::Fault& problem) {
    std::printf("fault: %s\n", problem.what());
    return 0;
  }
  for (int i = 0; i < 32 * 32; ++i) {
    float sum = 0.0f;
    for (int step = 0; step < kSteps; ++step) {
      for (int k = 0; k < kK; ++k) {
        sum += Bf16::widen(a[(step * 32 + i / 32) * kK + k]) *
               Bf16::widen(b[(step * 32 + i % 32) * kK + k]);
      }
    }
    if (sum != c[i]) {
      std::printf("wrong: c[%d, %d] is %g, not %g\n", i / 32, i % 32, c[i], sum);
      return 0;
    }
  }
  std::printf("right: mma %ld, ldmatrix %ld, cp.async %ld, ldmatrix conflicts %ld\n",
              static_cast<long>(counters.mma), static_cast<long>(counters.ldmatrix),
              static_cast<long>(counters.cp_async), static_cast<long>(counters.ldmatrix_conflicts));
}
