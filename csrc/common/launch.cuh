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
#else
  cudaError_t error = cudaSuccess;
  // What a block may have without asking.
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid.as<dim3>();
    config.blockDim = {Config::kThreads};
    config.dynamicSmemBytes = shared_bytes;
    config.stream = context.stream;
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next caller of CUDA on this thread would find it
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
#endif
  return {};
}

// How many blocks of one per multiprocessor run at the same time on the current device.
inline int num_multiprocessors() {
#if SPARSE_ATTN_HOST_SIM
  return 3;  // so that small grids are not whole rounds
#else
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#endif
}

// Kernels that run one after the other. Each has a `Config`, an entry `kKernel`, and the `grid` of
// its parameters.
template <class... Kernels>
struct Sequence {
  template <class Params>
  static Status run(const Params& params, const LaunchContext& context) {
    Status status;
    const auto start = [&]<class Kernel>() {
      status =
          launch<typename Kernel::Config>(Kernel::kKernel, Kernel::grid(params), params, context);
      return !status;
    };
    static_cast<void>((start.template operator()<Kernels>() && ...));
    return status;
  }
};

}  // namespace sparse_attn
