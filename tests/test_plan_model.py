"""The model of plans counts what the simulator does."""

import jax
import numpy as np
import pytest

from benchmarks import plan_model as model
from benchmarks.devices import H100
from sparse_attn_jax.implementations.cuda.planning import build_plan
from sparse_attn_jax.testing.cases import Case
from sparse_attn_jax.testing.inputs import make_selection

pytestmark = pytest.mark.kernels

SIZES = dict(special="", num_kv_heads=2, selection_heads=2, head_dim=64)
# Cases, and tokens per tile.
CASES = [
    (Case(name="lists of tokens", q_len=50, kv_len=200, batch=2, num_slots=3, q_block_size=1, **SIZES), 4),
    (Case(name="more than a word of lists", q_len=100, kv_len=150, num_slots=5, q_block_size=1, **SIZES), 40),
    (Case(name="tiles share a list", q_len=70, kv_len=200, num_slots=3, q_block_size=32, **SIZES), 16),
    (Case(name="many parts", q_len=400, kv_len=3000, num_slots=40, q_block_size=2, **SIZES), 4),
]


@pytest.mark.parametrize("case, tokens", CASES, ids=lambda x: getattr(x, "name", ""))
def test_traffic_is_the_simulators(case, tokens, counters_of):
    selection = make_selection(case)
    sizes = dict(q_len=case.q_len, kv_len=case.kv_len, num_q_heads=case.num_q_heads, num_kv_heads=case.num_kv_heads)
    made = []
    launches = counters_of(lambda: made.append(jax.block_until_ready(build_plan(selection, **sizes, tile_size=tokens))))
    # Entries differ from head to head; everything else is as often there as there are heads.
    entries = int(np.sum(made[0].counts))
    pairs = made[0].counts.shape[0] * made[0].counts.shape[1]
    one, more = (model.traffic_of(model.Plan(case, tokens, n, 1)) for n in (0, 1))
    for (kernel, traffic), launch in zip(one.items(), launches, strict=True):
        per_entry = more[kernel].loaded - traffic.loaded, more[kernel].stored - traffic.stored
        expected = traffic.loaded * pairs + per_entry[0] * entries, traffic.stored * pairs + per_entry[1] * entries
        assert (launch["global_loaded"], launch["global_stored"]) == expected, kernel


def test_seconds_by_hand():
    """A list of 64 for each of 4,096 tokens, in tiles of 4 that name 100 blocks: read twice, and written in 256 slots."""
    case = Case(name="by hand", q_len=4096, kv_len=65536, num_slots=64, q_block_size=1, kv_block_size=64, **SIZES)
    plan = model.Plan(case, 4, 1024 * 100, 2)
    counters = 32 * 1024
    words = 2 * 4096 * 64 + 1024 * (256 + 256 + 1)  # unions
    words += 1024 * 256 + 2 * 1024 * 100 + counters + 2 * counters + 1024 + 2 * 1024 + 1  # sums
    words += 1024 * 256 + 2 * 1024 * 100 + 32 * 128 + 3 * 1024 * 100 + 2 * 1024 * 156  # entries
    assert model.seconds_of(plan, H100) == pytest.approx(2 * 4 * words * (1 / 9.7e12 + 1 / 3.35e12))
