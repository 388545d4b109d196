"""The public functions: signatures, docstrings and the flow from arguments to an implementation."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_attn_jax import attention, dispatch, validation, varlen
from sparse_attn_jax.causal_safety import watch_training
from sparse_attn_jax.permutation import check_permuted_selection, find_permutation, permute_call
from sparse_attn_jax.planning import TilePlan, build_plan
from sparse_attn_jax.problem import MAX_LENGTH, Operands, Problem, TokenMask
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.window_predicate import fold_window

Window = tuple[int | jax.Array, int | jax.Array] | int


def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection | TilePlan,
    *,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    num_sinks: int | jax.Array = 0,
    q_offset: int | jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of each query over the visible keys of its selected blocks; forward and backward skip the rest.

    out[i] = sum_j softmax_j(scale * query[i] . key[j] + key_bias[j]) value[j], over the keys j that lie in a block selected for
    i's query block and that the token mask (causality, window, sinks, segments) lets i see.

    Causality is aligned **bottom-right**: unless `q_offset` says otherwise, the last query sees the last key, as decoding and
    chunked prefill need. `jax.nn.dot_product_attention` aligns top-left; the two agree when q_len == kv_len.

    Args:
      query: [batch, q_len, num_q_heads, head_dim], float16, bfloat16, float32 or float64.
      key: [batch, kv_len, num_kv_heads, head_dim], dtype of query. Query head h reads KV head
        h // (num_q_heads // num_kv_heads).
      value: [batch, kv_len, num_kv_heads, value_head_dim], dtype of query.
      selection: the blocks to attend, or a plan of them made by `plan_attention` for these sizes. If it has a
        `WindowPredicate` and neither a window nor sinks are given here, those are its own.
      is_causal: query i sees key j only if j <= i + q_offset. Default: False.
      local_window_size: (left, right): query i sees key j only if i - left <= j - q_offset <= i + right. Each an int of at
        least 0, an int32 array [num_q_heads], or None for no bound; a single int is both. Default: no window.
      num_sinks: the first keys, visible whatever the window says (causality and segments still hold). An int or int32
        [num_q_heads]. Default: 0.
      q_offset: position of query 0 among the keys: an int, or an integer array [] or [batch]. Default: kv_len - q_len.
      query_segment_ids: integers [batch, q_len]; a query sees only keys of its own segment. Default: one segment.
      key_value_segment_ids: integers [batch, kv_len], given together with the queries'.
      key_bias: [batch, num_kv_heads, kv_len], floating point, added to the logits after scale and soft cap.
      scale: multiplies query . key. Default: head_dim ** -0.5.
      logits_soft_cap: c > 0 replaces a scaled logit s by c * tanh(s / c). Default: no cap.
      return_residual: also return lse.
      implementation: "xla", "mosaic" or "cuda", or a sequence of them to try in order. Default: the first that can run this
        call; `explain` tells which and why.

    Returns:
      out [batch, q_len, num_q_heads, value_head_dim], dtype of query; with `return_residual`, (out, lse) where lse
      [batch, q_len, num_q_heads] is the natural log of the sum of exponentials, float32 (float64 for float64 inputs).
      A query that sees nothing has out 0 and lse -inf.

    Raises:
      ValueError: an argument that no implementation could accept; the message names it, what was found and what is needed.
      NotImplementedError: none of the implementations asked for can run this call; the message lists every reason.

    Differentiable in query, key, value and key_bias, also through lse; never in the selection. Softmax statistics are float32.
    Deterministic. The per-token form follows InfLLM-v2 (infllmv2_cuda_impl), the tile form MIT's Block-Sparse-Attention.
    """
    options = dict(locals())
    for name in ("query", "key", "value", "selection", "return_residual", "implementation"):
        options.pop(name)
    problem = validation.make_problem(query, key, value, selection, **options)
    name = dispatch.choose(problem, implementation)
    if 0 in (problem.batch, problem.q_len, problem.kv_len):
        out, lse = _empty(problem)
    else:
        plan = selection if isinstance(selection, TilePlan) else dispatch.get(name).build_plan(problem, selection)
        mask = _token_mask(
            problem, local_window_size, num_sinks, q_offset, query_segment_ids, key_value_segment_ids, plan.predicate
        )
        out, lse = attention.attend(name, problem, Operands(query, key, value, key_bias), plan, mask)
    return (out, lse) if return_residual else out


