// mbarriers, and the copies of one thread: bulk copies and tensor copies.
#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <optional>
#include <utility>

#include "host_sim/cta.h"
#include "host_sim/floats.h"
#include "host_sim/hopper.h"

namespace host_sim {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;
constexpr std::int64_t kMostBytes = (1 << 20) - 1;

struct Mbarrier {
  std::uint32_t address = 0;
  Location location;
  int thread = 0;  // that initialised it
  Races::Time time = 0;
  bool is_fenced = false;
  int actor = 0;  // of the copies that it counts

  std::uint64_t phase = 0;
  int arrivals = 0, pending = 0;
  std::int64_t pending_bytes = 0;
  Races::Clock arrived;                         // up to now
  Races::Clock completed;                       // up to the end of the last phase
  std::uint64_t observed = 0;                   // phases that a thread has seen the end of
  std::uint64_t landed = 0, landed_unseen = 0;  // bytes in the current phase, and before it
  std::vector<int> waiting;

  std::string describe() const {
    return "mbarrier " + std::to_string(address) + " of " + text(location) + ": phase " +
           std::to_string(phase) + " has " + std::to_string(pending) + " of " +
           std::to_string(arrivals) + " arrivals and " + std::to_string(pending_bytes) +
           " bytes pending";
  }
};

// A copy to global memory.
struct Store {
  bool has_read = false, has_written = false;
  bool is_waited_for = false;  // as far as its reads go
  Races::Time time;
  Location location;
};

using Stores = std::vector<std::shared_ptr<Store>>;

struct Storer {  // a thread
  int actor = -1;
  Stores open;
  std::deque<Stores> groups;  // oldest first
  bool is_waiting = false;
};

}  // namespace

struct Copies {
  std::map<std::uint32_t, Mbarrier> mbarriers;  // by address
  std::map<int, Storer> storers;                // by thread
};

namespace {

Copies& copies() {
  Cta& block = cta();
  if (block.copies == nullptr) block.copies = std::make_shared<Copies>();
  return *block.copies;
}

Mbarrier& mbarrier_at(std::uint32_t address, const char* operation, Location location) {
  Cta& block = cta();
  const auto found = copies().mbarriers.find(address);
  if (found == copies().mbarriers.end()) {
    fail(location, std::string(operation) + " of shared address " + std::to_string(address) +
                       ", where no mbarrier has been initialised");
  }
  Mbarrier& mbarrier = found->second;
  if (!block.races.knows(block.thread().id, mbarrier.thread, mbarrier.time)) {
    fail(location, std::string(operation) + ": nothing orders it after the initialisation of " +
                       mbarrier.describe());
  }
  return mbarrier;
}

void complete_phase_if_due(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.pending_bytes != 0) return;
  Cta& block = cta();
  if (mbarrier.arrived.size() <= static_cast<std::size_t>(mbarrier.actor))
    mbarrier.arrived.resize(mbarrier.actor + 1);
  mbarrier.arrived[mbarrier.actor] = block.races.now();
  block.races.tick();
  mbarrier.completed = mbarrier.arrived;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.arrivals;
  mbarrier.landed_unseen += std::exchange(mbarrier.landed, 0);
  for (int thread : std::exchange(mbarrier.waiting, {})) block.wake(thread);
}

void expect_bytes(Mbarrier& mbarrier, std::int64_t bytes, Location location) {
  mbarrier.pending_bytes += bytes;
  if (mbarrier.pending_bytes > kMostBytes)
    throw Error(text(location) + ": more than 2^20 - 1 bytes: " + mbarrier.describe());
}

void landed(Mbarrier& mbarrier, std::uint32_t bytes, Location location) {
  mbarrier.landed += bytes;
  expect_bytes(mbarrier, -std::int64_t{bytes}, location);
  complete_phase_if_due(mbarrier);
}

