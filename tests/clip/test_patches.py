"""Patch features: the value path of the last attention, written out by hand for each tower."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from robustft import clip
from robustft.clip import deep_prompts

open_clip = clip.import_open_clip()

VIT = {"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
TOWERS = {
    "vit": VIT,
    "layer-scale": VIT | {"ls_init_value": 0.5},
    "pooled-mean": VIT | {"pool_type": "avg", "final_ln_after_pool": True},
    "custom-block": VIT | {"block_type": "custom", "qk_norm": True},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
}
TEXT = {"context_length": 4, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1}


def build(tower):
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=6, vision_cfg=copy.deepcopy(TOWERS[tower]), text_cfg=TEXT).double().eval()
    with torch.no_grad():  # biases start at zero: a forgotten one must show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images_for(model, n=2):
    size = model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def value_path(visual, images):
    """Patch by patch: the last block without attention, its values taken as they are."""
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    width = x.shape[-1]
    rows = []
    for h in x[:, 1:].unbind(1):
        value = F.linear(last.ln_1(h), last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :])
        h = h + last.ls_1(last.attn.out_proj(value))
        h = h + last.ls_2(last.mlp(last.ln_2(h)))
        rows.append(visual.ln_post(h) @ visual.proj)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("tower", ["vit", "layer-scale", "pooled-mean", "custom-block"])
def test_vit_patches_are_the_value_path_of_the_last_block(tower):
    model = build(tower)
    images = images_for(model)
    expected = value_path(model.visual, images)
    assert expected.shape == (2, 9, 6)
    torch.testing.assert_close(clip.encode_patches(model, images, normalize=False), expected)
    torch.testing.assert_close(clip.encode_patches(model, images), F.normalize(expected, dim=-1))


def test_resnet_patches_are_values_of_cells_without_positions():
    model = build("resnet")
    images, pool = images_for(model), model.visual.attnpool
    v = model.visual
    cells = v.layer4(v.layer3(v.layer2(v.layer1(v.stem(images)))))
    expected = torch.stack([pool.c_proj(pool.v_proj(cells[:, :, i, j])) for i in range(2) for j in range(2)], dim=1)
    torch.testing.assert_close(clip.encode_patches(model, images, normalize=False), expected)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_one_pass_gives_the_same_image_features_and_leaves_no_hook(tower):
    model = build(tower)
    images, before = images_for(model), clip.fingerprint(model)
    u, patches = clip.encode_images_and_patches(model, images)
    torch.testing.assert_close(u, clip.encode_images(model, images), rtol=1e-12, atol=1e-12)
    assert torch.equal(patches, clip.encode_patches(model, images))
    assert clip.fingerprint(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_patches_do_not_see_other_patches_in_the_last_attention():
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=6, vision_cfg=VIT | {"layers": 1}, text_cfg=TEXT).double().eval()
    images = images_for(model)
    changed = images.clone()
    changed[:, :, :4, :4] += 1.0  # the first patch; with one block nothing has mixed before
    a, b = (clip.encode_patches(model, x) for x in (images, changed))
    assert not torch.allclose(a[:, 0], b[:, 0])
    torch.testing.assert_close(a[:, 1:], b[:, 1:])


@pytest.mark.parametrize("layers", [1, 2])
def test_prompts_among_the_tokens_are_no_patches_but_are_seen_before_the_last_attention(layers):
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=6, vision_cfg=VIT | {"layers": layers}, text_cfg=TEXT).double().eval()
    images, prompts = images_for(model), torch.randn(2, 3, 16, dtype=torch.float64)
    plain = clip.encode_patches(model, images)
    with deep_prompts.visual_prompts(model, prompts[:layers]):
        prompted = clip.encode_patches(model, images)
    assert prompted.shape == plain.shape == (2, 9, 6)
    assert torch.allclose(prompted, plain) == (layers == 1)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_gradients_reach_the_images_with_and_without_checkpointing(tower):
    model = build(tower)
    images = images_for(model).requires_grad_()
    plain = torch.autograd.grad(clip.encode_patches(model, images)[:, 1].sum(), images)[0]
    model.set_grad_checkpointing(True)
    checkpointed = torch.autograd.grad(clip.encode_patches(model, images)[:, 1].sum(), images)[0]
    assert plain.abs().sum() > 0
    torch.testing.assert_close(plain, checkpointed)


def test_half_precision_towers_and_autocast_give_unit_patches_in_float32():
    model = build("vit").float()
    images = images_for(model).float()
    expected = clip.encode_patches(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = clip.encode_patches(model, images)
    half = clip.encode_patches(model.bfloat16(), images)
    for patches in (autocast, half):
        assert patches.dtype == torch.float32
        torch.testing.assert_close(patches.norm(dim=-1), torch.ones(2, 9))
        torch.testing.assert_close(patches, expected, rtol=0, atol=0.05)


def test_towers_without_patches_among_the_texts_are_refused():
    coca = VIT | {"attentional_pool": "cascade", "attn_pooler_queries": 2, "attn_pooler_heads": 2}
    model = open_clip.CLIP(embed_dim=8, vision_cfg=coca, text_cfg=TEXT)
    with pytest.raises(ValueError, match="VisionTransformer tower has no patch features"):
        clip.encode_patches(model, torch.randn(1, 3, 12, 12))
    model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear tower has no patch features"):
        clip.encode_patches(model, torch.randn(1, 3, 12, 12))
