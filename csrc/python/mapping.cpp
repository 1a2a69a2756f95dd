// Mapped files that somebody else cuts short: reading behind the new end is SIGBUS, which by itself names nothing.
#include "mapping.h"

#include <csignal>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include <atomic>

#include "../cpu/system.h"
#include "bind.h"
#include "matrix.h"

namespace gptfast::mapping {
namespace {

// One guarded mapping. Entries are used again and never freed: the handler may read the list at any time.
struct Entry {
  std::atomic<uintptr_t> begin{0}, end{0};  // begin 0: not in use
  std::atomic<bool> failed{false};
  bool recover = false;
  std::string line;  // what is written before the process ends
  Entry* next = nullptr;
};
std::atomic<Entry*> entries{nullptr};
std::mutex entries_mutex;
struct sigaction previous;
std::atomic<bool> passed_on{false};

Entry* entry_at(uintptr_t address) {
  for (Entry* e = entries.load(std::memory_order_acquire); e; e = e->next) {
    const uintptr_t begin = e->begin.load(std::memory_order_acquire);
    if (begin && address >= begin && address < e->end.load(std::memory_order_relaxed)) return e;
  }
  return nullptr;
}

// Zeros instead of the file from this page on, so that the reader comes to its end and then learns of it.
bool replace_by_zeros(Entry* e, uintptr_t address) {
  const uintptr_t page = cpu::page_size(), from = address / page * page;
  e->failed.store(true);
  return cpu::map_zeros(reinterpret_cast<void*>(from), e->end.load() - from);
}

// Only what is safe in a signal handler: system calls, and memory that is there.
void on_bus_error(int signal, siginfo_t* info, void*) {
  const bool fault = info->si_code > 0;  // else somebody sent it
  if (Entry* e = fault ? entry_at(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr) {
    if (e->recover && replace_by_zeros(e, reinterpret_cast<uintptr_t>(info->si_addr))) return;
    const ssize_t written = write(STDERR_FILENO, e->line.data(), e->line.size());
    (void)written;
  }
  struct sigaction action = previous;
  if (passed_on.exchange(true)) action = {}, action.sa_handler = SIG_DFL;  // it came back: now it ends the process
  sigaction(SIGBUS, &action, nullptr);
  if (!fault) raise(signal);  // else the instruction faults again as soon as this returns
}

void install() {
  struct sigaction now;
  sigaction(SIGBUS, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
  previous = now;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

class MappingGuard {
 public:
  MappingGuard(const python::Object& mapping, const std::string& name, bool recover) {
    const Memory memory(mapping);
    if (memory.size < 1) throw std::invalid_argument("MappingGuard: the mapping is empty");
    const std::lock_guard guard(entries_mutex);
    install();
    Entry* e = entries.load();
    while (e && e->begin.load()) e = e->next;
    const bool known = e != nullptr;
    if (!known) e = new Entry;
    e->line = "gptfast: " + name +
              " was cut short, or its disk cannot be read, while it is in use; put it back and start again\n";
    e->recover = recover;
    e->failed = false;
    e->end = reinterpret_cast<uintptr_t>(memory.data) + uintptr_t(memory.size);
    e->begin.store(reinterpret_cast<uintptr_t>(memory.data), std::memory_order_release);
    if (!known) e->next = entries.load(), entries.store(e, std::memory_order_release);
    entry_ = e;
  }
  ~MappingGuard() { entry_->begin.store(0, std::memory_order_release); }
  MappingGuard(const MappingGuard&) = delete;
  MappingGuard& operator=(const MappingGuard&) = delete;
  bool failed() { return entry_->failed.load(); }

 private:
  Entry* entry_;
};

PyGetSetDef properties[] = {python::property<&MappingGuard::failed>("failed"), {}};

}  // namespace

void bind(PyObject* module) {
  python::add_class<MappingGuard, python::Object, std::string, bool>(
      module, "gptfast._C.MappingGuard",
      "Watches a mapped file for SIGBUS while this object lives, which must not be longer than the mapping. recover: "
      "reading goes on with zeros and `failed` says so; else a line names the file before the signal takes its course.",
      nullptr, properties);
}

}  // namespace gptfast::mapping
