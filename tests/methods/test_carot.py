import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from steps import step_each
from torch.utils._python_dispatch import TorchDispatchMode

from robustft import fit
from robustft.methods import FLYP, CaRot


def features(model, images, tokens):
    return F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)


def restated(student, teacher, images, tokens, step, squared):
    """CaRot's four terms from N x N matrices, straight from the formulas."""
    u, t = features(student, images, tokens)
    z = student.logit_scale.exp() * u @ t.T
    diagonal = torch.arange(len(z))
    terms = {"contrastive": (F.cross_entropy(z, diagonal) + F.cross_entropy(z.T, diagonal)) / 2}
    if step > 0:
        with torch.no_grad():
            tu, tt = features(teacher, images, tokens)
            tz = teacher.logit_scale.exp() * tu @ tt.T
        towards_text = -(tz.softmax(1) * z.log_softmax(1)).sum(1)
        towards_image = -(tz.T.softmax(1) * z.T.log_softmax(1)).sum(1)
        terms["distillation"] = (towards_text + towards_image).mean()
    wv, wt = student.visual.proj, student.text_projection
    square = ((wv.T @ wv - torch.eye(wv.shape[1], dtype=wv.dtype)) ** 2).sum()
    terms["orthogonality"] = square if squared else square.sqrt()
    terms["cross"] = ((wv @ wt.T) ** 2).sum().sqrt()
    return terms


@pytest.mark.parametrize("squared", [False, True])
def test_carot_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches, squared):
    weights = {"contrastive": 1.0, "distillation": 1.5, "orthogonality": 0.2, "cross": 0.05}
    total, interval = len(batches), 3
    method = CaRot(clip_model, total_steps=total, ema_interval=interval, squared=squared, **prompts)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    student, teacher = copy.deepcopy(clip_model), copy.deepcopy(clip_model).requires_grad_(False)
    plain = torch.optim.SGD(student.parameters(), lr=0.05)
    for step, (images, labels) in enumerate(batches):
        texts = [f"{prompts['class_names'][label]} number {i}" for i, label in enumerate(labels.tolist())]
        out = method.step((images, texts))
        terms = restated(student, teacher, images, prompts["tokenizer"](texts), step, squared)
        loss = sum(weights[name] * value for name, value in terms.items())
        assert out.terms.keys() == terms.keys()
        for name, value in terms.items():
            torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
        step_each((optimizer, out.loss), (plain, loss))
        method.after_step()
        if step % interval == 0:
            m = 0.05 + 0.85 * step / (0.2 * total) if step < 0.2 * total else 0.9
            with torch.no_grad():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.copy_(m * old + (1 - m) * new)
        for ours, theirs in ((method.model, student), (method.teacher, teacher)):
            for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_momentum_has_the_published_values(clip_model, prompts):
    method = CaRot(clip_model, total_steps=25_030, **prompts)
    published = {0: "0.05", 500: "0.135", 1000: "0.22", 2000: "0.39", 3000: "0.56", 4000: "0.73", 5000: "0.90"}
    for step, printed in published.items():
        decimals = len(printed) - 2
        assert f"{method.momentum(step):.{decimals}f}" == printed
    assert method.momentum(25_029) == 0.9


def test_teacher_moves_after_every_interval_only_and_gets_no_gradient(clip_model, prompts, batches):
    method = CaRot(clip_model, total_steps=9, ema_interval_fraction=1 / 3, **prompts)
    assert method.ema_interval == 3
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
    moved = []
    for batch in batches:
        before = method.teacher.visual.proj.clone()
        optimizer.zero_grad()
        method.step(batch).loss.backward()
        optimizer.step()
        assert torch.equal(method.teacher.visual.proj, before)
        method.after_step()
        moved.append(not torch.equal(method.teacher.visual.proj, before))
    assert moved == [True, False, False] * 3
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_carot_of_weights_zero_is_flyp(clip_model, prompts, batches):
    zero = {"cross_weight": 0.0, "orthogonality_weight": 0.0, "distillation_weight": 0.0}
    carot, flyp = CaRot(clip_model, total_steps=9, seed=4, **zero, **prompts), FLYP(clip_model, seed=4, **prompts)
    for batch in batches[:3]:
        a, b = carot.step(batch), flyp.step(batch)
        assert torch.equal(a.loss, b.loss) and a.terms.keys() == b.terms.keys() == {"contrastive"}
        carot.after_step()
        flyp.after_step()


