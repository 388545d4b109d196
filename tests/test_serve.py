"""examples/serve.py: what is served from pages is what the model writes, whoever else is in the batch."""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_examples import assert_drawn, numbers, run

pytest.importorskip("optax")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import lm_serving  # noqa: E402
from lm_generate import generate  # noqa: E402
from lm_model import LanguageModel, ModelConfig  # noqa: E402
from lm_paged import PagedModel  # noqa: E402
from lm_serving import Request, Server  # noqa: E402

from sparse_attn_jax.selectors.quest import Quest  # noqa: E402

CONFIG = ModelConfig(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=32, block_size=8)
MAX_LENGTH, PAGE = 96, 4
REQUESTS = [
    Request(bytes(np.random.default_rng(i).integers(0, 256, length, np.uint8)), count)
    for i, (length, count) in enumerate([(70, 20), (3, 30), (40, 1), (21, 9), (64, 32), (1, 12), (33, 25)])
]


@functools.cache
def params():
    """Random, and large: every byte depends on many others."""
    model = LanguageModel(CONFIG, CONFIG.selector("dense"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes)


@functools.cache
def serve(top_k=None, follow=False, is_reversed=False):
    lm_serving.PROMPT_STEP = MAX_LENGTH
    quest = None if top_k is None else Quest(top_k=top_k, block_size=PAGE)
    # The first two requests leave no room for the third.
    sizes = dict(num_slots=3, num_pages=36, page_size=PAGE, max_length=MAX_LENGTH)
    follow = serve().outputs if follow else None
    requests = REQUESTS[::-1] if is_reversed else REQUESTS
    return Server(PagedModel(CONFIG, quest, **sizes), params(), requests, follow=follow).run()


def test_served_text_is_what_the_model_generates():
    model, request = LanguageModel(CONFIG, CONFIG.selector("dense")), REQUESTS[3]
    wanted = generate(model, params(), request.prompt, num_bytes=request.num_bytes, max_length=MAX_LENGTH)
    assert bytes(serve().outputs[3]) == wanted and len(set(wanted)) > 3


def test_company_in_the_batch_changes_nothing():
    """The other way round, everyone has other neighbours, slots and pages."""
    forwards, backwards = serve(), serve(is_reversed=True)
    assert backwards.outputs[::-1] == forwards.outputs
    places = [{stay.request: (stay.slot, *stay.pages) for stay in server.stays} for server in (forwards, backwards)]
    assert sum(places[0][i] != places[1][len(REQUESTS) - 1 - i] for i in range(len(REQUESTS))) > len(REQUESTS) / 2


def test_requests_join_and_leave():
    stays = serve().stays
    assert serve().peak_pages <= 36
    joined = sorted(stay.first_step for stay in stays)
    assert joined[1] == 0 < joined[2]  # the third waits for pages
    assert sorted(stay.request for stay in stays) == list(range(len(REQUESTS)))
    for stay in stays:
        assert stay.last_step - stay.first_step == REQUESTS[stay.request].num_bytes - 1
        assert len(stay.pages) == math.ceil(REQUESTS[stay.request].length / PAGE)
        for other in stays:
            overlap = stay.first_step < other.last_step and other.first_step < stay.last_step
            if other is not stay and overlap:
                assert stay.slot != other.slot and not set(stay.pages) & set(other.pages)


def test_quest_of_every_block_is_dense():
    served = serve(top_k=MAX_LENGTH // PAGE)
    assert served.outputs == serve().outputs
    assert served.fraction_read > 1  # the metadata is read besides


def test_quest_reads_less_and_differs():
    served = serve(top_k=3)
    assert served.outputs != serve().outputs
    # Of a sequence at each of its steps.
    lengths = np.concatenate([np.arange(len(request.prompt) + 1, request.length) for request in REQUESTS])
    assert served.keys_held == lengths.sum()
    # All but one of the blocks are complete, and the newest has what is left; shorter sequences have no more than that.
    newest = (lengths - 1) % PAGE + 1
    wanted = np.minimum(lengths, 2 * PAGE + newest) + lengths // PAGE
    np.testing.assert_allclose(served.keys_read, wanted.sum())


def test_following_is_free_running_up_to_the_first_difference():
    followed, free, dense = (server.outputs for server in (serve(top_k=3, follow=True), serve(top_k=3), serve()))
    assert followed != free
    for a, b, c in zip(followed, free, dense):
        first = next((i for i, (x, y) in enumerate(zip(a, c)) if x != y), len(a) - 1)
        assert a[: first + 1] == b[: first + 1]


BAD_REQUESTS = {"empty": Request(b"", 3), "nothing to do": Request(b"a", 0), "too long": Request(b"a" * 90, 7)}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused(name):
    model = PagedModel(CONFIG, None, num_slots=1, num_pages=24, page_size=PAGE, max_length=MAX_LENGTH)
    with pytest.raises(ValueError, match="at most 96 bytes"):
        Server(model, None, [BAD_REQUESTS[name]])
    with pytest.raises(ValueError, match="does not fit into 2 pages"):
        Server(dataclasses.replace(model, num_pages=2), None, [Request(b"a" * 8, 1)])


TINY = """--steps=2 --max_length=96 --num_requests=4 --num_bytes=10 --num_slots=2 --page_size=4 --budgets=8
  --d_model=16 --num_layers=2 --mlp_dim=32 --block_size=8""".split()


@pytest.mark.slow
def test_script_serves_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    printed = run("serve.py", *TINY, f"--out={tmp_path}")
    assert "Quest, 8" in printed and (tmp_path / "dense_lm.msgpack").exists()
    summary = json.loads((tmp_path / "serving.json").read_text())
    assert [x["budget"] for x in summary["runs"]] == [None, 8]
    assert all(math.isfinite(x) for x in numbers(summary))
    dense, quest = summary["runs"]
    assert dense["agreement"] == dense["fraction_read"] == 1
    assert 0 < quest["fraction_read"] < 1 and 0 <= quest["agreement"] <= 1
    assert_drawn(tmp_path / "serving.png")
