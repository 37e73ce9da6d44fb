from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from targets import exhaustive

from robustft.methods import FLYP, CaRot, FineTune, Method, Step
from robustft.training.checkpoint import _checksums, load_checkpoint, save_checkpoint
from robustft.training.loop import fit
from robustft.training.optimization import Optimization
from robustft.training.run import holds_run
from robustft.training.schedule import learning_rate, steps_per_epoch
from robustft.training.steps import NonFiniteError, Told, Training

SAMPLES, BATCH, EPOCHS = 26, 8, 3  # three whole batches an epoch, nine steps
TOTAL = 9


def letters(texts):
    rows = [[1 + (ord(c) - 97) % 27 for c in text[:8]] + [29] for text in texts]
    return torch.tensor([row + [0] * (9 - len(row)) for row in rows])


def make(kind=CaRot, dropout=0.0, **arguments):
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1, "patch_dropout": dropout}
    text = {"context_length": 9, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    arguments = {"total_steps": TOTAL} | ({"ema_interval": 2} if kind is CaRot else {}) | arguments
    return kind(model, tokenizer=letters, class_names=("ant", "bee", "cow"), templates=("a {}", "the {}"), **arguments)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 3, 8, 8, generator=generator), torch.arange(SAMPLES) % 3


def run(method, output=None, **arguments):
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-2, "log_every": 2, "progress": False}
    return fit(method, arguments.pop("data", None) or data(), output=output, **(settings | arguments))


def before_update(method, step, action):
    """Run `action` in the middle of a step, after its loss is known and before the weights move."""
    original = method.step

    def stepped(batch):
        out = original(batch)
        if int(method.steps) == step:
            action()
        return out

    method.step = stepped
    return method


class Stop(Exception):
    pass


def stop():
    raise Stop


def killed_run(output):
    """Entry point of the subprocess that dies in the second epoch."""
    run(before_update(make(), 5, lambda: os.kill(os.getpid(), signal.SIGKILL)), output)


def assert_same(method, output, reference, reference_output):
    for name, value in reference.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name
    ours, theirs = (Path(folder) / "metrics.jsonl" for folder in (output, reference_output))
    assert ours.read_bytes() == theirs.read_bytes()
    ours, theirs = (
        load_checkpoint(Path(folder) / "checkpoints" / f"step_{TOTAL:08d}") for folder in (output, reference_output)
    )
    assert ours.meta == theirs.meta
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By kind of method: one that nothing ever stopped, its output folder and its history."""
    runs = {}

    def get(kind):
        if kind not in runs:
            method, output = make(kind), tmp_path_factory.mktemp(kind.__name__)
            runs[kind] = method, output, run(method, output)
        return runs[kind]

    return get


STEPS = [(CaRot, 0), (CaRot, 4), (CaRot, TOTAL - 1), (FLYP, 2)]
STEPS += exhaustive(*((CaRot, step) for step in (1, 2, 3, 5, 6, 7)), (FLYP, 7), (FineTune, 4))


@pytest.mark.parametrize("kind, step", STEPS)
def test_run_that_fails_at_any_step_resumes_bit_for_bit(tmp_path, whole, kind, step):
    reference, reference_output, history = whole(kind)
    with pytest.raises(Stop):
        run(before_update(make(kind), step, stop), tmp_path / "broken")
    torch.manual_seed(step)  # whatever the global generators hold must not matter
    method = make(kind)
    resumed = run(method, tmp_path / "broken", resume=True)
    assert resumed.records == history.records and resumed.steps == TOTAL
    assert_same(method, tmp_path / "broken", reference, reference_output)


def test_killed_process_resumes_bit_for_bit(tmp_path, whole, python):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import test_fit; "
    code += f"test_fit.killed_run({str(tmp_path / 'killed')!r})"
    child = python.run("-c", code)
    assert child.returncode == -signal.SIGKILL, child.stderr
    reference, reference_output, _ = whole(CaRot)
    method = make()
    run(method, tmp_path / "killed", resume=True)
    assert_same(method, tmp_path / "killed", reference, reference_output)


@pytest.fixture
def ctrl_c():
    """Interrupts, as in a terminal, also where the tests run with it ignored, as a script's background jobs do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [0, 4, TOTAL - 1])
