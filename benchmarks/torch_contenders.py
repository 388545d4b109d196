"""PyTorch's attention on the same arrays: compiled `flex_attention` on the same selection, and dense attention.

torch is imported only once one of these is prepared.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, machine, timing
from benchmarks.contenders import Prepared
from benchmarks.workloads import Workload
from sparse_attn_jax.testing.inputs import Inputs

# Tokens of a tile of the block mask, about, of queries and of keys, where the selection's blocks are smaller. torch's kernels
# for Hopper GPUs work in steps of up to 128, which have to divide the tiles.
FLEX_TILES = dict(cpu=(64, 1), cuda=(128, 128))
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
    """Compiled `flex_attention`: the selected blocks as a `BlockMask`, where they are finer by a look-up in `mask_mod`."""

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
    """The `BlockMask` of a selection: tiles that are visible to all of their queries are marked full."""
    selection, (q_len, kv_len) = made.selection, contenders.lengths(made)
    chosen = np.array(selection.to_block_mask(kv_len))  # [batch or 1, heads, rows, num_kv_blocks]
    sizes = selection.q_block_size, selection.kv_block_size
    per_tile = tuple(max(1, tile // size) for tile, size in zip(FLEX_TILES[torch_device()], sizes))
    q_tile, kv_tile = (size * count for size, count in zip(sizes, per_tile))
    is_causal = made.options.get("is_causal", False)
    offset = made.options.get("q_offset", kv_len - q_len) if is_causal else kv_len
    listed, is_full = tiles_of(chosen, per_tile)
    first = np.arange(listed.shape[2])[:, None] * q_tile
    last = np.minimum(first + q_tile, q_len) - 1
    start = np.arange(listed.shape[3]) * kv_tile
    end = start + kv_tile
    listed = listed & (start <= last + offset)
    is_full = listed & is_full & (end - 1 <= first + offset) & (end <= kv_len) & (first + q_tile <= q_len)
    lookup = torch.from_numpy(chosen).to(torch_device()) if per_tile != (1, 1) else None
    repeats = made.operands["query"].shape[2] // chosen.shape[1]
    mask_mod = make_mask_mod(lookup, selection, repeats, offset if is_causal else None)
    partial, full = (lists_of(torch, mask, 1 if mask.shape[1] == 1 else repeats) for mask in (listed & ~is_full, is_full))
    geometry = dict(BLOCK_SIZE=(q_tile, kv_tile), seq_lengths=(q_len, kv_len))
    return torch.nn.attention.flex_attention.BlockMask.from_kv_blocks(*partial, *full, mask_mod=mask_mod, **geometry)


def tiles_of(chosen: np.ndarray, per_tile: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """[batch, heads, rows, blocks] to two of [batch, heads, row tiles, block tiles]: what any row of a tile chose of it, and
    what all chose whole. `per_tile`: rows and blocks of a tile."""
    padded = np.pad(chosen, [(0, 0), (0, 0), *((0, -size % count) for size, count in zip(chosen.shape[2:], per_tile))])
    rows, blocks = (size // count for size, count in zip(padded.shape[2:], per_tile))
    tiles = padded.reshape(*chosen.shape[:2], rows, per_tile[0], blocks, per_tile[1])
    return tiles.any(axis=(3, 5)), tiles.all(axis=(3, 5))


def lists_of(torch, mask: np.ndarray, repeats: int) -> tuple[Any, Any]:
    """Counts [batch, heads, tiles] and ids [batch, heads, tiles, blocks], the chosen ones first: int32."""
    ids = np.argsort(~mask, axis=-1, kind="stable").astype(np.int32)
    counts = mask.sum(axis=-1, dtype=np.int32)
    return tuple(torch.from_numpy(x.repeat(repeats, axis=1)).to(torch_device()) for x in (counts, ids))


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
    """In float64, which is made on the CPU: the device may have no room for it."""
    return x.detach().cpu().double().numpy()


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
        return dict(out=out) | {f"d_{name}": x for name, x in zip(operands, gradients)}

    def wait(found):
        if torch_device() == "cuda":
            torch.cuda.synchronize()

    def results(d_out):
        found = run(to_torch(torch, d_out))
        wait(found)
        return {name: x.transpose(1, 2) for name, x in found.items()}

    d_out = to_torch(torch, made.d_out)
    call = timing.Enqueued(lambda: run(d_out), wait)
    call()
    return Prepared(call, results, measure_memory(torch, call), from_torch)


def measure_memory(torch, call) -> int | None:
    """Peak of what `call` takes beyond what is there before it, in bytes; on a CPU by the process's resident memory."""
    if torch_device() == "cpu":
        return machine.measure_peak_rss(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before
