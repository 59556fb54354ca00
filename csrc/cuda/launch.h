// How kernels are started: on a stream of a device or, compiled by another compiler than nvcc, by
// the emulator, whose Session then stands where the stream would.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#else
#include <vector>

#include "emulation/machine.h"
#endif

#include <cstddef>
#include <cstdint>

namespace fastattn {

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fastattn: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, size_t shared_bytes,
            void* stream, Arguments... arguments) {
  if (blocks == 0) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes)),
             "this device lacks the shared memory of a kernel");
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), "a kernel was not launched");
}

#else

namespace emulation {
struct Session {
  std::vector<Range> ranges;
  Counters counters;
};
}  // namespace emulation

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, size_t shared_bytes,
            void* stream, Arguments... arguments) {
  auto* session = static_cast<emulation::Session*>(stream);
  session->counters = emulation::run({static_cast<int>(blocks), threads, shared_bytes},
                                     session->ranges, [&] { kernel(arguments...); });
}

#endif

}  // namespace fastattn
