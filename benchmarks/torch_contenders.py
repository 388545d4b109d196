"""PyTorch's attention on the same arrays: compiled `flex_attention` on the same selection, and dense attention.

torch is imported only once one of these is prepared.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, machine
from benchmarks.contenders import Prepared
from benchmarks.workloads import Workload
from sparse_attn_jax.testing.inputs import Inputs

# Query tokens per row of the block mask, about, where the selection's query blocks are smaller.
FLEX_TILE = 64
# Every shape and mask is compiled anew; torch gives up after a few by default.
RECOMPILE_LIMIT = 1024


@dataclasses.dataclass(frozen=True)
class TorchSdpa:
    """`scaled_dot_product_attention`: everything that causality lets through, whatever is selected."""

    max_len: int
    name = "torch-sdpa"
    kind = "baseline"
    computes = "everything"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        torch = import_torch()
        contenders.refuse_unsupported(made, self.max_len)
        q_len, kv_len = contenders.lengths(made)
        is_causal = made.options.get("is_causal", False)
        offset = made.options.get("q_offset", kv_len - q_len)
        is_aligned = offset == 0
        if is_causal and offset not in (0, kv_len - q_len):
            raise NotImplementedError(f"torch aligns causality to a corner, and q_offset is {offset}")
        bias = None
        if is_causal and not is_aligned:
            bias = torch.nn.attention.bias.causal_lower_right(q_len, kv_len)

        def attend(query, key, value):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, bias, is_causal=is_causal and is_aligned, scale=made.options.get("scale"), enable_gqa=True
            )

        return prepare_torch(torch, attend, made, mode)


@dataclasses.dataclass(frozen=True)
class TorchFlex:
    """Compiled `flex_attention`: the selected blocks as a `BlockMask`, lists per token by a look-up in its `mask_mod`."""

    name = "torch-flex"
    kind = "baseline"
    computes = "selected"

    def prepare(self, workload: Workload, made: Inputs, mode: str) -> Prepared:
        torch = import_torch()
        contenders.refuse_unsupported(made)
        if mode == contenders.FORWARD_BACKWARD and torch_device() == "cpu":
            raise NotImplementedError("flex_attention has no backward pass on a CPU")
        # With fullgraph a failure to compile is an error, never a silent fall back to dense attention.
        flex_attention = torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False, fullgraph=True)
        block_mask = make_block_mask(torch, made)

        def attend(query, key, value):
            return flex_attention(query, key, value, block_mask=block_mask, scale=made.options.get("scale"), enable_gqa=True)

        try:
            return prepare_torch(torch, attend, made, mode)
        except RuntimeError:
            # torch remembers the failure, and would run every later call of flex_attention without compiling it.
            torch.compiler.reset()
            raise


def import_torch() -> Any:
    if importlib.util.find_spec("torch") is None:
        raise NotImplementedError("torch is not installed")
    import torch
    import torch._dynamo
    import torch.nn.attention.bias
    import torch.nn.attention.flex_attention

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise NotImplementedError("JAX runs on a GPU, and this torch has none")
    return torch


def torch_device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def make_block_mask(torch, made: Inputs) -> Any:
    """The `BlockMask` of a selection: blocks that are visible to all of a row's queries are marked full."""
    selection, (q_len, kv_len) = made.selection, contenders.lengths(made)
    chosen = np.array(selection.to_block_mask(kv_len))  # [batch or 1, heads, rows, num_kv_blocks]
    rows_per_tile = max(1, FLEX_TILE // selection.q_block_size)
    has_own_lists = rows_per_tile > 1
    q_block = selection.q_block_size * rows_per_tile
    listed = union_of_rows(chosen, rows_per_tile)
    first = np.arange(listed.shape[2])[:, None] * q_block
    last = np.minimum(first + q_block, q_len) - 1
    is_causal = made.options.get("is_causal", False)
    offset = made.options.get("q_offset", kv_len - q_len) if is_causal else kv_len
    start = np.arange(listed.shape[3]) * selection.kv_block_size
    listed = listed & (start <= last + offset)
    end = start + selection.kv_block_size
    is_full = listed & (end - 1 <= first + offset) & (end <= kv_len) & (first + q_block <= q_len) & (not has_own_lists)
    lookup = torch.from_numpy(chosen).to(torch_device()) if has_own_lists else None
    repeats = made.operands["query"].shape[2] // chosen.shape[1]
    mask_mod = make_mask_mod(lookup, selection, repeats, offset if is_causal else None)
    partial, full = (lists_of(torch, mask, 1 if mask.shape[1] == 1 else repeats) for mask in (listed & ~is_full, is_full))
    sizes = dict(BLOCK_SIZE=(q_block, selection.kv_block_size), seq_lengths=(q_len, kv_len))
    return torch.nn.attention.flex_attention.BlockMask.from_kv_blocks(*partial, *full, mask_mod=mask_mod, **sizes)


def union_of_rows(chosen: np.ndarray, rows_per_tile: int) -> np.ndarray:
    """[batch, heads, rows, blocks] to [batch, heads, tiles, blocks]: what any row of a tile chose."""
    padding = -chosen.shape[2] % rows_per_tile
    padded = np.pad(chosen, [(0, 0), (0, 0), (0, padding), (0, 0)])
    return padded.reshape(*chosen.shape[:2], -1, rows_per_tile, chosen.shape[3]).any(axis=3)


def lists_of(torch, mask: np.ndarray, repeats: int) -> tuple[Any, Any]:
    """Counts [batch, heads, tiles] and ids [batch, heads, tiles, blocks], the chosen ones first: int32."""
    mask = mask.repeat(repeats, axis=1)
    ids = np.argsort(~mask, axis=-1, kind="stable").astype(np.int32)
    counts = mask.sum(axis=-1, dtype=np.int32)
    return tuple(torch.from_numpy(x).to(torch_device()) for x in (counts, ids))


def make_mask_mod(lookup, selection, repeats: int, offset: int | None):
    """`mask_mod(batch, head, q, kv)`: causality, and the look-up where lists are finer than the block mask."""
    q_block, kv_block = selection.q_block_size, selection.kv_block_size
    batches = selection.indices.shape[0]

    def mask_mod(batch, head, q, kv):
        visible = kv >= 0 if offset is None else kv <= q + offset
        if lookup is None:
            return visible
        return visible & lookup[batch if batches > 1 else 0, head // repeats, q // q_block, kv // kv_block]

    return mask_mod


def to_torch(torch, x: jax.Array) -> Any:
    """[batch, length, heads, dim] to torch's [batch, heads, length, dim]."""
    wide = np.array(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return torch.from_numpy(wide).to(getattr(torch, x.dtype.name)).transpose(1, 2).contiguous().to(torch_device())


def from_torch(x) -> np.ndarray:
    return x.detach().transpose(1, 2).double().cpu().numpy()


def prepare_torch(torch, attend, made: Inputs, mode: str) -> Prepared:
    """Compiles by a first call; `attend` takes tensors [batch, heads, length, dim]."""
    operands = {name: to_torch(torch, made.operands[name]) for name in ("query", "key", "value")}
    needs_gradient = mode == contenders.FORWARD_BACKWARD
    for x in operands.values():
        x.requires_grad_(needs_gradient)

    def run(d_out):
        with torch.set_grad_enabled(needs_gradient):
            out = attend(*operands.values())
        gradients = torch.autograd.grad(out, operands.values(), d_out) if needs_gradient else ()
        if torch_device() == "cuda":
            torch.cuda.synchronize()
        return dict(out=out) | {f"d_{name}": x for name, x in zip(operands, gradients)}

    def results(d_out):
        return {name: from_torch(x) for name, x in run(to_torch(torch, d_out)).items()}

    d_out = to_torch(torch, made.d_out)

    def call():
        run(d_out)

    call()
    return Prepared(call, results, measure_memory(torch, call))


def measure_memory(torch, call) -> int | None:
    """Peak of what `call` takes beyond what is there before it, in bytes; on a CPU by the process's resident memory."""
    if torch_device() == "cpu":
        return machine.measure_peak_rss(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before
