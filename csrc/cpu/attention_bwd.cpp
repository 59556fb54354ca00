// Cuts attention backward into tasks, one a block of keys of a head, and runs them on threads. Sums
// that several tasks add to take them in the order of the tasks, so their bits do not depend on
// threads.
#include <algorithm>
#include <memory>
#include <vector>

#include "../attention.h"
#include "attention_sequences.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {

namespace {

constexpr int64_t kDone = INT64_MAX;

// A bias that several heads or sequences share has one gradient, which they add to in order: the KV
// head of a dense batch that comes before this one, or -1.
int64_t head_before_in_bias(const AttentionParams& p, int64_t head) {
  const int64_t b = head / p.nheads_k, hk = head % p.nheads_k;
  if (!p.dbias.data) return -1;
  if (p.dbias.stride[1] == 0 && hk > 0) return head - 1;
  if (p.dbias.stride[0] == 0 && b > 0) return head - (p.dbias.stride[1] == 0 ? 1 : p.nheads_k);
  return -1;
}

// Where a bias is shared by all queries, every row of a task adds to the same few numbers: they are
// summed on the side, [heads of a KV head, keys of a block], and join the others once, in order.
struct BiasSums {
  float* sums;
  int64_t keys, head_stride;

  // p and the sums are those of one sequence.
  AttentionParams redirect(AttentionParams p, int64_t hk, int64_t key_begin) {
    std::fill(sums, sums + p.groups() * keys, 0.0f);
    head_stride = p.dbias.stride[1] ? keys : 0;
    // The kernel counts heads and keys from 0.
    const int64_t before = hk * p.groups() * head_stride + key_begin;
    p.dbias.data = reinterpret_cast<void*>(reinterpret_cast<intptr_t>(sums) - before * 4);
    p.dbias.stride[1] = head_stride;
    return p;
  }

  void add_to(const AttentionParams& p, int64_t hk, int64_t key_begin, int64_t n) const {
    for (int64_t h = 0; h < (head_stride ? p.groups() : 1); ++h) {
      float* to =
          static_cast<float*>(p.dbias.data) + (hk * p.groups() + h) * p.dbias.stride[1] + key_begin;
      for (int64_t c = 0; c < n; ++c) to[c] += sums[h * head_stride + c];
    }
  }
};

// One block of keys of one KV head, its rows in blocks. p is the call of the head's sequence.
void bwd_keys(const AttentionParams& p, const AttentionKernels& kernels, const AttentionPlan& plan,
              int64_t hk, int64_t key_begin, const Counter* dq_before, const Counter* bias_before,
              Counter* progress, float* scratch) {
  const int64_t key_end = std::min(key_begin + plan.bwd_key_block, p.seqlen_k);
  BiasSums bias = {scratch + plan.bwd_scratch, plan.bwd_key_block, 0};
  const bool aside = p.dbias.data && p.dbias.stride[2] == 0;
  const AttentionParams mine = aside ? bias.redirect(p, hk, key_begin) : p;

  // Where a block of rows ends within a query's heads, the next block adds to that query's bias
  // too.
  const int64_t bias_blocks = p.groups() && plan.bwd_row_block % p.groups() ? 2 : 1;

  kernels.bwd_begin(p, hk, key_begin, scratch);
  for (int64_t row = 0, block = 0; row < p.rows(); row += plan.bwd_row_block, ++block) {
    const int64_t row_end = std::min(row + plan.bwd_row_block, p.rows());
    if (p.visible_end((row_end - 1) / p.groups()) <= key_begin) continue;
    if (p.visible_begin(row / p.groups()) >= key_end) break;
    if (dq_before) wait_for(*dq_before, block + 1);
    if (bias_before && !aside) wait_for(*bias_before, block + bias_blocks);
    kernels.bwd_rows(mine, hk, key_begin, row, row_end, scratch);
    progress->store(block + 1, std::memory_order_release);
  }
  kernels.bwd_end(p, hk, key_begin, scratch);
  if (bias_before) wait_for(*bias_before, kDone);
  if (aside) bias.add_to(p, hk, key_begin, key_end - key_begin);
  progress->store(kDone, std::memory_order_release);
}

// The tasks of a call: for each block of keys, all heads that have it. So the task before in the
// same head is long past; it must be handed out earlier in any case, or waiting could not end.
struct KeyTasks {
  std::vector<SequenceGroup> groups;  // most keys first; first_task: the heads of those before
  std::vector<int64_t> first;         // task of each block's number; at the end, how many

  KeyTasks(std::vector<SequenceGroup> found, int64_t key_block) : groups(std::move(found)) {
    std::stable_sort(groups.begin(), groups.end(),
                     [](const auto& a, const auto& b) { return a.seqlen_k > b.seqlen_k; });
    int64_t all = 0;
    for (SequenceGroup& g : groups) {
      g.first_task = all;
      all += g.heads;
    }
    first.push_back(0);
    for (int64_t key = 0; !groups.empty() && key < groups[0].seqlen_k; key += key_block) {
      int64_t alive = 0;
      for (const SequenceGroup& g : groups) alive += key < g.seqlen_k ? g.heads : 0;
      first.push_back(first.back() + alive);
    }
  }
  int64_t count() const { return first.back(); }
  int64_t block_of(int64_t t) const {
    return std::upper_bound(first.begin(), first.end(), t) - first.begin() - 1;
  }
};

}  // namespace

void attention_bwd_cpu(const AttentionParams& call, int threads) {
  if (call.count() == 0) return;
  AttentionParams p = call;
  const bool keys_share = p.dbias.data && p.dbias.stride[3] == 0;
  if (keys_share) p.dbias.data = nullptr;  // it follows from delta, without the scores
  const AttentionKernels& kernels = cpu_kernels().attention[static_cast<int>(p.type)];
  const AttentionPlan plan = kernels.plan(p);
  const KeyTasks tasks(sequence_groups(p), plan.bwd_key_block);
  if (attention_work(p, tasks.groups) < kSerialWork) threads = 1;

  for_each(threads, p.batch * p.nheads,
           [&](int64_t t) { kernels.bwd_delta(p, t / p.nheads, t % p.nheads); });

  std::unique_ptr<Counter[]> progress(new Counter[tasks.count()]());
  for_each<OneSequence>(threads, tasks.count(), 1, [&](OneSequence& of, int64_t t) {
    const int64_t block = tasks.block_of(t), number = t - tasks.first[block];
    const SequenceGroup& g = group_of(tasks.groups, number);
    const int64_t head = number - g.first_task, before = head_before_in_bias(p, head);
    const AttentionParams& one = of.sequence(p, g.first_sequence + head / p.nheads_k);
    float* scratch = scratch_buffer().floats(plan.bwd_scratch + p.groups() * plan.bwd_key_block);
    bwd_keys(one, kernels, plan, head % p.nheads_k, block * plan.bwd_key_block,
             block > 0 ? &progress[tasks.first[block - 1] + number] : nullptr,
             before < 0 ? nullptr : &progress[t - head + before], &progress[t], scratch);
  });

  if (keys_share) kernels.bwd_key_bias(call);
  if (p.dsinks) {
    for_each(threads, p.nheads, [&](int64_t h) { kernels.bwd_sinks(p, h); });
  }
  if (p.dq_sum.data != p.dq.data) {
    for_each(threads, p.batch * p.seqlen_q,
             [&](int64_t t) { kernels.bwd_store_dq(p, t / p.seqlen_q, t % p.seqlen_q); });
  }
}

}  // namespace fastattn
