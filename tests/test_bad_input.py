"""Every wrong argument is refused while tracing, by name, with what was found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa

INDICES = jnp.zeros((2, 2, 5, 3), jnp.int32)  # 33 queries in blocks of 8


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def select(indices=INDICES, q_block_size=8, kv_block_size=16, **fields):
    return sa.BlockSelection(indices, q_block_size=q_block_size, kv_block_size=kv_block_size, **fields)


def dense_arguments():
    return dict(query=array(2, 33, 4, 16), key=array(2, 40, 2, 16), value=array(2, 40, 2, 8), selection=select())


def packed_arguments():
    return dict(
        query=array(33, 4, 16),
        key=array(40, 2, 16),
        value=array(40, 2, 8),
        selection=select(jnp.zeros((1, 2, 33, 3), jnp.int32), q_block_size=1),
        cu_seqlens_q=array(4, dtype="int32"),
        cu_seqlens_kv=array(4, dtype="int32"),
    )


def call_traced(function, arguments):
    """Calls `function` while tracing: shape structs and selections become tracers, the rest stays as it is."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct | sa.BlockSelection | sa.TilePlan)}
    static = {name: x for name, x in arguments.items() if name not in traced}
    return jax.eval_shape(lambda traced: function(**traced, **static), traced)


def traced_indices(*shape, dtype="int32", **fields):
    return select(array(*shape, dtype=dtype), **fields)


