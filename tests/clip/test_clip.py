from __future__ import annotations

import argparse
import copy
import json
import os
import textwrap
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from targets import exhaustive
from torch import nn

from robustft import clip
from robustft.clip import loading
from robustft.ensembles import WiSEFT, uniform_soup
from robustft.methods import FLYP
from robustft.predictors import zero_shot

open_clip = clip.import_open_clip()

VIT = {"image_size": 28, "patch_size": 7, "width": 32, "layers": 2, "head_width": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MODELS = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT},
    "custom-text": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "linear-text": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT | {"proj_bias": True}},
    "siglip": {
        "embed_dim": 16,
        "vision_cfg": VIT,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10.0,
        "nonscalar_logit_scale": True,
    },
}
activation_untold = pytest.mark.filterwarnings("ignore:.*does not tell its activation")
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}


def config_of(kind: str) -> dict:
    return {"model_cfg": copy.deepcopy(MODELS[kind]), "preprocess_cfg": dict(PREPROCESS)}


def build(kind: str = "vit", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    arguments = copy.deepcopy(MODELS[kind])
    model = (open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP)(**arguments)
    # open_clip starts the projections of some towers at zero or one: perturb everything, so that mix-ups
    # show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.eval()


def images_for(model: nn.Module, n: int = 3) -> torch.Tensor:
    size = model.visual.image_size
    return torch.randn(n, 3, *(size if isinstance(size, tuple) else (size, size)))


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=16)


# Encoding


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom-text", "siglip"])
def test_features_are_open_clips_normalised_and_differentiable(kind, tokenizer):
    model = build(kind)
    images, tokens = images_for(model), tokenizer(["a cat", "two dogs", "x"])
    for encode, theirs, argument in (
        (clip.encode_images, model.encode_image, images),
        (clip.encode_texts, model.encode_text, tokens),
    ):
        features = encode(model, argument)
        torch.testing.assert_close(features, F.normalize(theirs(argument), dim=-1))
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(encode(model, argument, normalize=False), theirs(argument))
        assert features.requires_grad


def test_features_are_unit_in_float32_under_autocast_and_in_half_precision(tokenizer):
    model = build()
    images, tokens = images_for(model), tokenizer(["a cat"])
    with torch.autocast("cpu", torch.bfloat16):
        features = clip.encode_images(model, images), clip.encode_texts(model, tokens)
    half = model.to(torch.bfloat16)
    for feature in (*features, clip.encode_images(half, images), clip.encode_texts(half, tokens)):
        assert feature.dtype == torch.float32
        torch.testing.assert_close(feature.norm(dim=-1), torch.ones(len(feature)))
    assert clip.encode_images(model.double(), images).dtype == torch.float64


@pytest.mark.parametrize("output_dict", [False, True])
def test_forwards_return_type_does_not_matter(output_dict, tokenizer):
    model = build()
    model.output_dict = output_dict
    assert clip.encode_images(model, images_for(model)).shape == (3, 16)
    assert clip.logit_scale(model).ndim == 0


def test_towers_that_return_tokens_give_their_pooled_feature():
    model = build()
    images = images_for(model)
    plain = clip.encode_images(model, images)
    model.visual.output_tokens = True
    assert torch.equal(clip.encode_images(model, images), plain)


