// Cuts rotary into runs of tokens and runs them on threads.
#include "../rotary.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "streaming.h"

namespace fastattn {

namespace {

// Values that one thread turns before others are worth waking.
constexpr int64_t kSerialValues = 32768;
// Values of a task: fetching it costs nothing beside it.
constexpr int64_t kTaskValues = 16384;

}  // namespace

void rotary_cpu(const RotaryParams& p, int threads) {
  const int64_t tokens = p.batch * p.seqlen, token = p.nheads * p.head_dim;
  if (tokens == 0 || token == 0) return;
  const auto turn = cpu_kernels().rotary[static_cast<int>(p.type)].turn;
  // Halves are written side by side, each in runs of its own.
  const int64_t run = p.interleaved ? p.rotary_dim : p.rotary_dim / 2;
  const bool whole_lines = (p.head_dim - p.rotary_dim) * size_of(p.type) % kCacheLine == 0;
  const bool stream =
      whole_lines && should_stream(tokens * token * size_of(p.type), run * size_of(p.type), p.out);
  const int64_t block = std::max<int64_t>(1, kTaskValues / token);
  for_each(tokens * token < kSerialValues ? 1 : threads, (tokens + block - 1) / block,
           [&](int64_t t) {
             float* angles = scratch_buffer().floats(2 * p.rotary_dim);
             turn(p, stream, t * block, std::min((t + 1) * block, tokens), angles);
           });
}

}  // namespace fastattn
