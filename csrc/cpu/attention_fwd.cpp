// Cuts attention forward into tasks and runs them on threads. Which tasks there are may depend on
// the number of threads; what a row's bits are may not (attention_fwd.inl.h).
#include <algorithm>
#include <memory>

#include "../attention.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {

namespace {

// Rows of a task: enough to pay for streaming K and V from L2, few enough that Q and O stay there.
constexpr int64_t kTaskRows = 140;
constexpr int64_t kLeastTaskRows = 42;
// The keys of a head with no more rows than one task are split, by length alone: it occupies the
// cores in decoding, and no task packs more than this.
constexpr int64_t kSplitKeys = 1024;
constexpr int64_t kPackBlocks = 4;  // key blocks of a packing task
constexpr int64_t kPackedBytes = int64_t{48} << 20;
// Nanoseconds of work under which waking other threads costs more than it brings.
constexpr double kSerialWork = 4000.0;

thread_local Buffer shared_buffer;  // the caller's, seen by all workers of a call

struct Shape {
  int64_t heads, rows, blocks, block_rows, splits;
};

// Where a backward follows, which packs, forward packs too: dot products round scores in another
// order, and with scores of 10^4 the weights of a row would no longer sum to 1.
bool takes_few(const AttentionParams& p) { return p.rows() <= kFewRows && !p.lse_rest; }

Shape shape_of(const AttentionParams& p, const AttentionPlan& plan, int threads) {
  Shape s = {};
  s.heads = p.batch * p.nheads_k;
  s.rows = p.rows();
  s.splits =
      s.rows <= kTaskRows ? std::max<int64_t>(1, (p.seqlen_k + kSplitKeys - 1) / kSplitKeys) : 1;
  s.blocks = (s.rows + kTaskRows - 1) / kTaskRows;
  if (threads > 1 && !takes_few(p)) {
    // A few tasks for each thread, so that none waits long for the last.
    const int64_t wanted = (3 * threads + s.heads * s.splits - 1) / (s.heads * s.splits);
    s.blocks = std::max(s.blocks, std::min(wanted, (s.rows + kLeastTaskRows - 1) / kLeastTaskRows));
  }
  s.block_rows = (s.rows + s.blocks - 1) / s.blocks;
  // Whole tiles, all but the last block's.
  if (s.block_rows > 2 * plan.tile_rows) {
    s.block_rows = (s.block_rows + plan.tile_rows - 1) / plan.tile_rows * plan.tile_rows;
  }
  return s;
}

AttentionTask task_of(const AttentionParams& p, const Shape& s, int64_t head, int64_t block) {
  AttentionTask task = {};
  task.b = head / p.nheads_k;
  task.hk = head % p.nheads_k;
  task.row_begin = std::min(block * s.block_rows, s.rows);
  task.row_end = std::min(task.row_begin + s.block_rows, s.rows);
  task.key_end = p.seqlen_k;
  return task;
}

// Each task packs the keys that it needs itself, or reads them as they are; one or few row blocks.
void fwd_separate(const AttentionParams& p, const AttentionKernels& kernels,
                  const AttentionPlan& plan, const Shape& s, int threads) {
  const bool few = takes_few(p);
  const int64_t split_keys = s.splits > 1 ? kSplitKeys : p.seqlen_k;
  const int64_t packed_blocks = few ? 0 : (split_keys + plan.key_block - 1) / plan.key_block;
  const int64_t scratch = plan.scratch_fixed + s.block_rows * plan.scratch_row;
  const int64_t partial_row = 2 + p.head_dim_v, partial_head = s.splits * s.rows * partial_row;
  const int64_t pieces = s.blocks * s.splits;

  float* partials = s.splits > 1 ? shared_buffer.floats(s.heads * partial_head) : nullptr;
  std::unique_ptr<Counter[]> done(s.splits > 1 ? new Counter[s.heads]() : nullptr);
  for_each(threads, s.heads * pieces, [&](int64_t t) {
    float* local = scratch_buffer().floats(scratch + packed_blocks * plan.packed_block);
    const int64_t head = t / pieces, split = t % pieces % s.splits;
    AttentionTask task = task_of(p, s, head, t % pieces / s.splits);
    task.key_begin = split * split_keys;
    task.key_end = std::min(task.key_begin + split_keys, p.seqlen_k);
    if (partials) task.partial = partials + head * partial_head + split * s.rows * partial_row;
    if (few) {
      kernels.fwd_few(p, task, local);
    } else if (task.row_begin < task.row_end) {
      const int64_t groups = p.groups();
      const int64_t begin = std::max(task.key_begin, p.visible_begin(task.row_begin / groups));
      const int64_t end = std::min(task.key_end, p.visible_end((task.row_end - 1) / groups));
      const int64_t from = begin / plan.key_block;
      float* packed = local + scratch;
      if (begin < end) kernels.pack(p, task.b, task.hk, from * plan.key_block, end, packed);
      kernels.fwd(p, task, packed, from, local);
    }
    if (partials && done[head].fetch_add(1, std::memory_order_acq_rel) == pieces - 1) {
      kernels.merge(p, task.b, task.hk, s.splits, partials + head * partial_head);
    }
  });
  shared_buffer.trim(kKeptBytes);
}

// Many row blocks share their head's packed keys. Heads pass through a ring of slots: first come a
// head's packing tasks, then its row blocks, all handed out in this order from one counter, so that
// whatever a task waits for is already in somebody's hands.
void fwd_shared(const AttentionParams& p, const AttentionKernels& kernels,
                const AttentionPlan& plan, const Shape& s, int threads) {
  const int64_t key_blocks = (p.seqlen_k + plan.key_block - 1) / plan.key_block;
  const int64_t packs = (key_blocks + kPackBlocks - 1) / kPackBlocks;
  const int64_t slot = key_blocks * plan.packed_block, tasks = packs + s.blocks;
  const int64_t slots = std::min<int64_t>(
      {s.heads, threads + 1, std::max<int64_t>(1, kPackedBytes / 4 / std::max<int64_t>(slot, 1))});
  float* ring = shared_buffer.floats(slots * slot);
  std::unique_ptr<Counter[]> counters(new Counter[2 * s.heads]());
  Counter *packed = counters.get(), *done = packed + s.heads;
  const bool staircase = p.window_right >= 0;
  for_each(threads, s.heads * tasks, [&](int64_t t) {
    float* local = scratch_buffer().floats(plan.scratch_fixed + s.block_rows * plan.scratch_row);
    const int64_t head = t / tasks, piece = t % tasks;
    float* keys = ring + head % slots * slot;
    if (piece < packs) {
      if (head >= slots) wait_for(done[head - slots], s.blocks);
      const int64_t from = piece * kPackBlocks;
      kernels.pack(p, head / p.nheads_k, head % p.nheads_k, from * plan.key_block,
                   std::min((from + kPackBlocks) * plan.key_block, p.seqlen_k),
                   keys + from * plan.packed_block);
      packed[head].fetch_add(1, std::memory_order_release);
    } else {
      // Under a causal mask the last rows see most: longest first.
      const int64_t block = staircase ? s.blocks - 1 - (piece - packs) : piece - packs;
      const AttentionTask task = task_of(p, s, head, block);
      wait_for(packed[head], packs);
      if (task.row_begin < task.row_end) kernels.fwd(p, task, keys, 0, local);
      done[head].fetch_add(1, std::memory_order_release);
    }
  });
  shared_buffer.trim(kKeptBytes);
}

}  // namespace

int attention_threads(const AttentionParams& p, int threads) {
  // As measured on one core of a Zen 5: a head, a row, and 80 multiply-adds a nanosecond.
  const double heads = double(p.batch) * p.nheads, rows = heads * p.seqlen_q;
  const double multiplies = rows * p.seqlen_k * double(p.head_dim + p.head_dim_v);
  return heads * 100.0 + rows * 20.0 + multiplies / 80.0 < kSerialWork ? 1 : threads;
}

void attention_fwd_cpu(const AttentionParams& p, int threads) {
  if (p.batch == 0 || p.nheads == 0 || p.seqlen_q == 0) return;
  const AttentionKernels& kernels = cpu_kernels().attention[static_cast<int>(p.type)];
  const AttentionPlan plan = kernels.plan(p);
  threads = attention_threads(p, threads);
  const Shape s = shape_of(p, plan, threads);
  (s.rows <= kTaskRows ? fwd_separate : fwd_shared)(p, kernels, plan, s, threads);
}

}  // namespace fastattn
