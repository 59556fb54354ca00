// What the schedules of forward and backward share: the sequences of a call, grouped by shape.
#pragma once

#include <algorithm>
#include <vector>

#include "../attention.h"

namespace fastattn {

// Sequences of one shape: all of a dense batch, or one of a ragged one.
struct SequenceGroup {
  int64_t first_sequence;
  int64_t heads;  // KV heads of all of them
  int64_t rows;   // query rows of a KV head
  int64_t seqlen_k;
  int64_t first_task = 0;
};

inline std::vector<SequenceGroup> sequence_groups(const AttentionParams& p) {
  if (!p.sequences.ragged()) return {{0, p.batch * p.nheads_k, p.rows(), p.seqlen_k}};
  std::vector<SequenceGroup> groups;
  groups.reserve(static_cast<size_t>(p.count()));
  for (int64_t b = 0; b < p.count(); ++b) {
    groups.push_back({b, p.nheads_k, p.groups() * p.seqlen_q_of(b), p.seqlen_k_of(b)});
  }
  return groups;
}

// The group that a task belongs to; their first tasks ascend.
template <class Group>
const Group& group_of(const std::vector<Group>& groups, int64_t task) {
  if (groups.size() == 1) return groups[0];
  const auto after = [](int64_t t, const Group& g) { return t < g.first_task; };
  return *(std::upper_bound(groups.begin(), groups.end(), task, after) - 1);
}

// A worker's view of the sequence it is at, made anew only when that changes.
class OneSequence {
 public:
  const AttentionParams& sequence(const AttentionParams& call, int64_t b) {
    if (b != b_) {
      one_ = call.sequence(b);
      b_ = b;
    }
    return one_;
  }

 private:
  AttentionParams one_;
  int64_t b_ = -1;
};

// How many of the threads a call of this size can use.
inline int attention_threads(const AttentionParams& p, const std::vector<SequenceGroup>& groups,
                             int threads) {
  // Nanoseconds of work under which waking other threads costs more than it brings.
  constexpr double kSerialWork = 4000.0;
  // As measured on one core of a Zen 5: a head, a row, and 80 multiply-adds a nanosecond.
  double work = 0.0;
  for (const SequenceGroup& g : groups) {
    const double rows = double(g.heads) * g.rows;
    const double multiplies = rows * g.seqlen_k * double(p.head_dim + p.head_dim_v);
    work += g.heads * p.groups() * 100.0 + rows * 20.0 + multiplies / 80.0;
  }
  return work < kSerialWork ? 1 : threads;
}

}  // namespace fastattn
