// What the simulator promises: poison, order, and an error for everything that a GPU may punish.
#include <array>
#include <cmath>
#include <numeric>
#include <set>

#include "host_sim/races.h"
#include "host_sim/tests/test.h"
#include "sm80/ptx.cuh"

namespace ptx = sparse_attn::ptx;
using host_sim::Buffer;
using host_sim::Dim3;
using host_sim::host_sim_take_counters;
using host_sim::Settings;

namespace {

// One CTA of `threads`, without arrays.
host_sim::Counters run(unsigned threads, std::size_t shared_bytes,
                       const std::function<void()>& kernel, std::uint64_t seed = 0) {
  return host_sim::launch({}, {threads}, {.seed = seed, .shared_bytes = shared_bytes}, {}, kernel);
}

template <class T>
Buffer input(const std::vector<T>& x, const char* name = "x") {
  return {x.data(), x.size() * sizeof(T), false, name};
}
template <class T>
Buffer output(const std::vector<T>& y, const char* name = "y") {
  return {y.data(), y.size() * sizeof(T), true, name};
}

int thread() { return static_cast<int>(threadIdx.x); }

}  // namespace

TEST(every_thread_of_every_block_runs_once) {
  std::vector<int> y(2 * 3 * 40, -1);
  host_sim::launch({2, 3}, {10, 4}, {}, {output(y)}, [&] {
    const int place = static_cast<int>(
        ((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x +
        threadIdx.x);
    ptx::store_global(&y[place], place);
  });
  for (int i = 0; i < 240; ++i) CHECK(y[i] == i);
}

TEST(order_depends_on_the_seed_only) {
  std::set<std::vector<int>> orders;
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    std::vector<int> first, second;
    for (auto* order : {&first, &second}) {
      host_sim::launch({3}, {32}, {.seed = seed}, {},
                       [order] { order->push_back(static_cast<int>(blockIdx.x) * 32 + thread()); });
    }
    CHECK(first == second);
    orders.insert(first);
  }
  CHECK(orders.size() == 5);
  std::set<int> first_blocks;
  for (const auto& order : orders) first_blocks.insert(order[0] / 32);
  CHECK(first_blocks.size() > 1);
}

TEST(fresh_shared_memory_is_nan) {
  run(32, 64, [] { CHECK(std::isnan(ptx::load_shared<float>(4))); });
}

TEST(block_without_threads_or_with_too_many) {
  check_error("1 to 1024", [] { run(0, 0, [] {}); });
  check_error("1 to 1024", [] { run(1025, 0, [] {}); });
}

TEST(block_with_more_shared_memory_than_there_is) {
  run(1, 227 * 1024, [] {});
  check_error("it may have 232448", [] { run(1, 227 * 1024 + 1, [] {}); });
}

// ---- Global memory.

TEST(global_access_outside) {
  const std::vector<float> x(8);
  check_error("byte 32 of x, which has 32", [&] {
    host_sim::launch({}, {1}, {}, {input(x)}, [&] { ptx::load_global(x.data() + 8); });
  });
  check_error("outside of all arrays", [&] {
    host_sim::launch({}, {1}, {}, {input(x)}, [&] { ptx::load_global(x.data() - 1); });
  });
  const std::vector<float> other(8);
  check_error("outside of all arrays", [&] {
    host_sim::launch({}, {1}, {}, {input(x)}, [&] { ptx::load_global(other.data()); });
  });
}

TEST(global_access_that_is_not_aligned) {
  alignas(16) static const std::array<char, 32> x{};
  const Buffer buffer{x.data(), x.size(), false, "x"};
  check_error("not aligned", [&] {
    host_sim::launch({}, {1}, {}, {buffer},
                     [&] { ptx::load_global(reinterpret_cast<const float*>(x.data() + 2)); });
  });
}

TEST(write_to_an_input) {
  std::vector<float> x(8);
  check_error("write to x", [&] {
    host_sim::launch({}, {1}, {}, {input(x)}, [&] { ptx::store_global(&x[0], 1.0f); });
  });
}

TEST(two_threads_write_one_word) {
  std::vector<float> y(8);
  check_error("nothing orders", [&] {
    host_sim::launch({}, {2}, {}, {output(y)}, [&] { ptx::store_global(&y[3], 1.0f); });
  });
  check_error("nothing orders", [&] {
    host_sim::launch({2}, {1}, {}, {output(y)}, [&] { ptx::store_global(&y[3], 1.0f); });
  });
  // Neighbouring 16-bit elements are different words.
  std::vector<std::uint16_t> z(2);
  host_sim::launch({}, {2}, {}, {output(z)},
                   [&] { ptx::store_global(&z[thread()], std::uint16_t{7}); });
  CHECK(z[0] == 7 && z[1] == 7);
}

TEST(global_memory_is_ordered_by_a_barrier_of_the_block) {
  std::vector<int> y(64);
  const auto kernel = [&](bool has_barrier) {
    return [&y, has_barrier] {
      ptx::store_global(&y[thread()], thread());
      if (has_barrier) ptx::sync_threads();
      CHECK(ptx::load_global(&y[63 - thread()]) == 63 - thread());
    };
  };
  host_sim::launch({}, {64}, {}, {output(y)}, kernel(true));
  check_error("nothing orders",
              [&] { host_sim::launch({}, {64}, {}, {output(y)}, kernel(false)); });
}

TEST(atomic_additions_may_meet) {
  std::vector<int> y(1, 0), seen(128, -1);
  host_sim::launch({2}, {64}, {}, {output(y), output(seen, "seen")},
                   [&] { ptx::store_global(&seen[ptx::atomic_add_global(&y[0], 1)], 1); });
  CHECK(y[0] == 128 && std::accumulate(seen.begin(), seen.end(), 0) == 128);
}

TEST(atomic_addition_and_plain_access) {
  std::vector<int> y(1, 0);
  for (bool is_read : {false, true}) {
    check_error("nothing orders", [&] {
      host_sim::launch({}, {32}, {}, {output(y)}, [&] {
        if (thread() == 0 && is_read) ptx::load_global(&y[0]);
        if (thread() == 0 && !is_read) ptx::store_global(&y[0], 5);
        ptx::shuffle(0, 0);
        if (thread() == 1) ptx::atomic_add_global(&y[0], 1);
      });
    });
  }
}

TEST(global_readers_are_all_remembered) {
  std::vector<int> y(1, 0);
  for (int writer : {0, 1}) {
    check_error("nothing orders", [&] {
      host_sim::launch({}, {32}, {}, {output(y)}, [&] {
        if (thread() < 2) ptx::load_global(&y[0]);
        ptx::shuffle(0, 0);
        if (thread() == writer) ptx::store_global(&y[0], 1);
      });
    });
  }
}

TEST(global_readers_before_a_barrier_are_forgotten) {
  std::vector<int> y(1, 0);
  host_sim::launch({}, {64}, {}, {output(y)}, [&] {
    for (int turn = 0; turn < 4; ++turn) {
      if (thread() == 16 * turn) ptx::store_global(&y[0], ptx::load_global(&y[0]) + 1);
      ptx::sync_threads();
    }
  });
  CHECK(y[0] == 4);
}

TEST(bytes_are_counted) {
  const std::vector<float> x(64);
  std::vector<float> y(64);
  const auto counters =
      host_sim::launch({}, {64}, {.shared_bytes = 1024}, {input(x), output(y)}, [&] {
        ptx::store_shared<double>(8 * thread(), 1.0);
        ptx::store_global(&y[thread()],
                          ptx::load_global(&x[thread()]) +
                              static_cast<float>(ptx::load_shared<double>(8 * thread())));
      });
  CHECK(counters.global_bytes_loaded == 256 && counters.global_bytes_stored == 256);
  CHECK(counters.shared_bytes_loaded == 512 && counters.shared_bytes_stored == 512);
}

TEST(counters_are_taken_in_the_order_of_launches) {
  std::uint64_t taken[sizeof(host_sim::Counters) / sizeof(std::uint64_t)];
  while (host_sim_take_counters(taken)) continue;
  run(32, 1024, [] { ptx::store_shared<int>(4 * thread(), 1); });
  run(64, 1024, [] { ptx::store_shared<int>(4 * thread(), 1); });
  CHECK(host_sim_take_counters(taken) && taken[3] == 128);
  CHECK(host_sim_take_counters(taken) && taken[3] == 256 && taken[0] + taken[1] + taken[2] == 0);
  CHECK(!host_sim_take_counters(taken));
}

// ---- Shared memory.

TEST(shared_access_outside) {
  check_error("the block has 64", [] { run(1, 64, [] { ptx::load_shared<float>(64); }); });
  check_error("the block has 64",
              [] { run(1, 64, [] { ptx::store_shared<float>(0xfffffffc, 0.0f); }); });
}

TEST(shared_access_that_is_not_aligned) {
  check_error("not aligned", [] { run(1, 64, [] { ptx::load_shared<double>(4); }); });
}

TEST(error_names_file_block_and_thread) {
  for (const char* part : {"simulator_test.cc:", "block (1, 0, 0)", "thread 5"}) {
    check_error(part, [] {
      host_sim::launch({2}, {32}, {.shared_bytes = 64}, {}, [] {
        if (blockIdx.x == 1 && thread() == 5) ptx::load_shared<float>(1 << 20);
      });
    });
  }
}

// Thread i writes word i, and reads word i + `distance`.
static std::function<void()> write_then_read(int threads, int distance,
                                             const std::function<void()>& sync) {
  return [=] {
    ptx::store_shared(4 * thread(), thread());
    sync();
    const int other = (thread() + distance) % threads;
    const int found = ptx::load_shared<int>(4 * other);
    ptx::sync_threads();  // by now the error, if there is one, has been found
    CHECK(found == other);
  };
}

TEST(read_after_write_needs_a_barrier) {
  run(64, 256, write_then_read(64, 32, [] { ptx::sync_threads(); }));
  check_error("nothing orders", [] { run(64, 256, write_then_read(64, 32, [] {})); });
  check_error("nothing orders this",
              [] { run(64, 256, write_then_read(64, 32, [] { ptx::sync_warp(); })); });
}

TEST(lanes_of_a_warp_need_a_barrier_too) {
  run(32, 128, write_then_read(32, 1, [] { ptx::sync_warp(); }));
  run(32, 128, write_then_read(32, 1, [] { ptx::sync_threads(); }));
  check_error("nothing orders", [] { run(32, 128, write_then_read(32, 1, [] {})); });
  // A shuffle brings lanes together, and orders no memory.
  check_error("nothing orders",
              [] { run(32, 128, write_then_read(32, 1, [] { ptx::shuffle(0, 0); })); });
}

TEST(write_after_read_needs_a_barrier) {
  const auto kernel = [](bool has_second) {
    return [=] {
      ptx::store_shared(4 * thread(), 0);
      ptx::sync_threads();
      ptx::load_shared<int>(4 * (thread() ^ 32));
      if (has_second) ptx::sync_threads();
      ptx::store_shared(4 * thread(), 1);
    };
  };
  run(64, 256, kernel(true));
  for (std::uint64_t seed = 0; seed < 4; ++seed)
    check_error("nothing orders", [&] { run(64, 256, kernel(false), seed); });
}

TEST(accesses_of_whole_warps_need_a_barrier) {
  using host_sim::Races;
  Races races(32, 16);
  const Races::Threads warp{0, 32}, one{3, 1};
  const auto access = [&](bool is_write, Races::Threads by) {
    return races.access(0, 4, is_write, by, {}).has_value();
  };
  CHECK(!access(true, warp));
  CHECK(access(false, warp) && access(false, one));
  races.join(warp);
  CHECK(!access(false, warp) && !access(false, one));
  CHECK(access(true, one) && access(true, warp));
}

TEST(atomic_operations_on_shared_memory_may_meet) {
  run(64, 4, [] {
    if (thread() == 0) ptx::store_shared<std::uint32_t>(0, 0);
    ptx::sync_threads();
    ptx::atomic_or_shared(0, 1u << (thread() % 8));
    ptx::sync_threads();
    CHECK(ptx::load_shared<std::uint32_t>(0) == 0xff);
  });
}

TEST(atomic_operations_on_shared_memory_need_a_barrier) {
  enum class Other { kReadAfter, kWriteAfter, kWriteBefore };
  for (Other other : {Other::kReadAfter, Other::kWriteAfter, Other::kWriteBefore}) {
    check_error("nothing orders", [=] {
      run(32, 4, [=] {
        if (thread() == 0) ptx::store_shared<std::uint32_t>(0, 0);
        ptx::sync_threads();
        if (thread() == 0 && other == Other::kWriteBefore) ptx::store_shared<std::uint32_t>(0, 1);
        ptx::shuffle(0, 0);  // orders no memory accesses
        if (thread() == 1) ptx::atomic_or_shared(0, 1);
        ptx::shuffle(0, 0);
        if (thread() == 0 && other == Other::kReadAfter) ptx::load_shared<std::uint32_t>(0);
        if (thread() == 0 && other == Other::kWriteAfter) ptx::store_shared<std::uint32_t>(0, 1);
      });
    });
  }
}

TEST(order_is_known_warp_by_warp) {
  using host_sim::Races;
  Races races(256, 16);
  const auto reads = [&](Races::Threads by) { return races.access(0, 4, false, by, {}); };
  const auto reads_async = [&](Races::Threads by) {
    return races.access_async(0, 16, {Races::Action::kRead, by, 256, {}});
  };
  races.add_actor("products");
  races.access(0, 16, true, {0, 1}, {});
  races.fence(0);
  races.join({0, 128});
  CHECK(!reads({32, 32}) && !reads_async({0, 128}));
  CHECK(reads({128, 32}) && reads_async({128, 128}));
}

TEST(readers_of_a_granule_are_all_remembered) {
  using host_sim::Races;
  // Many readers; the writer knows of all but one.
  for (int forgotten : {0, 7, 8, 20}) {
    Races races(64, 16);
    for (int thread = 0; thread < 40; ++thread) races.access(4, 2, false, {thread, 1}, {});
    Races::Clock clock;
    for (int thread = 0; thread < 40; ++thread) {
      if (thread != forgotten) races.release(thread, clock);
    }
    races.tick();
    races.acquire(63, clock);
    const auto wrong = races.access(4, 2, true, {63, 1}, {});
    CHECK(wrong && wrong->find("thread " + std::to_string(forgotten) + " ") != std::string::npos);
  }
  // A reader of all of it, and a writer of a part.
  Races races(2, 16);
  races.access(0, 16, false, {0, 1}, {});
  CHECK(races.access(6, 2, true, {1, 1}, {}));
  // The lanes of a warp, and one of them.
  Races lanes(64, 16);
  lanes.access(0, 16, false, {0, 32}, {});
  lanes.access(0, 16, false, {0, 1}, {});
  Races::Clock clock;
  lanes.release(0, clock);
  lanes.tick();
  lanes.acquire(32, clock);
  CHECK(lanes.access(0, 16, true, {32, 1}, {}));
}

TEST(fence_that_is_not_known_is_none) {
  using host_sim::Races;
  for (bool is_late : {false, true}) {
    Races races(2, 16);
    const int actor = races.add_actor("copies");
    races.access(0, 16, true, {0, 1}, {});
    if (!is_late) races.fence(0);
    Races::Clock clock;
    races.release(0, clock);
    races.tick();
    if (is_late) races.fence(0);
    races.acquire(1, clock);
    const auto wrong = races.access_async(0, 16, {Races::Action::kRead, {1, 1}, actor, {}});
    CHECK(wrong.has_value() == is_late);
  }
}

TEST(many_readers_are_all_remembered) {
  // Lanes 0 and 1 of warp 0 read; then lane 0, which is ordered with itself only, writes.
  check_error("nothing orders this write", [] {
    run(32, 64, [] {
      if (thread() == 2) ptx::store_shared(0, 0);
      ptx::sync_warp();
      if (thread() < 2) ptx::load_shared<int>(0);
      ptx::shuffle(0, 0);
      if (thread() == 0) ptx::store_shared(0, 1);
    });
  });
}

// ---- Barriers.

TEST(barrier_that_not_all_reach) {
  check_error("32 threads (first: 32) ended", [] {
    run(64, 0, [] {
      if (thread() < 32) ptx::sync_threads();
    });
  });
  check_error("deadlock", [] { run(64, 0, [] { ptx::sync_barrier(1 + thread() / 32, 64); }); });
}

TEST(barrier_that_not_all_lanes_reach) {
  check_error("31 threads (first: 1) waits in barrier.sync", [] {
    run(32, 0, [] {
      if (thread() != 0) ptx::sync_threads();
    });
  });
}

TEST(named_barrier_of_some_warps) {
  // Warps 0 and 1 meet; warp 2 does not.
  const auto kernel = [](int id, int count) {
    return [=] {
      if (thread() >= 64) return;
      ptx::store_shared(4 * thread(), thread());
      ptx::sync_barrier(id, count);
      CHECK(ptx::load_shared<int>(4 * (thread() ^ 32)) == (thread() ^ 32));
    };
  };
  run(96, 256, kernel(3, 64));
  check_error("deadlock", [&] { run(96, 256, kernel(3, 96)); });
  check_error("a multiple of 32", [&] { run(96, 256, kernel(3, 65)); });
  check_error("there is no barrier 16", [&] { run(96, 256, kernel(16, 64)); });
}

TEST(barrier_with_two_counts) {
  check_error("expects", [] { run(96, 0, [] { ptx::sync_barrier(1, thread() < 32 ? 64 : 96); }); });
}

TEST(arrival_orders_the_accesses_before_it) {
  // Warp 0 produces and arrives; warp 1 waits and reads.
  const auto kernel = [](bool writes_late) {
    return [=] {
      if (thread() < 32) {
        if (!writes_late) ptx::store_shared(4 * thread(), thread());
        ptx::arrive_barrier(2, 64);
        if (writes_late) ptx::store_shared(4 * thread(), thread());
      } else {
        ptx::sync_barrier(2, 64);
        ptx::load_shared<int>(4 * (thread() - 32));
      }
    };
  };
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    run(64, 128, kernel(false), seed);
    check_error("nothing orders", [&] { run(64, 128, kernel(true), seed); });
  }
}

