// Instructions of compute capability 9.0a against the PTX manual, and what the simulator punishes.
#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "host_sim/tests/test.h"
#include "sm90/ptx.cuh"

namespace ptx = sparse_attn::ptx;
using host_sim::Buffer;
using ptx::BFloat16;
using ptx::Float16;
using ptx::Major;
using sparse_attn::make_tensor_map;
using sparse_attn::Swizzle;
using sparse_attn::TensorMap;

namespace {

using Buffers = std::vector<Buffer>;

host_sim::Counters run(unsigned threads, std::size_t shared_bytes,
                       const std::function<void()>& kernel, const Buffers& buffers = {},
                       std::uint64_t seed = 0) {
  return host_sim::launch({}, {threads}, {.seed = seed, .shared_bytes = shared_bytes}, buffers,
                          kernel);
}

template <class T>
Buffer input(const std::vector<T>& x) {
  return {x.data(), x.size() * sizeof(T), false, "x"};
}
template <class T>
Buffer output(const std::vector<T>& y) {
  return {y.data(), y.size() * sizeof(T), true, "y"};
}

int thread() { return static_cast<int>(threadIdx.x); }

template <class T>
std::uint16_t bits_of(float x) {
  return static_cast<std::uint16_t>(ptx::pack<T>(x, 0));
}

// Random values of T, which all of them hold exactly: sums of products of a few are exact too.
template <class T>
std::vector<std::uint16_t> small_integers(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::uint16_t> x(n);
  for (auto& value : x) value = bits_of<T>(static_cast<float>(static_cast<int>(random() % 17) - 8));
  return x;
}

template <class T>
float value_of(std::uint16_t bits) {
  return ptx::to_float(T{bits});
}

std::vector<std::uint16_t> counted(std::size_t n) {
  std::vector<std::uint16_t> x(n);
  std::iota(x.begin(), x.end(), 1);
  return x;
}

// One mbarrier at `address`, made by thread 0 and known to all.
void make_mbarrier(std::uint32_t address, int arrivals) {
  if (thread() == 0) {
    ptx::mbarrier_init(address, arrivals);
    ptx::mbarrier_init_fence();
  }
  if (blockDim.x > 1) ptx::sync_threads();
}

template <int kRank>
void load_and_wait(std::uint32_t to, const TensorMap& map, const int (&at)[kRank],
                   std::uint32_t bytes, std::uint32_t mbarrier) {
  make_mbarrier(mbarrier, 1);
  if (thread() == 0) {
    ptx::mbarrier_arrive_expect(mbarrier, bytes);
    ptx::tensor_load(to, map, at, mbarrier);
  }
  ptx::mbarrier_wait(mbarrier, 0);
}

}  // namespace

// ---- mbarrier.

TEST(phase_ends_when_all_have_arrived) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    int arrived = 0;
    run(
        64, 8,
        [&] {
          make_mbarrier(0, 64);
          for (std::uint32_t phase = 0; phase < 4; ++phase) {
            ++arrived;
            ptx::mbarrier_arrive(0);
            ptx::mbarrier_wait(0, phase % 2);
            CHECK(arrived >= 64 * static_cast<int>(phase + 1));
          }
        },
        {}, seed);
    CHECK(arrived == 256);
  }
}

// "The integer parity of either the current phase or the immediately preceding phase": of the
// preceding phase it is true, at the start that of phase -1, and of phases before it is the wrong
// answer.
TEST(parity_is_that_of_the_current_phase_or_the_one_before) {
  run(1, 8, [] {
    make_mbarrier(0, 1);
    ptx::mbarrier_wait(0, 1);
    ptx::mbarrier_arrive(0);
    ptx::mbarrier_wait(0, 0);
    ptx::mbarrier_arrive(0);
    ptx::mbarrier_wait(0, 1);
    ptx::mbarrier_wait(0, 1);  // the same again
    ptx::mbarrier_arrive(0);
    ptx::mbarrier_wait(0, 0);  // phase 2, or phase 0
  });
  for (std::uint32_t arrivals : {0u, 1u, 2u}) {
    check_error("deadlock", [=] {
      run(1, 8, [=] {
        make_mbarrier(0, 1);
        for (std::uint32_t i = 0; i < arrivals; ++i) {
          ptx::mbarrier_arrive(0);
          ptx::mbarrier_wait(0, i % 2);
        }
        ptx::mbarrier_wait(0, arrivals % 2);
      });
    });
  }
  check_error("a parity is 0 or 1", [] {
    run(1, 8, [] {
      make_mbarrier(0, 1);
      ptx::mbarrier_wait(0, 2);
    });
  });
}

TEST(deadlock_names_the_mbarrier) {
  const std::vector<std::uint16_t> x(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  const auto kernel = [&](std::uint32_t expected, int arrivals) {
    return [&, expected, arrivals] {
      make_mbarrier(256, arrivals);
      if (thread() == 0) {
        ptx::mbarrier_arrive_expect(256, expected);
        ptx::tensor_load(0, map, {0, 0}, 256);
      }
      ptx::mbarrier_wait(256, 0);
    };
  };
  run(32, 264, kernel(128, 1), {input(x)});
  check_error("mbarrier 256", [&] { run(32, 264, kernel(256, 1), {input(x)}); });
  check_error("32 threads (first: 0) waits in mbarrier.try_wait",
              [&] { run(32, 264, kernel(256, 1), {input(x)}); });
  check_error("phase 0 has 0 of 1 arrivals and 128 bytes pending",
              [&] { run(32, 264, kernel(256, 1), {input(x)}); });
  check_error("phase 0 has 0 of 1 arrivals and -64 bytes pending",
              [&] { run(32, 264, kernel(64, 1), {input(x)}); });
  check_error("phase 0 has 2 of 3 arrivals and 0 bytes pending",
              [&] { run(32, 264, kernel(128, 3), {input(x)}); });
}

TEST(mbarrier_that_is_not_initialised) {
  check_error("no mbarrier has been initialised",
              [] { run(1, 8, [] { ptx::mbarrier_arrive(0); }); });
  check_error("no mbarrier has been initialised",
              [] { run(1, 8, [] { ptx::mbarrier_wait(0, 1); }); });
  check_error("1 to 2^20 - 1", [] { run(1, 8, [] { ptx::mbarrier_init(0, 0); }); });
  check_error("1 to 2^20 - 1", [] { run(1, 8, [] { ptx::mbarrier_init(0, 1 << 20); }); });
  check_error("not aligned", [] { run(1, 16, [] { ptx::mbarrier_init(4, 1); }); });
}

TEST(mbarrier_that_is_not_visible_yet) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    check_error("initialis", [=] {
      run(
          64, 8,
          [] {
            if (thread() == 0) ptx::mbarrier_init(0, 2);
            ptx::sync_warp();
            if (thread() == 32) ptx::mbarrier_arrive(0);
          },
          {}, seed);
    });
  }
  // Without a barrier even of the warp, the other lanes do not know of it.
  check_error("nothing orders it after the initialisation", [] {
    run(32, 8, [] {
      if (thread() == 0) ptx::mbarrier_init(0, 32);
      ptx::shuffle(0, 0);
      ptx::mbarrier_arrive(0);
    });
  });
  const std::vector<std::uint16_t> x(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  check_error("needs mbarrier_init_fence", [&] {
    run(1, 264,
        [&] {
          ptx::mbarrier_init(256, 1);
          ptx::tensor_load(0, map, {0, 0}, 256);
        },
        {input(x)});
  });
}

TEST(mbarrier_is_fenced_by_the_thread_that_made_it) {
  const std::vector<std::uint16_t> x(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  const auto kernel = [&](int fencer) {
    return [&, fencer] {
      if (thread() == 0) ptx::mbarrier_init(256, 1);
      ptx::sync_warp();
      if (thread() == fencer) ptx::mbarrier_init_fence();
      ptx::sync_warp();
      if (thread() == 1) {
        ptx::mbarrier_arrive_expect(256, 128);
        ptx::tensor_load(0, map, {0, 0}, 256);
        ptx::mbarrier_wait(256, 0);
      }
    };
  };
  run(32, 264, kernel(0), {input(x)});
  check_error("needs mbarrier_init_fence", [&] { run(32, 264, kernel(1), {input(x)}); });
}

TEST(mbarrier_is_no_other_memory) {
  check_error("belongs to an mbarrier", [] {
    run(1, 8, [] {
      ptx::mbarrier_init(0, 1);
      ptx::load_shared<std::uint32_t>(4);
    });
  });
  check_error("belongs to an mbarrier", [] {
    run(1, 8, [] {
      ptx::mbarrier_init(0, 1);
      ptx::mbarrier_init(0, 1);
    });
  });
}

// "At least one test_wait or try_wait operation must be performed which returns True before an
// arrive-on operation in the subsequent phase."
TEST(arrival_in_a_phase_after_one_that_nobody_has_seen_end) {
  check_error("before any thread has waited for the phase before", [] {
    run(1, 8, [] {
      make_mbarrier(0, 1);
      ptx::mbarrier_arrive(0);
      ptx::mbarrier_arrive(0);
    });
  });
}

TEST(more_arrivals_than_expected) {
  const std::vector<std::uint16_t> x(64);
  check_error("one arrival too many", [&] {
    run(1, 264, [] {
      make_mbarrier(256, 1);
      ptx::mbarrier_arrive_expect(256, 128);
      ptx::mbarrier_arrive(256);
    });
  });
}

TEST(more_bytes_than_an_mbarrier_counts) {
  check_error("more than 2^20 - 1 bytes", [] {
    run(1, 8, [] {
      make_mbarrier(0, 1);
      ptx::mbarrier_arrive_expect(0, 1 << 20);
    });
  });
}

TEST(arrival_releases_and_wait_acquires) {
  // Thread 0 writes and arrives; the others wait and read.
  const auto kernel = [](bool writes_late, bool all_wait) {
    return [=] {
      make_mbarrier(0, 1);
      if (thread() == 0) {
        if (!writes_late) ptx::store_shared(8, 5);
        ptx::mbarrier_arrive(0);
        if (writes_late) ptx::store_shared(8, 5);
      }
      if (all_wait || thread() == 1) ptx::mbarrier_wait(0, 0);
      if (thread() > 0) ptx::load_shared<int>(8);
      ptx::sync_threads();
    };
  };
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    run(64, 16, kernel(false, true), {}, seed);
    check_error("nothing orders", [&] { run(64, 16, kernel(true, true), {}, seed); });
    // A wait counts for the thread that waits, also among the lanes of a warp.
    check_error("nothing orders", [&] { run(64, 16, kernel(false, false), {}, seed); });
  }
}

