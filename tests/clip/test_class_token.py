"""A ViT's last block for the class token alone: the same features and gradients, and whole where that would show."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import CONFIG

from robustft import clip
from robustft.clip.class_token import for_class_token

ALONE = {
    "CLIP's": {},
    "of two blocks": {"layers": 2},
    "norm after pooling": {"final_ln_after_pool": True},
    "layer scale": {"ls_init_value": 0.5},
    "dropped patches": {"patch_dropout": 0.5},
    "tokens returned": {"output_tokens": True},
}
WHOLE = {
    "pooled by mean": {"pool_type": "avg"},
    "pooled by attention": {"attentional_pool": True, "attn_pooler_heads": 2},
    "another block": {"block_type": "custom"},
}


def build(**vision):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIG["model_cfg"])
    return open_clip.CLIP(embed_dim=8, vision_cfg=config["vision_cfg"] | vision, text_cfg=config["text_cfg"]).double()


def images_of(count=5):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def whole(model, images):
    features = model.encode_image(images)
    return F.normalize(features[0] if isinstance(features, tuple) else features, dim=-1)


def gradients(model, features):
    model.zero_grad()
    (features * features.detach().roll(1, 1)).sum().backward()
    return {name: p.grad.clone() for name, p in model.visual.named_parameters()}


def rows_in_the_last_mlp(model, images):
    """How many tokens of an image the last block's MLP sees."""
    found = []
    inside = model.visual.transformer.resblocks[-1].mlp
    forward = type(inside).forward

    class Watched(type(inside)):
        def forward(self, x):
            found.append(x.numel() // x.shape[-1] // len(images))
            return forward(self, x)

    inside.__class__ = Watched
    try:
        clip.encode_images(model, images)
    finally:
        inside.__class__ = Watched.__mro__[1]
    return found[0]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("kind", ALONE)
def test_features_and_gradients_are_the_whole_towers(kind, batch_first):
    model, images = build(**ALONE[kind]), images_of()
    if not batch_first:
        model.visual.transformer.batch_first = False
        for block in model.visual.transformer.resblocks:
            block.attn.batch_first = False
    passes = []
    for encode in (whole, clip.encode_images):
        torch.manual_seed(2)  # the same patches are dropped
        features = encode(model.train(), images)
        passes.append((features.detach(), gradients(model, features)))
    torch.testing.assert_close(passes[1], passes[0], rtol=1e-9, atol=1e-12)
    assert rows_in_the_last_mlp(model, images) == 1


@pytest.mark.parametrize("kind", WHOLE)
def test_towers_that_pool_more_are_left_whole(kind):
    model, images = build(**WHOLE[kind]), images_of()
    assert for_class_token(model) is model
    assert torch.equal(clip.encode_images(model, images), whole(model, images))


def test_checkpointed_towers_have_the_same_gradients():
    model, images = build(layers=2), images_of()
    expected = gradients(model, clip.encode_images(model, images))
    model.visual.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(model, clip.encode_images(model, images)), expected, rtol=0, atol=0)
    assert rows_in_the_last_mlp(model, images) == 1


def test_what_follows_the_tokens_sees_all_of_them(monkeypatch):
    model, images = build(), images_of()
    stack, block = model.visual.transformer, model.visual.transformer.resblocks[-1]
    shapes = []
    for module in (stack, block, block.mlp):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda _module, given, *_: shapes.append(given[0].shape[1]))
            clip.encode_images(model, images)
            handle.remove()
    assert shapes == [5] * 6  # four patches and the class token
    monkeypatch.setattr(block, "forward", lambda x, **how: shapes.append(x.shape[1]) or x)
    clip.encode_images(model, images)
    assert shapes == [5] * 7
    monkeypatch.undo()
    assert for_class_token(model) is not model
    block.attn.dropout = 0.1
    assert for_class_token(model) is model


def test_the_model_is_left_as_it_was():
    model, images = build(), images_of()
    before = clip.fingerprint(model), list(model.state_dict())
    view = for_class_token(model)
    assert view is not model and view.visual.conv1 is model.visual.conv1
    assert view.visual.transformer.resblocks[-1] is not model.visual.transformer.resblocks[-1]
    assert list(view.state_dict()) == before[1]
    clip.encode_images(model, images)
    assert (clip.fingerprint(model), list(model.state_dict())) == before
    assert type(model.visual.transformer.resblocks[-1]).__name__ == "ResidualAttentionBlock"


def test_traced_and_exported_towers_are_whole():
    model, images = build().eval(), images_of()
    features = clip.encode_images(model, images).detach()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return clip.encode_images(self.model, images)

    exported = torch.export.export(Encoder(), (images,), strict=False)
    torch.testing.assert_close(exported.module()(images), features, rtol=1e-9, atol=1e-12)
    activations = [node.meta["val"].shape for node in exported.graph.nodes if "gelu" in node.name]
    assert [shape[1] for shape in activations] == [5]
