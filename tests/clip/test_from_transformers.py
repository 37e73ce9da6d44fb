"""Folders that transformers saved, in and out again: the same logits, the same weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from robustft import clip
from robustft.clip import from_transformers
from robustft.clip.as_transformers import differences, processed, write_transformers
from robustft.files import read_tensors

pytestmark = pytest.mark.exhaustive  # transformers takes seconds to be imported
CAPTIONS = ["a photo of a cat.", "ducks, 3 geese"]
SIZES = {"hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def words(transformers):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<unk>": 1, **{letter: place for place, letter in enumerate("abcdefghijklmnop", 2)}}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_max_length=16
    )


def saved(folder, kind, act="gelu", eps=None, **changes):
    """A tiny model of random weights as transformers saves it, with its processor and tokenizer."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    norm = {} if eps is None else {"layer_norm_eps": eps}
    vision = {**SIZES, **norm, "hidden_act": act, "image_size": 32, "patch_size": 16, **changes.get("vision", {})}
    text = {**SIZES, **norm, "hidden_act": act, "max_position_embeddings": 16}
    if kind == "CLIP":
        text |= {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, **changes.get("text", {})}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        tokenizer = None
    else:
        text |= {"vocab_size": 40, "projection_size": 8, **changes.get("text", {})}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        sizes = {"size": {"height": 32, "width": 32}}
        tokenizer = words(transformers)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{kind}ImageProcessor")(**sizes, image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model


KINDS = [("CLIP", act) for act in ("quick_gelu", "gelu", "gelu_pytorch_tanh")]
KINDS += [("Siglip", act) for act in ("gelu", "gelu_pytorch_tanh")]


@pytest.mark.parametrize(("kind", "act"), KINDS)
@pytest.mark.parametrize("eps", [None, 1e-4])
def test_logits_are_those_of_transformers(tmp_path, kind, act, eps):
    theirs = saved(tmp_path, kind, act, eps)
    bundle = clip.load(str(tmp_path / "config.json"))
    images, tokens = torch.randn(3, 3, 32, 32), bundle.tokenizer(CAPTIONS)
    with torch.no_grad():
        expected = theirs(pixel_values=images, input_ids=tokens).logits_per_image
        u, v = clip.encode_images(bundle.model, images), clip.encode_texts(bundle.model, tokens)
        found = clip.logit_scale(bundle.model) * u @ v.T
        if kind == "Siglip":
            found = found + bundle.model.logit_bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    rows = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(rows).resize((64, 96), Image.Resampling.BICUBIC)
    assert float((processed(tmp_path, [image])[0] - bundle.eval_transform(image)).abs().max()) <= 2 / 255 / 0.2


@pytest.mark.parametrize(("kind", "act"), [("CLIP", "quick_gelu"), ("CLIP", "gelu"), *KINDS[3:]])
def test_in_out_and_in_again_is_the_same_model(tmp_path, kind, act):
    saved(tmp_path / "in", kind, act)
    bundle = clip.load(str(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    write_transformers(bundle.model, tmp_path / "out", bundle.config, bundle.tokenizer)
    first, second = (read_tensors(tmp_path / place / "model.safetensors") for place in ("in", "out"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    again = clip.load(str(tmp_path / "out"))
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bundle.model.state_dict().items())
    assert again.config["preprocess_cfg"] == bundle.config["preprocess_cfg"]
    assert torch.equal(again.tokenizer(CAPTIONS), bundle.tokenizer(CAPTIONS))
    assert differences(bundle.model, tmp_path / "out", torch.randn(2, 3, 32, 32), CAPTIONS, bundle.tokenizer)[0] < 1e-5
    clip.export(bundle.model, tmp_path / "open_clip", bundle.config, tokenizer=bundle.tokenizer)
    kept = clip.load(f"local-dir:{tmp_path / 'open_clip'}")
    assert all(torch.equal(value, state[name]) for name, value in kept.model.state_dict().items())
    assert torch.equal(kept.tokenizer(CAPTIONS), bundle.tokenizer(CAPTIONS))


@pytest.mark.parametrize(
    ("kind", "file", "change", "words"),
    [
        ("CLIP", "config.json", {"model_type": "bert"}, "config.json: model_type is 'bert'"),
        ("CLIP", "config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        (
            "CLIP",
            "config.json",
            {"vision_config": {**SIZES, "image_size": 32, "patch_size": 8}},
            "model.safetensors: damaged, or no",
        ),
        ("CLIP", "config.json", {"text_config": {"hidden_act": "gelu"}}, "quick_gelu in one tower alone"),
        ("CLIP", "preprocessor_config.json", {"do_center_crop": False}, "does not prepare images so"),
        ("Siglip", "preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "does not prepare images so"),
        ("Siglip", "config.json", {"vision_config": {"vision_use_head": False}}, "expected a pooling head"),
    ],
)
def test_what_open_clip_does_not_compute_is_refused_by_its_file(tmp_path, kind, file, change, words):
    saved(tmp_path, kind, "quick_gelu" if kind == "CLIP" else "gelu")
    given = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(given | change))
    with pytest.raises(ValueError, match=words):
        clip.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_adapters_on_such_a_model_come_back(tmp_path, kind):
    saved(tmp_path / "in", kind)
    bundle = clip.load(str(tmp_path / "in"))
    model = clip.adapt(bundle.model, clip.LoRA(rank=2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    folder = clip.export(model, tmp_path / "out", bundle.config, tokenizer=bundle.tokenizer)
    assert not (folder / clip.WEIGHTS_FILE).exists()
    images = torch.randn(3, 3, 32, 32)
    again = clip.load(f"local-dir:{folder}")
    assert torch.equal(clip.encode_images(again.model, images), clip.encode_images(model, images))
    (tmp_path / "merged").mkdir()
    merged = clip.merged(model)
    write_transformers(merged, tmp_path / "merged", again.config, again.tokenizer)
    assert differences(merged, tmp_path / "merged", images, CAPTIONS, again.tokenizer)[0] < 1e-5


def test_a_folder_without_weights_says_so(tmp_path):
    saved(tmp_path, "CLIP")
    (tmp_path / "model.safetensors").rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file; transformers' save_pretrained"):
        clip.load(str(tmp_path))


def test_published_sizes_with_timms_gelu_have_timms_name():
    base = {"model_type": "siglip", "vision_config": {"hidden_act": "gelu"}}
    assert from_transformers.model_settings(base)["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    name = from_transformers.model_settings({"model_type": "siglip"})["vision_cfg"]["timm_model_name"]
    assert name == "vit_siglip_w768_l12_h12_m3072_p16_i224_tanh_e1000"
