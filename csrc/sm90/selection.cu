// The variants of block selection for compute capability 9.0 that are compiled.
#include <exception>

#include "common/launch.cuh"
#include "sm90/selection.cuh"

namespace sparse_attn::sm90 {
namespace {

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, ptx::BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;

// Each consumer has lists of its own: longer ones have room where a CTA has those of one token.
const SelectionVariant& of_sm80(const SelectionKey& key) {
  const auto all = sm80::selection_variants();
  return *std::find_if(all.begin(), all.end(),
                       [&](const SelectionVariant& variant) { return variant.key == key; });
}

template <class T, int kHeadDim>
Status run_variant(SelectionParams p, int segment_blocks, const LaunchContext& context) {
  using Config = SelectionConfig<T, kHeadDim>;
  p.tiling = tiling_for<Config>(p, segment_blocks);
  if (p.tiling.tile_tokens == 0)
    return of_sm80({80, kDtype<T>, kHeadDim}).run(p, segment_blocks, context);
  const std::int64_t tokens = Config::kConsumers * p.tiling.tile_tokens;
  const Grid grid = {(p.q_len + tokens - 1) / tokens, p.num_lists, p.batch};
  const auto bytes =
      static_cast<std::uint32_t>(memory_of<Config>(p.tiling, 0, Config::kConsumers - 1).end);
  try {
    const SelectionArguments arguments = {.params = p,
                                          .fine = map_of_units<T, kHeadDim>(p.fine, p),
                                          .coarse = map_of_units<T, kHeadDim>(p.coarse, p)};
    return launch<Config>(selection<Config>, grid, arguments, context, bytes);
  } catch (const std::exception& error) {
    return error.what();
  }
}

constexpr SelectionVariant kVariants[] = {
    {{90, Dtype::kBFloat16, 64}, run_variant<ptx::BFloat16, 64>},
    {{90, Dtype::kBFloat16, 96}, run_variant<ptx::BFloat16, 96>},
    {{90, Dtype::kBFloat16, 128}, run_variant<ptx::BFloat16, 128>},
    {{90, Dtype::kBFloat16, 256}, run_variant<ptx::BFloat16, 256>},
    {{90, Dtype::kFloat16, 64}, run_variant<ptx::Float16, 64>},
    {{90, Dtype::kFloat16, 96}, run_variant<ptx::Float16, 96>},
    {{90, Dtype::kFloat16, 128}, run_variant<ptx::Float16, 128>},
    {{90, Dtype::kFloat16, 256}, run_variant<ptx::Float16, 256>},
};

}  // namespace

std::span<const SelectionVariant> selection_variants() { return kVariants; }

}  // namespace sparse_attn::sm90
