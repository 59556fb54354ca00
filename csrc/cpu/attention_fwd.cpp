// Cuts attention forward into tasks and runs them on threads. Which tasks there are may depend on
// the number of threads and on the batch; what a row's bits are may not (attention_fwd.inl.h).
#include <algorithm>
#include <memory>
#include <vector>

#include "../attention.h"
#include "attention_sequences.h"
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
// Splits begin where blocks of keys do, whatever their size (attention_scores.inl.h).
constexpr int64_t kSplitStep = 256;
constexpr int64_t kPackBlocks = 4;  // key blocks of a packing task
constexpr int64_t kPackedBytes = int64_t{48} << 20;

// Nanoseconds of work that a thread fetches at least.
constexpr double kGrainWork = 2000.0;

thread_local Buffer shared_buffer;  // the caller's, seen by all workers of a call

// Sequences of one shape and how each of their KV heads is cut: all of a dense batch, or one.
struct Group : SequenceGroup {
  bool few;                    // keys are read as they are
  int64_t blocks, block_rows;  // of rows
  int64_t splits, split_keys;  // of keys
  int64_t packs;               // packing tasks of a head whose blocks share the packed keys
  int64_t first_head = 0;      // of those that are alike, in their order
  int64_t first_partial = 0;   // in the buffer of partial results
};

// Where a backward follows, which packs, forward packs too: dot products round scores in another
// order, and with scores of 10^4 the weights of a row would no longer sum to 1.
bool takes_few(const AttentionParams& p, int64_t rows) { return rows <= kFewRows && !p.lse_rest; }