std::uint32_t swizzled(std::uint32_t address, int span) {
  return address ^ (address >> 3 & (span == 0 ? 0 : span - 16));
}

std::size_t element_bytes(const TensorMap& map) {
  return map.element == TensorElement::kFloat32 ? 4 : 2;
}

std::uint32_t box_bytes(const TensorMap& map) {
  std::uint64_t bytes = element_bytes(map);
  for (int d = 0; d < map.rank; ++d) bytes *= map.box[d];
  return static_cast<std::uint32_t>(bytes);
}

// A row of a box: `first` to `last` of its elements exist, from `global` on.
struct Row {
  char* global;
  std::uint32_t first, last;
};

// Calls `row(index, Row)` for each row of the box at these coordinates.
template <class Visit>
void for_each_row(const TensorMap& map, const std::array<int, 5>& at, Visit visit) {
  const std::int64_t size = static_cast<std::int64_t>(map.shape[0]);
  const std::int64_t first = std::clamp<std::int64_t>(-std::int64_t{at[0]}, 0, map.box[0]);
  const std::int64_t last = std::clamp<std::int64_t>(size - at[0], first, map.box[0]);
  std::uint32_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  for (std::uint32_t index = 0; index < rows; ++index) {
    std::uint32_t rest = index;
    bool exists = true;
    std::int64_t offset = (at[0] + first) * static_cast<std::int64_t>(element_bytes(map));
    for (int d = 1; d < map.rank; ++d) {
      const std::int64_t i = std::int64_t{at[d]} + rest % map.box[d];
      rest /= map.box[d];
      exists = exists && i >= 0 && i < static_cast<std::int64_t>(map.shape[d]);
      offset += i * static_cast<std::int64_t>(map.strides[d]);
    }
    if (exists && last > first) {
      visit(index, Row{static_cast<char*>(const_cast<void*>(map.base)) + offset,
                       static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(last)});
    } else {
      visit(index, Row{nullptr, 0, 0});
    }
  }
}

void check_box(const TensorMap& map, int rank, std::uint32_t shared, Location location) {
  if (map.rank != rank) {
    fail(location, "the tensor map has " + std::to_string(map.rank) +
                       " dimensions, and there are " + std::to_string(rank) + " coordinates");
  }
  const std::uint32_t period = map.swizzle_span == 0 ? 128 : 8 * map.swizzle_span;
  if (shared % period != 0) {
    fail(location, "shared address " + std::to_string(shared) + " is not aligned to the " +
                       std::to_string(period) + " bytes after which the map's swizzle repeats");
  }
}

void check_global_rows(const TensorMap& map, const std::array<int, 5>& at, Access access,
                       Location location) {
  for_each_row(map, at, [&](std::uint32_t, const Row& row) {
    if (row.global == nullptr) return;
    check_global_bytes(row.global, (row.last - row.first) * element_bytes(map), access, location);
  });
}

std::array<int, 5> coordinates(const int* at, int rank) {
  std::array<int, 5> all{};
  std::copy_n(at, rank, all.begin());
  return all;
}

// What a copy to shared memory does before it is under way; `land` fills in the bytes.
void start_load(std::uint32_t to, std::uint32_t bytes, std::uint32_t barrier, Location location,
                std::function<void(unsigned char* shared)> land) {
  Cta& block = cta();
  const int thread = block.thread().id;
  Mbarrier& mbarrier = mbarrier_at(barrier, "a copy that counts at an mbarrier", location);
  if (!mbarrier.is_fenced)
    fail(location,
         "a copy needs mbarrier_init_fence after the initialisation of " + mbarrier.describe());
  std::memset(block.check_shared(to, bytes, 16, location), kPoison, bytes);
  if (auto race = block.races.access_async(
          to, bytes, {Races::Action::kOverwrite, {thread, 1}, mbarrier.actor, location}))
    fail(location, *race);
  block.set_landing(to, bytes, thread);
  block.happen_later([&block, &mbarrier, to, bytes, location, land = std::move(land)] {
    land(block.shared.data());
    block.set_landing(to, bytes, Cta::kFree);
    block.races.write_async(to, bytes, mbarrier.actor, location);
    block.grid.counters.shared_bytes_stored += bytes;
    landed(mbarrier, bytes, location);
  });
}

