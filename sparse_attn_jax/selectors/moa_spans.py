"""`MoASpans`: leading tokens and a window for each head, whose length is a line in the length of the prompt."""

import dataclasses
import math
import numbers
from typing import ClassVar

import jax

from sparse_attn_jax import selection_checks as checks
from sparse_attn_jax.selection import BlockSelection, num_blocks
from sparse_attn_jax.selectors.head_mix import STREAMING, HeadMix
from sparse_attn_jax.selectors.static_rows import check_call, check_is_causal


@dataclasses.dataclass(frozen=True)
class MoASpans:
    """The elastic rules of MoA (mixture of sparse attention): how many keys a head keeps follows from the prompt's length.

    With N = prompt_len + max_new_tokens, query head h keeps span_h = max(min(floor(alpha_h + beta_h * N), N), min_span) keys,
    rounded up to whole blocks: query i sees key j <= i if j < num_sinks or i - j < span_h - num_sinks.

    Where alpha and beta come from, MoA's profiling of a model, is not part of this. The original applies a span exactly when it
    decodes, and in whole blocks when it reads the prompt; here it is exact in both, so that they agree.

    Attributes:
      alpha: tokens, for each query head.
      beta: tokens per token, for each query head.
      max_new_tokens: how many tokens may follow the prompt.
      num_sinks: leading tokens that all heads keep, as part of their spans.
      block_size: spans are whole multiples of it, and so many tokens are a block of the lists.
      min_span: no span is shorter; longer than `num_sinks`.
    """

    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    max_new_tokens: int = 1024
    num_sinks: int = 64
    block_size: int = 64
    min_span: int = 128

    causal_safe: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("alpha", "beta"):
            values = getattr(self, name)
            is_tuple = isinstance(values, tuple) and len(values) > 0
            if not is_tuple or not all(isinstance(x, numbers.Real) and math.isfinite(x) for x in values):
                raise ValueError(f"`{name}` is {values!r}; it must be a tuple with a finite number for each query head.")
        if len(self.alpha) != len(self.beta):
            raise ValueError(f"`alpha` has {len(self.alpha)} entries and `beta` has {len(self.beta)}; they must be equal.")
        checks.check_int("max_new_tokens", self.max_new_tokens, 0)
        checks.check_int("num_sinks", self.num_sinks, 0)
        checks.check_int("block_size", self.block_size, 1)
        checks.check_int("min_span", self.min_span, self.num_sinks + 1)

    def spans(self, prompt_len: int) -> tuple[int, ...]:
        """Keys that each query head keeps for a prompt of `prompt_len` tokens, sinks included."""
        checks.check_length("prompt_len", prompt_len)
        longest = prompt_len + self.max_new_tokens
        spans = (int(alpha + beta * longest) for alpha, beta in zip(self.alpha, self.beta, strict=True))
        spans = (max(min(span, longest), self.min_span) for span in spans)
        return tuple(num_blocks(span, self.block_size) * self.block_size for span in spans)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        is_causal: bool = False,
        q_offset: int | jax.Array | None = None,
        prompt_len: int | None = None,
    ) -> BlockSelection:
        """Selects for one call; the arguments are those of the attention op, and only the shapes and `q_offset` are read.

        Args:
          query: [batch, q_len, num_q_heads, head_dim].
          key: [batch, kv_len, num_kv_heads, head_dim].
          is_causal: must be True, here and in the op: the pattern looks back only.
          q_offset: absolute position of query 0; `None` is kv_len - q_len.
          prompt_len: the length from which spans follow, an int. Decoding, and a prompt read in chunks, must give it, for spans
            to stay the same. `None` is kv_len: this call reads the whole prompt.

        Returns:
          A `BlockSelection` with a list per `block_size` queries, exact to the token by a `WindowPredicate`: as that of
          `HeadMix` with heads that all stream.

        Raises:
          ValueError: an argument is wrong, or the call has not as many query heads as `alpha` has entries.
        """
        check_call(query, key, is_causal, q_offset)
        check_is_causal("MoASpans", is_causal)
        if query.shape[2] != len(self.alpha):
            raise ValueError(f"`query` has {query.shape[2]} heads; `alpha` is for {len(self.alpha)}.")
        num_local = tuple(span - self.num_sinks for span in self.spans(key.shape[1] if prompt_len is None else prompt_len))
        mix = HeadMix((STREAMING,) * len(num_local), self.num_sinks, num_local, unit="token", block_size=self.block_size)
        return mix(query, key, is_causal=True, q_offset=q_offset)