def block_sparse_attention_varlen(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection,
    cu_seqlens_q: jax.Array,
    cu_seqlens_kv: jax.Array,
    *,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    num_sinks: int | jax.Array = 0,
    q_offset: int | jax.Array | None = None,
    key_bias: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`block_sparse_attention` over packed sequences; each attends only within itself.

    Args:
      query: [q_tokens, num_q_heads, head_dim].
      key: [kv_tokens, num_kv_heads, head_dim].
      value: [kv_tokens, num_kv_heads, value_head_dim].
      selection: ids local to each sequence. Either the rows of all sequences one after another, [1, heads, rows, num_slots]
        with ceil(length / q_block_size) rows per sequence (rows past the last are ignored, missing rows select nothing), or
        one batch row per sequence, [num_sequences, heads, ceil(max_q_len / q_block_size), num_slots].
      cu_seqlens_q: int32 [num_sequences + 1], where each sequence's queries start, and the end. Tokens outside are in no
        sequence: out 0, lse -inf. Values are not checked: one outside [0, q_tokens] is clipped, and one below its predecessor
        is raised to it (an empty sequence); nothing is ever read out of bounds.
      cu_seqlens_kv: int32 [num_sequences + 1], the same for keys.
      is_causal, local_window_size, num_sinks: as in `block_sparse_attention`, counted within each sequence.
      q_offset: position of each sequence's query 0 among its keys: an int or an integer array [] or [num_sequences]. Default:
        each sequence's number of keys minus its number of queries.
      key_bias: [num_kv_heads, kv_tokens].
      scale, logits_soft_cap, return_residual, implementation: as in `block_sparse_attention`.

    Returns:
      out [q_tokens, num_q_heads, value_head_dim]; with `return_residual`, (out, lse) with lse [q_tokens, num_q_heads].

    Raises:
      ValueError: an argument that no implementation could accept.
      NotImplementedError: none of the implementations asked for can run this call.
    """
    validation.check_varlen(query, key, value, selection, cu_seqlens_q, cu_seqlens_kv, q_offset, key_bias)
    num_sequences = cu_seqlens_q.shape[0] - 1
    rows = varlen.num_rows(selection, query.shape[0], num_sequences)
    q_packing = varlen.make_packing(cu_seqlens_q, query.shape[0], selection.q_block_size, rows)
    kv_packing = varlen.make_packing(cu_seqlens_kv, key.shape[0], selection.kv_block_size)
    q_row = varlen.to_row(q_packing, query)[None]
    key_row, value_row = (varlen.to_row(kv_packing, x)[None] for x in (key, value))
    bias_row = None if key_bias is None else varlen.to_row(kv_packing, key_bias.T).T[None]
    row_selection = varlen.pack_selection(selection, q_packing, kv_packing)

    options = dict(is_causal=is_causal, local_window_size=local_window_size, num_sinks=num_sinks, scale=scale)
    options |= dict(logits_soft_cap=logits_soft_cap, key_bias=bias_row, q_offset=None)
    segments = dict(query_segment_ids=q_packing.sequence[None], key_value_segment_ids=kv_packing.sequence[None])
    problem = validation.make_problem(q_row, key_row, value_row, row_selection, **options, **segments, varlen=True)
    name = dispatch.choose(problem, implementation)
    if 0 in (problem.q_len, problem.kv_len):
        out, lse = _empty(problem)
    else:
        mask = _varlen_mask(problem, q_packing, kv_packing, q_offset, local_window_size, num_sinks, selection.predicate)
        operands = Operands(q_row, key_row, value_row, bias_row)
        plan = dispatch.get(name).build_plan(problem, row_selection)
        out, lse = attention.attend(name, problem, operands, plan, mask)
    out, lse = varlen.from_row(q_packing, out[0], 0), varlen.from_row(q_packing, lse[0], -jnp.inf)
    return (out, lse) if return_residual else out


def sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selector: Callable[..., BlockSelection],
    *,
    is_causal: bool = False,
    q_offset: int | jax.Array | None = None,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Selects blocks with `selector`, then attends to them: `block_sparse_attention` of `selector(query, key, ...)`.

    A selector may ask for the tokens in another order, by a method `permutation(query, key)` that gives a `TokenPermutation`
    or `None`. Then query, key, value, segment ids and key bias are permuted, the selector is called on the permuted query and
    key as `selector(query, key, is_causal=, permutation=)`, and the result is put back in order. The op knows only permuted
    positions, so its own causality is off: the selection's predicate has to keep causality by original positions, if
    `is_causal`, and has to hide padding, if there is any. `TokenPermutation.predicate` does both.

    Args:
      query: [batch, q_len, num_q_heads, head_dim].
      key: [batch, kv_len, num_kv_heads, head_dim].
      value: [batch, kv_len, num_kv_heads, value_head_dim].
      selector: called as `selector(query, key, is_causal=, q_offset=)`, gives a `BlockSelection`; see `selectors`. One whose
        `causal_safe` is False warns once if causal attention with it is differentiated.
      is_causal: given to selector and op alike. Default: False.
      q_offset: given to selector and op alike. Default: kv_len - q_len.
      **options: the other keyword arguments of `block_sparse_attention`. With permuted tokens there is no window, no sinks
        and no offset, and no segment ids if each head has an order of its own.

    Returns:
      As `block_sparse_attention`.

    Raises:
      ValueError: an argument that no implementation could accept.
      NotImplementedError: none of the implementations asked for can run this call.
    """
    validation.check_qkv(query, key, value)
    permutation = find_permutation(selector, query, key)
    if permutation is None:
        selection = selector(query, key, is_causal=is_causal, q_offset=q_offset)
        query = watch_training(query, selector, is_causal)
        return block_sparse_attention(query, key, value, selection, is_causal=is_causal, q_offset=q_offset, **options)
    query, key, value, options = permute_call(permutation, query, key, value, q_offset, options)
    selection = selector(query, key, is_causal=is_causal, permutation=permutation)
    check_permuted_selection(permutation, selection, is_causal)
    query = watch_training(query, selector, is_causal)
    result = block_sparse_attention(query, key, value, selection, **options)
    return jax.tree.map(permutation.undo, result)


def plan_attention(
    selection: BlockSelection,
    *,
    q_len: int,
    kv_len: int,
    num_q_heads: int,
    num_kv_heads: int,
    tile_size: int | None = None,
    with_inverse: bool = True,
) -> TilePlan:
    """Builds what a kernel walks from a selection, so that layers that share the selection build it once.

    `block_sparse_attention` accepts the plan in place of the selection, with any token mask.

    Args:
      selection: the blocks to attend.
      q_len: number of queries.
      kv_len: number of keys.
      num_q_heads: number of query heads.
      num_kv_heads: number of KV heads; divides num_q_heads.
      tile_size: query tokens per tile. Default: about 32 rows (tokens x group_size) if tokens have lists of their own, up to
        64 tokens if they share one.
      with_inverse: also build each KV block's list of tiles, which key-major kernels walk. Default: True.

    Returns:
      A `TilePlan`. O(q_len * num_slots) memory, O(q_len * num_slots * log(num_slots)) work.

    Raises:
      ValueError: sizes that do not fit the selection, or are too large for int32 arithmetic.
    """
    for name, x in (("q_len", q_len), ("kv_len", kv_len), ("num_q_heads", num_q_heads), ("num_kv_heads", num_kv_heads)):
        validation.require(isinstance(x, int) and x >= 1, name, x, "an int of at least 1")
    validation.require(isinstance(selection, BlockSelection), "selection", selection, "a BlockSelection")
    needed = f"a divisor of num_q_heads, {num_q_heads}"
    validation.require(num_q_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, needed)
    heads = dict(num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    validation.check_selection(selection, batch=selection.indices.shape[0], q_len=q_len, **heads)
    validation.check_plan_sizes(selection, q_len, kv_len, num_q_heads // num_kv_heads, tile_size)
    sizes = dict(q_len=q_len, kv_len=kv_len, **heads)
    return build_plan(selection, **sizes, tile_size=tile_size, with_inverse=with_inverse)


def merge_attention(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each.

    Args:
      outs: arrays [..., value_head_dim] of one shape, the outputs over each set.
      lses: arrays [...], the natural-log lse of each; -inf where a query saw nothing.

    Returns:
      (out, lse) over all sets, in the dtypes of the first of each. Differentiable in both.

    Raises:
      ValueError: no arrays, or shapes that do not agree.
    """
    outs, lses = list(outs), list(lses)
    validation.require(len(outs) > 0, "outs", outs, "at least one array")
    validation.require(len(lses) == len(outs), "lses", len(lses), f"as many arrays as `outs`, {len(outs)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        validation.require(out.shape == outs[0].shape, f"outs[{i}]", out, f"of shape {list(outs[0].shape)}, as outs[0]")
        validation.require(lse.shape == out.shape[:-1], f"lses[{i}]", lse, f"of shape {list(out.shape[:-1])}")
    return attention.merge(outs, lses)


def explain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    selection: BlockSelection | TilePlan,
    *,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    num_sinks: int | jax.Array = 0,
    q_offset: int | jax.Array | None = None,
    query_segment_ids: jax.Array | None = None,
    key_value_segment_ids: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> dispatch.Explanation:
    """Which implementation `block_sparse_attention` would run for the same arguments, and every reason against the others.

    Args:
      query, key, value, selection, is_causal, local_window_size, num_sinks, q_offset, query_segment_ids, key_value_segment_ids,
        key_bias, scale, logits_soft_cap, return_residual, implementation: as in `block_sparse_attention`. Nothing is computed;
        `jax.ShapeDtypeStruct`s will do for arrays.

    Returns:
      An `Explanation`: `implementation`, the name or `None`; `reasons`, by name; `problem`, what was asked. `print` it.

    Raises:
      ValueError: an argument that no implementation could accept.
    """
    options = dict(locals())
    for name in ("query", "key", "value", "selection", "return_residual", "implementation"):
        options.pop(name)
    return dispatch.explain(validation.make_problem(query, key, value, selection, **options), implementation)


def _empty(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """No queries or no keys: every query sees nothing."""
    rows = (problem.batch, problem.q_len, problem.num_q_heads)
    lse_dtype = jnp.float64 if problem.dtype == "float64" else jnp.float32
    return jnp.zeros((*rows, problem.value_head_dim), problem.dtype), jnp.full(rows, -jnp.inf, lse_dtype)


def _per_head(problem: Problem, x: int | jax.Array | None) -> jax.Array | None:
    return None if x is None else jnp.broadcast_to(_bounded(x, MAX_LENGTH), (problem.num_q_heads,))


def _bounded(x: int | jax.Array, limit: int) -> jax.Array:
    """x as int32 within [-limit, limit], so that a position plus an extreme value of the caller's cannot wrap around."""
    return jnp.clip(jnp.asarray(x), -limit, limit).astype(jnp.int32)


def _window_options(
    problem: Problem, local_window_size: Window | None, num_sinks: int | jax.Array, predicate: Any
) -> dict[str, Any]:
    """The window, the sinks and the predicate of a `TokenMask`."""
    local_window_size, num_sinks, predicate = fold_window(predicate, local_window_size, num_sinks)
    if local_window_size is None:
        return dict(predicate=predicate)  # sinks are exceptions to a window
    left, right = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    sinks = _per_head(problem, num_sinks) if problem.has_sinks else None
    sides = dict(window_left=_per_head(problem, left), window_right=_per_head(problem, right))
    return dict(**sides, num_sinks=sinks, predicate=predicate)


def _token_mask(
    problem, local_window_size, num_sinks, q_offset, query_segment_ids, key_value_segment_ids, predicate
) -> TokenMask:
    offset = problem.kv_len - problem.q_len if q_offset is None else q_offset
    offset = _bounded(offset, MAX_LENGTH).reshape(-1, 1)  # [batch or 1, 1]
    return TokenMask(
        q_positions=_bounded(jnp.arange(problem.q_len, dtype=jnp.int32) + offset, MAX_LENGTH - 1),
        kv_positions=jnp.arange(problem.kv_len, dtype=jnp.int32)[None],
        q_segments=None if query_segment_ids is None else jnp.asarray(query_segment_ids, jnp.int32),
        kv_segments=None if key_value_segment_ids is None else jnp.asarray(key_value_segment_ids, jnp.int32),
        **_window_options(problem, local_window_size, num_sinks, predicate),
    )


def _varlen_mask(problem, q_packing, kv_packing, q_offset, local_window_size, num_sinks, predicate) -> TokenMask:
    offset = kv_packing.lengths - q_packing.lengths if q_offset is None else q_offset
    offset = jnp.broadcast_to(_bounded(offset, MAX_LENGTH), kv_packing.lengths.shape)
    q_positions = q_packing.position + offset[jnp.maximum(q_packing.sequence, 0)]
    return TokenMask(
        q_positions=_bounded(q_positions, MAX_LENGTH - 1)[None],
        kv_positions=kv_packing.position[None],
        q_segments=q_packing.sequence[None],
        # Never the -1 of a query position that holds no token.
        kv_segments=jnp.where(kv_packing.sequence < 0, -2, kv_packing.sequence)[None],
        **_window_options(problem, local_window_size, num_sinks, predicate),
    )
