"""The functions of infllm_v2 against NumPy definitions of what it documents, with positions set right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from sparse_attn_jax.compat import (
    infllmv2_attn_stage1,
    infllmv2_attn_varlen_func,
    infllmv2_attn_with_kvcache,
    max_pooling_1d,
)
from sparse_attn_jax.testing import oracle, selection_oracle
from tests.compat_checks import assert_close, attend_packed, causal_mask, cumulative, random_packed, signature_of
from tests.fast_calls import compile_fast

SIGNATURES = {
    infllmv2_attn_stage1: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, cu_seqlens_v, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=True, "
        "block_table=None, *, kv_lens=None"
    ),
    max_pooling_1d: "input, cache_len, local_blocks, init_blocks, block_size=64, stride=16",
    infllmv2_attn_varlen_func: (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None, "
        "topk_idx=None"
    ),
    infllmv2_attn_with_kvcache: (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
        "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, topk_idx=None"
    ),
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_signature_is_the_original(function):
    assert signature_of(function) == SIGNATURES[function]


# Keys per sequence and queries, the last of them: a prefix of 5 more than a multiple of 16, a whole prompt, no unit at all,
# fine units and no coarse one.
KV_LENS, Q_LENS = (213, 90, 30, 100), (80, 90, 2, 7)
GROUP_SIZE, NUM_KV_HEADS, HEAD_DIM = 3, 2, 8


@functools.cache
def stage1_inputs(kv_lens=KV_LENS, q_lens=Q_LENS) -> dict:
    """Arguments of stage 1, and as `keys` those before compression, by sequence."""
    q, key, _ = random_packed(q_lens, kv_lens, GROUP_SIZE * NUM_KV_HEADS, NUM_KV_HEADS, HEAD_DIM)
    keys = np.split(np.asarray(key), np.cumsum(kv_lens)[:-1])
    units = {}
    for name, sizes in (("k", (32, 16)), ("v", (128, 64))):
        by_sequence = [selection_oracle.compress(x[None], *sizes)[0] for x in keys]
        units[name] = jnp.asarray(np.concatenate(by_sequence), jnp.float32)
        units[f"cu_seqlens_{name}"] = cumulative([len(x) for x in by_sequence])
    return dict(keys=keys, q=q, cu_seqlens_q=cumulative(q_lens), max_seqlen_q=max(q_lens), max_seqlen_k=13, **units)


@functools.partial(compile_fast, static_argnames=("max_seqlen_q", "max_seqlen_k", "causal", "softmax_scale"))
def stage1(keys, **arguments):
    return infllmv2_attn_stage1(**arguments)


def stage1_definition(inputs, kv_lens, q_lens, causal, is_exact) -> np.ndarray:
    scores = np.zeros((NUM_KV_HEADS, sum(q_lens), inputs["max_seqlen_k"]))
    row = 0
    for key, kv_len, q_len in zip(inputs["keys"], kv_lens, q_lens, strict=True):
        fine, coarse = (selection_oracle.compress(key[None], *sizes)[0] for sizes in ((32, 16), (128, 64)))
        for i in range(q_len):
            position = kv_len - q_len + i if causal else kv_len
            seen = selection_oracle.visible_units(len(fine), (32, 16), position)
            seen_coarse = selection_oracle.visible_units(len(coarse), (128, 64), position)
            for head in range(GROUP_SIZE * NUM_KV_HEADS if len(seen) else 0):
                n, query = head // GROUP_SIZE, np.asarray(inputs["q"][row], np.float64)[head] / HEAD_DIM**0.5
                logits = fine[seen, n] @ query
                denominator = logits if is_exact or not len(seen_coarse) else coarse[seen_coarse, n] @ query
                scores[n, row, seen] += np.exp(logits - np.logaddexp.reduce(denominator))
            row += 1
    return scores


@pytest.mark.parametrize(
    ("causal", "is_exact"), [(True, False), (True, True), (False, False)], ids=["causal", "causal_exact_lse", "all_keys"]
)
def test_stage1_is_its_definition(causal, is_exact):
    inputs = stage1_inputs()
    arguments = dict(inputs, kv_lens=jnp.asarray(KV_LENS, jnp.int32), causal=causal)
    if is_exact:
        arguments |= dict(v=inputs["k"], cu_seqlens_v=inputs["cu_seqlens_k"])
    assert_close(stage1(**arguments), stage1_definition(inputs, KV_LENS, Q_LENS, causal, is_exact))


def original_count(i: int, q_len: int, num_units: int) -> int:
    """Compressed keys that the original lets query i of a sequence see: it knows lengths only."""
    q_units = (q_len - 15) // 16 if q_len >= 15 else 0  # the quotient is truncated
    return min(max((i + 1) // 16 - 1 + num_units - q_units, 0), num_units)


@pytest.mark.parametrize("prefix", [0, 32, 5, 27])
def test_stage1_counts_by_position_and_the_original_by_length(prefix):
    q_lens = (47, 40, 62)
    kv_lens = tuple(prefix + q_len for q_len in q_lens)
    inputs = stage1_inputs(kv_lens, q_lens)
    inputs = dict(inputs, max_seqlen_k=max(1, (max(kv_lens) - 16) // 16))
    scores = stage1(**inputs, causal=True, kv_lens=jnp.asarray(kv_lens, jnp.int32))
    visible = (np.asarray(scores)[0] > 0).sum(axis=1)
    positions = [np.arange(kv_len - q_len, kv_len) for q_len, kv_len in zip(q_lens, kv_lens, strict=True)]
    np.testing.assert_array_equal(visible, np.maximum(np.concatenate(positions) - 15, 0) // 16)
    num_units = [max((kv_len - 16) // 16, 0) for kv_len in kv_lens]
    original = [[original_count(i, q_len, count) for i in range(q_len)] for q_len, count in zip(q_lens, num_units, strict=True)]
    errors = np.split(np.concatenate(original) - visible, np.cumsum(q_lens)[:-1])
    if prefix % 16:
        assert max(error.max() for error in errors) > 0, "no future token"
    else:
        assert [error.any() for error in errors] == [True, False, False]
        assert errors[0].min() == -1 and errors[0].max() <= 0
        np.testing.assert_array_equal(stage1(**inputs, causal=True), scores)


def pooling_definition(scores, cache_len, local_blocks, init_blocks, block_size, stride) -> np.ndarray:
    heads, q_len, k_len = scores.shape
    pooled = np.full((heads, q_len, -(-(q_len + cache_len) // block_size)), -np.inf)
    for h, i, b in np.ndindex(pooled.shape):
        own, block = (i + cache_len) // block_size, set(range(b * block_size, (b + 1) * block_size))
        overlaps = [j for j in range(k_len) if block & set(range(j * stride, (j + 2) * stride))]
        if b < init_blocks or own - local_blocks <= b <= own:
            pooled[h, i, b] = np.inf
        elif overlaps:
            pooled[h, i, b] = scores[h, i, overlaps].max()
    return pooled


@pytest.mark.parametrize(
    ("cache_len", "local_blocks", "init_blocks", "block_size", "stride", "dtype"),
    [(150, 1, 1, 64, 16, "float32"), (0, 0, 0, 32, 16, "bfloat16"), (71, 2, 3, 24, 8, "float16")],
)
def test_max_pooling_is_its_definition(cache_len, local_blocks, init_blocks, block_size, stride, dtype):
    arguments = (cache_len, local_blocks, init_blocks, block_size, stride)
    k_len = (cache_len + 70 - 2 * stride) // stride + 1
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 70, k_len)), dtype)
    pooled = max_pooling_1d(scores, *arguments)
    assert pooled.dtype == dtype
    np.testing.assert_array_equal(np.asarray(pooled, np.float64), pooling_definition(np.asarray(scores, float), *arguments))


def test_pooled_stage1_is_what_score_blocks_gives():
    """For the blocks that a query can see and that are not forced."""
    q_len, kv_len = 70, 331
    q, key, _ = random_packed((q_len,), (kv_len,), seed=3)

    @compile_fast
    def run(q, key):
        units, coarse = sa.compress_keys(key[None]), sa.compress_keys(key[None], 128, 64)
        bounds = cumulative((q_len,)), cumulative(units.shape[1:2]), cumulative(coarse.shape[1:2])
        arguments = dict(causal=True, kv_lens=jnp.asarray([kv_len], jnp.int32))
        scores = infllmv2_attn_stage1(q, units[0], coarse[0], *bounds, q_len, units.shape[1], **arguments)
        pooled = max_pooling_1d(scores, kv_len - q_len, local_blocks=0, init_blocks=0)
        return pooled, sa.score_blocks(q[None], units, kv_len=kv_len, is_causal=True, coarse_key=coarse)[0]

    pooled, wanted = run(q, key)
    own = np.arange(kv_len - q_len, kv_len)[:, None] // 64
    is_free = np.broadcast_to(np.arange(6) < own, pooled.shape)
    np.testing.assert_allclose(np.asarray(pooled)[is_free], np.asarray(wanted)[is_free], rtol=1e-5)


ATTEND_Q_LENS, ATTEND_KV_LENS = (70, 0, 3, 5), (150, 20, 1, 64)


def random_lists(heads, rows, max_kv_len, slots=2, seed=5) -> np.ndarray:
    """Ids of the longest sequence, so out of range in others, empty slots and repeated ids."""
    return np.random.default_rng(seed).integers(-1, -(-max_kv_len // 64), (heads, rows, slots)).astype(np.int32)


def list_mask(lists: np.ndarray, kv_len: int, group_size: int) -> np.ndarray:
    """int [heads, rows, slots] -> bool [num_q_heads, rows, kv_len]."""
    return (lists[..., None] == np.arange(kv_len) // 64).any(axis=2).repeat(group_size, axis=0)


@functools.cache
def attention_case(has_lists: bool):
    """q, k and v, the lists, and what each query may see."""
    q, k, v = random_packed(ATTEND_Q_LENS, ATTEND_KV_LENS)
    lists = random_lists(2, sum(ATTEND_Q_LENS), max(ATTEND_KV_LENS))
    split = np.split(lists, np.cumsum(ATTEND_Q_LENS)[:-1], axis=1)
    masks = [np.broadcast_to(causal_mask(*lens), (4, *lens)) for lens in zip(ATTEND_Q_LENS, ATTEND_KV_LENS, strict=True)]
    if has_lists:
        masks = [mask & list_mask(rows, mask.shape[2], 2) for mask, rows in zip(masks, split, strict=True)]
    return (q, k, v), jnp.asarray(lists), masks


def test_varlen_func_and_its_gradients_are_the_oracle():
    operands, lists, masks = attention_case(has_lists=True)
    bounds, lengths = (cumulative(ATTEND_Q_LENS), cumulative(ATTEND_KV_LENS)), (max(ATTEND_Q_LENS), max(ATTEND_KV_LENS))
    d_out = np.random.default_rng(9).standard_normal(operands[0].shape)

    @compile_fast
    def run(operands, bounds, lists):
        def attend(*operands):
            options = dict(causal=True, softcap=2.0, softmax_scale=0.4, return_attn_probs=True, topk_idx=lists)
            return infllmv2_attn_varlen_func(*operands, *bounds, *lengths, **options)

        (out, lse, probabilities), pull_back = jax.vjp(attend, *operands)
        assert probabilities is None
        return out, lse, *pull_back((jnp.asarray(d_out, out.dtype), jnp.zeros_like(lse), None))

    wanted = attend_packed(masks, *operands, d_out=d_out[None], scale=0.4, logits_soft_cap=2.0)
    wanted[1] = wanted[1].T
    assert np.isposinf(wanted[1]).any()
    for found, array in zip(run(operands, bounds, lists), wanted, strict=True):
        assert_close(found, array)


def test_varlen_func_without_lists_reads_pages():
    """All blocks, a window, keys in pages of a size of their own."""
    operands, _, masks = attention_case(has_lists=False)
    masks = [mask & (np.cumsum(mask, axis=2) > np.maximum(mask.sum(axis=2, keepdims=True) - 10, 0)) for mask in masks]
    page_size, pages_each = 50, 3
    pages = np.full((2, 14, page_size, 2, 8), np.nan, np.float32)
    table = np.random.default_rng(2).permutation(14)[:12].reshape(4, pages_each).astype(np.int32)
    bounds = np.cumsum((0, *ATTEND_KV_LENS))
    for sequence, length in enumerate(ATTEND_KV_LENS):
        for j in range(length):
            page, row = table[sequence, j // page_size], j % page_size
            pages[:, page, row] = np.stack([np.asarray(x)[bounds[sequence] + j] for x in operands[1:]])
    bounds, lengths = (cumulative(ATTEND_Q_LENS), cumulative(ATTEND_KV_LENS)), (max(ATTEND_Q_LENS), max(ATTEND_KV_LENS))

    @compile_fast
    def run(q, pages, bounds, table):
        options = dict(causal=True, window_size=(9, -1), block_table=table)
        return infllmv2_attn_varlen_func(q, *pages, *bounds, *lengths, **options)

    found = run(operands[0], jnp.asarray(pages), bounds, jnp.asarray(table))
    assert_close(found, attend_packed(masks, *operands)[0])


def cache_case(q_len: int, lengths: tuple[int, ...], capacity: int, num_new: int, seed=1):
    """q, new keys and values, caches that hold `lengths` of them and NaN behind, and caches with the new ones appended."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    q, caches = rng.standard_normal((batch, q_len, 4, 8)), rng.standard_normal((2, batch, capacity, 2, 8))
    new = rng.standard_normal((2, batch, num_new, 2, 8))
    appended = caches.copy()
    for row, length in enumerate(lengths):
        caches[:, row, length:] = appended[:, row, length:] = np.nan
        appended[:, row, length : length + num_new] = new[:, row]
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, new, caches)), appended.astype(np.float32)


