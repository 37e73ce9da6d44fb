"""Other people's trainers, on two processes: the weights, and the teacher's, are those of one."""

from __future__ import annotations

import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import children
import every_loss
import processes
import pytest
import torch
import torch.distributed as dist
from tiny_clip import letters
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

pytestmark = pytest.mark.exhaustive
by_process = processes.by_process  # a fixture of this file's tests

ROWS, BATCH = 12, 4
ORDER = {"lightning_trained": [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]}
"""Of the rows, where two processes' parts of a batch, one after the other, are not those in a row."""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Has imported the trainers, too, once for all processes."""
    libraries = f"{children.LIBRARIES} accelerate lightning transformers transformers.trainer"
    with children.Children(tmp_path_factory.mktemp("python"), libraries) as started:
        yield started


def made(hook: bool):
    """SGD, so that a gradient which is but rounding moves nothing."""
    method = every_loss.make("CaRot")
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    if hook:
        optimizer.register_step_post_hook(lambda *_: method.after_step())
    return method, optimizer


def samples(order: str):
    rows = torch.tensor([int(row) for row in order.split()])
    data = every_loss.data()
    return data["image"][rows], data["label"][rows]


def everyone():
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def accelerated(order: str, hook: bool):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    method, optimizer = made(hook)
    loader = DataLoader(TensorDataset(*samples(order)), batch_size=BATCH // dist.get_world_size())
    wrapped, prepared, loader = accelerator.prepare(method, optimizer, loader)
    assert accelerator.num_processes == dist.get_world_size()
    for batch in loader:
        accelerator.backward(wrapped(batch, group=everyone()).loss)
        prepared.step()
        prepared.zero_grad()
    return method


def lightning_trained(order: str, hook: bool):
    import lightning

    class Robust(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.method, self.optimizer = made(hook)

        def training_step(self, batch, index):
            return self.method(tuple(batch), group=everyone()).loss

        def configure_optimizers(self):
            return self.optimizer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    world = dist.get_world_size()
    strategy = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    module = Robust()
    how = {"accelerator": "cpu", "devices": world, "strategy": strategy, "use_distributed_sampler": False}
    trainer = lightning.Trainer(max_epochs=1, enable_model_summary=False, **how, **quiet)
    data = TensorDataset(*samples(order))
    mine = DistributedSampler(data, world, dist.get_rank(), shuffle=False)  # Lightning's own one would shuffle
    trainer.fit(module, DataLoader(data, batch_size=BATCH // world, sampler=mine))
    assert trainer.world_size == world
    return module.method


def hugging_face_trained(order: str, hook: bool):
    import transformers

    class Wrapped(torch.nn.Module):
        def __init__(self, method):
            super().__init__()
            self.method = method

        def forward(self, batch, group):
            return self.method(batch, group=group)

    class RobustTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return model((inputs["image"], inputs["labels"]), everyone()).loss

        def _get_train_sampler(self, *_):
            return None  # in order

    method, optimizer = made(hook)
    arguments = transformers.TrainingArguments(
        "trainer",
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        num_train_epochs=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"image": image, "label": label} for image, label in zip(*samples(order), strict=True)]
    RobustTrainer(Wrapped(method), arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert arguments.world_size == dist.get_world_size()
    return method


def open_clips_task(order: str, hook: bool):
    """By the task that the page shows."""
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    shown = {}
    exec(re.findall(r"<!-- runnable with open_clip.task -->\n```python\n(.*?)```", page, re.DOTALL)[0], shown)
    images, labels = samples(order)
    method, optimizer = made(False)
    method.misalignment = 0.0  # it needs labels
    task, world = shown["RobustTask"](method), dist.get_world_size()
    if world > 1:
        task.prepare_distributed()
    task.train()
    for rows in torch.arange(ROWS).split(BATCH):
        mine = rows.chunk(world)[dist.get_rank()]
        optimizer.zero_grad()
        losses, _ = task({"image": images[mine], "text": letters([f"a {'abc'[i]}" for i in labels[mine].tolist()])})
        losses["loss"].backward()
        optimizer.step()
        if hook:
            task.clamp_logit_scale()
    return method


TRAINERS = {
    "accelerated": "accelerate",
    "lightning_trained": "lightning",
    "hugging_face_trained": "transformers",
    "open_clips_task": "open_clip.task",
}
"""What each needs."""


def trained(rank, trainer, order, port):
    """All weights, the teacher's too; and what is said where nothing calls `after_step`."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": dist.get_world_size(), "LOCAL_WORLD_SIZE": dist.get_world_size()}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "a test"}
    method = globals()[trainer](order, True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        unmoved = globals()[trainer](order, False)
    said = [str(one.message) for one in told if "CaRot.after_step() was not called" in str(one.message)]
    return {"weights": method.state_dict(), "unmoved": int(unmoved.steps), "said": len(said)}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_train_as_one(trainer, by_process):
    if find_spec(TRAINERS[trainer]) is None:
        pytest.skip(f"{TRAINERS[trainer]} is not installed")
    rows = list(range(ROWS))
    (alone,) = by_process(1, trained, trainer, " ".join(map(str, ORDER.get(trainer, rows))), 29400)
    start = every_loss.make("CaRot").state_dict()
    assert alone["weights"]["steps"] == start["steps"] + 3
    assert not torch.equal(alone["weights"]["teacher.visual.proj"], start["teacher.visual.proj"])
    for one in by_process(2, trained, trainer, " ".join(map(str, rows)), 29400):
        torch.testing.assert_close(one["weights"], alone["weights"], rtol=1e-12, atol=1e-13)
        assert one["unmoved"] == 1 and one["said"] == 1
