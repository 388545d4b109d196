// Starts the kernels of blocks' extrema, and those that select blocks by them.
#include "common/bounds.cuh"
#include "common/extrema.cuh"
#include "common/launch.cuh"

namespace sparse_attn {
namespace {

constexpr std::int64_t kMostSharedBytes = 163 * 1024;

template <class T, int kHeadDim>
Status run(const BoundParams& p, const LaunchContext& context) {
  using Config = BoundConfig<T, kHeadDim>;
  const std::int64_t queries = p.reduction == BoundReduction::kMeanQuery
                                   ? 1
                                   : p.num_q_heads / p.num_kv_heads,
                     bytes = queries * 2 * kHeadDim * 4;
  if (bytes > kMostSharedBytes) {
    return std::to_string(queries) + " query heads of a KV head need " + std::to_string(bytes) +
           " bytes of shared memory; there are " + std::to_string(kMostSharedBytes);
  }
  const std::int64_t tiles = (std::int64_t{p.num_blocks} + Config::kBlocks - 1) / Config::kBlocks;
  Status status = launch<Config>(block_bounds<Config>, {tiles, p.num_kv_heads, p.batch}, p, context,
                                 static_cast<std::uint32_t>(bytes));
  if (!status) {
    status = launch<HighestConfig>(list_highest<HighestConfig>, {p.q_len, p.num_lists, p.batch}, p,
                                   context);
  }
  return status;
}

template <class T>
Status run(int head_dim, const BoundParams& p, const LaunchContext& context) {
  switch (head_dim) {
    case 64:
      return run<T, 64>(p, context);
    case 96:
      return run<T, 96>(p, context);
    case 128:
      return run<T, 128>(p, context);
    case 256:
      return run<T, 256>(p, context);
  }
  return "head_dim is " + std::to_string(head_dim) + "; there are kernels for 64, 96, 128 and 256";
}

template <class T>
Status find_extrema(const ExtremaParams& p, const LaunchContext& context) {
  using Config = ExtremaConfig<T>;
  const std::int64_t parts = (std::int64_t{p.row_pieces} + Config::kThreads - 1) / Config::kThreads;
  return launch<Config>(block_extrema<Config>, {parts, p.num_blocks, p.batch}, p, context);
}

}  // namespace

Status find_extrema(Dtype dtype, const ExtremaParams& params, const LaunchContext& context) {
  return dtype == Dtype::kBFloat16 ? find_extrema<ptx::BFloat16>(params, context)
                                   : find_extrema<ptx::Float16>(params, context);
}

Status select_by_bounds(Dtype dtype, int head_dim, const BoundParams& params,
                        const LaunchContext& context) {
  return dtype == Dtype::kBFloat16 ? run<ptx::BFloat16>(head_dim, params, context)
                                   : run<ptx::Float16>(head_dim, params, context);
}

}  // namespace sparse_attn
