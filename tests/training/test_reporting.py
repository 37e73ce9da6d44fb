"""What a run reports while it is under way, to whom, and that it ends with the run."""

from __future__ import annotations

import json
import signal
import sys
import types

import pytest
import torch
from test_fit import TOTAL, Stop, before_update, make, run, stop
from test_validation import held_out

from robustft.methods import FineTune
from robustft.training import reporter
from robustft.training.reporting import REPORTERS

RECORDS = [
    {"step": 1, "epoch": 1, "loss": 2.0, "gradient_norm": None},
    {"step": 2, "epoch": 1, "loss": 1.0, "gradient_norm": 0.5},
    {"step": 2, "epoch": 1, "validation_accuracy": 0.25},
]


class Taken(list):
    """Records, and how often it was closed."""

    closings = 0

    def __call__(self, record):
        assert not self.closings
        self.append(record)

    def close(self):
        self.closings += 1


def test_records_are_the_metrics_with_what_differs_from_run_to_run_beside_them(tmp_path):
    taken = Taken()
    history = run(make(FineTune), tmp_path, on_record=taken, validation=held_out())
    moving = {"samples_per_second", "peak_memory"}
    assert [{k: v for k, v in record.items() if k not in moving} for record in taken] == history.records
    steps = [record for record in taken if "loss" in record]
    assert len(steps) < len(taken) and [record for record in taken if moving & record.keys()] == steps
    assert all(record["peak_memory"] > 1e7 and record["samples_per_second"] > 0 for record in steps)
    assert not any(moving & json.loads(line).keys() for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert taken.closings == 1


def test_throughput_counts_samples_and_leaves_validation_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds
        return 0.0

    taken, method = [], make(FineTune)
    original = method.step
    method.step = lambda batch: (pass_time(2.0), original(batch))[1]
    options = {"metric": lambda outputs: pass_time(1000.0), "higher_is_better": True, "validate_every": 1 / 3}
    run(method, on_record=taken.append, validation=held_out(), **options)
    assert [record["samples_per_second"] for record in taken if "loss" in record] == [8 / 2.0] * 6


@pytest.mark.parametrize("when", ["arguments", "error", "interrupt"])
def test_whoever_takes_records_is_closed_however_the_run_ends(when):
    taken = Taken()
    action = {"error": stop, "interrupt": lambda: signal.raise_signal(signal.SIGINT)}.get(when, int)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ends = {"arguments": ValueError, "error": Stop, "interrupt": KeyboardInterrupt}
        with pytest.raises(ends[when]):
            run(before_update(make(FineTune), 4, action), on_record=taken, epochs=0 if when == "arguments" else 3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert taken.closings == 1


def test_json_lines_are_the_records_and_a_second_run_adds_its_own(tmp_path):
    for _ in range(2):
        lines = reporter("jsonl", tmp_path / "new", {"lr": 0.1})
        for record in RECORDS:
            lines(record)
        lines.close()
    found = [json.loads(line) for line in (tmp_path / "new" / "records.jsonl").read_text().splitlines()]
    assert found == [{"config": {"lr": 0.1}}, *RECORDS] * 2


@pytest.mark.exhaustive  # its imports take seconds
def test_tensorboard_reads_what_was_reported(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(make(FineTune), on_record=reporter("tensorboard", tmp_path, {"lr": 0.1}), validation=held_out())
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"loss", "lr", "cross_entropy", "validation_nll", "samples_per_second", "peak_memory"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 4, 6, 8, TOTAL]
    assert tags["tensors"] == ["config/text_summary"]


class Recorder(types.ModuleType):
    """A module whose functions, and the objects that they give, write down how they were called."""

    def __init__(self, name, calls):
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments, **options):
            self.calls.append((name, arguments, options))
            return None if name.startswith("get_") else Recorder(name, self.calls)

        if name in ("info", "run_id"):
            return self if name == "info" else "7"
        return called


def reported(monkeypatch, kind, folder):
    calls = []
    monkeypatch.setitem(sys.modules, kind, Recorder(kind, calls))
    taker = reporter(kind, folder, {"lr": 0.1, "method": {"seed": 3, "kind": torch.float32}})
    for record in RECORDS:
        taker(record)
    taker.close()
    return calls


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_run_elsewhere_gets_the_configuration_and_all_that_is_known_by_step(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    calls = reported(monkeypatch, kind, tmp_path / "photos")
    (_, _, begun), *logged, finished = calls
    assert (begun["project"], begun["name"]) == ("robustft", "photos")
    assert begun["config"] == {"lr": 0.1, "method": {"seed": 3, "kind": "torch.float32"}}
    known = [{"epoch": 1, "loss": 2.0}, {"epoch": 1, "loss": 1.0, "gradient_norm": 0.5}]
    known.append({"epoch": 1, "validation_accuracy": 0.25})
    assert logged == [("log", (values,), {"step": step}) for values, step in zip(known, (1, 2, 2), strict=True)]
    assert finished == ("finish", (), {})


def test_mlflow_gets_flat_parameters_and_metrics_by_step(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    calls = reported(monkeypatch, "mlflow", tmp_path / "photos")
    assert calls[0] == ("MlflowClient", (), {"tracking_uri": f"sqlite:///{tmp_path / 'photos' / 'mlflow.db'}"})
    assert [name for name, *_ in calls[1:4]] == ["get_experiment_by_name", "create_experiment", "create_run"]
    parameters = {arguments[1:] for name, arguments, _ in calls if name == "log_param"}
    assert parameters == {("lr", "0.1"), ("method.seed", "3"), ("method.kind", "torch.float32")}
    metrics = [(arguments[1:], options["step"]) for name, arguments, options in calls if name == "log_metric"]
    assert (("loss", 1.0), 2) in metrics and (("validation_accuracy", 0.25), 2) in metrics and len(metrics) == 7
    assert calls[-1][0] == "set_terminated"


@pytest.mark.parametrize("kind", sorted(REPORTERS.keys() - {"jsonl"}))
def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ImportError, match=rf"{kind} is not installed.*pip install 'robustft\[{kind}\]'"):
        reporter(kind, tmp_path)


def test_an_unknown_reporter_is_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="must be one of 'tensorboard', .*'jsonl', got 'paper'"):
        reporter("paper", tmp_path)