TEST(barriers_can_be_used_again_and_again) {
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    run(
        128, 4,
        [] {
          for (int i = 0; i < 20; ++i) {
            if (thread() == 37 * i % 128) ptx::store_shared(0, i);
            ptx::sync_threads();
            CHECK(ptx::load_shared<int>(0) == i);
            ptx::sync_threads();
          }
        },
        seed);
  }
}

TEST(lanes_in_different_instructions) {
  check_error("the warp has diverged", [] {
    run(32, 0, [] { thread() < 16 ? (void)ptx::shuffle(0, 0) : (void)ptx::ballot(true); });
  });
  check_error("the warp has diverged", [] {
    run(32, 0, [] {
      if (thread() < 16) ptx::shuffle(0, 0);
      if (thread() >= 16) ptx::shuffle(0, 0);
    });
  });
  check_error("the warp has diverged", [] {
    run(32, 0, [] {
      host_sim::rendezvous(thread() < 16 ? 0x1ffff : 0xffff0000, "meet", nullptr, nullptr, {});
    });
  });
  check_error("lacks the calling lane",
              [] { run(32, 0, [] { host_sim::rendezvous(1, "meet", nullptr, nullptr, {}); }); });
}

TEST(halves_of_a_warp_may_meet_apart) {
  run(32, 0, [] {
    for (int i = 0; i < 3; ++i) {
      host_sim::rendezvous(thread() < 16 ? 0xffff : 0xffff0000, "meet", nullptr, nullptr, {});
    }
  });
}

