// The variants of block selection for compute capability 8.0 that are compiled.
#include "common/launch.cuh"
#include "sm80/selection.cuh"

namespace sparse_attn::sm80 {
namespace {

template <class Config>
Status run(SelectionParams p, int segment_blocks, const LaunchContext& context) {
  p.tiling = tiling_for<Config>(p, segment_blocks);
  if (p.tiling.tile_tokens == 0) {
    return "top_k " + std::to_string(p.top_k) + " and " + std::to_string(p.num_blocks) +
           " blocks of keys do not fit into shared memory";
  }
  const std::int64_t num_tiles =
      (std::int64_t{p.q_len} + p.tiling.tile_tokens - 1) / p.tiling.tile_tokens;
  return launch<Config>(selection<Config>, {num_tiles, p.num_lists, p.batch}, p, context,
                        static_cast<std::uint32_t>(SelectionMemory<Config>(p.tiling).bytes));
}

// Tiles of 128 rows read the units half as often as those of 64. They are for large groups, and
// queries that fill them: the lists of many tokens do not leave room for two CTAs.
template <class T, int kHeadDim>
Status run_variant(SelectionParams p, int segment_blocks, const LaunchContext& context) {
  using Low = SelectionConfig<T, kHeadDim, 2, 2>;
  if constexpr (kHeadDim <= 128) {
    using High = SelectionConfig<T, kHeadDim, 4, 1>;
    const int group_rows = padded_group_rows(p);
    if (group_rows >= 8 && std::int64_t{p.q_len} * group_rows > Low::kRows)
      return run<High>(p, segment_blocks, context);
  }
  return run<Low>(p, segment_blocks, context);
}

constexpr SelectionVariant kVariants[] = {
    {{80, Dtype::kBFloat16, 64}, run_variant<ptx::BFloat16, 64>},
    {{80, Dtype::kBFloat16, 96}, run_variant<ptx::BFloat16, 96>},
    {{80, Dtype::kBFloat16, 128}, run_variant<ptx::BFloat16, 128>},
    {{80, Dtype::kBFloat16, 256}, run_variant<ptx::BFloat16, 256>},
    {{80, Dtype::kFloat16, 64}, run_variant<ptx::Float16, 64>},
    {{80, Dtype::kFloat16, 96}, run_variant<ptx::Float16, 96>},
    {{80, Dtype::kFloat16, 128}, run_variant<ptx::Float16, 128>},
    {{80, Dtype::kFloat16, 256}, run_variant<ptx::Float16, 256>},
};

}  // namespace

std::span<const SelectionVariant> selection_variants() { return kVariants; }

}  // namespace sparse_attn::sm80
