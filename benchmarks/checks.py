"""Whether a contender's result is right: against the definition in float64, on sampled queries where the sizes are large.

Where they are so large that the reference would take minutes, on those of one batch row and KV head.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import FORWARD_BACKWARD, Contender, Prepared
from benchmarks.selection_check import assert_selection_is_right
from benchmarks.workloads import COUNTABLE_OPTIONS, Workload
from sparse_attn_jax.testing import compare, oracle
from sparse_attn_jax.testing.inputs import Inputs

# Scores that the reference holds at once, in float64: about half a GiB with the arrays beside them.
MAX_REFERENCE_SCORES = 2**22
MIN_SAMPLED_ROWS = 8
MAX_SAMPLED_ROWS = 64
# Other queries whose gradient has to be zero, where there are more.
MAX_UNSAMPLED_ROWS = 1024
# A baseline may round float32 factors to 10 bits on an accelerator, and 16-bit weights between products.
BASELINE_TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "float16": 2e-2, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Part:
    """The batch rows and heads that are checked. Arrays are sliced where they are, before they are copied from there."""

    batch: slice
    q_heads: slice
    kv_heads: slice
    title: str | None = None

    def of_queries(self, x):
        """[batch, q_len, num_q_heads, ...]"""
        return x[self.batch, :, self.q_heads]

    def of_keys(self, x):
        """[batch, kv_len, num_kv_heads, ...]"""
        return x[self.batch, :, self.kv_heads]

    def of_lists(self, x):
        """[batch or 1, num_kv_heads or 1, ...]"""
        batch, heads = ([slice(None), part][size > 1] for size, part in zip(x.shape, (self.batch, self.kv_heads)))
        return x[batch, heads]

    def of_inputs(self, made: Inputs) -> Inputs:
        operands = {name: (self.of_queries if name == "query" else self.of_keys)(x) for name, x in made.operands.items()}
        selection = dataclasses.replace(made.selection, indices=self.of_lists(made.selection.indices))
        d_out, d_lse = map(self.of_queries, (made.d_out, made.d_lse))
        return dataclasses.replace(made, operands=operands, selection=selection, d_out=d_out, d_lse=d_lse)


WHOLE = Part(slice(None), slice(None), slice(None))


def choose_part(made: Inputs) -> Part:
    """Everything; or the last batch row and KV head, whose arrays begin where a wrong stride shows most."""
    batch, _, num_q_heads, _ = made.operands["query"].shape
    _, kv_len, num_kv_heads, _ = made.operands["key"].shape
    is_large = MIN_SAMPLED_ROWS * batch * num_q_heads * kv_len > MAX_REFERENCE_SCORES
    # Of other options, and of lists for each query head, all are checked.
    is_plain = set(made.options) <= COUNTABLE_OPTIONS and np.ndim(made.options.get("q_offset", 0)) == 0
    is_plain &= made.selection.predicate is None and "key_bias" not in made.operands
    if not is_large or not is_plain or made.selection.indices.shape[1] not in (1, num_kv_heads):
        return WHOLE
    last = lambda size, count=1: slice(size - count, size)
    title = f"batch row {batch - 1} with KV head {num_kv_heads - 1}"
    return Part(last(batch), last(num_q_heads, num_q_heads // num_kv_heads), last(num_kv_heads), title)


class Checker:
    """Checks contenders on one workload.

    Cotangents are zero except at the sampled queries: then those determine all gradients, and a reference of the size
    sampled queries x keys is exact, for the gradients of all keys too.
    """

    def __init__(self, workload: Workload, made: Inputs, seed: int):
        self.workload, self.made, self.part = workload, made, choose_part(made)
        self.checked = self.part.of_inputs(made)
        self.rows = sample_rows(self.checked, seed)
        batch, q_len, num_q_heads, _ = made.operands["query"].shape
        is_sampled = np.zeros((batch, q_len, num_q_heads, 1), bool)
        self.part.of_queries(is_sampled)[:, self.rows] = True
        self.d_out = made.d_out * jnp.asarray(is_sampled, made.d_out.dtype)
        others = np.delete(np.arange(q_len), self.rows)
        self.other_rows = others[:: max(1, -(-len(others) // MAX_UNSAMPLED_ROWS))]
        self.sampled = dataclasses.replace(
            self.checked,
            operands=self.checked.operands | dict(query=self.checked.operands["query"][:, self.rows]),
            d_out=self.checked.d_out[:, self.rows],
            d_lse=self.checked.d_lse[:, self.rows],
        )

    def error_of(self, contender: Contender, prepared: Prepared, mode: str) -> str | None:
        """What is wrong with the contender's results, or `None`."""
        try:
            if contender.computes == "selection":
                self.assert_selects(prepared)
            else:
                self.assert_right(contender, prepared, mode)
        except AssertionError as error:
            return str(error)
        return None

    def assert_selects(self, prepared: Prepared) -> None:
        """Raises `AssertionError` for a wrong or misshapen selection."""
        indices = prepared.results(self.d_out)["indices"]
        query, key = (self.made.operands[name].shape for name in ("query", "key"))
        shape = (key[0], key[2], query[1], self.workload.selector.top_k)
        assert indices.shape == shape, f"`indices` has shape {indices.shape}, expected {shape}."
        assert_selection_is_right(self.part.of_lists(indices), self.workload, self.checked, self.rows)

    def assert_right(self, contender: Contender, prepared: Prepared, mode: str) -> None:
        """Raises `AssertionError` for a wrong, missing or misshapen result."""
        results = prepared.results(self.d_out)
        expected, reference = self.references[contender.computes]()
        wanted = {"out"} | ({name for name in expected if name.startswith("d_")} if mode == FORWARD_BACKWARD else set())
        assert set(results) == wanted, f"results are {sorted(results)}, expected {sorted(wanted)}."
        fetch = lambda x: np.asarray(prepared.fetch(x), np.float64)
        for name, values in results.items():
            of = self.made.d_out if name == "out" else self.made.operands[name.removeprefix("d_")]
            assert tuple(values.shape) == of.shape, f"`{name}` has shape {tuple(values.shape)}, expected {of.shape}."
            if name in ("out", "d_query"):
                values = self.part.of_queries(values)
                is_zero = name == "out" or not fetch(values[:, self.other_rows]).any()
                assert is_zero, "`d_query` is not zero where the cotangent is."
                values = fetch(values[:, self.rows])
            else:
                values = fetch(self.part.of_keys(values))
            if contender.kind == "baseline":
                assert_near(name, values, expected[name], BASELINE_TOLERANCE[self.made.dtype])
            else:
                compare.assert_close(name, values, expected[name], reference[name], dtype=self.made.dtype)

    @functools.cached_property
    def references(self):
        """By what a contender computes: a function that gives the definition's and a dense reference's results, kept."""
        return {kind: functools.cache(functools.partial(self.make_references, kind)) for kind in ("selected", "everything")}

    def make_references(self, kind: str) -> tuple[compare.Results, compare.Results]:
        mask = mask_of_rows(self.checked, self.rows, is_dense=kind == "everything")
        return compare.oracle_results(self.sampled, mask), compare.reference_results(self.sampled, mask)


