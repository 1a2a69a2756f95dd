// fork() and the engines' threads.
#pragma once
#include <mutex>
#include <set>

#include "../cpu/system.h"
#include "../engine/engine.h"

namespace gptfast::engine {

// fork() waits until no engine computes: the child, which has none of the other threads, would wait for ever for a lock
// that one of them held.
class Forks {
 public:
  static void add(Engine* engine) {
    static const int once = cpu::at_fork(lock_all, unlock_all);
    (void)once;
    const std::lock_guard guard(mutex_);
    engines_.insert(engine);
  }
  static void remove(Engine* engine) {
    const std::lock_guard guard(mutex_);
    engines_.erase(engine);
  }

 private:
  static void lock_all() {
    mutex_.lock();
    for (Engine* engine : engines_) engine->lock().lock();
  }
  static void unlock_all() {
    for (Engine* engine : engines_) engine->lock().unlock();
    mutex_.unlock();
  }
  static inline std::mutex mutex_;
  static inline std::set<Engine*> engines_;
};

}  // namespace gptfast::engine
