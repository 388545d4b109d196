// The best of a stream of blocks, kept by one warp.
//
// Candidates that beat the threshold, the k-th best so far, are appended to a list in shared
// memory. When it is full, the k best are found by bisection on the bits of their ranks, and the
// rest are dropped. Blocks must come in ascending order: then the list is ascending as well, and
// the lower id wins a tie because it is there first.
#pragma once

#include "common/ptx.cuh"

namespace sparse_attn {

// In the order of scores that are not negative; 0, below all others, for NaN.
__device__ __forceinline__ std::uint32_t rank_of(float score) {
  const std::uint32_t bits = ptx::bits_of(score);
  return bits > 0x7f800000u ? 0 : bits + 1;
}

class RunningTopK {
 public:
  // What is kept between two uses, in shared memory.
  static constexpr std::uint32_t kStateBytes = 8;
  static __device__ void store_empty(std::uint32_t state, int k) {
    ptx::store_shared(state, 0);
    // Nothing beats the threshold of an empty list.
    ptx::store_shared<std::uint32_t>(state + 4, k > 0 ? 0 : UINT32_MAX);
  }

  // `ranks` and `blocks` are [capacity]; capacity is at least k + 32.
  __device__ RunningTopK(std::uint32_t state, std::uint32_t ranks, std::uint32_t blocks,
                         int capacity, int k)
      : state_(state),
        ranks_(ranks),
        blocks_(blocks),
        capacity_(capacity),
        k_(k),
        count_(ptx::load_shared<int>(state)),
        threshold_(ptx::load_shared<std::uint32_t>(state + 4)) {}

  // Every lane brings a block, lane by lane ascending; those of rank 0 are ignored.
  __device__ void push(std::uint32_t rank, int block) {
    std::uint32_t better = ptx::ballot(rank > threshold_);
    if (better == 0) return;
    if (count_ + ptx::count_bits(better) > capacity_) {
      prune();
      better = ptx::ballot(rank > threshold_);
    }
    if (rank > threshold_) {
      const int place = count_ + ptx::count_bits(better & lower_lanes());
      ptx::store_shared(ranks_ + 4 * place, rank);
      ptx::store_shared(blocks_ + 4 * place, block);
    }
    count_ += ptx::count_bits(better);
  }

  // Drops all but the k best.
  __device__ void prune() {
    ptx::sync_warp();  // all lanes see the list
    if (count_ <= k_) return;
    threshold_ = kth_rank();
    // Those above the threshold, and as many at it as there is room for, move to the front.
    int ties = k_ - num_reaching(threshold_ + 1);
    int kept = 0;
    for (int base = 0; base < count_; base += 32) {
      const int i = base + ptx::lane_index();
      const std::uint32_t rank = i < count_ ? rank_at(i) : 0;
      const int block = i < count_ ? block_at(i) : 0;
      const std::uint32_t tied = ptx::ballot(rank == threshold_);
      const bool is_kept =
          rank > threshold_ || (rank == threshold_ && ptx::count_bits(tied & lower_lanes()) < ties);
      ties -= ptx::count_bits(tied);
      const std::uint32_t all_kept = ptx::ballot(is_kept);
      ptx::sync_warp();  // these entries are read: the front may overwrite them
      if (is_kept) {
        const int place = kept + ptx::count_bits(all_kept & lower_lanes());
        ptx::store_shared(ranks_ + 4 * place, rank);
        ptx::store_shared(blocks_ + 4 * place, block);
      }
      kept += ptx::count_bits(all_kept);
    }
    count_ = k_;
    ptx::sync_warp();  // all lanes see the shorter list
  }

  __device__ void store_state() const {
    ptx::sync_warp();  // all lanes have read the old one
    if (ptx::lane_index() == 0) {
      ptx::store_shared(state_, count_);
      ptx::store_shared(state_ + 4, threshold_);
    }
    ptx::sync_warp();  // all lanes see the new one
  }

  __device__ int count() const { return count_; }
  __device__ int block_at(int i) const { return ptx::load_shared<int>(blocks_ + 4 * i); }
  // How many of the list come before a block.
  __device__ int count_below(int block) const {
    int below = 0;
    for (int base = 0; base < count_; base += 32) {
      const int i = base + ptx::lane_index();
      below += ptx::count_bits(ptx::ballot(i < count_ && block_at(i) < block));
    }
    return below;
  }

 private:
  static __device__ std::uint32_t lower_lanes() { return (1u << ptx::lane_index()) - 1; }
  __device__ std::uint32_t rank_at(int i) const {
    return ptx::load_shared<std::uint32_t>(ranks_ + 4 * i);
  }

  // How many entries have at least this rank.
  __device__ int num_reaching(std::uint32_t rank) const {
    int count = 0;
    for (int base = 0; base < count_; base += 32) {
      const int i = base + ptx::lane_index();
      count += ptx::count_bits(ptx::ballot(i < count_ && rank_at(i) >= rank));
    }
    return count;
  }

  // A rank that at least k entries reach, and that fewer than k exceed unless exactly k reach it.
  __device__ std::uint32_t kth_rank() const {
    std::uint32_t largest = 0;
    for (int i = ptx::lane_index(); i < count_; i += 32) {
      const std::uint32_t rank = rank_at(i);
      largest = rank > largest ? rank : largest;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      const std::uint32_t other = ptx::shuffle_xor(largest, distance);
      largest = other > largest ? other : largest;
    }
    // No entry is below the old threshold, so the bits in which it agrees with the largest rank are
    // those of the new one. Ranks are below 2^31.
    int bit = ptx::highest_bit(threshold_ ^ largest);
    std::uint32_t found = threshold_ >> (bit + 1) << (bit + 1);
    for (; bit >= 0; --bit) {
      const std::uint32_t raised = found | 1u << bit;
      const int reaching = num_reaching(raised);
      if (reaching >= k_) found = raised;
      if (reaching == k_) break;
    }
    return found;
  }

  std::uint32_t state_, ranks_, blocks_;
  int capacity_, k_, count_;
  std::uint32_t threshold_;
};

}  // namespace sparse_attn