class Forward {
 public:
  Forward(const AttentionParams& p, int threads)
      : p_(p),
        kernels_(cpu_kernels().attention[static_cast<int>(p.type)]),
        plan_(kernels_.plan(p)) {
    std::vector<SequenceGroup> found = sequence_groups(p);
    work_ = attention_work(p, found);
    threads_ = work_ < kSerialWork ? 1 : threads;
    // Longest first, so that none is left alone at the end.
    std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
      return a.rows * a.seqlen_k > b.rows * b.seqlen_k;
    });
    int64_t heads = 0;
    for (const SequenceGroup& g : found) heads += g.heads;
    for (const SequenceGroup& g : found) {
      if (g.heads && g.rows) (g.rows <= kTaskRows ? alone_ : shared_).push_back(cut(g, heads));
    }
    number_tasks();
  }

  void run() {
    shared_tasks_ = shared_.empty() ? 0 : shared_.back().first_task + tasks_of(shared_.back());
    const int64_t tasks =
        shared_tasks_ + (alone_.empty() ? 0 : alone_.back().first_task + tasks_of(alone_.back()));
    ring_ = shared_buffer.floats(slots_ * slot_ + partials_);
    packed_.reset(new Counter[2 * shared_heads_ + alone_heads_]());
    for_each<OneSequence>(threads_, tasks, grain(tasks), [&](OneSequence& of, int64_t t) {
      if (t < shared_tasks_) {
        run_shared(of, t);
      } else {
        run_alone(of, t - shared_tasks_);
      }
    });
    shared_buffer.trim(kKeptBytes);
  }

 private:
  Group cut(const SequenceGroup& of, int64_t all_heads) const {
    Group g = {};
    static_cast<SequenceGroup&>(g) = of;
    g.few = takes_few(p_, g.rows);
    g.splits = 1;
    g.split_keys = g.seqlen_k;
    if (g.rows <= kTaskRows) {
      const int64_t even = (g.seqlen_k + p_.num_splits - 1) / std::max<int64_t>(p_.num_splits, 1);
      g.split_keys = p_.num_splits ? (even + kSplitStep - 1) / kSplitStep * kSplitStep : kSplitKeys;
      g.split_keys = std::max<int64_t>(g.split_keys, 1);
      g.splits = std::max<int64_t>(1, (g.seqlen_k + g.split_keys - 1) / g.split_keys);
    }
    g.blocks = (g.rows + kTaskRows - 1) / kTaskRows;
    if (threads_ > 1 && !g.few) {
      // A few tasks for each thread, so that none waits long for the last.
      const int64_t pieces = all_heads * g.splits;
      const int64_t wanted = (3 * threads_ + pieces - 1) / pieces;
      g.blocks =
          std::max(g.blocks, std::min(wanted, (g.rows + kLeastTaskRows - 1) / kLeastTaskRows));
    }
    g.block_rows = (g.rows + g.blocks - 1) / g.blocks;
    // Whole tiles, all but the last block's.
    if (g.block_rows > 2 * plan_.tile_rows) {
      g.block_rows = (g.block_rows + plan_.tile_rows - 1) / plan_.tile_rows * plan_.tile_rows;
    }
    if (g.rows > kTaskRows) g.packs = (key_blocks(g.seqlen_k) + kPackBlocks - 1) / kPackBlocks;
    return g;
  }

  // Tasks fetched together, so that it costs little; one by one where others wait for them.
  int64_t grain(int64_t tasks) const {
    if (shared_tasks_ > 0 || tasks == 0) return 1;
    const int64_t wanted = static_cast<int64_t>(kGrainWork * double(tasks) / work_);
    return std::max<int64_t>(1, std::min(wanted, tasks / (4 * threads_)));
  }

  void number_tasks() {
    int64_t task = 0;
    for (Group& g : shared_) {
      g.first_task = task;
      g.first_head = shared_heads_;
      task += tasks_of(g);
      shared_heads_ += g.heads;
      slot_ = std::max(slot_, key_blocks(g.seqlen_k) * plan_.packed_block);
      block_rows_ = std::max(block_rows_, g.block_rows);
    }
    const int64_t fit = kPackedBytes / 4 / std::max<int64_t>(slot_, 1);
    slots_ = std::min<int64_t>({shared_heads_, threads_ + 1, std::max<int64_t>(1, fit)});
    task = 0;
    for (Group& g : alone_) {
      g.first_task = task;
      g.first_head = alone_heads_;
      g.first_partial = partials_;
      task += tasks_of(g);
      alone_heads_ += g.heads;
      if (g.splits > 1) partials_ += g.heads * partial_head(g);
      if (!g.few)
        alone_blocks_ = std::max(alone_blocks_, key_blocks(std::min(g.split_keys, g.seqlen_k)));
      block_rows_ = std::max(block_rows_, g.block_rows);
    }
  }

  int64_t key_blocks(int64_t keys) const { return (keys + plan_.key_block - 1) / plan_.key_block; }
  int64_t partial_head(const Group& g) const { return g.splits * g.rows * (2 + p_.head_dim_v); }
  static int64_t tasks_of(const Group& g) {
    return g.heads * (g.rows <= kTaskRows ? g.blocks * g.splits : g.packs + g.blocks);
  }

  static AttentionTask task_of(const Group& g, int64_t hk, int64_t block) {
    AttentionTask task = {};
    task.hk = hk;
    task.row_begin = std::min(block * g.block_rows, g.rows);
    task.row_end = std::min(task.row_begin + g.block_rows, g.rows);
    task.key_end = g.seqlen_k;
    return task;
  }

  int64_t scratch() const { return plan_.scratch_fixed + block_rows_ * plan_.scratch_row; }

  // Each task packs the keys that it needs itself, or reads them as they are.
  void run_alone(OneSequence& of, int64_t t) {
    const Group& g = group_of(alone_, t);
    float* local = scratch_buffer().floats(scratch() + alone_blocks_ * plan_.packed_block);
    const int64_t pieces = g.blocks * g.splits, head = (t - g.first_task) / pieces;
    const int64_t piece = (t - g.first_task) % pieces, split = piece % g.splits;
    const AttentionParams& p = of.sequence(p_, g.first_sequence + head / p_.nheads_k);
    AttentionTask task = task_of(g, head % p_.nheads_k, piece / g.splits);
    task.key_begin = split * g.split_keys;
    task.key_end = std::min(task.key_begin + g.split_keys, g.seqlen_k);
    float* partial = ring_ + slots_ * slot_ + g.first_partial + head * partial_head(g);
    if (g.splits > 1) task.partial = partial + split * g.rows * (2 + p.head_dim_v);
    if (g.few) {
      kernels_.fwd_few(p, task, local);
    } else if (task.row_begin < task.row_end) {
      const int64_t groups = p.groups();
      const int64_t begin = std::max(task.key_begin, p.visible_begin(task.row_begin / groups));
      const int64_t end = std::min(task.key_end, p.visible_end((task.row_end - 1) / groups));
      const int64_t from = begin / plan_.key_block;
      float* packed = local + scratch();
      if (begin < end) kernels_.pack(p, task.hk, from * plan_.key_block, end, packed);
      kernels_.fwd(p, task, packed, from, local);
    }
    Counter& done = packed_[2 * shared_heads_ + g.first_head + head];
    if (g.splits > 1 && done.fetch_add(1, std::memory_order_acq_rel) == pieces - 1) {
      kernels_.merge(p, task.hk, g.splits, partial);
    }
  }

  // Many row blocks share their head's packed keys. Heads pass through a ring of slots: first come
  // a head's packing tasks, then its row blocks, all handed out in this order from one counter, so
  // that whatever a task waits for is already in somebody's hands.
  void run_shared(OneSequence& of, int64_t t) {
    const Group& g = group_of(shared_, t);
    float* local = scratch_buffer().floats(scratch());
    const int64_t tasks = g.packs + g.blocks, head = (t - g.first_task) / tasks;
    const int64_t piece = (t - g.first_task) % tasks, number = g.first_head + head;
    const AttentionParams& p = of.sequence(p_, g.first_sequence + head / p_.nheads_k);
    const int64_t hk = head % p_.nheads_k;
    Counter *packed = &packed_[number], *done = &packed_[shared_heads_ + number];
    float* keys = ring_ + number % slots_ * slot_;
    if (piece < g.packs) {
      if (number >= slots_) wait_for(*(done - slots_), kDone);
      const int64_t from = piece * kPackBlocks;
      kernels_.pack(p, hk, from * plan_.key_block,
                    std::min((from + kPackBlocks) * plan_.key_block, g.seqlen_k),
                    keys + from * plan_.packed_block);
      packed->fetch_add(1, std::memory_order_release);
    } else {
      // Under a causal mask the last rows see most: longest first.
      const int64_t at = piece - g.packs, block = p.window_right >= 0 ? g.blocks - 1 - at : at;
      const AttentionTask task = task_of(g, hk, block);
      wait_for(*packed, g.packs);
      if (task.row_begin < task.row_end) kernels_.fwd(p, task, keys, 0, local);
      if (done->fetch_add(1, std::memory_order_acq_rel) == g.blocks - 1) {
        done->store(kDone, std::memory_order_release);
      }
    }
  }

  static constexpr int64_t kDone = INT64_MAX;

  const AttentionParams& p_;
  const AttentionKernels& kernels_;
  const AttentionPlan plan_;
  double work_;  // nanoseconds on one core
  int threads_;
  std::vector<Group> shared_, alone_;  // by their rows: more than one task's, or not
  int64_t shared_heads_ = 0, alone_heads_ = 0, shared_tasks_ = 0;
  int64_t slots_ = 0, slot_ = 0;       // the ring: how many, and floats in each
  int64_t partials_ = 0;               // floats
  int64_t alone_blocks_ = 0;           // most key blocks that a task packs for itself
  int64_t block_rows_ = 0;             // most rows of a task
  float* ring_ = nullptr;              // and the partial results behind it
  std::unique_ptr<Counter[]> packed_;  // shared heads: packed, then done; then done of the others
};

}  // namespace

void attention_fwd_cpu(const AttentionParams& p, int threads) {
  if (p.count() == 0 || p.nheads == 0 || p.seqlen_q == 0) return;
  Forward(p, threads).run();
}

}  // namespace fastattn
