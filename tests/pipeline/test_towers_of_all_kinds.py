"""`robustft train` and `predict` on a folder, with a small checkpoint of each kind of model that people fine-tune."""

from __future__ import annotations

import json
import os

import pytest
import yaml
from PIL import Image

from benchmarks import small_architectures
from robustft import cli, clip
from robustft.clip.loading import build
from robustft.evaluation import report
from robustft.methods import load_predictor

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
KINDS = ("ViT-B-16-SigLIP2", "PE-Core-B-16", "MobileCLIP2-S0", "EVA02-B-16", "convnext_base", "coca_ViT-B-32", "RN50")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for shade in range(12):
            Image.new("RGB", (40, 30), tuple(max(0, part - 3 * shade) for part in colour)).save(
                root / name / f"{shade}.png"
            )
    return root


def letters_of_hugging_face(folder):
    """A tokenizer of single letters in files, as SigLIP's is of pieces of words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ."]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    from open_clip.tokenizer import HFTokenizer

    return HFTokenizer(str(folder), context_length=40, clean="canonicalize")


def checkpoint(name, folder):
    """A directory as somebody has one, with a small model of this kind."""
    by_letters = "SigLIP" in name
    sizes = {"vocabulary": 64, "context": 40} if by_letters else {"vocabulary": 49408}
    model, config = build(small_architectures.shrunk(name, folder, **sizes))
    tokenizer = letters_of_hugging_face(folder / "letters") if by_letters else None
    return clip.export(model, folder / "model", config, tokenizer=tokenizer)


def answer(capsys, *command):
    assert cli.main(list(map(str, command))) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def neither_drawn_nor_waited_for(monkeypatch):
    """Most of the time of a run so small is that of its pictures and of the disk."""
    monkeypatch.setattr(report, "render", lambda _drawing: (b"\x89PNG", "<svg></svg>"))
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_a_folder_is_learnt_and_judged(name, photos, tmp_path, capsys):
    if "SigLIP" in name:
        pytest.importorskip("transformers")
    model, output = f"local-dir:{checkpoint(name, tmp_path)}", tmp_path / "run"
    few = ("--epochs", "1", "--batch-size", "9", "--lr", "1e-3", "--workers", "0")
    answer(capsys, "train", photos, "--model", model, "--method", "CaRot", "--output", output, *few)
    lines = answer(capsys, "predict", output, photos / "red", "--json", "--workers", "0").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 12 and {row["label"] for row in found} <= set(COLOURS)
    assert all(0.0 <= row["probability"] <= 1.0 for row in found)
    saved = load_predictor(output / "model")
    assert (clip.logit_bias(saved.model) is not None) == ("SigLIP" in name)


@pytest.mark.exhaustive
def test_the_loss_is_an_option_of_the_command(photos, tmp_path, capsys):
    pytest.importorskip("transformers")
    model = f"local-dir:{checkpoint('ViT-B-16-SigLIP', tmp_path)}"
    command = (
        "train",
        photos,
        "--model",
        model,
        "--epochs",
        "1",
        "--batch-size",
        "9",
        "--lr",
        "1e-3",
        "--workers",
        "0",
    )
    for loss in ("softmax", "sigmoid"):
        output = tmp_path / loss
        answer(capsys, *command, "--method", "FLYP", "--ensemble", "none", "--loss", loss, "--output", output)
        config = yaml.safe_load((output / "config.yaml").read_text())
        assert config["methods"]["FLYP"]["options"] == {"loss": loss}
        bias = clip.logit_bias(load_predictor(output / "model").model).item()
        assert (bias == -10.0) == (loss == "softmax")
    assert (
        cli.main([*map(str, command), "--method", "CoOp", "--loss", "sigmoid", "--output", str(tmp_path / "no")]) == 1
    )
    assert "loss is 'sigmoid', but CoOp train no captions" in capsys.readouterr().err
