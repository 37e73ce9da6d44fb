"""Models as transformers reads them: the same features, and a refusal where transformers has no such model."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import TEXT, VISION

from robustft import clip
from robustft.clip.as_transformers import differences, processed, write_transformers
from robustft.clip.from_transformers import to_ours, to_theirs

CAPTIONS = ["a photo of a cat.", "Two  ducks, 3 geese & it's a GOOSE!", "naïve café"]
PREPROCESS = {"size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


def built(vision=(), text=(), preprocess=(), **model_cfg):
    """A model of one block with random weights, as a bundle has it, and its configuration."""
    open_clip = clip.import_open_clip()
    torch.manual_seed(0)
    model_cfg = {
        "embed_dim": 8,
        "vision_cfg": {**VISION, "image_size": 32, "patch_size": 16, **dict(vision)},
        "text_cfg": {**TEXT, "vocab_size": 49408, **dict(text)},
        **model_cfg,
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": {**PREPROCESS, **dict(preprocess)}}
    kind = open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP
    model = kind(**copy.deepcopy(model_cfg)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms too
    open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    return model, config, open_clip.SimpleTokenizer(context_length=15)


@pytest.mark.exhaustive  # transformers takes seconds to be imported
@pytest.mark.parametrize("quick", [True, False])
def test_features_of_images_and_texts_are_those_of_open_clip(tmp_path, quick):
    pytest.importorskip("transformers")
    model, config, tokenizer = built(quick_gelu=quick)
    write_transformers(model, tmp_path, config, tokenizer, ("cat", "dog"))
    images = torch.randn(4, 3, 32, 32)
    apart, features = differences(model, tmp_path, images, CAPTIONS, tokenizer)
    assert apart < 1e-6
    torch.testing.assert_close(features, clip.encode_images(model, images).detach())
    other = built(quick_gelu=not quick)[0]
    assert differences(other, tmp_path, images, CAPTIONS, tokenizer)[0] > 1e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize(("mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bilinear")])
def test_images_are_resized_as_by_the_transform(tmp_path, mode, interpolation):
    pytest.importorskip("transformers")
    model, config, tokenizer = built(preprocess={"resize_mode": mode, "interpolation": interpolation})
    write_transformers(model, tmp_path, config, tokenizer)
    open_clip = clip.import_open_clip()
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**config["preprocess_cfg"]), is_train=False
    )
    rows = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    images = [Image.fromarray(rows).resize(size, Image.Resampling.BICUBIC) for size in ((90, 62), (40, 50))]
    ours = torch.stack([transform(image) for image in images])
    assert float((processed(tmp_path, images) - ours).abs().max()) <= 2 / 255 / 0.2


def test_weights_under_transformers_names_come_back_as_they_were():
    model, config, _ = built()
    state = model.state_dict()
    theirs = to_theirs(state)
    assert theirs["vision_model.encoder.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
    back = to_ours(theirs, state)
    assert all(torch.equal(value, back[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="1 weights missing .logit_scale.; 1 weights unknown .other"):
        to_ours({"other" if name == "logit_scale" else name: value for name, value in theirs.items()}, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"ls_init_value": 0.1}}, "computes something else: config: describes another model"),
        ({"vision": {"pool_type": "avg"}}, "visual.pool_type is avg and tok"),
        ({"vision": {"layers": [1, 1, 1, 1], "width": 4}}, "whose image tower is a ModifiedResNet"),
        ({"text": {"pool_type": "last"}}, "text_pool_type is last and argmax"),
        ({"custom_text": True}, "it is a CustomTextCLIP"),
        ({"vision": {"image_size": [32, 64]}}, "its images are 32 x 64"),
        ({"preprocess": {"resize_mode": "longest"}}, "does not resize images as this model's transform: longest"),
    ],
)
def test_another_model_is_refused_by_what_it_computes(tmp_path, change, message):
    model, config, tokenizer = built(**change)
    with pytest.raises(ValueError, match=message):
        write_transformers(model, tmp_path, config, tokenizer)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(tmp_path):
    model, config, _ = built()
    with pytest.raises(ValueError, match="OpenAI's tokenizer, and this model a function"):
        write_transformers(model, tmp_path, config, lambda texts: texts)


def test_a_missing_transformers_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model, config, tokenizer = built()
    with pytest.raises(ImportError, match=r"pip install 'robustft\[transformers\]'"):
        write_transformers(model, tmp_path, config, tokenizer)
