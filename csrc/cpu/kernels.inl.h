// Fills a tier's table. Included by the isa_*.cpp units alone, once each.
#pragma once

#include "attention_bwd.inl.h"
#include "attention_few.inl.h"
#include "attention_fwd.inl.h"
#include "kernels.h"
#include "roof.inl.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
AttentionPlan attention_plan(const AttentionParams& p) {
  const Packing<T> size(p);
  AttentionPlan plan = {};
  plan.tile_rows = kMaxTileRows;
  plan.key_block = size.key_block;
  plan.packed_block = size.block();
  plan.scratch_row = kTileStride + size.v_columns + kWidth + 1;
  plan.scratch_fixed = larger(kMaxTileRows * kTileStride + 16,
                              kFewRows * (kTileStride + kWidth + p.head_dim_v + 4 * kWidth) + 16);
  const BwdSizes<T> bwd(p);
  plan.bwd_key_block = bwd.key_block;
  plan.bwd_row_block = bwd.row_block;
  plan.bwd_scratch = bwd.total();
  return plan;
}

template <class T>
constexpr AttentionKernels attention_kernels() {
  return {attention_plan<T>,      attention_pack<T>,         attention_fwd<T>,
          attention_fwd_few<T>,   attention_merge<T>,        attention_bwd_delta<T>,
          attention_bwd_begin<T>, attention_bwd_rows<T>,     attention_bwd_end<T>,
          attention_bwd_sinks<T>, attention_bwd_key_bias<T>, attention_bwd_store_dq<T>};
}

#define FASTATTN_TEXT_OF(x) #x
#define FASTATTN_TEXT(x) FASTATTN_TEXT_OF(x)
extern const CpuKernels kernels;
constexpr CpuKernels kernels_of_tier = {
    FASTATTN_TEXT(FASTATTN_ISA),
    {attention_kernels<float>(), attention_kernels<BF16>(), attention_kernels<F16>()},
    fma_peak,
    read_all};
const CpuKernels kernels = kernels_of_tier;

}  // namespace fastattn::FASTATTN_ISA
