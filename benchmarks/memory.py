"""What forward+backward at long context takes, from the compiler's analysis: nothing is run, no array is made.

    python -m benchmarks.memory

compiles attention with per-token lists for 32,768, 65,536 and 131,072 tokens, 32 query and 2 KV heads of dimension 128 in
bfloat16, 64 blocks of 64 per token, and prints the temporaries that XLA allocates, and how they grow.
"""

import jax
import jax.numpy as jnp
from absl import app

import sparse_attn_jax as sa
from benchmarks import machine, progress, report

LENGTHS = (32_768, 65_536, 131_072)
GIBIBYTE = 2**30


def analyze(
    q_len: int,
    *,
    num_q_heads: int = 32,
    num_kv_heads: int = 2,
    head_dim: int = 128,
    num_slots: int = 64,
    block_size: int = 64,
    dtype: str = "bfloat16",
    implementation: str = "xla",
) -> dict[str, int]:
    """Sizes in bytes for one causal sequence with a list per token: temporaries, results (out and gradients), arguments."""

    def forward_backward(query, key, value, indices, d_out):
        selection = sa.BlockSelection(indices, q_block_size=1, kv_block_size=block_size)

        def attend(query, key, value):
            options = dict(is_causal=True, implementation=implementation)
            return sa.block_sparse_attention(query, key, value, selection, **options)

        out, pull_back = jax.vjp(attend, query, key, value)
        return out, pull_back(d_out)

    query = jax.ShapeDtypeStruct((1, q_len, num_q_heads, head_dim), jnp.dtype(dtype))
    key = jax.ShapeDtypeStruct((1, q_len, num_kv_heads, head_dim), jnp.dtype(dtype))
    indices = jax.ShapeDtypeStruct((1, num_kv_heads, q_len, num_slots), jnp.int32)
    analysis = jax.jit(forward_backward).lower(query, key, key, indices, query).compile().memory_analysis()
    names = dict(temporary="temp_size_in_bytes", results="output_size_in_bytes", arguments="argument_size_in_bytes")
    return dict(q_len=q_len) | {f"{name}_bytes": getattr(analysis, field) for name, field in names.items()}


def analyze_all(lengths=LENGTHS, **sizes) -> list[dict[str, int]]:
    found = []
    for length in lengths:
        progress.say(f"compiling forward+backward for {length:,} tokens")
        found.append(analyze(length, **sizes))
    return found


def format_memory(found: list[dict[str, int]]) -> str:
    """A table with the growth of the temporaries from line to line; linear is the growth of the length."""
    header = ["tokens", "temporaries GiB", "results GiB", "arguments GiB", "temporaries grow by"]
    cells = []
    for before, now in zip([None, *found], found):
        sizes = [f"{now[f'{name}_bytes'] / GIBIBYTE:.3f}" for name in ("temporary", "results", "arguments")]
        growth = "" if before is None else f"{now['temporary_bytes'] / max(1, before['temporary_bytes']):.2f}x"
        cells.append([f"{now['q_len']:,}", *sizes, growth])
    return report.format_table(header, cells)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    print(machine.headline(machine.describe(), 0))
    print(f"\n{__doc__.splitlines()[0]}\n\n{format_memory(analyze_all())}")


if __name__ == "__main__":
    app.run(main)
