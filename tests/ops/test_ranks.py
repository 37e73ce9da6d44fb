"""Ranks that disagree all raise the same error, within seconds, and the group still works after it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import torch
import torch.distributed as dist

from robustft import functional as rf
from robustft.losses import CaRotLoss, ContrastiveLoss
from robustft.methods import FLYP

WORLD, N, D = 3, 6, 4
ODD = 1  # the rank that does otherwise
SECONDS = 20  # far below the group's time-out, and far above what a crowded machine needs
LABELS = torch.arange(N)


def features(n: int = N, d: int = D) -> list[torch.Tensor]:
    return [f.float().requires_grad_() for f in planted.pairs(n, d)]


def loss(rank: int, odd: dict, **options) -> torch.Tensor:
    """`contrastive_loss`, of one rank with the odd options."""
    given = {"rows": N, "width": D, "scale": 10.0, "dtype": torch.float32, **options, **(odd if rank == ODD else {})}
    rows, width, scale, dtype = (given.pop(name) for name in ("rows", "width", "scale", "dtype"))
    x, t = (f.to(dtype) for f in features(rows, width))
    return rf.contrastive_loss(x, t, scale, group=dist.group.WORLD, **given)


def distilled(rank: int, teacher_width: int = D, teacher_scale: float = 5.0) -> object:
    if rank != ODD:
        teacher_width, teacher_scale = D, 5.0
    x, t = features()
    return rf.contrastive_distillation_loss(
        x, t, 10.0, *features(N, teacher_width), teacher_scale, group=dist.group.WORLD
    )


def carot(rank: int, teacher: str) -> object:
    """CaRot's loss, of one rank without the teacher, or without a part of it."""
    x, t = features()
    u, v = features()
    given = {"teacher_image_features": u, "teacher_text_features": v, "teacher_logit_scale": 5.0}
    if rank == ODD:
        given = {} if teacher == "none" else {"teacher_image_features": u}
    return CaRotLoss(group=dist.group.WORLD)(x, t, 10.0, **given)


def without_gradient(rank: int) -> object:
    with torch.set_grad_enabled(rank != ODD):
        return loss(rank, {})


def skipped_backward(rank: int) -> object:
    value = loss(rank, {})
    if rank != ODD:
        value.backward()
    return loss(rank, {})


def other_order(rank: int) -> object:
    first, second = loss(rank, {}), loss(rank, {}, scale=20.0)
    (second if rank == ODD else first).backward()
    return None


CASES: dict[str, tuple[Callable[[int], object], str]] = {
    "dtype": (
        lambda rank: loss(rank, {"dtype": torch.float16}, dtype=torch.bfloat16),
        "image_features differs between ranks: rank 0: (6, 4) torch.bfloat16 on cpu; rank 1: (6, 4) torch.float16",
    ),
    "rows": (lambda rank: loss(rank, {"rows": 5}), "rank 0: (6, 4) torch.float32 on cpu; rank 1: (5, 4)"),
    "width": (lambda rank: loss(rank, {"width": 5}), "rank 1: (6, 5) torch.float32"),
    "no_labels": (lambda rank: loss(rank, {"labels": LABELS}), "rank 0: None; rank 1: torch.int64"),
    "scale": (
        lambda rank: loss(rank, {"scale": 11.0}),
        "logit_scale differs between ranks: rank 0: 10.0; rank 1: 11.0",
    ),
    "smoothing": (lambda rank: loss(rank, {"label_smoothing": 0.1}), "label_smoothing differs"),
    "reduction": (lambda rank: loss(rank, {"reduction": "none"}), "reduction differs between ranks: rank 0: mean"),
    "memory": (lambda rank: loss(rank, {"memory": 0}), "memory differs between ranks: rank 0: auto; rank 1: 0"),
    "weight": (lambda rank: loss(rank, {"weight": torch.ones(N).double()}), "weight differs between ranks"),
    "two": (lambda rank: loss(rank, {"scale": 11.0, "memory": 0}), "rank 2: 10.0. memory differs"),
    "empty_rank": (lambda rank: loss(rank, {"rows": 0}), "rank 1 failed with ValueError: image_features has no rows"),
    "wrong_type": (lambda rank: loss(rank, {"labels": [1]}), "rank 1 failed with TypeError: labels is list"),
    "wrong_scale": (lambda rank: loss(rank, {"scale": "10"}), "rank 1 failed with TypeError"),
    "wrong_memory": (lambda rank: loss(rank, {"memory": -1}), "rank 1 failed with ValueError: memory is -1"),
    "everywhere": (lambda rank: loss(rank, {}, label_smoothing=2.0), "label_smoothing is 2.0; expected"),
    "no_gradient": (without_gradient, "gradient differs between ranks: rank 0: True; rank 1: False"),
    "teacher_width": (
        lambda rank: distilled(rank, teacher_width=5),
        "teacher_image_features differs between ranks: rank 0: (6, 4); rank 1: (6, 5)",
    ),
    "teacher_scale": (lambda rank: distilled(rank, teacher_scale=6.0), "teacher_logit_scale differs"),
    "no_teacher": (lambda rank: carot(rank, "none"), "rank 0: contrastive_distillation_loss; rank 1: contrastive_loss"),
    "half_a_teacher": (
        lambda rank: carot(rank, "half"),
        "rank 1 failed with ValueError: teacher_image_features, teach",
    ),
    "loss_of_a_wrong_type": (
        lambda rank: CaRotLoss(group=dist.group.WORLD)(*features(), 10.0, labels=[1] if rank == ODD else None),
        "rank 1 failed with TypeError: labels is list [1]; expected a tensor or None",
    ),
    "projection": (
        lambda rank: CaRotLoss(group=dist.group.WORLD)(
            *features(), 10.0, visual_projection=torch.ones(3, 2, dtype=torch.int64 if rank == ODD else torch.float32)
        ),
        "rank 1 failed with ValueError: projection is (3, 2) torch.int64",
    ),
    "drop_in": (
        lambda rank: ContrastiveLoss(world_size=WORLD)(*features(), None if rank == ODD else 10.0),
        "rank 1 failed with TypeError: logit_scale is None",
    ),
    "missing": (
        lambda rank: rf.contrastive_loss(*features()[: 1 + (rank != ODD)], logit_scale=10.0, group=dist.group.WORLD),
        "rank 1 failed with TypeError: missing a required argument: 'text_features'",
    ),
    "teacher_dtype": (
        lambda rank: rf.contrastive_distillation_loss(
            *(f.bfloat16() for f in features()),
            10.0,
            *(f.to(torch.float32 if rank == ODD else torch.bfloat16) for f in features()),
            5.0,
            group=dist.group.WORLD,
        ),
        "image_features differs between ranks: rank 0: (6, 4) torch.bfloat16 on cpu; rank 1: (6, 4) torch.float32",
    ),
    "skipped_backward": (
        skipped_backward,
        "rank 0: backward of contrastive_loss; rank 1: contrastive_loss; rank 2: backward of contrastive_loss",
    ),
    "other_order": (other_order, "the loss to differentiate differs"),
    "no_group": (
        lambda rank: rf.contrastive_loss(*features(), 10.0, group="all"),
        "group is 'all'; expected",
    ),
    "step": (lambda rank: FLYP.__new__(FLYP).checked(None), "FLYP.step sees the rows of this process alone"),
}


