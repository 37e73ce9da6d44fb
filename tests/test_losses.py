"""The loss modules: open_clip's call convention, and the terms they add up."""

from __future__ import annotations

import planted
import pytest
import torch

from robustft import functional as rf
from robustft.losses import CaRotLoss, ContrastiveLoss

X, T = planted.pairs(12, 8)
XT, TT = planted.pairs(12, 8, seed=1)


def test_contrastive_loss_is_open_clips_clip_loss():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    for output_dict in (False, True):
        ours = ContrastiveLoss()(X, T, torch.tensor(20.0), output_dict=output_dict)
        theirs = open_clip_loss.ClipLoss()(X, T, torch.tensor(20.0), output_dict=output_dict)
        torch.testing.assert_close(ours, theirs)


def test_distillation_is_twice_open_clips():
    open_clip_loss = pytest.importorskip("open_clip.loss")
    terms = rf.contrastive_distillation_loss(X, T, 20.0, XT, TT, 10.0)
    theirs = open_clip_loss.DistillClipLoss()(X, T, torch.tensor(20.0), XT, TT, torch.tensor(10.0), output_dict=True)
    torch.testing.assert_close(terms.contrastive, theirs["contrastive_loss"])
    torch.testing.assert_close(terms.distillation, 2 * theirs["distill_loss"])


def test_carot_dictionary_adds_up_to_its_loss():
    options = dict(
        teacher_image_features=XT,
        teacher_text_features=TT,
        teacher_logit_scale=10.0,
        visual_projection=torch.randn(10, 8, dtype=torch.float64),
        text_projection=torch.randn(6, 8, dtype=torch.float64),
    )
    loss = CaRotLoss()
    parts = loss(X, T, 20.0, **options, output_dict=True)
    assert list(parts) == ["contrastive_loss", "distillation_loss", "orthogonality_loss", "cross_loss"]
    torch.testing.assert_close(sum(parts.values()), loss(X, T, 20.0, **options))


def test_carot_without_a_teacher_is_its_first_step():
    assert CaRotLoss()(X, T, 20.0) == ContrastiveLoss()(X, T, 20.0)


def test_half_a_teacher_is_refused():
    with pytest.raises(ValueError, match="go together"):
        CaRotLoss()(X, T, 20.0, teacher_image_features=XT)


def test_carot_terms_keep_their_precision_under_autocast():
    wv, wt = torch.randn(10, 8), torch.randn(6, 8)
    arguments = (X.float(), T.float(), 20.0)
    options = {"visual_projection": wv, "text_projection": wt, "output_dict": True}
    expected = CaRotLoss()(*arguments, **options)
    with torch.autocast("cpu", torch.bfloat16):
        actual = CaRotLoss()(*arguments, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert expected["cross_loss"].item() == pytest.approx(0.05 * (wv @ wt.T).norm().item())


def test_cross_penalty_names_a_projection_that_does_not_fit():
    with pytest.raises(ValueError, match=r"text_projection is \(6, 7\)"):
        rf.cross_penalty(torch.randn(10, 8), torch.randn(6, 7))