TEST(lanes_that_name_different_barriers) {
  check_error("different barriers or counts",
              [] { run(64, 0, [] { ptx::sync_barrier(1 + thread() % 2, 64); }); });
  check_error("different barriers or counts",
              [] { run(64, 0, [] { ptx::sync_barrier(1, 32 + 32 * (thread() % 2)); }); });
}

TEST(warp_instruction_in_a_block_with_a_part_of_a_warp) {
  check_error("lanes that the block lacks", [] { run(40, 0, [] { ptx::shuffle(0, 0); }); });
}

// ---- cp.async.

TEST(copy_lands_when_it_has_been_waited_for) {
  std::vector<std::uint32_t> x(64 * 4);
  std::iota(x.begin(), x.end(), 0);
  host_sim::launch({}, {64}, {.shared_bytes = 2048}, {input(x)}, [&] {
    ptx::copy_async16(16 * thread(), &x[4 * thread()], true);
    ptx::copy_commit();
    ptx::copy_async16(1024 + 16 * thread(), &x[4 * thread()], false);
    ptx::copy_commit();
    ptx::copy_wait<1>();
    CHECK(ptx::load_shared<std::uint32_t>(16 * thread() + 4) ==
          static_cast<std::uint32_t>(4 * thread() + 1));
    ptx::copy_wait<0>();
    ptx::sync_threads();
    const int other = 63 - thread();
    CHECK(ptx::load_shared<std::uint32_t>(16 * other + 8) ==
          static_cast<std::uint32_t>(4 * other + 2));
    CHECK(ptx::load_shared<std::uint32_t>(1024 + 16 * other + 8) == 0);
  });
}