TEST(arrival_covers_nothing_after_it) {
  // Thread 0 arrives first, and its phase ends later.
  const auto kernel = [](bool writes_late) {
    return [=] {
      make_mbarrier(0, 2);
      if (thread() == 0) {
        if (!writes_late) ptx::store_shared(8, 1);
        ptx::mbarrier_arrive(0);
        if (writes_late) ptx::store_shared(8, 1);
      }
      ptx::shuffle(0, 0);
      if (thread() == 1) ptx::mbarrier_arrive(0);
      if (thread() == 2) {
        ptx::mbarrier_wait(0, 0);
        ptx::load_shared<int>(8);
      }
    };
  };
  run(32, 16, kernel(false));
  check_error("nothing orders", [&] { run(32, 16, kernel(true)); });
}

TEST(wait_does_not_acquire_the_current_phase) {
  const auto kernel = [](std::uint32_t parity) {
    return [=] {
      make_mbarrier(0, 2);
      if (thread() < 2) ptx::mbarrier_arrive(0);
      if (thread() == 0) ptx::mbarrier_wait(0, 0);
      ptx::shuffle(0, 0);
      if (thread() == 1) ptx::store_shared(8, 1);
      if (thread() == 1 || (thread() == 0 && parity == 1)) ptx::mbarrier_arrive(0);
      ptx::shuffle(0, 0);
      if (thread() == 2) {
        ptx::mbarrier_wait(0, parity);
        ptx::load_shared<int>(8);
      }
    };
  };
  run(32, 16, kernel(1));  // both arrive, and phase 1 ends
  check_error("nothing orders", [&] { run(32, 16, kernel(0)); });
}

// ---- Tensor copies.

TEST(tensor_map_that_the_encoder_refuses) {
  const std::vector<std::uint16_t> x(1024);
  const auto make = [&](std::size_t offset, std::uint64_t size, std::uint64_t stride,
                        std::uint32_t inner, std::uint32_t outer, Swizzle swizzle) {
    return make_tensor_map<Float16, 2>(x.data() + offset, {size, 4}, {stride}, {inner, outer},
                                       swizzle);
  };
  make(0, 64, 128, 64, 4, Swizzle::k128);
  check_error("the array is not aligned to 16", [&] { make(4, 64, 128, 64, 4, Swizzle::k128); });
  check_error("the size of dimension 0", [&] { make(0, 0, 128, 64, 4, Swizzle::k128); });
  check_error("the size of dimension 0",
              [&] { make(0, (1ull << 32) + 1, 128, 64, 4, Swizzle::k128); });
  check_error("the stride of dimension 1", [&] { make(0, 64, 136, 64, 4, Swizzle::k128); });
  check_error("the stride of dimension 1", [&] { make(0, 64, 1ull << 40, 64, 4, Swizzle::k128); });
  check_error("the box of dimension 1", [&] { make(0, 64, 128, 64, 257, Swizzle::k128); });
  check_error("the box of dimension 1", [&] { make(0, 64, 128, 64, 0, Swizzle::k128); });
  check_error("a multiple of 16", [&] { make(0, 64, 128, 12, 4, Swizzle::kNone); });
  make(0, 64, 128, 64, 4, Swizzle::kNone);
  for (const auto& [swizzle, elements] :
       {std::pair{Swizzle::k32, 16u}, std::pair{Swizzle::k64, 32u},
        std::pair{Swizzle::k128, 64u}}) {
    make(0, 64, 128, elements, 4, swizzle);
    for (std::uint32_t other : {elements / 2, elements + 8}) {
      check_error("the swizzle's " + std::to_string(2 * elements),
                  [&] { make(0, 64, 128, other, 4, swizzle); });
    }
  }
}

// Elements count through the array; the box hangs over its end in each dimension in turn.
template <int kRank>
static void check_load(const std::array<int, kRank>& start) {
  const std::array<int, 5> shape{24, 3, 4, 2, 3}, box{16, 2, 3, 2, 2};
  std::size_t elements = 1, copied = 1;
  std::uint64_t sizes[kRank], strides[kRank - 1];
  std::uint32_t boxes[kRank];
  int at[kRank];
  for (int d = 0; d < kRank; ++d) {
    sizes[d] = shape[d];
    boxes[d] = box[d];
    at[d] = start[d];
    elements *= shape[d];
    copied *= box[d];
    if (d + 1 < kRank) strides[d] = 2 * elements;
  }
  const auto x = counted(elements);
  const auto map = make_tensor_map<Float16, kRank>(x.data(), sizes, strides, boxes, Swizzle::kNone);
  std::size_t existing = 0;
  const auto counters =
      run(32, 4096,
          [&] {
            load_and_wait<kRank>(0, map, at, static_cast<std::uint32_t>(2 * copied), 4088);
            if (thread() != 0) return;
            for (std::size_t i = 0; i < copied; ++i) {
              std::size_t rest = i, from = 0, stride = 1;
              bool exists = true;
              for (int d = 0; d < kRank; ++d) {
                const int place = at[d] + static_cast<int>(rest % box[d]);
                rest /= box[d];
                exists = exists && place >= 0 && place < shape[d];
                from += place * stride;
                stride *= shape[d];
              }
              const auto found = ptx::load_shared<std::uint16_t>(static_cast<std::uint32_t>(2 * i));
              CHECK(found == (exists ? x[from] : 0));
              existing += exists;
            }
          },
          {input(x)});
  CHECK(existing > 0 && counters.global_bytes_loaded == 2 * existing);
}

TEST(load_of_two_dimensions) {
  check_load<2>({0, 0});
  check_load<2>({8, 1});
  check_load<2>({9, 2});
  check_load<2>({-15, -1});
}
TEST(load_of_three_dimensions) {
  check_load<3>({0, 0, 0});
  check_load<3>({3, 1, 2});
  check_load<3>({-1, -1, -2});
}
TEST(load_of_four_dimensions) {
  check_load<4>({8, 1, 1, 0});
  check_load<4>({23, 2, 3, 1});
  check_load<4>({-3, 1, -1, -1});
}
TEST(load_of_five_dimensions) {
  check_load<5>({8, 1, 1, 0, 1});
  check_load<5>({20, 2, 3, 1, 2});
  check_load<5>({-3, 1, -1, -1, -1});
}

TEST(load_of_nothing_that_exists) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 4}, Swizzle::kNone);
  for (int far : {8, -4, INT32_MAX, INT32_MIN}) {
    const auto counters = run(1, 136,
                              [&] {
                                load_and_wait<2>(0, map, {0, far}, 64, 128);
                                for (std::uint32_t i = 0; i < 64; i += 4)
                                  CHECK(ptx::load_shared<int>(i) == 0);
                              },
                              {input(x)});
    CHECK(counters.global_bytes_loaded == 0 && counters.shared_bytes_stored == 64 + 8);
  }
}

TEST(load_of_padded_rows) {
  const auto x = counted(4 * 16);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 4}, {32}, {8, 4}, Swizzle::kNone);
  run(1, 136,
      [&] {
        load_and_wait<2>(0, map, {0, 0}, 64, 128);
        for (int row = 0; row < 4; ++row)
          CHECK(ptx::load_shared<std::uint16_t>(16 * row) == x[16 * row]);
      },
      {input(x)});
}

// The tables of the section "Swizzling Modes": which 16 bytes of a line of 128 lie where, line by
// line, until the pattern repeats.
static const std::vector<std::array<int, 8>> kSwizzle32 = {{0, 1, 2, 3, 4, 5, 6, 7},
                                                           {1, 0, 3, 2, 5, 4, 7, 6}};
static const std::vector<std::array<int, 8>> kSwizzle64 = {{0, 1, 2, 3, 4, 5, 6, 7},
                                                           {1, 0, 3, 2, 5, 4, 7, 6},
                                                           {2, 3, 0, 1, 6, 7, 4, 5},
                                                           {3, 2, 1, 0, 7, 6, 5, 4}};
static const std::vector<std::array<int, 8>> kSwizzle128 = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
    {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
    {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};

static void check_swizzle(Swizzle swizzle, int span,
                          const std::vector<std::array<int, 8>>& pattern) {
  const auto x = counted(2048 / 2);
  const auto width = static_cast<std::uint32_t>(span / 2), rows = 1024 / width;
  const auto map =
      make_tensor_map<Float16, 2>(x.data(), {width, rows}, {2 * width}, {width, rows}, swizzle);
  std::vector<std::uint16_t> y(x.size());
  const auto back =
      make_tensor_map<Float16, 2>(y.data(), {width, rows}, {2 * width}, {width, rows}, swizzle);
  const std::uint32_t to = sparse_attn::swizzle_period(swizzle);
  CHECK(to == 128 * pattern.size());
  run(1, 4096,
      [&] {
        load_and_wait<2>(to, map, {0, 0}, 2048, 4088);
        for (int line = 0; line < 16; ++line) {
          for (int place = 0; place < 8; ++place) {
            const int chunk = 8 * line + pattern[line % pattern.size()][place];
            CHECK(ptx::load_shared<std::uint16_t>(to + 128 * line + 16 * place) == x[8 * chunk]);
            CHECK(ptx::load_shared<std::uint16_t>(to + 128 * line + 16 * place + 14) ==
                  x[8 * chunk + 7]);
          }
        }
        ptx::tensor_store(back, {0, 0}, to);
        ptx::store_commit();
        ptx::store_wait<0>();
      },
      {input(x), output(y)});
  CHECK(y == x);
  for (std::uint32_t other : {to + 16, to + to / 2}) {
    if (other % to == 0) continue;
    check_error("is not aligned", [&] {
      run(1, 4096, [&] { load_and_wait<2>(other, map, {0, 0}, 2048, 4088); }, {input(x)});
    });
  }
}

TEST(swizzle_of_32_bytes) { check_swizzle(Swizzle::k32, 32, kSwizzle32); }
TEST(swizzle_of_64_bytes) { check_swizzle(Swizzle::k64, 64, kSwizzle64); }
TEST(swizzle_of_128_bytes) { check_swizzle(Swizzle::k128, 128, kSwizzle128); }

TEST(copy_without_swizzle_is_aligned_to_128_bytes) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 4}, Swizzle::kNone);
  run(1, 512, [&] { load_and_wait<2>(384, map, {0, 0}, 64, 504); }, {input(x)});
  check_error("is not aligned to the 128 bytes", [&] {
    run(1, 512, [&] { load_and_wait<2>(64, map, {0, 0}, 64, 504); }, {input(x)});
  });
}

