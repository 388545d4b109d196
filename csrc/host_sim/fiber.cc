#include "host_sim/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define HOST_SIM_ASAN 1
#else
#define HOST_SIM_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host_sim {
namespace {

constexpr std::size_t kStackBytes = HOST_SIM_ASAN ? 512 << 10 : 128 << 10;

// A function that was abandoned has left marks in AddressSanitizer's map of the stack.
void forget_red_zones([[maybe_unused]] char* stack) {
#if HOST_SIM_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

}  // namespace

#if defined(__x86_64__)

// Saves the callee-saved registers on the current stack, whose pointer goes to *saved, and
// continues where `other` was saved.
extern "C" void host_sim_switch_stack(void** saved, void* other);
asm(R"(
  .text
  .type host_sim_switch_stack, @function
host_sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size host_sim_switch_stack, .-host_sim_switch_stack
)");

#endif

struct Fiber::Impl {
  char* stack = nullptr;
  Entry entry = nullptr;
  void* argument = nullptr;
#if defined(__x86_64__)
  void* own = nullptr;
  void* caller = nullptr;
#else
  ucontext_t own, caller;
#endif
#if HOST_SIM_ASAN
  void* own_fake_stack = nullptr;
  void* caller_fake_stack = nullptr;
  const void* caller_stack = nullptr;
  std::size_t caller_stack_bytes = 0;
#endif

  static thread_local Impl* running;

  static void trampoline() {
    Impl* self = running;
#if HOST_SIM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack, &self->caller_stack_bytes);
#endif
    self->entry(self->argument);
    std::abort();  // the entry must finish the fiber
  }

  void to_caller(bool is_last) {
#if HOST_SIM_ASAN
    __sanitizer_start_switch_fiber(is_last ? nullptr : &own_fake_stack, caller_stack,
                                   caller_stack_bytes);
#else
    (void)is_last;
#endif
#if defined(__x86_64__)
    host_sim_switch_stack(&own, caller);
#else
    swapcontext(&own, &caller);
#endif
#if HOST_SIM_ASAN
    __sanitizer_finish_switch_fiber(own_fake_stack, &caller_stack, &caller_stack_bytes);
#endif
  }
};

thread_local Fiber::Impl* Fiber::Impl::running = nullptr;

Fiber::Fiber() : impl_(std::make_unique<Impl>()) {
  // A page that must not be touched lies below the stack: an overflow stops at once.
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapped = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapped, page, PROT_NONE);
  impl_->stack = static_cast<char*>(mapped) + page;
}

Fiber::~Fiber() {
  forget_red_zones(impl_->stack);
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  munmap(impl_->stack - page, page + kStackBytes);
}

void Fiber::start(Entry entry, void* argument) {
  impl_->entry = entry;
  impl_->argument = argument;
  forget_red_zones(impl_->stack);
#if defined(__x86_64__)
  // As host_sim_switch_stack leaves it: six registers, then where to return to. A function is
  // entered with rsp % 16 == 8.
  auto* top = reinterpret_cast<std::uintptr_t*>(impl_->stack + kStackBytes);
  *--top = 0;
  *--top = reinterpret_cast<std::uintptr_t>(&Impl::trampoline);
  for (int i = 0; i < 6; ++i) *--top = 0;
  impl_->own = top;
#else
  getcontext(&impl_->own);
  impl_->own.uc_stack.ss_sp = impl_->stack;
  impl_->own.uc_stack.ss_size = kStackBytes;
  impl_->own.uc_link = nullptr;
  makecontext(&impl_->own, &Impl::trampoline, 0);
#endif
}

void Fiber::resume() {
  Impl* self = impl_.get();
  Impl::running = self;
#if HOST_SIM_ASAN
  __sanitizer_start_switch_fiber(&self->caller_fake_stack, self->stack, kStackBytes);
#endif
#if defined(__x86_64__)
  host_sim_switch_stack(&self->caller, self->own);
#else
  swapcontext(&self->caller, &self->own);
#endif
#if HOST_SIM_ASAN
  __sanitizer_finish_switch_fiber(self->caller_fake_stack, nullptr, nullptr);
#endif
  Impl::running = nullptr;
}

void Fiber::suspend() { Impl::running->to_caller(false); }

void Fiber::finish() {
  Impl::running->to_caller(true);
  std::abort();
}

}  // namespace host_sim
