"""Text from a trained model, through the decode cache, and the checkpoint that keeps the model."""

import dataclasses
import functools
import pathlib
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from lm_model import LanguageModel, ModelConfig


def generate(
    model: LanguageModel,
    params: Any,
    prompt: bytes,
    *,
    num_bytes: int,
    max_length: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> bytes:
    """Continues `prompt` by `num_bytes`: the whole prompt fills the cache at once, then every byte takes one step.

    Args:
      model: as it was trained; its `decode` twin is what runs.
      params: of the model.
      prompt: at least one byte; only the last `max_length - num_bytes` are read.
      num_bytes: how many to make, fewer than `max_length`.
      max_length: tokens the cache holds.
      temperature: 0 takes the likeliest byte; otherwise samples.
      seed: of the samples.
    """
    if not prompt or not 0 < num_bytes < max_length:
        raise ValueError(f"The prompt must not be empty and {num_bytes=} must be positive and below {max_length=}.")
    decoder = model.clone(decode=True)
    cache = empty_cache(decoder, max_length)
    keys = jax.random.split(jax.random.key(seed), num_bytes)
    tokens = jnp.asarray(np.frombuffer(prompt[-(max_length - num_bytes) :], np.uint8), jnp.int32)[None]
    generated = []
    for key in keys:
        tokens, cache = extend(decoder, params, cache, tokens, key, temperature)
        generated.append(tokens)
    return bytes(np.concatenate(generated, axis=1)[0].astype(np.uint8))


def empty_cache(decoder: LanguageModel, max_length: int) -> Any:
    """The "cache" collection for one sequence of up to `max_length` bytes; all zeros, so only its shapes are traced."""
    tokens = jax.ShapeDtypeStruct((1, max_length), jnp.int32)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), tokens)["cache"]
    return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def extend(
    decoder: LanguageModel, params: Any, cache: Any, tokens: jax.Array, key: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, Any]:
    """Reads tokens [1, length] and gives the next one [1, 1]. Compiled twice: for the prompt, and for one byte."""
    logits, updated = decoder.apply({"params": params, "cache": cache}, tokens, mutable=["cache"])
    last = logits[:, -1:]
    sampled = jax.random.categorical(key, last / jnp.maximum(temperature, 1e-6))
    token = jnp.where(temperature > 0, sampled, last.argmax(-1))
    return token.astype(jnp.int32), updated["cache"]


def save_checkpoint(path: pathlib.Path, model: LanguageModel, params: Any, **extra: Any) -> None:
    """Parameters and sizes of a sparse model, in one msgpack file."""
    content = dict(config=dataclasses.asdict(model.config), params=jax.device_get(params), **extra)
    path.write_bytes(flax.serialization.msgpack_serialize(content))


def load_checkpoint(path: pathlib.Path) -> tuple[LanguageModel, Any, dict[str, Any]]:
    """The model, its parameters, and the extra values of `save_checkpoint`."""
    content = flax.serialization.msgpack_restore(path.read_bytes())
    config = ModelConfig(**content.pop("config"))
    return LanguageModel(config, config.selector("sparse")), content.pop("params"), content
