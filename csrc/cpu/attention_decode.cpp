// Decoding with a cache: new keys and values go in, queries are rotated, then forward runs on it.
#include "../attention.h"
#include "attention_sequences.h"
#include "kernels.h"
#include "parallel.h"

namespace fastattn {

namespace {

// Values that one thread rotates and stores before others are worth waking.
constexpr int64_t kSerialValues = 65536;

thread_local Buffer rotated_q;

}  // namespace

void attention_decode_cpu(const AttentionParams& call, const CacheUpdate& update, int threads) {
  const AttentionKernels& kernels = cpu_kernels().attention[static_cast<int>(call.type)];
  AttentionParams p = call;
  const int64_t tokens = p.batch * update.new_keys;
  if (tokens > 0) {
    const auto append = kernels.append[static_cast<int>(p.cache_type)];
    const int64_t values = tokens * p.nheads_k * (p.head_dim + p.head_dim_v);
    AttentionParams whole = p;  // as it lies in the cache, from its first key on
    whole.sequences.first_keys = nullptr;
    for_each<OneSequence>(values < kSerialValues ? 1 : threads, tokens, 1,
                          [&](OneSequence& of, int64_t t) {
                            const int64_t b = t / update.new_keys;
                            append(of.sequence(whole, b), update, b, t % update.new_keys);
                          });
  }
  const int64_t queries = p.batch * p.seqlen_q;
  if (update.rotary_dim > 0 && queries > 0) {
    const int64_t values = queries * p.nheads * p.head_dim;
    void* q = rotated_q.floats((values * size_of(p.type) + 3) / 4);
    for_each(values < kSerialValues ? 1 : threads, queries,
             [&](int64_t t) { kernels.rotate_q(call, update, t / p.seqlen_q, t % p.seqlen_q, q); });
    p.q.data = q;
    p.q.stride[2] = p.head_dim;
    p.q.stride[1] = p.nheads * p.head_dim;
    p.q.stride[0] = p.seqlen_q * p.q.stride[1];
  }
  attention_fwd_cpu(p, threads);
  rotated_q.trim(kKeptBytes);
}

}  // namespace fastattn
