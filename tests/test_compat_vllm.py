"""The functions of vLLM's blocksparse_attention against the pattern's formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn_jax.compat import blocksparse_flash_attn_varlen_fwd, get_sparse_attn_mask
from sparse_attn_jax.compat.vllm_blocksparse import _layout_rows
from tests.compat_checks import assert_close, attend_packed, causal_mask, cumulative, random_packed, signature_of
from tests.fast_calls import compile_fast

SIGNATURES = {
    blocksparse_flash_attn_varlen_fwd: (
        "q, k, v, cu_seqlens_k, cu_seqlens_q, sm_scale, sparse_layout, *, block_size=64, q_block_size=None, max_seqlen=None"
    ),
    get_sparse_attn_mask: (
        "n_heads, q_len, max_seqlen, dtype, device, block_size=64, local_blocks=4, vert_stride=4, homo_head=True, "
        "return_dense=False, dense_mask_type='binary'"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature_is_the_original(function):
    assert signature_of(function) == SIGNATURES[function]


def keeps(head: int, q_block: int, kv_block: int, local_blocks: int, vert_stride: int, step: int) -> bool:
    is_near, is_far = q_block - kv_block < local_blocks, (kv_block + head * step + 1) % vert_stride == 0
    return kv_block <= q_block and (is_near or is_far)


def block_pattern(num_heads, num_blocks, local_blocks, vert_stride, step) -> np.ndarray:
    mask = np.zeros((num_heads, num_blocks, num_blocks), bool)
    for index in np.ndindex(mask.shape):
        mask[index] = keeps(*index, local_blocks, vert_stride, step)
    return mask


def read_csr(crow, col, num_columns: int) -> np.ndarray:
    """Every id once and ascending, -1 behind the last."""
    mask = np.zeros((crow.shape[0], crow.shape[1] - 1, num_columns), bool)
    for head, row in np.ndindex(mask.shape[:2]):
        ids = col[head, crow[head, row] : crow[head, row + 1]]
        assert (np.diff(ids) > 0).all()
        mask[head, row, ids] = True
    for head, end in enumerate(crow[:, -1]):
        assert (col[head, end:] == -1).all()
    return mask


@pytest.mark.parametrize("homo_head", [True, False])
@pytest.mark.parametrize("q_len", [200, 70, 1])
def test_pattern_is_its_formula(q_len, homo_head):
    """200 keys in blocks of 16: ragged."""
    num_heads, kv_len, block_size, sizes = 3, 200, 16, (2, 7)
    step = 0 if homo_head else 2
    options = dict(block_size=block_size, local_blocks=2, vert_stride=7, homo_head=homo_head, return_dense=True)
    (crow, col), blocks, dense = get_sparse_attn_mask(num_heads, q_len, kv_len, jnp.bfloat16, None, **options)
    wanted = block_pattern(num_heads, 13, *sizes, step)
    num_rows = -(-q_len // block_size)
    assert crow.dtype == col.dtype == jnp.int32 and blocks.dtype == dense.dtype == jnp.bfloat16
    assert col.shape[1] == wanted[:, -num_rows:].sum(axis=(1, 2)).max()
    np.testing.assert_array_equal(read_csr(np.asarray(crow), np.asarray(col), 13), wanted[:, -num_rows:])
    np.testing.assert_array_equal(blocks, wanted[0] if homo_head else wanted)
    tokens = wanted.repeat(16, axis=1).repeat(16, axis=2)[:, kv_len - q_len : kv_len, :kv_len]
    tokens &= np.tri(kv_len, dtype=bool)[kv_len - q_len :]
    np.testing.assert_array_equal(dense, tokens)
    bias = get_sparse_attn_mask(num_heads, q_len, kv_len, jnp.bfloat16, None, **options, dense_mask_type="bias")[2]
    np.testing.assert_array_equal(bias, np.where(tokens, 0, -np.inf))
    assert get_sparse_attn_mask(num_heads, q_len, kv_len, jnp.float32, None, block_size)[2] is None


def test_ragged_dense_mask_has_no_empty_row_where_the_original_has():
    """The original takes the last rows of the padded mask, and of the causal one, which then are of other tokens."""
    kv_len, block_size = 200, 256
    dense = get_sparse_attn_mask(1, kv_len, kv_len, jnp.float32, None, block_size, 1, 7, return_dense=True)[2]
    assert (np.asarray(dense[0]).sum(axis=1) == np.arange(1, kv_len + 1)).all()
    block_size, padded = 64, 256
    ours = np.asarray(get_sparse_attn_mask(1, kv_len, kv_len, jnp.float32, None, 64, 1, 100, return_dense=True)[2][0])
    blocks = block_pattern(1, 4, 1, 100, 0)[0].repeat(64, axis=0).repeat(64, axis=1)
    original = blocks[padded - kv_len :, :kv_len] & np.tri(kv_len, dtype=bool)
    assert (original.sum(axis=1) == 0).any() and (ours.sum(axis=1) > 0).all()


NUM_HEADS, BLOCK_SIZE = 4, 16
PATTERN = dict(block_size=BLOCK_SIZE, local_blocks=2, vert_stride=5, homo_head=False)
STEP = 1


def layout(max_seqlen):
    return get_sparse_attn_mask(NUM_HEADS, max_seqlen, max_seqlen, jnp.float32, None, **PATTERN)[0]


def pattern_masks(q_lens, kv_lens) -> list[np.ndarray]:
    masks = []
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        blocks = block_pattern(NUM_HEADS, -(-kv_len // BLOCK_SIZE), 2, 5, STEP)
        tokens = blocks.repeat(BLOCK_SIZE, axis=1).repeat(BLOCK_SIZE, axis=2)[:, kv_len - q_len : kv_len, :kv_len]
        masks.append(tokens & causal_mask(q_len, kv_len))
    return masks


def test_prefill_and_its_gradients_are_the_oracle():
    """Blocks of queries share a row; the layout covers more than the longest sequence."""
    lens = (150, 1, 33)
    operands = random_packed(lens, lens)
    d_out = np.random.default_rng(8).standard_normal(operands[0].shape)
    crow, col = layout(200)

    @compile_fast
    def run(operands, bounds):
        attend = lambda *x: blocksparse_flash_attn_varlen_fwd(
            *x, bounds, None, 0.4, (crow, col), block_size=BLOCK_SIZE, max_seqlen=200
        )
        out, pull_back = jax.vjp(attend, *operands)
        return out, *pull_back(jnp.asarray(d_out, out.dtype))

    out, _, *gradients = attend_packed(pattern_masks(lens, lens), *operands, d_out=d_out[None], scale=0.4)
    for found, wanted in zip(run(operands, cumulative(lens)), (out, *gradients), strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize(("q_lens", "is_traced"), [((1, 1, 1), False), ((7, 1, 33, 0), True)], ids=["decoding", "mixed"])
def test_queries_at_any_position_are_the_oracle(q_lens, is_traced):
    """Decoding, with the bounds left out, and chunks that start anywhere in a block, with a layout that is not known."""
    kv_lens = (150, 17, 33, 5)[: len(q_lens)]
    operands = random_packed(q_lens, kv_lens, seed=6)
    bounds_q = None if q_lens == (1, 1, 1) else cumulative(q_lens)
    rest = dict(block_size=BLOCK_SIZE, max_seqlen=160)
    crow_col = layout(160)

    @compile_fast
    def attend(operands, bounds, traced_layout):
        rows = traced_layout if is_traced else crow_col
        return blocksparse_flash_attn_varlen_fwd(*operands, *bounds, None, rows, **rest)

    found = attend(operands, (cumulative(kv_lens), bounds_q), crow_col)
    assert_close(found, attend_packed(pattern_masks(q_lens, kv_lens), *operands)[0])


def test_long_rows_do_not_show_the_future():
    """Rows of 32 queries over blocks of 16: the first 16 see nothing of the second block of the diagonal."""
    lens = (100,)
    operands = random_packed(lens, lens, seed=7)
    blocks = block_pattern(NUM_HEADS, 7, 2, 5, STEP)
    merged = np.pad(blocks, ((0, 0), (0, 1), (0, 0))).reshape(NUM_HEADS, 4, 2, 7).any(axis=2)
    crow = np.pad(merged.sum(axis=2).cumsum(axis=1), ((0, 0), (1, 0))).astype(np.int32)
    col = np.full((NUM_HEADS, crow.max()), -1, np.int32)
    for head in range(NUM_HEADS):
        ids = np.nonzero(merged[head])[1]
        col[head, : len(ids)] = ids
    bounds = cumulative(lens)
    rows = jnp.asarray(crow), jnp.asarray(col)
    attend = lambda *x: blocksparse_flash_attn_varlen_fwd(*x, bounds, bounds, None, rows, block_size=16, q_block_size=32)
    found = compile_fast(attend)(*operands)
    mask = merged.repeat(32, axis=1).repeat(16, axis=2)[:, :100, :100]
    is_leak = mask & ~causal_mask(100, 100) & (np.arange(100) // 16 * 16 < np.arange(100)[:, None] // 32 * 32 + 32)
    assert is_leak.any()
    assert_close(found, attend_packed([mask & causal_mask(100, 100)], *operands)[0])


def arguments():
    lens = (20, 33)
    q, k, v = random_packed(lens, lens)
    sequences = dict(cu_seqlens_k=cumulative(lens), cu_seqlens_q=None, sm_scale=None)
    return dict(q=q, k=k, v=v, **sequences, sparse_layout=layout(48), block_size=BLOCK_SIZE)


REFUSED = [
    (dict(max_seqlen=32), "`max_seqlen` is 32; it must be at least 33"),
    (dict(max_seqlen=49), "`max_seqlen` is 49; it must be at most 48"),
    (dict(sparse_layout=None), "`sparse_layout` is None"),
    (dict(sparse_layout=tuple(x[:, :3] for x in layout(48))), "`max_seqlen` is 32; it must be at least 33"),
    (dict(sparse_layout=tuple(x[:3] for x in layout(48))), "`sparse_layout` is .* of 1 or 2 or 4 heads"),
    (dict(sparse_layout=tuple(x[0] for x in layout(48))), "`sparse_layout` is"),
    (dict(q_block_size=0), "`q_block_size` is 0"),
    (dict(k=None), "`k` is None"),
    (dict(cu_seqlens_k=jnp.ones(3)), r"`cu_seqlens_k` is float32\[3\]"),
    (dict(cu_seqlens_q=cumulative((53,))), r"`cu_seqlens_q` is int32\[2\]"),
    (dict(sm_scale="1"), "`sm_scale` is '1'"),
    (dict(q=jnp.ones((3, 4, 8))), "`cu_seqlens_q` is None"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        call = arguments() | change
        jax.eval_shape(lambda: blocksparse_flash_attn_varlen_fwd(**call))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(device="cuda"), "`device` is 'cuda'"),
        (dict(q_len=81), "`q_len` is 81"),
        (dict(dense_mask_type="bool"), "`dense_mask_type` is 'bool'"),
        (dict(local_blocks=0), "`local_blocks` is 0"),
    ],
)
def test_wrong_patterns_are_refused(change, message):
    known = dict(n_heads=2, q_len=80, max_seqlen=80, dtype=jnp.float32, device=None) | change
    with pytest.raises(ValueError, match=message):
        get_sparse_attn_mask(**known)


def test_pattern_is_constant_under_jit():
    """So that lists are as long as the longest row."""

    @jax.jit
    def run(x):
        (crow, col), _, _ = get_sparse_attn_mask(2, 80, 80, jnp.float32, None, block_size=16)
        assert not isinstance(crow, jax.core.Tracer) and not isinstance(col, jax.core.Tracer)
        assert _layout_rows(crow, col, num_kv_blocks=9).shape == (2, 5, 4)
        return x

    run(0.0)
