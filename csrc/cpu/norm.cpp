// Cuts the norms into blocks of rows and runs them on threads. Which rows a block has depends on
// the call's sizes alone, and blocks are added in their order: dweight and dbias have the same bits
// for any number of threads.
#include "../norm.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "streaming.h"

namespace fastattn {

namespace {

// Values that one thread passes over before others are worth waking.
constexpr int64_t kSerialValues = 32768;
// Values of a forward task: fetching it costs nothing beside it.
constexpr int64_t kTaskValues = 16384;
// Rows of a backward task at least, and tasks at most: each has sums of its own, as long as a row.
constexpr int64_t kBlockRows = 16;
constexpr int64_t kBlocks = 128;
// Columns of dweight and dbias that are added up together.
constexpr int64_t kColumns = 512;

thread_local Buffer shared_buffer;  // the caller's, seen by all workers of a call

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

const NormKernels& kernels_of(const NormParams& p) {
  return cpu_kernels().norm[static_cast<int>(p.type)];
}

int threads_for(const NormParams& p, int threads) {
  return p.rows * p.columns < kSerialValues ? 1 : threads;
}

// Weight and bias as floats: what the call gives, or a copy in room for 2 [N].
NormScale scale_of(const NormParams& p, float* room) {
  NormScale scale = {static_cast<const float*>(p.weight), static_cast<const float*>(p.bias)};
  float* bias = room + p.columns;
  const NormKernels& kernels = kernels_of(p);
  if (!p.weight) {
    std::fill_n(room, p.columns, 1.0f);
    scale.weight = room;
  } else if (p.weight_type != Type::kFloat32 || p.weight_offset != 0.0f) {
    kernels.load_parameter(p.weight, p.weight_type, p.columns, p.weight_offset, room);
    scale.weight = room;
  }
  if (!p.bias) {
    std::fill_n(bias, p.columns, 0.0f);
    scale.bias = bias;
  } else if (p.bias_type != Type::kFloat32) {
    kernels.load_parameter(p.bias, p.bias_type, p.columns, 0.0f, bias);
    scale.bias = bias;
  }
  return scale;
}

// Adds up what the blocks have collected: [blocks, dweight and dbias, N].
void store_gradients(const NormParams& p, NormSums of, int threads) {
  const auto store = kernels_of(p).store_gradient;
  for_each(of.blocks > 1 ? threads : 1, pieces(p.columns, kColumns), [&](int64_t t) {
    const int64_t begin = t * kColumns, end = std::min(begin + kColumns, p.columns);
    NormSums bias = of;
    bias.sums += p.columns;
    if (p.dweight) store(p.weight_type, of, begin, end, p.dweight);
    if (p.dbias) store(p.bias_type, bias, begin, end, p.dbias);
  });
}

}  // namespace

void norm_fwd_cpu(const NormParams& p, int threads) {
  const NormKernels& kernels = kernels_of(p);
  const NormScale scale = scale_of(p, shared_buffer.floats(2 * p.columns));
  const int64_t row_bytes = p.columns * size_of(p.type);
  const int64_t bytes = p.rows * row_bytes * (p.total ? 2 : 1);
  const bool stream = should_stream(bytes, row_bytes, p.out, p.total);
  const int64_t block = std::max<int64_t>(1, kTaskValues / p.columns);
  for_each(threads_for(p, threads), pieces(p.rows, block), [&](int64_t t) {
    float* row = scratch_buffer().floats(p.columns);
    kernels.fwd(p, scale, stream, t * block, std::min((t + 1) * block, p.rows), row);
  });
  shared_buffer.trim(kKeptBytes);
}

void norm_bwd_cpu(const NormParams& p, int threads) {
  const NormKernels& kernels = kernels_of(p);
  const int64_t row_bytes = p.columns * size_of(p.type);
  const bool stream = should_stream(p.rows * row_bytes, row_bytes, p.dx);
  const int64_t block = std::max(kBlockRows, pieces(p.rows, kBlocks));
  const int64_t blocks = pieces(p.rows, block), step = p.columns * (p.centered ? 2 : 1);
  const bool wants_sums = p.dweight || p.dbias;
  float* sums = shared_buffer.floats(2 * p.columns + (wants_sums ? blocks * step : 0));
  const NormScale scale = scale_of(p, sums);
  sums += 2 * p.columns;
  threads = threads_for(p, threads);
  for_each(threads, blocks, [&](int64_t t) {
    kernels.bwd(p, scale, stream, t * block, std::min((t + 1) * block, p.rows),
                wants_sums ? sums + t * step : nullptr);
  });
  if (wants_sums) store_gradients(p, {sums, blocks, step}, threads);
  shared_buffer.trim(kKeptBytes);
}

}  // namespace fastattn
