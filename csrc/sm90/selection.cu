// The variants of block selection for compute capability 9.0 that are compiled.
#include <exception>

#include "common/launch.cuh"
#include "common/variants.cuh"
#include "sm90/selection.cuh"

namespace sparse_attn::sm90 {
namespace {

template <class T, int kHeadDim>
struct Variant {
  static Status run(SelectionParams p, int segment_blocks, const LaunchContext& context) {
    using Config = SelectionConfig<T, kHeadDim>;
    p.tiling = tiling_for<Config>(p, segment_blocks);
    // Each consumer has lists of its own: longer ones have room where a CTA has those of one token.
    if (p.tiling.tile_tokens == 0) {
      const SelectionKey key = {80, kDtype<T>, kHeadDim};
      return find_variant(sm80::selection_variants(), key)->run(p, segment_blocks, context);
    }
    const auto bytes =
        static_cast<std::uint32_t>(memory_of<Config>(p.tiling, 0, Config::kConsumers - 1).end);
    try {
      const SelectionArguments arguments = {.params = p,
                                            .fine = map_of_units<T, kHeadDim>(p.fine, p),
                                            .coarse = map_of_units<T, kHeadDim>(p.coarse, p)};
      return launch_queue<Config>(selection<Config>, SelectionTiles::count(p, Config::kConsumers),
                                  SelectionTiles::kKind, p.num_taken, arguments, context, bytes);
    } catch (const std::exception& error) {
      return error.what();
    }
  }
};

}  // namespace

std::span<const SelectionVariant> selection_variants() {
  static const auto all = list_selection<90, Variant>();
  return all;
}

}  // namespace sparse_attn::sm90