def test_unprepared_images_and_tokens_are_refused():
    model = build()
    for images in (torch.zeros(3, 28, 28), torch.zeros(1, 3, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images"):
            clip.encode_images(model, images)
    with pytest.raises(ValueError, match="tokens"):
        clip.encode_texts(model, torch.zeros(16, dtype=torch.long))


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_logit_scale_is_the_models_own_and_differentiable(kind):
    model = build(kind)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    scale = clip.logit_scale(model)
    assert scale.shape == ()
    torch.testing.assert_close(scale, torch.tensor(2.0).exp())
    scale.backward()
    torch.testing.assert_close(model.logit_scale.grad.reshape(()), torch.tensor(2.0).exp())
    with pytest.raises(ValueError, match="logit_scale"):
        clip.logit_scale(nn.Linear(2, 2))


def test_class_embeddings_are_the_unit_mean_of_unit_template_features(tokenizer):
    model = build()
    names, templates = ["cat", "dog", "cat"], ["a {}", "the {c}.", lambda c: f"my {c}"]
    head = clip.class_embeddings(model, tokenizer, names, templates, batch_size=2)
    for k, name in enumerate(names):
        texts = model.encode_text(tokenizer([f"a {name}", f"the {name}.", f"my {name}"]))
        texts = texts.double() / texts.double().norm(dim=-1, keepdim=True)
        expected = texts.mean(0) / texts.mean(0).norm()
        torch.testing.assert_close(head[k].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(head[0], head[2])  # ties are real
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, ["a {}", "the {}."])
    torch.testing.assert_close(clip.class_embeddings(model, tokenizer, names, ["a {}", "the {}."]), theirs.T)


def test_class_embeddings_do_not_depend_on_the_batch_size_and_carry_gradients(tokenizer):
    model = build()
    grads = []
    for batch_size in (1, 256):
        model.zero_grad()
        clip.class_embeddings(model, tokenizer, ["cat", "dog"], ["a {}", "{}"], batch_size=batch_size)[0, 0].backward()
        grads.append(model.text_projection.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not clip.class_embeddings(model, tokenizer, ["cat"], ["{}"]).requires_grad


def test_caption_embeddings_take_classes_of_different_lengths(tokenizer):
    model = build()
    head = clip.caption_embeddings(model, tokenizer, [["six legs"], ["striped", "furry", "it flies"]])
    features = clip.encode_texts(model, tokenizer(["striped", "furry", "it flies"]))
    torch.testing.assert_close(head[0], clip.encode_texts(model, tokenizer(["six legs"]))[0])
    torch.testing.assert_close(head[1], F.normalize(features.mean(0), dim=0))


class DroppedText(nn.Module):
    """A text tower with dropout; open_clip's own have none."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.model.encode_text(tokens), 0.3)


def head_and_gradients(model: nn.Module, tokenizer, **options) -> tuple[list[torch.Tensor], int]:
    """The head, its gradients by all parameters, and how many bytes of activations the forward has left behind."""
    texts = [[f"{a} {b}" for b in ("cat", "dog", "bird")] for a in ("a", "the", "my", "one", "no")]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head = clip.caption_embeddings(model, tokenizer, texts, **options)
    (head * torch.linspace(-1, 1, head.numel()).view_as(head)).sum().backward()
    return [head.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], sum(held.values())


@pytest.mark.parametrize("make", [build, DroppedText])
def test_recomputed_captions_have_the_same_gradients_and_leave_no_activations(make, tokenizer):
    model = make()
    kept, kept_bytes = head_and_gradients(model, tokenizer, batch_size=4)
    again, again_bytes = head_and_gradients(model, tokenizer, batch_size=4, checkpoint=True)
    assert len(kept) > 10 and all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert again_bytes < kept_bytes / 20


def test_captions_of_some_classes_are_encoded_alone(tokenizer):
    model, captions = build(), [["six legs"], ["striped", "furry"], ["six legs"], ["horns"]]
    groups = clip.group_captions(tokenizer, captions)
    assert groups.sizes == (1, 2, 1) and groups.rows.tolist() == [0, 1, 0, 2]
    some = groups.of(torch.tensor([3, 1, 3]))
    assert some.sizes == (2, 1) and len(some.tokens) == 3
    whole = clip.caption_embeddings(model, tokenizer, captions)
    torch.testing.assert_close(clip.grouped_embeddings(model, some), whole[[3, 1, 3]])


@pytest.mark.parametrize("names, templates", [([], ["{}"]), (["a"], []), (["a", ""], ["{}"]), (["a"], ["b"])])
def test_class_embeddings_refuse_empty_input(names, templates, tokenizer):
    with pytest.raises(ValueError, match="class_names|templates"):
        clip.class_embeddings(build(), tokenizer, names, templates)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_visual_projection_maps_the_towers_last_hidden_state_to_the_feature(kind):
    model = build(kind)
    images, hidden = images_for(model), []
    weight = clip.visual_projection(model)
    if kind == "vit":
        feature = model.encode_image(images)
        with torch.no_grad():
            proj, model.visual.proj = model.visual.proj, None
            hidden, bias = model.encode_image(images), 0
            model.visual.proj = proj
    else:
        pool = model.visual.attnpool
        feature, bias = model.encode_image(images), pool.c_proj.bias.clone()
        with torch.no_grad():  # an identity output map leaves the pool's hidden state
            kept = copy.deepcopy(pool.c_proj.state_dict())
            width = pool.c_proj.in_features
            pool.c_proj.weight = nn.Parameter(torch.eye(width))
            pool.c_proj.bias = nn.Parameter(torch.zeros(width))
            hidden = model.encode_image(images)
        weight = kept["weight"].T
    torch.testing.assert_close(hidden @ weight + bias, feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, visual, text",
    [
        ("vit", "visual.proj", "text_projection"),
        ("resnet", "visual.attnpool.c_proj.weight", "text_projection"),
        ("custom-text", "visual.proj", "text.text_projection"),
        ("linear-text", "visual.proj", "text_projection.weight"),
    ],
)
def test_projections_share_the_parameters_storage_and_pass_gradients(kind, visual, text):
    model = build(kind)
    parameters = dict(model.named_parameters())
    for projection, name, width in (
        (clip.visual_projection(model), visual, 256 if kind == "resnet" else 32),
        (clip.text_projection(model), text, 16),
    ):
        assert projection.shape == (width, 16)
        assert projection.data_ptr() == parameters[name].data_ptr()
        projection.square().sum().backward()
        torch.testing.assert_close(parameters[name].grad, 2 * parameters[name])


def test_projection_of_a_timm_tower_with_a_linear_head():
    pytest.importorskip("timm")
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    model = open_clip.CustomTextCLIP(16, vision, copy.deepcopy(TEXT))
    weight = clip.visual_projection(model)
    assert weight.shape[1] == 16 and weight.data_ptr() == model.visual.head.proj.weight.data_ptr()


def test_towers_without_a_projection_are_named():
    model = build()
    model.visual.proj = None
    with pytest.raises(ValueError, match="visual tower of this CLIP"):
        clip.visual_projection(model)
    text = TEXT | {"proj_type": "none"}
    with pytest.raises(ValueError, match="text tower of this CustomTextCLIP"):
        clip.text_projection(open_clip.CustomTextCLIP(16, dict(VIT), text))


# Interpolation


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom-text"])
def test_interpolation_has_exact_ends_and_an_exact_middle(kind):
    zero_shot, fine_tuned = build(kind, 0), build(kind, 1)
    if kind == "resnet":
        fine_tuned.train()(images_for(fine_tuned))
        fine_tuned.eval()
    before = clip.fingerprint(zero_shot), clip.fingerprint(fine_tuned)
    assert equal_states(clip.interpolate(zero_shot, fine_tuned, 0), zero_shot)
    assert equal_states(clip.interpolate(zero_shot, fine_tuned, 1.0), fine_tuned)
    mixed = clip.interpolate(zero_shot, fine_tuned, 0.3).state_dict()
    for key, zs in zero_shot.state_dict().items():
        ft = fine_tuned.state_dict()[key]
        expected = 0.7 * zs.double() + 0.3 * ft.double() if zs.is_floating_point() else ft
        torch.testing.assert_close(mixed[key], expected.to(zs.dtype), rtol=1e-6, atol=1e-7)
    assert (clip.fingerprint(zero_shot), clip.fingerprint(fine_tuned)) == before


def test_interpolation_keeps_weights_that_did_not_change_bit_for_bit():
    weights = {"w": torch.randn(1000), "h": torch.randn(1000).half()}
    for alpha in (0.1, 0.3, 0.5, 0.7, 0.9):
        mixed = clip.interpolate_state(weights, {k: v.clone() for k, v in weights.items()}, alpha)
        assert all(torch.equal(mixed[key], weights[key]) for key in weights)


def test_the_ends_return_signed_zeros_and_non_finite_values_too():
    inf = float("inf")
    zs, ft = {"w": torch.tensor([-0.0, inf, 1.0])}, {"w": torch.tensor([1.0, -inf, -0.0])}
    for alpha, end in ((0, zs), (1, ft)):
        mixed = clip.interpolate_state(zs, ft, alpha)["w"]
        assert torch.equal(mixed.view(torch.int32), end["w"].view(torch.int32))


def test_half_precision_weights_are_rounded_once():
    torch.manual_seed(0)
    zs, ft = torch.randn(5000).bfloat16(), torch.randn(5000).bfloat16()
    mixed = clip.interpolate_state({"w": zs}, {"w": ft}, 0.37)["w"]
    exact = 0.63 * zs.double() + 0.37 * ft.double()
    half_an_ulp = 2.0**-8 * exact.abs() + 1e-6
    assert ((mixed.double() - exact).abs() <= half_an_ulp).all()


def test_interpolation_leaves_the_fine_tuned_models_flags_and_shares_nothing():
    zero_shot, fine_tuned = build(seed=0), build(seed=1).train()
    fine_tuned.logit_scale.requires_grad_(False)
    model = clip.interpolate(zero_shot, fine_tuned, 1.0)
    assert model.training and not model.logit_scale.requires_grad and model.visual.proj.requires_grad
    with torch.no_grad():
        model.visual.proj.zero_()
    assert fine_tuned.visual.proj.abs().sum() > 0
    assert not clip.interpolate_state(zero_shot.state_dict(), fine_tuned.state_dict(), 0.5)["visual.proj"].requires_grad


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        clip.interpolate_state({}, {}, alpha)


def test_states_that_do_not_match_are_named():
    zs = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}
    ft = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.float64), "d": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"zero_shot \(c\).*fine_tuned \(d\).*a \(2,\).*\(3,\).*b .*float64"):
        clip.interpolate_state(zs, ft, 0.5)


# Export and load


@pytest.mark.parametrize("kind", list(MODELS))
def test_an_export_loads_in_open_clip_bit_for_bit(kind, tmp_path, tokenizer):
    model = build(kind)
    path = clip.export(model, tmp_path / "runs" / "model", config_of(kind))
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    assert type(loaded) is type(model)
    assert equal_states(loaded, model)
    images, texts = images_for(model), ["a photo of a cat", "seven"]
    tokens = open_clip.get_tokenizer(f"local-dir:{path}")(texts)
    assert torch.equal(tokens, tokenizer(texts)) and tokens.shape == (2, 16)
    assert torch.equal(loaded.eval().encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
    assert transform.transforms[-1].mean == PREPROCESS["mean"]
    assert {file.name for file in path.iterdir()} == {clip.CONFIG_FILE, clip.WEIGHTS_FILE, clip.CARD_FILE}
    assert [file.name for file in path.parent.iterdir()] == ["model"]  # nothing temporary is left


@pytest.mark.parametrize("kind", list(MODELS))
def test_an_export_loads_here_and_exports_again_unchanged(kind, tmp_path):
    model = build(kind)
    first = clip.export(model, tmp_path / "first", config_of(kind))
    bundle = clip.load(f"local-dir:{first}")
    assert equal_states(bundle.model, model) and not bundle.model.training
    assert bundle.config["model_cfg"] == config_of(kind)["model_cfg"]
    assert clip.fingerprint(bundle.model) == clip.fingerprint(model)
    assert bundle.tokenizer(["a"]).shape == (1, 16)
    second = clip.export(bundle.model, tmp_path / "second", bundle.config)
    assert equal_states(open_clip.create_model_and_transforms(f"local-dir:{second}")[0], model)
    assert (first / clip.WEIGHTS_FILE).read_bytes() == (second / clip.WEIGHTS_FILE).read_bytes()


def test_export_writes_tied_and_strided_tensors(tmp_path):
    model = build()
    model.visual.proj = nn.Parameter(model.visual.proj.detach().T.contiguous().T)
    model.ln_final.bias = model.ln_final.weight
    loaded = clip.load(f"local-dir:{clip.export(model, tmp_path / 'm', config_of('vit'))}").model
    assert equal_states(loaded, model)


def test_export_replaces_an_earlier_export_and_nothing_else(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    clip.export(build(seed=0), target, config_of("vit"), card="# mine")
    assert (target / clip.CARD_FILE).read_text() == "# mine"
    clip.export(build(seed=1), target, config_of("vit"))
    assert equal_states(clip.load(f"local-dir:{target}").model, build(seed=1))

    (target / "notes.txt").write_text("keep me")
    other = tmp_path / "project"
    other.mkdir()
    (other / "README.md").write_text("a project")
    (tmp_path / "file").write_text("a file")
    for place in (target, other, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=place.name):
            clip.export(build(seed=0), place, config_of("vit"))
    assert equal_states(clip.load(f"local-dir:{target}").model, build(seed=1))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "project", "file"}


def test_an_export_with_a_classifier_is_an_export_to_open_clip_and_to_a_later_one(tmp_path):
    target = clip.export(
        build(seed=0), tmp_path / "model", config_of("vit"), classifier=lambda path: path.write_bytes(b"a head")
    )
    (target / clip.WEIGHTS_FILE).rename(target / "weights.safetensors")  # sorts after the classifier's
    assert equal_states(clip.load(f"local-dir:{target}").model, build(seed=0))
    (target / "weights.safetensors").rename(target / clip.WEIGHTS_FILE)
    assert equal_states(open_clip.create_model_and_transforms(f"local-dir:{target}")[0], build(seed=0))
    for content in (b"another", None):
        write = None if content is None else lambda path, content=content: path.write_bytes(content)
        clip.export(build(seed=1), target, config_of("vit"), classifier=write)
        held = target / clip.CLASSIFIER_FILE
        assert (held.read_bytes() if held.exists() else None) == content
    assert equal_states(clip.load(f"local-dir:{target}").model, build(seed=1))


def test_a_failing_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    target = clip.export(build(seed=0), tmp_path / "model", config_of("vit"))

    def full(*_args, **_kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            clip.export(build(seed=1), target, config_of("vit"))
    rename = os.rename

    def fails_into_place(source, destination):
        if destination == target and ".old" not in str(source):
            raise OSError("busy")
        rename(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fails_into_place)
        with pytest.raises(OSError, match="busy"):
            clip.export(build(seed=1), target, config_of("vit"))
    assert equal_states(clip.load(f"local-dir:{target}").model, build(seed=0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_refuses_an_incomplete_configuration(tmp_path):
    with pytest.raises(ValueError, match="preprocess_cfg"):
        clip.export(build(), tmp_path / "model", {"model_cfg": MODELS["vit"]})
    assert not list(tmp_path.iterdir())


def test_wrapped_models_export_and_fingerprint_as_the_model_inside(tmp_path):
    model = build()
    compiled = torch.compile(model, backend="eager")  # nothing runs, and Inductor takes seconds to be imported
    parallel = types.SimpleNamespace(module=model)
    assert clip.fingerprint(compiled) == clip.fingerprint(model)
    assert clip.unwrap(parallel) is model
    assert equal_states(clip.load(f"local-dir:{clip.export(compiled, tmp_path / 'm', config_of('vit'))}").model, model)


# Loading


@pytest.fixture(scope="module")
def tiny_architectures(tmp_path_factory):
    """Registers the tiny models as open_clip architectures called tiny-*."""
    folder = tmp_path_factory.mktemp("architectures")
    for kind, model_cfg in MODELS.items():
        (folder / f"tiny-{kind}.json").write_text(json.dumps(model_cfg))
    registry = open_clip.factory
    paths, known = list(registry._MODEL_CONFIG_PATHS), dict(registry._MODEL_CONFIGS)
    open_clip.add_model_config(folder)
    yield
    registry._MODEL_CONFIG_PATHS[:] = paths
    registry._MODEL_CONFIGS.clear()
    registry._MODEL_CONFIGS.update(known)


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.torch import save_file

    model = build()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        tmp_path / "t.pt",
    )
    return model, tmp_path


@activation_untold
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt", "t.pt"])
def test_architectures_load_checkpoint_files(file, checkpoint, tiny_architectures, caplog):
    model, folder = checkpoint
    bundle = clip.load("tiny-vit", folder / file)
    assert equal_states(bundle.model, model)
    assert bundle.config["model_cfg"] == MODELS["vit"]
    assert not caplog.records  # no talk of random weights


def test_a_checkpoint_file_replaces_a_directorys_weights(checkpoint):
    model, folder = checkpoint
    path = clip.export(build(seed=5), folder / "exported", config_of("vit"))
    assert equal_states(clip.load(f"local-dir:{path}", folder / "weights.pt").model, model)


def test_the_configuration_says_what_was_built(tmp_path, checkpoint, tiny_architectures, monkeypatch):
    # A tag trained with QuickGELU under a name without it: the tag's activation is built, and exported.
    model, folder = checkpoint
    tag = {"quick_gelu": True, "file": str(folder / "weights.pt"), "mean": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, asked: tag if asked == "mytag" else {})
    bundle = clip.load("tiny-vit", "mytag")
    assert bundle.config["model_cfg"]["quick_gelu"] is True
    assert bundle.config["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
    path = clip.export(bundle.model, tmp_path / "exported", bundle.config)
    loaded = open_clip.create_model_and_transforms(f"local-dir:{path}")[0].eval()
    images = images_for(model)
    assert torch.equal(loaded.encode_image(images), bundle.model.encode_image(images))
    assert not torch.allclose(model.encode_image(images), bundle.model.encode_image(images), atol=1e-4)


def test_hub_names_use_the_files_they_name(checkpoint, monkeypatch):
    model, folder = checkpoint
    path = clip.export(model, folder / "exported", config_of("vit"))
    asked = []

    def download(repository, filename=None, revision=None, cache_dir=None):
        asked.append(repository)
        return str(path / (filename or clip.WEIGHTS_FILE))

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", download)
    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", download)
    bundle = clip.load("hf-hub:org/repo", cache_dir=folder)
    assert equal_states(bundle.model, model) and set(asked) == {"org/repo"}


def test_a_tokenizer_without_its_package_says_what_to_install(tiny_architectures, monkeypatch):
    def missing(*_args, **_kwargs):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(open_clip, "get_tokenizer", missing)
    monkeypatch.setattr(loading, "_TOKENIZERS", {})
    with pytest.raises(ImportError, match=r"its tokenizer needs transformers: pip install .robustft\[transformers\]"):
        clip.load("tiny-vit")


def test_device_and_dtype_are_obeyed(tiny_architectures):
    model = clip.load("tiny-vit", device="cpu", dtype=torch.bfloat16).model
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
    with pytest.raises(ValueError, match="device is 'meta', where a model has no weights"):
        clip.load("tiny-vit", device="meta")


def test_unknown_architectures_suggest_close_names(tmp_path):
    with pytest.raises(ValueError, match="ViT-B-32"):
        clip.load("vit-b-32")
    with pytest.raises(ValueError, match="local-dir:"):
        clip.load(str(tmp_path))


def test_missing_files_and_unknown_tags_are_told_apart(tmp_path, tiny_architectures):
    for missing in (tmp_path / "none.pt", "none.safetensors", "folder/none"):
        with pytest.raises(FileNotFoundError, match="none"):
            clip.load("tiny-vit", missing)
    with pytest.raises(ValueError, match="laion2b_s34b_b79k"):
        clip.load("ViT-B-32", "laion2c")
    with pytest.raises(FileNotFoundError, match=clip.CONFIG_FILE):
        clip.load(f"local-dir:{tmp_path}")
    (tmp_path / clip.CONFIG_FILE).write_text(json.dumps(config_of("vit")))
    with pytest.raises(FileNotFoundError, match=clip.WEIGHTS_FILE):
        clip.load(f"local-dir:{tmp_path}")
    for broken in ("{", "[]", '{"vision_cfg": {}}'):
        (tmp_path / clip.CONFIG_FILE).write_text(broken)
        with pytest.raises(ValueError, match=clip.CONFIG_FILE):
            clip.load(f"local-dir:{tmp_path}")


@activation_untold
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_checkpoints_are_refused_by_name(file, share, checkpoint, tiny_architectures):
    _, folder = checkpoint
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{file}: truncated"):
        clip.load("tiny-vit", folder / file)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, its archives are not gone
def test_pickled_modules_and_torchscript_are_refused_with_the_cure(checkpoint, tiny_architectures):
    model, folder = checkpoint
    torch.save(model, folder / "module.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "script.pt")
    torch.save({"state_dict": model.state_dict(), "arguments": argparse.Namespace(lr=1.0)}, folder / "arguments.pt")
    for file in ("module.pt", "script.pt", "arguments.pt"):
        with pytest.raises(ValueError, match=f"{file}: not a plain state dict.*convert") as caught:
            clip.load("tiny-vit", folder / file)
        if file != "script.pt":  # an archive of these models cannot be made, and its cure is one call
            cure = str(caught.value).partition("once: ")[2].replace("'weights.pt'", "cured")
            exec(cure, {"torch": torch, "path": folder / file, "cured": folder / "cured.pt"})
            assert equal_states(clip.load("tiny-vit", folder / "cured.pt").model, model)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


WRAPPED = {
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled in parallel": lambda state: prefixed(state, "module._orig_mod."),
    "parallel compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "thrice": lambda state: {"state_dict": prefixed(state, "module._orig_mod.module.")},
    "part compiled": lambda state: {key.replace("visual.", "visual._orig_mod."): x for key, x in state.items()},
    "OpenAI's archive": lambda state: state | {"input_resolution": torch.tensor(28), "vocab_size": torch.tensor(9)},
    "numpy's numbers": lambda state: {
        "epoch": np.int64(3),
        "state_dict": prefixed(state, "module."),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1), "betas": np.float32([0.9, 0.999])}]},
        "best": np.bool_(True),
    },
}


@activation_untold
@pytest.mark.parametrize(
    ("kind", "legacy"),
    [
        ("thrice", True),
        *((kind, False) for kind in WRAPPED),
        *exhaustive(*((kind, True) for kind in WRAPPED if kind != "thrice")),
    ],
)
def test_checkpoints_of_wrapped_models_and_of_trainings_load(kind, legacy, checkpoint, tiny_architectures):
    model, folder = checkpoint
    file = folder / "wrapped.pt"
    torch.save(WRAPPED[kind](model.state_dict()), file, _use_new_zipfile_serialization=not legacy)
    assert equal_states(clip.load("tiny-vit", file).model, model)


def test_prefixes_come_off_safetensors_and_models_with_a_bias(tmp_path):
    from safetensors.torch import save_file

    model = build("siglip")
    path = clip.export(build("siglip", seed=1), tmp_path / "m", config_of("siglip"))
    save_file(prefixed(model.state_dict(), "_orig_mod.module."), tmp_path / "w.safetensors")
    assert equal_states(clip.load(f"local-dir:{path}", tmp_path / "w.safetensors").model, model)


def test_a_file_under_a_name_with_two_activations_says_which_was_taken(checkpoint, tiny_architectures, recwarn):
    _, folder = checkpoint
    with pytest.warns(UserWarning, match="weights.pt does not tell its activation.*GELU.*'tiny-vit-quickgelu'"):
        clip.load("tiny-vit", folder / "weights.pt")
    recwarn.clear()
    clip.load("tiny-vit-quickgelu", folder / "weights.pt")  # a name that says it
    clip.load("tiny-vit")
    state = build("custom-text").state_dict()
    torch.save(state, folder / "custom.pt")
    clip.load("tiny-custom-text", folder / "custom.pt")  # a name with one activation
    assert not recwarn.list


# What is computed with the weights


DIFFERENT = {
    "quickgelu": (lambda cfg: cfg.update(quick_gelu=True), r"gelu is GELU and QuickGELU"),
    "heads": (lambda cfg: cfg["vision_cfg"].update(head_width=8), r"num_heads is 2 and 4"),
    "text heads": (lambda cfg: cfg["text_cfg"].update(heads=4), r"num_heads is 2 and 4"),
    "eps": (lambda cfg: cfg["vision_cfg"].update(norm_kwargs={"eps": 1e-6}), r"eps is 1e-05 and 1e-06"),
    "tanh": (lambda cfg: cfg["text_cfg"].update(act_kwargs={"approximate": "tanh"}), "approximate is none and tanh"),
    "pooling": (lambda cfg: cfg["vision_cfg"].update(pool_type="avg"), "visual.pool_type is tok and avg"),
    "text pooling": (lambda cfg: cfg["text_cfg"].update(pool_type="last"), "text_pool_type is argmax and last"),
    "mask": (lambda cfg: cfg["text_cfg"].update(no_causal_mask=True), "attn_mask is a mask and none"),
}


@pytest.mark.parametrize("setting", DIFFERENT)
def test_models_of_one_shape_that_compute_different_things_are_not_mixed_or_exported(setting, tmp_path):
    change, message = DIFFERENT[setting]
    config = config_of("vit")
    change(config["model_cfg"])
    model, other = build(), open_clip.CLIP(**copy.deepcopy(config["model_cfg"]))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    head = torch.eye(2, 16)
    mixed = [zero_shot.Classifier(m, head, ("a", "b")) for m in (model, other)]
    for mix, names in (
        (lambda: clip.interpolate(model, other, 0.5), "zero_shot and fine_tuned"),
        (lambda: WiSEFT(*mixed).at(0.5), "zero_shot and fine_tuned"),
        (lambda: uniform_soup(mixed), r"classifiers\[0\] and classifiers\[1\]"),
        (lambda: clip.export(model, tmp_path / "m", config), "the model and its config"),
    ):
        with pytest.raises(ValueError, match=f"{names} compute different things.*{message}"):
            mix()
    assert not list(tmp_path.iterdir())


def test_image_statistics_that_two_models_state_are_compared(tmp_path):
    model, other = build(), build(seed=1)
    open_clip.set_model_preprocess_cfg(model, PREPROCESS)
    clip.interpolate(model, other, 0.5)  # the other, built by hand, states none
    open_clip.set_model_preprocess_cfg(other, PREPROCESS | {"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ValueError, match=r"image mean and std is \(\(0.1, 0.2, 0.3\).* and \(\(0.5, 0.5, 0.5\)"):
        clip.interpolate(model, other, 0.5)
    with pytest.raises(ValueError, match="the model and its config .*image mean and std"):
        clip.export(other, tmp_path / "m", config_of("vit"))


@pytest.mark.parametrize(("setting", "value"), [("size", 9), ("interpolation", "bicubic"), ("resize_mode", "squash")])
def test_a_model_is_exported_under_no_other_preparation_of_images(tmp_path, setting, value):
    model, config = build(), config_of("vit")
    stated = PREPROCESS | {"size": 8, "resize_mode": "shortest"}
    open_clip.set_model_preprocess_cfg(model, stated)
    clip.export(model, tmp_path / "same", config | {"preprocess_cfg": stated | {"size": [8, 8]}})
    with pytest.raises(ValueError, match=f"prepare images in two ways: .*{setting} is .* and {value!r}"):
        clip.export(model, tmp_path / "other", config | {"preprocess_cfg": stated | {setting: value}})
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


class Wrapper(nn.Module):
    """What DataParallel and DistributedDataParallel are to a model: `.module`, and none of its attributes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


WRAPPERS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: Wrapper(torch.compile(model)),
    "both, the other way": lambda model: torch.compile(Wrapper(model)),
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_copies_compute_the_same_in_every_mode_precision_and_wrapper(kind, tmp_path):
    model = build(kind)
    trained = copy.deepcopy(model).train().requires_grad_(False)
    trained.set_grad_checkpointing(True)
    trained.output_dict, trained.name, trained.epoch = True, "mine", 3
    noted = copy.deepcopy(model)
    noted.name = "zero-shot"
    part = copy.deepcopy(model)
    part.visual = torch.compile(part.visual)
    loaded = clip.load(f"local-dir:{clip.export(model, tmp_path / 'm', config_of(kind))}").model
    cast = copy.deepcopy(MODELS[kind]) | {"cast_dtype": torch.float16}
    custom = cast.pop("custom_text", False)
    half = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**cast)
    copies = [trained, noted, part, loaded, half, *(wrap(model) for wrap in WRAPPERS.values())]
    copies += [copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float16)]
    for other in copies:
        clip.check_same_computation(trained, other, "a", "b")


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_go_wherever_a_model_goes(wrap, tmp_path, tokenizer):
    model = build()
    wrapped = wrap(model)
    images, tokens = images_for(model), tokenizer(["a cat", "two dogs"])
    assert torch.equal(clip.encode_images(wrapped, images), clip.encode_images(model, images))
    assert torch.equal(clip.encode_patches(wrapped, images), clip.encode_patches(model, images))
    assert torch.equal(clip.encode_texts(wrapped, tokens), clip.encode_texts(model, tokens))
    assert torch.equal(clip.logit_scale(wrapped), clip.logit_scale(model))
    assert clip.visual_projection(wrapped) is model.visual.proj and clip.text_tower(wrapped) is model
    assert clip.token_embedding(wrapped) is model.token_embedding
    assert clip.fingerprint(wrapped) == clip.fingerprint(model)
    assert equal_states(clip.interpolate(wrapped, wrapped, 0.5), model)
    assert equal_states(clip.load(f"local-dir:{clip.export(wrapped, tmp_path / 'm', config_of('vit'))}").model, model)
    open_clip.set_model_preprocess_cfg(model, PREPROCESS)
    assert clip.image_statistics(wrapped) == clip.image_statistics(model)
    head = clip.class_embeddings(wrapped, tokenizer, ["cat", "dog"], ["a {}"])
    encoded = [clip.encode(m, (images, torch.zeros(3))).image_features for m in (wrapped, model)]
    assert torch.equal(*encoded)
    outputs = zero_shot.Classifier(wrapped, head, ("cat", "dog")).outputs(images)
    assert torch.equal(outputs.features, clip.encode_images(model, images))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_methods_train_the_model_inside(wrap, clip_model, prompts, batches):
    method, plain = (FLYP(model, **prompts) for model in (wrap(clip_model), clip_model))
    assert [name for name, _ in method.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(method.step(batches[0]).loss, plain.step(batches[0]).loss)
    assert method.model is not clip_model


def test_trained_weights_in_half_precision_are_named_and_refused():
    model = build().bfloat16().requires_grad_(False)
    clip.check_trainable_precision(model)
    assert clip.half_precision_parameters(model) == []
    model.logit_scale.requires_grad_(True)
    model.visual.proj = nn.Parameter(model.visual.proj.half())
    with pytest.raises(ValueError, match=r"2 trained parameters \(.*\) are torch.bfloat16 and torch.float16.*autocast"):
        clip.check_trainable_precision(model)
    assert set(clip.half_precision_parameters(model)) == {"logit_scale", "visual.proj"}
    clip.check_trainable_precision(model.float())


def test_adapters_in_a_model_are_not_exported_as_what_cannot_be_loaded(tmp_path):
    model = build()
    model.visual.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"config: describes another model: 2 keys .*visual.adapter.weight"):
        clip.export(model, tmp_path / "m", config_of("vit"))
    model = build()
    model.merge_and_unload = lambda: model
    model.visual.proj = nn.Parameter(torch.zeros(32, 8))
    with pytest.raises(ValueError, match=r"visual.proj \(32, 8\), described as \(32, 16\).*merge_and_unload"):
        clip.export(model, tmp_path / "m", config_of("vit"))
    with pytest.raises(ValueError, match="config: open_clip builds no model from it"):
        clip.export(build(), tmp_path / "m", {"model_cfg": {"embed_dim": 8}, "preprocess_cfg": {}})
    assert not list(tmp_path.iterdir())


def test_tokens_of_another_models_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"tokens: \(M, 77\) are longer than the model's context of 16"):
        clip.encode_texts(build(), open_clip.tokenize(["a cat"]))


