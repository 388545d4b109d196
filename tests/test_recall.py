"""The measurement of recall: the measures by their definitions, and that every selector has its place in docs/methods.md."""

import dataclasses
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparse_attn_jax as sa
from benchmarks import recall_docs
from benchmarks.recall_inputs import Pattern, Sizes, make_drift, make_field, make_needles, make_strides
from benchmarks.recall_measure import Counted, Recall, attend_densely, best_mass, keys_seen, measure
from benchmarks.recall_methods import METHODS, Method
from sparse_attn_jax import selectors

DOCS = Path(__file__).absolute().parent.parent / "docs" / "methods.md"
SIZES = Sizes(length=96, num_q_heads=2, num_kv_heads=1, head_dim=8)


def window(num_tokens: int) -> Method:
    return Method("window", dict(only=selectors.SlidingWindow(num_tokens, block_size=16)))


def pattern() -> Pattern:
    return make_drift(np.random.default_rng(0), SIZES)


def test_dense_attention_keeps_everything():
    made = pattern()
    attend, sizes = Method("dense", dict(only=selectors.Dense(16))).prepare(made, "only")
    found = measure(made, attend_densely(made), attend, *sizes)
    assert dataclasses.astuple(found) == pytest.approx((1, 1, 1, 0), abs=1e-5)


def test_a_window_keeps_the_mass_of_its_keys():
    made = pattern()
    dense = attend_densely(made)
    attend, sizes = window(20).prepare(made, "only")
    found = measure(made, dense, attend, *sizes)
    i, j = np.ogrid[:96, :96]
    seen = (j <= i) & (i - j < 20)
    assert found.mass == pytest.approx((dense.probabilities * seen).sum(-1).mean(), rel=1e-4)
    assert found.density == pytest.approx((seen.sum(1) / np.arange(1, 97)).mean(), rel=1e-4)
    weights = dense.probabilities * seen
    out = np.einsum("bhij,bjd->bihd", weights / weights.sum(-1, keepdims=True), made.value[:, :, 0])
    assert found.error == pytest.approx(np.linalg.norm(out - dense.out) / np.linalg.norm(dense.out), rel=1e-3)
    np.testing.assert_array_equal(keys_seen(made, attend), np.broadcast_to(seen, (2, 96, 96)))


def test_only_what_counts_is_measured():
    """Of two layers the last, whose queries are zeros, from query 60 on."""
    one, noise = pattern(), jnp.zeros_like(pattern().query)
    both = {name: jnp.concatenate([x, x]) for name, x in dict(key=one.key, value=one.value).items()}
    made = dataclasses.replace(one, query=jnp.concatenate([one.query, noise]), **both)
    attend, sizes = window(20).prepare(made, "only")
    found = measure(made, attend_densely(made), attend, *sizes, Counted(first_layer=1, first_query=60))
    share = (20 / np.arange(61, 97)).mean()
    assert (found.mass, found.density) == pytest.approx((share, share), rel=1e-4)
    assert found.best_mass == pytest.approx(share, rel=1e-4)
    value = np.asarray(one.value[0, :, 0])
    out, dense = (np.stack([value[max(0, i + 1 - size) : i + 1].mean(0) for i in range(60, 96)]) for size in (20, 96))
    assert found.error == pytest.approx(np.linalg.norm(out - dense) / np.linalg.norm(dense), rel=1e-3)


@pytest.mark.parametrize("name", ["snapkv_keep", "zipvl_keep"])
def test_what_follows_a_prompt_sees_what_a_policy_kept_of_it(name):
    """And itself, and the tokens between."""
    made = make_drift(np.random.default_rng(0), dataclasses.replace(SIZES, length=301, num_q_heads=4, num_kv_heads=2))
    (method,) = (method for method in METHODS if method.name == name)
    attend, _ = method.prepare(made, next(iter(method.budgets)))
    prompt = made.query[:, :151], made.key[:, :151]
    ids = sa.snapkv_keep(*prompt, capacity=64)
    if name == "zipvl_keep":
        ids = jnp.broadcast_to(sa.zipvl_keep(prompt[0][:, -64:], prompt[1], threshold=0.5)[0], (1, 2, 151))
    i, j = np.ogrid[151:301, :301]
    kept = np.stack([np.isin(np.arange(301), ids[0, head]) for head in (0, 0, 1, 1)])
    assert 10 < kept.sum(-1).min() and kept.sum(-1).max() < 140
    np.testing.assert_array_equal(keys_seen(made, attend)[:, 151:], kept[:, None] | ((j > 150) & (j <= i)))


