// Waiting without sleeping, and threads that do so between parallel regions.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace fastattn {

using Counter = std::atomic<int64_t>;

// Waits until counter >= value. Who waits has work that was handed out after the work it waits for,
// so that somebody is always at work.
inline void wait_for(const Counter& counter, int64_t value) {
  for (int spins = 0; counter.load(std::memory_order_acquire) < value; ++spins) {
    if (spins < 4096) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

// Threads that stay awake from one parallel region to the next: a program has hundreds, each of a
// few microseconds, and waking a pool for each would cost as much again. The thread that leads a
// team runs its regions on it, however deep they stand; it posts them to the members that have
// come.
class Team {
 public:
  explicit Team(int threads) : members_(static_cast<size_t>(threads)) {}

  // The team that the calling thread leads, or null.
  static Team*& led() {
    thread_local Team* team = nullptr;
    return team;
  }

  class Leading {
   public:
    explicit Leading(Team& team) : team_(team), before_(led()) { led() = &team; }
    Leading(const Leading&) = delete;
    Leading& operator=(const Leading&) = delete;
    ~Leading() {
      led() = before_;
      team_.dismiss();
    }

   private:
    Team& team_;
    Team* before_;
  };

  template <class F>
  void run(int threads, const F& f) {
    ++round_;
    region_ = &f;
    call_ = [](const void* region, int thread) { (*static_cast<const F*>(region))(thread); };
    const size_t most = std::min(static_cast<size_t>(threads), members_.size());
    for (size_t i = 1; i < most; ++i) {
      Member& member = members_[i];
      member.posted = member.here.load(std::memory_order_acquire);
      if (member.posted) member.round.store(round_, std::memory_order_release);
    }
    f(0);
    for (size_t i = 1; i < most; ++i) {
      if (members_[i].posted) wait_for(members_[i].done, round_);
    }
  }

  void serve(int thread) {
    Member& member = members_[static_cast<size_t>(thread)];
    member.here.store(true, std::memory_order_release);
    for (int64_t seen = 0;;) {
      wait_for(member.round, seen + 1);
      seen = member.round.load(std::memory_order_acquire);
      if (seen == kDismissed) return;
      call_(region_, thread);
      member.done.store(seen, std::memory_order_release);
    }
  }

 private:
  static constexpr int64_t kDismissed = INT64_MAX;

  void dismiss() {
    for (Member& member : members_) member.round.store(kDismissed, std::memory_order_release);
  }

  struct alignas(64) Member {
    std::atomic<bool> here{false};
    bool posted = false;  // the leader's own
    Counter round{0};
    alignas(64) Counter done{0};
  };
  std::vector<Member> members_;
  int64_t round_ = 0;
  const void* region_ = nullptr;
  void (*call_)(const void*, int) = nullptr;
};

}  // namespace fastattn
