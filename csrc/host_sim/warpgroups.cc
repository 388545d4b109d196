// Instructions of four warps together: wgmma and setmaxnreg.
//
// A thread does not wait for the others when it starts a product. The product is computed when the
// last of the 128 threads has started it; what the threads see of it is NaN until they have waited.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>

#include "host_sim/cta.h"
#include "host_sim/floats.h"
#include "host_sim/hopper.h"

namespace host_sim {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64, kDepth = 16;

// Sums of products that follow each other, while they are under way.
struct Sums {
  explicit Sums(int columns) : columns(columns), values(kRows * columns) {}
  int columns;
  std::vector<float> values;  // [kRows, columns]
};

struct Product {
  WarpgroupProduct what;
  std::shared_ptr<Sums> sums;
  bool starts_sums;
  std::array<std::array<std::uint32_t, 4>, kThreads> a;  // if it comes from registers
  Races::Time started;                                   // by the first thread
  Races::Time time = 0;                                  // of its reads from shared memory
  bool is_done = false;
};

// What every thread of a warpgroup executes, in the same order.
struct Instruction {
  const char* name;
  Location location;
  int arrived = 0;
  std::shared_ptr<Product> product;
};

struct Warpgroup {
  int actor = -1;
  std::deque<Instruction> instructions;  // that not all threads have executed yet
  std::uint64_t first = 0;               // the number of the first of them
  std::vector<int> waiting;
};

// Registers that a fence has named, as they were then.
struct Fenced {
  unsigned char* begin;
  std::vector<unsigned char> content;
};

struct SumsInFlight {
  float* begin;  // this thread's
  std::shared_ptr<Sums> sums;
  std::uint64_t group;   // of the last product
  bool is_done = false;  // a wait has covered that group, and named other registers
  std::size_t bytes() const { return sums->columns * sizeof(float) / 2; }
};

struct AInFlight {
  const std::uint32_t* begin;
  std::array<std::uint32_t, 4> content;
  std::uint64_t group;
  Location location;
};

struct State {  // of a thread
  std::uint64_t next_instruction = 0;
  std::vector<Fenced> fenced;
  std::vector<SumsInFlight> sums;
  std::vector<AInFlight> a;
  std::shared_ptr<Product> last;  // that it has started; may be null
  Location last_location;
  std::deque<std::shared_ptr<Product>> groups;  // the last product of each that is under way
  std::uint64_t committed = 0, waited = 0;      // groups
};

}  // namespace

struct Warpgroups {
  std::vector<Warpgroup> all;
  std::vector<State> threads;
  std::vector<int> registers;  // by warp, of each thread
  int pool = 0;                // that no warp has
  struct Request {
    int warp, registers;
  };
  std::vector<Request> requests;
  std::vector<int> waiting;  // threads
};

