// What the schedules share: the sequences of a call, one by one and grouped by shape. For host code
// alone: what a tier compiles of it, another tier might link.
#pragma once

#include <algorithm>
#include <vector>

#include "../attention.h"

namespace fastattn {

inline int64_t seqlen_q_of(const AttentionParams& p, int64_t b) {
  const int32_t* cu = p.sequences.cu_seqlens_q;
  return cu ? cu[b + 1] - cu[b] : p.seqlen_q;
}

inline int64_t first_key_of(const AttentionParams& p, int64_t b) {
  return p.sequences.first_keys ? p.sequences.first_keys[b] : 0;
}

inline int64_t seqlen_k_of(const AttentionParams& p, int64_t b) {
  const int32_t* cu = p.sequences.cu_seqlens_k;
  if (cu) return cu[b + 1] - cu[b];
  if (!p.sequences.seqlens_k) return p.seqlen_k;
  return std::max<int64_t>(p.sequences.seqlens_k[b] - first_key_of(p, b), 0);
}

// The call of sequence b alone: batch 1, its own lengths, every pointer at its first element.
inline AttentionParams sequence_of(const AttentionParams& p, int64_t b) {
  const Sequences& s = p.sequences;
  AttentionParams one = p;
  one.batch = 1;
  one.seqlen_q = seqlen_q_of(p, b);
  one.seqlen_k = seqlen_k_of(p, b);
  one.first_plane = p.first_plane + b * p.nheads;

  const int32_t *cu_q = s.cu_seqlens_q, *cu_k = s.cu_seqlens_k;
  const int dim_q = cu_q ? 1 : 0, dim_k = cu_k ? 1 : 0;
  const int64_t at_q = cu_q ? cu_q[b] : b;
  for (Strided* x : {&one.q, &one.out, &one.dout, &one.dq}) x->advance(dim_q, at_q, p.type);
  one.dq_sum.advance(dim_q, at_q, Type::kFloat32);
  for (float** x : {&one.lse, &one.lse_rest, &one.dlse, &one.delta}) {
    if (*x) *x += cu_q ? at_q : b * p.nheads * p.lse_stride;
  }

  if (s.pages) {
    one.sequences.pages += b * s.pages_stride;
  } else {
    const int64_t row = s.cache_rows ? s.cache_rows[b] : b;
    const int64_t at_k = cu_k ? cu_k[b] : row;
    for (Strided* x : {&one.k, &one.v}) {
      x->advance(dim_k, at_k, p.cache_type);
      x->advance(1, first_key_of(p, b), p.cache_type);
    }
    for (Strided* x : {&one.dk, &one.dv}) x->advance(dim_k, at_k, p.type);
    for (Strided* x : {&one.k_scale, &one.v_scale}) {
      x->advance(0, row, Type::kFloat32);
      x->advance(1, first_key_of(p, b), Type::kFloat32);
    }
  }

  one.mask.advance(0, b, Type::kBool);
  one.bias.advance(0, b, p.bias_type);
  one.dbias.advance(0, b, Type::kFloat32);
  one.alibi.advance(0, b, Type::kFloat32);
  return one;
}

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
    groups.push_back({b, p.nheads_k, p.groups() * seqlen_q_of(p, b), seqlen_k_of(p, b)});
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
      one_ = sequence_of(call, b);
      b_ = b;
    }
    return one_;
  }

 private:
  AttentionParams one_;
  int64_t b_ = -1;
};

// Nanoseconds of work under which waking other threads costs more than it brings.
constexpr double kSerialWork = 5500.0;

// Nanoseconds that forward takes on one core, roughly, as measured on a Zen 5: a head, a row, and
// 80 multiply-adds a nanosecond.
inline double attention_work(const AttentionParams& p, const std::vector<SequenceGroup>& groups) {
  double work = 0.0;
  for (const SequenceGroup& g : groups) {
    const double rows = double(g.heads) * g.rows;
    const double multiplies = rows * g.seqlen_k * double(p.head_dim + p.head_dim_v);
    work += g.heads * p.groups() * 100.0 + rows * 20.0 + multiplies / 80.0;
  }
  return work;
}

}  // namespace fastattn
