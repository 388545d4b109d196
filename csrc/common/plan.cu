// Starts the kernels that build plans.
#include <algorithm>

#include "common/launch.cuh"
#include "common/plan.cuh"

namespace sparse_attn {
namespace {

// What a block may have without asking, and at most.
constexpr std::uint32_t kUsualSharedBytes = 48 * 1024, kMostSharedBytes = 163 * 1024;

// Blocks per window: all, or as many as the usual shared memory has room for.
int window_of(const UnionParams& p) {
  int blocks = (p.num_kv_blocks + 31) / 32 * 32;
  while (blocks > 32 && UnionMemory(blocks, p.num_words).bytes > kUsualSharedBytes)
    blocks = blocks / 64 * 32;
  return std::max(blocks, 32);
}

}  // namespace

Status build_unions(const UnionParams& params, int window_blocks, const LaunchContext& context) {
  UnionParams p = params;
  p.window_blocks = window_blocks > 0 ? window_blocks : window_of(p);
  const UnionMemory memory(p.window_blocks, p.num_words);
  if (memory.bytes > kMostSharedBytes) {
    return std::to_string(p.num_groups) + " row groups of a tile need " +
           std::to_string(memory.bytes) + " bytes of shared memory; there are " +
           std::to_string(kMostSharedBytes);
  }
  return launch<UnionConfig>(plan_unions<UnionConfig>, {p.num_tiles, p.heads, p.batch}, p, context,
                             static_cast<std::uint32_t>(memory.bytes));
}

Status invert_plan(const InversionParams& p, const LaunchContext& context) {
  using Config = InversionConfig;
  const Grid parts = {p.num_parts, p.rows, 1};
  const Grid blocks = {(p.num_kv_blocks + Config::kThreads - 1) / Config::kThreads, p.rows, 1};
  Status status = launch<Config>(count_blocks<Config>, parts, p, context);
  if (!status) status = launch<Config>(sum_over_parts<Config>, blocks, p, context);
  if (!status)
    status = launch<OffsetsConfig>(sum_over_blocks<OffsetsConfig>, {p.rows, 1, 1}, p, context);
  if (!status) status = launch<Config>(place_entries<Config>, parts, p, context);
  return status;
}

}  // namespace sparse_attn
