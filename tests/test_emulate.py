"""Kernels under emulators: what a harness prints is read, and one wrong number is seen."""

from __future__ import annotations

import math

import pytest

from benchmarks import emulate

PRINTED = """kernels portable, vectors of 16 bytes
exp_values/f32 float32 2
00000001 3f800000
tile/f64,3.rows float64 2
3ff0000000000000 7ff8000000000000
sums/bf16,1 bfloat16 1
3f80
points/f32 int32 1
ffffffff
end
"""


def test_equal_harnesses_differ_by_nothing():
    numbers = emulate.parsed(PRINTED, "one")
    assert numbers["points/f32"][1].tolist() == [-1] and numbers["sums/bf16,1"][1].tolist() == [1.0]
    assert emulate.compared(numbers, numbers) == dict.fromkeys(
        ("exp_values f32", "tile f64", "sums bf16", "points f32"), 0.0
    )


@pytest.mark.parametrize(
    ("this", "that", "kernel", "roundings"),
    [
        ("3f800000", "3f800001", "exp_values f32", 2.0),  # one unit in the last place
        ("3ff0000000000000", "3ff0000000000004", "tile f64", 8.0),
        ("3f80\n", "3f81\n", "sums bf16", 2.0),
        ("7ff8000000000000", "7ff0000000000000", "tile f64", math.inf),  # infinity for NaN
        ("ffffffff", "00000000", "points f32", math.inf),
    ],
)
def test_a_number_that_differs_is_told_in_roundings(this, that, kernel, roundings):
    other = emulate.parsed(PRINTED.replace(this, that), "other")
    found = emulate.compared(emulate.parsed(PRINTED, "one"), other)
    assert found.pop(kernel) == roundings and set(found.values()) == {0.0}


def test_small_exponentials_are_compared_by_their_own_size():
    other = emulate.parsed(PRINTED.replace("00000001 ", "00800001 "), "other")
    assert emulate.compared(emulate.parsed(PRINTED, "one"), other)["exp_values f32"] > emulate.LIMIT


@pytest.mark.parametrize("end", ["end\n", "ffffffff\nend\n"])
def test_a_harness_that_stopped_is_an_error(end):
    with pytest.raises(ValueError, match="one: the harness stopped"):
        emulate.parsed(PRINTED.removesuffix(end), "one")
