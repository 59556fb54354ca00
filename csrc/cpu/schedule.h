// Steps of one call, which threads go through together.
#pragma once

#include <deque>
#include <functional>
#include <utility>

#include "parallel.h"

namespace fastattn {

// Each step is a number of tasks that need nothing of one another. They are handed out in the order
// of the steps. A task waits until the step that its own comes after, and all before that one, are
// done: so a thread goes on to the next step while others finish the one before, where it may.
class Schedule {
 public:
  static constexpr int kNothing = -1;

  // Adds tasks f(0) ... f(n - 1), which come after that step; returns the step's number.
  int add(int64_t n, int after, std::function<void(int64_t)> f) {
    Step& step = steps_.emplace_back();
    step.begin = total_;
    step.n = n;
    step.after = after;
    step.f = std::move(f);
    total_ += n;
    return last();
  }
  int last() const { return static_cast<int>(steps_.size()) - 1; }

  void run(int threads) {
    Counter next{0};
    const int64_t most = threads < total_ ? threads : total_;
    parallel(static_cast<int>(most), [&](int) {
      size_t at = 0;
      int waited = kNothing;
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < total_;) {
        while (t >= steps_[at].begin + steps_[at].n) ++at;
        Step& step = steps_[at];
        while (waited < step.after) {
          ++waited;
          wait_for(steps_[waited].done, steps_[waited].n);
        }
        step.f(t - step.begin);
        step.done.fetch_add(1, std::memory_order_release);
      }
    });
  }

 private:
  struct Step {
    int64_t begin, n;
    int after;
    std::function<void(int64_t)> f;
    Counter done{0};
  };
  std::deque<Step> steps_;
  int64_t total_ = 0;
};

}  // namespace fastattn