def test_ctrl_c_finishes_the_step_saves_and_resumes_bit_for_bit(tmp_path, whole, step):
    reference, reference_output, _ = whole(CaRot)
    handler = signal.getsignal(signal.SIGINT)
    method = before_update(make(), step, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {step + 1} of {TOTAL}"):
        run(method, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{step + 1:08d}").is_dir()
    method = make()
    run(method, tmp_path / "stopped", resume=True)
    assert_same(method, tmp_path / "stopped", reference, reference_output)


@pytest.mark.usefixtures("ctrl_c")
def test_second_ctrl_c_interrupts_at_once():
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    method = before_update(make(), 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run(method)
    assert int(method.steps) == 4


def test_ctrl_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        method = before_update(make(), 4, lambda: signal.raise_signal(signal.SIGINT))
        run(method)
    finally:
        signal.signal(signal.SIGINT, before)
    assert int(method.steps) == TOTAL


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    reference, method = make(), make()
    run(reference, tmp_path / "whole", precision="fp16")
    with pytest.raises(Stop):
        run(before_update(make(), 5, stop), tmp_path / "broken", precision="fp16")
    run(method, tmp_path / "broken", precision="fp16", resume=True)
    assert_same(method, tmp_path / "broken", reference, tmp_path / "whole")


def test_dropout_is_a_function_of_the_seed_and_the_step(tmp_path):
    whole, resumed = make(FLYP, dropout=0.5), make(FLYP, dropout=0.5)
    run(whole)
    with pytest.raises(Stop):
        run(before_update(make(FLYP, dropout=0.5), 4, stop), tmp_path)
    run(resumed, tmp_path, resume=True)
    assert torch.equal(resumed.model.visual.proj, whole.model.visual.proj)
    plain = make(FLYP)
    run(plain)
    assert not torch.equal(plain.model.visual.proj, whole.model.visual.proj)


class Noisy(torch.utils.data.Dataset):
    """A dataset whose augmentation draws from all three global generators."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        images, labels = data()
        noise = torch.randn(3, 8, 8) + float(np.random.rand()) + random.random()
        return images[index] + 0.1 * noise, int(labels[index])


def test_augmentation_is_a_function_of_the_seed_in_any_number_of_workers(tmp_path):
    whole, parallel, resumed, other = make(FLYP), make(FLYP), make(FLYP), make(FLYP)
    run(whole, data=Noisy())
    run(parallel, data=Noisy(), workers=2)
    with pytest.raises(Stop):
        run(before_update(make(FLYP), 4, stop), tmp_path, data=Noisy())
    run(resumed, tmp_path, data=Noisy(), resume=True)
    run(other, data=Noisy(), seed=1)
    for name, value in whole.state_dict().items():
        assert torch.equal(parallel.state_dict()[name], value) and torch.equal(resumed.state_dict()[name], value)
    assert not torch.equal(other.model.visual.proj, whole.model.visual.proj)


def test_the_callers_generators_go_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(3)
    expected = torch.rand(4)
    method = make()
    torch.manual_seed(3)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(Stop):
        run(before_update(method, 4, stop), data=Noisy())
    assert torch.equal(torch.rand(4), expected)
    assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()


def test_every_epoch_is_another_permutation_into_whole_batches():
    seen = []
    method = make(FineTune)
    original = method.step
    method.step = lambda batch: (seen.append(batch[0][:, 0, 0, 0].tolist()), original(batch))[1]
    run(method)
    assert [len(values) for values in seen] == [BATCH] * TOTAL
    epochs = [sum(seen[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_fewer_samples_than_a_batch_make_one_short_batch():
    images, labels = data()
    method = make(FineTune, total_steps=EPOCHS)
    assert run(method, data=(images[:5], labels[:5])).steps == EPOCHS
    assert [steps_per_epoch(n, 8) for n in (5, 8, 15, 16)] == [1, 1, 1, 2]
    assert steps_per_epoch(100, 8, limit_batches=3) == 3


def test_learning_rate_rises_to_its_peak_and_falls_as_a_cosine_to_zero():
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.pi / 90)) and rates[99] < 1e-2
    assert learning_rate(0, 5, 2.0, 0.0) == 2.0


def test_a_step_is_adamw_with_clipping_and_decay_of_matrices_only():
    method, plain = make(FineTune), make(FineTune)
    method.total_steps = 1
    record = run(method, epochs=1, limit_batches=1, clip=0.1, weight_decay=0.5, warmup=0.0).records[0]
    order = torch.randperm(SAMPLES, generator=_order_generator())
    images, labels = data()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    plain.step((images[order[:BATCH]], labels[order[:BATCH]])).loss.backward()
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norm > 0.1 and record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for p in parameters:
        gradient = p.grad * 0.1 / (norm + 1e-6)
        decayed = p.detach() * (1 - 1e-2 * 0.5) if p.ndim >= 2 else p.detach()
        expected = decayed - 1e-2 * gradient / (gradient.abs() + 1e-8)
        name = next(name for name, q in plain.named_parameters() if q is p)
        torch.testing.assert_close(dict(method.named_parameters())[name].detach(), expected, atol=2e-5, rtol=1e-4)


def _order_generator():
    from robustft.data.seeds import stateless_generator

    return stateless_generator(0, "order", 0)


def test_fp16_clips_gradients_that_no_longer_carry_the_loss_scale():
    # At a rate this low both runs stay at the same weights while fp16 finds its scale.
    full, half = (run(make(FineTune), precision=p, lr=1e-9).records[-1] for p in ("fp32", "fp16"))
    assert half["gradient_norm"] == pytest.approx(full["gradient_norm"], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_lowers_the_loss_in_every_precision(precision):
    records = run(make(FineTune, total_steps=30), epochs=10, precision=precision).records
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


def test_records_hold_every_term_and_are_the_lines_of_the_metrics_file(tmp_path):
    history = run(make(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history.records
    assert [record["step"] for record in lines] == [1, 2, 4, 6, 8, 9]
    terms = {"contrastive", "distillation", "orthogonality", "cross"}
    assert lines[1].keys() == terms | {"step", "epoch", "lr", "loss", "gradient_norm", "logit_scale"}
    weighted = lines[1]["contrastive"] + 1.5 * lines[1]["distillation"]
    weighted += 0.2 * lines[1]["orthogonality"] + 0.05 * lines[1]["cross"]
    assert lines[1]["loss"] == pytest.approx(weighted, rel=1e-5)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    run(make(), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000006", "step_00000009"]


# What goes wrong


def poison(method):
    method.model.logit_scale.data.fill_(math.nan)


@pytest.mark.parametrize("step", [0, 4])
def test_a_term_that_is_not_finite_stops_the_run_before_the_update(tmp_path, whole, step):
    method = make()
    original = method.after_step

    def after_step():
        original()
        if int(method.steps) == step:
            method.before = {name: value.clone() for name, value in method.state_dict().items()}
            poison(method)

    method.after_step = after_step
    if step == 0:
        poison(method)
    with pytest.raises(NonFiniteError, match=rf"step {step} \(epoch {step // 3 + 1}\): term 'contrastive'") as caught:
        run(method, tmp_path)
    assert caught.value.step == step and "contrastive" in caught.value.names
    assert f"step_{step // 3 * 3:08d}" in str(caught.value)
    if step:
        changed = [
            name
            for name, value in method.state_dict().items()
            if not torch.equal(value, method.before[name]) and name != "model.logit_scale"
        ]
        assert changed == []
        resumed = make()
        run(resumed, tmp_path, resume=True)
        assert torch.equal(resumed.model.visual.proj, whole(CaRot)[0].model.visual.proj)


@pytest.fixture
def late(monkeypatch):
    """Training as on a GPU, which does not wait for the numbers of a step before it makes the next."""

    class Late(Optimization):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.waits = False

    monkeypatch.setattr("robustft.training.loop.Optimization", Late)


def test_numbers_that_are_looked_at_a_step_late_are_the_same(late, tmp_path, whole):
    method, looked = make(), []
    read = Told.read

    def noted(told):
        looked.append((told.step, int(method.steps)))
        return read(told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Told, "read", noted)
        run(method, tmp_path, log_every=4)
    # A record or the end of an epoch is due after the steps 0, 2, 3, 5, 7 and 8.
    assert [(step, now - step) for step, now in looked] == [
        *((0, 0), (1, 1), (2, 1), (3, 0), (4, 1), (5, 1), (6, 1), (7, 0), (8, 0))
    ]
    reference, folder, _ = whole(CaRot)
    for name, value in reference.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    waited = {one["step"]: one for one in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    assert [one["step"] for one in records] == [1, 4, 8, 9] and all(waited[one["step"]] == one for one in records)


def test_a_step_that_is_seen_late_has_not_moved_the_weights(late, tmp_path, whole):
    method = make()
    original = method.after_step

    def after_step():
        original()
        if int(method.steps) == 4:
            method.before = [p.detach().clone() for p in method.model.parameters()]
            poison(method)

    method.after_step = after_step
    with pytest.raises(NonFiniteError, match=r"step 4 \(epoch 2\): term 'contrastive'.*step_00000003") as caught:
        run(method, tmp_path)
    assert caught.value.step == 4 and int(method.steps) == 5
    for (name, p), before in zip(method.model.named_parameters(), method.before, strict=True):
        assert name == "logit_scale" or torch.equal(p, before), name
    resumed = make()
    run(resumed, tmp_path, resume=True)
    assert torch.equal(resumed.model.visual.proj, whole(CaRot)[0].model.visual.proj)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [FineTune, FLYP, CaRot])
def test_a_step_waits_for_nothing_on_a_gpu(kind, monkeypatch):
    one_step = Training.one_step

    def watched(training, batch):
        torch.cuda.set_sync_debug_mode("error" if 2 <= training.step <= 4 else "default")
        try:
            one_step(training, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Training, "one_step", watched)
    assert run(make(kind, total_steps=6), batch_size=4, epochs=1, log_every=99, device="cuda").steps == 6


class Cliff(Method):
    """A finite loss with an infinite gradient."""

    def step(self, batch):
        loss = (self.model.visual.proj * 0).abs().sum().sqrt() + self.model.logit_scale
        return Step(loss, {"cliff": loss.detach()})


def test_a_gradient_that_is_not_finite_names_its_parameter(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 0 .*gradient of model.visual.proj") as caught:
        run(make(Cliff))
    assert caught.value.names == ["model.visual.proj"]
    with pytest.raises(NonFiniteError, match=r"step 19 .*gradient of"):
        run(make(Cliff, total_steps=30), precision="fp16", epochs=10)


@pytest.mark.filterwarnings("ignore:Large was made for total_steps")
def test_fp16_skips_updates_whose_gradient_overflows():
    class Large(FineTune):
        def step(self, batch):
            out = super().step(batch)
            return Step(1e5 * out.loss * 1e30, out.terms)

    method, before = make(Large), make(Large)
    records = run(method, precision="fp16", epochs=1).records
    assert [record["gradient_norm"] for record in records] == [None] * len(records)
    assert torch.equal(method.model.visual.proj, before.model.visual.proj)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"lr": 0.02}, "lr was 0.01 and is 0.02 now"),
        ({"batch_size": 4, "epochs": 1}, "batch_size was 8 and is 4 now.*epochs was 3 and is 1 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16' now"),
        ({"data": (data()[0], data()[1].flip(0))}, "data.labels was"),
        ({"data": (data()[0][:25], data()[1][:25])}, "data.samples was 26 and is 25 now"),
    ],
)
@pytest.mark.filterwarnings("ignore:CaRot was made for total_steps")
def test_resume_under_another_configuration_names_the_field(tmp_path, change, named):
    run(make(), tmp_path)
    with pytest.raises(ValueError, match=f"cannot resume.*{named}"):
        run(make(), tmp_path, resume=True, **change)


def test_resume_of_another_method_names_what_differs(tmp_path):
    run(make(), tmp_path)
    with pytest.raises(ValueError, match="method.distillation_weight was 1.5 and is 0.5 now"):
        run(make(distillation_weight=0.5), tmp_path, resume=True)
    with pytest.raises(ValueError, match="method.method was 'CaRot' and is 'FLYP' now"):
        run(make(FLYP), tmp_path, resume=True)


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    reference, method = make(), make()
    history = run(reference, tmp_path)
    assert run(method, tmp_path, resume=True).records == history.records
    assert torch.equal(method.model.visual.proj, reference.model.visual.proj)


def test_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        run(make(), tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume=True needs output"):
        run(make(), resume=True)


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "no json", b'{"st', b"[]", b"null", b'{"step": "9"}', b"\xff\xfe", b"[" * 10**5]
)
def test_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path, whole, damage):
    reference, output, _ = whole(CaRot)
    method = make()
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / f"step_{TOTAL:08d}"
    match damage:
        case "truncated":
            os.truncate(newest / "state.safetensors", 5000)
        case "emptied":
            os.truncate(newest / "state.safetensors", 0)
        case "no json":
            (newest / "state.json").unlink()
        case _:
            (newest / "state.json").write_bytes(damage)
    with pytest.warns(UserWarning, match=f"resuming from .*step_00000006.*damaged.*{newest.name}"):
        run(method, tmp_path, resume=True)
    assert torch.equal(method.model.visual.proj, reference.model.visual.proj)
    load_checkpoint(newest)


def sign(checkpoint, meta=None):
    """Makes of a changed checkpoint one whose checksums are right."""
    if meta is not None:
        (checkpoint / "state.json").write_text(meta)
    (checkpoint / "SHA256").write_text(_checksums(checkpoint))


@pytest.mark.parametrize("place", [0.3, *exhaustive(0.0, 0.9, 1.0)])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "SHA256"])
def test_a_single_flipped_bit_in_the_newest_lets_the_other_take_its_place(tmp_path, whole, name, place):
    reference, reference_output, _ = whole(CaRot)
    shutil.copytree(reference_output, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / f"step_{TOTAL:08d}" / name
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    method = make()
    with pytest.warns(UserWarning, match=rf"resuming from .*step_00000006.*damaged.*{file.parent.name}"):
        run(method, tmp_path / "run", resume=True)
    assert_same(method, tmp_path / "run", reference, reference_output)


def test_checkpoints_that_are_both_rotten_are_both_named(tmp_path, whole):
    shutil.copytree(whole(CaRot)[1], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    with pytest.raises(FileNotFoundError, match="is whole: step_00000009: .*checksums.*step_00000006: .*checksums"):
        run(make(), tmp_path / "run", resume=True)


def test_checksums_are_what_sha256sum_reads(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(3)}, {})
    checked = subprocess.run(["sha256sum", "-c", "SHA256"], cwd=path, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count("OK") == 2


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("method.model.visual.proj", None, "visual.proj"),
        ("method.model.visual.proj", torch.ones(3), "visual.proj"),
        ("optimizer.0.exp_avg", torch.ones(3), "optimizer.0.exp_avg must be finite and of shape"),
        ("optimizer.0.step", torch.tensor(math.nan), "optimizer.0.step must be finite"),
        ("optimizer.999.step", torch.tensor(1.0), "optimizer.999.step is of none of the"),
        ("other.x", torch.ones(1), "other"),
    ],
)
def test_state_that_is_not_of_this_method_is_refused_by_name(tmp_path, whole, name, value, named):
    """Checksums that are right do not make it so: another model's file, another version's."""
    newest = load_checkpoint(whole(CaRot)[1] / "checkpoints" / f"step_{TOTAL:08d}")
    tensors = {key: tensor for key, tensor in (newest.tensors | {name: value}).items() if tensor is not None}
    save_checkpoint(tmp_path / "checkpoints", TOTAL, tensors, newest.meta)
    with pytest.raises(ValueError, match=rf"cannot resume .*: it holds no state of this CaRot: (.|\n)*{named}"):
        run(make(), tmp_path, resume=True)


def test_a_step_beyond_the_run_or_other_than_its_folders_is_refused(tmp_path, whole):
    newest = load_checkpoint(whole(CaRot)[1] / "checkpoints" / f"step_{TOTAL:08d}")
    meta = {key: value for key, value in newest.meta.items() if key != "step"}
    save_checkpoint(tmp_path / "checkpoints", TOTAL + 1, newest.tensors, meta)
    with pytest.raises(ValueError, match="cannot resume .*: its step is 10, this run has 9"):
        run(make(), tmp_path, resume=True)
    (tmp_path / "checkpoints" / "step_00000010").rename(tmp_path / "checkpoints" / "step_00000008")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .* is whole: .*it holds step 10"):
        run(make(), tmp_path, resume=True)


def test_a_fault_at_any_sync_or_rename_of_a_save_leaves_a_run_that_resumes_bit_for_bit(tmp_path, whole, monkeypatch):
    """Every fifth call of one epoch's save in turn; tests/faults/ has every write of a run, and kills."""
    reference, reference_output, _ = whole(FineTune)
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
    for place in range(0, 100, 5):
        output, count, saving = tmp_path / f"{place}", [0], []

        def fails(name, *arguments, count=count, saving=saving, place=place):
            count[0] += bool(saving)
            if saving and count[0] == place + 1:
                raise OSError(28, "No space left on device")
            return originals[name](*arguments)

        for name in originals:
            monkeypatch.setattr(os, name, partial(fails, name))
        stopped = False
        try:
            # From the middle of the second epoch on: its save, and what comes after it.
            run(before_update(make(FineTune), 4, lambda saving=saving: saving.append(1)), output)
        except OSError:
            stopped = True
        finally:
            for name, original in originals.items():
                monkeypatch.setattr(os, name, original)
        resumed = make(FineTune)
        run(resumed, output, resume=True)
        assert_same(resumed, output, reference, reference_output)
        left = {p.name for p in (output / "checkpoints").iterdir()}
        assert {"step_00000006", "step_00000009"} <= left <= {"step_00000003", "step_00000006", "step_00000009"}
        if not stopped:
            break
    assert 20 < place < 100


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path):
    run(make(), tmp_path)
    for state in (tmp_path / "checkpoints").glob("*/state.safetensors"):
        os.truncate(state, 100)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .* is whole.*step_00000009.*step_00000006"):
        run(make(), tmp_path, resume=True)


def test_checkpoint_without_a_configuration_is_not_resumed(tmp_path):
    run(make(), tmp_path)
    sign(tmp_path / "checkpoints" / f"step_{TOTAL:08d}", json.dumps({"step": TOTAL}))
    with pytest.raises(ValueError, match="another configuration: .*was None"):
        run(make(), tmp_path, resume=True)


def test_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(3)}, {})
    state = path / "state.safetensors"
    content = state.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    state.write_bytes((128).to_bytes(8, "little") + content[8:end].ljust(128) + content[end:])
    sign(path)
    assert state.read_bytes().startswith(b"\x80")
    assert load_checkpoint(path).tensors["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_bare_pickles_are_refused(tmp_path, protocol):
    path = save_checkpoint(tmp_path, 1, {"x": torch.arange(3)}, {})
    (path / "state.safetensors").write_bytes(pickle.dumps({"x": [0, 1, 2]}, protocol))
    with pytest.raises(ValueError, match="pickle.*refused"):
        load_checkpoint(path)


def test_pickled_checkpoints_are_refused(tmp_path):
    run(make(), tmp_path)
    newest = tmp_path / "checkpoints" / f"step_{TOTAL:08d}"
    torch.save({"a": torch.ones(1)}, newest / "state.safetensors")
    with pytest.raises(ValueError, match="pickle.*refused"):
        run(make(), tmp_path, resume=True)
    for folder in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(folder)
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoints" / "epoch_1.pt")
    with pytest.raises(ValueError, match="epoch_1.pt.*refused"):
        run(make(), tmp_path, resume=True)
    with pytest.raises(ValueError, match="pickled checkpoint"):
        load_checkpoint(tmp_path / "checkpoints" / "epoch_1.pt")


def working_run(output):
    """Entry point of the subprocess that stays in its fifth step."""

    def work():
        print("working", flush=True)
        time.sleep(600)

    run(before_update(make(), 4, work), output)


def test_a_second_process_in_the_folder_is_refused_at_once_and_a_killed_one_frees_it(tmp_path, whole, python):
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import test_fit; "
    code += f"test_fit.working_run({str(tmp_path)!r})"
    first = python.start("-c", code)
    try:
        assert first.line() == "working"
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=rf"{tmp_path} is in use by .* \(process {first.pid}\)"):
                run(before_update(make(), 0, stop), tmp_path, resume=resume)
    finally:
        first.kill()
        first.wait()
    method, (reference, reference_output, _) = make(), whole(CaRot)
    run(method, tmp_path, resume=True)
    assert_same(method, tmp_path, reference, reference_output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_a_method_is_told_the_runs_length_once_before_it_is_recorded():
    class Told(FineTune):
        def begin_run(self, total_steps):
            super().begin_run(total_steps)
            self.lengths = [*getattr(self, "lengths", []), (total_steps, int(self.steps))]

    method = make(Told, total_steps=None)
    run(method)
    assert method.lengths == [(TOTAL, 0)]


def test_output_that_holds_a_run_is_not_overwritten(tmp_path):
    run(make(), tmp_path)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for arguments in ({}, {"dry_run": True}):
        with pytest.raises(FileExistsError, match="already holds a run.*resume=True"):
            run(make(), tmp_path, **arguments)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == kept


def test_kill_during_the_very_first_save_leaves_a_folder_that_can_be_used(tmp_path):
    (tmp_path / "checkpoints" / ".step_00000000.tmp").mkdir(parents=True)
    assert not holds_run(tmp_path)
    assert run(make(), tmp_path).steps == TOTAL
    assert holds_run(tmp_path)


def test_labels_out_of_range_do_not_claim_the_output(tmp_path):
    images, labels = data()
    for wrong in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match="labels must lie in .*K = 3 classes"):
            run(make(), tmp_path, data=(images, wrong))
    assert run(make(), tmp_path, data=(images, labels)).steps == TOTAL


