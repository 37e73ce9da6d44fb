"""Towers of timm and Hugging Face: patches, deep prompts, image sizes, and libraries that are not installed."""

from __future__ import annotations

import copy
import importlib.util

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from targets import case

from benchmarks.architectures import small
from robustft import clip
from robustft.clip import deep_prompts, loading
from robustft.predictors.saving import load_predictor
from robustft.predictors.zero_shot import zero_shot_classifier


def tokens_of(visual, images):
    """What enters the first block of one of timm's ViTs, and the rotations of its positions, if it has any."""
    trunk, rope = visual.trunk, None
    x = trunk._pos_embed(trunk.patch_embed(images))
    if isinstance(x, tuple):
        x, rope = x
    return trunk.norm_pre(x), rope


def assert_same_directions(found, expected):
    """Unit features against features of any length, which timm's heads begin with at a millionth."""
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), rtol=0, atol=1e-4)
    assert not torch.allclose(found, found.roll(1, 1), atol=1e-2)


@torch.no_grad()
def test_patches_of_timms_vits_are_the_last_block_where_each_token_sees_itself(tmp_path):
    for name in ("MobileCLIP2-L-14", "EVA01-g-14", "EVA02-B-16", "vit_medium_patch16_gap_256", "ViTamin-B"):
        with case(name):
            model, _, data, _ = small(name, tmp_path)
            trunk, (x, rope) = model.visual.trunk, tokens_of(model.visual, data["image"])
            rotated = {} if rope is None else {"rope": rope}
            for block in trunk.blocks[:-1]:
                x = block(x, **rotated)
            itself = torch.full((x.shape[1],) * 2, -torch.inf).fill_diagonal_(0.0)
            x = trunk.norm(trunk.blocks[-1](x, attn_mask=itself, **rotated))[:, trunk.num_prefix_tokens :]
            expected = model.visual.head(trunk.head(trunk.fc_norm(x)))
            assert expected.shape[1] == 4
            assert_same_directions(clip.encode_patches(model, data["image"]), expected)


@torch.no_grad()
def test_patches_under_an_attention_pool_are_what_it_makes_of_each_alone(tmp_path):
    for name in ("ViT-B-16-SigLIP2", "PE-Core-B-16", "PE-Core-bigG-14-448"):
        with case(name):
            model, _, data, _ = small(name, tmp_path)
            trunk = model.visual.trunk
            x, alone = trunk.forward_features(data["image"]), []
            for place in range(trunk.num_prefix_tokens, x.shape[1]):
                mask = torch.full((1, 1, 1, x.shape[1]), -torch.inf)
                mask[..., place] = 0.0
                alone.append(model.visual.head(trunk.head(trunk.fc_norm(trunk.attn_pool(x, attn_mask=mask)))))
            expected = torch.stack(alone, 1)
            assert_same_directions(clip.encode_patches(model, data["image"]), expected)


@torch.no_grad()
def test_patches_of_a_captioner_are_what_its_pool_makes_of_each_alone(tmp_path):
    model, _, data, _ = small("coca_ViT-B-32", tmp_path)
    visual, pool = model.visual, model.visual.attn_pool
    x = pool.ln_k(visual.transformer(visual._embeds(data["image"])))
    query, alone = pool.ln_q(pool.query).expand(len(x), -1, -1), []
    for place in range(1, x.shape[1]):
        others = torch.ones(len(x), x.shape[1], dtype=torch.bool).index_fill(1, torch.tensor([place]), False)
        pooled = pool.attn(query, x, x, key_padding_mask=others, need_weights=False)[0]
        alone.append(visual.ln_post(pooled)[:, 0] @ visual.proj)
    expected = torch.stack(alone, 1)
    assert_same_directions(clip.encode_patches(model, data["image"]), expected)


@torch.no_grad()
def test_a_map_of_one_cell_has_the_image_itself_as_its_patch(tmp_path):
    for name, cells in (("convnext_base", 1), ("convnext_large_d", 1), ("MobileCLIP2-S3", 1), ("MobileCLIP2-S0", 4)):
        with case(name):
            model, _, data, _ = small(name, tmp_path)
            image, patches = clip.encode_images_and_patches(model, data["image"])
            assert patches.shape == (6, cells, 16)
            assert torch.allclose(patches[:, 0], image, atol=1e-6) == (cells == 1)
    model, _, data, _ = small("swin_base_patch4_window7_224", tmp_path)
    image, patches = clip.encode_images_and_patches(model, data["image"])
    torch.testing.assert_close(patches[:, 0], image)