def cache_oracle(q, caches, lengths, lists, causal: bool):
    """out and lse [batch, heads, q_len] of attention to the first `lengths` keys."""
    q_len, capacity = q.shape[1], caches.shape[2]
    masks = []
    for row, length in enumerate(lengths):
        mask = np.arange(capacity) < length
        if causal:
            mask = mask & (np.arange(capacity) <= np.arange(q_len)[:, None] + length - q_len)
        mask = np.broadcast_to(mask, (4, q_len, capacity))
        masks.append(mask if lists is None else mask & list_mask(lists[row], capacity, 2))
    out, lse = oracle.attention(np.stack(masks), q, *np.nan_to_num(caches))[:2]
    return out, np.where(np.isneginf(lse), np.inf, lse).swapaxes(1, 2)


def test_decoding_appends_and_attends():
    """One token, lists, sequences of different lengths."""
    lengths, capacity = (129, 63), 192
    (q, new, caches), appended = cache_case(1, lengths, capacity, num_new=1)
    lists = np.stack([random_lists(2, 1, 130, seed=seed) for seed in (1, 2)])
    lists[1, 0] = -1  # a query that sees nothing

    @compile_fast
    def decode(q, new, caches, lengths, lists):
        options = dict(cache_seqlens=lengths, return_softmax_lse=True, num_splits=2)
        return infllmv2_attn_with_kvcache(q, *caches, *new, **options, topk_idx=lists)

    out, lse, *updated = decode(q, new, caches, jnp.asarray(lengths, jnp.int32), jnp.asarray(lists))
    np.testing.assert_array_equal(updated, appended)
    wanted = cache_oracle(q, appended, [length + 1 for length in lengths], lists, causal=False)
    assert np.isposinf(wanted[1]).any()
    for found, array in zip((out, lse), wanted, strict=True):
        assert_close(found, array)