TEST(copy_that_was_not_waited_for) {
  const std::vector<std::uint32_t> x(8, 1);
  const auto kernel = [&](auto wait) {
    return [&x, wait] {
      for (int i = 0; i < 2; ++i) {
        ptx::copy_async16(16 * i, &x[4 * i], true);
        ptx::copy_commit();
      }
      wait();
      ptx::load_shared<std::uint32_t>(16);
      ptx::copy_wait<0>();
    };
  };
  const auto launch = [&](auto wait) {
    host_sim::launch({}, {1}, {.shared_bytes = 32}, {input(x)}, kernel(wait));
  };
  launch([] { ptx::copy_wait<0>(); });
  check_error("has not landed", [&] { launch([] { ptx::copy_wait<1>(); }); });
  check_error("has not landed", [&] { launch([] {}); });
}

TEST(copy_waited_for_by_another_thread) {
  const std::vector<std::uint32_t> x(64 * 4, 1);
  const auto kernel = [&](bool has_barrier) {
    return [&x, has_barrier] {
      ptx::copy_async16(16 * thread(), &x[4 * thread()], true);
      ptx::copy_commit();
      ptx::copy_wait<0>();
      if (has_barrier) ptx::sync_threads();
      ptx::load_shared<std::uint32_t>(16 * (thread() ^ 32));
    };
  };
  host_sim::launch({}, {64}, {.shared_bytes = 1024}, {input(x)}, kernel(true));
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    try {
      host_sim::launch({}, {64}, {.seed = seed, .shared_bytes = 1024}, {input(x)}, kernel(false));
    } catch (const host_sim::Error&) {
      continue;
    }
    CHECK(false);
  }
}

