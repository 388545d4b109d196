"""Compares results with the oracle: special values first, then errors, bounded by those of a dense reference of that dtype."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_attn_jax.testing import oracle
from sparse_attn_jax.testing.inputs import Inputs

RESULT_NAMES = ("out", "lse", "d_query", "d_key", "d_value", "d_key_bias")

# How many times the dense reference's error is allowed, after FlashAttention's tests.
FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

# Errors below a floor pass whatever the reference's error is. The relative floors count from the size of the result. 16-bit: an
# eighth of the dtype's epsilon for the root mean square, where rounding the result alone gives up to 0.29 epsilon, and one
# epsilon for the worst element. float32 and float64: about ten epsilons and a hundred, because sums of products are taken in
# another order than the reference's. The absolute floors are for results that cancel to zero: inputs are N(0, 1).
RMS_FLOOR = {"float16": 1.2e-4, "bfloat16": 1e-3, "float32": 1e-6, "float64": 2e-15}
MAX_FLOOR = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float64": 2e-14}
ABSOLUTE_FLOOR = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 2e-15}

Results = dict[str, Any]  # by RESULT_NAMES
Attend = Callable[..., tuple[jax.Array, jax.Array]]  # (query, key, value, key_bias=None) -> (out, lse)


def forward_and_backward(attend: Attend) -> Callable[..., Results]:
    """(operands, d_out, d_lse) -> results: out, lse and the gradients of sum(out * d_out) + sum(lse * d_lse), jitted."""

    @jax.jit
    def run(operands, d_out, d_lse):
        (out, lse), pull_back = jax.vjp(lambda operands: attend(**operands), operands)
        (gradients,) = pull_back((d_out.astype(out.dtype), d_lse.astype(lse.dtype)))
        return dict(out=out, lse=lse) | {f"d_{name}": gradient for name, gradient in gradients.items()}

    return run


def results_of(attend: Attend, inputs: Inputs) -> Results:
    """Results of `attend` on these inputs."""
    return jax.device_get(forward_and_backward(attend)(inputs.operands, inputs.d_out, inputs.d_lse))


def mask_of(inputs: Inputs, **changes) -> np.ndarray:
    """The oracle's mask for these inputs: bool [batch, num_q_heads, q_len, kv_len]. `changes` replace its arguments."""
    batch, q_len, num_q_heads, _ = inputs.operands["query"].shape
    selection = inputs.selection
    arguments = dict(
        indices=np.asarray(selection.indices),
        batch=batch,
        num_q_heads=num_q_heads,
        q_len=q_len,
        kv_len=inputs.operands["key"].shape[1],
        q_block_size=selection.q_block_size,
        kv_block_size=selection.kv_block_size,
        predicate=selection.predicate,
    )
    arguments |= {name: value for name, value in inputs.options.items() if name not in ("scale", "logits_soft_cap")}
    return oracle.attention_mask(**(arguments | changes))


def score_options(inputs: Inputs) -> dict[str, float]:
    return {name: inputs.options[name] for name in ("scale", "logits_soft_cap") if name in inputs.options}


def oracle_results(inputs: Inputs, mask: np.ndarray) -> Results:
    """The definition's results for `mask`, float64."""
    found = oracle.attention(mask, **inputs.operands, d_out=inputs.d_out, d_lse=inputs.d_lse, **score_options(inputs))
    return dict(zip(RESULT_NAMES[: 2 + len(inputs.operands)], found, strict=False))


def reference_results(inputs: Inputs, mask: np.ndarray) -> Results:
    """Results of plain dense masked attention in the dtype of the inputs."""

    def attend(**operands):
        return dense_attention(jnp.asarray(mask), **operands, **score_options(inputs))

    return results_of(attend, inputs)


