// What the files of the simulator share: a grid, and the CTA that runs.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "host_sim/fiber.h"
#include "host_sim/races.h"
#include "host_sim/simulator.h"

namespace host_sim {

std::string text(Location location);
std::string text(const Dim3& x);

class Random {
 public:
  explicit Random(std::uint64_t seed)
      : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {}
  std::size_t below(std::size_t n) {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<std::size_t>((state_ * 0x2545f4914f6cdd1dull >> 33) % n);
  }

 private:
  std::uint64_t state_;
};

struct AsyncCopy {
  std::uint32_t to;
  const void* from;  // null: zeros
  std::size_t bytes;
  Location location;
};

struct Thread {
  int id = 0;
  Dim3 index;
  bool is_done = false;
  const char* waits_for = nullptr;
  Location waits_at;
  std::function<std::string()> waits_detail;  // may be empty
  std::vector<AsyncCopy> open_copies;
  std::deque<std::vector<AsyncCopy>> copy_groups;  // committed, oldest first

  int warp() const { return id / kWarpSize; }
  int lane() const { return id % kWarpSize; }
};

// Lanes that wait for each other.
struct Meeting {
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  const char* operation = nullptr;
  Location location;
  std::array<void*, kWarpSize> slots{};
};

struct Barrier {
  int expected = 0;  // threads; 0: nobody is here
  int arrived = 0;
  Races::Clock clock;
  std::vector<int> waiting_warps;    // that take over the clock
  std::vector<int> waiting_threads;  // that sleep
  std::uint64_t generation = 0;      // times it has been complete

  void reset() {
    expected = arrived = 0;
    clock.clear();
    waiting_warps.clear();
    waiting_threads.clear();
    ++generation;
  }
};

// What a word of a writable buffer has seen.
struct GlobalWord {
  static constexpr std::size_t kBytes = 2;
  static constexpr std::uint32_t kMany = 0xffffffff;
  struct Stamp {
    std::uint32_t who = 0;  // CTA * kMaxThreads + thread + 1
    std::uint32_t epoch = 0;
    bool is_atomic = false;
  };
  Stamp write, read;
};

struct TrackedBuffer {
  Buffer buffer;
  std::vector<GlobalWord> words;  // of writable buffers
  std::uintptr_t begin() const { return reinterpret_cast<std::uintptr_t>(buffer.begin); }
};

struct Grid {
  Dim3 shape, block;
  Settings settings;
  std::vector<TrackedBuffer> buffers;  // by address
  Counters counters;
  Random random{0};
  const std::function<void()>* kernel = nullptr;
  int leader_lane = 0;  // that elect.sync elects
};

struct Copies;      // mbarriers and what they count: copies.cc
struct Warpgroups;  // wgmma and setmaxnreg: warpgroups.cc

class Cta {
 public:
  Cta(Grid& grid, std::vector<std::unique_ptr<Fiber>>& fibers, Dim3 index, std::uint32_t number)
      : grid(grid),
        index(index),
        number(number),
        threads(grid.block.x * grid.block.y * grid.block.z),
        shared(grid.settings.shared_bytes, kPoison),
        atomic_epochs(grid.settings.shared_bytes, 0),
        races(static_cast<int>(threads.size()), grid.settings.shared_bytes),
        meetings(num_warps()),
        fibers_(fibers),
        landing_((grid.settings.shared_bytes + kLandingBytes - 1) / kLandingBytes, kFree) {}

  int num_warps() const { return (static_cast<int>(threads.size()) + kWarpSize - 1) / kWarpSize; }
  // Threads of a warp; the last warp may have fewer than 32.
  Races::Threads lanes(int warp) const;

  void run();
  void wait(const char* what, Location location);
  // `detail` adds to the report of a deadlock.
  void wait(const char* what, Location location, std::function<std::string()> detail);
  void wake(int thread) { ready_.push_back(thread); }
  // Something that happens at any time from now on.
  void happen_later(std::function<void()> event) { events_.push_back(std::move(event)); }
  Thread& thread() { return threads[running_]; }

  // Words of shared memory that may not be accessed: the thread whose copy has not landed there, or
  // one of these.
  static constexpr std::int16_t kFree = -1, kIsMbarrier = -2;
  static constexpr std::size_t kLandingBytes = 4;
  void set_landing(std::uint32_t address, std::size_t bytes, int what);
  // Raises unless the bytes exist and can be accessed.
  unsigned char* check_shared(std::uint32_t address, std::size_t bytes, std::size_t alignment,
                              Location location);

  Grid& grid;
  const Dim3 index;
  const std::uint32_t number;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<std::uint32_t> atomic_epochs;  // by byte: of the last atomic operation
  Races races;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  std::array<Barrier, kNumBarriers> barriers;
  std::uint32_t epoch = 1;                 // advanced by each barrier of all threads
  std::shared_ptr<Copies> copies;          // from the first use on
  std::shared_ptr<Warpgroups> warpgroups;  // from the first use on

 private:
  static void enter(void* cta);
  [[noreturn]] void report_deadlock();

  std::vector<std::unique_ptr<Fiber>>& fibers_;
  std::vector<std::int16_t> landing_;  // by word of kLandingBytes
  std::vector<int> ready_;
  std::vector<std::function<void()>> events_;
  int running_ = -1;
  std::exception_ptr error_;
};

// The CTA that runs.
Cta& cta();

// As `check_global` in simulator.h, without the alignment.
void check_global_bytes(const void* pointer, std::size_t bytes, Access access, Location location);

// When a thread, or all of a CTA's, have ended: raise if they left something undone.
void check_copies_at_end(Cta& block, Thread& thread);
void check_copies_at_end(Cta& block);
void check_warpgroups_at_end(Cta& block, Thread& thread);
void check_warpgroups_at_end(Cta& block);

}  // namespace host_sim
