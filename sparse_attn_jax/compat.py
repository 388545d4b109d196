"""Differences between JAX versions: the only module that may look at private or renamed names."""

import jax


def vary_like(x: jax.Array, like) -> jax.Array:
    """x, marked as varying over every mesh axis that any leaf of `like` varies over.

    Inside `shard_map` the carry of a loop must enter with the type that it leaves with; outside it this does nothing.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes over which x differs between devices, inside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
