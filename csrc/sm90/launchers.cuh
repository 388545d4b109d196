// What the variants of compute capability 9.0 launch.
#pragma once

#include <algorithm>
#include <exception>

#include "common/delta.cuh"
#include "common/launch.cuh"
#include "common/partials.cuh"
#include "common/variants.cuh"
#include "sm90/attention_backward.cuh"
#include "sm90/attention_forward.cuh"

namespace sparse_attn::sm90 {

// Names of their own: of functions with one name the linker keeps any, also one that starts a
// kernel which was not compiled for all architectures.
template <class T, int kHeadDim>
struct DeltaConfig : sparse_attn::DeltaConfig<T, kHeadDim> {};
template <class T, int kHeadDim>
struct SumPartialsConfig : sparse_attn::SumPartialsConfig<T, kHeadDim> {};

// Whether the rows of a slice are a box of the query array, which a tensor copy can bring: all rows
// of a tile, some whole tokens, or a part of one token's heads; and whether there is anything to
// copy. The kernels of compute capability 8.0 compute the rest.
inline bool is_regular(const AttentionInputs& in) {
  const AttentionShape& shape = in.shape;
  if (shape.q_len == 0 || shape.kv_len == 0 || shape.key_batch == 0) return false;
  const std::int64_t group_size = shape.num_q_heads / shape.num_kv_heads;
  if (group_size * in.plan.tile_size <= kProductRows || group_size % kProductRows == 0) return true;
  return kProductRows % group_size == 0 && in.plan.tile_size % (kProductRows / group_size) == 0;
}

// Whether a tile has more rows than one consumer computes on.
inline bool has_rows_for_two(const AttentionInputs& in) {
  return Tile::slices_per_tile(in.shape, in.plan, kProductRows) > 1;
}

template <class T, int kHeadDim, int kBlockSize>
struct Variant {
  static const AttentionVariant& of_sm80() {
    return *find_variant(sm80::attention_variants(), {80, kDtype<T>, kHeadDim, kBlockSize});
  }

  // What registers and shared memory hold: two consumers of one CTA, which share keys, or of two
  // that have a tile of 64 rows each.
  static constexpr bool kSharesKeys = kHeadDim <= 128;
  using OfOne = Warpgroups<1, kSharesKeys ? 2 : 1>;
  using OfTwo = Warpgroups<2, 1>;
  using Forward = ForwardConfig<T, kHeadDim, kBlockSize, 64, kHeadDim >= 128 ? 3 : 4, OfOne>;
  using ForwardOfTwo = ForwardConfig<T, kHeadDim, kBlockSize, 64, 5, OfTwo>;

  static Status forward(const AttentionForwardParams& params, const LaunchContext& context) {
    if (!is_regular(params.in)) return of_sm80().forward(params, context);
    try {
      if constexpr (kSharesKeys) {
        if (has_rows_for_two(params.in)) return forward_of<ForwardOfTwo>(params, context);
      }
      return forward_of<Forward>(params, context);
    } catch (const std::exception& error) {
      return error.what();
    }
  }

  template <class Config>
  static Status forward_of(const AttentionForwardParams& params, const LaunchContext& context) {
    const AttentionInputs& in = params.in;
    const AttentionForwardArguments arguments = {
        .params = params,
        .query = map_of_rows<T, kHeadDim>(in.query, in.shape, SliceBox(in.shape, in.plan)),
        .key = map_of_keys<T, kHeadDim>(in.key, in.shape, Config::Stream::kPieceKeys),
        .value = map_of_keys<T, kHeadDim>(in.value, in.shape, Config::Stream::kPieceKeys)};
    return launch_queue<Config>(&attention_forward<Config>, Slices::count(in, Config::kRows),
                                Slices::kKind, params.num_taken, arguments, context);
  }

  static constexpr int kQueryStages = kHeadDim >= 128 ? 2 : kHeadDim > 64 ? 3 : 4;
  // Two blocks in a chunk take one register more than there are.
  static constexpr int kQueryKeys = kHeadDim > 128 && kBlockSize == 32 ? 32 : 64;
  using OfQuery = QueryGradientConfig<T, kHeadDim, kBlockSize, kQueryKeys, kQueryStages, OfOne>;
  using OfQueryOfTwo = QueryGradientConfig<T, kHeadDim, kBlockSize, 64, 4, OfTwo>;
  using OfKey = KeyGradientConfig<T, kHeadDim, std::min(kBlockSize, kProductRows)>;
  using OfParts = PartialSums<SumPartialsConfig<T, kHeadDim>>;

  static Status backward(const AttentionBackwardParams& params, const LaunchContext& context) {
    const AttentionInputs& in = params.in;
    if (!is_regular(in)) return of_sm80().backward(params, context);
    const auto arguments_of = [&](const SliceBox& rows, int keys) -> AttentionBackwardArguments {
      return {.params = params,
              .query = map_of_rows<T, kHeadDim>(in.query, in.shape, rows),
              .d_out = map_of_rows<T, kHeadDim>(params.d_out, in.shape, rows),
              .key = map_of_keys<T, kHeadDim>(in.key, in.shape, keys),
              .value = map_of_keys<T, kHeadDim>(in.value, in.shape, keys)};
    };
    try {
      const auto differentiate_queries = [&]<class Config>(Config) {
        const SliceBox rows(in.shape, in.plan);
        return launch_queue<Config>(&query_gradient<Config>, Slices::count(in, Config::kRows),
                                    Slices::kKind, params.num_taken,
                                    arguments_of(rows, Config::Stream::kPieceKeys), context);
      };
      Status status = Deltas<DeltaConfig<T, kHeadDim>>::run(params, context);
      if (status) return status;
      if constexpr (kSharesKeys) {
        status = has_rows_for_two(in) ? differentiate_queries(OfQueryOfTwo())
                                      : differentiate_queries(OfQuery());
      } else {
        status = differentiate_queries(OfQuery());
      }
      if (status) return status;
      status = launch_queue<OfKey>(
          &key_gradient<OfKey>, KeyChunks::count(params, OfKey::kKeys), KeyChunks::kKind,
          params.num_taken, arguments_of(StripBox(in.shape, in.plan), OfKey::kKeys), context);
      return status ? status : OfParts::run(params, context);
    } catch (const std::exception& error) {
      return error.what();
    }
  }
};

}  // namespace sparse_attn::sm90