def test_buffers_of_the_teacher_stay_pretrained_and_it_stays_in_evaluation_mode(clip_model, prompts, batches):
    clip_model.visual.register_buffer("running", torch.zeros(2))
    method = CaRot(clip_model, total_steps=9, ema_interval=1, **prompts).train()
    method.model.visual.running += 1
    method.step(batches[0]).loss.backward()
    method.after_step()
    assert torch.equal(method.teacher.visual.running, torch.zeros(2))
    assert method.model.training and not method.teacher.training


def test_the_beta_teacher_is_the_weighted_mean_of_all_iterates(clip_model, prompts, batches):
    total = len(batches)
    for interval, averaged in ((None, range(total + 1)), (3, (0, 1, 4, 7))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it does not collapse
            method = CaRot(clip_model, total_steps=total, teacher="beta", ema_interval=interval, **prompts)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05)
        stored = [[p.detach().clone() for p in method.model.parameters()]]
        for t, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            method.step(batch).loss.backward()
            optimizer.step()
            method.after_step()
            stored.append([p.detach().clone() for p in method.model.parameters()])
            kept = [k for k in averaged if k <= t]
            x = (torch.tensor(kept, dtype=torch.float64) + 0.5) / (total + 1)
            w = torch.distributions.Beta(*torch.full((2, 1), 0.5, dtype=torch.float64)).log_prob(x).exp()
            for i, p in enumerate(method.teacher.parameters()):
                mean = sum(weight * stored[k][i] for weight, k in zip(w, kept, strict=True)) / w.sum()
                torch.testing.assert_close(p, mean, rtol=1e-12, atol=1e-14)
        last = [p.clone() for p in method.teacher.parameters()]
        method.after_step()  # beyond the run
        assert all(torch.equal(p, q) for p, q in zip(method.teacher.parameters(), last, strict=True))


def test_the_beta_teacher_keeps_its_distance_where_an_exponential_average_collapses(clip_model, prompts):
    """Of a student that moves by the same at every step."""
    distances = {}
    for teacher, interval in (("ema", 1), ("beta", None)):
        method = CaRot(
            clip_model, total_steps=100, teacher=teacher, ema_interval=interval, distillation_weight=0.0, **prompts
        )
        for _ in range(100):
            with torch.no_grad():
                method.model.visual.proj += 1.0
            method.after_step()
        distances[teacher] = (method.model.visual.proj - method.teacher.visual.proj).mean().item()
    assert distances["ema"] < 10.0 and distances["beta"] == pytest.approx(50.0)


