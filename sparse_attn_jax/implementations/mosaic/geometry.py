"""The sizes and options of one call of the kernels, and what follows from them."""

import dataclasses

from sparse_attn_jax.planning import WORD_BITS
from sparse_attn_jax.selection import num_blocks

# Rows of one matrix product of a warpgroup.
SLICE_ROWS = 64
# Columns of shared memory that one swizzle of 128 bytes spans, of 16-bit values.
SWIZZLE_COLUMNS = 64
# Keys of one step of the loops over a query tile's list: as many as values of weights that the swizzle spans.
CHUNK_KEYS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """One call on one device.

    A query tile is `tile_size` tokens with the query heads of one KV head. Its rows are token-major, head-minor, and are cut
    into slices of 64. What a tile's list names is walked in chunks of 64 keys: a part of one block, or several small blocks.
    """

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    kv_block_size: int
    tile_size: int
    row_group_tokens: int
    row_group_heads: int
    scale: float
    logits_soft_cap: float  # 0: none
    is_causal: bool
    is_varlen: bool
    has_window: bool
    has_segments: bool
    has_key_bias: bool
    has_membership: bool

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_tiles(self) -> int:
        return num_blocks(self.q_len, self.tile_size)

    @property
    def tile_rows(self) -> int:
        return self.tile_size * self.group_size

    @property
    def slices_per_tile(self) -> int:
        return num_blocks(self.tile_rows, SLICE_ROWS)

    @property
    def num_slices(self) -> int:
        return self.num_tiles * self.slices_per_tile

    @property
    def num_row_groups(self) -> int:
        return (self.tile_size // self.row_group_tokens) * (self.group_size // self.row_group_heads)

    @property
    def num_words(self) -> int:
        return num_blocks(self.num_row_groups, WORD_BITS)

    @property
    def num_kv_blocks(self) -> int:
        return num_blocks(self.kv_len, self.kv_block_size)

    @property
    def padded_kv_len(self) -> int:
        return self.num_kv_blocks * self.kv_block_size

    @property
    def blocks_per_chunk(self) -> int:
        return max(1, CHUNK_KEYS // self.kv_block_size)

    @property
    def chunks_per_block(self) -> int:
        return max(1, self.kv_block_size // CHUNK_KEYS)

    @property
    def piece_keys(self) -> int:
        """Keys of a chunk that lie one after another in memory."""
        return CHUNK_KEYS // self.blocks_per_chunk

    @property
    def key_columns(self) -> int:
        """head_dim in shared memory; the columns beyond it are 0."""
        return num_blocks(self.head_dim, SWIZZLE_COLUMNS) * SWIZZLE_COLUMNS

    @property
    def value_columns(self) -> int:
        return num_blocks(self.value_head_dim, SWIZZLE_COLUMNS) * SWIZZLE_COLUMNS

    @property
    def row_names(self) -> tuple[str, ...]:
        """The tables that say of each row what it sees: see `layout.row_tables`."""
        options = dict(low=self.has_window, sink=self.has_window, segment=self.has_segments, group=self.has_membership)
        return ("high", *(name for name, is_on in options.items() if is_on))

    @property
    def column_names(self) -> tuple[str, ...]:
        """The tables of each key: see `layout.column_tables`."""
        options = dict(position=self.is_varlen or self.blocks_per_chunk > 1, segment=self.has_segments)
        return tuple(name for name, is_on in options.items() if is_on)
