#include "host_sim/races.h"

#include <algorithm>

namespace host_sim {

Races::Races(int num_warps, std::size_t bytes)
    : num_warps_(num_warps),
      writes_((bytes + kWordBytes - 1) / kWordBytes),
      reads_(writes_.size() * num_warps),
      clocks_(num_warps),
      lane_epochs_(num_warps, 1) {
  for (int warp = 0; warp < num_warps; ++warp) {
    clocks_[warp].fill(0);
    clocks_[warp][warp] = 1;
  }
}

bool Races::is_ordered(const Stamp& earlier, int warp, int lane) const {
  if (earlier.clock == 0) return true;
  if (earlier.warp == warp) {
    return (earlier.lane == lane && lane != kAnyLane) || earlier.lane_epoch < lane_epochs_[warp];
  }
  return earlier.clock <= clocks_[warp][earlier.warp];
}

std::optional<std::string> Races::access(std::uint32_t address, std::size_t bytes, bool is_write,
                                         int warp, int lane, Location location) {
  const Stamp now{clocks_[warp][warp], lane_epochs_[warp], static_cast<std::int16_t>(lane),
                  static_cast<std::int16_t>(warp), location};
  const auto describe = [&](const Stamp& earlier, const char* what) {
    const std::string who =
        earlier.lane == kAnyLane
            ? "warp " + std::to_string(earlier.warp)
            : "thread " + std::to_string(earlier.warp * kWarpSize + earlier.lane);
    return std::string("nothing orders this ") + (is_write ? "write" : "read") +
           " of shared address " + std::to_string(address) + " after the " + what + " by " + who +
           " at " + earlier.location.file + ":" + std::to_string(earlier.location.line);
  };
  for (std::size_t word = address / kWordBytes; word * kWordBytes < address + bytes; ++word) {
    if (!is_ordered(writes_[word], warp, lane)) return describe(writes_[word], "write");
    Stamp* reads = &reads_[word * num_warps_];
    if (is_write) {
      for (int other = 0; other < num_warps_; ++other) {
        if (!is_ordered(reads[other], warp, lane)) return describe(reads[other], "read");
      }
      writes_[word] = now;
    } else {
      Stamp& own = reads[warp];
      const bool is_shared =
          own.clock != 0 && own.lane_epoch == now.lane_epoch && own.lane != now.lane;
      own = now;
      if (is_shared) own.lane = kAnyLane;
    }
  }
  return std::nullopt;
}

void Races::join_lanes(int warp) { ++lane_epochs_[warp]; }

void Races::release(int warp, Clock& into) {
  for (int other = 0; other < num_warps_; ++other)
    into[other] = std::max(into[other], clocks_[warp][other]);
  ++clocks_[warp][warp];  // what comes now is not covered
}

void Races::acquire(int warp, const Clock& from) {
  for (int other = 0; other < num_warps_; ++other)
    clocks_[warp][other] = std::max(clocks_[warp][other], from[other]);
}

}  // namespace host_sim