TEST(load_outside_of_memory) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 9}, {16}, {8, 8}, Swizzle::kNone);
  check_error("outside of all arrays", [&] {
    run(1, 264, [&] { load_and_wait<2>(0, map, {0, 2}, 128, 256); }, {input(x)});
  });
  check_error("the block has 264", [&] {
    run(1, 264, [&] { load_and_wait<2>(256, map, {0, 0}, 128, 0); }, {input(x)});
  });
  check_error("2 dimensions, and there are 3", [&] {
    run(1, 264, [&] { load_and_wait<3>(0, map, {0, 0, 0}, 128, 256); }, {input(x)});
  });
}

TEST(bulk_load_copies_bytes) {
  const auto x = counted(64);
  const auto load = [&](std::uint32_t to, int from, std::uint32_t bytes) {
    return run(32, 136,
               [&] {
                 make_mbarrier(128, 1);
                 if (thread() == 0) {
                   ptx::mbarrier_arrive_expect(128, bytes);
                   ptx::bulk_load(to, &x[from], bytes, 128);
                 }
                 ptx::mbarrier_wait(128, 0);
                 for (std::uint32_t i = 0; i < bytes; i += 2)
                   CHECK(ptx::load_shared<std::uint16_t>(to + i) == x[from + i / 2]);
               },
               {input(x)});
  };
  CHECK(load(16, 8, 48).global_bytes_loaded == 48);
  check_error("not a multiple of 16", [&] { load(16, 8, 40); });
  check_error("not aligned to 16", [&] { load(8, 8, 48); });
  check_error("not aligned to 16", [&] { load(16, 4, 48); });
  check_error("outside of all arrays", [&] { load(0, 8, 128); });
}

TEST(loaded_bytes_need_a_wait_by_the_reader) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  int found = 0;
  // Thread 0 loads; those that `waits` picks wait, and thread `reader` reads.
  const auto kernel = [&](auto waits, int reader, bool has_barrier) {
    return [&, waits, reader, has_barrier] {
      make_mbarrier(256, 1);
      if (thread() == 0) {
        ptx::mbarrier_arrive_expect(256, 128);
        ptx::tensor_load(0, map, {0, 0}, 256);
      }
      if (waits(thread())) ptx::mbarrier_wait(256, 0);
      if (has_barrier) ptx::sync_threads();
      if (thread() == reader) found = ptx::load_shared<std::uint16_t>(2);
      ptx::mbarrier_wait(256, 0);
    };
  };
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    const auto check = [&](auto waits, int reader, bool has_barrier) {
      run(64, 264, kernel(waits, reader, has_barrier), {input(x)}, seed);
      CHECK(found == 2);
    };
    for (int reader : {0, 1, 40}) {
      check([=](int thread) { return thread == reader; }, reader, false);
      // Another thread's wait, and a barrier after it, do as well.
      check([=](int thread) { return thread == 63; }, reader, true);
      check_error("shared address",
                  [&] { check([=](int thread) { return thread == 63; }, reader, false); });
      check_error("shared address", [&] { check([=](int) { return false; }, reader, true); });
    }
  }
}

TEST(loaded_bytes_may_not_be_written_before_the_wait) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    check_error("shared address", [&] {
      run(
          64, 264,
          [&] {
            make_mbarrier(256, 1);
            if (thread() == 0) {
              ptx::mbarrier_arrive_expect(256, 128);
              ptx::tensor_load(0, map, {0, 0}, 256);
            }
            if (thread() == 32) ptx::store_shared(124, 0);
            ptx::mbarrier_wait(256, 0);
          },
          {input(x)}, seed);
    });
  }
}

TEST(two_copies_of_two_mbarriers) {
  // A wait for one does not cover the other, whichever lands first.
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    const auto kernel = [&](std::uint32_t waited, std::uint32_t read) {
      run(
          1, 272,
          [&] {
            make_mbarrier(256, 1);
            make_mbarrier(264, 1);
            for (std::uint32_t i = 0; i < 2; ++i) {
              ptx::mbarrier_arrive_expect(256 + 8 * i, 128);
              ptx::tensor_load(128 * i, map, {0, 0}, 256 + 8 * i);
            }
            ptx::mbarrier_wait(256 + 8 * waited, 0);
            ptx::load_shared<int>(128 * read);
            ptx::mbarrier_wait(264 - 8 * waited, 0);
          },
          {input(x)}, seed);
    };
    kernel(0, 0);
    kernel(1, 1);
    check_error("shared address", [&] { kernel(0, 1); });
    check_error("shared address", [&] { kernel(1, 0); });
  }
}

// A ring of one stage: a producer in warp 0, consumers in warp 1.
TEST(copy_over_what_others_still_read) {
  const auto x = counted(80);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 10}, {16}, {8, 8}, Swizzle::kNone);
  int wrong = 0;
  const auto kernel = [&](bool arrives_early, bool producer_waits) {
    return [&, arrives_early, producer_waits] {
      const std::uint32_t full = 256, empty = 264;
      make_mbarrier(full, 1);
      make_mbarrier(empty, 32);
      for (std::uint32_t i = 0; i < 3; ++i) {
        if (thread() == 0) {
          if (producer_waits) ptx::mbarrier_wait(empty, (i + 1) % 2);
          ptx::mbarrier_arrive_expect(full, 128);
          ptx::tensor_load(0, map, {0, static_cast<int>(i)}, full);
          if (!producer_waits) ptx::mbarrier_wait(full, i % 2);
        }
        if (thread() >= 32) {
          ptx::mbarrier_wait(full, i % 2);
          if (arrives_early) ptx::mbarrier_arrive(empty);
          const auto place = static_cast<std::uint32_t>(4 * (thread() - 32));
          wrong += ptx::load_shared<std::uint16_t>(place) != x[8 * i + place / 2];
          if (!arrives_early) ptx::mbarrier_arrive(empty);
        }
      }
    };
  };
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    wrong = 0;
    run(64, 272, kernel(false, true), {input(x)}, seed);
    CHECK(wrong == 0);
    check_error("shared address", [&] { run(64, 272, kernel(true, true), {input(x)}, seed); });
    // Without a wait, arrivals of the consumers come in phases that nobody waits for, too.
    check_error("", [&] { run(64, 272, kernel(false, false), {input(x)}, seed); });
  }
}

TEST(copy_over_what_was_written_without_a_fence) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  const auto kernel = [&](bool has_fence) {
    return [&, has_fence] {
      ptx::store_shared(4 * thread(), 7);
      if (has_fence) ptx::fence_async_proxy();
      load_and_wait<2>(0, map, {0, 0}, 128, 256);
      CHECK(ptx::load_shared<std::uint16_t>(4 * thread()) == x[2 * thread()]);
    };
  };
  run(32, 264, kernel(true), {input(x)});
  check_error("without fence_async_proxy", [&] { run(32, 264, kernel(false), {input(x)}); });
}

TEST(copies_that_overlap) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  check_error("shared address", [&] {
    run(1, 264,
        [&] {
          make_mbarrier(256, 1);
          ptx::mbarrier_arrive_expect(256, 256);
          ptx::tensor_load(0, map, {0, 0}, 256);
          ptx::tensor_load(0, map, {0, 0}, 256);
          ptx::mbarrier_wait(256, 0);
        },
        {input(x)});
  });
}

TEST(copy_that_nobody_waits_for) {
  const auto x = counted(64);
  const auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  const auto kernel = [&](int arrivals, bool expects, bool loads, bool waits) {
    return [&, arrivals, expects, loads, waits] {
      make_mbarrier(256, arrivals);
      if (expects) ptx::mbarrier_arrive_expect(256, 128);
      if (loads) ptx::tensor_load(0, map, {0, 0}, 256);
      if (waits) ptx::mbarrier_wait(256, 0);
    };
  };
  run(1, 264, kernel(1, false, false, false), {input(x)});
  run(1, 264, kernel(1, true, true, true), {input(x)});
  for (int arrivals : {1, 2}) {  // the phase ends, or not
    for (const auto& [expects, loads] : {std::pair{true, true}, {true, false}, {false, true}}) {
      check_error("nobody has waited",
                  [&] { run(1, 264, kernel(arrivals, expects, loads, false), {input(x)}); });
    }
  }
}

TEST(prefetch_of_what_is_no_map) {
  const auto x = counted(64);
  auto map = make_tensor_map<Float16, 2>(x.data(), {8, 8}, {16}, {8, 8}, Swizzle::kNone);
  run(1, 0, [&] { ptx::prefetch_tensor_map(map); });
  map.rank = 0;
  check_error("no tensor map", [&] { run(1, 0, [&] { ptx::prefetch_tensor_map(map); }); });
}

// ---- Stores.

