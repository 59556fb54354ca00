// Picks a tier's table, once, by what the processor and the system say they can do.
#include "kernels.h"

#include <cstring>

namespace fastattn {

namespace generic {
extern const CpuKernels kernels;
}
#ifdef FASTATTN_X86
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Tiers {
  const CpuKernels* known[8] = {};
  const CpuKernels* chosen = nullptr;

  Tiers() {
    int n = 0;
    known[n++] = &generic::kernels;
#ifdef FASTATTN_X86
    __builtin_cpu_init();
    // The compiler's runtime also asks the system whether it saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      known[n++] = &avx2::kernels;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        known[n++] = &avx512::kernels;
        if (__builtin_cpu_supports("avx512bf16")) known[n++] = &avx512_bf16::kernels;
      }
    }
#endif
    chosen = known[n - 1];
  }
};

Tiers& tiers() {
  static Tiers tiers;
  return tiers;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *tiers().chosen; }

const CpuKernels* const* cpu_tiers() { return tiers().known; }

bool choose_cpu_kernels(const char* isa) {
  for (const CpuKernels* const* tier = cpu_tiers(); *tier; ++tier) {
    if (std::strcmp((*tier)->isa, isa) == 0) {
      tiers().chosen = *tier;
      return true;
    }
  }
  return false;
}

}  // namespace fastattn