# name: (argument that the message names, what it says was found, arguments that are changed)
OP_ROWS = {
    "query_rank": ("query", "[33, 4, 16]", dict(query=array(33, 4, 16))),
    "key_rank": ("key", "[2, 40, 1, 2, 16]", dict(key=array(2, 40, 1, 2, 16))),
    "value_rank": ("value", "[2, 40, 8]", dict(value=array(2, 40, 8))),
    "query_not_an_array": ("query", "None", dict(query=None)),
    "query_dtype": ("query", "int32", dict(query=array(2, 33, 4, 16, dtype="int32"))),
    "query_complex": ("query", "complex64", dict(query=array(2, 33, 4, 16, dtype="complex64"))),
    "query_float8": ("query", "float8_e4m3fn", dict(query=array(2, 33, 4, 16, dtype="float8_e4m3fn"))),
    "key_dtype_differs": ("key", "bfloat16", dict(key=array(2, 40, 2, 16, dtype="bfloat16"))),
    "value_dtype_differs": ("value", "float16", dict(value=array(2, 40, 2, 8, dtype="float16"))),
    "key_batch": ("key", "[3, 40, 2, 16]", dict(key=array(3, 40, 2, 16))),
    "value_batch": ("value", "[1, 40, 2, 8]", dict(value=array(1, 40, 2, 8))),
    "key_head_dim": ("key", "[2, 40, 2, 32]", dict(key=array(2, 40, 2, 32))),
    "value_length": ("value", "[2, 41, 2, 8]", dict(value=array(2, 41, 2, 8))),
    "value_heads": ("value", "[2, 40, 4, 8]", dict(value=array(2, 40, 4, 8))),
    "no_heads": ("key", "[2, 40, 0, 16]", dict(key=array(2, 40, 0, 16), value=array(2, 40, 0, 8))),
    "no_dims": ("query", "[2, 33, 4, 0]", dict(query=array(2, 33, 4, 0), key=array(2, 40, 2, 0))),
    "group_does_not_divide": ("query", "[2, 33, 5, 16]", dict(query=array(2, 33, 5, 16))),
    "fewer_query_heads": ("query", "[2, 33, 1, 16]", dict(query=array(2, 33, 1, 16))),
    "selection_type": ("selection", "int32[2, 2, 5, 3]", dict(selection=array(2, 2, 5, 3, dtype="int32"))),
    "indices_float": ("selection.indices", "float32", dict(selection=traced_indices(2, 2, 5, 3, dtype="float32"))),
    "indices_bool": ("selection.indices", "bool", dict(selection=traced_indices(2, 2, 5, 3, dtype="bool"))),
    "indices_uint32": ("selection.indices", "uint32", dict(selection=traced_indices(2, 2, 5, 3, dtype="uint32"))),
    "indices_rank": ("selection.indices", "[2, 5, 3]", dict(selection=traced_indices(2, 5, 3))),
    "indices_batch": ("selection.indices", "[3, 2, 5, 3]", dict(selection=traced_indices(3, 2, 5, 3))),
    "indices_heads": ("selection.indices", "[2, 3, 5, 3]", dict(selection=traced_indices(2, 3, 5, 3))),
    "indices_too_few_rows": ("selection.indices", "[2, 2, 4, 3]", dict(selection=traced_indices(2, 2, 4, 3))),
    "indices_too_many_rows": ("selection.indices", "[2, 2, 6, 3]", dict(selection=traced_indices(2, 2, 6, 3))),
    "indices_no_slots": ("selection.indices", "[2, 2, 5, 0]", dict(selection=traced_indices(2, 2, 5, 0))),
    "q_block_size_zero": ("q_block_size", "0", dict(selection=select(q_block_size=0))),
    "q_block_size_negative": ("q_block_size", "-8", dict(selection=select(q_block_size=-8))),
    "q_block_size_float": ("q_block_size", "8.0", dict(selection=select(q_block_size=8.0))),
    "kv_block_size_zero": ("kv_block_size", "0", dict(selection=select(kv_block_size=0))),
    "kv_block_size_bool": ("kv_block_size", "True", dict(selection=select(kv_block_size=True))),
    "causal_not_bool": ("is_causal", "1", dict(is_causal=1)),
    "window_negative_left": ("local_window_size", "-1", dict(local_window_size=(-1, 0))),
    "window_negative_right": ("local_window_size", "-3", dict(local_window_size=(None, -3))),
    "window_float": ("local_window_size", "2.5", dict(local_window_size=(2.5, 0))),
    "window_three_sides": ("local_window_size", "(1, 2, 3)", dict(local_window_size=(1, 2, 3))),
    "window_bool": ("local_window_size", "True", dict(local_window_size=(True, 0))),
    "window_shape": ("local_window_size", "int32[2]", dict(local_window_size=(jnp.ones(2, jnp.int32), 0))),
    "window_dtype": ("local_window_size", "float32[4]", dict(local_window_size=(jnp.ones(4), 0))),
    "window_too_large": ("local_window_size", "2147483648", dict(local_window_size=(2**31, 0))),
    "sinks_negative": ("num_sinks", "-1", dict(local_window_size=(1, 0), num_sinks=-1)),
    "sinks_none": ("num_sinks", "None", dict(local_window_size=(1, 0), num_sinks=None)),
    "sinks_shape": ("num_sinks", "int32[2]", dict(local_window_size=(1, 0), num_sinks=array(2, dtype="int32"))),
    "sinks_dtype": ("num_sinks", "float32[4]", dict(local_window_size=(1, 0), num_sinks=array(4))),
    "q_offset_float": ("q_offset", "1.5", dict(q_offset=1.5)),
    "q_offset_dtype": ("q_offset", "float32[2]", dict(q_offset=array(2))),
    "q_offset_shape": ("q_offset", "int32[3]", dict(q_offset=array(3, dtype="int32"))),
    "q_offset_too_large": ("q_offset", "2147483648", dict(q_offset=2**31)),
    "query_segments_alone": ("key_value_segment_ids", "None", dict(query_segment_ids=array(2, 33, dtype="int32"))),
    "kv_segments_alone": ("query_segment_ids", "None", dict(key_value_segment_ids=array(2, 40, dtype="int32"))),
    "segments_dtype": (
        "query_segment_ids",
        "float32[2, 33]",
        dict(query_segment_ids=array(2, 33), key_value_segment_ids=array(2, 40, dtype="int32")),
    ),
    "segments_shape": (
        "key_value_segment_ids",
        "int32[2, 33]",
        dict(query_segment_ids=array(2, 33, dtype="int32"), key_value_segment_ids=array(2, 33, dtype="int32")),
    ),
    "key_bias_shape": ("key_bias", "[2, 40]", dict(key_bias=array(2, 40))),
    "key_bias_per_query_head": ("key_bias", "[2, 4, 40]", dict(key_bias=array(2, 4, 40))),
    "key_bias_dtype": ("key_bias", "int32", dict(key_bias=array(2, 2, 40, dtype="int32"))),
    "scale_text": ("scale", "'auto'", dict(scale="auto")),
    "scale_traced": ("scale", "float32[]", dict(scale=array())),
    "scale_nan": ("scale", "nan", dict(scale=float("nan"))),
    "soft_cap_zero": ("logits_soft_cap", "0.0", dict(logits_soft_cap=0.0)),
    "soft_cap_negative": ("logits_soft_cap", "-5", dict(logits_soft_cap=-5)),
    "soft_cap_infinite": ("logits_soft_cap", "inf", dict(logits_soft_cap=float("inf"))),
    "implementation_unknown": ("implementation", "'triton'", dict(implementation="triton")),
    "implementation_unknown_in_sequence": ("implementation", "'cudnn'", dict(implementation=("xla", "cudnn"))),
    "implementation_empty": ("implementation", "()", dict(implementation=())),
    "predicate_not_callable": ("selection.predicate", "3", dict(selection=select(predicate=3))),
    "keys_too_long": (
        "key",
        str(2**30 + 1),
        dict(key=array(2, 2**30 + 1, 2, 16), value=array(2, 2**30 + 1, 2, 8)),
    ),
    "plan_too_large": (
        "selection",
        str([1, 1, 2**27, 64]),
        dict(
            query=array(1, 2**27, 4, 16),
            key=array(1, 2**27, 2, 16),
            value=array(1, 2**27, 2, 16),
            selection=traced_indices(1, 1, 2**27, 64, q_block_size=1, kv_block_size=1),
        ),
    ),
}
VARLEN_ROWS = {
    "query_rank": ("query", "[1, 33, 4, 16]", dict(query=array(1, 33, 4, 16))),
    "key_heads": ("query", "[33, 4, 16]", dict(key=array(40, 3, 16), value=array(40, 3, 8))),
    "value_length": ("value", "[41, 2, 8]", dict(value=array(41, 2, 8))),
    "cu_seqlens_q_dtype": ("cu_seqlens_q", "float32[4]", dict(cu_seqlens_q=array(4))),
    "cu_seqlens_kv_dtype": ("cu_seqlens_kv", "int16[4]", dict(cu_seqlens_kv=array(4, dtype="int16"))),
    "cu_seqlens_rank": ("cu_seqlens_q", "int32[4, 1]", dict(cu_seqlens_q=array(4, 1, dtype="int32"))),
    "cu_seqlens_none": ("cu_seqlens_kv", "None", dict(cu_seqlens_kv=None)),
    "cu_seqlens_too_short": (
        "cu_seqlens_q",
        "int32[1]",
        dict(cu_seqlens_q=array(1, dtype="int32"), cu_seqlens_kv=array(1, dtype="int32")),
    ),
    "cu_seqlens_differ": ("cu_seqlens_kv", "int32[5]", dict(cu_seqlens_kv=array(5, dtype="int32"))),
    "selection_type": ("selection", "None", dict(selection=None)),
    "indices_batch": ("selection.indices", "[2, 2, 33, 3]", dict(selection=traced_indices(2, 2, 33, 3, q_block_size=1))),
    "indices_rows": ("selection.indices", "[1, 2, 32, 3]", dict(selection=traced_indices(1, 2, 32, 3, q_block_size=1))),
    "q_offset_shape": ("q_offset", "int32[4]", dict(q_offset=array(4, dtype="int32"))),
    "key_bias_shape": ("key_bias", "[1, 2, 40]", dict(key_bias=array(1, 2, 40))),
    "window_negative": ("local_window_size", "-1", dict(local_window_size=(-1, 0))),
    "implementation_unknown": ("implementation", "'triton'", dict(implementation="triton")),
}
OUT, LSE = array(2, 33, 4, 16), array(2, 33, 4)
PLAN_SIZES = dict(selection=select(), q_len=33, kv_len=40, num_q_heads=4, num_kv_heads=2)
SCORES = array(2, 2, 33, 8)
OTHER_ROWS = {
    "plan_q_len": (sa.plan_attention, "q_len", "0", PLAN_SIZES | dict(q_len=0)),
    "plan_heads": (sa.plan_attention, "num_kv_heads", "3", PLAN_SIZES | dict(num_kv_heads=3)),
    "plan_rows": (sa.plan_attention, "selection.indices", "[2, 2, 5, 3]", PLAN_SIZES | dict(q_len=99)),
    "plan_tile_size": (sa.plan_attention, "tile_size", "0", PLAN_SIZES | dict(tile_size=0)),
    "plan_selection": (sa.plan_attention, "selection", "None", PLAN_SIZES | dict(selection=None)),
    "merge_nothing": (sa.merge_attention, "outs", "[]", dict(outs=[], lses=[])),
    "merge_counts": (sa.merge_attention, "lses", "1", dict(outs=[OUT, OUT], lses=[LSE])),
    "merge_outs": (sa.merge_attention, "outs[1]", "[2, 33, 4]", dict(outs=[OUT, LSE], lses=[LSE, LSE])),
    "merge_lses": (sa.merge_attention, "lses[0]", "[2, 33, 4, 16]", dict(outs=[OUT], lses=[OUT])),
    "forced_blocks_beyond_top_k": (
        sa.select_blocks,
        "top_k",
        "3",
        dict(scores=SCORES, top_k=3, kv_len=512, num_sink_blocks=2, num_local_blocks=2),
    ),
    "top_k_zero": (sa.select_blocks, "top_k", "0", dict(scores=SCORES, top_k=0, kv_len=512)),
    "scores_blocks": (sa.select_blocks, "scores", "8", dict(scores=SCORES, top_k=3, kv_len=513)),
    "selector_forced_blocks": (
        sa.selectors.InfLLMV2,
        "top_k",
        "8",
        dict(top_k=8, num_sink_blocks=1, num_local_blocks=8),
    ),
}


