"""`MoASpans` against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from static_patterns import assert_no_list_repeats, assert_same_in_chunks, select, shapes_of

import sparse_attn_jax as sa
from sparse_attn_jax.selectors.moa_spans import MoASpans
from sparse_attn_jax.testing.methods import moa_spans as definition

# The slopes and the extremes of the rules that MoA found for vicuna-7b.
ALPHA, BETA = (0, -1024, 1024, 2048, 0, 0, 100), (0.125, 1.0, 0.125, 0.0, 0.875, 2.0, 0.3)
SMALL = MoASpans((0, -20, 10, 5), (0.25, 1.0, 0.3, 0.0), max_new_tokens=10, num_sinks=3, block_size=8, min_span=9)


@pytest.mark.parametrize("prompt_len", [0, 1, 100, 1000, 4095, 4096, 4097, 20000])
def test_spans_are_the_definition(prompt_len):
    expected = [definition.span(a, b, prompt_len, 1024, 128, 64) for a, b in zip(ALPHA, BETA, strict=True)]
    assert list(MoASpans(ALPHA, BETA).spans(prompt_len)) == expected
    assert min(expected) >= 128 and all(span % 64 == 0 for span in expected)


def test_spans_at_a_length():
    assert MoASpans(ALPHA, BETA).spans(3072) == (512, 3072, 1536, 2048, 3584, 4096, 1344)
    assert MoASpans((0.0,), (0.5,), max_new_tokens=0, block_size=16, min_span=100).spans(300) == (160,)


@pytest.mark.parametrize("q_offset, prompt_len", [(None, None), (None, 40), (21, 75), (13, 0)], ids=str)
def test_mask_is_the_definition(q_offset, prompt_len):
    selection, found = select(SMALL, 43, 75, q_offset=q_offset, more=dict(prompt_len=prompt_len))
    assert selection.q_block_size == selection.kv_block_size == 8
    assert_no_list_repeats(selection, 75)
    spans = SMALL.spans(75 if prompt_len is None else prompt_len)
    offset = 32 if q_offset is None else q_offset
    np.testing.assert_array_equal(found[0], definition.mask(spans, offset, 43, 75, 3))
    for wrong in (dict(num_sinks=4), dict(spans=[span + 1 for span in spans])):
        arguments = dict(spans=spans, offset=offset, q_len=43, kv_len=75, num_sinks=3) | wrong
        assert (found[0] != definition.mask(**arguments)).any()


def test_decoding_sees_what_the_prompt_decided():
    assert_same_in_chunks(SMALL, 100, (0, 1, 49, 99), more=dict(prompt_len=70))


def test_no_implementation_refuses_it_for_its_predicate():
    (query, key), (selection, _) = shapes_of(16, 64), select(SMALL, 16, 64)
    explanation = sa.explain(query, key, key, selection, is_causal=True)
    assert not any("predicate" in reason for reasons in explanation.reasons.values() for reason in reasons)


BAD = [
    (dict(alpha=[0.0]), r"`alpha` is \[0.0\]; it must be a tuple"),
    (dict(alpha=()), r"`alpha` is \(\)"),
    (dict(beta=(float("nan"),)), r"`beta` is \(nan,\)"),
    (dict(beta=(0.1, 0.2)), "`alpha` has 1 entries and `beta` has 2"),
    (dict(max_new_tokens=-1), "`max_new_tokens` is -1"),
    (dict(num_sinks=-1), "`num_sinks` is -1"),
    (dict(block_size=0), "`block_size` is 0"),
    (dict(min_span=64), "`min_span` is 64; it must be an int of at least 65"),
]


@pytest.mark.parametrize("options, message", BAD, ids=lambda x: str(x))
def test_bad_field_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MoASpans(**(dict(alpha=(0.0,), beta=(0.5,)) | options))


def test_bad_call_is_refused_by_name():
    query, key = shapes_of(4, 4)
    for options, message in (
        (dict(), "`is_causal` is False; the pattern of MoASpans looks back only"),
        (dict(is_causal=True, prompt_len=-1), "`prompt_len` is -1"),
        (dict(is_causal=True, prompt_len=jnp.int32(4)), "`prompt_len`"),
        (dict(is_causal=True, q_offset=0.5), "`q_offset`"),
    ):
        with pytest.raises(ValueError, match=message):
            SMALL(query, key, **options)
    with pytest.raises(ValueError, match="`query` has 4 heads; `alpha` is for 7"):
        MoASpans(ALPHA, BETA)(query, key, is_causal=True)
