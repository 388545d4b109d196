#include "host_sim/simulator.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "host_sim/cta.h"
#include "host_sim/fiber.h"
#include "host_sim/races.h"

namespace host_sim {

std::string text(Location location) {
  return std::string(location.file) + ":" + std::to_string(location.line);
}

std::string text(const Dim3& x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

namespace {

thread_local Cta* current = nullptr;

}  // namespace

Cta& cta() {
  if (current == nullptr) throw Error("a device function was called outside of a kernel");
  return *current;
}

Races::Threads Cta::lanes(int warp) const {
  const int first = warp * kWarpSize;
  return {first, std::min(kWarpSize, static_cast<int>(threads.size()) - first)};
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
    check_copies_at_end(self, thread);
    check_warpgroups_at_end(self, thread);
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
  while (!(ready_.empty() && events_.empty()) && !error_) {
    const std::size_t next = grid.random.below(ready_.size() + events_.size());
    if (next < ready_.size()) {
      std::swap(ready_[next], ready_.back());
      running_ = ready_.back();
      ready_.pop_back();
      fibers_[running_]->resume();
    } else {
      std::swap(events_[next - ready_.size()], events_.back());
      const auto event = std::move(events_.back());
      events_.pop_back();
      try {
        event();
      } catch (...) {
        error_ = std::current_exception();
      }
    }
  }
  current = nullptr;
  if (error_) std::rethrow_exception(error_);
  if (std::any_of(threads.begin(), threads.end(),
                  [](const Thread& thread) { return !thread.is_done; }))
    report_deadlock();
  check_copies_at_end(*this);
  check_warpgroups_at_end(*this);
}

void Cta::wait(const char* what, Location location) {
  Thread& self = thread();
  self.waits_for = what;
  self.waits_at = location;
  Fiber::suspend();
  self.waits_for = nullptr;
}

void Cta::wait(const char* what, Location location, std::function<std::string()> detail) {
  thread().waits_detail = std::move(detail);
  wait(what, location);
  thread().waits_detail = nullptr;
}

void Cta::set_landing(std::uint32_t address, std::size_t bytes, int what) {
  std::fill_n(landing_.begin() + address / kLandingBytes, bytes / kLandingBytes,
              static_cast<std::int16_t>(what));
}

unsigned char* Cta::check_shared(std::uint32_t address, std::size_t bytes, std::size_t alignment,
                                 Location location) {
  const auto name = [&] {
    return "shared access of " + std::to_string(bytes) + " bytes at " + std::to_string(address);
  };
  if (address + bytes > shared.size())
    fail(location, name() + "; the block has " + std::to_string(shared.size()));
  if (address % alignment != 0)
    fail(location, name() + " is not aligned to " + std::to_string(alignment));
  for (std::size_t word = address / kLandingBytes; word * kLandingBytes < address + bytes; ++word) {
    if (landing_[word] == kFree) continue;
    const std::string where = "shared address " + std::to_string(word * kLandingBytes);
    if (landing_[word] == kIsMbarrier) fail(location, where + " belongs to an mbarrier");
    fail(location, where + " is the target of a copy by thread " + std::to_string(landing_[word]) +
                       " that has not landed");
  }
  return shared.data() + address;
}

void Cta::report_deadlock() {
  std::map<std::string, std::pair<int, int>> groups;  // count, first thread
  for (const Thread& thread : threads) {
    const std::string what =
        thread.is_done
            ? "ended"
            : std::string("waits in ") + thread.waits_for + " at " + text(thread.waits_at) +
                  (thread.waits_detail ? " (" + thread.waits_detail() + ")" : "");
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

namespace {

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
  const auto lanes = block.lanes(warp);
  for (int i = 0; i < lanes.count; ++i) block.races.release(lanes.first + i, barrier.clock);
  block.races.tick();
  if (call.is_waiting) barrier.waiting_warps.push_back(warp);
  if (barrier.arrived < barrier.expected) return;
  for (int waiting : barrier.waiting_warps) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      block.races.acquire(waiting * kWarpSize + lane, barrier.clock);
  }
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
  if (settings.shared_bytes > std::size_t{kMostSharedBytes}) {
    throw Error("a block has " + std::to_string(settings.shared_bytes) +
                " bytes of shared memory; it may have " + std::to_string(kMostSharedBytes));
  }
  Grid grid{.shape = shape,
            .block = block,
            .settings = settings,
            .buffers = {},
            .counters = {},
            .random = Random(settings.seed),
            .kernel = &kernel};
  grid.leader_lane = static_cast<int>(grid.random.below(kWarpSize));
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
  std::memcpy(counters, &finished.front(), sizeof(Counters));
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

void check_global_bytes(const void* pointer, std::size_t bytes, Access access, Location location) {
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
  if (access != Access::kRead && !tracked->buffer.is_writable)
    fail(location, "write to " + tracked->buffer.name);
  if (tracked->buffer.is_writable) check_words(*tracked, address, bytes, access, location);
  if (access != Access::kWrite) block.grid.counters.global_bytes_loaded += bytes;
  if (access != Access::kRead) block.grid.counters.global_bytes_stored += bytes;
}

void check_global(const void* pointer, std::size_t bytes, Access access, Location location) {
  check_global_bytes(pointer, bytes, access, location);
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0)
    fail(location, "global access of " + std::to_string(bytes) + " bytes is not aligned");
}

namespace {

void check_races(std::uint32_t address, std::size_t bytes, bool is_write, Races::Threads by,
                 Location location) {
  if (auto race = cta().races.access(address, bytes, is_write, by, location)) fail(location, *race);
}

void land(Thread& thread, const AsyncCopy& copy) {
  Cta& block = cta();
  check_races(copy.to, copy.bytes, true, {thread.id, 1}, copy.location);
  unsigned char* to = block.shared.data() + copy.to;
  if (copy.from == nullptr) {
    std::memset(to, 0, copy.bytes);
  } else {
    std::memcpy(to, copy.from, copy.bytes);
  }
  block.set_landing(copy.to, copy.bytes, Cta::kFree);
}

}  // namespace

unsigned char* at_shared(std::uint32_t address, std::size_t bytes, Access access, Location location,
                         bool is_for_warp) {
  Cta& block = cta();
  unsigned char* found = block.check_shared(address, bytes, bytes, location);
  const Thread& thread = block.thread();
  // Atomic operations may meet, so they count as reads of each other; what they made may be read
  // after a barrier of all threads.
  check_races(address, bytes, access == Access::kWrite,
              is_for_warp ? block.lanes(thread.warp()) : Races::Threads{thread.id, 1}, location);
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
  block.set_landing(to, bytes, block.thread().id);
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
        block.races.join(block.lanes(block.thread().warp()));
      },
      location);
}

}  // namespace host_sim
