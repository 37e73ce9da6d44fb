import copy

import pytest
import torch
import torch.nn.functional as F
from steps import step_each

from robustft.methods import FineTune, zero_shot_classifier


def zero_shot_head(model, prompts):
    """Normalised mean over templates of normalised text features, one class after the other."""
    rows = []
    for name in prompts["class_names"]:
        tokens = prompts["tokenizer"]([template.format(name) for template in prompts["templates"]])
        rows.append(F.normalize(F.normalize(model.encode_text(tokens), dim=-1).mean(0), dim=0))
    return torch.stack(rows).detach()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fine_tune_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, smoothing):
    method = FineTune(clip_model, label_smoothing=smoothing, **prompts)
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    student = copy.deepcopy(clip_model)
    scale = student.logit_scale.exp().item()
    head = (scale * zero_shot_head(student, prompts)).requires_grad_()
    plain = torch.optim.SGD([*student.visual.parameters(), head], lr=0.01)
    for images, labels in batches:
        out = method.step((images, labels))
        loss = F.cross_entropy(
            F.normalize(student.encode_image(images), dim=-1) @ head.T, labels, label_smoothing=smoothing
        )
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    torch.testing.assert_close(method.head, head, rtol=1e-8, atol=1e-10)
    for p, q in zip(method.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    outputs = method.classifier().outputs(batches[0][0])
    u = F.normalize(student.encode_image(batches[0][0]), dim=-1)
    torch.testing.assert_close(outputs.logits, u @ head.T)
    torch.testing.assert_close(outputs.cosines, u @ F.normalize(head, dim=-1).T)


def test_fine_tuning_starts_as_the_zero_shot_classifier(clip_model, prompts, batches):
    images = batches[0][0]
    zero_shot, start = zero_shot_classifier(clip_model, **prompts), FineTune(clip_model, **prompts).classifier()
    torch.testing.assert_close(start.logits(images), zero_shot.logits(images))


def test_only_the_image_tower_and_the_head_are_trained(clip_model, prompts):
    method = FineTune(clip_model, **prompts)
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {"head"} | {f"model.visual.{name}" for name, _ in clip_model.visual.named_parameters()}
    assert all(p.requires_grad for p in clip_model.parameters()), "the model that was passed is left alone"


def test_batches_of_texts_are_refused(clip_model, prompts, batches):
    with pytest.raises(ValueError, match="FineTune needs labels"):
        FineTune(clip_model, **prompts).step((batches[0][0], ["a"] * 6))
