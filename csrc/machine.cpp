// What this machine and this build can do: tiers, roofs, compiler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace fastattn {

namespace {

std::vector<std::string> isa_tiers() {
  std::vector<std::string> names;
  for (const CpuKernels* const* tier = cpu_tiers(); *tier; ++tier) names.push_back((*tier)->isa);
  return names;
}

void set_isa(const std::string& name) {
  if (choose_cpu_kernels(name.c_str())) return;
  std::string known;
  for (const std::string& tier : isa_tiers()) known += (known.empty() ? "" : ", ") + tier;
  throw py::value_error("FASTATTN_CPU_ISA: this machine has no tier '" + name + "'; it has " +
                        known);
}

// GFLOP/s of multiply-adds, all threads together; bf16 counts pairs where the tier multiplies them.
double fma_peak(bool bf16, int threads, double seconds) {
  const py::gil_scoped_release release;
  std::vector<double> rates(static_cast<size_t>(threads));
  parallel(threads, [&](int thread) {
    rates[static_cast<size_t>(thread)] = cpu_kernels().fma_peak(bf16, seconds);
  });
  double total = 0.0;
  for (const double rate : rates) total += rate;
  return total;
}

// GB/s of reading a buffer of so many megabytes in order, all threads together: the best pass.
double read_bandwidth(int64_t megabytes, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const py::gil_scoped_release release;
  const int64_t floats = megabytes * (1 << 20) / 4, share = floats / threads;
  Buffer buffer;
  float* data = buffer.floats(floats);
  std::atomic<float> sink{0.0f};
  parallel(threads, [&](int thread) {
    for (int64_t i = thread * share; i < (thread + 1) * share; ++i) data[i] = 1.0f;
  });
  double best = 0.0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    parallel(threads,
             [&](int thread) { sink.store(cpu_kernels().read_all(data + thread * share, share)); });
    const std::chrono::duration<double> took = Clock::now() - begin;
    best = std::max(best, double(share) * threads * 4 / took.count() * 1e-9);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

// Reads so many bytes from an address on, each thread its share: what a kernel that is bound by
// reading the same memory can be held against.
void read_pass(uintptr_t address, int64_t bytes, int threads) {
  const py::gil_scoped_release release;
  const float* data = reinterpret_cast<const float*>(address);
  const int64_t share = bytes / 4 / threads;
  std::atomic<float> sink{0.0f};
  parallel(threads,
           [&](int thread) { sink.store(cpu_kernels().read_all(data + thread * share, share)); });
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef __clang__
  info["compiler_name"] = "clang";
#else
  info["compiler_name"] = "gcc";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

void bind_machine(py::module_& m) {
  m.def("isa", [] { return cpu_kernels().isa; }, "The tier in use.");
  m.def("isa_tiers", &isa_tiers, "The tiers this machine runs, worst first.");
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("fma_peak", &fma_peak, py::arg("bf16"), py::arg("threads"), py::arg("seconds"));
  m.def("read_bandwidth", &read_bandwidth, py::arg("megabytes"), py::arg("threads"),
        py::arg("seconds"));
  m.def("read_pass", &read_pass, py::arg("address"), py::arg("bytes"), py::arg("threads"));
  m.def("build_info", &build_info);
}

}  // namespace fastattn