@activation_untold
def test_checkpoints_of_another_model_name_keys_and_shapes(checkpoint, tiny_architectures):
    model, folder = checkpoint
    with pytest.raises(ValueError, match=r"does not fit the model.*visual\.conv1\.weight"):
        clip.load("tiny-resnet", folder / "weights.pt")
    state = model.state_dict()
    torch.save(
        {k: v for k, v in state.items() if k != "visual.proj"} | {"head.bias": torch.zeros(2)},
        folder / "k.pt",
    )
    with pytest.raises(ValueError, match=r"1 keys missing from the file \(visual\.proj\); 1 keys .* \(head\.bias\)"):
        clip.load("tiny-vit", folder / "k.pt")
    torch.save(state | {"visual.proj": torch.zeros(32, 8)}, folder / "shape.pt")
    with pytest.raises(ValueError, match=r"visual\.proj.*32, 8.*32, 16"):
        clip.load("tiny-vit", folder / "shape.pt")
    for index, other in enumerate(({}, [1, 2], {"logit_scale": torch.zeros(())}, torch.zeros(3))):
        torch.save(other, folder / f"other{index}.pt")
        with pytest.raises(ValueError, match=f"other{index}.pt"):
            clip.load("tiny-vit", folder / f"other{index}.pt")


# Names of models, imports


