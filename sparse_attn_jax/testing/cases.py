"""The named cases that every implementation, test and benchmark shares: a flat list."""

import dataclasses

# A side of a window, or a number of sinks: one for all query heads, or one for each.
PerHead = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the op. Tuples stand for arrays, so that a case is hashable; `None` is an argument left out."""

    name: str
    special: str  # what this case has that others have not
    batch: int = 1
    q_len: int = 96
    kv_len: int = 96
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    value_head_dim: int | None = None  # None: head_dim
    dtype: str = "float32"
    indices: str = "random"  # a name in `inputs.INDEX_GENERATORS`
    num_slots: int = 3
    q_block_size: int = 1
    kv_block_size: int = 16
    selection_heads: int | None = None  # None: num_kv_heads
    selection_batch: int | None = None  # None: batch
    predicate_stride: int | None = None
    is_causal: bool = True
    q_offset: PerHead | None = None  # a tuple is one offset per batch row
    local_window_size: tuple[PerHead | None, PerHead | None] | None = None
    num_sinks: PerHead = 0
    num_segments: int = 0  # 0: no segment ids
    has_key_bias: bool = False
    has_lse_gradient: bool = False
    scale: float | None = None
    logits_soft_cap: float | None = None
    sink_strength: float = 0.0  # see `inputs.with_sink_columns`


CASES = (
    # Head counts and dims, dtypes.
    Case(name="group1", special="group size 1", num_q_heads=2, num_kv_heads=2),
    Case(name="group2_bf16", special="group size 2, bfloat16", dtype="bfloat16"),
    Case(name="group3", special="a group size that is no power of two", num_q_heads=6, num_kv_heads=2),
    Case(name="group4_fp16", special="group size 4, float16", num_q_heads=4, num_kv_heads=1, dtype="float16"),
    Case(name="group8_bf16_d64", special="group size 8", num_q_heads=8, num_kv_heads=1, head_dim=64, dtype="bfloat16"),
    Case(
        name="group16_bf16_d128", special="a token of one KV head fills a 16-row tile, as InfLLM-v2 trains", batch=1,
        num_q_heads=32, num_kv_heads=2, head_dim=128, dtype="bfloat16", kv_block_size=64, q_len=160, kv_len=160, num_slots=2,
        has_lse_gradient=True,
    ),
    Case(name="group32_bf16", special="group size 32", num_q_heads=32, num_kv_heads=1, q_len=40, kv_len=40, dtype="bfloat16"),
    Case(name="d64_fp16", special="head_dim 64", head_dim=64, dtype="float16", kv_block_size=32),
    Case(name="d96_bf16", special="a head_dim that is no power of two", head_dim=96, dtype="bfloat16", q_block_size=16),
    Case(name="d128_fp16", special="head_dim 128", head_dim=128, dtype="float16", q_len=65, kv_len=65, q_block_size=16),
    Case(name="d256_bf16", special="head_dim 256", head_dim=256, dtype="bfloat16", q_len=64, kv_len=64),
    Case(name="narrow_value", special="value_head_dim below head_dim", head_dim=64, value_head_dim=32),
    Case(name="wide_value_bf16", special="value_head_dim above head_dim", head_dim=32, value_head_dim=64, dtype="bfloat16"),
    Case(name="float64", special="float64, under x64", dtype="float64", has_lse_gradient=True, has_key_bias=True),
    # Block sizes and lengths.
    Case(name="q_block16", special="a list per 16 queries", q_block_size=16, batch=2),
    Case(
        name="q_block64_bf16", special="square blocks of 64", q_block_size=64, kv_block_size=64, dtype="bfloat16",
        num_slots=2, q_len=256, kv_len=256,
    ),
    Case(
        name="q_block100", special="a query block that divides nothing", q_block_size=100, q_len=250, kv_len=250,
        kv_block_size=48,
    ),
    Case(
        name="q_block_above_length", special="one query block, longer than the queries", q_block_size=128, q_len=33,
        kv_len=70,
    ),
    Case(name="kv_block32_bf16", special="kv_block_size 32", kv_block_size=32, dtype="bfloat16"),
    Case(name="kv_block48", special="kv_block_size 48, no power of two", kv_block_size=48, q_len=130, kv_len=130),
    Case(
        name="kv_block128_bf16", special="kv_block_size 128", kv_block_size=128, q_len=300, kv_len=300, num_slots=2,
        dtype="bfloat16",
    ),
    Case(
        name="kv_block_above_length", special="one KV block, longer than the keys", kv_block_size=64, q_len=20, kv_len=20,
        num_slots=1,
    ),
    Case(name="length1", special="one query, one key", q_len=1, kv_len=1, has_lse_gradient=True),
    Case(
        name="length63_bf16", special="one less than a block", q_len=63, kv_len=63, kv_block_size=64, num_slots=1,
        dtype="bfloat16",
    ),
    Case(
        name="length65_bf16", special="one more than a block", q_len=65, kv_len=65, kv_block_size=64, num_slots=2,
        dtype="bfloat16",
    ),
    Case(
        name="length1000_bf16", special="a length that is no multiple, realistic lists", q_len=1000, kv_len=1000,
        kv_block_size=64, num_slots=6, dtype="bfloat16", indices="realistic", num_q_heads=4, num_kv_heads=1,
    ),
    Case(name="length_mod16_is_15", special="length mod 16 = 15", q_len=111, kv_len=111, indices="local"),
    Case(
        name="full_attention", special="no token mask at all, everything selected", is_causal=False, indices="all",
        has_lse_gradient=True,
    ),
    Case(
        name="full_attention_odd_bf16", special="the same, and the last block is not whole", is_causal=False, indices="all",
        q_len=50, kv_len=77, dtype="bfloat16", has_key_bias=True,
    ),
    # Queries against a longer or shorter sequence of keys.
    Case(
        name="odd_prefix", special="chunked prefill after an odd prefix", q_len=50, kv_len=147, indices="realistic",
        num_slots=5,
    ),
    Case(
        name="odd_prefix_blocks", special="the same, a list per 16 queries", q_len=50, kv_len=133, q_block_size=16,
        indices="local",
    ),
    Case(name="decode_bf16", special="one query, many keys", q_len=1, kv_len=333, batch=3, dtype="bfloat16", num_slots=8),
    Case(name="more_queries_than_keys", special="the first queries see nothing", q_len=80, kv_len=45, has_lse_gradient=True),
    Case(name="q_offset_scalar", special="q_offset as an int", q_len=40, kv_len=96, q_offset=13, indices="future"),
    Case(
        name="q_offset_per_row", special="q_offset per batch row, one beyond the keys, one before them", batch=4, q_len=24,
        kv_len=96, q_offset=(0, 37, 110, -11), indices="future",
    ),
    # Lists.
    Case(name="all_rows_empty", special="nothing selected", indices="empty", has_lse_gradient=True, has_key_bias=True),
    Case(
        name="sparse_rows_bf16", special="-1 in the middle of lists, empty rows", indices="sparse_rows", num_slots=4,
        dtype="bfloat16",
    ),
    Case(name="duplicates", special="ids repeated", indices="duplicates", num_slots=6, has_lse_gradient=True),
    Case(name="hostile_ids", special="out of range, INT_MIN, INT_MAX", indices="hostile", num_slots=6, has_lse_gradient=True),
    Case(
        name="hostile_ids_full", special="the same without causality, per query block", indices="hostile", is_causal=False,
        q_block_size=16,
    ),
    Case(name="future_blocks_bf16", special="future blocks selected", indices="future", dtype="bfloat16", q_block_size=16),
    Case(name="more_slots_than_blocks", special="more slots than blocks", num_slots=9, q_len=60, kv_len=60),
    Case(name="selection_heads1", special="one list for all heads", selection_heads=1, num_q_heads=6, num_kv_heads=3),
    Case(name="selection_per_q_head", special="a list per query head", selection_heads=4),
    Case(
        name="selection_per_q_head_blocks_bf16", special="a list per query head and 64 queries", selection_heads=6,
        num_q_heads=6, num_kv_heads=2, q_block_size=64, kv_block_size=32, q_len=140, kv_len=140, dtype="bfloat16",
    ),
    Case(
        name="selection_batch1", special="one selection for all batch rows", batch=3, selection_batch=1, q_len=50, kv_len=50,
    ),
    Case(
        name="selection_batch1_heads1", special="one list for all rows and heads", batch=2, selection_batch=1,
        selection_heads=1, indices="local",
    ),
    # Token masks.
    Case(name="window", special="window and sinks, as ints", indices="all", local_window_size=(20, 0), num_sinks=3),
    Case(
        name="window_two_sided_bf16", special="no causality, both sides", is_causal=False, local_window_size=(9, 17),
        indices="all", dtype="bfloat16",
    ),
    Case(
        name="window_left_none", special="only the right side bounded", is_causal=False, local_window_size=(None, 5),
        num_sinks=20,
    ),
    Case(
        name="window_per_head", special="windows and sinks per query head, some of them 0", indices="all", q_len=100,
        kv_len=120, local_window_size=((0, 7, 33, 200), None), num_sinks=(0, 2, 17, 5), q_block_size=16,
    ),
    Case(
        name="window_right_per_head", special="right side per head", is_causal=False, indices="all",
        local_window_size=(11, (0, 1, 40, 5)),
    ),
    Case(
        name="segments_bf16", special="segments that end inside blocks", batch=2, num_segments=4, indices="all",
        dtype="bfloat16",
    ),
    Case(
        name="segments_q_kv", special="different segment ids of queries and keys", batch=2, q_len=70, num_segments=3,
        is_causal=False, indices="all",
    ),
    Case(
        name="predicate", special="a predicate with array leaves", batch=2, predicate_stride=3, indices="all", q_len=60,
        kv_len=83,
    ),
    # Scores.
    Case(name="key_bias_bf16", special="a bias per key", batch=2, has_key_bias=True, dtype="bfloat16"),
    Case(name="soft_cap_bf16", special="soft cap", logits_soft_cap=1.5, dtype="bfloat16"),
    Case(
        name="soft_cap_full_bf16", special="soft cap where nothing is masked", logits_soft_cap=1.5, dtype="bfloat16",
        is_causal=False, indices="all", q_len=70, kv_len=128,
    ),
    Case(name="scale_zero", special="scale 0.0 is not None", scale=0.0),
    Case(name="scale_large_fp16", special="sharp rows", scale=1.0, dtype="float16"),
    Case(name="lse_gradient_bf16", special="a gradient through lse", has_lse_gradient=True, dtype="bfloat16"),
    Case(
        name="sink_columns", special="two keys take nearly all weight", sink_strength=6.0, indices="realistic", num_slots=4,
        has_lse_gradient=True,
    ),
    # Stronger sinks would break the error rule: sum(d_out * out) has the rounding error of a 16-bit out, times the sinks' keys.
    Case(
        name="sink_columns_bf16", special="two keys take most weight", sink_strength=4.0, indices="realistic", num_slots=4,
        dtype="bfloat16",
    ),
    # All at once.
    Case(
        name="everything", special="all options together", batch=2, q_len=90, kv_len=131, num_q_heads=6, num_kv_heads=2,
        value_head_dim=48, indices="hostile", num_slots=8, q_offset=(41, 20),
        local_window_size=((40, 20, 60, 10, 90, 5), None), num_sinks=(0, 4, 0, 20, 1, 2), num_segments=2, has_key_bias=True,
        has_lse_gradient=True, logits_soft_cap=3.0, scale=0.3, selection_heads=6,
    ),
    Case(
        name="everything_blocks_bf16", special="all options, a list per 16 queries", batch=2, q_len=90, kv_len=131,
        dtype="bfloat16", indices="hostile", num_slots=8, local_window_size=(60, 3), num_sinks=4, num_segments=2,
        has_key_bias=True, has_lse_gradient=True, logits_soft_cap=3.0, q_block_size=16, kv_block_size=32, predicate_stride=2,
        selection_batch=1, is_causal=False,
    ),
)  # fmt: skip


def case_named(name: str) -> Case:
    """The case of that name. Raises `ValueError` with the known names if there is none."""
    for case in CASES:
        if case.name == name:
            return case
    raise ValueError(f"`name` is {name!r}; it must be one of {[case.name for case in CASES]}.")
