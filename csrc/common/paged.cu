// Starts the kernels of paged attention that are the same for every architecture.
#include "common/launch.cuh"
#include "common/merge_splits.cuh"

namespace sparse_attn {
namespace {

template <class T>
Status merge(const PagedAttentionParams& p, const LaunchContext& context) {
  using Config = MergeSplitsConfig<T>;
  constexpr int kWarps = Config::kThreads / 32;
  const std::int64_t rows = std::int64_t{p.batch} * p.q_len * p.num_q_heads;
  return launch<Config>(merge_splits<Config>, {(rows + kWarps - 1) / kWarps, 1, 1}, p, context);
}

}  // namespace

Status merge_splits(Dtype dtype, const PagedAttentionParams& params, const LaunchContext& context) {
  return dtype == Dtype::kBFloat16 ? merge<ptx::BFloat16>(params, context)
                                   : merge<ptx::Float16>(params, context);
}

}  // namespace sparse_attn
