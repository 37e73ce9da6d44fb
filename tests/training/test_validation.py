"""Validation in a run: it changes nothing in the training, keeps what was best, ends what gets no better, resumes."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from targets import exhaustive
from test_fit import EPOCHS, TOTAL, Noisy, Stop, assert_same, before_update, data, make, run, stop

from robustft.evaluation import evaluate, worst_group_accuracy
from robustft.methods import FLYP, FineTune, LinearProbe, Step
from robustft.training.checkpoint import load_checkpoint
from robustft.training.loop import fit
from robustft.training.validation import Validation


def held_out():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 3, 8, 8, generator=generator), torch.arange(20) % 3


def state(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def planned(method, values):
    """A metric of these values, one a validation, and the states that it was called at."""
    states, left = [], iter(values)

    def plan(outputs):
        states.append(state(method))
        return next(left)

    return plan, states


class Drawing(torch.utils.data.Dataset):
    """A validation set that draws from all three global generators."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        images, labels = held_out()
        return images[index] + torch.randn(3, 8, 8) + float(np.random.rand()) + random.random(), int(labels[index])


@pytest.mark.parametrize("workers", [0, *exhaustive(1)])
def test_training_is_the_same_in_every_bit_with_validation_and_without(workers):
    plain, watched = (make(FLYP, dropout=0.5, total_steps=None) for _ in range(2))
    expected = run(plain, data=Noisy(), epochs=1, workers=workers)
    options = {"validation": Drawing(), "validate_every": 1 / 3, "restore_best": False}
    found = run(watched, data=Noisy(), epochs=1, workers=workers, **options)
    assert same(state(watched), state(plain))
    assert [record for record in found.records if "loss" in record] == expected.records
    assert len(found.validations) == 3


def test_what_a_method_draws_from_global_generators_is_the_same_with_validation_and_without():
    class Drawn(FineTune):
        def step(self, batch):
            out = super().step(batch)
            return Step(out.loss * (1 + np.random.rand() + random.random()), out.terms)

    methods = []
    for options in ({}, {"validation": Drawing(), "validate_every": 1 / 3, "restore_best": False}):
        np.random.seed(3)
        random.seed(3)
        methods.append(make(Drawn, total_steps=None))
        run(methods[-1], epochs=1, **options)
    assert same(state(methods[0]), state(methods[1]))


@pytest.mark.parametrize(
    "every, steps",
    [(0.5, [2, 4, 6, 8, 9]), *exhaustive((1, [3, 6, 9]), (2, [6, 9]), (1 / 3, [*range(1, 10)]))],
)
def test_validation_comes_after_so_many_epochs_or_parts_of_one_and_in_the_end(every, steps):
    history = run(make(FineTune), validation=held_out(), validate_every=every)
    assert [record["step"] for record in history.validations] == steps
    assert [record["epoch"] for record in history.validations] == [math.ceil(step / 3) for step in steps]


def test_measures_are_those_of_evaluate():
    method, images = make(FineTune), held_out()
    history = run(method, validation=images, restore_best=False)
    expected = evaluate({"it": method.classifier()}, id=images).models["it"].id
    last = history.validations[-1]
    assert "validation_worst_group" not in last
    assert last["validation_accuracy"] == expected.calibration.accuracy
    report = expected.calibration
    assert (last["validation_ece"], last["validation_nll"]) == (report.ece, report.nll)


@pytest.mark.parametrize("kept", ["disk", *exhaustive("memory")])
@pytest.mark.parametrize("higher, best", [(False, 3), *exhaustive((True, 2))])
def test_the_method_holds_the_best_weights_in_the_end(tmp_path, kept, higher, best):
    method = make(FineTune)
    metric, states = planned(method, values := [0.5, 0.9, 0.2, 0.9, 0.3])
    options = {"metric": metric, "higher_is_better": higher, "output": tmp_path if kept == "disk" else None}
    history = run(method, validation=held_out(), validate_every=2 / 3, **options)
    assert history.best == (best * 2, values[best - 1]) and not history.stopped_early
    assert same(state(method), states[best - 1]) and not same(states[-1], states[best - 1])
    if kept == "disk":
        found = load_checkpoint(tmp_path / "checkpoints" / "best" / f"step_{best * 2:08d}")
        assert found.meta["measures"]["validation_plan"] == history.best.value
        assert {name.removeprefix("method.") for name in found.tensors} == states[0].keys()