namespace {

Warpgroups& warpgroups() {
  Cta& block = cta();
  if (block.warpgroups == nullptr) {
    const int threads = static_cast<int>(block.threads.size());
    block.warpgroups = std::make_shared<Warpgroups>();
    block.warpgroups->all.resize(threads / kThreads);
    block.warpgroups->threads.resize(threads);
    const int most = std::min(256, 65536 / threads / 8 * 8);
    const int given = block.grid.settings.registers;
    block.warpgroups->registers.assign(block.num_warps(), given == 0 ? most : given);
  }
  return *block.warpgroups;
}

// The calling thread executes an instruction of its warpgroup: it must be the one that the others
// have executed, or will.
Instruction& execute(const char* name, Location location) {
  Cta& block = cta();
  const int thread = block.thread().id;
  auto& all = warpgroups().all;
  if (thread / kThreads >= static_cast<int>(all.size())) {
    fail(location, std::string(name) + " needs a warpgroup: warps 4 i to 4 i + 3 of the block's " +
                       std::to_string(block.threads.size()) + " threads");
  }
  Warpgroup& warpgroup = all[thread / kThreads];
  const std::uint64_t index = warpgroups().threads[thread].next_instruction++ - warpgroup.first;
  if (index == warpgroup.instructions.size())
    warpgroup.instructions.push_back({name, location, 0, nullptr});
  Instruction& instruction = warpgroup.instructions[index];
  if (std::strcmp(instruction.name, name) != 0 || instruction.location.line != location.line ||
      std::strcmp(instruction.location.file, location.file) != 0) {
    fail(location, std::string("the warpgroup has diverged: this thread is in ") + name +
                       ", others in " + instruction.name + " at " + text(instruction.location));
  }
  ++instruction.arrived;
  return instruction;
}

void forget_executed(Warpgroup& warpgroup) {
  while (!warpgroup.instructions.empty() && warpgroup.instructions.front().arrived == kThreads) {
    warpgroup.instructions.pop_front();
    ++warpgroup.first;
  }
}

std::string describe(const Instruction& instruction) {
  return std::string(instruction.name) + " at " + text(instruction.location) + " by " +
         std::to_string(instruction.arrived) + " of the 128 threads of a warpgroup";
}

bool overlaps(const void* a, std::size_t a_bytes, const void* b, std::size_t b_bytes) {
  const auto x = reinterpret_cast<std::uintptr_t>(a), y = reinterpret_cast<std::uintptr_t>(b);
  return x < y + b_bytes && y < x + a_bytes;
}

// Arrays that stand for registers may be out of scope when they are looked at, which is one of the
// mistakes that the comparison finds.
#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address")))
#endif
bool is_same(const void* a, const void* b, std::size_t bytes) {
  const auto* x = static_cast<const volatile unsigned char*>(a);
  const auto* y = static_cast<const volatile unsigned char*>(b);
  for (std::size_t i = 0; i < bytes; ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

bool is_poison(const void* begin, std::size_t bytes) {
  const auto* x = static_cast<const unsigned char*>(begin);
  return std::all_of(x, x + bytes, [](unsigned char byte) { return byte == kPoison; });
}

void check_fenced(const State& state, const void* begin, std::size_t bytes, const char* what,
                  Location location) {
  for (const Fenced& fenced : state.fenced) {
    const auto offset = static_cast<const unsigned char*>(begin) - fenced.begin;
    if (offset < 0 || offset + bytes > fenced.content.size()) continue;
    if (is_same(begin, &fenced.content[offset], bytes)) return;
    fail(location, std::string(what) + " have changed since warpgroup_fence named them");
  }
  fail(location, std::string(what) + " have not been named by a warpgroup_fence since they were " +
                     "last used");
}

void forget_fenced(State& state, const void* begin, std::size_t bytes) {
  std::erase_if(state.fenced, [&](const Fenced& fenced) {
    return overlaps(fenced.begin, fenced.content.size(), begin, bytes);
  });
}

// ---- Operands in shared memory.

struct Descriptor {
  std::uint32_t start, leading, stride;
  int span;  // of the swizzle; 0: none

  explicit Descriptor(std::uint64_t bits)
      : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)) {
    constexpr int kSpans[] = {0, 128, 64, 32};
    span = kSpans[bits >> 62];
  }
  static std::uint32_t field(std::uint64_t bits, int from) {
    return static_cast<std::uint32_t>(bits >> from & 0x3fff) << 4;
  }

  // Where the 8 elements (mn, k) to (mn, k + 7) are, or, if MN-major, to (mn + 7, k).
  std::uint32_t chunk(int mn, int k, bool is_mn_major) const {
    std::uint32_t offset;
    if (span == 0) {
      offset = mn / 8 * stride + k / 8 * leading + (is_mn_major ? k % 8 : mn % 8) * 16;
    } else if (is_mn_major) {
      const int tile = span / 2;
      offset = mn / tile * leading + k / 8 * stride + k % 8 * span + mn % tile * 2;
    } else {
      offset = mn / 8 * stride + mn % 8 * span + k * 2;
    }
    const std::uint32_t address = start + offset;
    return address ^ (address >> 3 & (span == 0 ? 0 : span - 16));
  }
};

// to[mn, k] of an operand, or to[k, mn] if `is_k_first`.
void read_operand(std::uint64_t bits, bool is_mn_major, int size, const Product& product,
                  int warpgroup, bool is_k_first, float* to, Location location) {
  Cta& block = cta();
  const Descriptor descriptor(bits);
  if ((bits >> 49 & 7) != 0) fail(location, "a matrix descriptor with a base offset");
  if (descriptor.span != 0 && (descriptor.start & (descriptor.span * 8 - 128)) != 0) {
    fail(location, "the operand at shared address " + std::to_string(descriptor.start) +
                       " does not start in the first line of a swizzle's pattern, which repeats " +
                       "every " + std::to_string(8 * descriptor.span) + " bytes");
  }
  std::uint32_t addresses[256 * kDepth / 8];
  const int count = size * kDepth / 8;
  for (int i = 0; i < count; ++i) {
    const int mn = is_mn_major ? i % (size / 8) * 8 : i / 2;
    const int k = is_mn_major ? i / (size / 8) : i % 2 * 8;
    addresses[i] = descriptor.chunk(mn, k, is_mn_major);
    std::uint16_t elements[8];
    std::memcpy(elements, block.check_shared(addresses[i], 16, 16, location), 16);
    float* first = to + (is_k_first ? k * size + mn : mn * kDepth + k);
    const int step = is_k_first == is_mn_major ? 1 : is_k_first ? size : kDepth;
    for (int j = 0; j < 8; ++j) {
      first[j * step] =
          product.what.is_bfloat16 ? float_of_bfloat16(elements[j]) : float_of_float16(elements[j]);
    }
  }
  if (auto race = block.races.access_async(addresses, count, 16,
                                           {Races::Action::kRead,
                                            {warpgroup * kThreads, kThreads},
                                            warpgroups().all[warpgroup].actor,
                                            location,
                                            product.started}))
    fail(location, *race);
  block.grid.counters.shared_bytes_loaded += size * kDepth * 2;
  block.grid.counters.operand_bytes_loaded += size * kDepth * 2;
}

// sums[kRows, columns] += a[kRows, kDepth] b[kDepth, columns].
void multiply(float* sums, const float* a, const float* b, int columns) {
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < columns; column += 8) {
      auto* low = reinterpret_cast<Floats*>(sums + row * columns + column);
      Floats x = low[0], y = low[1];
      for (int k = 0; k < kDepth; ++k) {
        const float factor = a[row * kDepth + k];
        const auto* from = reinterpret_cast<const Floats*>(b + k * columns + column);
        x += factor * from[0];
        y += factor * from[1];
      }
      low[0] = x;
      low[1] = y;
    }
  }
}

