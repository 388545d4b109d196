"""The static description of one attention call, and the arrays that go with it."""

import dataclasses
from typing import Any, NamedTuple

import jax

# Dtypes of query, key and value. Softmax statistics are float32, or float64 for float64 inputs.
SUPPORTED_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Positions and block ids are int32; sums of two of them must be as well.
MAX_LENGTH = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention call without its array values: shapes, dtypes, options and platform. Hashable.

    Packed (varlen) calls reach an implementation as one batch row whose sequences are told apart by segment ids and whose
    positions count within each sequence; `varlen` says so.
    """

    batch: int
    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str
    q_block_size: int
    kv_block_size: int
    num_slots: int
    selection_heads: int
    scale: float
    logits_soft_cap: float | None = None
    is_causal: bool = False
    has_window: bool = False
    has_sinks: bool = False
    has_segment_ids: bool = False
    has_key_bias: bool = False
    predicate: str | None = None  # the predicate's type name
    varlen: bool = False
    platform: str = "cpu"
    compute_capability: str | None = None
    device_kind: str | None = None

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.q_block_size)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.kv_block_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The differentiable inputs of the op."""

    query: jax.Array  # [batch, q_len, num_q_heads, head_dim]
    key: jax.Array  # [batch, kv_len, num_kv_heads, head_dim]
    value: jax.Array  # [batch, kv_len, num_kv_heads, value_head_dim]
    key_bias: jax.Array | None = None  # [batch, num_kv_heads, kv_len]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenMask:
    """What is visible inside the selected blocks. `None` is an option that is off.

    Positions are absolute and count within each sequence: `q_offset` is already in `q_positions`.
    """

    q_positions: jax.Array  # int32 [batch or 1, q_len]
    kv_positions: jax.Array  # int32 [1, kv_len]
    q_segments: jax.Array | None = None  # int32 [batch, q_len]
    kv_segments: jax.Array | None = None  # int32 [batch, kv_len]
    window_left: jax.Array | None = None  # int32 [num_q_heads]
    window_right: jax.Array | None = None  # int32 [num_q_heads]
    num_sinks: jax.Array | None = None  # int32 [num_q_heads]
    predicate: Any = None  # callable pytree (batch, head, q_position, kv_position) -> bool


# Of GPUs for which there are kernels, by a word of the name of a kind of device.
COMPUTE_CAPABILITIES = {"A100": "8.0", "H100": "9.0", "H200": "9.0", "H800": "9.0", "H20": "9.0", "GH200": "9.0"}


class Device(NamedTuple):
    """What a problem says of the device that will run it."""

    platform: str
    compute_capability: str | None
    device_kind: str


def device_of(x: Any) -> Device:
    """The device of a concrete array; else that of the context's mesh, or the default device.

    The mesh of `jax.set_mesh` may be one of GPUs that are not here, for which a program is compiled.
    """
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    if not concrete and wanted is not None:
        here = jax.local_devices()[0]
        if wanted.device_kind == here.device_kind:
            return Device(here.platform, getattr(here, "compute_capability", None), here.device_kind)
        words = wanted.device_kind.replace("-", " ").split()
        found = (capability for word, capability in COMPUTE_CAPABILITIES.items() if word in words)
        platform = "gpu" if wanted.platform == "cuda" else wanted.platform
        return Device(platform, next(found, None), wanted.device_kind)
    device = next(iter(x.devices())) if concrete else jax.config.jax_default_device
    if not isinstance(device, jax.Device):
        device = jax.local_devices()[0]
    return Device(device.platform, getattr(device, "compute_capability", None), device.device_kind)
