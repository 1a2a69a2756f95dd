// A team of threads that stays together: the caller is thread 0; a barrier costs tens of nanoseconds.
//
// Workers wait by spinning for a millisecond after their last job and then sleep in the kernel, so that an idle engine
// costs nothing and leaves the cores to others (torch's own threads among them). All offer their core to the system now
// and then while they spin: the thread they wait for may need it.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "../cpu/system.h"

namespace gptfast::engine {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // yield takes no time on most
#endif
}

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {}
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs job(thread) on every thread and returns when all are done. One call at a time.
  void run(const std::function<void(int)>& job) {
    start();
    Team& team = *team_;
    team.job = &job;
    team.epoch.fetch_add(1);
    team.epoch.notify_all();
    job(0);
    barrier(0);
  }

  // Inside a job: waits until every thread has come here.
  void barrier(int thread) {
    arrive(thread);
    wait(thread);
  }
  // A barrier in two parts, between which a thread does what needs no other one. All threads arrive, those that need the
  // others wait.
  void arrive(int thread) {
    if (threads_ == 1) return;
    std::atomic<uint32_t>& count = team_->flags[thread].count;
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_release);
  }
  void wait(int thread) {
    if (threads_ == 1) return;
    Team& team = *team_;
    const uint32_t mine = team.flags[thread].count.load(std::memory_order_relaxed);
    for (Flag& other : team.flags)
      for (int polls = 0; int32_t(other.count.load(std::memory_order_acquire) - mine) < 0;) {
        relax();
        if (++polls == kPollsToYield) std::this_thread::yield(), polls = 0;
      }
  }

 private:
  static constexpr int kPollsToYield = 2000;
  static constexpr auto kSpin = std::chrono::microseconds(1000);

  struct alignas(128) Flag {
    std::atomic<uint32_t> count{0};
  };
  struct Team {
    explicit Team(int threads) : flags(size_t(threads)), process(cpu::process_id()) {}
    std::vector<Flag> flags;
    alignas(128) std::atomic<uint32_t> epoch{0};
    std::atomic<bool> stopping{false};
    const std::function<void(int)>* job = nullptr;
    std::vector<std::thread> workers;
    long process;
  };

  // A forked child has no workers: it leaves the parent's team alone and makes one of its own.
  void start() {
    if (team_ && team_->process != cpu::process_id()) (void)team_.release();
    if (team_) return;
    team_ = std::make_unique<Team>(threads_);
    for (int t = 1; t < threads_; t++) team_->workers.emplace_back([this, team = team_.get(), t] { work(*team, t); });
  }
  void stop() {
    if (!team_) return;
    if (team_->process != cpu::process_id()) return (void)team_.release();
    team_->stopping = true;
    team_->epoch.fetch_add(1);
    team_->epoch.notify_all();
    for (std::thread& worker : team_->workers) worker.join();
    team_.reset();
  }
  void work(Team& team, int thread) {
    for (uint32_t seen = 0;;) {
      seen = next_epoch(team, seen);
      if (team.stopping) return;
      (*team.job)(thread);
      barrier(thread);
    }
  }
  static uint32_t next_epoch(Team& team, uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (;;) {
      for (int polls = 0; polls < 64; polls++) {
        const uint32_t now = team.epoch.load(std::memory_order_acquire);
        if (now != seen) return now;
        for (int i = 0; i < 16; i++) relax();
      }
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > until) team.epoch.wait(seen);
    }
  }

  int threads_;
  std::unique_ptr<Team> team_;
};

}  // namespace gptfast::engine