void add_elements(TensorElement element, char* to, const unsigned char* from, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (element == TensorElement::kFloat32) {
      float a, b;
      std::memcpy(&a, to + 4 * i, 4);
      std::memcpy(&b, from + 4 * i, 4);
      a += b;
      std::memcpy(to + 4 * i, &a, 4);
    } else {
      std::uint16_t a, b;
      std::memcpy(&a, to + 2 * i, 2);
      std::memcpy(&b, from + 2 * i, 2);
      a = element == TensorElement::kBFloat16
              ? bfloat16_of(float_of_bfloat16(a) + float_of_bfloat16(b))
              : float16_of(float_of_float16(a) + float_of_float16(b));
      std::memcpy(to + 2 * i, &a, 2);
    }
  }
}

}  // namespace

TensorMap make_tensor_map(TensorElement element, int rank, const void* base,
                          const std::uint64_t* shape, const std::uint64_t* strides,
                          const std::uint32_t* box, int swizzle_span) {
  TensorMap map{element, rank, base, {}, {}, {}, swizzle_span};
  const auto refuse = [](const std::string& what) { throw Error("tensor map: " + what); };
  if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0)
    refuse("the array is not aligned to 16 bytes");
  for (int d = 0; d < rank; ++d) {
    const std::string dimension = " of dimension " + std::to_string(d) + " is ";
    map.shape[d] = shape[d];
    map.box[d] = box[d];
    map.strides[d] = d == 0 ? element_bytes(map) : strides[d - 1];
    if (shape[d] < 1 || shape[d] > std::uint64_t{1} << 32)
      refuse("the size" + dimension + std::to_string(shape[d]) + "; it must be 1 to 2^32");
    if (box[d] < 1 || box[d] > 256)
      refuse("the box" + dimension + std::to_string(box[d]) + "; it must be 1 to 256");
    if (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] >= std::uint64_t{1} << 40)) {
      refuse("the stride" + dimension + std::to_string(strides[d - 1]) +
             " bytes; it must be a multiple of 16 below 2^40");
    }
  }
  const std::size_t inner = box[0] * element_bytes(map);
  if (inner % 16 != 0)
    refuse("a row of the box has " + std::to_string(inner) + " bytes; it must be a multiple of 16");
  // How shorter rows lie in shared memory is not documented.
  if (swizzle_span != 0 && inner != static_cast<std::size_t>(swizzle_span)) {
    refuse("a row of the box has " + std::to_string(inner) + " bytes, and not the swizzle's " +
           std::to_string(swizzle_span));
  }
  return map;
}

void mbarrier_init(std::uint32_t barrier, int arrivals, Location location) {
  Cta& block = cta();
  if (arrivals < 1 || arrivals > kMostArrivals)
    fail(location,
         "an mbarrier is for " + std::to_string(arrivals) + " arrivals; it must be 1 to 2^20 - 1");
  at_shared(barrier, 8, Access::kWrite, location);
  block.set_landing(barrier, 8, Cta::kIsMbarrier);
  Mbarrier& mbarrier = copies().mbarriers[barrier];
  mbarrier.address = barrier;
  mbarrier.location = location;
  mbarrier.thread = block.thread().id;
  mbarrier.time = block.races.now();
  mbarrier.actor = block.races.add_actor("the copies of mbarrier " + std::to_string(barrier));
  mbarrier.arrivals = mbarrier.pending = arrivals;
  block.races.tick();
}

