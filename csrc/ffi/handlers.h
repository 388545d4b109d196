// The custom calls.
#pragma once

#include "xla/ffi/api/ffi.h"

extern "C" {
XLA_FFI_Error* sparse_attn_attention_forward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_attention_backward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_select_blocks(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_paged_attention(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_block_extrema(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_select_by_bounds(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_plan_unions(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* sparse_attn_plan_inverse(XLA_FFI_CallFrame* call_frame);
}