def test_later_layers_read_the_pages_of_the_first():
    """Of the same query; the second layer alone counts."""
    made, other = (make_drift(np.random.default_rng(seed), dataclasses.replace(SIZES, length=300)) for seed in (0, 1))
    arrays = {name: jnp.concatenate([getattr(made, name), getattr(other, name)]) for name in ("query", "key", "value")}
    (method,) = (method for method in METHODS if method.name == "delta_pages")
    both = dataclasses.replace(made, **arrays)
    assert method.counted(both) == Counted(first_layer=1) and method.counted(made) == Counted()
    attend, sizes = method.prepare(both, next(iter(method.budgets)))
    assert sizes == (1, 16)
    seen = keys_seen(both, attend)[0]
    for i in (40, 200, 299):
        pages = sa.delta_pages(made.query[:, i : i + 1], made.key, num_pages=8, num_recent=2, q_offset=i)[0]
        np.testing.assert_array_equal(seen[i], np.isin(np.arange(300) // 16, pages) & (np.arange(300) <= i))


def test_best_blocks_are_those_of_the_most_mass_per_key():
    probabilities = np.random.default_rng(0).dirichlet(np.full(8, 0.3), (1, 1, 8))
    # Two queries a row and two keys a block, of which each row may read 4 keys per query: the two best blocks.
    counts = np.full((1, 1, 8), 4.0)
    blocks = probabilities.reshape(4, 2, 4, 2).sum((1, 3))
    expected = np.sort(blocks)[:, -2:].sum() / 8
    seen = np.ones((8, 8))
    assert best_mass(probabilities, counts, seen, 2, 2) == pytest.approx(expected)
    # Half a block more is half of its mass.
    expected += 0.5 * np.sort(blocks)[:, -3].sum() / 8
    assert best_mass(probabilities, counts + 1, seen, 2, 2) == pytest.approx(expected)


def test_best_blocks_of_a_causal_pattern_count_what_can_be_seen():
    probabilities = np.tril(np.ones((4, 4)))
    probabilities = (probabilities / probabilities.sum(1, keepdims=True))[None, None]
    counts = np.arange(1, 5.0)[None, None]
    seen = np.tril(np.ones((4, 4)))
    assert best_mass(probabilities, counts, seen, 1, 2) == pytest.approx(1)
    assert best_mass(probabilities, counts / 2, seen, 1, 2) == pytest.approx(0.5)


@pytest.mark.parametrize("make", [make_needles, make_strides, make_drift, make_field])
def test_patterns_have_structure(make):
    """A few blocks hold much more of the attention than as many would of noise."""
    made = make(np.random.default_rng(0), Sizes(length=512))
    dense = attend_densely(made)
    counts = np.full(made.query.shape[2:0:-1], 64.0)[None]
    seen = np.tril(np.ones(counts.shape[-1:] * 2)) if made.is_causal else np.ones(counts.shape[-1:] * 2)
    noise = dataclasses.replace(made, query=jax.random.normal(jax.random.key(0), made.query.shape))
    best = [best_mass(x.probabilities, counts, seen, 1, 16) for x in (dense, attend_densely(noise))]
    assert best[0] > 1.2 * best[1]
    assert jnp.isfinite(dense.out).all()


def test_permuted_selectors_are_measured_in_the_order_of_the_tokens():
    (method,) = (method for method in METHODS if method.name == "SlidingTile")
    made = make_field(np.random.default_rng(0), SIZES)
    attend, _ = method.prepare(made, next(iter(method.budgets)))
    row, column = np.divmod(np.arange(32 * 32), 32)
    # 3 tiles of 4 pixels in each dimension, shifted at the borders.
    tile = lambda x: np.clip(x // 4, 1, 6)
    near = [abs(tile(x)[:, None] - x // 4) <= 1 for x in (row, column)]
    np.testing.assert_array_equal(keys_seen(made, attend)[0], near[0] & near[1])


def test_tables_are_written_in_their_places():
    @dataclasses.dataclass(frozen=True)
    class Row:
        method: str
        budget: str
        pattern: str
        recall: Recall

    rows = [Row("A", "4 blocks", "drift", Recall(mass=0.5, best_mass=0.75, density=0.25, error=0.125))]
    text = "# X\n<!-- recall: A -->\nold\n<!-- end -->\n<!-- recall: B -->\nkept\n<!-- end -->\n"
    written = recall_docs.with_tables(text, rows, "methods")
    assert "old" not in written and "kept" in written and "![A](methods/A.png)" in written
    cells = [cell.strip() for cell in written.split("\n")[6].split("|")[1:-1]]
    assert cells == ["4 blocks", "drift", "25.0%", "50.0%", "75.0%", "0.125"]
    assert recall_docs.with_tables(written, rows, "methods") == written
    with pytest.raises(ValueError, match="no `<!-- recall: NAME -->` for A"):
        recall_docs.with_tables("", rows, "methods")


def test_every_selector_is_measured_and_described():
    names = {name for name in selectors.__all__ if hasattr(getattr(selectors, name), "causal_safe")}
    measured = {method.name for method in METHODS}
    assert names - measured <= {"Dense", "SeerGateDecode"}, "the baseline, and what is measured as SeerGate"
    text = DOCS.read_text()
    sections = {name: part for part, name in re.findall(r"(<!-- recall: (\w+) -->.*?<!-- end -->)", text, re.DOTALL)}
    assert set(sections) == measured
    for name, part in sections.items():
        assert f"(methods/{name}.png)" in part and part.count("\n|") > 3, f"{name} has no table"
        assert (DOCS.parent / "methods" / f"{name}.png").exists()


def test_every_name_is_in_the_document_and_every_name_there_exists():
    text = DOCS.read_text()
    missing = {name for name in (*selectors.__all__, *sa.compat.__all__) if not re.search(rf"\b{name}\b", text)}
    assert not missing
    named = set(re.findall(r"`sa\.([\w.]+)", text + (DOCS.parent.parent / "README.md").read_text()))
    assert len(named) > 20
    for name in named:
        operator.attrgetter(name)(sa)