def sample_rows(made: Inputs, seed: int) -> np.ndarray:
    """Ascending query positions, the first and the last among them; all if they are few enough."""
    batch, q_len, num_q_heads, _ = made.operands["query"].shape
    count = MAX_REFERENCE_SCORES // (batch * num_q_heads * made.operands["key"].shape[1])
    if count >= q_len:
        return np.arange(q_len)
    count = min(q_len, max(MIN_SAMPLED_ROWS, min(count, MAX_SAMPLED_ROWS)))
    inner = np.random.default_rng(seed).choice(np.arange(1, q_len - 1), count - 2, replace=False)
    return np.sort(np.concatenate([[0], inner, [q_len - 1]]))


def mask_of_rows(made: Inputs, rows: np.ndarray, is_dense: bool) -> np.ndarray:
    """The oracle's mask for some queries, never larger than they need: bool [batch, num_q_heads, rows, kv_len]."""
    batch, q_len, num_q_heads, _ = made.operands["query"].shape
    kv_len, selection = made.operands["key"].shape[1], made.selection
    indices, q_block_size = np.asarray(selection.indices), selection.q_block_size
    if is_dense:
        num_kv_blocks = -(-kv_len // selection.kv_block_size)
        indices, q_block_size = np.arange(num_kv_blocks)[None, None, None], q_len
    options = {name: x for name, x in made.options.items() if name not in ("scale", "logits_soft_cap")}
    offset = np.asarray(options.pop("q_offset", kv_len - q_len))
    q_segments = options.pop("query_segment_ids", None)
    sizes = dict(batch=batch, num_q_heads=num_q_heads, kv_len=kv_len, kv_block_size=selection.kv_block_size)

    def mask_of_row(row):
        segments = None if q_segments is None else np.asarray(q_segments)[:, row : row + 1]
        lists = indices[:, :, row // q_block_size][:, :, None]
        changed = dict(q_len=1, q_block_size=1, q_offset=offset + row, query_segment_ids=segments)
        predicate = None if is_dense else selection.predicate
        return oracle.attention_mask(lists, **sizes, **changed, **options, predicate=predicate)

    return np.concatenate([mask_of_row(row) for row in rows], axis=2)


def assert_near(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Raises `AssertionError` unless the root mean square of the error is below `tolerance` times that of the values."""
    assert actual.shape == expected.shape, f"`{name}` has shape {actual.shape}, expected {expected.shape}."
    size = compare.root_mean_square(expected)
    error = compare.root_mean_square(actual - expected)
    allowed = tolerance * size
    assert error <= allowed, f"`{name}` has RMS error {error:.3g}, allowed {allowed:.3g} (size {size:.3g})."