def dense_attention(mask, query, key, value, key_bias=None, *, scale=None, logits_soft_cap=None):
    """Dense masked attention as in `jax.nn`: products in the dtype of the inputs, softmax in float32 (float64 for float64)."""
    batch, q_len, num_q_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    statistics_dtype = jnp.promote_types(query.dtype, jnp.float32)
    grouped = query.reshape(batch, q_len, num_kv_heads, -1, head_dim)
    # HIGHEST: an accelerator may otherwise round float32 factors to 10 bits.
    product = dict(preferred_element_type=statistics_dtype, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.einsum("bihgd,bjhd->bhgij", grouped, key, **product) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if key_bias is not None:
        logits = logits + key_bias[:, :, None, None]
    visible = mask.reshape(batch, num_kv_heads, -1, q_len, mask.shape[-1]) & (logits > -jnp.inf)
    sees_any = visible.any(axis=-1, keepdims=True)
    # A query that sees nothing takes a softmax over everything, which is then replaced, so that no gradient is NaN.
    logits = jnp.where(visible | ~sees_any, jnp.where(jnp.isneginf(logits), 0, logits), -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = jnp.where(sees_any, jnp.exp(logits - lse), 0).astype(value.dtype)
    out = jnp.einsum("bhgij,bjhd->bihgd", weights, value, **product).astype(query.dtype)
    lse = jnp.where(sees_any, lse, -jnp.inf)[..., 0].reshape(batch, num_q_heads, q_len)
    return out.reshape(batch, q_len, num_q_heads, -1), lse.swapaxes(1, 2)


def effect_of_rounded_out(inputs: Inputs, mask: np.ndarray) -> Results:
    """How far gradients may be off if sum(out * d_out) is taken of `out` as it was rounded to the inputs' dtype.

    That sum stands where d_lse does, with the other sign: an error of it is a cotangent of lse. FlashAttention's backward keeps
    nothing but `out`, which shows where the weights are nearly all on one key, and gradients nearly cancel.
    """
    out = oracle_results(inputs, mask)["out"]
    # Of independent errors of at most half an epsilon each.
    rounding = jnp.finfo(inputs.dtype).eps / 2 * np.linalg.norm(out * np.asarray(inputs.d_out, np.float64), axis=-1)
    return oracle_results(dataclasses.replace(inputs, d_out=jnp.zeros_like(inputs.d_out), d_lse=rounding), mask)


def assert_results_match(
    actual: Results, inputs: Inputs, mask: np.ndarray | None = None, *, with_rounded_out: bool = False
) -> None:
    """Raises `AssertionError` unless `actual` is attention under `mask`, as exact as its dtype allows.

    Args:
      actual: results by name; those that are absent are not checked.
      inputs: what they were computed from.
      mask: bool [batch, num_q_heads, q_len, kv_len]. Default: that of `inputs`.
      with_rounded_out: allow gradients what `effect_of_rounded_out` says besides, for inputs of which nothing is known.
    """
    mask = mask_of(inputs) if mask is None else mask
    expected, reference = oracle_results(inputs, mask), reference_results(inputs, mask)
    more = effect_of_rounded_out(inputs, mask) if with_rounded_out else {}
    for name, values in actual.items():
        allowance = more.get(name, 0.0) if name.startswith("d_") else 0.0
        assert_close(name, values, expected[name], reference[name], dtype=inputs.dtype, allowance=allowance)


def assert_close(
    name: str, actual, expected: np.ndarray, reference, *, dtype: str, allowance: np.ndarray | float = 0.0
) -> None:
    """Raises `AssertionError` where `actual` is further from `expected` than the factors and floors above allow.

    Args:
      name: what is compared; gradients, named d_*, have the larger factor.
      actual: the values to check.
      expected: the oracle's values, float64.
      reference: a dense reference's values, computed in `dtype`.
      dtype: the dtype of query, key and value. lse is held to float32 even if that is of 16 bits.
      allowance: an array whose norm is allowed besides.
    """
    actual, reference = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert actual.shape == expected.shape, f"`{name}` has shape {actual.shape}, expected {expected.shape}."
    assert_same_special_values(name, actual, expected)
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.where(finite, actual, 0) - np.where(finite, expected, 0)
    reference_error = np.where(finite, reference, 0) - np.where(finite, expected, 0)
    size = np.where(finite, expected, 0)
    dtype = "float32" if name == "lse" and dtype in ("float16", "bfloat16") else dtype
    factor = GRADIENT_FACTOR if name.startswith("d_") else FORWARD_FACTOR
    for measure, norm, floor in (("RMS", root_mean_square, RMS_FLOOR), ("max", largest, MAX_FLOOR)):
        limit = max(factor * norm(reference_error), floor[dtype] * norm(size), ABSOLUTE_FLOOR[dtype]) + norm(allowance)
        if not norm(error) <= limit:
            worst = np.unravel_index(np.abs(error).argmax(), error.shape)
            raise AssertionError(
                f"`{name}` has {measure} error {norm(error):.3g}, allowed {limit:.3g} "
                f"(reference {norm(reference_error):.3g}, size {norm(size):.3g}); worst at {tuple(map(int, worst))}: "
                f"{actual[worst]:.8g}, expected {expected[worst]:.8g}."
            )


def assert_same_special_values(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Raises `AssertionError` unless NaN, inf and -inf are at the same positions."""

    def kinds(x):
        return np.select([np.isnan(x), np.isposinf(x), np.isneginf(x)], [1, 2, 3], 0)

    wrong = kinds(actual) != kinds(expected)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"`{name}` differs in special values at {int(wrong.sum())} positions, first at {where}: "
            f"{actual[where]}, expected {expected[where]}."
        )


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0))