@torch.no_grad()
def test_deep_prompts_are_unrotated_tokens_that_are_dropped_before_pooling(tmp_path):
    """As tokens in front of the patches, which timm rotates no more than the class token."""
    for name in ("EVA02-B-16", "PE-Core-B-16", "MobileCLIP2-L-14", "vit_medium_patch16_gap_256"):
        with case(name):
            model, _, data, _ = small(name, tmp_path)
            prompts, before = torch.randn(2, 3, 16), clip.encode_images(model, data["image"])
            with deep_prompts.visual_prompts(model, prompts):
                found = clip.encode_images(model, data["image"])
                patches = clip.encode_patches(model, data["image"])
            assert torch.equal(clip.encode_images(model, data["image"]), before) and patches.shape == (6, 4, 16)
            visual = copy.deepcopy(model.visual)
            trunk, prefix = visual.trunk, visual.trunk.num_prefix_tokens
            norm, trunk.norm_pre = trunk.norm_pre, torch.nn.Identity()
            x, rope = tokens_of(visual, data["image"])
            for number, (block, prompt) in enumerate(zip(trunk.blocks, prompts, strict=True)):
                x = torch.cat([x[:, :prefix], prompt.expand(6, -1, -1), x[:, prefix + 3 * (number > 0) :]], 1)
                x = norm(x) if number == 0 else x
                if rope is None:
                    x = block(x)
                else:
                    block.attn.num_prefix_tokens = prefix + 3
                    x = block(x, rope=rope)
            x = torch.cat([x[:, :prefix], x[:, prefix + 3 :]], 1)
            assert_same_directions(found, visual.head(trunk.forward_head(trunk.norm(x))))


def test_deep_prompts_need_activations_that_are_kept(tmp_path):
    model = small("EVA02-B-16", tmp_path).model
    model.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="gradient checkpointing off"):
        deep_prompts.visual_layers(model)


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """Small architectures under the names of the large ones, with weights in files."""
    of_open_clip = open_clip.get_model_config

    def add(name, **vision):
        monkeypatch.setattr(open_clip, "get_model_config", of_open_clip)
        model, config, _, prompts = small(name, tmp_path)
        config["model_cfg"]["vision_cfg"] |= vision
        monkeypatch.setattr(open_clip, "get_model_config", lambda _name: copy.deepcopy(config["model_cfg"]))
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_args, **_options: prompts["tokenizer"])
        monkeypatch.setattr(loading, "_TOKENIZERS", {})
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        return model, prompts

    return add


@pytest.mark.filterwarnings("ignore:.*does not tell its activation")
@torch.no_grad()
def test_another_image_size_interpolates_positions_and_comes_back_from_an_export(listed, tmp_path):
    for name, size in (("ViT-B-16-SigLIP2", 16), ("PE-Core-B-16", (8, 12)), ("ViT-B-16", 16), ("convnext_base", 64)):
        with case(name):
            model, prompts = listed(name)
            bundle = clip.load(name, tmp_path / "weights.pt", image_size=size)
            height, width = size if isinstance(size, tuple) else (size, size)
            images = torch.randn(2, 3, height, width)
            for transform in (bundle.train_transform, bundle.eval_transform):
                assert transform(Image.new("RGB", (40, 30))).shape[1:] == (height, width)
            assert bundle.config["preprocess_cfg"]["size"] == [height, width]
            features = clip.encode_images(bundle.model, images)
            if "convnext" not in name:
                with pytest.raises(ValueError, match="do not go through"):
                    clip.encode_images(model, images)
            classifier = zero_shot_classifier(bundle.model, **prompts)
            loaded = load_predictor(classifier.save(tmp_path / name, bundle.config))
            torch.testing.assert_close(clip.encode_images(loaded.model, images), features)
            same = clip.load(name, tmp_path / "weights.pt")  # the file's own size
            assert (
                clip.encode_images(same.model, torch.randn(2, 3, *same.config["preprocess_cfg"]["size"]))
                .isfinite()
                .all()
            )


@pytest.mark.filterwarnings("ignore:.*does not tell its activation")
def test_an_image_size_that_a_tower_cannot_have_is_refused(listed, tmp_path):
    for name, size, message in (
        ("RN50", 64, "attention pool of a ModifiedResNet has positions for images of one size"),
        ("ViT-B-16", (8, 0), r"image_size is \(8, 0\); expected a side, or \(height, width\)"),
        ("ViT-B-16", 0, "image_size is 0; expected"),
    ):
        listed(name)
        with pytest.raises(ValueError, match=message):
            clip.load(name, tmp_path / "weights.pt", image_size=size)


def test_a_configuration_of_another_size_than_its_trunks_gets_the_trunks(listed, tmp_path):
    """As open_clip's ViTamin-XL-384 is, which says 256."""
    model, _ = listed("ViTamin-XL-384", image_size=64)
    bundle = clip.load("ViTamin-XL-384", tmp_path / "weights.pt")
    assert bundle.config["preprocess_cfg"]["size"] == [32, 32] == list(bundle.model.visual.image_size)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(clip.encode_images(bundle.model, images), clip.encode_images(model.eval(), images))


def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ImportError, match=r"roberta-ViT-B-32: its text tower needs transformers: .*'robustft\[transf"):
        clip.load("roberta-ViT-B-32")
    with pytest.raises(ImportError, match=r"ViT-B-16-SigLIP2: its tokenizer needs transformers: .*'robustft\[transf"):
        clip.load("ViT-B-16-SigLIP2", "webli")


def test_a_tokenizer_of_pieces_of_words_names_what_reads_them(listed, tmp_path, monkeypatch):
    listed("ViT-B-16")

    def of_pieces(*_arguments, **_options):
        raise ValueError(
            "Couldn't instantiate the backend tokenizer: you need to have SentencePiece or tiktoken installed"
        )

    monkeypatch.setattr(open_clip, "get_tokenizer", of_pieces)
    with pytest.raises(ImportError, match=r"its tokenizer needs sentencepiece: pip install 'robustft\[transformers\]'"):
        clip.load("ViT-B-16")