// Writes `values` to shared memory by thread 0, and stores or adds them at (column, row).
template <class T>
static void store(const TensorMap& map, const std::vector<T>& values, int column, int row,
                  bool is_added, const Buffers& buffers) {
  run(
      1, 1024,
      [&] {
        for (std::size_t i = 0; i < values.size(); ++i)
          ptx::store_shared(static_cast<std::uint32_t>(i * sizeof(T)), values[i]);
        ptx::fence_async_proxy();
        is_added ? ptx::tensor_add(map, {column, row}, 0)
                 : ptx::tensor_store(map, {column, row}, 0);
        ptx::store_commit();
        ptx::store_wait<0>();
      },
      buffers);
}

TEST(store_writes_what_exists) {
  std::vector<std::uint16_t> y(4 * 16, 99);  // rows of 12, at a distance of 16
  const auto map = make_tensor_map<Float16, 2>(y.data(), {12, 4}, {32}, {8, 3}, Swizzle::kNone);
  const auto values = counted(24);
  for (const auto& [column, row] : {std::pair{0, 0}, {8, 2}, {-3, -1}, {9, -2}, {12, 0}, {0, 4}}) {
    std::fill(y.begin(), y.end(), std::uint16_t{99});
    auto expected = y;
    for (int i = 0; i < 24; ++i) {
      const int to_column = column + i % 8, to_row = row + i / 8;
      if (to_column >= 0 && to_column < 12 && to_row >= 0 && to_row < 4)
        expected[16 * to_row + to_column] = values[i];
    }
    store(map, values, column, row, false, {output(y)});
    CHECK(y == expected);
  }
  check_error("write to x", [&] { store(map, values, 0, 0, false, {input(y)}); });
}

TEST(addition_of_float32) {
  std::vector<float> y(32);
  std::iota(y.begin(), y.end(), 100.0f);
  auto expected = y;
  const auto map = make_tensor_map<float, 2>(y.data(), {8, 4}, {32}, {4, 2}, Swizzle::kNone);
  const std::vector<float> values = {1, 2, 3, 4, 5, 6, 7, 8.5};
  for (int i = 0; i < 4; ++i) {
    expected[8 + 2 + i] += values[i];
    expected[16 + 2 + i] += values[4 + i];
  }
  store(map, values, 2, 1, true, {output(y)});
  CHECK(y == expected);
}

template <class T>
static void check_addition(float large, float half_ulp, float rounded) {
  std::vector<std::uint16_t> y(8);
  const auto map = make_tensor_map<T, 2>(y.data(), {8, 1}, {16}, {8, 1}, Swizzle::kNone);
  const std::array<float, 8> before = {1, -2, large, large, 0, 3, INFINITY, NAN};
  const std::array<float, 8> added = {2, 2, half_ulp, 3 * half_ulp, 0.5f, 0, 1, 1};
  const std::array<float, 8> after = {3, 0, large, rounded, 0.5f, 3, INFINITY, NAN};
  std::vector<std::uint16_t> values(8);
  for (int i = 0; i < 8; ++i) {
    y[i] = bits_of<T>(before[i]);
    values[i] = bits_of<T>(added[i]);
  }
  store(map, values, 0, 0, true, {output(y)});
  for (int i = 0; i < 7; ++i) CHECK(value_of<T>(y[i]) == after[i]);
  CHECK(std::isnan(value_of<T>(y[7])));
}

// Ties go to the even neighbour.
TEST(addition_of_bfloat16) { check_addition<BFloat16>(256, 1, 260); }
TEST(addition_of_float16) { check_addition<Float16>(2048, 1, 2052); }

TEST(additions_of_all_blocks_meet) {
  std::vector<float> y(4, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {4, 1}, {16}, {4, 1}, Swizzle::kNone);
  const auto kernel = [&](bool is_added) {
    return [&, is_added] {
      for (int i = 0; i < 4; ++i) ptx::store_shared(4 * i, static_cast<float>(i));
      ptx::fence_async_proxy();
      is_added ? ptx::tensor_add(map, {0, 0}, 0) : ptx::tensor_store(map, {0, 0}, 0);
      ptx::store_commit();
      ptx::store_wait_read<0>();
    };
  };
  host_sim::launch({3}, {1}, {.shared_bytes = 128}, {output(y)}, kernel(true));
  for (int i = 0; i < 4; ++i) CHECK(y[i] == static_cast<float>(3 * i));
  check_error("nothing orders this write", [&] {
    host_sim::launch({3}, {1}, {.shared_bytes = 128}, {output(y)}, kernel(false));
  });
}

// What 64 threads have written is stored by thread 0.
static void store_by_one(bool writers_fence, bool has_barrier, bool storer_fences,
                         std::uint64_t seed) {
  std::vector<std::uint32_t> y(64, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {64, 1}, {256}, {64, 1}, Swizzle::kNone);
  run(
      64, 256,
      [&] {
        ptx::store_shared(4 * thread(), 5 * thread());
        if (writers_fence) ptx::fence_async_proxy();
        if (has_barrier) ptx::sync_threads();
        if (thread() == 0) {
          if (storer_fences) ptx::fence_async_proxy();
          ptx::tensor_store(map, {0, 0}, 0);
          ptx::store_commit();
          ptx::store_wait_read<0>();
        }
      },
      {output(y)}, seed);
  for (std::uint32_t i = 0; i < 64; ++i) CHECK(y[i] == 5 * i);
}

TEST(store_of_what_others_have_written) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    store_by_one(true, true, false, seed);
    check_error("nothing orders this read", [=] { store_by_one(true, false, false, seed); });
    check_error("without fence_async_proxy", [=] { store_by_one(false, true, false, seed); });
    // Those who wrote have to fence.
    check_error("without fence_async_proxy", [=] { store_by_one(false, true, true, seed); });
  }
}

TEST(fence_before_the_write_is_none) {
  std::vector<float> y(4, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {4, 1}, {16}, {4, 1}, Swizzle::kNone);
  check_error("without fence_async_proxy", [&] {
    run(1, 128,
        [&] {
          ptx::fence_async_proxy();
          ptx::store_shared(4, 1.0f);
          ptx::tensor_store(map, {0, 0}, 0);
        },
        {output(y)});
  });
}

TEST(write_over_what_is_stored) {
  std::vector<std::uint32_t> y(64, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {32, 2}, {128}, {32, 1}, Swizzle::kNone);
  // Two groups; thread `writer` writes over one of them.
  const auto kernel = [&](int pending, std::uint32_t stage, int writer, bool has_barrier) {
    return [&, pending, stage, writer, has_barrier] {
      if (thread() == 0) {
        for (std::uint32_t i = 0; i < 64; ++i) ptx::store_shared(4 * i, i + 1);
        ptx::fence_async_proxy();
        for (int i = 0; i < 2; ++i) {
          ptx::tensor_store(map, {0, i}, 128 * i);
          ptx::store_commit();
        }
        pending == 0 ? ptx::store_wait_read<0>() : ptx::store_wait_read<1>();
      }
      if (has_barrier) ptx::sync_threads();
      if (thread() == writer) ptx::store_shared(128 * stage, 0u);
      if (thread() == 0) ptx::store_wait_read<0>();
    };
  };
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    for (int writer : {0, 5}) {
      run(32, 256, kernel(0, 1, writer, true), {output(y)}, seed);
      run(32, 256, kernel(1, 0, writer, true), {output(y)}, seed);
      for (std::uint32_t i = 0; i < 64; ++i) CHECK(y[i] == i + 1);
      check_error("after the read by a tensor store of thread 0",
                  [&] { run(32, 256, kernel(1, 1, writer, true), {output(y)}, seed); });
    }
    check_error("nothing orders this write",
                [&] { run(32, 256, kernel(0, 0, 5, false), {output(y)}, seed); });
  }
}

TEST(store_wait_sees_what_was_written) {
  std::vector<std::uint32_t> y(32, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {32, 1}, {128}, {32, 1}, Swizzle::kNone);
  int late = 0;
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    std::fill(y.begin(), y.end(), 0u);
    run(
        1, 128,
        [&] {
          for (std::uint32_t i = 0; i < 32; ++i) ptx::store_shared(4 * i, i);
          ptx::fence_async_proxy();
          ptx::tensor_store(map, {0, 0}, 0);
          ptx::store_commit();
          ptx::store_wait_read<0>();
          late += y[31] == 0;  // what is read need not be written yet
          ptx::store_wait<0>();
          CHECK(y[31] == 31);
        },
        {output(y)}, seed);
  }
  CHECK(late > 0);
}

TEST(store_that_outlives_its_thread) {
  std::vector<std::uint32_t> y(32, 0);
  const auto map = make_tensor_map<float, 2>(y.data(), {32, 1}, {128}, {32, 1}, Swizzle::kNone);
  const auto kernel = [&](bool has_commit, bool has_wait) {
    return [&, has_commit, has_wait] {
      ptx::tensor_store(map, {0, 0}, 0);
      if (has_commit) ptx::store_commit();
      if (has_wait) ptx::store_wait_read<0>();
    };
  };
  run(1, 128, kernel(true, true), {output(y)});
  for (const auto& [has_commit, has_wait] : {std::pair{true, false}, {false, true}}) {
    check_error("without having waited until this store has read",
                [&] { run(1, 128, kernel(has_commit, has_wait), {output(y)}); });
  }
}

// ---- stmatrix, elect.sync, setmaxnreg.

// "stmatrix": as ldmatrix in the other direction.
static void check_matrix_stores(bool is_transposed) {
  run(32, 1024, [=] {
    const int lane = thread();
    std::uint32_t x[4];
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint32_t element[2];
      for (int i = 0; i < 2; ++i) {
        const int major = lane / 4, minor = lane % 4 * 2 + i;
        element[i] = 100 * matrix + (is_transposed ? 10 * minor + major : 10 * major + minor);
      }
      x[matrix] = element[0] | element[1] << 16;
    }
    // Row r of matrix m at 256 m + 32 r.
    const auto row = static_cast<std::uint32_t>(256 * (lane / 8) + 32 * (lane % 8));
    is_transposed ? ptx::store_matrix_transposed(row, x) : ptx::store_matrix(row, x);
    ptx::sync_warp();
    for (int i = lane; i < 4 * 8 * 8; i += 32) {
      const int matrix = i / 64, r = i / 8 % 8, column = i % 8;
      CHECK(ptx::load_shared<std::uint16_t>(256 * matrix + 32 * r + 2 * column) ==
            100 * matrix + 10 * r + column);
    }
  });
}

