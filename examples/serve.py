"""Serves a language model from paged caches: dense attention against Quest, which reads the pages that a query may need.

  python examples/serve.py                       # two to four minutes on two CPU cores, most of them training
  python examples/serve.py --quick               # under a minute
  python examples/serve.py --checkpoint demo_out/sparse_lm.msgpack     # the model of train_lm.py

Requests of different lengths join and leave a batch that makes a byte of each per step. Quest goes along with the text that
dense attention writes, so that every byte is compared after the same ones: up to the first that differs, both write the same.
The likeliest byte is taken always.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from lm_data import Corpus, check_length, load_file, load_standard_library
from lm_generate import load_checkpoint, save_checkpoint
from lm_model import LanguageModel, ModelConfig
from lm_paged import PagedModel
from lm_serving import Request, Server
from lm_serving_figure import draw_serving
from lm_training import TrainingConfig, train
from tqdm import tqdm

from sparse_attn_jax.selectors.quest import Quest


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run. Lengths are in bytes, which are the model's tokens."""

    model: ModelConfig = ModelConfig()
    steps: int = 250
    max_length: int = 2048
    num_requests: int = 12
    num_bytes: int = 160
    num_slots: int = 4
    page_size: int = 16
    budgets: tuple[int, ...] = (64, 128, 256, 512)


FULL = Settings()
QUICK = Settings(
    model=ModelConfig(d_model=64, num_layers=2, mlp_dim=256, block_size=32),
    steps=40,
    max_length=1024,
    num_requests=6,
    num_bytes=48,
    budgets=(64, 128, 256),
)

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "demo_out", "Folder for the figure, the numbers and the checkpoint.")
flags.DEFINE_string("checkpoint", None, "Model to serve, as train_lm.py writes it; nothing is trained.")
flags.DEFINE_string("text", None, "File to train on and to continue. Default: the standard library of this Python.")
flags.DEFINE_bool("quick", False, "A small model and few requests: every output in under a minute.")
flags.DEFINE_integer("seed", 0, "Of parameters, data and requests.")
flags.DEFINE_list("budgets", None, "Tokens that a query of Quest reads, multiples of the page size.")
for field in dataclasses.fields(Settings):
    if field.type is int:
        flags.DEFINE_integer(field.name, None, f"Default: {getattr(FULL, field.name)}.", lower_bound=1)
for field in dataclasses.fields(ModelConfig):
    flags.DEFINE_integer(field.name, None, f"Of a model that is trained. Default: {getattr(FULL.model, field.name)}.")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    # Which devices JAX did not find, and which implementation runs, would sit between the progress bars.
    logging.set_verbosity(logging.WARNING)
    start = time.perf_counter()
    settings = read_settings()
    corpus = load_standard_library() if FLAGS.text is None else load_file(FLAGS.text)
    check_length(corpus, settings.max_length)
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    if FLAGS.checkpoint is not None:
        model, params, extra = load_checkpoint(pathlib.Path(FLAGS.checkpoint))
        settings = dataclasses.replace(settings, model=model.config, max_length=extra["max_length"])
    else:
        params = train_model(out / "dense_lm.msgpack", corpus, settings)
    requests = make_requests(corpus, settings)
    runs, stays = compare(params, requests, settings)
    draw_serving(out / "serving.png", runs, stays, [request.length for request in requests])
    options = dataclasses.asdict(settings) | dict(requests=[request.length for request in requests])
    summary = dict(settings=options, device=jax.devices()[0].device_kind, jax=jax.__version__, runs=runs)
    summary["total_seconds"] = time.perf_counter() - start
    (out / "serving.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(runs, settings)
    print(f"in all {summary['total_seconds']:.0f} s; see serving.png and serving.json in {out}/")


def read_settings() -> Settings:
    """The preset, with every flag that was given in its place."""
    settings = _override(QUICK if FLAGS.quick else FULL)
    if FLAGS.budgets is not None:
        settings = dataclasses.replace(settings, budgets=tuple(map(int, FLAGS.budgets)))
    for budget in settings.budgets:
        if budget % settings.page_size or budget < 2 * settings.page_size:
            needed = f"a multiple of the page size, {settings.page_size}, with room for the first page and the newest"
            raise app.UsageError(f"--budgets has {budget}; it must be {needed}.")
    return dataclasses.replace(settings, model=_override(settings.model))


def _override(config: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config) if field.type is int]
    return dataclasses.replace(config, **{name: FLAGS[name].value for name in names if FLAGS[name].value is not None})