@pytest.mark.parametrize("causal", [True, False])
def test_several_queries_attend_to_pages_as_to_a_cache(causal):
    """Pages whose size is no multiple of a block; the second sequence is shorter than its queries."""
    lengths, num_new, page_size, pages_each = (96, 2), 3, 50, 2
    (q, new, caches), appended = cache_case(7, lengths, page_size * pages_each, num_new, seed=4)
    table = np.array([[3, 0], [4, -1]], np.int32)
    pages = np.full((2, 5, page_size, 2, 8), np.nan, np.float32)
    for sequence, n in np.ndindex(table.shape):
        if table[sequence, n] >= 0:
            pages[:, table[sequence, n]] = caches[:, sequence, n * page_size : (n + 1) * page_size]

    @compile_fast
    def run(q, pages, new, lengths, table):
        options = dict(cache_seqlens=lengths, block_table=table, causal=causal, return_softmax_lse=True)
        return infllmv2_attn_with_kvcache(q, *pages, *new, **options)

    found = run(q, jnp.asarray(pages), new, jnp.asarray(lengths, jnp.int32), jnp.asarray(table))
    wanted = cache_oracle(q, appended, [length + num_new for length in lengths], None, causal)
    assert np.isposinf(wanted[1]).any() == causal
    for x, array in zip(found, wanted, strict=False):
        assert_close(x, array)
    updated = np.stack(found[2:])
    for sequence, n in np.ndindex(table.shape):
        if table[sequence, n] >= 0:
            page = appended[:, sequence, n * page_size : (n + 1) * page_size]
            np.testing.assert_array_equal(updated[:, table[sequence, n]], page)
    assert np.isnan(updated[:, [1, 2]]).all()


