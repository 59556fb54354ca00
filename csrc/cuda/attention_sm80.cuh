// Attention forward on mma.sync, ldmatrix and cp.async: sm_80 and later.
//
//   one block: kRows query rows of a head; one warp: kRowTiles times 16 of them
//   for each block of kKeys keys that a row of the block sees:
//     wait for its K and V, start the copies of the next ones
//     S = Q K^T            mma.sync; S [16, kKeys] per tile in registers
//     m, l, P              online softmax in units of log2, in place (softmax.cuh)
//     O += P V             P's accumulators are the A operands; O [16, D] per tile in registers
//
// K and V lie in a ring of kStages tiles each, with one barrier per block of keys. A barrier
// between waiting for a tile and reading it also says that everybody has read the tile before,
// whose place the next copy takes. Rows are turned around in Q's place at the end, so that they are
// written in chunks of 16 bytes; each warp uses its own rows there, which nobody else reads.
//
// D and Dv share a padded kD; what is beyond them is 0. Options other than window and sinks are
// compiled in by kOptions, and branches there that all lanes take alike.
#pragma once

#include "mask.cuh"
#include "tile_sm80.cuh"

namespace fastattn {

// One row of the tile table of attention.cu.
struct AttentionTile {
  int head_dim, warps, row_tiles, keys, stages;
};

template <class T, int kHeadDim, int kWarps, int kRowTilesOfWarp, int kKeysOfTile, int kRing,
          bool kWithOptions>
struct AttentionConfig {
  using Type = T;
  static constexpr int kD = kHeadDim, kThreads = 32 * kWarps, kRowTiles = kRowTilesOfWarp;
  static constexpr int kRows = 16 * kWarps * kRowTiles, kKeys = kKeysOfTile, kStages = kRing;
  static constexpr bool kOptions = kWithOptions;
  static constexpr uint32_t kKeyTile = 2 * kKeys * kD, kStage = 2 * kKeyTile;
  static constexpr uint32_t kQTile = 2 * kRows * kD;
  static constexpr size_t kSharedBytes = kQTile + kStages * kStage;
  static_assert(kKeys % 16 == 0 && kStages >= 2);
};

// What a block works on.
struct AttentionWork {
  Head at;
  int first_row, begin, end;  // rows from here, keys between these
  Rows q, k, v;
};

template <class C>
__device__ __forceinline__ AttentionWork attention_work(const AttentionParams& p, bool aligned) {
  const int seqlen_q = static_cast<int>(p.seqlen_q), nheads = static_cast<int>(p.nheads);
  const int blocks = (seqlen_q + C::kRows - 1) / C::kRows;
  AttentionWork w;
  w.at.h = ptx::block_id() / blocks % nheads;
  w.at.b = ptx::block_id() / blocks / nheads;
  // The last rows first: under causality they take longest.
  w.first_row = (blocks - 1 - ptx::block_id() % blocks) * C::kRows;
  const int last_row =
      w.first_row + C::kRows < seqlen_q ? w.first_row + C::kRows - 1 : seqlen_q - 1;
  w.begin = static_cast<int>(p.visible_begin(w.first_row)) / C::kKeys * C::kKeys;
  w.end = static_cast<int>(p.visible_end(last_row));
  const auto rows = [&](const Strided& x, int h, int64_t count, int64_t dim) {
    const auto* data =
        static_cast<const uint16_t*>(x.data) + w.at.b * x.stride[0] + h * x.stride[2];
    return Rows{data, x.stride[1], static_cast<int>(count), static_cast<int>(dim), aligned};
  };
  const int kv_head = w.at.h / static_cast<int>(p.groups());
  w.q = rows(p.q, w.at.h, p.seqlen_q, p.head_dim);
  w.k = rows(p.k, kv_head, p.seqlen_k, p.head_dim);
  w.v = rows(p.v, kv_head, p.seqlen_k, p.head_dim_v);
  return w;
}

// Starts the copies of block `index` of the keys, if there is one, as one group.
template <class C>
__device__ __forceinline__ void copy_keys(const AttentionWork& w, uint32_t ring, int index) {
  const int key = w.begin + index * C::kKeys;
  if (key < w.end) {
    const uint32_t stage = ring + static_cast<uint32_t>(index % C::kStages) * C::kStage;
    copy_rows<C::kKeys, C::kD, C::kThreads>(stage, w.k, key);
    copy_rows<C::kKeys, C::kD, C::kThreads>(stage + C::kKeyTile, w.v, key);
  }
  ptx::cp_async_commit();
}

// s = q k^T for the warp's rows.
template <class C>
__device__ __forceinline__ void scores(uint32_t q_tile, int row, uint32_t k_tile, int lane,
                                       float (&s)[C::kRowTiles][C::kKeys / 8][4]) {
  using Tile = Tile<C::kD>;
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) s[r][n][0] = s[r][n][1] = s[r][n][2] = s[r][n][3] = 0;
  }
