"""DuoAttention: the gate between two outputs, and what trained gates decide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from static_patterns import select

from sparse_attn_jax.duo import duo_gate_combine, duo_threshold
from sparse_attn_jax.selectors.head_mix import HeadMix

GATE = jnp.array([0.25, 1.0])


def make_outs(dtype=jnp.float32):
    return (jnp.asarray(x, dtype) for x in np.random.default_rng(0).standard_normal((2, 2, 5, 6, 4)))


def test_combination_is_the_definition():
    full, streaming = make_outs()
    found = duo_gate_combine(full, streaming, GATE)
    for head in range(6):
        gate = float(GATE[head // 3])
        expected = gate * np.asarray(full[:, :, head]) + (1 - gate) * np.asarray(streaming[:, :, head])
        np.testing.assert_allclose(found[:, :, head], expected, atol=1e-6)


def test_combination_keeps_the_dtype_of_the_outputs():
    assert duo_gate_combine(*make_outs(jnp.bfloat16), GATE).dtype == jnp.bfloat16


def test_gradient_of_a_gate_is_whole_also_at_one():
    full, streaming = make_outs()
    gradients = jax.grad(lambda *x: duo_gate_combine(*x).sum(), argnums=(0, 1, 2))(full, streaming, GATE)
    np.testing.assert_allclose(gradients[0][0, 0, :, 0], [0.25] * 3 + [1] * 3)
    np.testing.assert_allclose(gradients[1][0, 0, :, 0], [0.75] * 3 + [0] * 3)
    expected = np.asarray(full - streaming).reshape(2, 5, 2, 3, 4).sum((0, 1, 3, 4))
    np.testing.assert_allclose(gradients[2], expected, rtol=1e-5)


def test_threshold_is_met_by_gates_that_equal_it():
    gate = np.array([0.5, 0.4999, 1.0, 0.0])
    assert duo_threshold(gate, 1) == (0, -1, 0, -1)
    assert duo_threshold(gate, 2, threshold=0.6) == (-1, -1, -1, -1, 0, 0, -1, -1)


@pytest.mark.parametrize("sparsity, num_streaming", [(0, 0), (0.1, 1), (0.25, 2), (0.5, 4), (0.75, 6), (0.99, 7), (1, 8)])
def test_sparsity_counts_heads(sparsity, num_streaming):
    """As the quantile of the original does, where no gates are equal."""
    gate = np.random.default_rng(0).permutation(8) / 8
    found = duo_threshold(jnp.asarray(gate), 1, sparsity=sparsity)
    limit = 2 if sparsity == 1 else np.quantile(gate, sparsity)
    assert found == tuple(np.where(gate >= limit, 0, -1).tolist())
    assert found.count(-1) == num_streaming


def test_equal_gates_stream_from_the_first_on():
    assert duo_threshold(np.ones(4), 1, sparsity=0.5) == (-1, -1, 0, 0)


def test_layers_are_ranked_together():
    gate = np.array([[0.1, 0.2], [0.9, 0.8]])
    assert duo_threshold(gate, 2, sparsity=0.5) == ((-1,) * 4, (0,) * 4)


def test_head_mix_takes_what_gates_decide():
    _, mask = select(HeadMix(duo_threshold(jnp.array([1.0, 0.0]), 2), 2, 6, "token", 8), 24, 24)
    _, streaming = select(HeadMix((-1,) * 4, 2, 6, "token", 8), 24, 24)
    np.testing.assert_array_equal(mask[:, :2], np.tri(24, dtype=bool)[None, None].repeat(2, axis=1))
    np.testing.assert_array_equal(mask[:, 2:], streaming[:, 2:])
    assert (mask != streaming).any()


OUT = jnp.zeros((1, 2, 4, 8))
BAD = {
    "full": ("`out_full`", lambda: duo_gate_combine(OUT[0], OUT, GATE)),
    "streaming": (r"`out_streaming` is float32\[1, 2, 4, 7\]", lambda: duo_gate_combine(OUT, OUT[..., 1:], GATE)),
    "dtype": ("`out_streaming` is float16", lambda: duo_gate_combine(OUT, OUT.astype(jnp.float16), GATE)),
    "gate-dtype": ("`gate` is int32", lambda: duo_gate_combine(OUT, OUT, GATE.astype(jnp.int32))),
    "gate-heads": (r"`gate` is float32\[3\]; .* 4", lambda: duo_gate_combine(OUT, OUT, jnp.ones(3))),
    "traced": ("`gate` is float32", lambda: jax.jit(lambda gate: duo_threshold(gate, 1))(GATE)),
    "rank": ("`gate` is float32", lambda: duo_threshold(OUT, 1)),
    "group": ("`group_size` is 0", lambda: duo_threshold(GATE, 0)),
    "threshold": ("`threshold` is None", lambda: duo_threshold(GATE, 1, threshold=None)),
    "sparsity": ("`sparsity` is 1.5", lambda: duo_threshold(GATE, 1, sparsity=1.5)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    message, call = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