def test_tracers_terms_are_those_of_the_loss_between_student_and_teacher(clip_model, prompts, batches):
    weights = {"feature_weight": 0.3, "cross_distillation_weight": 0.4, "interactive_weight": 0.5}
    method = CaRot(clip_model, total_steps=9, teacher="beta", distillation_weight=0.0, **weights, **prompts)
    images, labels = batches[0]
    texts = [f"{prompts['class_names'][label]} number {i}" for i, label in enumerate(labels.tolist())]
    assert method.step((images, texts)).terms.keys() == {"contrastive", "orthogonality", "cross"}
    with torch.no_grad():
        method.model.visual.proj.mul_(2).add_(0.1)
    method.after_step()
    out = method.step((images, texts))
    (u, t), (u0, t0) = (features(m, images, prompts["tokenizer"](texts)) for m in (method.model, method.teacher))
    s = clip_model.logit_scale.exp()
    p, targets = s * u0 @ t0.T, torch.arange(len(images))
    towards_text, towards_image = (s * u @ t0.T).log_softmax(1), (s * t @ u0.T).log_softmax(1)
    expected = {
        "feature": ((u - u0).square() + (t - t0).square()).sum(1).mean(),
        "cross_distillation": -(p.softmax(1) * towards_text + p.T.softmax(1) * towards_image).sum(1).mean(),
        "interactive": (F.nll_loss(towards_text, targets) + F.nll_loss(towards_image, targets)) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-9, atol=1e-12)
    plain = out.terms["contrastive"] + 0.2 * out.terms["orthogonality"] + 0.05 * out.terms["cross"]
    weighted = sum(weights[f"{name}_weight"] * value for name, value in expected.items())
    torch.testing.assert_close(out.loss, plain + weighted, rtol=1e-9, atol=1e-12)
    out.loss.backward()
    assert all(q.grad is None for q in method.teacher.parameters())


def test_student_and_teacher_each_have_their_classifier(clip_model, prompts, batches):
    method = CaRot(clip_model, total_steps=9, ema_interval=3, **prompts)
    with torch.no_grad():
        method.model.visual.proj.mul_(2).add_(0.1)
    images = batches[0][0]
    assert not torch.equal(method.classifier().logits(images), method.classifier(teacher=True).logits(images))
    torch.testing.assert_close(
        method.classifier(teacher=True).outputs(images).features, F.normalize(clip_model.encode_image(images), dim=-1)
    )


def test_interval_longer_than_the_run_is_warned_of(clip_model, prompts):
    for method in (
        lambda: CaRot(clip_model, total_steps=300, ema_interval=500, **prompts),
        lambda: CaRot(clip_model, ema_interval=500, **prompts).begin_run(300),
    ):
        with pytest.warns(UserWarning, match="follow step 0 only. Set ema_interval, say to 6"):
            method()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaRot(clip_model, total_steps=300, ema_interval_fraction=0.02, **prompts)