// Thread i of a warpgroup holds rows row_of(i) and row_of(i) + 8, and of each 8 columns
// column_of(i) and the next.
int row_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
int column_of(int thread) { return thread % 4 * 2; }

void compute(Product& product, int warpgroup, Location location) {
  Cta& block = cta();
  const WarpgroupProduct& what = product.what;
  static thread_local float a[kRows * kDepth], b[kDepth * 256];
  product.time = block.races.now();
  if (what.a_registers == nullptr) {
    read_operand(what.a, what.is_a_mn_major, kRows, product, warpgroup, false, a, location);
  } else {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<std::uint16_t>(product.a[thread][i / 2] >> (i % 2 * 16));
        const int row = row_of(thread) + i / 2 % 2 * 8;
        const int column = column_of(thread) + i / 4 * 8 + i % 2;
        a[row * kDepth + column] =
            what.is_bfloat16 ? float_of_bfloat16(bits) : float_of_float16(bits);
      }
    }
  }
  read_operand(what.b, what.is_b_mn_major, what.columns, product, warpgroup, true, b, location);
  block.races.tick();
  auto& values = product.sums->values;
  if (!what.accumulates) std::fill(values.begin(), values.end(), 0.0f);
  multiply(values.data(), a, b, what.columns);
  ++counters().matrix_instructions;
  counters().matrix_flops += 2ull * kRows * kDepth * what.columns;
  product.is_done = true;
}

float* element(Sums& sums, int thread, int i) {
  const int row = row_of(thread) + i / 2 % 2 * 8;
  const int column = i / 4 * 8 + column_of(thread) + i % 2;
  return &sums.values[row * sums.columns + column];
}

void check_same(const WarpgroupProduct& ours, const WarpgroupProduct& others, Location location) {
  if (ours.a != others.a || ours.b != others.b || ours.columns != others.columns ||
      ours.accumulates != others.accumulates) {
    fail(location,
         "the threads of a warpgroup start different products: their descriptors, "
         "columns or accumulation differ");
  }
}

}  // namespace

