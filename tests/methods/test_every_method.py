"""Whatever is trained or mixed: learns, resumes bit for bit, comes back from disk, on both towers, in fp32 and bf16."""

from __future__ import annotations

import copy
import re
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from damage import change
from small_options import PROMPTED
from targets import exhaustive
from tiny_clip import letters

from robustft import methods
from robustft.ensembles.composite import ENSEMBLE_FILE
from robustft.methods import VRFFeatures, load_predictor
from robustft.training.loop import fit

TEXT = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2}
VISION = {
    "vit": {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16},
}
PROMPTS = {"tokenizer": letters, "class_names": ("ant", "bee", "cow"), "templates": ("a {}", "the {}")}
NAMES = list(methods.every_method())
TOWERS = ("FLYP", "CaRot", "DRM", "FineTune", "LPFT", "WorstCaseFineTune")  # are trained, at a smaller rate
RESNETS = "CaRot", "CoOp", "LinearProbe"  # with whom every method is tried by the exhaustive tests
CASES = [(name, "vit") for name in NAMES] + [(name, "resnet") for name in RESNETS]
CASES += exhaustive(*((name, "resnet") for name in NAMES if name not in (*RESNETS, "MaPLe")))


def config(tower):
    model = {"embed_dim": 8, "vision_cfg": VISION[tower], "text_cfg": TEXT}
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}


@pytest.fixture(scope="module")
def models():
    """By tower, a model with running statistics as after pre-training."""
    made = {}
    for tower in VISION:
        torch.manual_seed(0)
        made[tower] = model = open_clip.CLIP(**config(tower)["model_cfg"])
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train().encode_image(images_of(tower, 32))
        for norm in norms:
            norm.momentum = 0.1
    return made


def images_of(tower, count):
    size = VISION[tower]["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def data_of(tower):
    """12 images of three classes, in two groups."""
    return {"image": images_of(tower, 12), "label": torch.arange(12) % 3, "group": torch.arange(12) // 6}


def made(name, model, data, prompts=PROMPTS):
    options = {
        "CaRot": {"ema_interval": 2},
        "DRM": {"descriptions": {"ant": "six legs", "bee": ["striped", "it flies"], "cow": "horns"}},
        "WorstCaseFineTune": {"risk": methods.GroupDRO(2, 0.1)},
        **{kind.__name__: dict(options) for kind, options in PROMPTED.items()},
    }.get(name, {})
    if name == "LPFT":
        options["probe"] = methods.LinearProbe(model, **PROMPTS).classifier()
    if name == "TipAdapterF":
        options["train"] = data["image"], data["label"]
    method = getattr(methods, name)(model, total_steps=4, **prompts, **options)
    return method.prepare((data["image"], data["label"])) if name == "DRM" else method


@pytest.mark.parametrize("name", NAMES)
def test_other_prompts_are_another_configuration_so_that_no_run_is_resumed_with_them(models, name):
    data = data_of("vit")
    same, other = made(name, models["vit"], data), made(name, models["vit"], data, PROMPTS | {"templates": ["one {}"]})
    assert made(name, models["vit"], data).config == same.config != other.config


def objective(method, data):
    """The mean loss of a method over all images as at step 0; CaRot's without the teacher, who keeps changing."""
    steps, method.steps[...] = method.steps.clone(), 0
    with torch.no_grad():
        out = method.eval().step(data)
    method.steps.copy_(steps)
    method.train()
    return out.terms["contrastive"] if isinstance(method, methods.CaRot) else out.loss


@pytest.mark.parametrize(("name", "tower"), CASES)
def test_it_learns_resumes_bit_for_bit_and_comes_back_from_its_export(models, tmp_path, name, tower):
    """With a ViT in single precision, with a ResNet under bf16."""
    data = data_of(tower)
    recipe = {"epochs": 2, "batch_size": 6, "lr": 2e-4 if name in TOWERS else 1e-2, "weight_decay": 0.0, "warmup": 0.0}
    recipe |= {"precision": "fp32" if tower == "vit" else "bf16", "progress": False}
    whole, stopped, resumed = (made(name, models[tower], data) for _ in range(3))
    before = objective(whole, data)
    fit(whole, data, **recipe)
    assert objective(whole, data) < before

    after_step = stopped.after_step

    def stop():
        after_step()
        if int(stopped.steps) == 3:
            raise RuntimeError("power cut")

    stopped.after_step = stop
    with pytest.raises(RuntimeError, match="power cut"):
        fit(stopped, data, output=tmp_path / "run", **recipe)
    fit(resumed, data, output=tmp_path / "run", resume=True, **recipe)
    again = resumed.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.state_dict().items())

    classifier, images = whole.classifier(), data["image"]
    loaded = load_predictor(classifier.save(tmp_path / "export", config(tower)))
    assert type(loaded) is type(classifier) and loaded.classes == PROMPTS["class_names"]
    for found, expected in zip(loaded.outputs(images), classifier.outputs(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "tower"), CASES)
def test_bf16_steps_stay_near_single_precision_and_leave_finite_gradients(models, name, tower):
    """Under autocast, and with a model whose weights are bf16."""
    data = data_of(tower)
    single = made(name, models[tower], data)
    expected = single.step(data).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = single.step(data)
    half = made(name, copy.deepcopy(models[tower]).bfloat16(), data | {"image": data["image"].bfloat16()})
    for method, out in ((single, autocast), (half, half.step(data | {"image": data["image"].bfloat16()}))):
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, expected, rtol=0.1, atol=0.1)
        out.loss.backward()
        gradients = [p.grad for p in method.parameters() if p.requires_grad and p.grad is not None]
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    outputs = half.classifier().outputs(data["image"].bfloat16())
    assert {part.dtype for part in outputs} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_one_class_only_is_refused_with_a_way_out(models, name):
    one = PROMPTS | {"class_names": ("ant",)}
    with pytest.raises(ValueError, match=r"at least two classes, got \['ant'\].*Add a class for what it is not"):
        made(name, models["vit"], data_of("vit"), one)


