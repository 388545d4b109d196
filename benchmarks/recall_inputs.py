"""Queries, keys and values with structure, for `benchmarks.recall`: a trained model's, and patterns that are made."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import progress
from sparse_attn_jax.flax.rotary import apply_rotary

EXAMPLES = Path(__file__).absolute().parent.parent / "examples"
THETA = 10_000.0  # of the demo's model
GRID = (32, 32)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What attention is computed of.

    Attributes:
      query: float32 [batch, length, num_q_heads, head_dim]; of a model some layers are the rows of the batch.
      key: float32 [batch, length, num_kv_heads, head_dim].
      value: float32 [batch, length, num_kv_heads, head_dim].
      is_causal: whether a query sees what follows it.
      shape: of a grid whose tokens these are, row by row; `None` is a line.
    """

    name: str
    query: jax.Array
    key: jax.Array
    value: jax.Array
    is_causal: bool = True
    shape: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the made patterns."""

    length: int = 2048
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32


def make_patterns(sizes: Sizes, seed: int) -> list[Pattern]:
    """The made ones, random but for their structure."""
    generator = np.random.default_rng(seed)
    return [make(generator, sizes) for make in (make_needles, make_strides, make_drift, make_field)]


def make_needles(generator: np.random.Generator, sizes: Sizes) -> Pattern:
    """A few keys per head, anywhere, that most queries look for; the rest is noise."""
    query, key, value = _noise(generator, sizes, sizes.length)
    num_needles = max(1, sizes.length // 256)
    for head in range(sizes.num_kv_heads):
        direction = _directions(generator, 1, sizes.head_dim)[0]
        key[0, generator.choice(sizes.length, num_needles, replace=False), head] += 6 * direction
        group = sizes.num_q_heads // sizes.num_kv_heads
        looks = generator.random((sizes.length, group, 1)) < 0.8
        query[0, :, head * group : (head + 1) * group] += 6 * direction * looks
    return Pattern("needle", *_arrays(query, key, value))


def make_strides(generator: np.random.Generator, sizes: Sizes) -> Pattern:
    """A query looks for the keys a whole number of periods before it; each head has a period of its own."""
    query, key, value = _noise(generator, sizes, sizes.length)
    group = sizes.num_q_heads // sizes.num_kv_heads
    for head in range(sizes.num_kv_heads):
        period = 37 * (head + 1)
        phases = _directions(generator, period, sizes.head_dim)[np.arange(sizes.length) % period]
        key[0, :, head] += 5 * phases
        query[0, :, head * group : (head + 1) * group] += 5 * phases[:, None]
    return Pattern("stride", *_arrays(query, key, value))


def make_drift(generator: np.random.Generator, sizes: Sizes) -> Pattern:
    """A topic that wanders: near keys are alike, and topics come back."""
    query, key, value = _noise(generator, sizes, sizes.length)
    topics = _directions(generator, 12, sizes.head_dim)
    switches = np.cumsum(generator.random(sizes.length) < 1 / 96)
    topic = topics[generator.integers(0, len(topics), switches[-1] + 1)[switches]]
    wander = np.cumsum(generator.standard_normal((sizes.length, sizes.head_dim)), axis=0) / np.sqrt(sizes.length)
    key += 3.5 * topic[:, None] + wander[:, None]
    query += 3.5 * topic[:, None] + wander[:, None]
    return Pattern("drift", *_arrays(query, key, value))


def make_field(generator: np.random.Generator, sizes: Sizes) -> Pattern:
    """A picture: pixels near each other in two dimensions are alike, and every pixel sees all others."""
    length = GRID[0] * GRID[1]
    query, key, value = _noise(generator, sizes, length)
    spectrum = np.fft.rfft2(generator.standard_normal((*GRID, sizes.head_dim)), axes=(0, 1))
    rows, columns = np.fft.fftfreq(GRID[0])[:, None], np.fft.rfftfreq(GRID[1])
    smooth = np.fft.irfft2(spectrum * np.exp(-120 * (rows**2 + columns**2))[..., None], s=GRID, axes=(0, 1))
    smooth = (smooth / smooth.std()).reshape(length, 1, sizes.head_dim)
    return Pattern("field", *_arrays(query + 1.5 * smooth, key + 1.5 * smooth, value), is_causal=False, shape=GRID)


def _noise(generator: np.random.Generator, sizes: Sizes, length: int) -> list[np.ndarray]:
    heads = (sizes.num_q_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    return [generator.standard_normal((1, length, n, sizes.head_dim)) for n in heads]


def _directions(generator: np.random.Generator, count: int, dim: int) -> np.ndarray:
    """Unit vectors, [count, dim]."""
    x = generator.standard_normal((count, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _arrays(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def text_pattern(checkpoint: Path, *, steps: int, length: int) -> Pattern:
    """What the attention layers of the demo's language model compute of held-out text.

    Args:
      checkpoint: of a model with dense attention; if there is none, one is trained and written there.
      steps: of that training.
      length: tokens of the text.
    """
    examples = _import_examples()
    corpus = examples["lm_data"].load_standard_library()
    model, params = _load_or_train(examples, corpus, checkpoint, steps, length)
    start = len(corpus.validation) // 3
    tokens = jnp.asarray(corpus.validation[start : start + length].astype(np.int32))[None]
    _, state = model.apply({"params": params}, tokens, capture_intermediates=True, mutable=["intermediates"])
    (attention,) = (child for name, child in state["intermediates"]["layers"].items() if "Attention" in name)
    # [layers, 1, length, heads, head_dim], of which every second layer will do.
    query, key, value = (attention[name]["__call__"][0][1::2, 0] for name in ("query", "key", "value"))
    rotate = jax.vmap(lambda x: apply_rotary(x[None], jnp.arange(length), THETA)[0])
    return Pattern("text", rotate(query), rotate(key), value)


def _import_examples() -> Mapping[str, Any]:
    """The demo's modules, which are scripts beside each other."""
    import importlib

    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return {name: importlib.import_module(name) for name in ("lm_data", "lm_generate", "lm_model", "lm_training")}


def _load_or_train(examples: Mapping[str, Any], corpus: Any, checkpoint: Path, steps: int, length: int) -> tuple[Any, Any]:
    make: Callable[[Any], Any] = lambda config: examples["lm_model"].LanguageModel(config, config.selector("dense"))
    if checkpoint.exists():
        progress.say(f"the model of {checkpoint}")
        saved, params, _ = examples["lm_generate"].load_checkpoint(checkpoint)
        return make(saved.config), params
    config = examples["lm_training"].TrainingConfig(steps=steps, sequence_length=length, validation_batches=4)
    trained = examples["lm_training"].train("dense", make(examples["lm_model"].ModelConfig()), corpus, config)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    examples["lm_generate"].save_checkpoint(checkpoint, trained.model, trained.params)
    return trained.model, trained.params