def test_the_last_weights_stay_if_the_best_are_not_asked_for():
    method, plain = (make(FineTune, total_steps=None) for _ in range(2))
    run(plain, epochs=1)
    metric, _ = planned(method, [3.0, 2.0, 1.0])
    options = {"metric": metric, "higher_is_better": True, "validate_every": 1 / 3, "restore_best": False}
    history = run(method, validation=held_out(), epochs=1, **options)
    assert history.best == (1, 3.0) and same(state(method), state(plain))


def test_patience_ends_a_run_and_equal_values_are_no_better():
    method = make(FineTune)
    metric, states = planned(method, [1.0, 2.0, 2.0, 1.5])
    history = run(method, validation=held_out(), metric=metric, higher_is_better=True, validate_every=1 / 3, patience=2)
    assert history.stopped_early and history.steps == 4 and history.best == (2, 2.0)
    assert same(state(method), states[1])
    options = {"metric": constant, "higher_is_better": True, "validate_every": 1 / 3, "patience": 2}
    whole = run(make(FineTune, total_steps=None), validation=held_out(), epochs=1, **options)
    assert whole.steps == 3 and not whole.stopped_early  # nothing was left to do


OPTIONS = {"validation": held_out(), "metric": "nll", "validate_every": 1 / 3}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """A run with a validation after each step that nothing ever stopped."""
    method, output = make(FineTune), tmp_path_factory.mktemp("unstopped")
    return method, output, run(method, output, **OPTIONS)


def assert_same_run(method, output, history, expected):
    reference, reference_output, whole = expected
    assert history.records == whole.records
    assert (history.best, history.steps, history.stopped_early) == (whole.best, whole.steps, whole.stopped_early)
    assert_same(method, output, reference, reference_output)
    ours, theirs = (
        folder / "checkpoints" / "best" / f"step_{whole.best.step:08d}" for folder in (output, reference_output)
    )
    for name in ("state.safetensors", "state.json", "SHA256"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("step", [7, *exhaustive(1, 4)])
def test_run_that_fails_at_any_step_resumes_to_the_same_best(tmp_path, unstopped, step):
    assert unstopped[2].best.step == 6  # not the last, and before the step at which a run goes on
    with pytest.raises(Stop):
        run(before_update(make(FineTune), step, stop), tmp_path, **OPTIONS)
    method = make(FineTune)
    assert_same_run(method, tmp_path, run(method, tmp_path, resume=True, **OPTIONS), unstopped)


@pytest.mark.exhaustive
def test_ctrl_c_keeps_the_best_so_far(tmp_path, unstopped):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped after step 5"):
            run(before_update(make(FineTune), 4, lambda: signal.raise_signal(signal.SIGINT)), tmp_path, **OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    method = make(FineTune)
    assert_same_run(method, tmp_path, run(method, tmp_path, resume=True, **OPTIONS), unstopped)


def test_a_damaged_newest_checkpoint_costs_no_best_weights(tmp_path, unstopped):
    shutil.copytree(unstopped[1], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"step_{TOTAL:08d}" / "state.json").write_text("{")
    method = make(FineTune)
    with pytest.warns(UserWarning, match="resuming from .*step_00000006"):
        history = run(method, tmp_path / "run", resume=True, **OPTIONS)
    assert_same_run(method, tmp_path / "run", history, unstopped)


def test_best_weights_that_a_checkpoint_speaks_of_are_kept_until_it_goes(tmp_path):
    method = make(FineTune)
    metric, _ = planned(method, [1, 2, 3, 4, 5, 6, 7, 0, 0])
    options = {"metric": metric, "higher_is_better": True, "validation": held_out(), "validate_every": 1 / 3}
    run(method, tmp_path, **options)
    # The checkpoint of step 6 speaks of step 6, that of step 9 of step 7.
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "best").iterdir()) == [
        "step_00000006",
        "step_00000007",
    ]


