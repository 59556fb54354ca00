// Fills a tier's table. Included by the isa_*.cpp units alone, once each.
#pragma once

#include "attention_bwd.inl.h"
#include "attention_cache.inl.h"
#include "attention_few.inl.h"
#include "attention_fwd.inl.h"
#include "kernels.h"
#include "norm.inl.h"
#include "product_few.inl.h"
#include "roof.inl.h"
#include "rotary.inl.h"

namespace fastattn::FASTATTN_ISA {

template <class T>
AttentionPlan attention_plan(const AttentionParams& p) {
  const Packing<T> size(p);
  AttentionPlan plan = {};
  plan.tile_rows = kMaxTileRows;
  plan.key_block = size.key_block;
  plan.packed_block = size.block();
  plan.scratch_row = kTileStride + size.v_columns + kWidth + 1;
  plan.scratch_fixed = larger(kMaxTileRows * kTileStride + 16, few_scratch<T>(p));
  const BwdSizes<T> bwd(p);
  plan.bwd_key_block = bwd.key_block;
  plan.bwd_row_block = bwd.row_block;
  plan.bwd_scratch = bwd.total();
  return plan;
}

template <class F>
constexpr void set_by_cache_type(F (&table)[kCacheTypes], F float32, F bfloat16, F float16,
                                 F int8) {
  table[static_cast<int>(Type::kFloat32)] = float32;
  table[static_cast<int>(Type::kBFloat16)] = bfloat16;
  table[static_cast<int>(Type::kFloat16)] = float16;
  table[static_cast<int>(Type::kInt8)] = int8;
}

template <class T>
constexpr AttentionKernels attention_kernels() {
  AttentionKernels k = {};
  k.plan = attention_plan<T>;
  k.pack = attention_pack<T>;
  k.fwd = attention_fwd<T>;
  k.fwd_few = attention_fwd_few<T>;
  k.merge = attention_merge<T>;
  k.bwd_begin = attention_bwd_begin<T>;
  k.bwd_rows = attention_bwd_rows<T>;
  k.bwd_end = attention_bwd_end<T>;
  k.bwd_delta = attention_bwd_delta<T>;
  k.bwd_sinks = attention_bwd_sinks<T>;
  k.bwd_key_bias = attention_bwd_key_bias<T>;
  k.bwd_store_dq = attention_bwd_store_dq<T>;
  set_by_cache_type(k.append, attention_append<T, float>, attention_append<T, BF16>,
                    attention_append<T, F16>, attention_append<T, int8_t>);
  k.rotate_q = attention_rotate_q<T>;
  return k;
}

template <class T>
constexpr ProductKernels product_kernels() {
  ProductKernels k = {};
  k.plan = product_plan<T>;
  k.pack_panels = product_pack_panels<T>;
  k.pack_tiles = product_pack_tiles<T>;
  k.run = product_run<T>;
  k.pack_few = product_pack_few<T>;
  k.run_few = product_run_few<T>;
  k.bwd_rows = product_bwd_rows<T>;
  k.add_sums = product_add_sums<T>;
  return k;
}

#define FASTATTN_TEXT_OF(x) #x
#define FASTATTN_TEXT(x) FASTATTN_TEXT_OF(x)
extern const CpuKernels kernels;
constexpr CpuKernels kernels_of_tier = {
    FASTATTN_TEXT(FASTATTN_ISA),
    {attention_kernels<float>(), attention_kernels<BF16>(), attention_kernels<F16>()},
    {product_kernels<float>(), product_kernels<BF16>(), product_kernels<F16>()},
    fma_peak,
    read_all,
    {norm_kernels<float>(), norm_kernels<BF16>(), norm_kernels<F16>()},
    {rotary_kernels<float>(), rotary_kernels<BF16>(), rotary_kernels<F16>()}};
const CpuKernels kernels = kernels_of_tier;

}  // namespace fastattn::FASTATTN_ISA