TEST(copy_that_lands_after_the_barrier) {
  // In some orders the other warp's copy has landed by chance, in others not.
  const std::vector<std::uint32_t> x(64 * 4, 1);
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    check_error("shared address", [&] {
      host_sim::launch({}, {64}, {.seed = seed, .shared_bytes = 1024}, {input(x)}, [&] {
        if (thread() == 0) ptx::copy_async16(0, x.data(), true);
        ptx::copy_commit();
        ptx::sync_threads();
        ptx::copy_wait<0>();
        if (thread() == 32) ptx::load_shared<std::uint32_t>(0);
      });
    });
  }
}

TEST(copy_over_what_others_still_read) {
  const std::vector<std::uint32_t> x(4, 1);
  check_error("nothing orders", [&] {
    host_sim::launch({}, {64}, {.shared_bytes = 16}, {input(x)}, [&] {
      if (thread() == 0) ptx::store_shared(0, 0);
      ptx::sync_threads();
      ptx::load_shared<int>(0);
      if (thread() == 0) {
        ptx::copy_async16(0, &x[0], true);
        ptx::copy_commit();
        ptx::copy_wait<0>();
      }
    });
  });
}

TEST(copy_from_outside) {
  const std::vector<std::uint32_t> x(4, 1);
  const auto launch = [&](bool is_valid) {
    host_sim::launch({}, {1}, {.shared_bytes = 16}, {input(x)}, [&] {
      ptx::copy_async16(0, x.data() + 4, is_valid);
      ptx::copy_commit();
      ptx::copy_wait<0>();
    });
  };
  launch(false);
  check_error("outside of all arrays", [&] { launch(true); });
}

TEST(copy_that_outlives_its_thread) {
  const std::vector<std::uint32_t> x(4, 1);
  const auto launch = [&](bool has_copy, bool has_commit) {
    host_sim::launch({}, {1}, {.shared_bytes = 16}, {input(x)}, [&] {
      ptx::copy_commit();
      if (has_copy) ptx::copy_async16(0, x.data(), true);
      if (has_commit) ptx::copy_commit();
    });
  };
  launch(false, true);
  check_error("before this copy has landed", [&] { launch(true, true); });
  check_error("before this copy has landed", [&] { launch(true, false); });
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
