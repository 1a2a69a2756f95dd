// A fiber that runs over the end of its stack hits the guard page below it. The handler says so and lets the process die
// as it would have; any other fault goes to whoever handled faults before.
#pragma once
namespace emu {

inline struct sigaction& previous_fault_handler() {
  static struct sigaction old{};
  return old;
}
inline void on_fault(int, siginfo_t* info, void*) {
  const char* at = static_cast<const char*>(info->si_addr);
  if (B && B->cur && at >= B->cur->stack - kGuard && at < B->cur->stack) {
    char text[320];
    const Fiber& f = *B->cur;
    const int n =
        snprintf(text, sizeof text,
                 "emu: stack overflow: block (%u,%u,%u) thread (%u,%u,%u) used more than %zu KB of local memory "
                 "(last seen near %s:%d); shrink its arrays or raise emu::kStack\n",
                 blockIdx.x, blockIdx.y, blockIdx.z, f.tid.x, f.tid.y, f.tid.z, kStack >> 10, f.where, f.line);
    if (write(2, text, size_t(n)) < 0) _exit(1);
  }
  sigaction(SIGSEGV, &previous_fault_handler(), nullptr);  // the fault happens again and takes its course
}
// The handler needs a stack of its own: the fiber's has run out.
inline void report_stack_overflows() {
#if !defined(__SANITIZE_ADDRESS__)
  static thread_local char stack[16 << 10];
  stack_t alternate{};
  alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, &previous_fault_handler()) == 0;
  }();
  (void)installed;
#endif
}

}  // namespace emu