#pragma unroll
  for (int d = 0; d < C::kD; d += 16) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) Tile::load_a(a[r], q_tile, row + 16 * r, d, lane);
#pragma unroll
    for (int n = 0; n < C::kKeys / 16; ++n) {
      uint32_t b[4];
      Tile::load_b(b, k_tile, 16 * n, d, lane);
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        ptx::mma_m16n8k16<typename C::Type>(s[r][2 * n], a[r], b[0], b[1]);
        ptx::mma_m16n8k16<typename C::Type>(s[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// out += weights v. Two accumulators side by side are one A operand.
template <class C>
__device__ __forceinline__ void add_values(const float (&s)[C::kRowTiles][C::kKeys / 8][4],
                                           uint32_t v_tile, int lane,
                                           float (&out)[C::kRowTiles][C::kD / 8][4]) {
  using T = typename C::Type;
#pragma unroll
  for (int n = 0; n < C::kKeys / 16; ++n) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&half)[4] = s[r][2 * n + j / 2];
        a[r][j] = ptx::pack<T>(half[j % 2 * 2], half[j % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < C::kD / 16; ++d) {
      uint32_t b[4];
      Tile<C::kD>::load_b_trans(b, v_tile, 16 * n, 16 * d, lane);
#pragma unroll
      for (int r = 0; r < C::kRowTiles; ++r) {
        ptx::mma_m16n8k16<T>(out[r][2 * d], a[r], b[0], b[1]);
        ptx::mma_m16n8k16<T>(out[r][2 * d + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// From q k^T to what softmax_step takes, for rows and keys from here.
template <class C>
__device__ __forceinline__ void finish_scores(const AttentionParams& p, const AttentionWork& w,
                                              int row, int key, int lane,
                                              float (&s)[C::kRowTiles][C::kKeys / 8][4]) {
  if constexpr (C::kOptions) {
    const float slope =
        p.alibi.data ? ptx::load_global(static_cast<const float*>(p.alibi.data) +
                                        w.at.b * p.alibi.stride[0] + w.at.h * p.alibi.stride[1])
                     : 0.0f;
#pragma unroll
    for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < C::kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = row + 16 * r + (lane >> 2) + 8 * (j / 2);
          const int at = key + 8 * n + 2 * (lane & 3) + j % 2;
          s[r][n][j] = finish_score<typename C::Type>(p, w.at, slope, i, at, s[r][n][j]);
        }
      }
    }
  }
  // Rows' windows move to the right: the last row's begins and the first row's ends the block's.
  const int last_row = w.first_row + C::kRows - 1;
  if (key < p.visible_begin(last_row) || key + C::kKeys > p.visible_end(w.first_row)) {
    mask_window(p, row, key, lane, s);
  }
}

template <class C>
__device__ __forceinline__ void drop_weights(const AttentionParams& p, const AttentionWork& w,
                                             int row, int key, int lane,
                                             float (&s)[C::kRowTiles][C::kKeys / 8][4]) {
  if (p.dropout_threshold == 0) return;
  const auto plane = static_cast<uint32_t>(p.first_plane + w.at.b * p.nheads + w.at.h);
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < C::kKeys / 8; ++n) drop(p, plane, row + 16 * r, key + 8 * n, lane, s[r][n]);
  }
}

// A head's sink in units of log2, -inf where there are no sinks.
template <class T>
__device__ __forceinline__ float sink_of(const AttentionParams& p, int h) {
  if (!p.sinks.data) return -kInfinity;
  const int64_t at = h * p.sinks.stride[0];
  if (p.sinks_type == Type::kFloat32) {
    return kLog2E * ptx::load_global(static_cast<const float*>(p.sinks.data) + at);
  }
  return kLog2E * ptx::widen<T>(ptx::load_global(static_cast<const uint16_t*>(p.sinks.data) + at));
}

// Ends the rows' sums: out is scaled, lse and its rest are written.
template <class C>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, const AttentionWork& w,
                                            int row, int lane, float scale,
                                            const RowState<C::kRowTiles>& state,
                                            float (&out)[C::kRowTiles][C::kD / 8][4]) {
  const float sink = sink_of<typename C::Type>(p, w.at.h);
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end = finish_row(state.m[r][half] * scale, quad_sum(state.l[r][half]), sink);
      const float factor = end.factor * p.dropout_scale;
#pragma unroll
      for (int d = 0; d < C::kD / 8; ++d) {
        out[r][d][2 * half] *= factor;
        out[r][d][2 * half + 1] *= factor;
      }
      const int i = row + 16 * r + (lane >> 2) + 8 * half;
      if (!p.lse || (lane & 3) != 0 || i >= p.seqlen_q) continue;
      const int64_t flat = (w.at.b * p.nheads + w.at.h) * p.lse_stride + i;
      const bool nothing = end.l == 0.0f;
      const double exact = static_cast<double>(end.m) + ptx::lg2(end.l);
      const float lse = nothing ? -kInfinity : static_cast<float>(exact * 0.69314718055994530942);
      ptx::store_global(p.lse + flat, lse);
      if (!p.lse_rest) continue;
      const double rest = nothing ? 0.0 : exact - lse * 1.44269504088896340736;
      ptx::store_global(p.lse_rest + flat, static_cast<float>(rest));
    }
  }
}