def test_cache_rows_are_picked_and_lists_of_one_sequence_have_no_batch():
    """100 keys are no whole number of blocks, so that they are copied."""
    (q, _, caches), appended = cache_case(2, (100, 100, 100), 100, num_new=0)
    lists = random_lists(2, 2, 100)

    @compile_fast
    def run(q, caches, rows, lists):
        return infllmv2_attn_with_kvcache(q, *caches, cache_batch_idx=rows, cache_seqlens=65, causal=True, topk_idx=lists)

    found = run(q[:1], caches, jnp.asarray([2], jnp.int32), jnp.asarray(lists))
    assert_close(found, cache_oracle(q[:1], appended[:, 2:], [65], lists[None], causal=True)[0])


def test_entries_that_are_no_page_have_no_keys():
    """Nor has a length beyond the table: neither page 0 nor a neighbour's page is read in their place. Values are traced."""
    lowest = np.iinfo(np.int32).min
    table = np.array([[3, -1], [9, 2], [lowest, 1]], np.int32)
    lengths, q_len, page_size = (16, 14, 40), 2, 8
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, q_len, 4, 8)).astype(np.float32)
    pages = rng.standard_normal((2, 4, page_size, 2, 8)).astype(np.float32)
    pages[:, 0] = np.nan
    exists = (table >= 0) & (table < 4)
    caches = np.where(exists[:, :, None, None, None], pages[:, np.where(exists, table, 0)], 0).reshape(2, 3, 16, 2, 8)
    exists = exists.repeat(page_size, axis=1) & (np.arange(16) < np.array(lengths)[:, None])
    mask = np.broadcast_to(exists[:, None, None], (3, 4, q_len, 16))
    wanted = oracle.attention(mask, q, *caches)[0]

    @compile_fast
    def run(q, pages, table, lengths, bounds):
        cached = infllmv2_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table)
        packed = infllmv2_attn_varlen_func(q.reshape(-1, 4, 8), *pages, *bounds, q_len, 16, block_table=table)
        return cached, packed.reshape(cached.shape)

    bounds = cumulative((q_len,) * 3), cumulative(lengths)
    for found in run(q, pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32), bounds):
        assert_close(found, wanted)


