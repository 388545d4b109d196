"""The gates of SeerAttention against their definitions, and their training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selector_checks import make_inputs

from sparse_attn_jax.selectors.seer_gate import (
    SeerGate,
    SeerGateDecode,
    SeerGateParameters,
    seer_gate_loss,
    seer_gate_target,
)
from sparse_attn_jax.testing.methods import pooled
from sparse_attn_jax.testing.methods import seer_gate as definition
from sparse_attn_jax.testing.methods.probe import absolute_positions


def make_gate(query_shape, key_shape) -> SeerGateParameters:
    rng = np.random.default_rng(5)
    draw = lambda shape: None if shape is None else jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)
    return SeerGateParameters(query=draw(query_shape), key=draw(key_shape))


def to_array(q_offset):
    return jnp.asarray(q_offset) if isinstance(q_offset, tuple) else q_offset


SMALL = SeerGate(block_size=8, threshold=0.05)
PREFILL = {
    "causal": (SMALL, True, None, (75, 75, 4, 2), (4, 16, 6), (2, 48, 6)),
    "not causal": (SMALL, False, None, (43, 75, 3, 1), (3, 16, 6), (1, 48, 6)),
    "key weights per query head, no query weights": (SMALL, True, 21, (43, 75, 4, 2), None, (4, 48, 16)),
    "no rope, top k": (
        dataclasses.replace(SMALL, rope_base=None, top_k=3), True, (-9, 60), (43, 75, 2, 1), (2, 16, 5), (1, 48, 5),
    ),
    "not forced": (
        dataclasses.replace(SMALL, force_diagonal=False, threshold=0.2, rope_base=100.0),
        True, None, (33, 33, 2, 2), (2, 16, 6), (2, 48, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILL)
def test_prefill_gate_is_its_definition(name):
    selector, is_causal, q_offset, sizes, query_shape, key_shape = PREFILL[name]
    query, key = make_inputs(*sizes, batch=2)
    gate = make_gate(query_shape, key_shape)
    positions = absolute_positions(q_offset, 2, *sizes[:2])
    options = dict(block_size=8, base=selector.rope_base, causal=is_causal)
    logits = definition.prefill_logits(query, key, gate.query, gate.key, positions, **options)
    call = dict(gate=gate, is_causal=is_causal, q_offset=to_array(q_offset))
    np.testing.assert_allclose(
        jax.jit(functools.partial(selector.logits, is_causal=is_causal))(query, key, gate=gate, q_offset=call["q_offset"]),
        logits,
        atol=1e-4,
    )
    visible, diagonal = pooled.visible_and_diagonal(positions, sizes[1], 8, 8)
    forced = diagonal & visible & (is_causal and selector.force_diagonal)
    wanted = definition.choose(logits, forced, threshold=selector.threshold, top_k=selector.top_k)
    np.testing.assert_array_equal(selector(query, key, **call).to_block_mask(sizes[1]), wanted)
    assert 0.1 < wanted[np.isfinite(logits)].mean() < 0.95, "the definition keeps all or nothing"


DECODE = {
    "causal": (SeerGateDecode(block_size=8, threshold=0.15), None, (43, 75, 4, 2), 6),
    "top k": (SeerGateDecode(block_size=8, top_k=3), (-9, 60), (43, 75, 3, 1), 6),
    "one query, no rope": (SeerGateDecode(block_size=8, threshold=0.05, rope_base=None), None, (1, 80, 4, 2), 5),
    "one block": (SeerGateDecode(block_size=8, top_k=1), None, (5, 5, 2, 2), 6),
}


@pytest.mark.parametrize("name", DECODE)
def test_decode_gate_is_its_definition(name):
    selector, q_offset, sizes, gate_dim = DECODE[name]
    query, key = make_inputs(*sizes, batch=2)
    group = sizes[2] // sizes[3]
    gate = make_gate((sizes[3], group, 16, gate_dim), (sizes[3], 48, gate_dim))
    positions = absolute_positions(q_offset, 2, *sizes[:2])
    logits = definition.decode_logits(query, key, gate.query, gate.key, positions, block_size=8, base=selector.rope_base)
    own = (positions // 8)[:, None, :, None] == np.arange(logits.shape[3])
    wanted = definition.choose(logits, own, threshold=selector.threshold, top_k=selector.top_k)
    selection = selector(query, key, gate=gate, is_causal=True, q_offset=to_array(q_offset))
    np.testing.assert_array_equal(selection.to_block_mask(sizes[1]), wanted)
    assert selection.q_block_size == 1
    assert selection.indices.shape[-1] == (selector.top_k or logits.shape[3])


def test_decode_gate_depends_on_nothing_after_the_query():
    selector = SeerGateDecode(block_size=8, top_k=3)
    gate = make_gate((2, 2, 16, 6), (2, 48, 6))
    select = lambda query, key, **options: np.asarray(selector(query, key, gate=gate, is_causal=True, **options).indices)
    query, key = make_inputs(60, 60)
    whole = select(query, key)
    for last in (7, 8, 37):
        later = jnp.arange(60)[:, None, None] > last
        changed = select(jnp.where(later, 1.0, query), jnp.where(later, jnp.nan, key))
        np.testing.assert_array_equal(changed[:, :, : last + 1], whole[:, :, : last + 1])
    # Step by step, in a cache that is not full.
    step = jax.jit(lambda query, key, q_offset: selector(query, key, gate=gate, is_causal=True, q_offset=q_offset).indices)
    for last in (7, 8, 15, 37, 59):
        found = step(query[:, last : last + 1], key.at[:, last + 1 :].set(jnp.nan), last)
        np.testing.assert_array_equal(found[:, :, 0], whole[:, :, last])


def target_definition(query, key, positions, block_size, q_block_size, group=None) -> np.ndarray:
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    logits = np.einsum("bihd,bjhd->bhij", query, key.repeat(query.shape[2] // key.shape[2], axis=2)) / 4
    p = definition.softmax(np.where(np.arange(key.shape[1]) <= positions[:, None, :, None], logits, -np.inf))
    p = np.stack([p[..., s].max(axis=-1) for s in definition.blocks_of(p.shape[3], block_size)], axis=-1)
    p = np.stack([p[:, :, s].max(axis=2) for s in definition.blocks_of(p.shape[2], q_block_size)], axis=2)
    if group is not None:
        p = p.reshape(p.shape[0], -1, group, *p.shape[2:]).max(axis=2)
    return p / p.sum(axis=-1, keepdims=True)


def test_target_is_its_definition():
    query, key = make_inputs(43, 75)
    positions = 32 + np.arange(43)[None]
    found = seer_gate_target(query, key, block_size=8, is_causal=True)
    np.testing.assert_allclose(found, target_definition(query, key, positions, 8, 8), atol=1e-5)
    found = seer_gate_target(query, key, block_size=8, q_block_size=1, group_reduction="max", is_causal=True)
    np.testing.assert_allclose(found, target_definition(query, key, positions, 8, 1, group=2), atol=1e-5)
    blind = seer_gate_target(query, key, block_size=8, is_causal=True, q_offset=-8)
    assert (np.asarray(blind[:, :, 0]) == 0).all() and np.isfinite(blind).all()


def test_loss_is_the_divergence_and_its_gradient_is_that_of_cross_entropy():
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((2, 2, 3, 4, 5)).astype(np.float32)
    logits[..., 0, 1:] = -np.inf
    logits[..., 1, :] = -np.inf  # sees nothing
    target = np.where(np.isfinite(logits), np.abs(target), 0)
    target[0, 0, 3, 2] = 0
    target /= np.maximum(target.sum(axis=-1, keepdims=True), 1e-30)
    probability = definition.softmax(logits.astype(np.float64))
    counted = target > 0
    terms = target[counted] * (np.log(target[counted]) - np.log(probability[counted]))
    loss, gradient = jax.value_and_grad(seer_gate_loss)(jnp.asarray(logits), jnp.asarray(target))
    np.testing.assert_allclose(loss, terms.sum() / 18, rtol=1e-5)
    np.testing.assert_allclose(gradient, (probability - target) / 18, atol=1e-6)


def test_a_gate_learns_its_target():
    query, key = make_inputs(40, 40, 2, 1, head_dim=8)
    gate = make_gate((2, 8, 4), (1, 24, 4))
    target = seer_gate_target(query, key, block_size=8, is_causal=True)

    @jax.jit
    def step(gate):
        loss = lambda gate: seer_gate_loss(SMALL.logits(query, key, gate=gate, is_causal=True), target)
        value, gradient = jax.value_and_grad(loss)(gate)
        return value, jax.tree.map(lambda x, d: x - 0.3 * d, gate, gradient)

    losses = []
    for _ in range(60):
        value, gate = step(gate)
        losses.append(float(value))
    assert losses[-1] < 0.4 * losses[0]


def test_lengths_of_zero():
    query, key = make_inputs(4, 16)
    gate, decode = make_gate((4, 16, 6), (2, 48, 6)), make_gate((2, 2, 16, 6), (2, 48, 6))
    assert SMALL(query[:, :0], key, gate=gate).indices.shape == (1, 1, 1, 2)
    assert SMALL(query, key[:, :0], gate=gate).indices.shape == (1, 1, 1, 0)
    decoder = SeerGateDecode(block_size=8, top_k=2)
    assert decoder(query[:, :0], key, gate=decode, is_causal=True).indices.shape == (1, 2, 0, 2)
    assert decoder(query, key[:, :0], gate=decode, is_causal=True).indices.shape == (1, 1, 1, 0)


QUERY, KEY = make_inputs(4, 16)
GATE = make_gate((4, 16, 6), (2, 48, 6))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SeerGate(block_size=0), "`block_size` is 0"),
        (lambda: SeerGate(threshold=2), "`threshold` is 2"),
        (lambda: SeerGate(top_k=0), "`top_k` is 0"),
        (lambda: SeerGate(force_diagonal=1), "`force_diagonal` is 1"),
        (lambda: SeerGate(rope_base=0.0), "`rope_base` is 0.0; it must be a positive number"),
        (lambda: SeerGate(rope_base="a"), "`rope_base` is 'a'"),
        (lambda: SeerGateDecode(block_size=0), "`block_size` is 0"),
        (lambda: SMALL(QUERY, KEY, gate=GATE, is_causal=1), "`is_causal` is 1"),
        (lambda: SMALL(QUERY, KEY[0], gate=GATE), "`key` has shape"),
        (lambda: SMALL(QUERY, KEY, gate=make_gate((4, 16, 6), (3, 48, 6))), r"`gate.key` has shape \(3, 48, 6\)"),
        (lambda: SMALL(QUERY, KEY, gate=make_gate((4, 16, 6), (2, 16, 6))), r"`gate.key` has shape \(2, 16, 6\).*\[2, 48,"),
        (lambda: SMALL(QUERY, KEY, gate=make_gate((2, 16, 6), (2, 48, 6))), r"`gate.query` has shape \(2, 16, 6\)"),
        (lambda: SMALL(QUERY, KEY, gate=make_gate(None, (2, 48, 6))), "`gate.query` is None"),
        (lambda: SMALL(QUERY, KEY, gate=make_gate((4, 16, 5), (2, 48, 5))), "`gate.key` has gate_dim 5; it must be even"),
        (lambda: SeerGateDecode()(QUERY, KEY, gate=GATE), "`is_causal` is False; SeerGateDecode"),
        (lambda: SeerGateDecode()(QUERY, KEY, gate=GATE, is_causal=True), r"`gate.query` has shape \(4, 16, 6\)"),
        (lambda: SeerGateDecode()(QUERY, KEY, gate=make_gate(None, (2, 48, 16)), is_causal=True), "`gate.query` is None"),
        (lambda: seer_gate_target(QUERY, KEY, block_size=0), "`block_size` is 0"),
        (lambda: seer_gate_loss(jnp.zeros((1, 2)), jnp.zeros((2, 1))), r"`logits` has shape \(1, 2\) and `target` \(2, 1\)"),
    ],
)  # fmt: skip
def test_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
