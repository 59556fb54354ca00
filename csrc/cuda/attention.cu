// Which tile runs a call of attention, and its launch.
#include <stdexcept>

#include "../attention.h"
#include "attention_sm80.cuh"
#include "launch.h"

namespace fastattn {

namespace {

// By padded head dim: warps, tiles of 16 rows a warp, keys, stages. Each fits in 99 KB of shared
// memory, which every device since sm_80 has, and compiles without spills (docs/cuda.md).
constexpr AttentionTile kPlain[] = {
    {64, 4, 2, 64, 2},  {96, 4, 2, 64, 2},  {128, 8, 1, 64, 2},
    {192, 8, 1, 32, 2}, {256, 4, 1, 32, 2},
};
constexpr AttentionTile kWithOptions[] = {
    {64, 8, 1, 64, 2},  {96, 8, 1, 64, 2},  {128, 8, 1, 64, 2},
    {192, 8, 1, 32, 2}, {256, 4, 1, 32, 2},
};
constexpr int64_t kMaxLength =
    1 << 30;  // rows and keys are counted in int, and a tile beyond the end
constexpr int kTiles = sizeof(kPlain) / sizeof(kPlain[0]);

template <class T, bool kOptions, int kIndex>
struct Chosen {
  static constexpr AttentionTile kTile = kOptions ? kWithOptions[kIndex] : kPlain[kIndex];
  using Config = AttentionConfig<T, kTile.head_dim, kTile.warps, kTile.row_tiles, kTile.keys,
                                 kTile.stages, kOptions>;
};

bool is_aligned(const Strided& x, int64_t columns) {
  const bool strides = x.stride[0] % 8 == 0 && x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0;
  return strides && columns % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

template <class T, bool kOptions, int kIndex = 0>
void run(const AttentionParams& p, void* stream) {
  if constexpr (kIndex < kTiles) {
    using Config = typename Chosen<T, kOptions, kIndex>::Config;
    if (p.head_dim > Config::kD || p.head_dim_v > Config::kD) {
      return run<T, kOptions, kIndex + 1>(p, stream);
    }
    const bool aligned = is_aligned(p.q, p.head_dim) && is_aligned(p.k, p.head_dim) &&
                         is_aligned(p.v, p.head_dim_v) && is_aligned(p.out, p.head_dim_v);
    const int64_t blocks = (p.seqlen_q + Config::kRows - 1) / Config::kRows * p.nheads * p.batch;
    if (blocks > INT32_MAX) throw std::invalid_argument("B * H * Sq asks for 2^31 blocks or more");
    launch(attention_fwd_kernel<Config>, blocks, Config::kThreads, Config::kSharedBytes, stream, p,
           aligned);
  } else {
    throw std::invalid_argument("head dims go to 256");
  }
}

template <class T>
void run_type(const AttentionParams& p, void* stream) {
  // A scale of 0 would multiply the -inf of a masked score.
  const bool options = p.softcap > 0.0f || p.alibi.data || p.bias.data || p.mask.data ||
                       p.dropout_threshold != 0 || p.softmax_scale == 0.0f;
  if (options) {
    run<T, true>(p, stream);
  } else {
    run<T, false>(p, stream);
  }
}

}  // namespace

void attention_fwd_cuda(const AttentionParams& p, void* stream) {
  if (p.seqlen_q > kMaxLength || p.seqlen_k > kMaxLength) {
    throw std::invalid_argument("Sq and Sk go to 2^30");
  }
  if (p.type == Type::kBFloat16) return run_type<ptx::Bf16>(p, stream);
  if (p.type == Type::kFloat16) return run_type<ptx::Fp16>(p, stream);
  throw std::invalid_argument("q, k and v are bfloat16 or float16");
}

}  // namespace fastattn
