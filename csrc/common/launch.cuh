// Starts kernels, on a GPU or in the simulator.
#pragma once

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <typeinfo>
#include <vector>

#include "common/ptx.cuh"
#include "launchers.h"

namespace sparse_attn {

template <class Config>
bool add_kernel_info() {
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(typeid(Config).name(), nullptr, nullptr, nullptr), std::free);
  int shared_bytes = -1;
  if constexpr (requires { Config::kSharedBytes; }) shared_bytes = Config::kSharedBytes;
  kernel_infos().push_back({name.get(), Config::kThreads, shared_bytes});
  return true;
}

// Adds to the list when the library is loaded.
template <class Config>
inline const bool kIsListed = add_kernel_info<Config>();

struct Grid {
  std::int64_t x, y, z;  // blocks

  template <class Shape>
  Shape as() const {
    return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
  }
};

#if SPARSE_ATTN_HOST_SIM
// Of a thread when it starts, for kernels that move registers between warpgroups: `kBlocks` of
// their blocks run on a multiprocessor.
template <class Config>
constexpr int registers_of() {
  if constexpr (requires { Config::kBlocks; }) {
    return std::min(65536 / (Config::kBlocks * Config::kThreads) / 8 * 8, 256);
  } else {
    return 0;
  }
}
#else
inline Status status_of(cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // else the next caller of CUDA on this thread would find it
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// Asks for all that a block may have: less would take it from a launch on another thread, or one in
// a graph, because the limit is one for all launches of the kernel.
template <class Params>
cudaError_t allow_shared_bytes(void (*kernel)(Params), std::uint32_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;  // what a block may have without asking
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  return error;
}
#endif

// No allocation, no synchronisation: a launch may be captured into a CUDA graph.
template <class Config, class Params>
Status launch(void (*kernel)(Params), const Grid& grid, const Params& params,
              const LaunchContext& context, std::uint32_t shared_bytes = Config::kSharedBytes) {
  static_cast<void>(kIsListed<Config>);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return {};
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    return "a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
           std::to_string(grid.z) +
           " blocks (tiles or keys, num_kv_heads, batch); the largest is " +
           "2147483647 x 65535 x 65535";
  }
#if SPARSE_ATTN_HOST_SIM
  try {
    host_sim::launch(
        grid.as<host_sim::Dim3>(), {Config::kThreads},
        {.seed = context.seed, .shared_bytes = shared_bytes, .registers = registers_of<Config>()},
        context.buffers, [&] { kernel(params); });
  } catch (const host_sim::Error& error) {
    return error.what();
  }
  return {};
#else
  cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid.as<dim3>();
    config.blockDim = {Config::kThreads};
    config.dynamicSmemBytes = shared_bytes;
    config.stream = context.stream;
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  return status_of(error);
#endif
}

// Starts a kernel whose blocks share `pieces` of a WorkQueue: as many blocks as run at the same
// time on the current device, or fewer if there are fewer pieces. `kind` says what a piece is.
template <class Config, class Params>
Status launch_queue(void (*kernel)(Params), std::int64_t pieces, const char* kind,
                    std::int32_t* num_taken, const Params& params, const LaunchContext& context,
                    std::uint32_t shared_bytes = Config::kSharedBytes) {
  if (pieces == 0) return {};
#if SPARSE_ATTN_HOST_SIM
  const int blocks = 3;  // so that some have several pieces
  *num_taken = 0;
#else
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Config::kThreads,
                                                          shared_bytes);
  }
  if (error == cudaSuccess)
    error = cudaMemsetAsync(num_taken, 0, sizeof(*num_taken), context.stream);
  if (Status status = status_of(error)) return status;
  // 0 if a block does not fit: then the launch says so.
  blocks = std::max(1, blocks * multiprocessors);
#endif
  if (pieces > INT32_MAX - blocks) {
    return std::to_string(pieces) + " " + kind + "; there may be " +
           std::to_string(INT32_MAX - blocks);
  }
  return launch<Config>(kernel, {std::min<std::int64_t>(pieces, blocks), 1, 1}, params, context,
                        shared_bytes);
}

// Kernels that run one after the other, each with a function that starts it.
template <class... Kernels>
struct Sequence {
  template <class Params>
  static Status run(const Params& params, const LaunchContext& context) {
    Status status;
    static_cast<void>((... && !(status = Kernels::run(params, context))));
    return status;
  }
};

}  // namespace sparse_attn
