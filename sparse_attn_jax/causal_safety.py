"""A warning for training with a selector that lets later tokens decide what earlier ones see."""

import functools
import warnings
from collections.abc import Callable

import jax


def watch_training(query: jax.Array, selector: Callable, is_causal: bool) -> jax.Array:
    """`query`, whose differentiation warns if the selector says that it is not `causal_safe` and attention is causal.

    A causal model that trains with such a selector learns from tokens that it will not have when it generates. Inference, and
    attention that is not causal, are no business of this.
    """
    is_safe = getattr(selector, "causal_safe", True)
    return query if is_safe or not is_causal else _watched(query, type(selector).__name__)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _watched(query, name):
    return query


def _watched_forward(query, name):
    # Python shows a warning of one text and place once.
    warnings.warn(
        f"{name} is not causal-safe: later tokens influence which keys an earlier one sees, so a causal model that is trained "
        "with it learns from what it cannot know when it generates. Use it for prefill, or a selector with causal_safe=True.",
        stacklevel=2,
    )
    return query, None


def _watched_backward(name, _, d_query):
    return (d_query,)


_watched.defvjp(_watched_forward, _watched_backward)