def assert_refused(function, arguments, argument, found, error=ValueError):
    with pytest.raises(error) as raised:
        call_traced(function, arguments)
    message = str(raised.value)
    assert f"`{argument}" in message and found in message, message
    assert "must" in message or "needs" in message or "too large" in message, message


@pytest.mark.parametrize("row", OP_ROWS)
def test_op_refuses(row):
    argument, found, changes = OP_ROWS[row]
    assert_refused(sa.block_sparse_attention, dense_arguments() | changes, argument, found)
    assert_refused(sa.explain, dense_arguments() | changes, argument, found)


@pytest.mark.parametrize("row", VARLEN_ROWS)
def test_varlen_refuses(row):
    argument, found, changes = VARLEN_ROWS[row]
    assert_refused(sa.block_sparse_attention_varlen, packed_arguments() | changes, argument, found)


@pytest.mark.parametrize("row", OTHER_ROWS)
def test_other_functions_refuse(row):
    function, argument, found, arguments = OTHER_ROWS[row]
    with pytest.raises(ValueError) as raised:
        jax.eval_shape(lambda: function(**arguments))
    message = str(raised.value)
    assert f"`{argument}`" in message and found in message, message


@pytest.mark.parametrize("changed", ["q_len", "kv_len", "num_q_heads", "batch"])
def test_plan_for_other_sizes_is_refused(changed):
    sizes = dict(batch=2, q_len=33, kv_len=40, num_q_heads=4) | {changed: 8}
    plan = sa.plan_attention(select(), q_len=33, kv_len=40, num_q_heads=4, num_kv_heads=2)
    arguments = dict(
        query=array(sizes["batch"], sizes["q_len"], sizes["num_q_heads"], 16),
        key=array(sizes["batch"], sizes["kv_len"], 2, 16),
        value=array(sizes["batch"], sizes["kv_len"], 2, 8),
        selection=plan,
    )
    with pytest.raises(ValueError, match="`selection"):
        call_traced(sa.block_sparse_attention, arguments)


