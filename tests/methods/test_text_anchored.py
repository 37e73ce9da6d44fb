"""Methods that hold a model to its pre-trained self over texts: Lipsum-FT, CAR-FT and StarFT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_options import ANCHORED
from steps import step_each
from tiny_clip import letters

from robustft import methods
from robustft.clip.prompts import tokenize
from robustft.clip.random_texts import RandomTexts
from robustft.data.seeds import stateless_generator
from robustft.methods import CARFT, FLYP, FineTune, LipsumFT, StarFT

HEADED = {"LipsumFT": "energy_gap", "CARFT": "context"}


@pytest.fixture(params=["vit", "resnet"])
def model_and_batches(request):
    names = ("clip_model", "batches") if request.param == "vit" else ("resnet_model", "resnet_batches")
    model, batches = map(request.getfixturevalue, names)
    return model, batches[:4]


def images_of(model, images):
    return F.normalize(model.encode_image(images), dim=-1)


def texts_of(model, texts):
    return F.normalize(model.encode_text(texts if isinstance(texts, torch.Tensor) else letters(texts)), dim=-1)


def divergence(name, method, frozen, u, u0, step):
    """Straight from the papers' formulas, with matrices (N, M)."""
    s = frozen.logit_scale.exp()
    if name == "LipsumFT":
        t = texts_of(frozen, method.random_texts.draw(5, stateless_generator(3, "random texts", step)))
        return (s * u @ t.T - s * u0 @ t.T).square().sum(1).mean() / (2 * 5)
    contexts = [texts_of(frozen, [template.format(n) for n in method.class_names]).mean(0)
                for template in ANCHORED["CARFT"]["contexts"]]  # fmt: skip
    t = F.normalize(torch.stack(contexts), dim=-1)
    return F.kl_div((s * u @ t.T).log_softmax(1), (s * u0 @ t.T).softmax(1), reduction="batchmean")


