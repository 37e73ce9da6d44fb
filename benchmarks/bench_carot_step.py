"""A whole training step of CaRot on the bundled model, teacher included; as `bench_flyp_step`."""

from __future__ import annotations

from .bench_flyp_step import steps_of

WORK = steps_of("CaRot", "carot_step")


def test_carot_step(race, row):
    race(WORK, row)
