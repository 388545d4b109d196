"""Configuration of the Flax layers: checked, and hashable so that it can be a static part of a module."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparse_attn_jax.api import Window
from sparse_attn_jax.selection import BlockSelection
from sparse_attn_jax.selectors import Dense
from sparse_attn_jax.validation import require

Selector = Callable[..., BlockSelection]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpOptions:
    """Options that go to `block_sparse_attention` as they are. Arrays per query head become tuples, which hash."""

    local_window_size: Any = None
    num_sinks: Any = 0
    scale: float | None = None
    logits_soft_cap: float | None = None
    implementation: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _freeze(getattr(self, field.name)))

    def keywords(self) -> dict[str, Any]:
        """The options as the op takes them."""
        window = self.local_window_size
        window = tuple(map(_thaw, window)) if isinstance(window, tuple) else window
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return options | dict(local_window_size=window, num_sinks=_thaw(self.num_sinks))


def _freeze(x: Any) -> Any:
    """Arrays and sequences as tuples, NumPy scalars as Python's; the rest as it is, for the op to judge."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        x = np.asarray(x).tolist()
    return tuple(map(_freeze, x)) if isinstance(x, list | tuple) else x


def _thaw(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, tuple) else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Everything about self-attention but its parameters. Made by `make_config`, which checks it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    out_features: int
    selector: Selector
    is_causal: bool
    rotary_theta: float | None
    options: OpOptions

    def projections(self) -> dict[str, tuple[int, int]]:
        """Heads and features per head of the projections of the input, by the name of their parameters."""
        return dict(
            query=(self.num_heads, self.head_dim),
            key=(self.num_kv_heads, self.head_dim),
            value=(self.num_kv_heads, self.value_head_dim),
        )


def make_config(
    in_features: int,
    *,
    num_heads: int,
    num_kv_heads: int | None,
    head_dim: int | None,
    value_head_dim: int | None,
    out_features: int | None,
    selector: Selector | None,
    is_causal: bool,
    rotary_theta: float | None,
    local_window_size: Window | None,
    num_sinks: int | jax.Array,
    scale: float | None,
    logits_soft_cap: float | None,
    implementation: str | Sequence[str] | None,
) -> AttentionConfig:
    """Fills in the defaults and checks; `ValueError` names the argument. The op checks its own options when it is called."""
    _check_sizes(in_features=in_features, num_heads=num_heads)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if head_dim is None:
        needed = f"a divisor of the {in_features} input features, unless `head_dim` is given"
        require(in_features % num_heads == 0, "num_heads", num_heads, needed)
        head_dim = in_features // num_heads
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    out_features = in_features if out_features is None else out_features
    _check_sizes(num_kv_heads=num_kv_heads, head_dim=head_dim, value_head_dim=value_head_dim, out_features=out_features)
    require(num_heads % num_kv_heads == 0, "num_kv_heads", num_kv_heads, f"a divisor of num_heads, {num_heads}")
    _check_rotary(rotary_theta, head_dim)
    require(isinstance(is_causal, bool), "is_causal", is_causal, "a bool")
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        out_features=out_features,
        selector=selector_or_dense(selector),
        is_causal=is_causal,
        rotary_theta=rotary_theta,
        options=OpOptions(
            local_window_size=local_window_size,
            num_sinks=num_sinks,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            implementation=implementation,
        ),
    )


def selector_or_dense(selector: Selector | None) -> Selector:
    """No selector is every block: dense attention."""
    if selector is None:
        return Dense()
    require(callable(selector), "selector", selector, "callable, as those in `sparse_attn_jax.selectors`, or None")
    return selector


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        is_int = isinstance(size, numbers.Integral) and not isinstance(size, bool)
        require(is_int and size >= 1, name, size, "an int of at least 1")


def _check_rotary(theta: Any, head_dim: int) -> None:
    if theta is None:
        return
    is_number = isinstance(theta, numbers.Real) and not isinstance(theta, bool)
    require(is_number and 0 < theta < math.inf, "rotary_theta", theta, "a positive number or None")
    require(head_dim % 2 == 0, "head_dim", head_dim, "even: `rotary_theta` rotates pairs of features")
