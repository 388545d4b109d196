// Finds two accesses to the same word of shared memory with nothing that orders them.
//
// Time is kept as vector clocks of warps: warp a knows warp b's accesses up to `clock_of(a, b)`.
// Lanes of one warp are ordered by a counter that a warp-wide or wider barrier advances.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "host_sim/simulator.h"

namespace host_sim {

class Races {
 public:
  static constexpr int kAnyLane = kWarpSize;  // an access on behalf of the whole warp
  static constexpr std::size_t kWordBytes = 2;

  Races(int num_warps, std::size_t bytes);

  // A message about the earlier access that this one races with, if there is one. `lane` may be
  // kAnyLane.
  std::optional<std::string> access(std::uint32_t address, std::size_t bytes, bool is_write,
                                    int warp, int lane, Location location);
  // All lanes of a warp have met: later accesses of each come after earlier ones of the others.
  void join_lanes(int warp);
  // What a barrier collects when a warp arrives, and gives to those that wait.
  using Clock = std::array<std::uint32_t, kMaxWarps>;
  void release(int warp, Clock& into);
  void acquire(int warp, const Clock& from);

 private:
  struct Stamp {
    std::uint32_t clock = 0;  // 0: never
    std::uint32_t lane_epoch = 0;
    std::int16_t lane = 0;
    std::int16_t warp = 0;
    Location location;
  };
  bool is_ordered(const Stamp& earlier, int warp, int lane) const;

  int num_warps_;
  std::vector<Stamp> writes_;               // by word
  std::vector<Stamp> reads_;                // by word and warp
  std::vector<Clock> clocks_;               // by warp
  std::vector<std::uint32_t> lane_epochs_;  // by warp
};

}  // namespace host_sim