def test_fingerprint_is_stable_and_sees_every_bit_name_dtype_and_activation():
    model = build()
    assert clip.fingerprint(model) == clip.fingerprint(copy.deepcopy(model).train())
    seen = {clip.fingerprint(model), clip.fingerprint(copy.deepcopy(model).bfloat16())}
    quick = build("vit-quickgelu")
    assert equal_states(quick, model)
    seen.add(clip.fingerprint(quick))
    with torch.no_grad():
        model.logit_scale.copy_(torch.nextafter(model.logit_scale, torch.tensor(100.0)))
    seen.add(clip.fingerprint(model))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "module, setting, value",
    [("transformer.resblocks.0.attn", "num_heads", 1), ("conv1", "stride", (14, 14)), ("ln_post", "eps", 0.1)],
)
def test_fingerprint_sees_settings_that_leave_no_trace_in_the_weights(module, setting, value):
    model, other = build(), build()
    assert getattr(other.visual.get_submodule(module), setting) != value
    setattr(other.visual.get_submodule(module), setting, value)
    assert equal_states(model, other) and clip.fingerprint(model) != clip.fingerprint(other)


def test_clip_imports_without_open_clip_and_says_what_to_install_when_it_is_needed(bare_python):
    code = """
        import sys
        sys.modules["open_clip"] = None
        from robustft.clip import import_open_clip
        assert "torchvision" not in sys.modules
        try:
            import_open_clip()
        except ImportError as error:
            sys.exit("pip install open_clip_torch" not in str(error))
        sys.exit(2)
    """
    assert bare_python.run("-c", textwrap.dedent(code)).returncode == 0


@pytest.mark.exhaustive
def test_torchvision_without_its_operators_is_imported_under_cpu_torch(bare_python):
    # Simulates PyPI's torchvision under a CPU-only torch: its compiled library does not load.
    code = """
        import sys, torch
        torch.version.cuda = None
        load = torch.ops.load_library
        def refuse(path):
            if "torchvision" in str(path):
                raise OSError("libcudart.so: cannot open shared object file")
            load(path)
        torch.ops.load_library = refuse
        try:
            import torchvision
        except RuntimeError as error:
            assert "torchvision::nms" in str(error)
        else:
            sys.exit(77)
        from robustft.clip import import_open_clip
        assert import_open_clip().list_models()
    """
    result = bare_python.run("-c", textwrap.dedent(code))
    if result.returncode == 77:
        pytest.skip("this torchvision imports without its operators")
    assert result.returncode == 0, result.stderr
