"""The zero-shot head, and that it is kept."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import NAMES, letters

from robustft.clip import interpolate
from robustft.predictors import zero_shot_classifier


def counted(model):
    """The texts that a model encodes, as a list of batches."""
    batches, encode_text = [], model.encode_text
    model.encode_text = lambda tokens, **how: batches.append(len(tokens)) or encode_text(tokens, **how)
    return batches


def test_a_kept_head_is_not_encoded_again(clip_model, prompts, tmp_path):
    first = zero_shot_classifier(clip_model, **prompts, cache=tmp_path, batch_size=4)
    plain = zero_shot_classifier(clip_model, **prompts)
    batches = counted(clip_model)
    again = zero_shot_classifier(clip_model, **prompts, cache=tmp_path)
    assert not batches and torch.equal(first.class_embeddings, again.class_embeddings)
    torch.testing.assert_close(first.class_embeddings, plain.class_embeddings)
    assert again.classes == plain.classes


def test_whatever_a_head_depends_on_is_in_its_key(clip_model, prompts, tmp_path):
    zero_shot_classifier(clip_model, **prompts, cache=tmp_path)
    other = interpolate(clip_model, clip_model, 0.5)
    with torch.no_grad():
        other.text_projection[0, 0] += 1e-6
    changes = (
        {"class_names": NAMES[::-1]},
        {"templates": prompts["templates"][:2]},
        {"tokenizer": lambda texts: letters([text[::-1] for text in texts])},
    )
    for model, change in ((other, {}), *((clip_model, change) for change in changes)):
        batches = counted(model)
        zero_shot_classifier(model, **prompts | change, cache=tmp_path)
        assert batches
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_head_is_encoded_again_with_a_warning(clip_model, prompts, tmp_path):
    first = zero_shot_classifier(clip_model, **prompts, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="encoding the captions again"):
        again = zero_shot_classifier(clip_model, **prompts, cache=tmp_path)
    assert torch.equal(first.class_embeddings, again.class_embeddings)
    zero_shot_classifier(clip_model, **prompts, cache=tmp_path)
