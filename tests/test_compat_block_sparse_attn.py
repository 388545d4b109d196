"""The functions of block_sparse_attn against NumPy masks of what its README documents, with the local window set right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.compat import block_sparse_attn_func, block_streaming_attn_func, token_streaming_attn_func
from sparse_attn_jax.compat.block_sparse_attn import _num_slots, _streaming_blocks
from tests.compat_checks import assert_close, attend_packed, causal_mask, cumulative, random_packed, signature_of
from tests.fast_calls import compile_fast

SIGNATURES = {
    block_sparse_attn_func: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, streaming_info, base_blockmask, max_seqlen_q_, max_seqlen_k_, "
        "p_dropout, deterministic=False, softmax_scale=None, is_causal=False, exact_streaming=False, return_attn_probs=False"
    ),
    block_streaming_attn_func: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, streaming_info, max_seqlen_q_, max_seqlen_k_, p_dropout, "
        "deterministic=False, softmax_scale=None, is_causal=True, return_attn_probs=False"
    ),
    token_streaming_attn_func: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, head_mask_type, streaming_info, max_seqlen_q_, max_seqlen_k_, "
        "deterministic=False, softmax_scale=None, return_attn_probs=False"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature_is_the_original(function):
    assert signature_of(function) == SIGNATURES[function]


# As many queries as keys, a prefix of whole blocks, one of 60 tokens, more queries than keys, nothing.
Q_LENS, KV_LENS = (300, 140, 200, 150, 0), (300, 396, 260, 40, 70)
MAX_Q, MAX_K = 300, 396
# Four heads that read two KV heads.
KINDS = (-1, 0, 1, -1)


def streaming_blocks(q_len, kv_len, sinks, local, is_causal) -> np.ndarray:
    """bool [q_len, kv_len], without causality: the blocks of the documentation, and that of a tile's first query."""
    mask = np.zeros((q_len, kv_len), bool)
    offset = kv_len - q_len
    for i in range(q_len):
        first = i - i % 128 + offset
        if is_causal:
            end = first // 128 + 1 if offset % 128 == 0 else first // 128 + 2
            start = first // 128 - local + 1
        else:
            end = -(-kv_len // 128)
            start = end - local
        mask[i, max(start * 128, 0) : max(end * 128, 0)] = local > 0
        mask[i, : sinks * 128] = True
    return mask


def streaming_tokens(q_len, kv_len, sinks, local) -> np.ndarray:
    j, position = np.arange(kv_len), np.arange(q_len)[:, None] + kv_len - q_len
    return (j < sinks) | ((j > position - local) & (j <= position))


def head_masks(info, base, is_causal, exact) -> list[np.ndarray]:
    """bool [heads, q_len, kv_len] of each sequence."""
    masks = []
    for sequence, (q_len, kv_len) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        visible = causal_mask(q_len, kv_len) if is_causal else np.ones((q_len, kv_len), bool)
        heads = []
        for head, kind in enumerate(KINDS):
            pattern = np.ones((q_len, kv_len), bool)
            if kind == -1:
                sizes = q_len, kv_len, *info[2 * head : 2 * head + 2]
                pattern = streaming_tokens(*sizes) if exact else streaming_blocks(*sizes, is_causal)
            elif kind == 1:
                pattern = base[sequence, 0].repeat(128, axis=0).repeat(128, axis=1)[:q_len, :kv_len]
            heads.append(pattern & visible)
        masks.append(np.stack(heads))
    return masks


def base_blockmask() -> np.ndarray:
    base = np.random.default_rng(3).random((len(Q_LENS), 1, 3, 4)) < 0.5
    base[0, 0, 2] = False  # queries that see nothing
    return base


@functools.cache
def operands():
    return random_packed(Q_LENS, KV_LENS)


@functools.partial(compile_fast, static_argnames=("function", "options", "has_gradients"))
def run(function, options, operands, bounds, arrays, d_out, has_gradients):
    """out, lse and perhaps the gradients of sum(out * d_out)."""

    def attend(*operands):
        return function(*operands, *bounds, **arrays, **dict(options), return_attn_probs=True)

    if not has_gradients:
        return attend(*operands)[:2]
    (out, lse, probabilities), pull_back = jax.vjp(attend, *operands)
    assert probabilities is None
    return out, lse, *pull_back((d_out.astype(out.dtype), jnp.zeros_like(lse), None))


def assert_is_oracle(function, masks, arrays, has_gradients, **options) -> None:
    bounds = cumulative(Q_LENS), cumulative(KV_LENS)
    d_out = np.random.default_rng(1).standard_normal(operands()[0].shape)
    options = dict(options, max_seqlen_q_=MAX_Q, max_seqlen_k_=MAX_K, softmax_scale=0.4, head_mask_type=KINDS)
    found = list(run(function, tuple(options.items()), operands(), bounds, arrays, jnp.asarray(d_out), has_gradients))
    wanted = attend_packed(masks, *operands(), d_out=d_out[None], scale=0.4)
    packed_lse, wanted[1] = wanted[1], np.full((len(Q_LENS), len(KINDS), MAX_Q), np.inf)
    for sequence, rows in enumerate(np.split(packed_lse, np.cumsum(Q_LENS)[:-1])):
        wanted[1][sequence, :, : len(rows)] = rows.T
    for x, array in zip(found, wanted, strict=has_gradients):
        assert_close(x, array)


@pytest.mark.parametrize(
    ("info", "is_causal", "exact"),
    [
        ((1, 1, 0, 0, 0, 0, 0, 2), True, False),
        ((1, 1, 9, 9, 9, 9, 0, 1), False, False),
        ((3, 40, 0, 0, 0, 0, 130, 129), True, True),
    ],
    ids=["blocks_causal", "blocks", "tokens"],
)
def test_all_kinds_of_heads_are_the_oracle(info, is_causal, exact):
    base = base_blockmask()
    masks = head_masks(info, base, is_causal, exact)
    options = dict(streaming_info=info, is_causal=is_causal, exact_streaming=exact, p_dropout=0.0)
    arrays = dict(base_blockmask=jnp.asarray(base))
    assert_is_oracle(block_sparse_attn_func, masks, arrays, has_gradients=exact, **options)


def test_window_of_the_original_loses_blocks_of_their_own():
    """A prefix of 60 tokens, no sinks: with one local block, the original's first queries see nothing."""
    q_len, kv_len = 200, 260
    ours = streaming_blocks(q_len, kv_len, 0, 1, True) & causal_mask(q_len, kv_len)
    tile = np.arange(q_len)[:, None] // 128
    end = -(-(kv_len - q_len) // 128) + 1 + tile
    block = np.arange(kv_len) // 128
    original = (block >= end - 1) & (block < end) & causal_mask(q_len, kv_len)
    assert not original[:68].any() and ours.any(axis=1).all()
    assert (ours >= original).all()


@pytest.mark.parametrize(("is_causal", "exact"), [(False, False), (True, False), (True, True)])
def test_lists_of_heads_that_all_stream_hold_all_their_blocks(is_causal, exact):
    """The lists are as short as the largest sinks and windows allow, wherever tiles start."""
    q_lens = np.repeat((300, 128, 200), 129)
    kv_lens = q_lens + np.tile(np.arange(-64, 65), 3) + 640 * (np.arange(3 * 129) % 2)
    unit = 128 if exact else 1
    for sinks, local in ((0, 1), (1, 1), (2, 3), (0, 2)):
        for more in {0, 1, unit - 1}:
            sizes = np.array([-1]), np.array([sinks * unit]), np.array([local * unit + more])
            visible = _streaming_blocks(*sizes, jnp.asarray(q_lens), jnp.asarray(kv_lens), 300, 1280, is_causal, exact)
            longest = int(visible.sum(axis=3).max())
            num_slots = _num_slots(*sizes, visible.shape[3], exact)
            assert longest <= num_slots <= longest + 1


def test_streaming_functions_are_the_general_one():
    general = arguments() | dict(base_blockmask=None, head_mask_type=(-1, 0, -1, -1))
    special = {name: x for name, x in general.items() if name != "base_blockmask"}
    without_dropout = {name: x for name, x in special.items() if name != "p_dropout"}
    tokens = dict(is_causal=True, exact_streaming=True)
    calls = (
        (lambda: block_streaming_attn_func(**special), lambda: block_sparse_attn_func(**general, is_causal=True)),
        (lambda: block_streaming_attn_func(**special, is_causal=False), lambda: block_sparse_attn_func(**general)),
        (lambda: token_streaming_attn_func(**without_dropout), lambda: block_sparse_attn_func(**general, **tokens)),
    )
    programs = [[str(jax.make_jaxpr(call)()) for call in pair] for pair in calls]
    assert all(first == second for first, second in programs)
    assert len({first for first, _ in programs}) == 3


def arguments():
    q, k, v = operands()
    bounds = dict(cu_seqlens_q=cumulative(Q_LENS), cu_seqlens_k=cumulative(KV_LENS), max_seqlen_q_=MAX_Q, max_seqlen_k_=MAX_K)
    heads = dict(head_mask_type=KINDS, streaming_info=(1,) * 8, base_blockmask=base_blockmask(), p_dropout=0.0)
    return dict(q=q, k=k, v=v, **bounds, **heads)


REFUSED = [
    (dict(p_dropout=0.1), "`p_dropout` is 0.1"),
    (dict(deterministic=1), "`deterministic` is 1"),
    (dict(head_mask_type=(0, 1)), "`head_mask_type` is"),
    (dict(head_mask_type=(0, 1, 2, -1)), "`head_mask_type` is"),
    (dict(streaming_info=None), "`streaming_info` is None"),
    (dict(streaming_info=(1,) * 7), "`streaming_info` is"),
    (dict(streaming_info=(-1,) * 8), "`streaming_info` is"),
    (dict(base_blockmask=None), "`base_blockmask` is None"),
    (dict(base_blockmask=np.ones((5, 2, 3, 4), bool)), r"`base_blockmask` is bool\[5, 2, 3, 4\]"),
    (dict(exact_streaming=True), "`is_causal` is False"),
    (dict(max_seqlen_q_=299), "`max_seqlen_q_` is 299; it must be at least 300"),
    (dict(max_seqlen_k_=jnp.int32(300)), "`max_seqlen_k_` is"),
    (dict(q=None), "`q` is None"),
    (dict(k=jnp.ones((9, 3, 8))), "`v` is .* of 3 heads, as `k`"),
    (dict(cu_seqlens_q=(0, 3)), r"`cu_seqlens_q` is \(0, 3\)"),
    (dict(cu_seqlens_k=jnp.ones(3)), r"`cu_seqlens_k` is float32\[3\]"),
    (dict(base_blockmask=True), "`base_blockmask` is True"),
    (dict(is_causal=1), "`is_causal` is 1"),
    (dict(softmax_scale="1"), "`softmax_scale` is '1'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call = arguments() | change
        jax.eval_shape(lambda: block_sparse_attn_func(**call))


def test_head_kinds_have_to_be_known():
    known = arguments()
    kinds = jnp.asarray(known.pop("head_mask_type"))
    with pytest.raises(ValueError, match="`head_mask_type` is .*known while tracing"):
        jax.eval_shape(lambda kinds: block_sparse_attn_func(head_mask_type=kinds, **known), kinds)
