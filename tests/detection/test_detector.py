"""Detectors: the threshold keeps what it promises, whatever the score, the source and the disk between."""

from __future__ import annotations

import math
import types

import open_clip
import pytest
import torch
import torch.nn.functional as F
from damage import change

from robustft import Detector, clip, detection
from robustft.clip import Features
from robustft.clip.outputs import Outputs, outputs_of
from robustft.detection import by_name as scoring
from robustft.detection import scores as ood_scores
from robustft.detection.by_name import SCORES
from robustft.methods import Classifier, OutputEnsemble, load_predictor

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 2, "layers": 1}
CONFIG = {"model_cfg": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": {}}
NEGATIVES = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
OPTIONS = {
    "ada_neg": {"negative_embeddings": F.normalize(NEGATIVES, dim=1), "batch": 16},
    "mcm": {"temperature": 0.5},
    "gl_mcm": {"local_weight": 0.5},
    "neg_label": {"negative_embeddings": F.normalize(NEGATIVES, dim=1), "groups": 3},
    "mahalanobis": {"shrinkage": 0.1},
    "knn": {"k": 3},
}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=8, vision_cfg=VISION, text_cfg=TEXT).double()
    return Classifier(model, 3 * torch.randn(4, 8, dtype=torch.float64), ("a", "b", "c", "d"), logit_scale=20.0)


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 4


TRAIN, VALIDATION, TEST = images(40, 1), images(33, 2), images(17, 3)


def fitted(name, classifier, tpr=0.9):
    own = {"class_embeddings": classifier.class_embeddings} if name == "ada_neg" else {}
    return Detector(name, tpr=tpr, **own, **OPTIONS.get(name, {})).fit(
        classifier, TRAIN, validation=VALIDATION, batch_size=16
    )


@pytest.mark.parametrize("name", sorted(SCORES))
def test_the_threshold_is_the_highest_that_keeps_the_share_asked_for(name, classifier):
    detector = fitted(name, classifier)
    kept = ~detector.detect(classifier, VALIDATION)
    assert kept.dtype == torch.bool and 0.9 <= kept.double().mean() < 0.9 + 1 / 33
    scores = detector.scores(classifier, VALIDATION)
    assert (scores >= detector.threshold_).equal(kept) and detector.threshold_ in scores.tolist()


@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_saved_detector_scores_the_same_bit_for_bit_and_equal_ones_are_equal_bytes(name, classifier, tmp_path):
    detector = fitted(name, classifier)
    first, second = detector.save(tmp_path / "one.safetensors"), fitted(name, classifier).save(tmp_path)
    assert second == tmp_path / "detector.safetensors" and first.read_bytes() == second.read_bytes()
    for path in (first, tmp_path):
        loaded = Detector.load(path)
        assert torch.equal(loaded.scores(classifier, TEST), detector.scores(classifier, TEST))
        assert (loaded.threshold_, loaded.tpr, loaded.score) == (detector.threshold_, 0.9, name)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_do_not_depend_on_the_source_or_the_batches(name, classifier):
    detector = fitted(name, classifier)
    expected = detector.scores(classifier, TEST)
    assert expected.shape == (17,) and expected.dtype == torch.float64
    torch.testing.assert_close(detector.scores(classifier, TEST[0], batch_size=5), expected)
    if "patch_cosines" not in detector._score.reads:
        anything = types.SimpleNamespace(outputs=classifier.outputs)  # a predictor need not be a module
        torch.testing.assert_close(detector.scores(anything, TEST), expected)
    u, patches = clip.encode_images_and_patches(classifier.model.eval(), TEST[0])
    ready = outputs_of(u, classifier.class_embeddings, classifier.logit_scale, patch_features=patches)
    torch.testing.assert_close(detector.scores(ready), expected)
    if "patch_cosines" not in detector._score.reads:
        torch.testing.assert_close(detector.scores(classifier.outputs(TEST[0])), expected)
        torch.testing.assert_close(detector.scores(classifier.predict(TEST)), expected)
    if detector._score.reads == ("features",):
        torch.testing.assert_close(detector.scores(Features(u.detach(), TEST[1])), expected)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_is_higher_near_the_classes_than_far_from_them(name):
    axes, generator = torch.eye(8, dtype=torch.float64), torch.Generator().manual_seed(0)

    def around(u, noise):
        u = F.normalize(u + noise * torch.randn(u.shape, generator=generator, dtype=u.dtype), dim=1)
        patches = u[:, None].expand(-1, 3, -1)
        return outputs_of(u, axes[:4], 20.0, patch_features=patches, labels=torch.arange(len(u)) % 4)

    options = {"negative_embeddings": axes[4:]} if SCORES[name].needs_options else {}
    if name == "ada_neg":
        options |= {"class_embeddings": axes[:4], "groups": 1}
    near, far = around(axes[:4], 0.05), around(axes[4:], 0.05)
    detector = Detector(name, tpr=1.0, **options).fit(around(axes[:4].repeat(20, 1), 0.2), validation=near)
    assert detector.scores(near).min() > detector.scores(far).max()
    assert detector.detect(far).all() and not detector.detect(near).any()
    assert detector.scores(near.map(lambda part: part.float() if part.is_floating_point() else part)).dtype in (
        torch.float32,
        torch.float64,
    )


