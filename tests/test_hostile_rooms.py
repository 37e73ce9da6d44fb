"""Whatever a model, a data set, a predictor, an ensemble or a training is given, it computes or says what was wrong.

A case is a function and a valid call of it. What `clip`, `data` or `predictors` exports without a case here fails.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json

import pytest
import torch
from hostile import failures, few
from PIL import Image
from small_options import ANCHORED, PROMPTED

from robustft import clip, data, detection, ensembles, evaluation, losses, methods, predictors, training
from robustft.calibration import conformal
from robustft.clip import prompts
from robustft.clip.outputs import Outputs, outputs_of
from robustft.data import corruptions, shards, splits, table
from robustft.ensembles.output_ensemble import Mixture
from robustft.ensembles.tempering import Tempered
from robustft.evaluation.results import read_evaluation
from robustft.methods.objective import Objective
from robustft.neighbors import NeighborIndex
from robustft.ops.registry import Call
from robustft.pipeline import serving
from robustft.pipeline.checking import check_data
from robustft.pipeline.evaluating import evaluate_runs
from robustft.pipeline.exporting import export_run
from robustft.pipeline.folder import PIPELINE_FILE
from robustft.pipeline.predicting import predict_files
from robustft.pipeline.reporting import report_runs
from robustft.pipeline.train import train
from robustft.testing import CLASSES, letters, tiny_world

WORLD = tiny_world({"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1})
MODEL, IMAGES, LABELS = WORLD.model.eval(), WORLD.data["image"], WORLD.data["label"]
TEMPLATES = WORLD.prompts["templates"]
TEXTS = tuple((f"a {name}", f"the {name}") for name in CLASSES)
TOKENS = letters([text for texts in TEXTS for text in texts])
HEAD = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), dim=1)
with torch.no_grad():
    FEATURES = clip.encode_images(MODEL, IMAGES)
SOFT = HEAD[LABELS, :3].softmax(1)
PAIR = IMAGES, LABELS
MEMORY = data.ImageDataset(torch.randint(0, 256, (12, 8, 8, 3), dtype=torch.uint8).numpy(), LABELS, CLASSES)


def all_batches(dataset, batch_size=256):
    return list(clip.batches(dataset, batch_size=batch_size))


def zero_shot():
    return predictors.Classifier(MODEL, HEAD, CLASSES)


def fine_tuned():
    return predictors.Classifier(MODEL, HEAD.flip(0), CLASSES)


def cases(folder):
    """By room and name, what is called and how."""
    tree, csv, split, tar = sources(folder)
    zs, ft = zero_shot(), fine_tuned()
    embedded = clip.token_embedding(MODEL)(TOKENS).detach()
    table_of = prompts.PromptTable(letters, CLASSES, TEMPLATES)
    vrf_features = ensembles.VRFFeatures.of(zs, ft, (IMAGES.repeat(4, 1, 1, 1), LABELS.repeat(4)))
    vrf = ensembles.VRF(1, 1.0, 1.0, temperatures=None, reference="train").fit(vrf_features, vrf_features)
    outputs = zs.predict(PAIR)
    detector = detection.Detector("mcm").fit(outputs)
    probe = training_method()
    exported = zs.save(folder / "export", WORLD.config)
    suite = evaluation.Suite(outputs, {"a": outputs}, {})
    measured = evaluation.evaluate({"zs": zs}, id=PAIR, shifts={"a": PAIR}, details=True)
    (folder / "metrics.json").write_text(json.dumps(measured.to_dict()))
    risk = evaluation.selective_risk(SOFT.amax(1), SOFT.argmax(1) == LABELS)
    sets = conformal.ConformalSets("aps", 0.8).fit(SOFT, LABELS)
    sized = {**WORLD.config, "preprocess_cfg": {**WORLD.config["preprocess_cfg"], "size": 8}}
    run = zs.save(folder / "served", sized)
    detector.save(run)
    (run / PIPELINE_FILE).write_text("{}")
    transform = clip.eval_transform(run)
    pipeline = serving.Pipeline(zs, detector, transform)
    image = tree / CLASSES[0] / "0.png"
    index = NeighborIndex(FEATURES)
    index.save(folder / "index.safetensors")
    names = folder / "names.txt"
    names.write_text("\n".join(CLASSES))
    template_file = folder / "templates.txt"
    template_file.write_text("\n".join(TEMPLATES))
    described = folder / "descriptions.json"
    described.write_text(json.dumps(dict(zip(CLASSES, TEXTS, strict=True))))
    opened = data.open(tree)
    return {
        "clip": {
            "class_embeddings": (clip.class_embeddings, Call((MODEL, letters, CLASSES, TEMPLATES), {"batch_size": 4})),
            "caption_embeddings": (clip.caption_embeddings, Call((MODEL, letters, TEXTS), {"names": CLASSES})),
            "group_captions": (clip.group_captions, Call((letters, TEXTS), {"names": CLASSES})),
            "grouped_embeddings": (clip.grouped_embeddings, Call((MODEL, clip.group_captions(letters, TEXTS)))),
            "encode_captions": (clip.encode_captions, Call((MODEL, TOKENS))),
            "encode_images": (clip.encode_images, Call((MODEL, IMAGES))),
            "encode_patches": (clip.encode_patches, Call((MODEL, IMAGES))),
            "encode_images_and_patches": (clip.encode_images_and_patches, Call((MODEL, IMAGES))),
            "encode_texts": (clip.encode_texts, Call((MODEL, TOKENS))),
            "trim_padding": (clip.trim_padding, Call((MODEL, TOKENS), {"multiple": 4})),
            "encode_embedded_texts": (clip.encode_embedded_texts, Call((MODEL, embedded, TOKENS))),
            "token_embedding": (clip.token_embedding, Call((MODEL,))),
            "text_projection": (clip.text_projection, Call((MODEL,))),
            "visual_projection": (clip.visual_projection, Call((MODEL,))),
            "logit_scale": (clip.logit_scale, Call((MODEL,))),
            "logit_bias": (clip.logit_bias, Call((MODEL,))),
            "encode": (clip.encode, Call((MODEL, PAIR), {"cache": folder / "cache"})),
            "interpolate": (clip.interpolate, Call((MODEL, MODEL, 0.5))),
            "interpolate_state": (clip.interpolate_state, Call((MODEL.state_dict(), MODEL.state_dict(), 0.5))),
            "interpolate_entries": (
                clip.interpolate_entries,
                Call((MODEL.state_dict(), MODEL.state_dict(), dict.fromkeys(MODEL.state_dict(), 0.5))),
            ),
            "stock_state": (clip.stock_state, Call((MODEL.state_dict(), [MODEL.state_dict(), MODEL.state_dict()]))),
            "depths": (clip.depths, Call((MODEL,))),
            "average_states": (clip.average_states, Call(([MODEL.state_dict(), MODEL.state_dict()],))),
            "fingerprint": (clip.fingerprint, Call((MODEL,))),
            "check_same_computation": (clip.check_same_computation, Call((MODEL, MODEL, "a", "b"))),
            "check_trainable_precision": (clip.check_trainable_precision, Call((MODEL,))),
            "half_precision_parameters": (clip.half_precision_parameters, Call((MODEL,))),
            "text_tower": (clip.text_tower, Call((MODEL,))),
            "feature_width": (clip.feature_width, Call((MODEL,))),
            "unwrap": (clip.unwrap, Call((MODEL,))),
            "LoRA": (clip.LoRA, Call((2, 4.0, 0.1, ("attn",), "both"))),
            "adapt": (adapted, Call((MODEL, clip.LoRA(2)), {"towers": ("visual",), "seed": 1})),
            "has_adapters": (clip.has_adapters, Call((MODEL,))),
            "copied": (clip.copied, Call((MODEL,))),
            "merged": (clip.merged, Call((MODEL,))),
            "outputs_of": (outputs_of, Call((FEATURES, HEAD, 10.0), {"labels": LABELS})),
            "similarities": (clip.similarities, Call((FEATURES, HEAD, torch.tensor(10.0)))),
            "Outputs": (Outputs, Call((FEATURES, None, FEATURES, None, LABELS))),
            "Features": (clip.Features, Call((FEATURES, LABELS))),
            "export": (clip.export, Call((MODEL, folder / "exported", WORLD.config))),
            "load": (clip.load, Call((f"local-dir:{exported}",))),
            "eval_transform": (clip.eval_transform, Call((exported,))),
            "batches": (all_batches, Call((PAIR,), {"batch_size": 5})),
        },
        "prompts": {
            "captions": (prompts.captions, Call((CLASSES, TEMPLATES))),
            "format_template": (prompts.format_template, Call(("a {}", "ant"))),
            "split_names": (prompts.split_names, Call((CLASSES,))),
            "tokenize": (prompts.tokenize, Call((letters, CLASSES), {"names": CLASSES})),
            "tokenize_classes": (prompts.tokenize_classes, Call((letters, TEXTS), {"names": CLASSES})),
            "PromptTable": (prompts.PromptTable, Call((letters, CLASSES, TEMPLATES))),
            "PromptTable.from_captions": (prompts.PromptTable.from_captions, Call((letters, TEXTS))),
            "PromptTable.tokens": (table_of.tokens, Call((LABELS, 0))),
            "PromptTable.unique": (table_of.unique, Call((LABELS, LABELS % 2))),
            "PromptTable.sample": (table_of.sample, Call((LABELS,))),
            "read_class_names": (prompts.read_class_names, Call((names,))),
            "read_templates": (prompts.read_templates, Call((template_file,))),
            "read_descriptions": (prompts.read_descriptions, Call((described, CLASSES))),
            "match_descriptions": (
                prompts.match_descriptions,
                Call((dict(zip(CLASSES, TEXTS, strict=True)), CLASSES)),
            ),
            "check_captions": (prompts.check_captions, Call((TEXTS,))),
        },
        "neighbors": {
            "NeighborIndex": (NeighborIndex, Call((FEATURES,))),
            "NeighborIndex.add": (lambda points: NeighborIndex(FEATURES).add(points), Call((FEATURES,))),
            "NeighborIndex.kth_distance": (index.kth_distance, Call((FEATURES, 2))),
            "NeighborIndex.nearest": (index.nearest, Call((FEATURES, 2))),
            "NeighborIndex.save": (index.save, Call((folder / "again.safetensors",))),
            "NeighborIndex.load": (NeighborIndex.load, Call((folder / "index.safetensors",))),
        },
        "data": {
            "open": (data.open, Call((tree,), {"class_names": CLASSES, "shots": 1})),
            "open a table": (data.open, Call((csv,), {"columns": table.Columns()})),
            "check": (data.check, Call((opened,))),
            "few_shot": (data.few_shot, Call((PAIR, 2))),
            "few_shot_indices": (splits.few_shot_indices, Call((LABELS, 2), {"classes": CLASSES})),
            "read_split": (data.read_split, Call((split, tree))),
            "read_table": (table.read_table, Call((csv,))),
            "read_shards": (shards.read_shards, Call((str(tar),))),
            "expand": (shards.expand, Call((str(tar),))),
            "PathDataset": (data.PathDataset, Call((opened.train.samples, opened.classes))),
            "PathDataset.subset": (opened.train.subset, Call(([0, 1],))),
            "PathDataset.renamed": (opened.train.renamed, Call((CLASSES,))),
            "PathDataset.relabelled": (opened.train.relabelled, Call((opened.classes,))),
            "stress": (data.stress, Call((MEMORY,), {"severities": (1,), "names": ("grey", "hue")})),
            "corrupt": (corruptions.corrupt, Call((MEMORY[0][0], "grey", 1, 0))),
            "Stressed.tensors": (
                data.stress(MEMORY, (1,), names=("grey",))["grey 1"].tensors,
                Call(((0.5,) * 3, (0.5,) * 3)),
            ),
            "ImageDataset.subset": (MEMORY.subset, Call(([0, 1],))),
            "ImageDataset": (
                data.ImageDataset,
                Call((torch.zeros(12, 8, 8, 3, dtype=torch.uint8).numpy(), LABELS, CLASSES), {"groups": LABELS}),
            ),
        },
        "predictors": {
            "Classifier": (predictors.Classifier, Call((MODEL, HEAD, CLASSES), {"bias": torch.zeros(3)})),
            "Classifier.outputs": (zs.outputs, Call((IMAGES,))),
            "Classifier.logits": (zs.logits, Call((IMAGES,))),
            "Classifier.probabilities": (zs.probabilities, Call((IMAGES,))),
            "Classifier.head_outputs": (zs.head_outputs, Call((FEATURES,))),
            "Classifier.predict": (zs.predict, Call((PAIR,))),
            "Classifier.restrict": (zs.restrict, Call((CLASSES[:2],))),
            "Classifier.restrict by index": (zs.restrict, Call(([0, 1],))),
            "Classifier.save": (zs.save, Call((folder / "saved", WORLD.config))),
            "DualClassifier": (predictors.DualClassifier, Call((MODEL, HEAD, HEAD, CLASSES))),
            "load_predictor": (predictors.load_predictor, Call((exported,))),
            "zero_shot_classifier": (predictors.zero_shot_classifier, Call((MODEL,), WORLD.prompts)),
        },
        "ensembles": {
            "WiSEFT": (ensembles.WiSEFT, Call((zs, ft))),
            "WiSEFT.at": (ensembles.WiSEFT(zs, ft).at, Call((0.5,))),
            "WiSEFT.fit": (ensembles.WiSEFT(zs, ft).fit, Call((PAIR, (0.0, 1.0)))),
            "OutputEnsemble": (ensembles.OutputEnsemble, Call((zs, ft, (1.0, 2.0)))),
            "OutputEnsemble.at": (ensembles.OutputEnsemble(zs, ft).at, Call((0.5,))),
            "OutputEnsemble.fit": (ensembles.OutputEnsemble(zs, ft).fit, Call((PAIR, (0.0, 1.0)))),
            "Mixture": (Mixture, Call((zs, ft, 0.5, (1.0, 2.0)))),
            "Tempering": (ensembles.Tempering, Call((zs,))),
            "Tempering.fit": (ensembles.Tempering(zs).fit, Call((PAIR,))),
            "Tempering.at": (ensembles.Tempering(zs).at, Call((2.0,))),
            "Tempered": (Tempered, Call((zs, 2.0))),
            "uniform_soup": (ensembles.uniform_soup, Call(([zs, ft],))),
            "model_stock": (ensembles.model_stock, Call((zs, [ft, zs]))),
            "greedy_soup": (ensembles.greedy_soup, Call(([zs, ft], PAIR))),
            "VRF": (ensembles.VRF, Call((1, 1.0, 1.0))),
            "VRF.fit": (
                ensembles.VRF(1, 1.0, 1.0, temperatures=None, reference="train").fit,
                Call((vrf_features, vrf_features)),
            ),
            "VRF.distances": (vrf.distances, Call((FEATURES,))),
            "VRF.weights": (vrf.weights, Call((FEATURES,))),
            "VRF.weights_at": (vrf.weights_at, Call((torch.ones(3),))),
            "VRF.probabilities": (vrf.probabilities, Call((vrf_features,))),
            "VRF.at": (vrf.at, Call((0.5,))),
            "VRF.accuracy_ratio": (vrf.accuracy_ratio, Call((vrf_features,), {"bins": 4})),
            "VRF.classifier": (vrf.classifier, Call((zs, ft))),
            "VRF.save": (vrf.save, Call((folder / "vrf.safetensors",))),
            "VRFFeatures": (ensembles.VRFFeatures, Call((outputs, outputs))),
            "VRFFeatures.of": (ensembles.VRFFeatures.of, Call((zs, ft, PAIR))),
        },
        "methods": {
            **{name: (own_options(kind), Call((), options)) for name, (kind, options) in trainings().items()},
            "Method": (methods.FLYP, Call((MODEL,), WORLD.prompts)),
            "Method.begin_run": (probe.begin_run, Call((5,))),
            "core_labels": (
                methods.core_labels,
                Call((MODEL, PAIR), {"tokenizer": letters, "class_names": CLASSES, "descriptions": TEXTS}),
            ),
            "Objective": (Objective, Call(())),
            "CoreProxy": (methods.CoreProxy, Call(())),
            "GroupDRO": (methods.GroupDRO, Call((2, 0.1))),
            "WorstGroup": (methods.worst_case.WorstGroup, Call((2,))),
            "CVaR": (methods.CVaR, Call((0.5,))),
            "TipAdapter": (methods.TipAdapter, Call((zs,))),
            "TipAdapter.fit": (methods.TipAdapter(zs).fit, Call((PAIR, PAIR), {"alphas": (1.0,), "betas": (1.0,)})),
        },
        "conformal": {
            "ConformalSets": (conformal.ConformalSets, Call(("raps", 0.8))),
            "ConformalSets.fit": (conformal.ConformalSets("aps", 0.8).fit, Call((SOFT, LABELS))),
            "ConformalSets.sets": (sets.sets, Call((SOFT,))),
            "ConformalSets.save": (sets.save, Call((folder / "sets.safetensors",))),
            "ConformalSets.load": (conformal.ConformalSets.load, Call((sets.save(folder / "s.safetensors"),))),
            "coverage_report": (conformal.coverage_report, Call((sets.sets(SOFT), LABELS, CLASSES))),
            "minimum_count": (conformal.minimum_count, Call((0.9,))),
        },
        "serving": {
            "Pipeline": (serving.Pipeline, Call((zs, detector, transform))),
            "Pipeline()": (pipeline, Call((image,))),
            "Pipeline() of several": (pipeline, Call(([image, image],))),
            "Pipeline.stream": (streamed(pipeline), Call(([image],))),
            "Pipeline.outputs": (pipeline.outputs, Call((IMAGES,))),
            "load a run": (serving.load, Call((run,))),
            # What is not there is said after all arguments have been looked at.
            "train": (said(train), Call(("no data",), {"output": folder / "run", "pretrained": "no weights"})),
            "evaluate_runs": (said(evaluate_runs), Call(("no data", [run]))),
            "check_data": (said(check_data), Call(("no data",))),
            "export_run": (
                said(export_run),
                Call(("no run",), {"to": "onnx", "output": folder / "onnx", "precision": "fp16"}),
            ),
            "report_runs": (said(report_runs), Call((["no run"],), {"output": folder / "reported"})),
            "predict_files": (said(predict_files), Call(("no run", [str(image)]))),
        },
        "detection": {
            "Detector": (detection.Detector, Call(("mcm",), {"tpr": 0.9, "temperature": 1.0})),
            "Detector.fit": (detection.Detector("mcm").fit, Call((zs, IMAGES))),
            "Detector.fit outputs": (
                detection.Detector("knn", k=1).fit,
                Call((outputs,), {"validation": outputs}),
            ),
            "Detector.scores": (detector.scores, Call((zs, IMAGES))),
            "Detector.detect": (detector.detect, Call((zs, IMAGES))),
            "Detector.save": (detector.save, Call((folder / "detector.safetensors",))),
            "Detector.load": (detection.Detector.load, Call((detector.save(folder / "d.safetensors"),))),
            "AdaNegMemory": (detection.AdaNegMemory, Call((HEAD, HEAD), {"groups": 1, "beta": 1.0})),
            "AdaNegMemory.update": (remembering().update, Call((FEATURES,))),
            "AdaNegMemory.scores": (remembering().scores, Call((FEATURES,))),
            "AdaNegMemory.restore": (remembering().restore, Call((remembering().update(FEATURES).state(),))),
            "conjugated_phrases": (detection.conjugated_phrases, Call((CLASSES, CLASSES), {"each": 1})),
            "conjugated_negatives": (
                detection.conjugated_negatives,
                Call((MODEL, letters, HEAD, ("old thing",), TEMPLATES), {"nouns": ("ox",), "batch_size": 4}),
            ),
            "register": (registered, Call(("own", lambda cosines: cosines.amax(1)))),
        },
        "evaluation": {
            "evaluate": (evaluation.evaluate, Call(({"zs": zs},), {"id": PAIR, "shifts": {"a": PAIR}})),
            "frontier": (
                evaluation.frontier,
                Call((ensembles.OutputEnsemble(zs, ft),), {"id": PAIR, "shifts": {"a": PAIR}, "alphas": (0.0, 1.0)}),
            ),
            "evaluate_predictions": (evaluation.evaluate_predictions, Call(({"zs": suite},))),
            "Suite": (evaluation.Suite, Call((PAIR, {}, {}))),
            "Evaluation.merge": (evaluation.Evaluation.merge, Call(({"a": measured, "b": measured},))),
            "Evaluation.from_dict": (evaluation.Evaluation.from_dict, Call((measured.to_dict(),))),
            "read_evaluation": (read_evaluation, Call((folder / "metrics.json",))),
            "selective_risk": (evaluation.selective_risk, Call((SOFT.amax(1), SOFT.argmax(1) == LABELS))),
            "SelectiveRisk.at_risk": (risk.at_risk, Call((0.5,))),
            "SelectiveRisk.thinned": (risk.thinned, Call((2,))),
            "worst_classes": (evaluation.worst_classes, Call((outputs, MEMORY))),
            "groups_in": (evaluation.groups_in, Call((MEMORY,))),
            "macro_f1": (evaluation.macro_f1, Call((LABELS, LABELS))),
            "group_accuracy": (evaluation.group_accuracy, Call((LABELS, LABELS, LABELS), {"num_groups": 3})),
            "worst_group_accuracy": (evaluation.worst_group_accuracy, Call((LABELS, LABELS, LABELS))),
        },
        "losses": {
            "ContrastiveLoss": (losses.ContrastiveLoss, Call((), {"label_smoothing": 0.1})),
            "ContrastiveLoss()": (losses.ContrastiveLoss().forward, Call((FEATURES, FEATURES, 10.0))),
            "CaRotLoss": (losses.CaRotLoss, Call(())),
            "CaRotLoss()": (
                losses.CaRotLoss().terms,
                Call((FEATURES, FEATURES, 10.0), {"visual_projection": HEAD, "labels": LABELS}),
            ),
            "ClassificationLoss": (losses.ClassificationLoss, Call(())),
            "ClassificationLoss()": (
                losses.ClassificationLoss(misalignment_weight=1.0).terms,
                Call((FEATURES, HEAD, 10.0), {"labels": LABELS}),
            ),
            "DualRiskLoss": (losses.DualRiskLoss, Call(())),
            "DualRiskLoss()": (
                losses.DualRiskLoss().terms,
                Call((FEATURES, HEAD, 10.0), {"core_embeddings": HEAD, "labels": LABELS, "core_labels": SOFT}),
            ),
        },
        "training": {
            "fit": (
                fitted,
                Call((probe, PAIR), {"epochs": 1, "batch_size": 6, "lr": 1e-3, "progress": False, "limit_batches": 1}),
            ),
            "Method.step": (probe.step, Call((PAIR,))),
            "AdamW": (training.AdamW, Call((torch.nn.Linear(2, 2), 1e-3), {"betas": (0.9, 0.99), "weight_decay": 0.1})),
            "whole_tables": (training.whole_tables, Call((torch.nn.Linear(2, 2),))),
            "CompiledTowers": (training.CompiledTowers, Call((probe,), {"mode": "default"})),
        },
    }


def remembering():
    return detection.AdaNegMemory(HEAD, HEAD, groups=1)


def trainings():
    """By name, every method and the options that it needs beside the shared ones."""
    found = {name: (getattr(methods, name), {}) for name in methods.every_method()}
    needed = {
        "DRM": {"descriptions": TEXTS},
        "WorstCaseFineTune": {"risk": methods.GroupDRO(2, 0.1)},
        "LPFT": {"probe": fine_tuned()},
        "TipAdapterF": {"train": PAIR},
    }
    needed |= ANCHORED
    prompted = {kind.__name__: options for kind, options in PROMPTED.items()}
    return {name: (kind, needed.get(name) or prompted.get(name) or {}) for name, (kind, _) in found.items()}


def own_options(kind):
    """The constructor over the options that the shared ones of every method are not among."""

    def make(**options):
        return kind(MODEL, **WORLD.prompts, **options)

    shared = ("model", *inspect.signature(methods.FLYP).parameters)
    own = [p for name, p in inspect.signature(kind).parameters.items() if name not in shared or kind is methods.FLYP]
    make.__signature__ = inspect.Signature([p for p in own if p.name not in (*WORLD.prompts, "model")])
    return make


def said(function):
    """The function, for which what is not there is an answer."""

    @functools.wraps(function)
    def called(*args, **options):
        with contextlib.suppress(FileNotFoundError):
            return function(*args, **options)

    return called


def streamed(pipeline):
    @functools.wraps(pipeline.stream)
    def stream(*args, **options):
        return list(pipeline.stream(*args, **options))

    return stream


@functools.cache
def probe_of_the_world():
    from robustft.methods import LinearProbe

    return LinearProbe(MODEL, **WORLD.prompts)


def training_method():
    """A new one, of which making the first takes longest."""
    return copy.deepcopy(probe_of_the_world())


@functools.wraps(training.fit)
def fitted(method, *args, **options):
    fresh = isinstance(method, type(probe_of_the_world()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "CompiledTowers", uncompiled)
        return training.fit(training_method() if fresh else method, *args, **options)


def uncompiled(method, mode):
    """What is said of the arguments, and no minutes of a C++ compiler."""
    training.CompiledTowers(method, mode)
    return contextlib.nullcontext()


def registered(name, score, reads=()):
    try:
        detection.register(name, score, reads)
    finally:
        for own in set(detection.SCORES) - OWN:
            del detection.SCORES[own]


OWN = frozenset(detection.SCORES)


def sources(folder):
    """A tree of class folders, a table, a split file and a shard of the same images."""
    import tarfile

    tree = folder / "tree"
    for number, name in enumerate(CLASSES):
        (tree / name).mkdir(parents=True)
        for i in range(6):
            noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(10 * number + i))
            Image.fromarray(noise.to(torch.uint8).numpy()).save(tree / name / f"{i}.png")
    files = sorted(tree.rglob("*.png"))
    csv = tree / "table.csv"
    csv.write_text("filepath,label\n" + "".join(f"{file.relative_to(tree)},{file.parent.name}\n" for file in files))
    rows = [[str(file.relative_to(tree)), CLASSES.index(file.parent.name), file.parent.name] for file in files]
    split = folder / "split.json"
    split.write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    tar = folder / "shard.tar"
    with tarfile.open(tar, "w") as archive:
        for i, file in enumerate(files):
            archive.add(file, f"{i:03}.png")
            label = folder / "label.cls"
            label.write_text(str(i % 3))
            archive.add(label, f"{i:03}.cls")
    csv.rename(folder / "table.csv")
    csv = folder / "table.csv"
    csv.write_text("filepath,label\n" + "".join(f"tree/{f.relative_to(tree)},{f.parent.name}\n" for f in files))
    return tree, csv, split, tar


@functools.wraps(clip.adapt)
def adapted(model, *arguments, **options):
    """`clip.adapt` of a copy."""
    given = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
    return clip.adapt(given, *arguments, **options)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield cases(folder)


SLOW = ("load", "export", "fit", "save", "greedy_soup", "WiSEFT.fit", "load_predictor", "Classifier.save", "encode")
SLOW += ("train", "load a run", "TipAdapterF", "ProDA", "LoCoOp", "KgCoOp", "CoCoOp", "CompiledTowers")
ROOMS = (
    "clip prompts neighbors data predictors ensembles methods conformal serving detection evaluation losses training"
).split()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.filterwarnings("ignore")
def test_hostile_arguments_of_a_room_compute_or_raise_an_error_that_names_them(rooms, room):
    found = []
    for name, (function, call) in rooms[room].items():
        if name not in SLOW:
            found += failures(function, call, name, values=few)
    assert not found, "\n".join(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.filterwarnings("ignore")
def test_all_hostile_arguments_of_a_room_compute_or_raise_an_error_that_names_them(rooms, room):
    for name, (function, call) in rooms[room].items():
        found = list(failures(function, call, name))
        assert not found, "\n".join(found)


def test_valid_calls_compute_and_every_room_is_here(rooms):
    assert list(rooms) == ROOMS
    for named in rooms.values():
        for function, call in named.values():
            function(*call.arguments, **call.options)


def test_what_clip_data_and_predictors_export_has_a_case_here(rooms):
    elsewhere = {
        *("CaptionGroups", "LocalFeatures", "Bundle", "evaluating", "import_open_clip", "image_statistics"),
        *("ModelPredictor", "Predictor", "Data", "Split", "stress", "RatioBin", "GreedySoup", "GridPoint"),
        *("Evaluation", "Frontier", "Suite", "Outputs"),
    }
    for room, module in (("clip", clip), ("data", data), ("predictors", predictors)):
        public = {name for name in module.__all__ if callable(getattr(module, name))} - elsewhere
        assert public <= set(rooms[room]), public - set(rooms[room])
