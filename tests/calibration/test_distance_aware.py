"""DAC: what logits are scaled by, as the paper's formula says, for classes trained on and for others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from robustft.calibration import distance_aware_logits, distance_aware_scales


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_scale_is_the_ratio_of_both_proximities_and_one_for_a_class_trained_on():
    trained, before_trained = rows(6, 4, 0), rows(6, 3, 1)
    new, before = torch.cat([rows(3, 4, 2), 5 * trained[2:3]]), torch.cat([rows(3, 3, 3), before_trained[2:3]])
    found = distance_aware_scales(new, trained, before, before_trained, k=2)

    def proximity(row, base):
        u, others = F.normalize(row, dim=0), F.normalize(base, dim=1)
        return math.exp(-sum(sorted(float((u - other).norm()) for other in others)[:2]) / 2)

    expected = [
        proximity(row, trained) / proximity(row0, before_trained) for row, row0 in zip(new, before, strict=True)
    ]
    expected[3] = 1.0
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_prompts_that_learnt_nothing_leave_every_logit():
    new, trained = rows(4, 5, 0), rows(7, 5, 1)
    scales = distance_aware_scales(new, trained, new, trained)
    logits = rows(8, 4, 2)
    torch.testing.assert_close(distance_aware_logits(logits, scales), logits)


def test_logits_are_scaled_by_the_class_they_predict_and_predict_it_still():
    logits, scales = torch.tensor([[3.0, 1.0], [1.0, 2.0], [-3.0, -1.0]]), torch.tensor([0.5, 2.0])
    found = distance_aware_logits(logits, scales)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.5], [2.0, 4.0], [-6.0, -2.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trained": rows(6, 5, 0)}, "trained are 5 wide, embeddings 4"),
        ({"zero_shot_embeddings": rows(2, 3, 0)}, "zero_shot_embeddings are of 2 classes, embeddings of 3"),
        ({"k": 7}, "k is 7; expected at most 6"),
        ({"known": -1.0}, "known must be at least 0"),
    ],
)
def test_shapes_that_do_not_match_are_named(change, message):
    given = {"embeddings": rows(3, 4, 0), "trained": rows(6, 4, 1)}
    given |= {"zero_shot_embeddings": rows(3, 3, 2), "zero_shot_trained": rows(6, 3, 3)}
    with pytest.raises(ValueError, match=message):
        distance_aware_scales(**given | change)


def test_scales_are_one_positive_number_a_class():
    for scales in (torch.ones(3), torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="scales is .* one positive number a class"):
            distance_aware_logits(torch.ones(2, 2), scales)
