// What every custom call is made of.
#pragma once

#include <cstdint>

#include "ffi/arguments.h"
#include "launchers.h"
#include "xla/ffi/api/ffi.h"

namespace sparse_attn {

// A handler takes arrays, results, attributes and, on a GPU alone, the stream.
#if SPARSE_ATTN_HOST_SIM
template <class Attributes>
auto bind_handler() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().template Attrs<Attributes>();
}
inline LaunchContext context_of(const Call& call, std::int64_t seed) {
  return {.seed = static_cast<std::uint64_t>(seed), .buffers = call.buffers()};
}
// A handler with this body, which is a template over the type of the stream.
#define SPARSE_ATTN_HANDLER(body) body<>
#else
template <class Attributes>
auto bind_handler() {
  return ffi::Ffi::Bind()
      .RemainingArgs()
      .RemainingRets()
      .template Attrs<Attributes>()
      .template Ctx<ffi::PlatformStream<CUstream_st*>>();
}
inline LaunchContext context_of(const Call&, std::int64_t, CUstream_st* stream) { return {stream}; }
#define SPARSE_ATTN_HANDLER(body) body<CUstream_st*>
#endif

inline ffi::Error result_of(const Status& status) {
  return status ? ffi::Error::Internal(*status) : ffi::Error::Success();
}

}  // namespace sparse_attn