ENSEMBLES = ("WiSE-FT", "soup", "OSE", "VRF", "VRF of a probe", "temperature", "tempered OSE", "Tip-Adapter")


@pytest.fixture(scope="module")
def ensembles(models):
    """By tower and name, what is made of trained classifiers, with nothing trained any more."""

    def of(tower):
        model, data = models[tower], data_of(tower)
        zero_shot, probe = methods.zero_shot_classifier(model, **PROMPTS), methods.LinearProbe(model, **PROMPTS)
        fine_tuned = made("FineTune", model, data).classifier()
        other = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), dim=1)
        with torch.no_grad():
            fine_tuned.class_embeddings.copy_(other)
            probe.head.copy_(zero_shot.logit_scale * other)
            for p in fine_tuned.model.visual.parameters():
                p *= 1.1
        pairs = {"VRF": (zero_shot, fine_tuned), "VRF of a probe": (probe.zero_shot_classifier(), probe.classifier())}
        vrf = {}
        for name, pair in pairs.items():
            images = images_of(tower, 40)
            with torch.no_grad():  # labels that either member gets right now and then
                labels = torch.stack([member.logits(images).argmax(1) for member in pair])
            labels = labels[torch.arange(40) % 2, torch.arange(40)]
            sets = [VRFFeatures.of(*pair, part) for part in ((images, labels), (images[::3], labels[::3]))]
            vrf[name] = methods.VRF(temperatures=(1.2, 0.8)).fit(*sets).classifier(*pair)
        ose = methods.OutputEnsemble(zero_shot, fine_tuned, (1.5, 2.0)).at(0.3)
        train = data["image"], data["label"]
        return vrf | {
            "WiSE-FT": methods.WiSEFT(zero_shot, fine_tuned).at(0.4),
            "soup": methods.uniform_soup([zero_shot, fine_tuned]),
            "OSE": ose,
            "temperature": methods.Tempering(fine_tuned).at(2.5),
            "tempered OSE": methods.Tempering(ose).at(2.5),
            "Tip-Adapter": methods.TipAdapter(zero_shot).fit(train).classifier(),
        }

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the failure set has")
        return {tower: of(tower) for tower in VISION}


@pytest.mark.parametrize("tower", VISION)
@pytest.mark.parametrize("name", ENSEMBLES)
def test_what_is_mixed_comes_back_and_stays_near_itself_under_bf16(ensembles, tmp_path, name, tower):
    predictor, images = ensembles[tower][name], images_of(tower, 5)
    expected = predictor.outputs(images)
    saved = predictor.save(tmp_path / "export", config(tower))
    assert predictor.save(tmp_path / "export", config(tower)) == saved, "it replaces an earlier one"
    loaded = load_predictor(saved)
    assert type(loaded) is type(predictor) and loaded.classes == predictor.classes
    torch.testing.assert_close(tuple(loaded.outputs(images)), tuple(expected), rtol=1e-5, atol=1e-5)
    if name == "VRF of a probe":
        assert loaded.zero_shot.model is loaded.fine_tuned.model
    with torch.autocast("cpu", torch.bfloat16):
        outputs = predictor.outputs(images)
    assert {part.dtype for part in outputs} == {torch.float32}
    torch.testing.assert_close(outputs.logits.softmax(1), expected.logits.softmax(1), rtol=0, atol=0.1)


def test_ensembles_that_are_not_whole_are_refused(ensembles, tmp_path):
    saved = ensembles["vit"]["OSE"].save(tmp_path / "export", config("vit"))
    file = saved / ENSEMBLE_FILE
    content = file.read_bytes()
    for damaged, message in ((content[:20], "truncated"), (content.replace(b"Mixture", b"Mixtape"), "checksum")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_predictor(saved)
    file.write_bytes(content)
    change(file, "kind", "Mixtape")
    with pytest.raises(ValueError, match="holds a Mixtape"):
        load_predictor(saved)
    file.write_bytes(content)
    (saved / "fine_tuned" / "classifier.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="fine_tuned"):
        load_predictor(saved)
    with pytest.raises(FileExistsError, match="which no ensemble does"):
        ensembles["vit"]["OSE"].save(saved / "zero_shot", config("vit"))


MIXERS = ("VRF", "WiSEFT", "OutputEnsemble", "uniform_soup", "greedy_soup", "TipAdapter", "Tempering")


def test_its_docstring_says_which_paper_it_is_from():
    for name in (*NAMES, *MIXERS, "GroupDRO", "CVaR", "zero_shot_classifier"):
        assert re.search(r"arXiv:? \d{4}\.\d{5}", " ".join(getattr(methods, name).__doc__.split())), name
