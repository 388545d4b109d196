// What nvcc declares by itself, for kernel sources that g++ compiles.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "host_sim/simulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::host_sim::thread_index())
#define blockIdx (::host_sim::block_index())
#define blockDim (::host_sim::block_shape())
#define gridDim (::host_sim::grid_shape())