def test_best_weights_that_are_damaged_are_named_before_training_goes_on(tmp_path, unstopped):
    shutil.copytree(unstopped[1], tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best" / f"step_{unstopped[2].best.step:08d}"
    file = best / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"the best weights so far, {best}, are missing or damaged"):
        run(make(FineTune), tmp_path / "run", resume=True, restore_best=False, **OPTIONS)


def test_a_run_that_patience_ended_goes_on_with_more_as_if_it_had_had_it(tmp_path):
    options = {"validation": held_out(), "metric": constant, "higher_is_better": True, "validate_every": 1 / 3}
    expected = make(FineTune), tmp_path / "whole"
    expected = *expected, run(*expected, patience=6, **options)
    assert expected[2].stopped_early and expected[2].steps == 7
    method = make(FineTune)
    stopped = run(method, tmp_path / "run", patience=2, **options)
    assert stopped.stopped_early and stopped.steps == 3 and stopped.best == (1, 0.0)
    method = make(FineTune)
    again = run(method, tmp_path / "run", patience=2, resume=True, **options)
    assert (again.records, again.steps, again.stopped_early) == (stopped.records, 3, True)
    assert int(method.steps) == 1  # the best
    method = make(FineTune)
    more = run(method, tmp_path / "run", patience=6, resume=True, **options)
    assert (more.records[-1], more.steps, more.best) == (expected[2].records[-1], 7, (1, 0.0))
    ours, theirs = (
        load_checkpoint(folder / "checkpoints" / "step_00000007") for folder in (tmp_path / "run", expected[1])
    )
    assert ours.meta == theirs.meta and same(ours.tensors, theirs.tensors)


def constant(outputs):
    return 0.0


def test_another_validation_is_another_configuration(tmp_path, unstopped):
    for change, named in (
        ({"metric": "ece"}, "validation.metric was 'nll' and is 'ece' now"),
        ({"validate_every": 1}, "validation.every was 1 and is 3 now"),
        ({"validation": (held_out()[0], held_out()[1].flip(0))}, "validation.data.labels was"),
    ):
        with pytest.raises(ValueError, match=f"another configuration: .*{named}"):
            run(make(FineTune), unstopped[1], resume=True, **(OPTIONS | change))


class Named:
    """A set whose label y means classes[y]."""

    def __init__(self, *classes):
        images, labels = held_out()
        names = [("ant", "bee", "cow")[label] for label in labels]
        keep = [i for i, name in enumerate(names) if name in classes]
        self.images, self.classes = images[keep], classes
        self.labels = torch.tensor([classes.index(names[i]) for i in keep])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


@pytest.mark.filterwarnings("ignore:the data set has")
def test_labels_are_matched_to_the_methods_classes_by_name():
    expected = run(make(FineTune), validation=held_out()).validations
    assert run(make(FineTune), validation=Named("cow", "ant", "bee")).validations == expected
    method = make(FineTune)
    some = run(method, validation=Named("cow", "ant"), restore_best=False).validations[-1]
    measured = evaluate({"it": method.classifier()}, id=Named("cow", "ant")).models["it"].id
    assert some["validation_accuracy"] == measured.calibration.accuracy
    with pytest.raises(ValueError, match="'dog' of the data set's .* unknown to the FineTune"):
        named = Named("cow", "ant")
        named.classes = ("cow", "dog")
        run(before_update(make(FineTune), 0, stop), validation=named)


def test_the_worst_group_is_a_metric_of_a_set_with_groups():
    images, labels = held_out()
    groups = torch.arange(20) // 5
    method = make(FineTune)
    options = {"metric": "worst_group", "restore_best": False}
    history = run(method, validation={"image": images, "label": labels, "group": groups}, validate_every=3, **options)
    outputs = method.classifier().predict((images, labels))
    assert history.validations[-1]["validation_worst_group"] == worst_group_accuracy(outputs.logits, labels, groups)
    with pytest.raises(ValueError, match='metric="worst_group" needs a validation set with groups'):
        run(make(FineTune), validation=held_out(), metric="worst_group")


