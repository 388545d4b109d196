// What a source is compiled for: SPARSE_ATTN_HOST_SIM is 1 for the simulator, 0 for a GPU. The
// build of the GPU's library defines it for the files that nvcc does not compile.
#pragma once

#if !defined(SPARSE_ATTN_HOST_SIM)
#if defined(__CUDACC__)
#define SPARSE_ATTN_HOST_SIM 0
#else
#define SPARSE_ATTN_HOST_SIM 1
#endif
#endif

// Whether csrc/sm90 is compiled: not if the GPU's library is for others alone.
#if !defined(SPARSE_ATTN_SM90)
#define SPARSE_ATTN_SM90 1
#endif
