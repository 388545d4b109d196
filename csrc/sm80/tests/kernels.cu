// The variants with the most registers, to see what ptxas makes of them.
#include "sm80/attention_backward.cuh"
#include "sm80/attention_forward.cuh"

namespace sparse_attn::sm80 {

using T = ptx::BFloat16;

template __global__ void attention_forward<ForwardConfig<T, 64, 64>>(
    const __grid_constant__ AttentionForwardParams);
template __global__ void attention_forward<ForwardConfig<T, 96, 64>>(
    const __grid_constant__ AttentionForwardParams);
template __global__ void attention_forward<ForwardConfig<T, 128, 64>>(
    const __grid_constant__ AttentionForwardParams);
template __global__ void attention_forward<ForwardConfig<T, 256, 32>>(
    const __grid_constant__ AttentionForwardParams);

template __global__ void query_gradient<QueryGradientConfig<T, 64, 64>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void query_gradient<QueryGradientConfig<T, 96, 64>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void query_gradient<QueryGradientConfig<T, 128, 64>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void query_gradient<QueryGradientConfig<T, 256, 32>>(
    const __grid_constant__ AttentionBackwardParams);

template <int kHeadDim, KeyGradient kWhich>
using KeyConfig = KeyGradientConfig<T, kHeadDim, 64, kWhich>;

template __global__ void key_gradient<KeyConfig<64, KeyGradient::kBoth>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void key_gradient<KeyConfig<96, KeyGradient::kBoth>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void key_gradient<KeyConfig<128, KeyGradient::kBoth>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void key_gradient<KeyConfig<256, KeyGradient::kKey>>(
    const __grid_constant__ AttentionBackwardParams);
template __global__ void key_gradient<KeyConfig<256, KeyGradient::kValue>>(
    const __grid_constant__ AttentionBackwardParams);

}  // namespace sparse_attn::sm80
