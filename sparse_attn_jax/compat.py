"""Differences between JAX versions: the only module that may look at private or renamed names."""

import jax


def vary_like(x: jax.Array, like) -> jax.Array:
    """x, marked as varying over every mesh axis that any leaf of `like` varies over.

    Inside `shard_map` the carry of a loop must enter with the type that it leaves with; outside it this does nothing.
    """
    axes = frozenset().union(*(getattr(jax.typeof(leaf), "vma", frozenset()) for leaf in jax.tree.leaves(like)))
    missing = tuple(axes - getattr(jax.typeof(x), "vma", frozenset()))
    if not missing:
        return x
    return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)
