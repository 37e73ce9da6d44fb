"""What several processes measure together, and keep, is what one does."""

from __future__ import annotations

import processes
import pytest
import test_own_images

from robustft.pipeline import kept
from robustft.pipeline.evaluating import evaluate_runs

pytestmark = pytest.mark.exhaustive
own = test_own_images.own  # fixtures of this file's tests, too
by_process = processes.by_process


def measured(rank, photos, model, cache, goes_on=""):
    """In chunks of 16 images; with `goes_on`, it is a mistake that one is not in the folder yet."""
    kept.CHUNK = 16
    if goes_on:
        kept.predict_each = None
    told = []
    settings = {"model": model, "cache": cache, "batch_size": 8, "score": "energy", "log": told.append}
    found = evaluate_runs(photos, **settings, workers=0, progress=False)
    zero_shot = found.models["zero-shot"]
    return {"spoke": bool(told), "numbers": [zero_shot.id_accuracy, zero_shot.id.calibration.nll, zero_shot.auroc]}


def test_processes_keep_the_bytes_that_one_keeps(own, by_process, tmp_path, monkeypatch):
    told = str(own / "photos"), f"local-dir:{own / 'clip'}"
    monkeypatch.setattr(kept, "CHUNK", 16)
    alone = measured(0, *told, tmp_path / "one")
    both = by_process(2, measured, *told, tmp_path / "two")
    assert [one["numbers"] for one in both] == 2 * [alone["numbers"]]
    assert alone["spoke"] and [one["spoke"] for one in both] == [True, False]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and sum(name.startswith("outputs-") for name in files[0]) == 2 + 2 + 1
    again = by_process(2, measured, *told, tmp_path / "one", "goes on")
    assert [one["numbers"] for one in again] == 2 * [alone["numbers"]]
