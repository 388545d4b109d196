"""JAX's own FlashAttention-3 in Pallas, dense: what Mosaic GPU reaches on a Hopper GPU."""

import dataclasses

import jax

from benchmarks import contenders
from benchmarks.contenders import Prepared
from benchmarks.workloads import Workload
from sparse_attn_jax.testing.inputs import Inputs

# Elements of a block of keys, of which two and two of values are in shared memory beside the queries.
BLOCK_ELEMENTS = 128 * 128


@dataclasses.dataclass(frozen=True)
class DensePallas:
    """`attention_mgpu.attention`: everything that causality lets through, whatever is selected; causal, it has no gradient."""

    max_len: int
    name = "dense-mgpu"
    kind = "baseline"
    computes = "everything"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        capability = getattr(jax.devices()[0], "compute_capability", None)
        if capability != "9.0":
            raise NotImplementedError(f"needs a GPU of compute capability 9.0, not {capability or jax.default_backend()}")
        if made.dtype != "float16":
            raise NotImplementedError(f"takes float16 alone, and dtype is {made.dtype}")
        contenders.refuse_unsupported(made, self.max_len)
        q_len, kv_len = contenders.lengths(made)
        offset, is_causal = made.options.get("q_offset", kv_len - q_len), made.options.get("is_causal", False)
        if is_causal and offset != 0:
            raise NotImplementedError(f"it aligns causality to the first key, and q_offset is {offset}")
        try:
            attend = lambda operands, selection: attend_densely(operands, made.options.get("scale"), is_causal)
            return contenders.prepare_jax(attend, made, mode)
        except ValueError as error:  # its own checks of sizes and versions
            raise NotImplementedError(str(error)) from error


def attend_densely(operands: dict[str, jax.Array], scale: float | None, is_causal: bool) -> jax.Array:
    """out [batch, q_len, num_q_heads, head_dim] by the blocks that JAX's tuning of it starts with."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    query, key, value = (operands[name] for name in ("query", "key", "value"))
    head_dim = query.shape[-1]
    backward = {f"block_{kind}": 64 for kind in ("q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=BLOCK_ELEMENTS // head_dim, max_concurrent_steps=2, causal=is_causal, **backward
    )
    query *= head_dim**-0.5 if scale is None else scale  # which it does not do
    return attention_mgpu.attention(query, key, value, config)
