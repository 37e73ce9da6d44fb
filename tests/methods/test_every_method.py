"""All of ours fulfil what plug-ins must (`robustft.testing`): methods, what they train, and what is mixed of it.

Every method is checked with a ViT in single precision, and with a ResNet under bf16.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from damage import change
from small_options import ANCHORED, PROMPTED
from targets import exhaustive

from robustft import methods
from robustft.ensembles.composite import ENSEMBLE_FILE
from robustft.methods import VRFFeatures, load_predictor
from robustft.predictors import DualClassifier
from robustft.predictors.base import Classifier
from robustft.testing import check_method, check_predictor, tiny_world

VISION = {"vit": None, "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}}
NAMES = list(methods.every_method())
TOWERS = ("FLYP", "CaRot", "DRM", "FineTune", "LPFT", "WorstCaseFineTune", *ANCHORED)  # trained, at a smaller rate
RESNETS = "CaRot", "CoOp", "LinearProbe"  # with whom every method is tried by the exhaustive tests
CASES = [(name, "vit") for name in NAMES] + [(name, "resnet") for name in RESNETS]
CASES += exhaustive(*((name, "resnet") for name in NAMES if name not in (*RESNETS, "MaPLe")))


@pytest.fixture(scope="module")
def worlds():
    """By tower, with running statistics as after pre-training."""
    made = {tower: tiny_world(vision) for tower, vision in VISION.items()}
    made = {tower: replace(w, data={**w.data, "image": images_of(w, 12)}) for tower, w in made.items()}
    for world in made.values():
        norms = [module for module in world.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            world.model.train().encode_image(images_of(world, 32))
        for norm in norms:
            norm.momentum = 0.1
    return made


def images_of(world, count):
    return torch.randn(count, *world.data["image"].shape[1:], generator=torch.Generator().manual_seed(1))


def maker(name, world):
    """What makes a method for `check_method`, with the options that it needs."""
    kind = getattr(methods, name)

    def data(model):
        return world.data["image"].to(next(model.parameters()).dtype), world.data["label"]

    match name:
        case "CaRot":
            return functools.partial(kind, ema_interval=2)
        case "DRM":
            described = {"ant": "six legs", "bee": ["striped", "it flies"], "cow": "horns"}
            return lambda model, **options: kind(model, descriptions=described, **options).prepare(data(model))
        case "WorstCaseFineTune":
            return lambda model, **options: kind(model, risk=methods.GroupDRO(2, 0.1), **options)
        case "LipsumFT":  # other texts each step: a large weight would hide what is learnt
            return functools.partial(kind, weight=0.1, **ANCHORED[name])
        case "CARFT" | "StarFT":
            return functools.partial(kind, **ANCHORED[name])
        case "LPFT":
            probe = methods.LinearProbe(world.model, **world.prompts).classifier()
            return lambda model, **options: kind(model, probe=probe, **options)
        case "TipAdapterF":
            return lambda model, **options: kind(model, train=data(model), **options)
        case _:
            return functools.partial(kind, **PROMPTED.get(kind, {}))


@pytest.mark.parametrize(("name", "tower"), CASES)
def test_every_method_fulfils_what_plug_ins_must(worlds, name, tower):
    check_method(
        maker(name, worlds[tower]),
        worlds[tower],
        lr=2e-4 if name in TOWERS else 1e-2,
        precision="fp32" if tower == "vit" else "bf16",
        term="contrastive" if name == "CaRot" else None,  # without the teacher, who keeps changing
        mixes=name == "DRM",
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_class_only_is_refused_with_a_way_out(worlds, name):
    world = worlds["vit"]
    with pytest.raises(ValueError, match=r"at least two classes, got \['ant'\].*Add a class for what it is not"):
        maker(name, world)(world.model, **{**world.prompts, "class_names": ("ant",)})


MIXING = {  # whether it mixes probabilities
    **dict.fromkeys(("WiSE-FT", "uniform soup", "greedy soup", "temperature", "Tip-Adapter"), False),
    **dict.fromkeys(("OSE", "VRF", "VRF of a probe", "tempered OSE", "dual heads"), True),
}
MIXED = [(name, "vit") for name in MIXING]
MIXED += [(name, "resnet") for name in MIXING if name not in ("uniform soup", "dual heads")]


@pytest.fixture(scope="module")
def ensembles(worlds):
    """By tower and name, what is made of trained classifiers, with nothing trained any more."""

    def of(world):
        model, data = world.model, (world.data["image"], world.data["label"])
        zero_shot = methods.zero_shot_classifier(model, **world.prompts)
        probe = methods.LinearProbe(model, **world.prompts)
        fine_tuned = methods.FineTune(model, **world.prompts).classifier()
        other = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(3)), dim=1)
        with torch.no_grad():
            fine_tuned.class_embeddings.copy_(other)
            probe.head.copy_(zero_shot.logit_scale * other)
            for p in fine_tuned.model.visual.parameters():
                p *= 1.1
        pairs = {"VRF": (zero_shot, fine_tuned), "VRF of a probe": (probe.zero_shot_classifier(), probe.classifier())}
        vrf = {}
        for name, pair in pairs.items():
            images = images_of(world, 40)
            with torch.no_grad():  # labels that either member gets right now and then
                labels = torch.stack([member.logits(images).argmax(1) for member in pair])
            labels = labels[torch.arange(40) % 2, torch.arange(40)]
            sets = [VRFFeatures.of(*pair, part) for part in ((images, labels), (images[::3], labels[::3]))]
            vrf[name] = methods.VRF(temperatures=(1.2, 0.8)).fit(*sets).classifier(*pair)
        ose = methods.OutputEnsemble(zero_shot, fine_tuned, (1.5, 2.0)).at(0.3)
        return vrf | {
            "WiSE-FT": methods.WiSEFT(zero_shot, fine_tuned).at(0.4),
            "uniform soup": methods.uniform_soup([zero_shot, fine_tuned]),
            "greedy soup": methods.greedy_soup([zero_shot, Classifier(model, other, zero_shot.classes)], data)[0],
            "OSE": ose,
            "temperature": methods.Tempering(fine_tuned).at(2.5),
            "tempered OSE": methods.Tempering(ose).at(2.5),
            "Tip-Adapter": methods.TipAdapter(zero_shot).fit(data).classifier(),
            "dual heads": DualClassifier(model, zero_shot.class_embeddings, other, zero_shot.classes),
        }

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the failure set has")
        found = {tower: of(world) for tower, world in worlds.items()}
    assert found["vit"].keys() == MIXING.keys()
    return found


@pytest.mark.parametrize(("name", "tower"), MIXED)
def test_every_ensemble_fulfils_what_predictors_must(worlds, ensembles, name, tower):
    world, predictor = worlds[tower], ensembles[tower][name]
    check_predictor(predictor, world.data["image"], world.config, mixes=MIXING[name])


def test_members_of_one_encoder_share_it_again(worlds, ensembles, tmp_path):
    loaded = load_predictor(ensembles["vit"]["VRF of a probe"].save(tmp_path / "export", worlds["vit"].config))
    assert loaded.zero_shot.model is loaded.fine_tuned.model


def test_ensembles_that_are_not_whole_are_refused(worlds, ensembles, tmp_path):
    ensemble, config = ensembles["vit"]["OSE"], worlds["vit"].config
    saved = ensemble.save(tmp_path / "export", config)
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
        ensemble.save(saved / "zero_shot", config)


MIXERS = ("VRF", "WiSEFT", "OutputEnsemble", "uniform_soup", "greedy_soup", "TipAdapter", "Tempering")


def test_its_docstring_says_which_paper_it_is_from():
    for name in (*NAMES, *MIXERS, "GroupDRO", "CVaR", "zero_shot_classifier"):
        assert re.search(r"arXiv:? \d{4}\.\d{5}", " ".join(getattr(methods, name).__doc__.split())), name
