"""Static descriptions of the calls that find the extrema of blocks and select blocks by bounds from them, and their arrays."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtremaProblem:
    """One call that finds the extrema of some blocks of keys, without its array values. Hashable."""

    batch: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size: int  # tokens
    kv_len: int  # of the keys, or the longest that a sequence in pages may get
    page_size: int | None = None  # tokens; `None`: the keys are not in pages
    platform: str = "cpu"
    compute_capability: str | None = None
    device_kind: str | None = None

    @property
    def group_size(self) -> int:
        """Queries have no part in it."""
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundProblem:
    """One call that selects blocks by their bounds, as `Quest.select` does, without its array values. Hashable."""

    batch: int
    q_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # of the query
    extrema_dtype: str
    num_blocks: int  # of a sequence, as far as there is room
    block_size: int  # tokens
    page_rows: int | None = None  # blocks of a page; `None`: the extrema are not in pages
    group: str | None  # as of `Quest`
    top_k: int
    platform: str = "cpu"
    compute_capability: str | None = None
    device_kind: str | None = None

    @property
    def kv_len(self) -> int:
        """The longest a sequence may get."""
        return self.num_blocks * self.block_size

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundOperands:
    """The arrays of a call.

    Of its limits (a, b, c, d), a query keeps the blocks before a and those from b to before c, which are at most `top_k`; of
    the others, those before d compete by their bounds. Limits outside [0, num_blocks] count as the nearest inside.
    """

    query: jax.Array  # [batch, q_len, num_q_heads, head_dim]
    maximum: jax.Array  # [batch, num_blocks, num_kv_heads, head_dim], or [num_pages, page_rows, num_kv_heads, head_dim]
    minimum: jax.Array  # of the same shape
    block_tables: jax.Array | None  # int32 [batch, max_pages], of the pages
    limits: jax.Array  # int32 [batch, q_len, 4]