def test_the_list_of_scores_tells_each_in_one_line_and_what_it_reads():
    lines = detection.table().splitlines()
    assert [line.split()[0] for line in lines] == list(SCORES)
    for line, entry in zip(lines, SCORES.values(), strict=True):
        assert len(entry.summary) > 10 and entry.summary in line and set(entry.reads) <= set(Outputs.PARTS)
        assert ("learns" in line) is entry.learns


def test_scores_are_the_functions_of_the_same_evidence(classifier):
    outputs, negatives = classifier.outputs(TEST[0]), OPTIONS["neg_label"]["negative_embeddings"]
    expected = {
        "mcm": ood_scores.mcm(outputs.cosines, 0.5),
        "msp": ood_scores.msp(outputs.logits),
        "energy": ood_scores.energy(outputs.logits),
        "neg_label": ood_scores.neg_label(outputs.cosines, outputs.features @ negatives.T, groups=3),
        "knn": -torch.cdist(outputs.features, classifier.outputs(TRAIN[0]).features).sort(1).values[:, 2],
    }
    for name, scores in expected.items():
        torch.testing.assert_close(fitted(name, classifier).scores(classifier, TEST), scores.detach())


def test_detectors_tell_far_from_near(classifier):
    train, near = torch.eye(8)[:4].repeat(10, 1), torch.eye(8)[:4]
    noise = 0.1 * torch.randn(44, 8, generator=torch.Generator().manual_seed(0))
    u = F.normalize(torch.cat([train, near]) + noise, dim=1)
    held_out = Features(u[40:], torch.arange(4))
    for name in ("mahalanobis", "knn"):
        detector = Detector(name, tpr=1.0).fit(Features(u[:40], torch.arange(40) % 4), validation=held_out)
        assert not detector.detect(held_out).any()
        assert detector.detect(Outputs(features=torch.eye(8)[4:])).all()