def test_dictionaries_of_tensors_train_as_pairs_do_and_every_column_goes_along():
    images, labels = data()
    batches = []
    method = make(FLYP)
    original = method.step
    method.step = lambda batch: batches.append(batch) or original(batch)
    columns = {"image": images, "label": labels, "weight": torch.arange(SAMPLES), "pair": torch.rand(SAMPLES, 2)}
    assert run(method, data=columns).records == run(make(FLYP)).records
    assert len(batches) == TOTAL
    for batch in batches:
        rows = batch["weight"]
        assert all(torch.equal(batch[name], columns[name][rows]) for name in columns)


def test_columns_that_do_not_fit_the_images_are_refused_by_name():
    images, labels = data()
    for column in (torch.rand(SAMPLES - 1), [0] * SAMPLES, torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=f'"weight".* must be a tensor with a row for each of the {SAMPLES} images'
        ):
            run(make(), data={"image": images, "label": labels, "weight": column})
    with pytest.raises(ValueError, match="data of tensors must hold images and labels"):
        run(make(), data={"image": images, "text": ["a"] * SAMPLES})


def test_output_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    method = before_update(make(), 0, stop)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/robustft")):
        with pytest.raises(OSError, match=f"output folder {re.escape(str(folder))} cannot be written"):
            run(method, folder)


