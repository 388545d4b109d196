"""Time and peak memory of attention, forward and backward, against the length: dense and sparse."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from tqdm import tqdm

import sparse_attn_jax as sa

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
# A contender goes no further than this: the next length would take four times as long, or not fit.
_MAX_SECONDS = 1.5
_MAX_BYTES = 3 * 2**30

SELECTOR = sa.selectors.InfLLMV2(top_k=8, block_size=64, num_sink_blocks=1, num_local_blocks=2)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One contender at one length."""

    contender: str
    length: int
    seconds: float | None  # None if it was only compiled
    peak_bytes: int


def contenders() -> dict[str, Callable]:
    """Attention functions of query, key and value, by the name that the figure shows."""
    return {
        "dense: jax.nn.dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        "dense: this library, every block": lambda q, k, v: sa.sparse_attention(q, k, v, sa.selectors.Dense(), is_causal=True),
        "sparse: InfLLMV2, 8 blocks of 64 per token (selection included)": lambda q, k, v: sa.sparse_attention(
            q, k, v, SELECTOR, is_causal=True
        ),
    }


def measure_scaling(lengths: Sequence[int], seed: int = 0) -> list[Measurement]:
    """Every contender at every length, except where it would take too long: there it is compiled for its memory alone."""
    measurements = []
    attend = contenders()
    is_slow = dict.fromkeys(attend, False)
    with tqdm(total=len(lengths) * len(attend), desc="scaling", unit=" runs") as bar:
        for length in sorted(lengths):
            for name, function in attend.items():
                bar.set_postfix_str(f"{length} tokens, {name.split(',')[0]}")
                measured = measure(name, function, length, is_slow[name], seed)
                is_slow[name] |= measured.seconds is None or measured.seconds > _MAX_SECONDS
                measurements.append(measured)
                bar.update()
    return measurements


def measure(name: str, attend: Callable, length: int, is_slow: bool, seed: int) -> Measurement:
    """Gradients of all three inputs at one length: peak memory from the compiler, and the best of up to three times."""
    heads = (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    shapes = [jax.ShapeDtypeStruct((1, length, h, HEAD_DIM), jnp.float32) for h in heads]
    compiled = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2))).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    peak_bytes = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    if is_slow or peak_bytes > _MAX_BYTES:
        return Measurement(name, length, None, peak_bytes)
    keys = jax.random.split(jax.random.key(seed), 3)
    inputs = [jax.random.normal(key, shape.shape) for key, shape in zip(keys, shapes)]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
        if sum(times) > _MAX_SECONDS:
            break
    return Measurement(name, length, min(times), peak_bytes)