def test_knn_takes_a_thousandth_of_the_training_images_by_default():
    u = F.normalize(torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    many = Detector("knn").fit(Outputs(u), validation=Outputs(u[:9]))
    assert torch.equal(many.scores(Outputs(u[:9])), Detector("knn", k=2).fit(
        Outputs(u), validation=Outputs(u[:9])).scores(Outputs(u[:9])))  # fmt: skip


def test_ones_own_score_is_registered_saved_and_loaded(classifier, tmp_path, monkeypatch):

    def top_two(logits, power=1.0):
        first, second = logits.topk(2).values.unbind(-1)
        return (first - second) ** power

    monkeypatch.setitem(SCORES, "top_two", None)  # taken out again after the test
    scoring.register("top_two", top_two, ("logits",))
    detector = Detector("top_two", power=2.0).fit(classifier, VALIDATION)
    torch.testing.assert_close(
        detector.scores(classifier, TEST), top_two(classifier.outputs(TEST[0]).logits, 2.0).detach()
    )
    assert Detector.load(detector.save(tmp_path)).threshold_ == detector.threshold_
    scoring.register("top_two", top_two)  # what it reads is what its arguments are called
    assert SCORES["top_two"].reads == ("logits",) and SCORES["top_two"].of_outputs
    monkeypatch.delitem(SCORES, "top_two")
    with pytest.raises(ValueError, match="score must be one of .*'mcm'.*got 'top_two'"):
        Detector.load(tmp_path)


def test_a_detector_lies_beside_an_exported_classifier_and_goes_with_it(classifier, tmp_path):
    directory = classifier.save(tmp_path / "exported", CONFIG)
    fitted("mcm", classifier).save(directory)
    same = load_predictor(directory, dtype=torch.float64)  # does not take the detector for weights
    theirs = open_clip.create_model(f"local-dir:{directory}").double()
    assert clip.fingerprint(theirs) == clip.fingerprint(same.model)
    assert torch.equal(Detector.load(directory).scores(same, TEST), Detector.load(directory).scores(classifier, TEST))
    classifier.save(directory, CONFIG)  # replaces the export: a threshold of the model before would mislead
    with pytest.raises(FileNotFoundError, match="expected a Detector"):
        Detector.load(directory)


def test_patches_need_one_model_with_one_head(classifier):
    mixture = OutputEnsemble(classifier, classifier).at(0.5)
    assert Detector("mcm").fit(mixture, VALIDATION).detect(mixture, TEST).shape == (17,)
    with pytest.raises(ValueError, match="reads patches, which a Mixture has not"):
        Detector("gl_mcm").fit(mixture, VALIDATION)


def outputs(width=4, value=0.1, features=8):
    return Outputs(torch.full((5, features), value), torch.full((5, width), value), torch.full((5, width), value))


def test_misuse_is_refused_with_a_way_out(classifier, tmp_path):
    cases = [
        (lambda: Detector("MCM"), "score must be one of .*'mcm'.*got 'MCM'"),
        (lambda: Detector(tpr=95), "tpr must lie in"),
        (lambda: Detector().detect(outputs()), "no threshold yet: call fit"),
        (lambda: Detector().save(tmp_path), "no threshold yet: call fit"),
        (lambda: Detector("knn").scores(outputs()), "not learnt anything yet"),
        (lambda: Detector("knn").fit(outputs()), "cannot set its threshold: pass validation"),
        (lambda: Detector("mahalanobis").fit(outputs(), validation=outputs()), "needs the labels"),
        (lambda: Detector("neg_label").fit(outputs()), "no negative texts: pass negative_embeddings"),
        (lambda: Detector("neg_label", negative_embeddings=torch.eye(3)).fit(outputs()), r"must be \(M, 8\)"),
        (lambda: Detector().fit(Features(torch.eye(3), torch.arange(3))), "reads cosines, which this Features lacks"),
        (lambda: Detector("l_mcm").fit(outputs()), "reads patch_cosines, which this Outputs lacks"),
        (lambda: Detector().fit(outputs()).scores(outputs(width=5)), "cosines are 5 wide.* fitted at 4"),
        (lambda: Detector().fit(outputs(value=30.0)), "look like scaled logits"),
        (lambda: Detector("msp").fit(outputs(value=torch.nan)), "5 of 5 scores are NaN"),
        (lambda: Detector().fit(Outputs(cosines=torch.zeros(0, 3))), "non-empty"),
        (lambda: Detector().fit(classifier), "data is missing"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="mcm has no option 'tau'; it has .*temperature"):
        Detector("mcm", tau=1.0)
    with pytest.raises(TypeError, match="data goes with a predictor"):
        Detector().fit(outputs(), VALIDATION)
    with pytest.raises(TypeError, match="expected a predictor"):
        Detector().fit(types.SimpleNamespace())
    with pytest.raises(ValueError, match="reads must name parts of Outputs"):
        scoring.register("x", ood_scores.mcm, ("pixels",))
    with pytest.raises(ValueError, match="one of robustft's own scores.*got 'mcm'"):
        scoring.register("mcm", ood_scores.max_cosine, ("cosines",))


def test_a_softmax_over_one_class_is_refused_and_what_needs_none_is_named(classifier):
    one = classifier.restrict(["b"])
    for name in ("mcm", "msp", "entropy", "variance", "l_mcm", "gl_mcm"):
        with pytest.raises(ValueError, match=f"{name}.*over one class every softmax is the same.*max_cosine"):
            Detector(name).fit(one, VALIDATION)
    for name in ("max_cosine", "energy", "neg_label", "knn"):
        kept = ~Detector(name, tpr=0.9, **OPTIONS.get(name, {})).fit(one, TRAIN, validation=VALIDATION).detect(
            one, TEST
        )
        assert 0 < kept.sum() < 17, name


def test_a_failed_fit_leaves_no_threshold_of_an_earlier_one():
    detector = Detector("msp").fit(outputs())
    with pytest.raises(ValueError, match="NaN"):
        detector.fit(outputs(value=torch.nan))
    with pytest.raises(ValueError, match="no threshold yet"):
        detector.detect(outputs())


def test_damaged_and_foreign_files_are_refused(classifier, tmp_path):
    path = fitted("knn", classifier).save(tmp_path / "d.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated, or no Detector"):
        Detector.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no Detector saved by robustft"):
        Detector.load(path)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("mcm", "threshold", math.nan),
        ("mcm", "threshold", None),
        ("mcm", "tpr", 0.0),
        ("mcm", "options", {"tau": 1}),
        ("mcm", "widths", [1]),
        ("knn", "points", math.nan),
        ("mahalanobis", "whitening", math.inf),
    ],
)
def test_a_detector_of_impossible_values_is_refused_with_the_files_name(classifier, tmp_path, name, setting, value):
    path = fitted(name, classifier).save(tmp_path / "d.safetensors")
    change(path, setting, value)
    with pytest.raises(ValueError, match="d.safetensors: "):
        Detector.load(path)


def test_scoring_leaves_the_gradient_mode_alone_even_when_it_fails(classifier):
    with pytest.raises(ValueError, match="no negative texts"):
        Detector("neg_label").fit(classifier, VALIDATION)
    assert torch.is_grad_enabled()
    assert not Detector().fit(classifier, VALIDATION).scores(classifier, TEST).requires_grad
    assert torch.is_grad_enabled()
