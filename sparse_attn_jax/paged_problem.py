"""The static description of one call of paged attention, and the arrays that go with it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedProblem:
    """One call of `paged_block_sparse_attention` without its array values. Hashable."""

    batch: int
    q_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    num_pages: int
    page_size: int
    max_pages: int  # of a sequence
    selection_block_size: int
    selection_heads: int = 1
    selection_rows: int = 1  # lists per head: 1 for all queries, or q_len
    num_slots: int | None = None  # of a list; `None` is every block
    scale: float
    logits_soft_cap: float | None = None
    has_window: bool = False
    has_sinks: bool = False
    num_splits: int | None = None
    platform: str = "cpu"
    compute_capability: str | None = None
    device_kind: str | None = None

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_len(self) -> int:
        """The longest a sequence may get."""
        return self.max_pages * self.page_size

    @property
    def num_blocks(self) -> int:
        """Blocks of the selection that a sequence may have."""
        return -(-self.kv_len // self.selection_block_size)

    @property
    def list_len(self) -> int:
        """Entries of a list, or of all blocks without one."""
        return self.num_blocks if self.num_slots is None else self.num_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedOperands:
    """The arrays of a call. `None` is an option that is off."""

    query: jax.Array  # [batch, q_len, num_q_heads, head_dim]
    key_pages: jax.Array  # [num_pages, page_size, num_kv_heads, head_dim]
    value_pages: jax.Array  # [num_pages, page_size, num_kv_heads, value_head_dim]
    block_tables: jax.Array  # int32 [batch, max_pages]
    seq_lens: jax.Array  # int32 [batch], in [0, MAX_LENGTH]
    page_selection: jax.Array | None = None  # int32 [batch, selection_heads, selection_rows, num_slots]
    window_left: jax.Array | None = None  # int32 [num_q_heads]
    num_sinks: jax.Array | None = None  # int32 [num_q_heads]
