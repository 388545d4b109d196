// A CUDA grid on a CPU, as pessimistic as the programming model allows.
//
// Threads are fibers, and each runs until it waits for others. What a kernel may not rely on is
// made to fail:
//  - shared memory starts as NaN, and the target of a copy may not be touched until the copying
//  thread has waited for it;
//  - the order in which CTAs and threads run is drawn from a seed;
//  - two accesses to the same word, one of them a write, need a barrier between them (or the other
//  primitives that order them);
//  - an access outside the registered arrays or the CTA's shared memory, or one that is not
//  aligned, is an error;
//  - a barrier that not all of its threads reach, or a warp whose lanes meet in different
//  instructions, is an error.
// Every error is a `host_sim::Error` that names file, line, block and thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace host_sim {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kNumBarriers = 16;
constexpr int kMostSharedBytes = 227 * 1024;  // of a block, on compute capability 9.0
// What memory holds before anything was written: NaN in every floating type, -1 in every integer.
constexpr unsigned char kPoison = 0xff;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where in the kernel's source an instruction stands.
struct Location {
  Location() = default;
  Location(const std::source_location& at)
      : file(at.file_name()), line(static_cast<int>(at.line())) {}  // NOLINT: implicit

  const char* file = "?";
  int line = 0;
};

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An array in global memory that a launch may touch.
struct Buffer {
  const void* begin;
  std::size_t bytes;
  bool is_writable;
  std::string name;
};

struct Settings {
  std::uint64_t seed = 0;
  std::size_t shared_bytes = 0;
  // Of a thread when it starts; 0: as many as fit, which is what a kernel with bounds (threads, 1)
  // gets.
  int registers = 0;
};

// What a launch did, over all threads.
struct Counters {
  std::uint64_t global_bytes_loaded = 0;
  std::uint64_t global_bytes_stored = 0;
  std::uint64_t shared_bytes_loaded = 0;
  std::uint64_t shared_bytes_stored = 0;
  std::uint64_t matrix_instructions = 0;  // by a warp or a warpgroup
  std::uint64_t matrix_flops = 0;
  // Parts of what was loaded: from global memory by tensor copies, from shared memory for products,
  // by ldmatrix or by those of a warpgroup themselves.
  std::uint64_t copied_bytes_loaded = 0;
  std::uint64_t operand_bytes_loaded = 0;
};

// Runs `kernel` once per thread. Raises `Error`; the launch is then over and other threads' work is
// lost.
Counters launch(Dim3 grid, Dim3 block, const Settings& settings, const std::vector<Buffer>& buffers,
                const std::function<void()>& kernel);

// For callers that do not see what `launch` returned: the fields of `Counters`, in their order, of
// the earliest finished launch that was not taken yet. False if all were taken.
extern "C" bool host_sim_take_counters(std::uint64_t* counters);

// ---- Below: for the bodies of instructions, which run inside a kernel.

const Dim3& thread_index();
const Dim3& block_index();
const Dim3& block_shape();
const Dim3& grid_shape();
int lane_index();

[[noreturn]] void fail(Location location, const std::string& what);

// Global memory. `check_global` raises unless [pointer, pointer + bytes) is in one buffer, writable
// if it is to be written, and aligned to `bytes`, and unless other threads' accesses in the same
// launch leave it alone.
enum class Access { kRead, kWrite, kAtomic };
void check_global(const void* pointer, std::size_t bytes, Access access, Location location);

// Shared memory, by byte offset. `at_shared` checks and returns where the bytes are. `is_for_warp`:
// an access on behalf of all lanes, which only a barrier orders with those of single lanes.
unsigned char* at_shared(std::uint32_t address, std::size_t bytes, Access access, Location location,
                         bool is_for_warp = false);
std::uint32_t shared_size();

// cp.async: `bytes` are 4, 8 or 16; with `is_zero` nothing is read and zeros land.
void async_copy(std::uint32_t to, const void* from, std::size_t bytes, bool is_zero,
                Location location);
void async_commit();
void async_wait(int most_pending, Location location);

// Barriers. `count` is in threads, a multiple of 32; 0 means all threads of the CTA.
void barrier_sync(int id, int count, Location location);
void barrier_arrive(int id, int count, Location location);
// Orders the memory accesses of the lanes.
void warp_sync(std::uint32_t mask, Location location);

// Waits until all lanes of `mask` are here with the same `operation` and mask. The last to come
// calls `complete` with the `slot` of each lane (null for lanes outside of the mask); then all go
// on. Orders no memory accesses.
using Complete = void (*)(void* const* slots);
void rendezvous(std::uint32_t mask, const char* operation, void* slot, Complete complete,
                Location location);

Counters& counters();

}  // namespace host_sim