TEST(store_matrix_writes_rows) { check_matrix_stores(false); }
TEST(store_matrix_transposed_writes_columns) { check_matrix_stores(true); }

TEST(store_matrix_needs_aligned_rows_and_a_barrier) {
  const std::uint32_t x[4] = {};
  check_error("not aligned",
              [&] { run(32, 1024, [&] { ptx::store_matrix(8 + 16 * thread(), x); }); });
  check_error("nothing orders", [&] {
    run(32, 1024, [&] {
      ptx::store_matrix(16 * thread(), x);
      ptx::load_shared<int>(16 * thread());
    });
  });
}

TEST(one_lane_is_elected) {
  std::set<int> leaders;
  for (std::uint64_t seed = 0; seed < 16; ++seed) {
    std::vector<int> elected;
    run(
        64, 0,
        [&] {
          for (int i = 0; i < 3; ++i) {
            if (ptx::elect_one()) elected.push_back(thread());
          }
        },
        {}, seed);
    CHECK(elected.size() == 6);
    for (int other : elected) CHECK(other % 32 == elected[0] % 32);
    CHECK(std::count(elected.begin(), elected.end(), elected[0] % 32) == 3);
    leaders.insert(elected[0] % 32);
  }
  CHECK(leaders.size() > 4);  // a kernel may not take it for lane 0
  check_error("deadlock", [] {
    run(32, 0, [] {
      if (thread() > 0) ptx::elect_one();
    });
  });
}

// 384 threads start with 65536 / 384 = 170.7 registers, rounded down to 168.
TEST(registers_move_between_warpgroups) {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    run(
        384, 0, [] { thread() < 128 ? ptx::release_registers<24>() : ptx::take_registers<240>(); },
        {}, seed);
    check_error("setmaxnreg.inc", [=] {
      run(
          384, 0,
          [] { thread() < 128 ? ptx::release_registers<32>() : ptx::take_registers<240>(); }, {},
          seed);
    });
  }
  check_error("from 168 to 240 registers for 32 threads, of", [] {
    run(384, 0, [] { thread() < 128 ? ptx::release_registers<32>() : ptx::take_registers<240>(); });
  });
  // The launch may give fewer.
  host_sim::launch({}, {256}, {.registers = 128}, {}, [] {
    thread() < 128 ? ptx::release_registers<40>() : ptx::take_registers<216>();
  });
  check_error("deadlock", [] {
    host_sim::launch({}, {256}, {.registers = 128}, {}, [] {
      thread() < 128 ? ptx::release_registers<40>() : ptx::take_registers<224>();
    });
  });
  check_error("setmaxnreg.dec to 176 registers, of 168",
              [] { run(384, 0, [] { ptx::release_registers<176>(); }); });
  check_error("setmaxnreg.inc to 160 registers, of 168",
              [] { run(384, 0, [] { ptx::take_registers<160>(); }); });
}

TEST(numbers_of_registers_that_are_none) {
  for (int count : {16, 20, 36, 264}) {
    check_error("24 to 256, a multiple of 8",
                [=] { run(128, 0, [=] { host_sim::set_registers(count, false, {}); }); });
  }
}

TEST(registers_are_set_by_whole_warpgroups) {
  check_error("needs a warpgroup", [] { run(96, 0, [] { ptx::release_registers<24>(); }); });
  check_error("setmaxnreg.dec at", [] {
    run(128, 0, [] {
      if (thread() < 96) ptx::release_registers<24>();
    });
  });
  check_error("by 96 of the 128 threads", [] {
    run(128, 0, [] {
      if (thread() < 96) ptx::release_registers<24>();
    });
  });
  check_error("the warpgroup has diverged", [] {
    run(128, 0, [] {
      if (thread() < 64) ptx::release_registers<24>();
      if (thread() >= 64) ptx::release_registers<24>();
    });
  });
}

// ---- wgmma: layouts.

// An operand in shared memory, in the manual's terms: "Canonical Layouts", in units of elements of
// 16 bits (T = 8), and "Swizzle<bits, 4, 3>" of bytes.
struct Canonical {
  struct Dimension {
    int size, stride;
  };
  std::vector<Dimension> mn, k;
  int swizzle_bits;

  Canonical(Major major, Swizzle swizzle, int leading_bytes, int stride_bytes) {
    const int leading = leading_bytes / 2, stride = stride_bytes / 2, many = 1 << 20;
    swizzle_bits = swizzle == Swizzle::kNone ? 0
                   : swizzle == Swizzle::k32 ? 1
                   : swizzle == Swizzle::k64 ? 2
                                             : 3;
    const int w = 1 << swizzle_bits;
    if (major == Major::kMN && w == 1) {  // ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
      mn = {{8, 1}, {1, 8}, {many, stride}};
      k = {{8, 8}, {many, leading}};
    } else if (major == Major::kMN) {  // ((T,w,m),(8,k)):((1,T,LBO),(wT,SBO))
      mn = {{8, 1}, {w, 8}, {many, leading}};
      k = {{8, 8 * w}, {many, stride}};
    } else if (w == 1) {  // ((8,m),(T,2k)):((1T,SBO),(1,LBO))
      mn = {{8, 8}, {many, stride}};
      k = {{8, 1}, {many, leading}};
    } else {  // ((8,m),(T,2k)):((wT,SBO),(1,T))
      mn = {{8, 8 * w}, {many, stride}};
      k = {{8, 1}, {many, 8}};
    }
  }
  static int offset(const std::vector<Dimension>& dimensions, int i) {
    int sum = 0;
    for (const Dimension& dimension : dimensions) {
      sum += i % dimension.size * dimension.stride;
      i /= dimension.size;
    }
    return sum;
  }
  // The byte of element (mn, k), relative to where the pattern starts.
  std::uint32_t at(int i, int j) const {
    const auto linear = static_cast<std::uint32_t>(2 * (offset(mn, i) + offset(k, j)));
    return linear ^ ((linear & ((1u << swizzle_bits) - 1) << 7) >> 3);
  }
};

// By all threads: an operand [size, depth], row-major in `x`.
static void write_operand(const Canonical& layout, std::uint32_t start,
                          const std::vector<std::uint16_t>& x, int size, int depth = 16) {
  for (int i = thread(); i < size * depth; i += static_cast<int>(blockDim.x))
    ptx::store_shared(start + layout.at(i / depth, i % depth), x[i]);
}

// "Accumulator D": d_i of a thread is in row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2) and column
// 8 (i / 4) + 2 (lane % 4) + i % 2.
static int row_of(int i) { return 16 * (thread() / 32 % 4) + thread() % 32 / 4 + 8 * (i / 2 % 2); }
static int column_of(int i) { return 8 * (i / 4) + 2 * (thread() % 4) + i % 2; }

// sum over k of a[row, k] b[column, k].
template <class T>
static float product(const std::vector<std::uint16_t>& a, const std::vector<std::uint16_t>& b,
                     int row, int column, int depth = 16) {
  double sum = 0;
  for (int k = 0; k < depth; ++k)
    sum += double{value_of<T>(a[row * depth + k])} * value_of<T>(b[column * depth + k]);
  return static_cast<float>(sum);
}

struct Strides {
  std::uint32_t leading, stride;
};

static std::vector<Strides> strides_of(Major major, Swizzle swizzle, std::uint32_t size) {
  const std::uint32_t span = swizzle == Swizzle::k32 ? 32 : swizzle == Swizzle::k64 ? 64 : 128;
  if (swizzle == Swizzle::kNone) {
    // Core matrices of 128 bytes; in both orders, and with gaps.
    return {{128, 256}, {128 * (size / 8), 128}, {144, 288 + 16}};
  }
  if (major == Major::kK) return {{0, 8 * span}, {16, 8 * span}, {4096, 16 * span}};
  const std::uint32_t tiles = (2 * size + span - 1) / span;
  return {{16 * span, 8 * span}, {8 * span, 8 * span * tiles}, {24 * span, 8 * span}};
}

template <class T, Major kMajorA, Major kMajorB, int kColumns>
static void check_layouts(Swizzle swizzle_a, Swizzle swizzle_b) {
  const auto a = small_integers<T>(64 * 16, 1), b = small_integers<T>(kColumns * 16, 2);
  for (const Strides& of_a : strides_of(kMajorA, swizzle_a, 64)) {
    for (const Strides& of_b : strides_of(kMajorB, swizzle_b, kColumns)) {
      const std::uint32_t start_a = 1024, start_b = 1024 + 32768;
      run(128, start_b + 65536, [&] {
        write_operand(
            {kMajorA, swizzle_a, static_cast<int>(of_a.leading), static_cast<int>(of_a.stride)},
            start_a, a, 64);
        write_operand(
            {kMajorB, swizzle_b, static_cast<int>(of_b.leading), static_cast<int>(of_b.stride)},
            start_b, b, kColumns);
        ptx::fence_async_proxy();
        ptx::sync_threads();
        float sums[kColumns / 8][4];
        ptx::warpgroup_fence(sums);
        ptx::warpgroup_multiply<T, kMajorA, kMajorB>(
            sums, ptx::matrix_descriptor(start_a, of_a.leading, of_a.stride, swizzle_a),
            ptx::matrix_descriptor(start_b, of_b.leading, of_b.stride, swizzle_b), false);
        ptx::warpgroup_commit();
        ptx::warpgroup_wait<0>(sums);
        for (int i = 0; i < kColumns / 2; ++i)
          CHECK((&sums[0][0])[i] == product<T>(a, b, row_of(i), column_of(i)));
      });
    }
  }
}

constexpr Swizzle kSwizzles[] = {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128};