void mbarrier_init_fence(Location) {
  Cta& block = cta();
  for (auto& [address, mbarrier] : copies().mbarriers) {
    if (mbarrier.thread == block.thread().id) mbarrier.is_fenced = true;
  }
}

void mbarrier_arrive(std::uint32_t barrier, std::uint32_t expected_bytes, Location location) {
  Cta& block = cta();
  Mbarrier& mbarrier = mbarrier_at(barrier, "mbarrier.arrive", location);
  if (mbarrier.observed < mbarrier.phase) {
    fail(location, "an arrival in a phase before any thread has waited for the phase before: " +
                       mbarrier.describe());
  }
  if (mbarrier.pending == 0) fail(location, "one arrival too many: " + mbarrier.describe());
  expect_bytes(mbarrier, expected_bytes, location);
  --mbarrier.pending;
  block.races.release(block.thread().id, mbarrier.arrived);
  block.races.tick();
  complete_phase_if_due(mbarrier);
}

void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, Location location) {
  Cta& block = cta();
  Mbarrier& mbarrier = mbarrier_at(barrier, "mbarrier.try_wait", location);
  if (parity > 1) fail(location, "a parity is 0 or 1, and not " + std::to_string(parity));
  while (mbarrier.phase % 2 == parity) {
    mbarrier.waiting.push_back(block.thread().id);
    block.wait("mbarrier.try_wait", location, [&mbarrier] { return mbarrier.describe(); });
  }
  mbarrier.observed = mbarrier.phase;
  mbarrier.landed_unseen = 0;
  block.races.acquire(block.thread().id, mbarrier.completed);
}

void fence_async_proxy(Location) { cta().races.fence(cta().thread().id); }

void prefetch_tensor_map(const TensorMap& map, Location location) {
  if (map.rank < 1 || map.rank > 5) fail(location, "this is no tensor map");
}

void tensor_load(std::uint32_t to, const TensorMap& map, const int* at, int rank,
                 std::uint32_t barrier, Location location) {
  check_box(map, rank, to, location);
  const auto place = coordinates(at, rank);
  const std::uint64_t loaded = counters().global_bytes_loaded;
  check_global_rows(map, place, Access::kRead, location);
  counters().copied_bytes_loaded += counters().global_bytes_loaded - loaded;
  start_load(to, box_bytes(map), barrier, location, [map, place, to](unsigned char* shared) {
    const std::size_t size = element_bytes(map), row_bytes = map.box[0] * size;
    std::vector<unsigned char> bytes(row_bytes);
    for_each_row(map, place, [&](std::uint32_t index, const Row& row) {
      std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(0));
      if (row.global != nullptr)
        std::memcpy(&bytes[row.first * size], row.global, (row.last - row.first) * size);
      for (std::size_t i = 0; i < row_bytes; i += 16) {
        const auto linear = static_cast<std::uint32_t>(to + index * row_bytes + i);
        std::memcpy(shared + swizzled(linear, map.swizzle_span), &bytes[i], 16);
      }
    });
  });
}

void bulk_load(std::uint32_t to, const void* from, std::uint32_t bytes, std::uint32_t barrier,
               Location location) {
  if (bytes % 16 != 0)
    fail(location, "a bulk copy of " + std::to_string(bytes) + " bytes, not a multiple of 16");
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
    fail(location, "a bulk copy from an address that is not aligned to 16");
  check_global_bytes(from, bytes, Access::kRead, location);
  start_load(to, bytes, barrier, location,
             [=](unsigned char* shared) { std::memcpy(shared + to, from, bytes); });
}

