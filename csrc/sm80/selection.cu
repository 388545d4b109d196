// The variants of block selection for compute capability 8.0 that are compiled.
#include "common/launch.cuh"
#include "common/variants.cuh"
#include "sm80/selection.cuh"

namespace sparse_attn::sm80 {
namespace {

template <class Config>
Status launch_tiles(SelectionParams p, int segment_blocks, const LaunchContext& context) {
  p.tiling = tiling_for<Config>(p, segment_blocks);
  if (p.tiling.tile_tokens == 0) {
    return "top_k " + std::to_string(p.top_k) + " and " + std::to_string(p.num_blocks) +
           " blocks of keys do not fit into shared memory";
  }
  return launch_queue<Config>(selection<Config>, SelectionTiles::count(p, 1), SelectionTiles::kKind,
                              p.num_taken, p, context,
                              static_cast<std::uint32_t>(SelectionMemory<Config>(p.tiling).bytes));
}

// Tiles of 128 rows read the units half as often as those of 64. They are for large groups, and
// queries that fill them: the lists of many tokens do not leave room for two CTAs.
template <class T, int kHeadDim>
struct Variant {
  static Status run(SelectionParams p, int segment_blocks, const LaunchContext& context) {
    using Low = SelectionConfig<T, kHeadDim, 2, 2>;
    if constexpr (kHeadDim <= 128) {
      using High = SelectionConfig<T, kHeadDim, 4, 1>;
      const int group_rows = padded_group_rows(p);
      if (group_rows >= 8 && std::int64_t{p.q_len} * group_rows > Low::kRows)
        return launch_tiles<High>(p, segment_blocks, context);
    }
    return launch_tiles<Low>(p, segment_blocks, context);
  }
};

}  // namespace

std::span<const SelectionVariant> selection_variants() {
  static const auto all = list_selection<80, Variant>();
  return all;
}

}  // namespace sparse_attn::sm80
