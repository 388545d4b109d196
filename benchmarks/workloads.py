"""What is measured: a case of `sparse_attn_jax.testing`, perhaps with a selector, and the work that it asks for."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import sparse_attn_jax as sa
from sparse_attn_jax.testing import compare, inputs
from sparse_attn_jax.testing.cases import Case, case_named
from sparse_attn_jax.testing.inputs import Inputs

# Of a query: more are drawn on the device, in seconds where NumPy takes minutes.
LARGE_SIZE = 2**26

# Options whose visible pairs can be counted from the lists alone.
COUNTABLE_OPTIONS = {"is_causal", "q_offset", "scale", "logits_soft_cap"}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case to measure.

    Attributes:
      case: sizes, options and generator of indices.
      selector: chooses the blocks in place of the generator.
      generator: "realistic" draws queries and keys that a selector finds structure in; otherwise they are N(0, 1).
    """

    case: Case
    selector: sa.selectors.InfLLMV2 | None = None
    generator: str = "random"

    def make_inputs(self) -> Inputs:
        """Seeded by the name of the case; the cotangent of lse is zero."""
        if self.selector is None:
            made = make_inputs(self.case)
            return dataclasses.replace(made, d_lse=jnp.zeros_like(made.d_lse))
        made = make_inputs(dataclasses.replace(self.case, indices="empty"))
        if self.generator == "realistic":
            made = dataclasses.replace(made, operands=made.operands | drifting_query_and_key(self.case))
        operands = made.operands
        selection = jax.jit(lambda query, key: self.selector(query, key, is_causal=self.case.is_causal))(
            operands["query"], operands["key"]
        )
        return dataclasses.replace(made, selection=selection, d_lse=jnp.zeros_like(made.d_lse))


def is_large(case: Case) -> bool:
    """Of explicit sizes, so that it has none of the special options of other cases, and many of them."""
    return case.special == "explicit sizes" and case.batch * case.q_len * case.num_q_heads * case.head_dim > LARGE_SIZE


def make_inputs(case: Case) -> Inputs:
    """As `testing.inputs.make_inputs`; the numbers of a large case are others of the same distribution."""
    if not is_large(case):
        return inputs.make_inputs(case)
    seed = zlib.crc32(case.name.encode())
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    heads = dict(query=case.num_q_heads, key=case.num_kv_heads, value=case.num_kv_heads, d_out=case.num_q_heads)
    lengths = dict(query=case.q_len, key=case.kv_len, value=case.kv_len, d_out=case.q_len)
    drawn = {
        name: draw(key, (case.batch, lengths[name], heads[name], case.head_dim), case.dtype)
        for name, key in zip(heads, jax.random.split(jax.random.key(seed), len(heads)))
    }
    d_out = drawn.pop("d_out")
    d_lse = jnp.zeros(d_out.shape[:-1], jnp.promote_types(case.dtype, jnp.float32))
    options = inputs.make_options(case, np.random.default_rng(seed))
    return Inputs(drawn, inputs.make_selection(case), options, d_out, d_lse)


def named_workload(name: str, seed: int) -> Workload:
    case = case_named(name)
    return Workload(case if seed == 0 else dataclasses.replace(case, name=f"{name} seed {seed}"))


def sized_case(*, seed: int, **sizes) -> Case:
    """A case of explicit sizes; a `kv_len` of None is `q_len`."""
    sizes["kv_len"] = sizes["q_len"] if sizes["kv_len"] is None else sizes["kv_len"]
    name = f"{sizes['q_len']}x{sizes['kv_len']} seed {seed}"
    return Case(name=name, special="explicit sizes", **sizes)


def drifting_query_and_key(case: Case, spacing: int = 64, jitter: float = 0.25) -> dict[str, jax.Array]:
    """Queries and keys that drift slowly along the sequence, so that neighbouring queries select similar blocks."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    group_size = case.num_q_heads // case.num_kv_heads

    def draw(length, heads, repeats):
        rows = inputs.drifting_latents(rng, case.batch * heads, length, case.head_dim, spacing, jitter)
        rows = rows.reshape(case.batch, heads, length, case.head_dim).repeat(repeats, axis=1)
        rows = rows + np.float32(jitter) * rng.standard_normal(rows.shape, dtype=np.float32)
        return jnp.asarray(rows.swapaxes(1, 2), case.dtype)

    query = draw(case.q_len, case.num_kv_heads, group_size)
    return dict(query=query, key=draw(case.kv_len, case.num_kv_heads, 1))


def count_pairs(made: Inputs, computes: str) -> int:
    """Visible (query, key) pairs summed over batch and query heads: of "selected" blocks, or of "everything"."""
    batch, q_len, num_q_heads, _ = made.operands["query"].shape
    kv_len = made.operands["key"].shape[1]
    if not set(made.options) <= COUNTABLE_OPTIONS or made.selection.predicate is not None:
        return int(compare.mask_of(made).sum())
    limits = last_visible_key(made)  # [batch or 1, q_len]
    if computes == "everything":
        return int(np.clip(limits + 1, 0, kv_len).sum()) * (batch // limits.shape[0]) * num_q_heads
    total = sum(count_row_pairs(made, limits, rows) for rows in np.array_split(np.arange(q_len), -(-q_len // 4096)))
    indices = made.selection.indices
    repeats = (batch // max(indices.shape[0], limits.shape[0])) * (num_q_heads // indices.shape[1])
    return total * repeats


def last_visible_key(made: Inputs) -> np.ndarray:
    """The last key that each query may see by causality: int [batch or 1, q_len]."""
    q_len, kv_len = made.operands["query"].shape[1], made.operands["key"].shape[1]
    if not made.options.get("is_causal", False):
        return np.full((1, q_len), kv_len - 1)
    offset = np.reshape(made.options.get("q_offset", kv_len - q_len), (-1, 1))
    return np.minimum(np.arange(q_len) + offset, kv_len - 1)


def count_row_pairs(made: Inputs, limits: np.ndarray, rows: np.ndarray) -> int:
    """Pairs of the queries `rows`, summed over the batch rows and heads that the selection has."""
    selection, kv_len = made.selection, made.operands["key"].shape[1]
    block, num_kv_blocks = selection.kv_block_size, -(-kv_len // selection.kv_block_size)
    ids = np.sort(np.asarray(selection.indices)[:, :, rows // selection.q_block_size], axis=-1)
    is_first = np.diff(ids, axis=-1, prepend=np.iinfo(np.int32).min) != 0
    is_valid = (ids >= 0) & (ids < num_kv_blocks) & is_first
    start = np.where(is_valid, ids, 0).astype(np.int64) * block
    seen = np.clip(limits[:, None, rows, None] + 1 - start, 0, block)
    return int(np.where(is_valid, seen, 0).sum())


def forward_flops(made: Inputs, pairs: int) -> float:
    """Two products of a multiply and an add per pair: with head_dim and with value_head_dim."""
    return 2.0 * pairs * (made.operands["query"].shape[-1] + made.operands["value"].shape[-1])