void tensor_store(const TensorMap& map, const int* at, int rank, std::uint32_t from, bool is_added,
                  Location location) {
  Cta& block = cta();
  check_box(map, rank, from, location);
  const auto place = coordinates(at, rank);
  check_global_rows(map, place, is_added ? Access::kAtomic : Access::kWrite, location);
  const int thread = block.thread().id;
  Storer& storer = copies().storers[thread];
  if (storer.actor < 0)
    storer.actor = block.races.add_actor("a tensor store of thread " + std::to_string(thread));
  const std::uint32_t bytes = box_bytes(map);
  block.check_shared(from, bytes, 16, location);
  if (auto race = block.races.access_async(
          from, bytes, {Races::Action::kRead, {thread, 1}, storer.actor, location}))
    fail(location, *race);
  auto store = std::make_shared<Store>();
  store->time = block.races.now();
  store->location = location;
  block.races.tick();
  storer.open.push_back(store);
  block.grid.counters.shared_bytes_loaded += bytes;

  const auto wake = [&block, &storer, thread] {
    if (std::exchange(storer.is_waiting, false)) block.wake(thread);
  };
  block.happen_later([=, &block] {
    const std::vector<unsigned char> taken(&block.shared[from], &block.shared[from] + bytes);
    store->has_read = true;
    wake();
    block.happen_later([=] {
      const std::size_t size = element_bytes(map), row_bytes = map.box[0] * size;
      std::vector<unsigned char> row_taken(row_bytes);
      for_each_row(map, place, [&](std::uint32_t index, const Row& row) {
        if (row.global == nullptr) return;
        for (std::size_t i = 0; i < row_bytes; i += 16) {
          const auto linear = static_cast<std::uint32_t>(from + index * row_bytes + i);
          std::memcpy(&row_taken[i], &taken[swizzled(linear, map.swizzle_span) - from], 16);
        }
        const unsigned char* first = &row_taken[row.first * size];
        if (is_added) {
          add_elements(map.element, row.global, first, row.last - row.first);
        } else {
          std::memcpy(row.global, first, (row.last - row.first) * size);
        }
      });
      store->has_written = true;
      wake();
    });
  });
}

void store_commit(Location) {
  Storer& storer = copies().storers[cta().thread().id];
  storer.groups.push_back(std::exchange(storer.open, {}));
}

void store_wait(int most_pending, bool is_for_reads, Location location) {
  Cta& block = cta();
  const int thread = block.thread().id;
  Storer& storer = copies().storers[thread];
  if (most_pending < 0) fail(location, "cp.async.bulk.wait_group needs a count of at least 0");
  const int count = static_cast<int>(storer.groups.size()) - most_pending;
  for (int group = 0; group < count; ++group) {
    for (const auto& store : storer.groups[group]) {
      while (!(is_for_reads ? store->has_read : store->has_written)) {
        storer.is_waiting = true;
        block.wait("cp.async.bulk.wait_group", location);
      }
      store->is_waited_for = true;
      block.races.observe(thread, storer.actor, store->time);
    }
  }
  if (!is_for_reads && count > 0)
    storer.groups.erase(storer.groups.begin(), storer.groups.begin() + count);
}

bool elect_one(Location location) {
  rendezvous(0xffffffff, "elect.sync", nullptr, nullptr, location);
  return lane_index() == cta().grid.leader_lane;
}

void check_copies_at_end(Cta& block, Thread& thread) {
  if (block.copies == nullptr) return;
  const auto found = block.copies->storers.find(thread.id);
  if (found == block.copies->storers.end()) return;
  Storer& storer = found->second;
  storer.groups.push_back(storer.open);
  for (const Stores& group : storer.groups) {
    for (const auto& store : group) {
      if (!store->is_waited_for)
        fail(store->location, "the thread ends without having waited until this store has read");
    }
  }
}

void check_copies_at_end(Cta& block) {
  if (block.copies == nullptr) return;
  for (const auto& [address, mbarrier] : block.copies->mbarriers) {
    if (mbarrier.landed + mbarrier.landed_unseen != 0 || mbarrier.pending_bytes != 0) {
      throw Error("block " + text(block.index) + " ends, and nobody has waited for the copies of " +
                  mbarrier.describe());
    }
  }
}

}  // namespace host_sim