def varlen_arguments():
    operands, lists, _ = attention_case(has_lists=True)
    names = dict(zip(("q", "k", "v"), operands, strict=True), topk_idx=lists)
    bounds = dict(cu_seqlens_q=cumulative(ATTEND_Q_LENS), cu_seqlens_k=cumulative(ATTEND_KV_LENS))
    return dict(**names, **bounds, max_seqlen_q=70, max_seqlen_k=150)


def stage1_arguments():
    inputs = stage1_inputs()
    return {name: x for name, x in inputs.items() if name != "keys"}


def paged_arguments():
    """16 pages of 16 keys, of which a sequence has at most 2."""
    operands, _, _ = attention_case(has_lists=False)
    pages = jnp.ones((16, 16, 2, 8))
    bounds = dict(cu_seqlens_q=cumulative((70, 0)), cu_seqlens_k=cumulative((32, 3)), max_seqlen_q=70, max_seqlen_k=40)
    return dict(q=operands[0][:70], k=pages, v=pages, **bounds, block_table=jnp.zeros((2, 2), jnp.int32))


def cache_arguments():
    (q, new, caches), _ = cache_case(1, (3, 3), 8, num_new=1)
    return dict(q=q, k_cache=caches[0], v_cache=caches[1], k=new[0], v=new[1], cache_seqlens=3)


def copied_cache_arguments():
    """Several queries that are not causal."""
    (q, _, caches), _ = cache_case(2, (3, 3), 8, num_new=0)
    return dict(q=q, k_cache=caches[0], v_cache=caches[1])


def pooling_arguments():
    return dict(input=jnp.ones((1, 2, 3)), cache_len=60, local_blocks=1, init_blocks=1)


