// Cooperative threads of one OS thread: each simulated CUDA thread has a stack of its own and runs
// until it suspends.
#pragma once

#include <cstddef>
#include <memory>

namespace host_sim {

// Runs `entry(argument)` on its own stack. The entry must not let an exception escape, and its last
// act is `Fiber::finish()`.
class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next `resume` start `entry(argument)`; whatever ran on this stack before is
  // abandoned.
  void start(Entry entry, void* argument);
  // Runs the fiber until it suspends or finishes. Call it outside of any fiber.
  void resume();
  // Returns to the caller of `resume`. Call it inside the running fiber.
  static void suspend();
  // `suspend` for the last time.
  [[noreturn]] static void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace host_sim