def train_model(path: pathlib.Path, corpus: Corpus, settings: Settings) -> Any:
    """The parameters of a model that was trained with dense attention, which are written too."""
    model = LanguageModel(settings.model, settings.model.selector("dense"))
    config = TrainingConfig(steps=settings.steps, sequence_length=settings.max_length, validation_batches=4, seed=FLAGS.seed)
    trained = train("dense", model, corpus, config)
    print(f"held out: {trained.validation_bits_per_byte:.3f} bits per byte")
    save_checkpoint(path, model, trained.params, max_length=settings.max_length)
    return trained.params


def make_requests(corpus: Corpus, settings: Settings) -> list[Request]:
    """Pieces of held-out text, of any length from an eighth of the longest on, half of them more than a half."""
    rng = np.random.default_rng(FLAGS.seed)
    num_bytes = min(settings.num_bytes, settings.max_length // 4)
    requests = []
    for length in np.linspace(settings.max_length // 8, settings.max_length - num_bytes, settings.num_requests).astype(int):
        start = int(rng.integers(0, len(corpus.validation) - length))
        made = int(rng.integers(num_bytes // 2, num_bytes + 1))
        requests.append(Request(corpus.validation[start : start + length].tobytes(), made))
    return [requests[i] for i in rng.permutation(len(requests))]


def compare(params: Any, requests: Sequence[Request], settings: Settings) -> tuple[list[dict[str, Any]], list]:
    """Serves all requests with dense attention and with Quest of every budget.

    Returns:
      the numbers of each run, and who was in which slot.
    """
    num_pages = settings.num_slots * -(-settings.max_length // settings.page_size) * 3 // 4
    sizes = dict(num_slots=settings.num_slots, page_size=settings.page_size, max_length=settings.max_length)
    total = sum(request.num_bytes for request in requests)
    runs, dense = [], None
    for budget in (None, *settings.budgets):
        quest = None if budget is None else Quest(top_k=budget // settings.page_size, block_size=settings.page_size)
        name = "dense" if budget is None else f"Quest, {budget}"
        with tqdm(total=total, desc=f"{name:>11}", unit=" tokens") as bar:
            model = PagedModel(settings.model, quest, num_pages=num_pages, **sizes)
            follow = None if dense is None else dense.outputs
            served = Server(model, params, requests, follow=follow, on_tokens=bar.update).run()
        dense = dense or served
        same = [np.equal(*outputs)[1:] for outputs in zip(served.outputs, dense.outputs)]
        runs.append(
            dict(
                budget=budget,
                tokens_per_second=served.tokens_per_second,
                fraction_read=served.fraction_read,
                # The first byte is the prompt's, which is read with dense attention.
                agreement=float(np.concatenate(same).mean()),
                same_before_first_difference=float(np.mean([np.cumprod(x).mean() for x in same if len(x)])),
                peak_pages=served.peak_pages,
                num_pages=num_pages,
            )
        )
    return runs, dense.stays


def print_table(runs: Sequence[dict[str, Any]], settings: Settings) -> None:
    print(f"\n{'attention':<14}{'tokens/s':>10}{'KV read':>10}{'same byte':>11}{'same up to':>12}")
    for run in runs:
        name = "dense" if run["budget"] is None else f"Quest, {run['budget']}"
        shares = "".join(f"{100 * run[key]:>{w}.1f} %" for key, w in (("fraction_read", 8), ("agreement", 9)))
        print(f"{name:<14}{run['tokens_per_second']:>10,.0f}{shares}{100 * run['same_before_first_difference']:>10.1f} %")
    peak, pages = runs[0]["peak_pages"], runs[0]["num_pages"]
    print(f"\nat most {peak} of {pages} pages of {settings.page_size} tokens in use; 'same up to': before the first difference")


if __name__ == "__main__":
    app.run(main)