REFUSED = [
    (infllmv2_attn_stage1, stage1_arguments, dict(dropout_p=0.1), "`dropout_p` is 0.1"),
    (infllmv2_attn_stage1, stage1_arguments, dict(window_size=(3, 0)), "`window_size` is"),
    (infllmv2_attn_stage1, stage1_arguments, dict(softcap=1.0), "`softcap` is 1.0"),
    (infllmv2_attn_stage1, stage1_arguments, dict(return_attn_probs=False), "`return_attn_probs` is False"),
    (infllmv2_attn_stage1, stage1_arguments, dict(max_seqlen_k=11), "`max_seqlen_k` is 11; it must be at least 12"),
    (infllmv2_attn_stage1, stage1_arguments, dict(kv_lens=jnp.zeros(3, jnp.int32)), r"`kv_lens` is int32\[3\]"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(dropout_p=0.5), "`dropout_p` is 0.5"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(alibi_slopes=jnp.ones(4)), "`alibi_slopes` is"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(deterministic=None), "`deterministic` is None"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(window_size=(-2, 0)), "`window_size` is"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(max_seqlen_q=69), "`max_seqlen_q` is 69; it must be at least 70"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(topk_idx=jnp.zeros((2, 3, 1), jnp.int32)), "`topk_idx` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(rotary_cos=jnp.ones((8, 4))), "`rotary_cos` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(cache_leftpad=jnp.ones(2)), "`cache_leftpad` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(num_splits=-1), "`num_splits` is -1"),
    (infllmv2_attn_with_kvcache, copied_cache_arguments, dict(num_splits=4), "`num_splits` is 4"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(topk_idx=jnp.zeros((2, 2, 1), jnp.int32)), "`topk_idx` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(cache_seqlens=None), "`cache_seqlens` is None"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(cache_seqlens=8), "`cache_seqlens` is 8; it must be at most 7"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(v=None), "`v` is None"),
    (infllmv2_attn_stage1, stage1_arguments, dict(q=jnp.ones((2, 3))), r"`q` is float32\[2, 3\]"),
    (infllmv2_attn_stage1, stage1_arguments, dict(v=jnp.ones((4, 1, 8))), r"`v` is float32\[4, 1, 8\]"),
    (infllmv2_attn_stage1, stage1_arguments, dict(cu_seqlens_v=cumulative((1,))), r"`cu_seqlens_v` is int32\[2\]"),
    (infllmv2_attn_stage1, stage1_arguments, dict(kv_lens=[1, 2]), r"`kv_lens` is \[1, 2\]"),
    (infllmv2_attn_stage1, stage1_arguments, dict(softmax_scale="1"), "`softmax_scale` is '1'"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(q=None), "`q` is None"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(k=jnp.ones((9, 2, 7))), r"`k` is float32\[9, 2, 7\]"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(v=jnp.ones((9, 2, 8))), r"`v` is float32\[9, 2, 8\]"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(causal=1), "`causal` is 1"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(softcap=-1.0), "`softcap` is -1.0"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(softmax_scale=True), "`softmax_scale` is True"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(cu_seqlens_q=[0, 3]), r"`cu_seqlens_q` is \[0, 3\]"),
    (infllmv2_attn_varlen_func, varlen_arguments, dict(cu_seqlens_k=cumulative((9,))), r"`cu_seqlens_k` is int32\[2\]"),
    (infllmv2_attn_varlen_func, paged_arguments, dict(block_table=jnp.ones((3, 2), jnp.int32)), r"`block_table` is int32\[3"),
    (infllmv2_attn_varlen_func, paged_arguments, dict(cu_seqlens_k=cumulative((33, 3))), "`cu_seqlens_k` .*no room for 33"),
    (infllmv2_attn_varlen_func, paged_arguments, dict(v=jnp.ones((16, 8, 2, 8))), r"`v` is float32\[16, 8, 2, 8\]"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(q=jnp.ones((2, 3, 8))), r"`q` has shape \(2, 3, 8\)"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(q=jnp.ones((2, 1, 3, 8))), r"`q` is .* multiple of 2 heads: `k_cache`"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(k_cache=jnp.ones((2, 8, 2, 7))), "`k_cache` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(v_cache=jnp.ones((2, 9, 2, 8))), "`v_cache` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(k=jnp.ones((2, 1, 1, 8))), "`k` is"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(v=jnp.ones((2, 2, 2, 8))), "`v` is .* 1 new tokens"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(cache_seqlens=2.5), "`cache_seqlens` is 2.5"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(block_table=jnp.ones((2, 1))), r"`block_table` is float32\[2, 1\]"),
    (infllmv2_attn_with_kvcache, cache_arguments, dict(cache_batch_idx=jnp.ones(3, jnp.int32)), "`cache_batch_idx` is"),
    (
        max_pooling_1d,
        lambda: dict(input=jnp.ones((1, 2, 3)), cache_len=60, local_blocks=1, init_blocks=1),
        dict(stride=24),
        "`block_size` is 64; it must be a multiple of `stride`, 24",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "change", "message"), REFUSED)
def test_what_cannot_be_honoured_is_refused(function, arguments, change, message):
    with pytest.raises(ValueError, match=message):
        call = arguments() | change
        jax.eval_shape(lambda: function(**call))