def test_full_disk_surfaces_and_leaves_the_checkpoints_before_it(tmp_path, whole):
    method = make()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    try:
        with pytest.raises(OSError, match="cannot write checkpoint .*step_00000006.*still whole: step_00000003"):
            run(before_update(method, 4, fill), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step_00000000", "step_00000003"}
    resumed = make()
    run(resumed, tmp_path, resume=True)
    assert torch.equal(resumed.model.visual.proj, whole(CaRot)[0].model.visual.proj)


def test_dry_run_goes_through_a_step_and_leaves_everything_as_it_was(tmp_path):
    method = make()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    history = run(method, tmp_path, dry_run=True)
    assert history.steps == 1 and history.records[0]["contrastive"] > 0
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_that_fails_leaves_the_method_as_it_was():
    method = make()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.after_step = stop  # after the weights have moved
    with pytest.raises(Stop):
        run(method, dry_run=True)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())


def test_length_other_than_the_methods_schedule_is_warned_of():
    with pytest.warns(UserWarning, match="total_steps=9, this run has 3"):
        run(make(), limit_batches=1)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size must be at least 1, got -1"),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, ValueError, "lr must be positive and finite, got nan"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
        ({"warmup": 500}, ValueError, r"warmup is a fraction .*\[0, 1\), got 500"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must not be negative"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"limit_batches": 0}, ValueError, "limit_batches must be at least 1, got 0"),
        ({"data": (data()[0][:0], data()[1][:0])}, ValueError, "empty"),
        ({"data": (data()[0], data()[1][:5])}, ValueError, r"labels must have shape \(26,\)"),
        ({"data": (data()[0], data()[1] + 1)}, ValueError, "labels must lie in .*K = 3 classes, got 3"),
        ({"data": iter([])}, TypeError, "data must be"),
        ({"data": []}, ValueError, "empty"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-2, "progress": False, "data": data()} | arguments
    with pytest.raises(error, match=message):
        fit(make(), settings.pop("data"), **settings)


def test_images_that_are_not_finite_are_found_before_training():
    images, labels = data()
    images[7, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="images must be finite: image 7 is not"):
        run(make(), data=(images, labels))


def test_progress_is_lines_elsewhere_than_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("robustft.training.progress.SECONDS_BETWEEN_LINES", math.inf)
    lines = []
    run(make(), progress=True, log=lines.append)
    assert len(lines) == 1 and re.match(r"CaRot: epoch 3/3, step 9/9, loss \d+\.\d+, [\d.]+ steps/s", lines[0])
    run(make(), progress=True)
    assert len(re.findall("^CaRot: ", capsys.readouterr().err, re.MULTILINE)) == 1
    monkeypatch.setattr("robustft.training.progress.SECONDS_BETWEEN_LINES", 0.0)
    run(make(), progress=True, log=lines.append)
    assert len(lines) == 1 + TOTAL


def test_weights_in_half_precision_are_refused_before_anything_is_written(tmp_path):
    method = make().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"trained parameters.*bfloat16.*rounded away"):
        run(method, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_images_that_are_still_pixels_get_a_warning_in_training():
    images, labels = data()
    pixels = torch.randint(0, 256, images.shape).float()
    with pytest.warns(UserWarning, match="whole numbers from 0 to 255"):
        run(make(total_steps=3), data=(pixels, labels), epochs=1, lr=1e-5)
