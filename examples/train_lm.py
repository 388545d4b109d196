"""Trains a byte-level language model twice, with sparse and with dense attention, and draws what happened.

  python examples/train_lm.py                            # about six minutes on two CPU cores
  python examples/train_lm.py --quick                    # under a minute
  python examples/train_lm.py --text FILE                # on your own text
  python examples/train_lm.py --generate_from demo_out/sparse_lm.msgpack --prompt "def main("

The text is the source of the Python standard library. Both models have the same seed, data and order of the data; they differ
in the selector of their attention alone.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import lm_figures
import numpy as np
from absl import app, flags, logging
from lm_data import Corpus, check_length, load_file, load_standard_library
from lm_generate import generate, load_checkpoint, save_checkpoint
from lm_model import LanguageModel, ModelConfig, selected_blocks
from lm_scaling import HEAD_DIM, NUM_KV_HEADS, NUM_Q_HEADS, Measurement, measure_scaling
from lm_training import TrainedModel, TrainingConfig, train


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    generate_bytes: int = 400
    scaling_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)


FULL = Settings()
QUICK = Settings(
    model=ModelConfig(d_model=64, num_layers=2, mlp_dim=256, block_size=32),
    training=TrainingConfig(steps=40, sequence_length=1024, validation_batches=8, learning_rate=8e-3),
    generate_bytes=100,
    scaling_lengths=(512, 1024, 2048),
)

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "demo_out", "Folder for the figures, numbers, text and checkpoint.")
flags.DEFINE_string("text", None, "File to train on. Default: the standard library of this Python.")
flags.DEFINE_bool("quick", False, "A small model, few steps, short lengths: every output in under a minute.")
flags.DEFINE_string("generate_from", None, "Checkpoint to generate from; nothing is trained.")
flags.DEFINE_string("prompt", None, "Start of the generated text. Default: held-out text.")
flags.DEFINE_float("temperature", 0.7, "Of the generated text; 0 takes the likeliest byte every time.", lower_bound=0.0)
flags.DEFINE_integer("seed", 0, "Of parameters, data and generated text.")
flags.DEFINE_integer("generate_bytes", None, f"Bytes to generate. Default: {FULL.generate_bytes}.", lower_bound=1)
flags.DEFINE_list("scaling_lengths", None, f"Lengths of scaling.png. Default: {','.join(map(str, FULL.scaling_lengths))}.")
for config_class, default in ((ModelConfig, FULL.model), (TrainingConfig, FULL.training)):
    for field in dataclasses.fields(config_class):
        if field.name not in FLAGS:
            define = flags.DEFINE_float if field.type is float else flags.DEFINE_integer
            define(field.name, None, f"Field of {config_class.__name__}. Default: {getattr(default, field.name)}.")


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments: {arguments[1:]}")
    # Which devices JAX did not find, and which implementation runs, would sit between the progress bars.
    logging.set_verbosity(logging.WARNING)
    start = time.perf_counter()
    if FLAGS.generate_from is not None:
        return generate_from_checkpoint(pathlib.Path(FLAGS.generate_from))
    settings = read_settings()
    corpus = load_standard_library() if FLAGS.text is None else load_file(FLAGS.text)
    check_length(corpus, settings.training.sequence_length)
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    print(f"{corpus.name}: {len(corpus.train):,} bytes to train on, {len(corpus.validation):,} held out")

    models = {}
    for name in ("dense", "sparse"):
        model = LanguageModel(settings.model, settings.model.selector(name))
        models[name] = train(name, model, corpus, settings.training)
    sparse = models["sparse"]
    length = settings.training.sequence_length
    save_checkpoint(out / "sparse_lm.msgpack", sparse.model, sparse.params, max_length=length)
    generated = write_generated_text(out / "generated.txt", sparse, corpus, settings)
    read_fraction = draw_selection(out / "selected_blocks.png", sparse, corpus, length)
    measurements = measure_scaling(settings.scaling_lengths, FLAGS.seed)

    lm_figures.draw_loss_curves(out / "loss_curves.png", models, settings.training.tokens_per_step)
    sizes = f"{NUM_Q_HEADS} query heads, {NUM_KV_HEADS} KV heads, head dim {HEAD_DIM}, float32, {jax.devices()[0].device_kind}"
    lm_figures.draw_scaling(out / "scaling.png", measurements, sizes)
    summary = summarise(settings, corpus, models, generated | read_fraction, measurements)
    summary["total_seconds"] = time.perf_counter() - start
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_table(summary, out)


def read_settings() -> Settings:
    """The preset, with every flag that was given in its place."""
    preset = QUICK if FLAGS.quick else FULL
    model, training = (_override(config) for config in (preset.model, preset.training))
    lengths = preset.scaling_lengths if FLAGS.scaling_lengths is None else tuple(map(int, FLAGS.scaling_lengths))
    num_bytes = preset.generate_bytes if FLAGS.generate_bytes is None else FLAGS.generate_bytes
    return Settings(model, training, min(num_bytes, training.sequence_length // 2), lengths)


def _override(config: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    return dataclasses.replace(config, **{name: FLAGS[name].value for name in names if FLAGS[name].value is not None})


def generate_from_checkpoint(path: pathlib.Path) -> None:
    model, params, extra = load_checkpoint(path)
    prompt = "import " if FLAGS.prompt is None else FLAGS.prompt
    num_bytes = FULL.generate_bytes if FLAGS.generate_bytes is None else FLAGS.generate_bytes
    options = dict(num_bytes=num_bytes, max_length=extra["max_length"], temperature=FLAGS.temperature, seed=FLAGS.seed)
    text = generate(model, params, prompt.encode(), **options)
    print(prompt + text.decode(errors="replace"))


def write_generated_text(path: pathlib.Path, trained: TrainedModel, corpus: Corpus, settings: Settings) -> dict[str, float]:
    """Continues a held-out text, prints the end of it with what follows, and writes all of it."""
    max_length, num_bytes = settings.training.sequence_length, settings.generate_bytes
    middle = len(corpus.validation) // 2
    prompt = corpus.validation[middle : middle + max_length - num_bytes].tobytes()
    if FLAGS.prompt is not None:
        prompt = FLAGS.prompt.encode()
    options = dict(num_bytes=num_bytes, max_length=max_length, temperature=FLAGS.temperature, seed=FLAGS.seed)
    generate(trained.model, trained.params, prompt, **options | dict(num_bytes=num_bytes))
    start = time.perf_counter()
    generated = generate(trained.model, trained.params, prompt, **options)
    seconds = time.perf_counter() - start
    before, after = (text.decode(errors="replace") for text in (prompt, generated))
    path.write_text(f"--- prompt ({len(prompt)} bytes)\n{before}\n--- generated ({num_bytes} bytes)\n{after}\n")
    print(f"\n--- {before[-200:]!r} ... continues:\n{after}\n---\n")
    return dict(generated_bytes=num_bytes, generated_bytes_per_second=num_bytes / seconds)


def draw_selection(path: pathlib.Path, trained: TrainedModel, corpus: Corpus, length: int) -> dict[str, float]:
    """Figure of the blocks that four heads of the model read, and the fraction of the past that all heads read."""
    start = len(corpus.validation) // 3
    text = corpus.validation[start : start + length]
    masks = selected_blocks(trained.model, trained.params, text)
    config = trained.model.config
    shown = sorted({round(index) for index in np.linspace(0, len(masks) - 1, 4)})
    names = [list(masks)[index] for index in shown]
    options = dict(block_size=config.block_size, num_local_blocks=config.num_local_blocks)
    lm_figures.draw_selected_blocks(path, text.tobytes(), {name: masks[name] for name in names}, **options)
    mask = np.stack(list(masks.values()))
    is_past = np.arange(mask.shape[-1]) <= np.arange(length)[:, None] // config.block_size
    return dict(fraction_of_past_blocks_read=float((mask & is_past).sum() / (len(mask) * is_past.sum())))


def summarise(
    settings: Settings,
    corpus: Corpus,
    models: Mapping[str, TrainedModel],
    extra: dict[str, float],
    measurements: Sequence[Measurement],
) -> dict[str, Any]:
    """Every number of the run, ready for JSON."""
    dense, sparse = (models[name].validation_bits_per_byte for name in ("dense", "sparse"))
    numbers = ("validation_bits_per_byte", "tokens_per_second", "compile_seconds", "train_seconds")
    return dict(
        settings=dataclasses.asdict(settings),
        text=dict(name=corpus.name, training_bytes=len(corpus.train), validation_bytes=len(corpus.validation)),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        models={name: {number: getattr(trained, number) for number in numbers} for name, trained in models.items()},
        parameters=sum(x.size for x in jax.tree.leaves(models["sparse"].params)),
        sparse_over_dense_percent=100 * (sparse / dense - 1),
        **extra,
        scaling=[dataclasses.asdict(measurement) for measurement in measurements],
    )


def print_table(summary: Mapping[str, Any], out: pathlib.Path) -> None:
    print(f"\n{'attention':<10}{'held-out bits/byte':>20}{'tokens/s':>12}{'training':>12}{'compilation':>14}")
    for name, numbers in summary["models"].items():
        seconds = f"{numbers['train_seconds']:>10.0f} s{numbers['compile_seconds']:>12.0f} s"
        print(f"{name:<10}{numbers['validation_bits_per_byte']:>20.3f}{numbers['tokens_per_second']:>12,.0f}{seconds}")
    print(f"\nsparse against dense: {summary['sparse_over_dense_percent']:+.2f} % bits per byte")
    print(f"blocks of the past that a sparse head reads: {100 * summary['fraction_of_past_blocks_read']:.0f} %")
    print(f"generation through the decode cache: {summary['generated_bytes_per_second']:,.0f} bytes/s")
    print(f"in all {summary['total_seconds']:.0f} s; see {', '.join(sorted(path.name for path in out.iterdir()))} in {out}/")


if __name__ == "__main__":
    app.run(main)
