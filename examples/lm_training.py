"""Training and validation of one language model, with its progress on the terminal."""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from lm_data import Corpus, training_batches, validation_batches
from lm_model import LanguageModel
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What both models are trained with. The defaults take about two minutes per model on two CPU cores."""

    steps: int = 400
    batch_size: int = 1
    sequence_length: int = 2048
    learning_rate: float = 4e-3
    validation_batches: int = 24
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def batch_sizes(self) -> dict[str, int]:
        return dict(batch_size=self.batch_size, sequence_length=self.sequence_length)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model after training, and what it took."""

    model: LanguageModel
    params: Any
    losses: np.ndarray  # [steps], training bits per byte before each step
    validation_bits_per_byte: float
    tokens_per_second: float
    compile_seconds: float
    train_seconds: float


def train(name: str, model: LanguageModel, corpus: Corpus, config: TrainingConfig) -> TrainedModel:
    """Trains from random parameters; the same seed gives the same parameters and the same order of the data."""
    batches = training_batches(corpus, **config.batch_sizes(), steps=config.steps, seed=config.seed)
    state = make_state(model, config)
    start = time.perf_counter()
    example = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length + 1), np.int32)
    with tqdm(total=1, desc=f"{name:>6}: compile", bar_format="{desc} [{elapsed}]") as bar:
        step = train_step.lower(state, example).compile()
        bar.update()
    compile_seconds = time.perf_counter() - start

    start = time.perf_counter()
    losses = []
    total = config.steps * config.tokens_per_step
    with tqdm(total=total, desc=f"{name:>6}: train", unit=" tokens", unit_scale=True) as bar:
        for batch in batches:
            state, loss = step(state, batch)
            losses.append(loss)
            # The loss of the step before is there already: showing it does not wait for this one.
            bar.set_postfix_str(f"{float(losses[max(0, len(losses) - 2)]):.3f} bits/byte", refresh=False)
            bar.update(config.tokens_per_step)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    return TrainedModel(
        model=model,
        params=state.params,
        losses=np.asarray(losses),
        validation_bits_per_byte=evaluate(name, model, state.params, corpus, config),
        tokens_per_second=total / seconds,
        compile_seconds=compile_seconds,
        train_seconds=seconds,
    )


def make_state(model: LanguageModel, config: TrainingConfig) -> TrainState:
    """Random parameters and AdamW with a short warm-up and cosine decay."""
    tokens = np.zeros((config.batch_size, config.sequence_length), np.int32)
    params = jax.jit(model.init)(jax.random.key(config.seed), tokens)["params"]
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, config.steps // 20),
        decay_steps=max(2, config.steps),
        end_value=config.learning_rate / 50,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    """One update. The memory of the old state becomes that of the new one."""
    loss, gradients = jax.value_and_grad(lambda params: bits_per_byte(state.apply_fn, params, batch))(state.params)
    return state.apply_gradients(grads=gradients), loss


def bits_per_byte(apply_fn, params: Any, batch: jax.Array) -> jax.Array:
    """Mean over the bytes of int32 [batch, length + 1], each predicted from those before it."""
    logits = apply_fn({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean() / math.log(2)


def evaluate(name: str, model: LanguageModel, params: Any, corpus: Corpus, config: TrainingConfig) -> float:
    """Bits per byte of the held-out text."""
    measure = jax.jit(functools.partial(bits_per_byte, model.apply))
    batches = validation_batches(corpus, **config.batch_sizes(), num_batches=config.validation_batches)
    bar = tqdm(batches, total=config.validation_batches, desc=f"{name:>6}: validate", unit=" batches")
    return float(np.mean([measure(params, batch) for batch in bar]))