// Writes the warp's rows, by way of shared memory where chunks of 16 bytes can be stored.
template <class C>
__device__ __forceinline__ void store_rows(const AttentionParams& p, const AttentionWork& w,
                                           uint32_t tile, int local_row, int lane,
                                           const float (&out)[C::kRowTiles][C::kD / 8][4]) {
  using Tile = Tile<C::kD>;
  const int columns = static_cast<int>(p.head_dim_v);
  auto* to =
      static_cast<uint16_t*>(p.out.data) + w.at.b * p.out.stride[0] + w.at.h * p.out.stride[2];
  ptx::sync_warp();  // lanes have read each other's rows of q
#pragma unroll
  for (int r = 0; r < C::kRowTiles; ++r) {
#pragma unroll
    for (int d = 0; d < C::kD / 8; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = local_row + 16 * r + (lane >> 2) + 8 * half;
        const uint32_t pair =
            ptx::pack<typename C::Type>(out[r][d][2 * half], out[r][d][2 * half + 1]);
        ptx::store_shared(tile + Tile::at(row, d) + static_cast<uint32_t>(4 * (lane & 3)), pair);
      }
    }
  }
  ptx::sync_warp();
  for (int x = lane; x < 16 * C::kRowTiles * Tile::kChunks; x += 32) {
    const int row = local_row + x / Tile::kChunks, chunk = x % Tile::kChunks;
    const int i = w.first_row + row;
    if (i >= p.seqlen_q || 8 * chunk >= columns) continue;
    const auto values = ptx::load_shared<Chunk>(tile + Tile::at(row, chunk));
    uint16_t* at = to + i * p.out.stride[1] + 8 * chunk;
    if (w.q.aligned) {
      ptx::store_global(reinterpret_cast<Chunk*>(at), values);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto value = static_cast<uint16_t>(values.words[j / 2] >> 16 * (j % 2));
      if (8 * chunk + j < columns) ptx::store_global(at + j, value);
    }
  }
}

// aligned: rows of q, k, v and out begin at multiples of 16 bytes and are as long.
template <class C>
__global__ void __launch_bounds__(C::kThreads)
    attention_fwd_kernel(const __grid_constant__ AttentionParams p, const bool aligned) {
  const AttentionWork w = attention_work<C>(p, aligned);
  const int lane = ptx::thread_id() & 31;
  const int local_row = (ptx::thread_id() >> 5) * 16 * C::kRowTiles, row = w.first_row + local_row;
  const uint32_t q_tile = ptx::shared_base(), ring = q_tile + C::kQTile;
  const float scale = C::kOptions ? 1.0f : p.softmax_scale * kLog2E;

  float out[C::kRowTiles][C::kD / 8][4] = {};
  RowState<C::kRowTiles> state;
  state.init();
  if (w.begin < w.end) copy_rows<C::kRows, C::kD, C::kThreads>(q_tile, w.q, w.first_row);
#pragma unroll
  for (int i = 0; i + 1 < C::kStages; ++i) copy_keys<C>(w, ring, i);

  for (int index = 0, key = w.begin; key < w.end; ++index, key += C::kKeys) {
    ptx::cp_async_wait<C::kStages - 2>();
    ptx::sync_block(C::kThreads);
    copy_keys<C>(w, ring, index + C::kStages - 1);
    const uint32_t k_tile = ring + static_cast<uint32_t>(index % C::kStages) * C::kStage;
    float s[C::kRowTiles][C::kKeys / 8][4];
    scores<C>(q_tile, local_row, k_tile, lane, s);
    finish_scores<C>(p, w, row, key, lane, s);
    softmax_step(s, out, state, scale);
    if constexpr (C::kOptions) drop_weights<C>(p, w, row, key, lane, s);
    add_values<C>(s, k_tile + C::kKeyTile, lane, out);
  }
  finish_rows<C>(p, w, row, lane, scale, state, out);
  store_rows<C>(p, w, q_tile, local_row, lane, out);
}

}  // namespace fastattn