TEST(product_of_k_major_operands) {
  for (Swizzle swizzle : kSwizzles) {
    check_layouts<BFloat16, Major::kK, Major::kK, 64>(swizzle, Swizzle::k128);
    check_layouts<Float16, Major::kK, Major::kK, 192>(Swizzle::k128, swizzle);
  }
}
TEST(product_of_mn_major_operands) {
  for (Swizzle swizzle : kSwizzles) {
    check_layouts<Float16, Major::kMN, Major::kMN, 96>(swizzle, Swizzle::k128);
    check_layouts<BFloat16, Major::kMN, Major::kMN, 128>(Swizzle::k128, swizzle);
  }
}
TEST(product_of_mixed_operands) {
  for (Swizzle swizzle : kSwizzles) {
    check_layouts<BFloat16, Major::kK, Major::kMN, 256>(Swizzle::k128, swizzle);
    check_layouts<Float16, Major::kMN, Major::kK, 32>(swizzle, Swizzle::k64);
  }
}
TEST(product_of_few_columns) {
  for (Swizzle swizzle : kSwizzles) {
    check_layouts<BFloat16, Major::kK, Major::kMN, 8>(Swizzle::k128, swizzle);
    check_layouts<Float16, Major::kK, Major::kMN, 16>(Swizzle::k32, swizzle);
    check_layouts<BFloat16, Major::kK, Major::kK, 8>(Swizzle::k128, swizzle);
  }
}

// The examples of "Canonical Layouts" for bf16: encodings of LBO and SBO in descriptors.
TEST(descriptors_of_the_manual) {
  const auto leading = [](std::uint64_t descriptor) { return descriptor >> 16 & 0x3fff; };
  const auto stride = [](std::uint64_t descriptor) { return descriptor >> 32 & 0x3fff; };
  const auto none = ptx::matrix_descriptor(0, 128 * 2, 64 * 2, Swizzle::kNone);
  CHECK(leading(none) == 16 && stride(none) == 8 && none >> 62 == 0);
  const auto of_32 = ptx::matrix_descriptor(0, 128 * 2, 256 * 2, Swizzle::k32);
  CHECK(leading(of_32) == 16 && stride(of_32) == 32 && of_32 >> 62 == 3);
  const auto of_64 = ptx::matrix_descriptor(0, 256 * 2, 512 * 2, Swizzle::k64);
  CHECK(leading(of_64) == 32 && stride(of_64) == 64 && of_64 >> 62 == 2);
  const auto of_128 = ptx::matrix_descriptor(0x12340, 0, 1024, Swizzle::k128);
  CHECK((of_128 & 0x3fff) == 0x1234 && of_128 >> 62 == 1 && (of_128 >> 46 & 0xffff) == 0);
  CHECK((ptx::advance_descriptor(of_128, 32) & 0x3fff) == 0x1236);
  CHECK(ptx::advance_descriptor(of_128, 32) >> 16 == of_128 >> 16);
}

// "Multiplicand A in registers": a_i is in the row of d_i, but with 8 (i / 2 % 2) for rows and
// 8 (i / 4) for columns.
template <class T, Major kMajorB, int kColumns>
static void check_registers() {
  const auto a = small_integers<T>(64 * 16, 3), b = small_integers<T>(kColumns * 16, 4);
  const Strides strides = strides_of(kMajorB, Swizzle::k128, kColumns)[0];
  const auto counters = run(128, 65536, [&] {
    write_operand({kMajorB, Swizzle::k128, static_cast<int>(strides.leading),
                   static_cast<int>(strides.stride)},
                  0, b, kColumns);
    ptx::fence_async_proxy();
    ptx::sync_threads();
    std::uint32_t fragment[4];
    for (int i = 0; i < 8; ++i) {
      const int row = 16 * (thread() / 32) + thread() % 32 / 4 + 8 * (i / 2 % 2);
      const int column = 2 * (thread() % 4) + i % 2 + 8 * (i / 4);
      auto& pair = fragment[i / 2];
      pair = i % 2 == 0 ? a[16 * row + column] : pair | std::uint32_t{a[16 * row + column]} << 16;
    }
    float sums[kColumns / 8][4];
    for (int i = 0; i < kColumns / 2; ++i) (&sums[0][0])[i] = static_cast<float>(1000 * i);
    ptx::warpgroup_fence(sums, fragment);
    ptx::warpgroup_multiply<T, kMajorB>(
        sums, fragment, ptx::matrix_descriptor(0, strides.leading, strides.stride, Swizzle::k128),
        true);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(sums);
    for (int i = 0; i < kColumns / 2; ++i) {
      CHECK((&sums[0][0])[i] ==
            static_cast<float>(1000 * i) + product<T>(a, b, row_of(i), column_of(i)));
    }
  });
  CHECK(counters.matrix_instructions == 1);
  CHECK(counters.matrix_flops == 2ull * 64 * 16 * kColumns);
  CHECK(counters.shared_bytes_loaded == 2ull * 16 * kColumns);
}

TEST(product_of_registers) {
  check_registers<BFloat16, Major::kK, 64>();
  check_registers<BFloat16, Major::kMN, 128>();
  check_registers<Float16, Major::kMN, 8>();
  check_registers<Float16, Major::kK, 256>();
}

TEST(operands_in_shared_memory_are_counted) {
  const auto x = counted(64 * 16);
  const auto counters = run(128, 16384, [&] {
    write_operand({Major::kK, Swizzle::k32, 0, 256}, 0, x, 64);
    ptx::fence_async_proxy();
    ptx::sync_threads();
    float sums[2][4];
    const auto descriptor = ptx::matrix_descriptor(0, 0, 256, Swizzle::k32);
    ptx::warpgroup_fence(sums);
    ptx::warpgroup_multiply<BFloat16, Major::kK, Major::kK>(sums, descriptor, descriptor, false);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(sums);
  });
  CHECK(counters.shared_bytes_loaded == 2 * (64 + 16) * 16);
}

// Numbers that the types hold: infinity, NaN, subnormal.
TEST(product_of_special_values) {
  const auto check = [](auto type, float value) {
    using T = decltype(type);
    const std::vector<std::uint16_t> a(64 * 16, bits_of<T>(value));
    std::vector<std::uint16_t> b(8 * 16, 0);
    for (int column = 0; column < 8; ++column) b[16 * column] = bits_of<T>(2);
    run(128, 4096, [&] {
      write_operand({Major::kK, Swizzle::kNone, 128, 256}, 0, a, 64);
      write_operand({Major::kK, Swizzle::kNone, 128, 256}, 2048, b, 8);
      ptx::fence_async_proxy();
      ptx::sync_threads();
      float sums[1][4];
      ptx::warpgroup_fence(sums);
      ptx::warpgroup_multiply<T, Major::kK, Major::kK>(
          sums, ptx::matrix_descriptor(0, 128, 256, Swizzle::kNone),
          ptx::matrix_descriptor(2048, 128, 256, Swizzle::kNone), false);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(sums);
      if (std::isfinite(value)) CHECK(sums[0][0] == 2 * value);
      if (!std::isfinite(value)) CHECK(std::isnan(sums[0][0]));  // infinity * 0
    });
  };
  for (float value : {1.0f, -0.0f, 0x1p-24f, 0x3p-24f, -0x1p-15f, 65504.0f, INFINITY, NAN})
    check(Float16{}, value);
  for (float value : {1.0f, 0x1p-133f, -0x1p127f, -INFINITY, NAN}) check(BFloat16{}, value);
}

// Two tiles of a product as attention has them: keys [128, 128] loaded by tensor copies, each of 64
// elements of rows, are K-major in scores = q k^T, and MN-major in out = p v.
template <class T>
static void check_tiles() {
  constexpr int kRows = 128, kDim = 128, kTile = kRows * 128;
  const auto q = small_integers<T>(64 * kDim, 5), k = small_integers<T>(kRows * kDim, 6);
  const auto p = small_integers<T>(64 * kRows, 7);
  const auto map_of = [](const auto& x, std::uint32_t rows) {
    return make_tensor_map<T, 3>(x.data(), {kDim, 1, rows}, {256, 256}, {64, 1, rows},
                                 Swizzle::k128);
  };
  const TensorMap q_map = map_of(q, 64), k_map = map_of(k, kRows);
  for (std::uint64_t seed = 0; seed < 2; ++seed) {
    run(
        128, 1024 + 2 * 8192 + 2 * kTile,
        [&] {
          const std::uint32_t full = 0, q_at = 1024, k_at = 1024 + 2 * 8192;
          make_mbarrier(full, 1);
          if (thread() == 0) {
            ptx::mbarrier_arrive_expect(full, 2 * 8192 + 2 * kTile);
            for (int half = 0; half < 2; ++half) {
              ptx::tensor_load(q_at + 8192 * half, q_map, {64 * half, 0, 0}, full);
              ptx::tensor_load(k_at + kTile * half, k_map, {64 * half, 0, 0}, full);
            }
          }
          std::uint32_t weights[kRows / 16][4];
          for (int i = 0; i < kRows / 2; ++i) {
            const int step = i / 8, e = i % 8;
            const int row = row_of(e),
                      column = 16 * step + 8 * (e / 4) + 2 * (thread() % 4) + e % 2;
            auto& pair = weights[step][e / 2];
            const std::uint32_t element = p[kRows * row + column];
            pair = e % 2 == 0 ? element : pair | element << 16;
          }
          float scores[kRows / 8][4], out[kDim / 8][4] = {};
          ptx::mbarrier_wait(full, 0);
          ptx::warpgroup_fence(scores, out, weights);
          for (std::uint32_t step = 0; step < kDim / 16; ++step) {
            const std::uint32_t tile = step / 4, within = step % 4 * 32;
            const auto a = ptx::matrix_descriptor(q_at + 8192 * tile, 0, 1024, Swizzle::k128);
            const auto b = ptx::matrix_descriptor(k_at + kTile * tile, 0, 1024, Swizzle::k128);
            ptx::warpgroup_multiply<T, Major::kK, Major::kK>(
                scores, ptx::advance_descriptor(a, within), ptx::advance_descriptor(b, within),
                step > 0);
          }
          ptx::warpgroup_commit();
          const auto values = ptx::matrix_descriptor(k_at, kTile, 1024, Swizzle::k128);
          for (std::uint32_t step = 0; step < kRows / 16; ++step) {
            ptx::warpgroup_multiply<T, Major::kMN>(
                out, weights[step], ptx::advance_descriptor(values, 2048 * step), true);
          }
          ptx::warpgroup_commit();
          ptx::warpgroup_wait<1>(scores);
          for (int i = 0; i < kRows / 2; ++i)
            CHECK((&scores[0][0])[i] == product<T>(q, k, row_of(i), column_of(i), kDim));
          ptx::warpgroup_wait<0>(out);
          for (int i = 0; i < kDim / 2; ++i) {
            double sum = 0;
            for (int row = 0; row < kRows; ++row) {
              sum += double{value_of<T>(p[kRows * row_of(i) + row])} *
                     value_of<T>(k[kDim * row + column_of(i)]);
            }
            CHECK((&out[0][0])[i] == sum);
          }
        },
        {input(q), input(k)}, seed);
  }
}

