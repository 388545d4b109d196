#include "host_sim/simulator.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "host_sim/fiber.h"
#include "host_sim/races.h"

namespace host_sim {
namespace {

std::string text(Location location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}

std::string text(const Dim3& x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

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
  Races::Clock clock{};
  std::vector<int> waiting_warps;    // that take over the clock
  std::vector<int> waiting_threads;  // that sleep
  std::uint64_t generation = 0;      // times it has been complete

  void reset() {
    expected = arrived = 0;
    clock.fill(0);
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
};

class Cta {
 public:
  Cta(Grid& grid, std::vector<std::unique_ptr<Fiber>>& fibers, Dim3 index, std::uint32_t number)
      : grid(grid),
        index(index),
        number(number),
        threads(grid.block.x * grid.block.y * grid.block.z),
        shared(grid.settings.shared_bytes, kPoison),
        landing(grid.settings.shared_bytes, -1),
        atomic_epochs(grid.settings.shared_bytes, 0),
        races(num_warps(), grid.settings.shared_bytes),
        meetings(num_warps()),
        fibers_(fibers) {}

  int num_warps() const { return (static_cast<int>(threads.size()) + kWarpSize - 1) / kWarpSize; }

  void run();
  void wait(const char* what, Location location);
  void wake(int thread) { ready_.push_back(thread); }
  Thread& thread() { return threads[running_]; }

  Grid& grid;
  const Dim3 index;
  const std::uint32_t number;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<std::int16_t> landing;         // by byte: the thread whose copy has not landed, or -1
  std::vector<std::uint32_t> atomic_epochs;  // by byte: of the last atomic operation
  Races races;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  std::array<Barrier, kNumBarriers> barriers;
  std::uint32_t epoch = 1;  // advanced by each barrier of all threads

 private:
  static void enter(void* cta);
  [[noreturn]] void report_deadlock();

  std::vector<std::unique_ptr<Fiber>>& fibers_;
  std::vector<int> ready_;
  int running_ = -1;
  std::exception_ptr error_;
};

thread_local Cta* current = nullptr;

Cta& cta() {
  if (current == nullptr) throw Error("a device function was called outside of a kernel");
  return *current;
}

void Cta::enter(void* argument) {
  Cta& self = *static_cast<Cta*>(argument);
  try {
    (*self.grid.kernel)();
    Thread& thread = self.thread();
    async_commit();
    for (const auto& group : thread.copy_groups) {
      if (!group.empty())
        fail(group.front().location, "the thread ends before this copy has landed");
    }
  } catch (...) {
    self.error_ = std::current_exception();
  }
  self.thread().is_done = true;
  Fiber::finish();
}

void Cta::run() {
  const Dim3& block = grid.block;
  while (fibers_.size() < threads.size()) fibers_.push_back(std::make_unique<Fiber>());
  for (int id = 0; id < static_cast<int>(threads.size()); ++id) {
    const unsigned n = static_cast<unsigned>(id);
    threads[id].id = id;
    threads[id].index = {n % block.x, n / block.x % block.y, n / (block.x * block.y)};
    fibers_[id]->start(&Cta::enter, this);
    wake(id);
  }
  current = this;
  while (!ready_.empty() && !error_) {
    std::swap(ready_[grid.random.below(ready_.size())], ready_.back());
    running_ = ready_.back();
    ready_.pop_back();
    fibers_[running_]->resume();
  }
  current = nullptr;
  if (error_) std::rethrow_exception(error_);
  if (std::any_of(threads.begin(), threads.end(),
                  [](const Thread& thread) { return !thread.is_done; }))
    report_deadlock();
}

void Cta::wait(const char* what, Location location) {
  Thread& self = thread();
  self.waits_for = what;
  self.waits_at = location;
  Fiber::suspend();
  self.waits_for = nullptr;
}

void Cta::report_deadlock() {
  std::map<std::string, std::pair<int, int>> groups;  // count, first thread
  for (const Thread& thread : threads) {
    const std::string what = thread.is_done ? "ended"
                                            : std::string("waits in ") + thread.waits_for + " at " +
                                                  text(thread.waits_at);
    auto& group = groups.try_emplace(what, 0, thread.id).first->second;
    ++group.first;
  }
  std::string message = "deadlock in block " + text(index) + ":";
  for (const auto& [what, group] : groups) {
    message += " " + std::to_string(group.first) +
               " threads (first: " + std::to_string(group.second) + ") " + what + ";";
  }
  throw Error(message);
}

TrackedBuffer* buffer_at(Grid& grid, std::uintptr_t address, std::size_t bytes) {
  auto after = std::upper_bound(
      grid.buffers.begin(), grid.buffers.end(), address,
      [](std::uintptr_t a, const TrackedBuffer& buffer) { return a < buffer.begin(); });
  if (after == grid.buffers.begin()) return nullptr;
  TrackedBuffer& found = *--after;
  return address + bytes <= found.begin() + found.buffer.bytes ? &found : nullptr;
}

void check_words(TrackedBuffer& tracked, std::uintptr_t address, std::size_t bytes, Access access,
                 Location location) {
  Cta& block = cta();
  const std::uint32_t who =
      block.number * kMaxThreads + static_cast<std::uint32_t>(block.thread().id) + 1;
  const bool is_atomic = access == Access::kAtomic;
  const auto is_ordered = [&](const GlobalWord::Stamp& earlier) {
    if (earlier.who == 0 || earlier.who == who || (is_atomic && earlier.is_atomic)) return true;
    return earlier.who != GlobalWord::kMany && (earlier.who - 1) / kMaxThreads == block.number &&
           earlier.epoch < block.epoch;
  };
  const std::size_t first = (address - tracked.begin()) / GlobalWord::kBytes;
  const std::size_t last = (address - tracked.begin() + bytes - 1) / GlobalWord::kBytes;
  for (std::size_t i = first; i <= last; ++i) {
    GlobalWord& word = tracked.words[i];
    if (!is_ordered(word.write) || (access != Access::kRead && !is_ordered(word.read))) {
      fail(location, std::string("nothing orders this ") +
                         (access == Access::kRead ? "read" : "write") +
                         " with another thread's access to byte " +
                         std::to_string(i * GlobalWord::kBytes) + " of " + tracked.buffer.name);
    }
    if (access == Access::kRead) {
      // Whatever comes after this read comes after those that are ordered before it.
      const bool is_shared = !is_ordered(word.read);
      word.read = {is_shared ? GlobalWord::kMany : who, block.epoch, false};
    } else {
      word.write = {who, block.epoch, is_atomic};
    }
  }
}

// The whole warp arrives at a barrier, or waits for it.
struct BarrierCall {
  int id, count;
  bool is_waiting;
  Location location;
};

void arrive_warp(void* const* slots) {
  Cta& block = cta();
  const auto& call = *static_cast<const BarrierCall*>(slots[0]);
  for (int lane = 1; lane < kWarpSize; ++lane) {
    const auto& other = *static_cast<const BarrierCall*>(slots[lane]);
    if (other.id != call.id || other.count != call.count) {
      fail(call.location, "the lanes of a warp name different barriers or counts");
    }
  }
  const int warp = block.thread().warp();
  const int all = static_cast<int>(block.threads.size());
  const int count = call.count == 0 ? all : call.count;
  if (count % kWarpSize != 0 || count > all) {
    fail(call.location, "barrier " + std::to_string(call.id) + " is for " + std::to_string(count) +
                            " threads; it must be a multiple of 32, and at most the block's " +
                            std::to_string(all));
  }
  Barrier& barrier = block.barriers[call.id];
  if (barrier.expected != 0 && barrier.expected != count) {
    fail(call.location,
         "barrier " + std::to_string(call.id) + " expects " + std::to_string(barrier.expected) +
             " threads from those here before, and " + std::to_string(count) + " from this warp");
  }
  barrier.expected = count;
  barrier.arrived += kWarpSize;
  block.races.release(warp, barrier.clock);
  block.races.join_lanes(warp);
  if (call.is_waiting) barrier.waiting_warps.push_back(warp);
  if (barrier.arrived < barrier.expected) return;
  for (int waiting : barrier.waiting_warps) block.races.acquire(waiting, barrier.clock);
  for (int thread : barrier.waiting_threads) block.wake(thread);
  if (count == all) ++block.epoch;
  barrier.reset();
}

void barrier(int id, int count, bool is_waiting, const char* operation, Location location) {
  Cta& block = cta();
  if (id < 0 || id >= kNumBarriers) fail(location, "there is no barrier " + std::to_string(id));
  Barrier& barrier = block.barriers[id];
  // The lanes of a warp arrive together, so none of them can have seen the barrier complete before
  // the last is here.
  const std::uint64_t generation = barrier.generation;
  BarrierCall call{id, count, is_waiting, location};
  rendezvous(0xffffffff, operation, &call, arrive_warp, location);
  while (is_waiting && barrier.generation == generation) {
    barrier.waiting_threads.push_back(block.thread().id);
    block.wait(operation, location);
  }
}

// Of the launches that nobody took.
std::deque<Counters> finished;
std::mutex finished_mutex;

}  // namespace

Counters launch(Dim3 shape, Dim3 block, const Settings& settings,
                const std::vector<Buffer>& buffers, const std::function<void()>& kernel) {
  const std::uint64_t num_threads = std::uint64_t{block.x} * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads) {
    throw Error("a block has " + std::to_string(num_threads) + " threads; it must be 1 to 1024");
  }
  Grid grid{.shape = shape,
            .block = block,
            .settings = settings,
            .buffers = {},
            .counters = {},
            .random = Random(settings.seed),
            .kernel = &kernel};
  for (const Buffer& buffer : buffers) {
    if (buffer.bytes == 0) continue;
    const std::size_t words =
        buffer.is_writable ? (buffer.bytes + GlobalWord::kBytes - 1) / GlobalWord::kBytes : 0;
    grid.buffers.push_back({buffer, std::vector<GlobalWord>(words)});
  }
  std::sort(grid.buffers.begin(), grid.buffers.end(),
            [](const TrackedBuffer& a, const TrackedBuffer& b) { return a.begin() < b.begin(); });
  const std::size_t num_blocks = std::size_t{shape.x} * shape.y * shape.z;
  std::vector<std::uint32_t> order(num_blocks);
  for (std::size_t i = 0; i < num_blocks; ++i) order[i] = static_cast<std::uint32_t>(i);
  for (std::size_t i = num_blocks; i > 1; --i) std::swap(order[i - 1], order[grid.random.below(i)]);
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (std::uint32_t number : order) {
    const Dim3 index{number % shape.x, number / shape.x % shape.y, number / (shape.x * shape.y)};
    Cta(grid, fibers, index, number).run();
  }
  const std::lock_guard lock(finished_mutex);
  finished.push_back(grid.counters);
  return grid.counters;
}

bool host_sim_take_counters(std::uint64_t* counters) {
  const std::lock_guard lock(finished_mutex);
  if (finished.empty()) return false;
  const Counters& first = finished.front();
  counters[0] = first.global_bytes_loaded;
  counters[1] = first.global_bytes_stored;
  counters[2] = first.shared_bytes_loaded;
  counters[3] = first.shared_bytes_stored;
  counters[4] = first.matrix_instructions;
  finished.pop_front();
  return true;
}

const Dim3& thread_index() { return cta().thread().index; }
const Dim3& block_index() { return cta().index; }
const Dim3& block_shape() { return cta().grid.block; }
const Dim3& grid_shape() { return cta().grid.shape; }
int lane_index() { return cta().thread().lane(); }
std::uint32_t shared_size() { return static_cast<std::uint32_t>(cta().shared.size()); }
Counters& counters() { return cta().grid.counters; }

void fail(Location location, const std::string& what) {
  Cta& block = cta();
  throw Error(text(location) + ": block " + text(block.index) + ", thread " +
              std::to_string(block.thread().id) + ": " + what);
}

void check_global(const void* pointer, std::size_t bytes, Access access, Location location) {
  Cta& block = cta();
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  TrackedBuffer* tracked = buffer_at(block.grid, address, bytes);
  if (tracked == nullptr) {
    // The nearest array helps to find the mistake.
    std::string nearest = "no array";
    for (const TrackedBuffer& other : block.grid.buffers) {
      if (other.begin() > address) break;
      nearest = "byte " + std::to_string(address - other.begin()) + " of " + other.buffer.name +
                ", which has " + std::to_string(other.buffer.bytes);
    }
    fail(location,
         "global access of " + std::to_string(bytes) + " bytes outside of all arrays: " + nearest);
  }
  if (address % bytes != 0)
    fail(location, "global access of " + std::to_string(bytes) + " bytes is not aligned");
  if (access != Access::kRead && !tracked->buffer.is_writable)
    fail(location, "write to " + tracked->buffer.name);
  if (tracked->buffer.is_writable) check_words(*tracked, address, bytes, access, location);
  if (access != Access::kWrite) block.grid.counters.global_bytes_loaded += bytes;
  if (access != Access::kRead) block.grid.counters.global_bytes_stored += bytes;
}

namespace {

unsigned char* check_shared(std::uint32_t address, std::size_t bytes, Location location) {
  Cta& block = cta();
  if (address + bytes > block.shared.size()) {
    fail(location, "shared access of " + std::to_string(bytes) + " bytes at " +
                       std::to_string(address) + "; the block has " +
                       std::to_string(block.shared.size()));
  }
  if (address % bytes != 0) {
    fail(location, "shared access of " + std::to_string(bytes) + " bytes at " +
                       std::to_string(address) + " is not aligned");
  }
  return block.shared.data() + address;
}

void check_races(std::uint32_t address, std::size_t bytes, bool is_write, int lane,
                 Location location) {
  Cta& block = cta();
  if (auto race =
          block.races.access(address, bytes, is_write, block.thread().warp(), lane, location))
    fail(location, *race);
}

void land(Thread& thread, const AsyncCopy& copy) {
  Cta& block = cta();
  check_races(copy.to, copy.bytes, true, thread.lane(), copy.location);
  unsigned char* to = block.shared.data() + copy.to;
  if (copy.from == nullptr) {
    std::memset(to, 0, copy.bytes);
  } else {
    std::memcpy(to, copy.from, copy.bytes);
  }
  std::fill_n(block.landing.begin() + copy.to, copy.bytes, static_cast<std::int16_t>(-1));
}

}  // namespace

unsigned char* at_shared(std::uint32_t address, std::size_t bytes, Access access, Location location,
                         bool is_for_warp) {
  Cta& block = cta();
  unsigned char* found = check_shared(address, bytes, location);
  for (std::size_t i = 0; i < bytes; ++i) {
    if (const int copier = block.landing[address + i]; copier >= 0) {
      fail(location, "shared address " + std::to_string(address + i) +
                         " is the target of a copy by thread " + std::to_string(copier) +
                         " that has not landed");
    }
  }
  const int lane = is_for_warp ? Races::kAnyLane : block.thread().lane();
  // Atomic operations may meet, so they count as reads of each other; what they made may be read
  // after a barrier of all threads.
  check_races(address, bytes, access == Access::kWrite, lane, location);
  for (std::size_t i = 0; i < bytes; ++i) {
    std::uint32_t& epoch = block.atomic_epochs[address + i];
    if (access == Access::kRead && epoch == block.epoch) {
      fail(location, "nothing orders this read of shared address " + std::to_string(address + i) +
                         " after the atomic operations of this epoch");
    }
    if (access == Access::kAtomic) epoch = block.epoch;
  }
  if (access != Access::kWrite) block.grid.counters.shared_bytes_loaded += bytes;
  if (access != Access::kRead) block.grid.counters.shared_bytes_stored += bytes;
  return found;
}

void async_copy(std::uint32_t to, const void* from, std::size_t bytes, bool is_zero,
                Location location) {
  Cta& block = cta();
  if (bytes != 4 && bytes != 8 && bytes != 16) fail(location, "cp.async copies 4, 8 or 16 bytes");
  at_shared(to, bytes, Access::kWrite, location);
  if (!is_zero) check_global(from, bytes, Access::kRead, location);
  std::fill_n(block.landing.begin() + to, bytes, static_cast<std::int16_t>(block.thread().id));
  block.thread().open_copies.push_back({to, is_zero ? nullptr : from, bytes, location});
}

void async_commit() {
  Thread& thread = cta().thread();
  thread.copy_groups.push_back(std::exchange(thread.open_copies, {}));
}

void async_wait(int most_pending, Location location) {
  Thread& thread = cta().thread();
  if (most_pending < 0) fail(location, "cp.async.wait_group needs a count of at least 0");
  while (static_cast<int>(thread.copy_groups.size()) > most_pending) {
    for (const AsyncCopy& copy : thread.copy_groups.front()) land(thread, copy);
    thread.copy_groups.pop_front();
  }
}

void rendezvous(std::uint32_t mask, const char* operation, void* slot, Complete complete,
                Location location) {
  Cta& block = cta();
  Thread& self = block.thread();
  const int warp = self.warp();
  const std::uint32_t own = 1u << self.lane();
  if ((mask & own) == 0)
    fail(location, std::string(operation) + " with a mask that lacks the calling lane");
  const int lanes =
      std::min<int>(kWarpSize, static_cast<int>(block.threads.size()) - warp * kWarpSize);
  if (lanes < kWarpSize && (mask >> lanes) != 0)
    fail(location, std::string(operation) + " with lanes that the block lacks");
  auto& meetings = block.meetings[warp];
  auto found = std::find_if(meetings.begin(), meetings.end(),
                            [&](const Meeting& other) { return (other.mask & mask) != 0; });
  if (found == meetings.end()) {
    meetings.push_back(
        {.mask = mask, .arrived = 0, .operation = operation, .location = location, .slots = {}});
    found = meetings.end() - 1;
  } else if (found->mask != mask || std::strcmp(found->operation, operation) != 0 ||
             found->location.line != location.line ||
             std::strcmp(found->location.file, location.file) != 0) {
    fail(location, std::string("the warp has diverged: this lane is in ") + operation +
                       ", others wait in " + found->operation + " at " + text(found->location));
  }
  found->arrived |= own;
  found->slots[self.lane()] = slot;
  if (found->arrived != mask) {
    block.wait(operation, location);
    return;
  }
  const Meeting meeting = *found;
  meetings.erase(found);
  if (complete != nullptr) complete(meeting.slots.data());
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lane != self.lane() && (mask >> lane & 1) != 0) block.wake(warp * kWarpSize + lane);
  }
}

void barrier_sync(int id, int count, Location location) {
  barrier(id, count, true, "barrier.sync", location);
}

void barrier_arrive(int id, int count, Location location) {
  barrier(id, count, false, "barrier.arrive", location);
}

void warp_sync(std::uint32_t mask, Location location) {
  rendezvous(
      mask, "__syncwarp", nullptr,
      [](void* const*) {
        Cta& block = cta();
        block.races.join_lanes(block.thread().warp());
      },
      location);
}

}  // namespace host_sim