def run(path: str) -> None:
    """A rank: its number is the file's name, and the ranks meet at a file beside it."""
    rank = int(Path(path).name)
    meeting = Path(path).with_name("meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    told = {}
    for name, (case, _) in CASES.items():
        told[name] = outcome(case, rank)
        told[f"after {name}"] = [float(loss(rank, {}).detach()), 0.0]
    # Labels of another integer type are the same labels.
    told["label types"] = [float(loss(rank, {"labels": LABELS.int()}, labels=LABELS).detach())]
    told["one label type"] = [float(loss(rank, {}, labels=LABELS).detach())]
    if rank != ODD:  # which ends here
        told["ended"] = outcome(lambda rank: loss(rank, {}), rank)
    torch.save(told, path)


def outcome(case: Callable[[int], object], rank: int) -> tuple[str, float]:
    """The error as text, and the seconds it took."""
    started = time.monotonic()
    try:
        case(rank)
        return "no error", 0.0
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started


@pytest.fixture(scope="module")
def told(bare_python, tmp_path_factory):
    """What each rank met in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_ranks; test_ranks.run(*sys.argv[1:])"
    paths = [folder / str(rank) for rank in range(WORLD)]
    ranks = [bare_python.start("-c", code, str(path)) for path in paths]
    for done in [rank.wait() for rank in ranks]:
        assert done.returncode == 0, done.stderr
    return [torch.load(path, weights_only=True) for path in paths]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_raises_the_same_error_within_seconds(case, told):
    errors, seconds = zip(*(rank[case] for rank in told), strict=True)
    assert CASES[case][1] in errors[0]
    assert len(set(errors)) == 1, errors
    assert max(seconds) < SECONDS


@pytest.mark.parametrize("case", CASES)
def test_the_group_works_after_a_disagreement(case, told):
    # Every rank has the same samples, so that each is WORLD times in the batch.
    x, t = (f.detach().repeat(WORLD, 1) for f in features())
    for rank in told:
        torch.testing.assert_close(rank[f"after {case}"][0], float(rf.contrastive_loss(x, t, 10.0)))


def test_a_rank_that_has_ended_is_an_error_of_the_others(told):
    for rank in (told[0], told[2]):
        error, seconds = rank["ended"]
        assert error.startswith("RuntimeError: group: rank") and "is in contrastive_loss" in error
        assert seconds < SECONDS


def test_labels_of_different_integer_types_are_the_same_labels(told):
    assert all(rank["label types"] == rank["one label type"] for rank in told)
