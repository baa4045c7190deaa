"""Every candidate of ``python -m bench.tune`` is a launch that gives the oracle's result, in the interpreter."""

from __future__ import annotations

import dataclasses

import pytest

from bench import knobs, tune
from bench.cases import Case

SMALL = {
    "token_logprobs": (1, 36_000),
    "kl_divergence": (1, 36_000),
    "gae": (1, 2_100),
    "vtrace": (1, 600),
    "group_advantages": (300,),
    "process_advantages": (8, 300),
    "linear_policy_loss": (12, 16, 300),
}
# A cap on registers is the assembler's: tests/test_triton_aot.py compiles with one.
OF_TRITON = [knob for knob in knobs.knobs() if knob.group in ("launches", "constants")]


def small(case: Case) -> Case:
    """Few rows, each cut as the launch tables cut long ones."""
    shape = SMALL.get(case.op, (3, 3_000))
    if shape == (1, 36_000) and case.dtype.itemsize == 4:  # its blocks are half as wide
        shape = (1, 18_000)
    return dataclasses.replace(case, shape=shape)


def clock(steps, repeatable, device):
    return lambda: 1.0, "not at all"


@pytest.mark.parametrize("knob", OF_TRITON, ids=lambda knob: knob.name.replace(" ", "_"))
def test_every_candidate_is_right(knob):
    before = knob.now()
    for call in {case.call: case for case in knob.cases}.values():
        record = tune.measure_step(knob, small(call), "cpu", clock, tune.measure.Budget(0.0, 1, 1))
        assert [r["status"] for r in record["results"]] == ["ok"] * len(knob.all()), record["results"]
        assert record["now"] == record["results"][0]["candidate"] == knob.label(before)
        if not knob.cut:
            assert all(r["same_bits"] for r in record["results"]), record["results"]
    assert knob.now() == before  # the tables are as they were