@pytest.mark.parametrize("function", ["block_sparse_attention", "block_sparse_attention_varlen"])
@pytest.mark.parametrize("implementation", ["mosaic", "cuda", ("cuda", "mosaic")])
def test_implementation_that_cannot_run_a_call_says_every_reason(function, implementation):
    arguments = dense_arguments() if function == "block_sparse_attention" else packed_arguments()
    reasons = sa.explain(**dense_arguments(), implementation=implementation).reasons
    assert all(reasons.values())
    with pytest.raises(NotImplementedError, match="`implementation` is ") as raised:
        call_traced(getattr(sa, function), arguments | dict(implementation=implementation))
    for name, against in reasons.items():
        assert all(f"{name}: {reason}" in str(raised.value) for reason in against)


def test_arguments_outside_jit_are_refused_as_inside():
    arguments = {name: jnp.zeros(x.shape, x.dtype) for name, x in dense_arguments().items() if name != "selection"}
    wrong = arguments | dict(key=arguments["key"][..., :8])
    with pytest.raises(ValueError, match=r"`key` is float32\[2, 40, 2, 8\]"):
        sa.block_sparse_attention(**wrong, selection=select())
    with pytest.raises(ValueError, match=r"`key` is float32\[2, 40, 2, 8\]"):
        jax.jit(lambda arguments: sa.block_sparse_attention(**arguments, selection=select()))(wrong)


@pytest.mark.parametrize("implementation", [None, "xla", ("cuda", "xla")])
def test_correct_arguments_are_accepted(implementation):
    out = call_traced(sa.block_sparse_attention, dense_arguments() | dict(implementation=implementation))
    assert out.shape == (2, 33, 4, 8)
    out = call_traced(sa.block_sparse_attention_varlen, packed_arguments() | dict(implementation=implementation))
    assert out.shape == (33, 4, 8)
    assert sa.explain(**dense_arguments(), implementation=implementation).implementation == "xla"


@pytest.mark.parametrize("lengths", [(0, 40), (33, 0), (0, 0)])
def test_no_queries_and_no_keys_are_legal(lengths):
    q_len, kv_len = lengths
    operands = dict(query=jnp.ones((2, q_len, 4, 16)), key=jnp.ones((2, kv_len, 2, 16)), value=jnp.ones((2, kv_len, 2, 8)))
    selection = select(INDICES[:, :, : -(-q_len // 8)])
    out, lse = sa.block_sparse_attention(**operands, selection=selection, return_residual=True)
    assert out.shape == (2, q_len, 4, 8) and lse.shape == (2, q_len, 4)
    assert not out.any() and np.isneginf(lse).all()