def test_the_interval_is_the_published_one_and_in_shorter_runs_the_same_part_of_them(clip_model, prompts):
    method = CaRot(clip_model, **prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps, interval in ((25_030, 500), (100_000, 500), (300, 6), (70, 2), (2, 2)):
            method.begin_run(steps)
            assert method.ema_interval == CaRot(clip_model, total_steps=steps, **prompts).ema_interval == interval


def test_a_run_whose_length_nobody_told_is_an_error_at_its_first_step(clip_model, prompts, batches):
    method = CaRot(clip_model, **prompts)
    with pytest.raises(ValueError, match=r"total_steps is needed: CaRot has a schedule.*begin_run\(total_steps\)"):
        method.step(batches[0])
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        method.begin_run(0)
    method.begin_run(9)
    method.step(batches[0])
    again = CaRot(clip_model, **prompts)
    again.load_state_dict(method.state_dict())
    assert again.run_length() == 9
    given = CaRot(clip_model, total_steps=20, **prompts)
    given.begin_run(9)
    assert given.run_length() == 20 and given.momentum(2) < method.momentum(2) == 0.9


@pytest.mark.parametrize("teacher", ["ema", "beta"])
def test_fit_tells_the_length_of_the_run(clip_model, prompts, batches, tmp_path, teacher):
    """A run of which nobody counted the steps ends like one whose steps are given; so does one that was stopped."""
    data = tuple(torch.cat(parts) for parts in zip(*batches[:6], strict=True))
    recipe = {"epochs": 2, "batch_size": 6, "lr": 0.01, "progress": False}
    counted, told, stopped, resumed = (
        CaRot(clip_model, total_steps=n, teacher=teacher, **prompts) for n in (12, None, None, None)
    )
    fit(told, data, dry_run=True, **recipe)
    with pytest.raises(ValueError, match="total_steps is needed"):
        told.run_length()
    for method in (counted, told):
        fit(method, data, **recipe)
    original = stopped.step

    def step(batch):
        if int(stopped.steps) == 8:
            raise InterruptedError
        return original(batch)

    stopped.step = step
    with pytest.raises(InterruptedError):
        fit(stopped, data, output=tmp_path, **recipe)
    fit(resumed, data, output=tmp_path, resume=True, **recipe)
    assert told.run_length() == 12 and not torch.equal(told.teacher.visual.proj, told.model.visual.proj)
    for name, value in told.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.equal(counted.state_dict()[name], value), name


def test_teacher_that_moves_at_every_step_is_warned_of_unless_the_run_is_very_short(clip_model, prompts):
    with pytest.warns(UserWarning, match="moves every 1 steps .* has 70: it will collapse .*ema_interval, say to 2"):
        CaRot(clip_model, total_steps=70, ema_interval_fraction=0.02, **prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaRot(clip_model, total_steps=70, ema_interval=2, **prompts)
        CaRot(clip_model, total_steps=70, ema_interval=1, distillation_weight=0.0, **prompts)
        CaRot(clip_model, total_steps=10, ema_interval=1, **prompts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"distillation_weight": -1.0}, "distillation_weight must be finite and not negative, got -1.0"),
        ({"ema_start": 1.5}, r"ema_start must lie in \[0, 1\], got 1.5"),
        ({"ema_interval": 0}, "ema_interval must be at least 1, got 0"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"targets": "row"}, "targets must be"),
        ({"teacher": "mean"}, 'teacher must be "ema" or "beta", got \'mean\''),
        ({"interactive_weight": -0.5}, "interactive_weight must be finite and not negative, got -0.5"),
    ],
)
def test_bad_arguments_are_named(clip_model, prompts, arguments, message):
    with pytest.raises(ValueError, match=message):
        CaRot(clip_model, **({"total_steps": 9, "ema_interval": 3} | arguments), **prompts)


def test_a_tower_without_a_projection_goes_without_its_penalties_of_which_it_is_told_once(clip_model, prompts, batches):
    carot = {"total_steps": 9, "ema_interval": 3, **prompts}
    clip_model.text_projection = None
    with pytest.warns(
        UserWarning, match="without the term of cross_weight: model: the text tower of this CLIP"
    ) as told:
        method = CaRot(clip_model, **carot)
        assert method.step(batches[0]).terms.keys() == {"contrastive", "orthogonality"}
    assert len(told) == 1 and told[0].filename == __file__
    clip_model.visual.proj = None
    with pytest.warns(UserWarning, match="without the terms of orthogonality_weight and cross_weight: .* visual tower"):
        method = CaRot(clip_model, **carot)
    method.penalised = ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaRot(clip_model, cross_weight=0.0, orthogonality_weight=0.0, **carot)


class Reads(TorchDispatchMode):
    """How often a number is asked for that lies in one of the tensors: on a GPU each waits for it."""

    def __init__(self, *tensors):
        super().__init__()
        self.places, self.count = {tensor.data_ptr() for tensor in tensors}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].data_ptr() in self.places
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [FLYP, CaRot])
def test_the_count_of_steps_is_read_once_and_again_where_it_was_written(clip_model, prompts, batches, kind):
    method = kind(clip_model, **prompts)
    method.begin_run(9)
    method.step(batches[0])
    method.after_step()
    with Reads(method.steps, method.run_steps) as reads:
        method.step(batches[1])
        method.after_step()
    assert reads.count == 0 and method.steps_done == int(method.steps) == 2
    state = {name: value.clone() for name, value in method.state_dict().items()}
    method.after_step()
    method.load_state_dict(state)
    assert method.steps_done == 2 and copy.deepcopy(method).steps_done == 2
    method.steps.fill_(5)
    assert method.steps_done == 5