TEST(products_of_loaded_tiles_bfloat16) { check_tiles<BFloat16>(); }
TEST(products_of_loaded_tiles_float16) { check_tiles<Float16>(); }

// ---- wgmma: what the simulator punishes. Operands are [64, 16] and [16, 16], K-major with a
// swizzle of 32 bytes, at 0 and 2048.

namespace {

constexpr std::uint32_t kA = 0, kB = 2048;
using SmallSums = float[2][4];

void write_operands() {
  static const auto a = small_integers<BFloat16>(64 * 16, 8), b = small_integers<BFloat16>(256, 9);
  write_operand({Major::kK, Swizzle::k32, 0, 256}, kA, a, 64);
  write_operand({Major::kK, Swizzle::k32, 0, 256}, kB, b, 16);
}

void write_operands_and_sync() {
  write_operands();
  ptx::fence_async_proxy();
  ptx::sync_threads();
}

void start(SmallSums& sums, bool accumulates = false, std::uint32_t a = kA, std::uint32_t b = kB) {
  ptx::warpgroup_multiply<BFloat16, Major::kK, Major::kK>(
      sums, ptx::matrix_descriptor(a, 0, 256, Swizzle::k32),
      ptx::matrix_descriptor(b, 0, 256, Swizzle::k32), accumulates);
}

void start_with(SmallSums& sums, const std::uint32_t (&a)[4]) {
  ptx::warpgroup_multiply<BFloat16, Major::kK>(
      sums, a, ptx::matrix_descriptor(kB, 0, 256, Swizzle::k32), false);
}

// Runs `kernel` in some orders; it must fail with `part` in all of them.
void check_always(const std::string& part, const std::function<void()>& kernel,
                  unsigned threads = 128) {
  for (std::uint64_t seed = 0; seed < 6; ++seed)
    check_error(part, [&] { run(threads, 8192, kernel, {}, seed); });
}

void run_always(const std::function<void()>& kernel, unsigned threads = 128) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) run(threads, 8192, kernel, {}, seed);
}

bool is_nan(const SmallSums& sums) {
  for (int i = 0; i < 8; ++i) {
    if (!std::isnan(sums[i / 4][i % 4])) return false;
  }
  return true;
}

bool is_number(const SmallSums& sums) {
  for (int i = 0; i < 8; ++i) {
    if (std::isnan(sums[i / 4][i % 4])) return false;
  }
  return true;
}

}  // namespace

TEST(sums_are_nan_until_a_wait_names_them) {
  run_always([] {
    write_operands_and_sync();
    SmallSums x = {}, y = {};
    ptx::warpgroup_fence(x, y);
    start(x);
    CHECK(is_nan(x) && is_number(y));
    ptx::warpgroup_commit();
    start(y);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<2>();
    CHECK(is_nan(x) && is_nan(y));
    ptx::warpgroup_wait<1>();
    CHECK(is_nan(x) && is_nan(y));  // done, but not named
    ptx::warpgroup_wait<1>(x);
    CHECK(is_number(x) && is_nan(y));
    ptx::warpgroup_wait<0>(y);
    CHECK(is_number(y));
    for (int i = 0; i < 8; ++i) CHECK(x[i / 4][i % 4] == y[i / 4][i % 4]);
  });
}

TEST(products_that_are_not_committed_are_not_waited_for) {
  check_always("a wait that names sums which it does not wait for", [] {
    write_operands_and_sync();
    SmallSums x;
    ptx::warpgroup_fence(x);
    start(x);
    ptx::warpgroup_wait<0>(x);
  });
  check_always("a wait that names sums which it does not wait for", [] {
    write_operands_and_sync();
    SmallSums x;
    ptx::warpgroup_fence(x);
    start(x);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<1>(x);
  });
}

TEST(sums_that_a_later_group_goes_on_with) {
  check_always("a wait that names sums which it does not wait for", [] {
    write_operands_and_sync();
    SmallSums x;
    ptx::warpgroup_fence(x);
    for (int i = 0; i < 2; ++i) {
      start(x, i > 0);
      ptx::warpgroup_commit();
    }
    ptx::warpgroup_wait<1>(x);
  });
}

TEST(products_of_the_same_sums_follow_each_other) {
  run_always([] {
    write_operands_and_sync();
    SmallSums once, x;
    ptx::warpgroup_fence(once, x);
    start(once);
    start(x, true);  // of what was there, which the next one drops
    start(x);
    start(x, true);
    ptx::warpgroup_commit();
    start(x, true);  // and in another group, still without a fence
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(once, x);
    for (int i = 0; i < 8; ++i) CHECK(x[i / 4][i % 4] == 3 * once[i / 4][i % 4]);
    ptx::warpgroup_fence(x);
    start(x, true);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(x);
    for (int i = 0; i < 8; ++i) CHECK(x[i / 4][i % 4] == 4 * once[i / 4][i % 4]);
  });
}

TEST(sums_of_an_array_of_sums) {
  run_always([] {
    write_operands_and_sync();
    float x[2][2][4];
    ptx::warpgroup_fence(x);
    start(x[0]);
    start(x[1]);
    start(x[1], true);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(x);
    for (int i = 0; i < 8; ++i) CHECK(x[1][i / 4][i % 4] == 2 * x[0][i / 4][i % 4]);
  });
}

TEST(product_without_a_fence) {
  check_always("have not been named by a warpgroup_fence", [] {
    write_operands_and_sync();
    SmallSums x = {};
    start(x);
  });
  check_always("have not been named by a warpgroup_fence", [] {
    write_operands_and_sync();
    SmallSums x = {}, y = {};
    ptx::warpgroup_fence(y);
    start(x);
  });
  // The sums have been read since; a new fence is needed.
  check_always("have not been named by a warpgroup_fence", [] {
    write_operands_and_sync();
    SmallSums x = {};
    for (int i = 0; i < 2; ++i) {
      if (i == 0) ptx::warpgroup_fence(x);
      start(x);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(x);
    }
  });
  check_always("the registers of a have not been named", [] {
    write_operands_and_sync();
    SmallSums x = {};
    const std::uint32_t a[4] = {};
    ptx::warpgroup_fence(x);
    start_with(x, a);
  });
}

TEST(registers_that_change_between_fence_and_product) {
  check_always("the registers of the sums have changed", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    if (thread() == 100) x[1][3] = 1;
    start(x);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(x);
  });
  check_always("the registers of a have changed", [] {
    write_operands_and_sync();
    SmallSums x = {};
    std::uint32_t a[2][4] = {};
    ptx::warpgroup_fence(x, a);
    a[1][2] = 5;
    start_with(x, a[1]);
  });
}

TEST(registers_that_change_before_the_wait) {
  check_always("the registers of the sums have changed while", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    start(x);
    ptx::warpgroup_commit();
    x[1][2] = 0;
    ptx::warpgroup_wait<0>(x);
  });
  check_always("the registers of a have changed while", [] {
    write_operands_and_sync();
    SmallSums x = {};
    std::uint32_t a[4] = {};
    ptx::warpgroup_fence(x, a);
    start_with(x, a);
    ptx::warpgroup_commit();
    a[3] = 1;
    ptx::warpgroup_wait<0>(x);
  });
  // The wait is for the group before.
  check_always("the registers of a have changed while", [] {
    write_operands_and_sync();
    SmallSums x = {}, y = {};
    std::uint32_t a[4] = {};
    ptx::warpgroup_fence(x, y, a);
    start(x);
    ptx::warpgroup_commit();
    start_with(y, a);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<1>(x);
    a[3] = 1;
    ptx::warpgroup_wait<0>(y);
  });
  // After the wait they may, and used again without a change they need no fence.
  run_always([] {
    write_operands_and_sync();
    SmallSums x = {};
    std::uint32_t a[4] = {};
    ptx::warpgroup_fence(a);
    for (int i = 0; i < 3; ++i) {
      ptx::warpgroup_fence(x);
      start_with(x, a);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(x);
    }
    for (std::uint32_t i = 0; i < 3; ++i) {
      a[3] = i;
      ptx::warpgroup_fence(x, a);
      start_with(x, a);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(x);
    }
  });
}

TEST(fence_that_names_sums_under_way) {
  check_always("a fence for sums that are under way", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    start(x);
    ptx::warpgroup_fence(x);
  });
  check_always("a fence for sums that are under way", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    start(x);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>();
    ptx::warpgroup_fence(x);
  });
}

TEST(sums_of_two_shapes_that_overlap) {
  check_always("overlap those of a product of another shape", [] {
    write_operands_and_sync();
    float x[2][2][4] = {};
    ptx::warpgroup_fence(x);
    start(x[0]);
    ptx::warpgroup_multiply<BFloat16, Major::kK, Major::kK>(
        reinterpret_cast<float (&)[4][4]>(x), ptx::matrix_descriptor(kA, 0, 256, Swizzle::k32),
        ptx::matrix_descriptor(kB, 0, 256, Swizzle::k32), false);
  });
}