void warpgroup_fence(std::initializer_list<Registers> registers, Location location) {
  Cta& block = cta();
  execute("wgmma.fence", location);
  State& state = warpgroups().threads[block.thread().id];
  for (const Registers& named : registers) {
    if (named.bytes == 0) continue;
    for (const SumsInFlight& flying : state.sums) {
      if (overlaps(named.begin, named.bytes, flying.begin, flying.bytes()))
        fail(location, "a fence for sums that are under way: no warpgroup_wait has named them");
    }
    forget_fenced(state, named.begin, named.bytes);
    auto* begin = static_cast<unsigned char*>(named.begin);
    state.fenced.push_back({begin, {begin, begin + named.bytes}});
  }
  forget_executed(warpgroups().all[block.thread().id / kThreads]);
}

void warpgroup_multiply(const WarpgroupProduct& what, Location location) {
  Cta& block = cta();
  const int id = block.thread().id, in_group = id % kThreads;
  Instruction& instruction = execute("wgmma.mma_async", location);
  Warpgroup& warpgroup = warpgroups().all[id / kThreads];
  State& state = warpgroups().threads[id];
  if (warpgroup.actor < 0) {
    warpgroup.actor =
        block.races.add_actor("the products of warpgroup " + std::to_string(id / kThreads));
  }
  const std::size_t bytes = what.columns * sizeof(float) / 2;
  SumsInFlight* flying = nullptr;
  for (SumsInFlight& other : state.sums) {
    if (!overlaps(what.sums, bytes, other.begin, other.bytes())) continue;
    if (other.begin != what.sums || other.sums->columns != what.columns)
      fail(location, "the sums overlap those of a product of another shape that is under way");
    flying = &other;
  }
  if (instruction.product == nullptr) {
    instruction.product = std::make_shared<Product>();
    Product& product = *instruction.product;
    product.what = what;
    product.starts_sums = flying == nullptr;
    product.sums = flying ? flying->sums : std::make_shared<Sums>(what.columns);
    product.started = block.races.now();
    block.races.tick();
  }
  Product& product = *instruction.product;
  check_same(what, product.what, location);
  if (flying == nullptr) {
    if (!product.starts_sums) fail(location, "other threads' sums are under way, this one's not");
    check_fenced(state, what.sums, bytes, "the registers of the sums", location);
    for (int i = 0; what.accumulates && i < what.columns / 2; ++i)
      *element(*product.sums, in_group, i) = what.sums[i];
    std::memset(what.sums, kPoison, bytes);
    state.sums.push_back({what.sums, product.sums, state.committed});
  } else {
    if (flying->sums != product.sums)
      fail(location, "other threads' sums are under way, or others than this one's");
    flying->group = state.committed;
    flying->is_done = false;
  }
  if (what.a_registers != nullptr) {
    check_fenced(state, what.a_registers, 16, "the registers of a", location);
    std::copy_n(what.a_registers, 4, product.a[in_group].begin());
    state.a.push_back({what.a_registers, product.a[in_group], state.committed, location});
  }
  state.last = instruction.product;
  state.last_location = location;
  if (instruction.arrived == kThreads) {
    compute(product, id / kThreads, location);
    for (int thread : std::exchange(warpgroup.waiting, {})) block.wake(thread);
  }
  forget_executed(warpgroup);
}

void warpgroup_commit(Location location) {
  const int id = cta().thread().id;
  execute("wgmma.commit_group", location);
  State& state = warpgroups().threads[id];
  state.groups.push_back(state.last);
  ++state.committed;
  forget_executed(warpgroups().all[id / kThreads]);
}

