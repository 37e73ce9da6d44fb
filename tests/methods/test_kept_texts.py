"""Captions made from labels pass a model that does not move once, and what a step gets is what it would encode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from steps import step_each

from robustft import clip
from robustft.clip import spread
from robustft.clip.prompts import PromptTable
from robustft.methods import CaRot
from robustft.methods.kept_texts import KeptTexts


def taught(monkeypatch, method, batches):
    """Numbers of the steps in which the teacher encodes texts, and how many captions."""
    encode, found = clip.encode_texts, []

    def noted(model, tokens, **how):
        if model is method.teacher:
            found.append((method.steps_done, len(tokens)))
        return encode(model, tokens, **how)

    monkeypatch.setattr(clip, "encode_texts", noted)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    for batch in batches:
        step_each((optimizer, method.step(batch).loss))
        method.after_step()
    return found


def test_the_teacher_encodes_captions_of_labels_once_between_its_updates(clip_model, prompts, batches, monkeypatch):
    method = CaRot(clip_model, total_steps=len(batches), ema_interval=6, **prompts)
    all_captions = len(method.prompts.captions)
    updates = [step for step in range(len(batches)) if step % 6 == 0 and step + 1 < len(batches)]
    assert taught(monkeypatch, method, batches) == [(step + 1, all_captions) for step in updates]


def test_a_teacher_that_always_moves_encodes_what_the_batch_has(clip_model, prompts, batches, monkeypatch):
    method = CaRot(clip_model, total_steps=len(batches), teacher="beta", **prompts)
    found = taught(monkeypatch, method, batches)
    assert [step for step, _ in found] == list(range(1, len(batches)))


def test_kept_features_are_those_of_the_weights_as_they_are(clip_model, prompts):
    table = PromptTable(prompts["tokenizer"], prompts["class_names"], prompts["templates"])
    kept, model = KeptTexts(table), clip_model.requires_grad_(False).eval()
    wanted = torch.tensor([len(table.captions) - 1, 0])

    def encoded():
        with torch.no_grad():
            return clip.encode_texts(model, table.captions)[wanted]

    for change in (lambda: None, lambda: model.text_projection.mul_(1.5).add_(0.1)):
        change()
        torch.testing.assert_close(kept.of(model, wanted, 1000), encoded())
    other = {name: value + 0.05 * torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    torch.testing.assert_close(kept.of(model, wanted, 1000), encoded())
    model.load_state_dict({name: value * 0.9 for name, value in other.items()}, assign=True)
    torch.testing.assert_close(kept.of(model, wanted, 1000), encoded())
    projection, place = model.text_projection, model.text_projection.data_ptr()
    projection.data = torch.randn_like(projection)
    others = [torch.randn_like(projection) for _ in range(1000)]  # one lies where the first did, if that is free
    projection.data = next((one for one in others if one.data_ptr() == place), others[0])
    torch.testing.assert_close(kept.of(model, wanted, 1000), encoded())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kept.of(model, wanted, 1000), encoded())
    assert not torch.equal(kept.of(model, wanted, 1000), F.normalize(torch.ones_like(encoded()), dim=-1))


def test_captions_are_encoded_together_only_where_it_pays_and_one_process_has_them(clip_model, prompts, monkeypatch):
    table = PromptTable(prompts["tokenizer"], prompts["class_names"], prompts["templates"])
    kept, wanted = KeptTexts(table), torch.arange(2)
    enough = len(table.captions)  # times two captions asked for a step
    assert kept.of(clip_model, wanted, enough - 1) is None
    assert kept.of(clip_model, wanted, enough) is not None
    with spread.spread(spread.Spread(parts=2)):
        assert kept.of(clip_model, wanted, enough) is not None
    with spread.spread(spread.Spread(group=object())):
        assert kept.of(clip_model, wanted, enough) is None
    monkeypatch.setattr("robustft.methods.kept_texts.MOST", len(table.captions) - 1)
    assert kept.of(clip_model, wanted, enough) is None
