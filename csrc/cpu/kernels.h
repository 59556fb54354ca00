// What a tier of the CPU core offers: one table of functions per ISA, filled in kernels.inl.h.
#pragma once

#include "../attention.h"
#include "../norm.h"
#include "../rotary.h"

namespace fastattn {

// Query rows [row_begin, row_end) of one KV head against keys [key_begin, key_end). A row is a
// query of one head: row = i * groups + g is query i of head hk * groups + g, so that the heads
// that share a KV head stand together and causality stays a staircase.
struct AttentionTask {
  int64_t hk;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  float* partial;  // [rows, 2 + Dv]: row maximum, row sum, unscaled output; null: write out and lse
};

// Sizes of one call: rows and keys are counted, buffers are in floats.
struct AttentionPlan {
  int64_t tile_rows;      // rows of a register tile
  int64_t key_block;      // keys that are packed and worked on together
  int64_t packed_block;   // packed K and V of one block
  int64_t scratch_row;    // forward scratch, per row of a task
  int64_t scratch_fixed;  // forward scratch, beside the rows
  int64_t bwd_key_block;  // keys of one backward task
  int64_t bwd_row_block;  // rows that a backward task works on together
  int64_t bwd_scratch;
};

// All but plan and those after bwd_end get the call of one sequence (AttentionParams::sequence).
struct AttentionKernels {
  AttentionPlan (*plan)(const AttentionParams&);
  // Packs keys [key_begin, key_end) of a head; key_begin is a multiple of the key block.
  void (*pack)(const AttentionParams&, int64_t hk, int64_t key_begin, int64_t key_end,
               float* packed);
  // `packed` holds the blocks from key block `packed_from` on.
  void (*fwd)(const AttentionParams&, const AttentionTask&, const float* packed,
              int64_t packed_from, float* scratch);
  // The same for few rows, straight from k and v.
  void (*fwd_few)(const AttentionParams&, const AttentionTask&, float* scratch);
  // Joins the partial results of one KV head, [splits, rows, 2 + Dv].
  void (*merge)(const AttentionParams&, int64_t hk, int64_t splits, float* partial);
  // One block of keys: begin, then its blocks of rows in order, then end.
  void (*bwd_begin)(const AttentionParams&, int64_t hk, int64_t key_begin, float* scratch);
  void (*bwd_rows)(const AttentionParams&, int64_t hk, int64_t key_begin, int64_t row_begin,
                   int64_t row_end, float* scratch);
  void (*bwd_end)(const AttentionParams&, int64_t hk, int64_t key_begin, float* scratch);
  void (*bwd_delta)(const AttentionParams&, int64_t b, int64_t h);
  // The gradient of one head's sink, over the batch.
  void (*bwd_sinks)(const AttentionParams&, int64_t h);
  // The gradient of a bias that all keys share.
  void (*bwd_key_bias)(const AttentionParams&);
  // dq of one query's heads from dq_sum.
  void (*bwd_store_dq)(const AttentionParams&, int64_t b, int64_t i);
  // Token i of sequence b, whose call this is: rotated and written to where the cache keeps it, by
  // the cache's type.
  void (*append[kCacheTypes])(const AttentionParams&, const CacheUpdate&, int64_t b, int64_t i);
  // Query i of sequence b, rotated, into row by row [B, Sq, H, D].
  void (*rotate_q)(const AttentionParams&, const CacheUpdate&, int64_t b, int64_t i, void* q);
};

// What rows are multiplied by and what is added: [N] each.
struct NormScale {
  const float *weight, *bias;
};

// Sums [N] of blocks of rows, `step` floats apart.
struct NormSums {
  const float* sums;
  int64_t blocks, step;
};

struct NormKernels {
  // A weight or bias [N] as floats, plus an offset.
  void (*load_parameter)(const void* from, Type type, int64_t n, float offset, float* to);
  // Rows [begin, end); scratch holds a row. `stream`: past the caches.
  void (*fwd)(const NormParams&, const NormScale&, bool stream, int64_t begin, int64_t end,
              float* scratch);
  // Rows [begin, end). Their share of dweight and, in layer_norm, dbias goes to sums, unless null.
  void (*bwd)(const NormParams&, const NormScale&, bool stream, int64_t begin, int64_t end,
              float* sums);
  // Columns [begin, end) of dweight or dbias, in its type.
  void (*store_gradient)(Type type, const NormSums&, int64_t begin, int64_t end, void* gradient);
};

struct RotaryKernels {
  // Tokens [begin, end) of [B, S]; scratch holds 2 * rotary_dim floats. `stream`: past the caches.
  void (*turn)(const RotaryParams&, bool stream, int64_t begin, int64_t end, float* scratch);
};

struct CpuKernels {
  const char* isa;
  AttentionKernels attention[kTypes];
  double (*fma_peak)(bool bf16, double seconds);  // GFLOP/s of the calling thread
  float (*read_all)(const float* p, int64_t n);   // their sum, at full speed
  NormKernels norm[kTypes];
  RotaryKernels rotary[kTypes];
};

// The most query rows of one KV head that fwd_few takes.
constexpr int64_t kFewRows = 8;

// The table in use: the best tier of this machine, or the one chosen by name.
const CpuKernels& cpu_kernels();
// False where this machine has no such tier.
bool choose_cpu_kernels(const char* isa);
// The tiers that are built and that this machine runs, worst first; ends with null.
const CpuKernels* const* cpu_tiers();

}  // namespace fastattn
