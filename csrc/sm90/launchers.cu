// The variants of compute capability 9.0 that are compiled.
#include <algorithm>
#include <array>
#include <exception>

#include "common/launch.cuh"
#include "common/partials.cuh"
#include "sm90/attention_backward.cuh"
#include "sm90/attention_forward.cuh"

namespace sparse_attn::sm90 {
namespace {

// Whether the rows that a warpgroup computes on are a box of the query array, which a tensor copy
// can bring: whole tokens, or a part of one token's heads; and whether there is anything to copy.
// The kernels of compute capability 8.0 compute the rest.
bool is_regular(const AttentionInputs& in) {
  const AttentionShape& shape = in.shape;
  if (shape.q_len == 0 || shape.kv_len == 0 || shape.key_batch == 0) return false;
  const int group_size = shape.num_q_heads / shape.num_kv_heads;
  if (group_size % kProductRows == 0) return true;
  if (kProductRows % group_size != 0) return false;
  const int tokens = kProductRows / group_size;
  return in.plan.tile_size <= tokens || in.plan.tile_size % tokens == 0;
}

const AttentionVariant& of_sm80(VariantKey key) {
  key.arch = 80;
  const auto all = sm80::attention_variants();
  return *std::find_if(all.begin(), all.end(),
                       [&](const AttentionVariant& variant) { return variant.key == key; });
}

std::int64_t num_kv_blocks(const AttentionShape& shape) {
  return (std::int64_t{shape.kv_len} + shape.kv_block_size - 1) / shape.kv_block_size;
}

// As many blocks as run at the same time, or fewer if there are fewer slices.
template <class Config>
Grid grid_of_slices(const AttentionInputs& in) {
  const std::int64_t slices = Tile::slices_per_tile(in.shape, in.plan, Config::kRows),
                     all = in.plan.num_tiles * slices * in.shape.num_kv_heads * in.shape.batch;
  return {std::min<std::int64_t>(all, num_multiprocessors() * Config::kBlocks), 1, 1};
}

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, ptx::BFloat16> ? Dtype::kBFloat16 : Dtype::kFloat16;

template <class T, int kHeadDim, int kBlockSize>
struct Variant {
  static constexpr VariantKey kKey = {90, kDtype<T>, kHeadDim, kBlockSize};

  // Stages and blocks of a multiprocessor: what registers and shared memory hold.
  using Forward = ForwardConfig < T, kHeadDim, kBlockSize, 64,
        kHeadDim<128 ? 4 : 3, kHeadDim <= 128 ? 2 : 1>;

  static Status forward(const AttentionForwardParams& params, const LaunchContext& context) {
    const AttentionInputs& in = params.in;
    if (!is_regular(in)) return of_sm80(kKey).forward(params, context);
    try {
      const AttentionForwardArguments arguments = {
          .params = params,
          .query = map_of_rows<T, kHeadDim>(in.query, in.shape, SliceBox(in.shape, in.plan)),
          .key = map_of_keys<T, kHeadDim>(in.key, in.shape, Forward::Stream::kPieceKeys),
          .value = map_of_keys<T, kHeadDim>(in.value, in.shape, Forward::Stream::kPieceKeys)};
      return launch<Forward>(&attention_forward<Forward>, grid_of_slices<Forward>(in), arguments,
                             context);
    } catch (const std::exception& error) {
      return error.what();
    }
  }

  using OfKey = KeyGradientConfig<T, kHeadDim, kBlockSize>;
  using OfParts = SumPartialsConfig<T, kHeadDim>;

  static Status backward(const AttentionBackwardParams& params, const LaunchContext& context) {
    const AttentionInputs& in = params.in;
    if (!is_regular(in)) return of_sm80(kKey).backward(params, context);
    const std::int64_t blocks = num_kv_blocks(in.shape);
    try {
      // TODO: dQ
      of_sm80(kKey).backward(params, context);
      const StripBox box(in.shape, in.plan);
      const AttentionBackwardArguments of_key = {
          .params = params,
          .query = map_of_rows<T, kHeadDim>(in.query, in.shape, box),
          .d_out = map_of_rows<T, kHeadDim>(params.d_out, in.shape, box),
          .key = map_of_keys<T, kHeadDim>(in.key, in.shape, OfKey::kKeys),
          .value = map_of_keys<T, kHeadDim>(in.value, in.shape, OfKey::kKeys)};
      // Blocks with several parts have at most as many as there is room for their sums.
      const std::int64_t parts = blocks + params.inverse.num_partials;
      Status status = launch<OfKey>(
          &key_gradient<OfKey>,
          {parts * (in.shape.kv_block_size / OfKey::kKeys), in.shape.num_kv_heads, in.shape.batch},
          of_key, context);
      if (!status && params.inverse.num_partials != 0) {
        status = launch<OfParts>(&sum_partials<OfParts>,
                                 {blocks, in.shape.num_kv_heads, in.shape.batch}, params, context);
      }
      return status;
    } catch (const std::exception& error) {
      return error.what();
    }
  }

  static std::vector<KernelInfo> kernels() {
    std::vector<KernelInfo> all = of_sm80(kKey).kernels();
    all.push_back(kernel_info<Forward>());
    all.push_back(kernel_info<OfKey>());
    return all;
  }
};

template <class T, int kHeadDim, int... kBlockSizes>
void add(std::vector<AttentionVariant>& to) {
  const auto add_one = [&]<int kBlockSize>() {
    using V = Variant<T, kHeadDim, kBlockSize>;
    to.push_back({V::kKey, V::forward, V::backward, V::kernels});
  };
  (add_one.template operator()<kBlockSizes>(), ...);
}

template <class T>
void add_dtype(std::vector<AttentionVariant>& to) {
  add<T, 64, 16, 32, 64, 128>(to);
  add<T, 96, 16, 32, 64, 128>(to);
  add<T, 128, 16, 32, 64, 128>(to);
  add<T, 256, 16, 32, 64, 128>(to);
}

}  // namespace

std::span<const AttentionVariant> attention_variants() {
  static const std::vector<AttentionVariant> all = [] {
    std::vector<AttentionVariant> made;
    add_dtype<ptx::BFloat16>(made);
    add_dtype<ptx::Float16>(made);
    return made;
  }();
  return all;
}

}  // namespace sparse_attn::sm90