TEST(product_that_outlives_its_thread) {
  for (bool has_commit : {false, true}) {
    check_always("the thread ends before its products have been waited for", [=] {
      write_operands_and_sync();
      SmallSums x = {};
      ptx::warpgroup_fence(x);
      start(x);
      if (has_commit) ptx::warpgroup_commit();
    });
  }
}

TEST(operand_that_was_written_without_a_fence) {
  const auto kernel = [](bool has_fence, bool is_late, bool has_barrier) {
    return [=] {
      if (is_late && has_fence) ptx::fence_async_proxy();
      write_operands();
      if (!is_late && has_fence) ptx::fence_async_proxy();
      if (has_barrier) ptx::sync_threads();
      SmallSums x = {};
      ptx::warpgroup_fence(x);
      start(x);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(x);
    };
  };
  run_always(kernel(true, false, true));
  check_always("without fence_async_proxy", kernel(false, false, true));
  check_always("without fence_async_proxy", kernel(true, true, true));
  check_always("the first warp's start", kernel(true, false, false));
}

// One of the lanes that stored a matrix together has not fenced.
TEST(operand_that_was_stored_as_matrices) {
  const auto kernel = [](int lazy) {
    return [=] {
      const std::uint32_t x[4] = {};
      for (int i = thread() / 32; i < 5; i += 4)
        ptx::store_matrix(512 * i + 16 * (thread() % 32), x);
      if (thread() != lazy) ptx::fence_async_proxy();
      ptx::sync_threads();
      SmallSums sums = {};
      ptx::warpgroup_fence(sums);
      start(sums);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(sums);
      CHECK(sums[0][0] == 0);
    };
  };
  run_always(kernel(-1));
  check_always("without fence_async_proxy", kernel(77));
}

TEST(operand_that_is_written_before_the_wait) {
  const auto kernel = [](bool has_wait, bool has_barrier, int writer) {
    return [=] {
      write_operands_and_sync();
      SmallSums x = {};
      ptx::warpgroup_fence(x);
      start(x);
      ptx::warpgroup_commit();
      if (has_wait) ptx::warpgroup_wait<0>(x);
      if (has_barrier) ptx::sync_threads();
      if (thread() == writer) ptx::store_shared(kB + 500, 0);
      if (!has_wait) ptx::warpgroup_wait<0>(x);
    };
  };
  // A thread that has waited knows that the product has read, also for the others.
  run_always(kernel(true, false, 3));
  run_always(kernel(true, true, 70));
  check_always("nothing orders this", kernel(false, true, 70));
  check_always("nothing orders this", kernel(false, false, 3));
}

TEST(operand_of_a_later_group_that_is_written) {
  const auto kernel = [](std::uint32_t written) {
    return [=] {
      write_operands();
      for (std::uint32_t i = 0; i < 4; ++i) ptx::store_shared(kB + 512 + 16 * thread() + 4 * i, 0);
      ptx::fence_async_proxy();
      ptx::sync_threads();
      SmallSums x = {}, y = {};
      ptx::warpgroup_fence(x, y);
      start(x);
      ptx::warpgroup_commit();
      start(y, false, kA, kB + 512);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<1>(x);
      if (thread() == 3) ptx::store_shared(written, 0);
      ptx::warpgroup_wait<0>(y);
    };
  };
  run_always(kernel(kB));
  check_always("after the read by the products of warpgroup 0", kernel(kB + 512));
}

// What a warp writes after it has started the product is too late, whatever the others do then.
TEST(operand_that_is_written_after_the_start) {
  check_always("later than the first warp's start", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    for (int warps = 0; warps < 2; ++warps) {
      if ((thread() < 32) == (warps == 0)) start(x);
      if (thread() == 0 && warps == 0) {
        ptx::store_shared(kB, 0);
        ptx::fence_async_proxy();
      }
      ptx::sync_threads();
    }
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(x);
  });
}

TEST(operand_that_is_loaded_before_the_wait) {
  // One thread of the consumers arrives for all after its wait: the products are the warpgroup's.
  const auto x = counted(64 * 16 * 4);
  const auto map = make_tensor_map<BFloat16, 2>(x.data(), {16, 256}, {32}, {16, 64}, Swizzle::k32);
  const auto kernel = [&](bool arrives_early, bool all_wait) {
    return [&, arrives_early, all_wait] {
      const std::uint32_t full = 4096, empty = 4104;
      make_mbarrier(full, 1);
      make_mbarrier(empty, 1);
      for (std::uint32_t i = 0; i < 3; ++i) {
        if (thread() == 128) {
          ptx::mbarrier_wait(empty, (i + 1) % 2);
          ptx::mbarrier_arrive_expect(full, 2048);
          ptx::tensor_load(0, map, {0, 64 * static_cast<int>(i)}, full);
        }
        if (thread() >= 128) continue;
        if (all_wait || thread() != 93) ptx::mbarrier_wait(full, i % 2);
        SmallSums sums = {};
        ptx::warpgroup_fence(sums);
        start(sums, false, 0, 0);
        ptx::warpgroup_commit();
        ptx::sync_barrier(1, 128);
        if (arrives_early && thread() == 5) ptx::mbarrier_arrive(empty);
        ptx::warpgroup_wait<0>(sums);
        if (!arrives_early && thread() == 5) ptx::mbarrier_arrive(empty);
      }
    };
  };
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    run(160, 8192, kernel(false, true), {input(x)}, seed);
    check_error("shared address", [&] { run(160, 8192, kernel(true, true), {input(x)}, seed); });
    check_error("shared address", [&] { run(160, 8192, kernel(false, false), {input(x)}, seed); });
  }
}

TEST(operand_outside_or_in_the_wrong_place) {
  const auto kernel = [](std::uint32_t address) {
    return [=] {
      write_operands_and_sync();
      SmallSums x = {};
      ptx::warpgroup_fence(x);
      start(x, false, kA, address);
      ptx::warpgroup_commit();
      ptx::warpgroup_wait<0>(x);
    };
  };
  check_always("the block has 8192", kernel(8192));
  check_always("does not start in the first line of a swizzle's pattern", kernel(kB + 128));
  check_always("multiples of 16", kernel(kB + 8));
  check_always("a base offset", [] {
    write_operands_and_sync();
    SmallSums x = {};
    ptx::warpgroup_fence(x);
    ptx::warpgroup_multiply<BFloat16, Major::kK, Major::kK>(
        x, ptx::matrix_descriptor(kA, 0, 256, Swizzle::k32) | 1ull << 49,
        ptx::matrix_descriptor(kB, 0, 256, Swizzle::k32), false);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<0>(x);
  });
}

TEST(warps_that_do_not_execute_the_same) {
  const auto body = [](auto odd) {
    return [odd] {
      write_operands_and_sync();
      SmallSums x = {};
      ptx::warpgroup_fence(x);
      odd(x);
    };
  };
  // Three of four warps.
  check_always("wgmma.mma_async at", body([](SmallSums& x) {
                 if (thread() < 96) {
                   start(x);
                   ptx::warpgroup_commit();
                   ptx::warpgroup_wait<0>(x);
                 }
               }));
  check_always("by 96 of the 128 threads of a warpgroup", body([](SmallSums& x) {
                 if (thread() < 96) {
                   start(x);
                   ptx::warpgroup_commit();
                   ptx::warpgroup_wait<0>(x);
                 }
               }));
  check_always("ends with wgmma.commit_group at", body([](SmallSums&) {
                 if (thread() < 96) ptx::warpgroup_commit();
               }));
  check_always("the warpgroup has diverged", body([](SmallSums& x) {
                 if (thread() < 96) {
                   ptx::warpgroup_fence(x);
                 } else {
                   ptx::warpgroup_commit();
                 }
               }));
  check_always("start different products", body([](SmallSums& x) {
                 start(x, false, kA, thread() < 64 ? kB : kA);
                 ptx::warpgroup_commit();
                 ptx::warpgroup_wait<0>(x);
               }));
  check_always("start different products", body([](SmallSums& x) {
                 start(x, thread() < 64);
                 ptx::warpgroup_commit();
                 ptx::warpgroup_wait<0>(x);
               }));
  check_always("other threads' sums are under way", body([](SmallSums& x) {
                 SmallSums y = {};
                 ptx::warpgroup_fence(y);
                 start(x);
                 ptx::warpgroup_multiply<BFloat16, Major::kK, Major::kK>(
                     thread() == 17 ? y : x, ptx::matrix_descriptor(kA, 0, 256, Swizzle::k32),
                     ptx::matrix_descriptor(kB, 0, 256, Swizzle::k32), true);
                 ptx::warpgroup_commit();
                 ptx::warpgroup_wait<0>(x, y);
               }));
  check_always("or others than this one's", body([](SmallSums& x) {
                 SmallSums y = {};
                 ptx::warpgroup_fence(y);
                 start(x);
                 start(y);
                 start(thread() == 17 ? y : x, true);
                 ptx::warpgroup_commit();
                 ptx::warpgroup_wait<0>(x, y);
               }));
  check_always(
      "needs a warpgroup",
      [] {
        SmallSums x = {};
        ptx::warpgroup_fence(x);
      },
      96);
}

TEST(warpgroups_do_not_meet_each_other) {
  run_always(
      [] {
        write_operands_and_sync();
        SmallSums x = {};
        for (int i = 0; i <= thread() / 128; ++i) {
          ptx::warpgroup_fence(x);
          start(x, true);
          ptx::warpgroup_commit();
          ptx::warpgroup_wait<0>(x);
        }
        ptx::sync_threads();
        for (int i = 0; i < 8; ++i) {
          ptx::store_shared(4096 + 4 * thread(), x[i / 4][i % 4]);
          ptx::sync_threads();
          const float other = ptx::load_shared<float>(4096 + 4 * (thread() ^ 128));
          CHECK(thread() < 128 ? other == 2 * x[i / 4][i % 4] : 2 * other == x[i / 4][i % 4]);
          ptx::sync_threads();
        }
      },
      256);
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