void warpgroup_wait(int most_pending, std::initializer_list<Registers> registers,
                    Location location) {
  Cta& block = cta();
  const int id = block.thread().id;
  execute("wgmma.wait_group", location);
  Warpgroup& warpgroup = warpgroups().all[id / kThreads];
  State& state = warpgroups().threads[id];
  forget_executed(warpgroup);
  while (static_cast<int>(state.groups.size()) > most_pending) {
    // Not a shared pointer: if another thread fails, this stack is never unwound.
    const Product* last = state.groups.front().get();
    while (last != nullptr && !last->is_done) {
      warpgroup.waiting.push_back(id);
      block.wait("wgmma.wait_group", location,
                 [&warpgroup] { return describe(warpgroup.instructions.front()); });
    }
    if (last != nullptr) block.races.observe(id, warpgroup.actor, last->time);
    state.groups.pop_front();
    ++state.waited;
  }
  std::erase_if(state.a, [&](const AInFlight& a) {
    if (a.group >= state.waited) return false;
    if (!is_same(a.begin, a.content.data(), 16))
      fail(a.location, "the registers of a have changed while the product was under way");
    return true;
  });
  for (SumsInFlight& flying : state.sums) flying.is_done = flying.group < state.waited;
  for (const Registers& named : registers) {
    std::erase_if(state.sums, [&](const SumsInFlight& flying) {
      if (!overlaps(named.begin, named.bytes, flying.begin, flying.bytes())) return false;
      if (!flying.is_done) fail(location, "a wait that names sums which it does not wait for");
      if (!is_poison(flying.begin, flying.bytes()))
        fail(location, "the registers of the sums have changed while the products were under way");
      for (int i = 0; i < flying.sums->columns / 2; ++i)
        flying.begin[i] = *element(*flying.sums, id % kThreads, i);
      forget_fenced(state, flying.begin, flying.bytes());
      return true;
    });
  }
}

// ---- setmaxnreg.

namespace {

struct RegisterCall {
  int count;
  bool is_increase;
};

// Gives warps what they ask for, as far as the pool goes.
void serve_requests(Warpgroups& all) {
  std::erase_if(all.requests, [&](const Warpgroups::Request& request) {
    const int needed = (request.registers - all.registers[request.warp]) * kWarpSize;
    if (needed > all.pool) return false;
    all.pool -= needed;
    all.registers[request.warp] = request.registers;
    return true;
  });
  for (int thread : std::exchange(all.waiting, {})) cta().wake(thread);
}

}  // namespace

void set_registers(int count, bool is_increase, Location location) {
  Cta& block = cta();
  const char* name = is_increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  const int id = block.thread().id, warp = block.thread().warp();
  if (count < 24 || count > 256 || count % 8 != 0) {
    fail(location, std::string(name) + " to " + std::to_string(count) +
                       " registers; it must be 24 to 256, a multiple of 8");
  }
  execute(name, location);
  Warpgroups& all = warpgroups();
  forget_executed(all.all[id / kThreads]);
  if (is_increase ? count < all.registers[warp] : count > all.registers[warp]) {
    fail(location, std::string(name) + " to " + std::to_string(count) + " registers, of " +
                       std::to_string(all.registers[warp]));
  }
  RegisterCall call{count, is_increase};
  rendezvous(
      0xffffffff, name, &call,
      [](void* const* slots) {
        const auto& call = *static_cast<const RegisterCall*>(slots[0]);
        Warpgroups& all = warpgroups();
        const int warp = cta().thread().warp();
        if (call.is_increase) {
          all.requests.push_back({warp, call.count});
        } else {
          all.pool += (all.registers[warp] - call.count) * kWarpSize;
          all.registers[warp] = call.count;
        }
        serve_requests(all);
      },
      location);
  while (all.registers[warp] != count) {
    all.waiting.push_back(id);
    block.wait(name, location, [&all, warp, count] {
      return "from " + std::to_string(all.registers[warp]) + " to " + std::to_string(count) +
             " registers for 32 threads, of " + std::to_string(all.pool) + " that are free";
    });
  }
}

void check_warpgroups_at_end(Cta& block, Thread& thread) {
  if (block.warpgroups == nullptr) return;
  const State& state = block.warpgroups->threads[thread.id];
  for (const SumsInFlight& flying : state.sums) {
    if (!flying.is_done)
      fail(state.last_location, "the thread ends before its products have been waited for");
  }
}

void check_warpgroups_at_end(Cta& block) {
  if (block.warpgroups == nullptr) return;
  for (const Warpgroup& warpgroup : block.warpgroups->all) {
    if (!warpgroup.instructions.empty()) {
      throw Error("block " + text(block.index) + " ends with " +
                  describe(warpgroup.instructions.front()));
    }
  }
}

}  // namespace host_sim
