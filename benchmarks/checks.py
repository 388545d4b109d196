"""Whether a contender's result is right: against the definition in float64, on sampled queries where the sizes are large."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import FORWARD_BACKWARD, Contender, Prepared
from benchmarks.selection_check import assert_selection_is_right
from benchmarks.workloads import Workload
from sparse_attn_jax.testing import compare, oracle
from sparse_attn_jax.testing.inputs import Inputs

# Scores that the reference holds at once, in float64: about half a GiB with the arrays beside them.
MAX_REFERENCE_SCORES = 2**22
MIN_SAMPLED_ROWS = 8
MAX_SAMPLED_ROWS = 64
# A baseline may round float32 factors to 10 bits on an accelerator, and 16-bit weights between products.
BASELINE_TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "float16": 2e-2, "bfloat16": 3e-2}


class Checker:
    """Checks contenders on one workload.

    Cotangents are zero except at the sampled queries: then those determine all gradients, and a reference of the size
    sampled queries x keys is exact, for the gradients of all keys too.
    """

    def __init__(self, workload: Workload, made: Inputs, seed: int):
        self.workload, self.made = workload, made
        self.rows = sample_rows(made, seed)
        query = made.operands["query"]
        is_sampled = np.isin(np.arange(query.shape[1]), self.rows)
        self.d_out = made.d_out * jnp.asarray(is_sampled[:, None, None], made.d_out.dtype)
        self.sampled = dataclasses.replace(
            made,
            operands=made.operands | dict(query=query[:, self.rows]),
            d_out=made.d_out[:, self.rows],
            d_lse=made.d_lse[:, self.rows],
        )

    def error_of(self, contender: Contender, prepared: Prepared, mode: str) -> str | None:
        """What is wrong with the contender's results, or `None`."""
        try:
            if contender.computes == "selection":
                assert_selection_is_right(prepared.results(self.d_out)["indices"], self.workload, self.made, self.rows)
            else:
                self.assert_right(contender, jax.device_get(prepared.results(self.d_out)), mode)
        except AssertionError as error:
            return str(error)
        return None

    def assert_right(self, contender: Contender, results: dict, mode: str) -> None:
        """Raises `AssertionError` for a wrong, missing or misshapen result."""
        expected, reference = self.references[contender.computes]()
        wanted = {"out"} | ({name for name in expected if name.startswith("d_")} if mode == FORWARD_BACKWARD else set())
        assert set(results) == wanted, f"results are {sorted(results)}, expected {sorted(wanted)}."
        for name, values in results.items():
            values = np.asarray(values, np.float64)
            if name in ("out", "d_query"):
                shape = self.made.d_out.shape if name == "out" else self.made.operands["query"].shape
                assert values.shape == shape, f"`{name}` has shape {values.shape}, expected {shape}."
                not_sampled = np.delete(values, self.rows, axis=1)
                assert name == "out" or not not_sampled.any(), "`d_query` is not zero where the cotangent is."
                values = values[:, self.rows]
            if contender.kind == "baseline":
                assert_near(name, values, expected[name], BASELINE_TOLERANCE[self.made.dtype])
            else:
                compare.assert_close(name, values, expected[name], reference[name], dtype=self.made.dtype)

    @functools.cached_property
    def references(self):
        """By what a contender computes: a function that gives the definition's and a dense reference's results, kept."""
        return {kind: functools.cache(functools.partial(self.make_references, kind)) for kind in ("selected", "everything")}

    def make_references(self, kind: str) -> tuple[compare.Results, compare.Results]:
        mask = mask_of_rows(self.made, self.rows, is_dense=kind == "everything")
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