@pytest.mark.parametrize("name", HEADED)
def test_they_equal_their_plain_restatement_at_every_step(model_and_batches, prompts, name):
    model, batches = model_and_batches
    method = getattr(methods, name)(model, weight=0.7, seed=3, **ANCHORED[name], **prompts).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    student, frozen = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    head = FineTune(model, **prompts).head.detach().clone().requires_grad_()
    plain = torch.optim.SGD([*student.visual.parameters(), head], lr=0.01)
    for step, (images, labels) in enumerate(batches):
        out = method.step((images, labels))
        u = images_of(student, images)
        with torch.no_grad():
            u0 = images_of(frozen, images)
        expected = divergence(name, method, frozen, u, u0, step)
        loss = F.cross_entropy(u @ head.T, labels) + 0.7 * expected
        assert out.terms.keys() == {"cross_entropy", HEADED[name]}
        torch.testing.assert_close(out.terms[HEADED[name]], expected.detach(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    assert out.terms[HEADED[name]] > 0
    torch.testing.assert_close(method.head, head, rtol=1e-8, atol=1e-10)
    for p, q in zip(method.model.visual.parameters(), student.visual.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


def test_starft_equals_its_plain_restatement_at_every_step(model_and_batches, prompts):
    model, batches = model_and_batches
    method = StarFT(model, weight=0.7, total_steps=8, seed=3, **ANCHORED["StarFT"], **prompts).train()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    student, frozen = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    plain = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.01)
    for step, (images, labels) in enumerate(batches):
        out = method.step((images, labels))
        drawn = method.prompts.sample(labels, stateless_generator(3, "captions", step))
        spurious = method.spurious.sample(labels, stateless_generator(3, "spurious captions", step))
        u, t, v = images_of(student, images), *(texts_of(student, d.tokens)[d.inverse] for d in (drawn, spurious))
        with torch.no_grad():
            s0, u0 = frozen.logit_scale.exp(), images_of(frozen, images)
            v0 = texts_of(frozen, spurious.tokens)[spurious.inverse]
        z, diagonal = student.logit_scale.exp() * u @ t.T, torch.arange(len(u))
        others = [(labels != label).nonzero()[:, 0] for label in labels]
        divergences = [
            F.kl_div((s0 * u[i] @ v[o].T).log_softmax(0), (s0 * u0[i] @ v0[o].T).softmax(0), reduction="sum")
            for i, o in enumerate(others)
            if len(o)
        ]
        expected = torch.stack(divergences).sum() / len(u)
        contrastive = (F.cross_entropy(z, diagonal) + F.cross_entropy(z.T, diagonal)) / 2
        loss = contrastive + 0.7 * (1 - step / 8) * expected
        torch.testing.assert_close(out.terms["spurious"], expected.detach(), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
    assert out.terms["spurious"] > 0
    for p, q in zip(method.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


def test_what_starft_adds_fades_over_the_run_or_stays(clip_model, prompts, batches):
    for diminishing, expected in ((True, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]), (False, [1.0] * 6)):
        method = StarFT(clip_model, total_steps=4, diminishing=diminishing, **ANCHORED["StarFT"], **prompts)
        found = []
        for _ in expected:
            found.append(method.share())
            method.after_step()
        assert found == expected
    method = StarFT(clip_model, **ANCHORED["StarFT"], **prompts)
    with pytest.raises(ValueError, match="total_steps is needed: StarFT has a schedule"):
        method.step(batches[0])
    StarFT(clip_model, diminishing=False, **ANCHORED["StarFT"], **prompts).step(batches[0])


def test_a_batch_of_one_class_has_nothing_to_keep(clip_model, prompts, batches):
    method = StarFT(clip_model, total_steps=4, **ANCHORED["StarFT"], **prompts)
    with torch.no_grad():
        method.model.visual.proj.mul_(2).add_(0.1)
    out = method.step((batches[0][0], torch.ones(6, dtype=torch.int64)))
    out.loss.backward()
    assert out.terms["spurious"] == 0
    assert all(p.grad.isfinite().all() for p in method.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ANCHORED)
def test_of_weight_zero_they_are_what_they_add_to(clip_model, prompts, batches, name):
    method = getattr(methods, name)(clip_model, weight=0.0, **ANCHORED[name], **prompts)
    other = (FLYP if name == "StarFT" else FineTune)(clip_model, **prompts)
    found, expected = method.step(batches[0]), other.step(batches[0])
    assert torch.equal(found.loss, expected.loss) and found.terms == expected.terms
    assert method.pretrained is None


@pytest.mark.parametrize("name", ANCHORED)
def test_the_pretrained_model_moves_with_the_method_is_in_no_state_and_tells_runs_apart(clip_model, prompts, name):
    kind = getattr(methods, name)
    other = (FLYP if name == "StarFT" else FineTune)(clip_model, **prompts)
    method = kind(clip_model, **ANCHORED[name], **prompts)
    assert method.state_dict().keys() == other.state_dict().keys()
    assert {p.dtype for p in method.float().train().pretrained.held[0].parameters()} == {torch.float32}
    assert not method.pretrained.held[0].training
    with torch.no_grad():
        clip_model.visual.proj += 0.1
    again = kind(clip_model, **ANCHORED[name], **prompts)
    assert again.config["pretrained"] != method.config["pretrained"]


def test_other_contexts_and_other_spurious_captions_are_other_runs(clip_model, prompts):
    for kind, option in ((CARFT, "contexts"), (StarFT, "spurious")):
        first, second, same = (
            kind(clip_model, **{option: texts}, **prompts).config
            for texts in (("a {}", "red {}"), ("a {}", "big {}"), ["a {}", "red {}"])
        )
        assert first != second and first == same
    templates = CARFT(clip_model, **prompts).config["contexts"]
    assert templates == CARFT(clip_model, contexts=prompts["templates"], **prompts).config["contexts"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda *a, **k: CARFT(*a, weight=-1.0, **k), "weight must be finite and not negative, got -1.0"),
        (lambda *a, **k: CARFT(*a, contexts=("a {}",), **k), "contexts must be at least two templates, got 1"),
        (lambda *a, **k: LipsumFT(*a, texts=0, **k), "texts must be at least 1, got 0"),
        (lambda *a, **k: LipsumFT(*a, length=15, **k), "length must be from 1 to 14, .* got 15"),
        (lambda *a, **k: StarFT(*a, spurious=(), **k), "spurious: templates: expected at least one template"),
    ],
)
def test_bad_arguments_are_named(clip_model, prompts, make, message):
    with pytest.raises(ValueError, match=message):
        make(clip_model, **prompts)


def test_starft_needs_labels(clip_model, prompts, batches):
    with pytest.raises(ValueError, match="StarFT needs labels in the batch, which has texts only"):
        StarFT(clip_model, total_steps=4, **ANCHORED["StarFT"], **prompts).step((batches[0][0], ["a"] * 6))


def framed(texts):
    """A tokenizer as CLIP's: an opening token and a closing one, the largest, then padding."""
    rows = [[28] + [1 + (ord(c) - 97) % 26 for c in text[:9]] + [29] for text in texts]
    return torch.tensor([row + [0] * (11 - len(row)) for row in rows])


def of_siglip(texts):
    """As SigLIP's: nothing opens a text, and what closes it pads it."""
    rows = [[2 + (ord(c) - 97) % 26 for c in text[:11]] for text in texts]
    return torch.tensor([row + [1] * (11 - len(row)) for row in rows])


def test_random_texts_are_framed_as_the_tokenizer_frames_texts(clip_model):
    cases = ((framed, "argmax", [28], [29, 0, 0, 0, 0, 0]), (of_siglip, "last", [], [1] * 7))
    for tokenizer, clip_model.text_pool_type, opening, rest in cases:
        frame = {*opening, *rest}
        tokens = RandomTexts(clip_model, tokenizer, 4).draw(4000, torch.Generator().manual_seed(0))
        assert tokens.shape == (4000, 11) and tokens.dtype == torch.int64
        end = len(opening) + 4
        assert (tokens[:, : len(opening)] == torch.tensor(opening, dtype=torch.int64)).all()
        assert (tokens[:, end:] == torch.tensor(rest)).all()
        counts = tokens[:, len(opening) : end].flatten().bincount(minlength=30)
        assert {word for word, count in enumerate(counts.tolist()) if count == 0} >= frame
        words = [word for word in range(30) if counts[word]]
        assert len(words) == 30 - len(frame) and counts[words].min() > 400


def test_random_texts_of_clips_tower_are_pooled_at_their_end(clip_model):
    tokens = RandomTexts(clip_model, letters, 4).draw(50, torch.Generator().manual_seed(0))
    assert (tokens.argmax(1) == 4).all() and (tokens[:, 4] == 29).all()
    assert tokenize(letters, ["abcd"]).shape[1] == tokens.shape[1]