@pytest.mark.filterwarnings("ignore:the data set has")
def test_features_are_validated_where_features_are_trained():
    probe, watched = make(LinearProbe), make(LinearProbe)
    with torch.no_grad():
        u, v = (probe.features(images) for images in (data()[0], held_out()[0]))
    expected = run(probe, validation=held_out(), lr=0.1)
    found = run(watched, data=(u, data()[1]), validation=(v, held_out()[1]), lr=0.1)
    for ours, theirs in zip(found.validations, expected.validations, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    some = torch.utils.data.TensorDataset(v[held_out()[1] != 1], held_out()[1][held_out()[1] != 1] // 2)
    some.classes = ("ant", "cow")
    found = run(probe, data=(u, data()[1]), validation=some, restore_best=False).validations[-1]
    expected = evaluate({"it": probe.classifier()}, id=Named("ant", "cow")).models["it"].id.calibration
    assert found["validation_nll"] == pytest.approx(expected.nll, rel=1e-4)


class Files(Drawing):
    """A set that only a worker may read."""

    def __getitem__(self, index):
        assert torch.utils.data.get_worker_info() is not None
        return held_out()[0][index], 0


def test_workers_read_the_validation_set():
    assert (
        len(run(make(FineTune, total_steps=None), validation=Files(), workers=1, epochs=1, limit_batches=1).validations)
        == 1
    )


@pytest.mark.filterwarnings("ignore:FineTune was made for total_steps")
def test_dry_run_looks_at_one_batch_of_the_validation_set_and_leaves_nothing(tmp_path):
    seen = []

    class Many(Drawing):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index % 20)

    method = make(FineTune)
    before = state(method)
    history = run(method, tmp_path, validation=Many(), dry_run=True, on_record=pytest.fail)
    assert len(history.validations) == 1 and len(seen) == 256
    assert same(state(method), before) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"metric": "auc"}, ValueError, "metric must be one of 'accuracy', 'ece', 'nll', 'worst_group', or a function"),
        ({"metric": constant}, ValueError, "higher_is_better must be True or False for a metric that is a function"),
        ({"metric": "nll", "higher_is_better": True}, ValueError, "higher_is_better must be None .*'nll'"),
        ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
        ({"patience": 2, "validation": None}, ValueError, "patience=2 needs validation"),
        ({"validate_every": 0}, ValueError, "validate_every must be positive and finite, got 0"),
        ({"validation": []}, ValueError, "validation is empty"),
        ({"validation": 3}, TypeError, "validation must be"),
        ({"validation": (held_out()[0], held_out()[1] + 1)}, ValueError, "labels must lie in .*K = 3 classes, got 3"),
        ({"metric": lambda outputs: math.nan, "higher_is_better": True}, ValueError, "after step 9 is no number"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        run(make(FineTune), **({"validation": held_out(), "validate_every": 9} | change))


def test_infinite_values_are_no_numbers_of_json_and_still_compared(tmp_path):
    method = make(FineTune)
    metric, _ = planned(method, [math.inf, 1.0, 2.0])
    history = run(method, tmp_path, validation=held_out(), metric=metric, higher_is_better=False)
    assert history.best == (6, 1.0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["validation_plan"] for line in lines if "validation_plan" in line] == [None, 1.0, 2.0]


def test_progress_tells_of_validations():
    lines = []
    fit(
        make(FineTune),
        data(),
        epochs=EPOCHS,
        batch_size=8,
        lr=1e-2,
        log=lines.append,
        validation=held_out(),
        metric="nll",
    )
    told = [line for line in lines if "validation" in line]
    assert len(told) == 3 and told[0].startswith("FineTune: step 3/9, validation nll ")
    assert told[0].endswith("the best so far")


def test_groups_of_images_that_were_left_out_are_no_guess():
    images, labels = held_out()
    found = Validation(make(FineTune), {"image": images, "label": labels, "group": torch.arange(20) // 5})
    found.data = images[1:], labels[1:]
    with pytest.raises(ValueError, match="groups are of 20 images, but the outputs of 19"):
        found.measure(1)
