"""`WindowPredicate`: the nearest tokens and the leading ones, which every implementation knows as a window and sinks."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from sparse_attn_jax.problem import MAX_LENGTH


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class WindowPredicate:
    """Keeps the keys of a window around each query, and the first ones: a selection's predicate that no implementation refuses.

    Query i sees key j if i - left <= j <= i + right or j < num_sinks, in absolute positions. The attention op runs it as its
    own `local_window_size` and `num_sinks`, which mean the same, unless the caller gives some of them: then both must hold,
    and it stays a predicate, which only `xla` evaluates. Causality is the op's own mask.

    A pytree. Arrays are its leaves, whatever is an int or `None` is static.

    Attributes:
      left: keys before the query: an int of at least 0, an int32 array [num_q_heads], or `None` for all of them.
      right: keys after the query, likewise.
      num_sinks: leading keys that every query sees: an int of at least 0, or an int32 array [num_q_heads].
    """

    left: int | jax.Array | None = None
    right: int | jax.Array | None = None
    num_sinks: int | jax.Array = 0

    def __post_init__(self):
        # Kept, because transformations put all sorts of things in the places of arrays, ints too.
        leaves = tuple(name for name, x in vars(self).items() if hasattr(x, "shape"))
        object.__setattr__(self, "_leaves", leaves)

    def __call__(self, batch: jax.Array, head: jax.Array, q_position: jax.Array, kv_position: jax.Array) -> jax.Array:
        """bool, elementwise."""
        near = True
        if self.left is not None:
            near = kv_position >= q_position - _of_head(self.left, head)
        if self.right is not None:
            near = near & (kv_position <= q_position + _of_head(self.right, head))
        return near | (kv_position < _of_head(self.num_sinks, head))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        static = tuple((name, x) for name, x in fields.items() if name not in self._leaves)
        return tuple(fields[name] for name in self._leaves), (self._leaves, static)

    @classmethod
    def tree_unflatten(cls, structure: tuple, children: tuple) -> Self:
        leaves, static = structure
        predicate = object.__new__(cls)
        for name, x in (*static, *zip(leaves, children, strict=True), ("_leaves", leaves)):
            object.__setattr__(predicate, name, x)
        return predicate


def fold_window(predicate: Any, local_window_size: Any, num_sinks: Any) -> tuple[Any, Any, Any]:
    """A window that a selection brings becomes the op's own if the caller gave neither a window nor sinks.

    Returns:
      (local_window_size, num_sinks, predicate) for the op; `None` for a predicate that is the window now.
    """
    is_given = local_window_size is not None or not (isinstance(num_sinks, int) and num_sinks == 0)
    if is_given or not isinstance(predicate, WindowPredicate):
        return local_window_size, num_sinks, predicate
    return (predicate.left, predicate.right), predicate.num_sinks, None


def _of_head(size: int | jax.Array, head: jax.Array) -> jax.Array:
    # Bounded, so that a position plus an extreme value cannot wrap around.
    size = jnp.clip(jnp.asarray(size), -MAX_LENGTH, MAX_LENGTH)
    return size[head] if size.ndim else size
