// Threads, waiting and buffers for the kernels; no arithmetic here.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "team.h"

namespace fastattn {

// Runs f(thread) on up to `threads` threads: of the team that the calling thread leads, else of the
// OpenMP pool, which PyTorch shares; without OpenMP, on threads that are started for it. f takes
// its work from a counter, so that it is all done whatever number of threads comes.
template <class F>
void parallel(int threads, const F& f) {
  if (threads <= 1) {
    f(0);
    return;
  }
  if (Team* team = Team::led()) {
    team->run(threads, f);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  f(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&f, i] { f(i); });
  f(0);
  for (std::thread& other : others) other.join();
#endif
}

// Runs body() on the calling thread, which leads a team meanwhile.
template <class F>
void with_team(int threads, const F& body) {
  if (threads <= 1) {
    body();
    return;
  }
  Team team(threads);
  parallel(threads, [&](int thread) {
    if (thread > 0) {
      team.serve(thread);
    } else {
      const Team::Leading leading(team);
      body();
    }
  });
}

// Runs f(t) for t in [0, n), handed out in order.
template <class F>
void for_each(int threads, int64_t n, const F& f) {
  Counter next{0};
  parallel(threads, [&](int) {
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(t);
  });
}

// The same, `grain` of them at a time, with an object of each worker's own.
template <class Own, class F>
void for_each(int threads, int64_t n, int64_t grain, const F& f) {
  Counter next{0};
  parallel(threads, [&](int) {
    Own own;
    for (int64_t t; (t = next.fetch_add(grain, std::memory_order_relaxed)) < n;) {
      for (const int64_t end = t + grain < n ? t + grain : n; t < end; ++t) f(own, t);
    }
  });
}

// An aligned buffer that is kept for the next call, up to a limit: fresh pages cost a fault each.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* floats(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(float) + 4095) / 4096 * 4096;
    if (bytes > bytes_) {
      release();
      data_ = std::aligned_alloc(4096, bytes);
      if (!data_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<float*>(data_);
  }
  size_t bytes() const { return bytes_; }
  void trim(size_t keep_bytes) {
    if (bytes_ > keep_bytes) release();
  }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// What a buffer may keep between calls.
constexpr size_t kKeptBytes = size_t{4} << 20;

// The calling worker's own.
inline Buffer& scratch_buffer() {
  thread_local Buffer buffer;
  return buffer;
}

}  // namespace fastattn
