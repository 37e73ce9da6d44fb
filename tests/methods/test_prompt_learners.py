"""Prompt learners against plain float64 restatements of their papers, step by step."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch
import torch.nn.functional as F
from plain_prompts import (
    plain_captions,
    plain_head,
    plain_image_tower,
    plain_objective,
    plain_text_tower,
    train_beside,
)

from robustft import clip
from robustft.data import glyphworld
from robustft.methods import CoCoOp, CoOp, KgCoOp, LoCoOp, MaPLe, ProDA, zero_shot_classifier
from robustft.methods.objective import Objective
from robustft.methods.proda import difference_variance

CONTEXT = 3


@pytest.fixture
def hosts(prompts):
    return {**prompts, "templates": ("{}",)}


@pytest.fixture(params=["end", "middle", "front"])
def position(request):
    return request.param


@pytest.mark.parametrize("misalignment", [0.0, 1.0])
@pytest.mark.parametrize("class_specific", [False, True])
def test_coop_equals_its_plain_restatement_at_every_step(
    clip_model, hosts, batches, position, class_specific, misalignment
):
    objective = Objective(misalignment=misalignment)
    method = CoOp(
        clip_model,
        context=CONTEXT,
        class_specific=class_specific,
        position=position,
        objective=objective,
        **hosts,
    )
    context = method.context.detach().clone().requires_grad_()

    def plain_loss(images, labels, _step):
        u = F.normalize(clip_model.encode_image(images), dim=-1).detach()
        z = clip_model.logit_scale.exp().detach() * u @ plain_head(clip_model, hosts, context, position).T
        return plain_objective(z, labels, misalignment)

    train_beside(method, [context], batches[:5], plain_loss)
    torch.testing.assert_close(method.context, context, rtol=1e-8, atol=1e-10)
    head = plain_head(clip_model, hosts, context, position)
    torch.testing.assert_close(method.classifier().class_embeddings, head.detach(), rtol=1e-8, atol=1e-10)


def test_kgcoop_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches):
    prompts = {**prompts, "templates": ("{}", "a {}")}
    method = KgCoOp(clip_model, context=CONTEXT, weight=8.0, **prompts)
    context = method.context.detach().clone().requires_grad_()
    hand = zero_shot_classifier(clip_model, **prompts).class_embeddings

    def plain_loss(images, labels, _step):
        u = F.normalize(clip_model.encode_image(images), dim=-1).detach()
        w = plain_head(clip_model, prompts, context)
        z = clip_model.logit_scale.exp().detach() * u @ w.T
        return F.cross_entropy(z, labels) + 8 * (1 - (w * hand).sum(1)).mean()

    train_beside(method, [context], batches[:5], plain_loss)
    torch.testing.assert_close(method.context, context, rtol=1e-8, atol=1e-10)


def test_kgcoop_of_great_weight_stays_nearer_to_the_hand_prompts(clip_model, prompts, batches):
    distances = []
    for weight in (0.0, 100.0):
        method = KgCoOp(clip_model, context=CONTEXT, weight=weight, **prompts)
        optimizer = torch.optim.Adam([method.context], lr=0.05)
        for batch in 3 * batches:
            optimizer.zero_grad()
            out = method.step(batch)
            out.loss.backward()
            optimizer.step()
        distances.append(out.terms["distance"].item())
    assert distances[1] < 0.8 * distances[0]


def test_a_context_of_words_starts_as_the_zero_shot_classifier_of_that_prompt(clip_model, hosts):
    method = CoOp(clip_model, context="the", **hosts)
    expected = zero_shot_classifier(clip_model, **{**hosts, "templates": ("the{}",)})
    torch.testing.assert_close(method.classifier().class_embeddings, expected.class_embeddings)
    specific = CoOp(clip_model, context="the", class_specific=True, **hosts)
    torch.testing.assert_close(specific.class_embeddings(), method.class_embeddings())
    assert specific.context.shape == (3, 3, 8)


def test_what_follows_the_name_in_the_template_follows_it_here(clip_model, hosts):
    for position, template in (("end", "of{}now"), ("front", "{}ofnow")):
        method = CoOp(clip_model, context="of", position=position, **{**hosts, "templates": ("a {}now",)})
        expected = zero_shot_classifier(clip_model, **{**hosts, "templates": (template,)})
        torch.testing.assert_close(method.classifier().class_embeddings, expected.class_embeddings)


def test_words_of_clips_own_tokenizer_start_as_the_zero_shot_classifier_too():
    bundle = glyphworld.load_clip()
    prompts = {"tokenizer": bundle.tokenizer, "class_names": glyphworld.CLASS_NAMES}
    for template, words in (("{}", "a picture of"), ("an image of {}, drawn.", "A blurry  picture of")):
        method = CoOp(bundle.model, context=words, templates=(template,), **prompts)
        expected = template.replace("an image of ", "").replace("{}", f"{words} {{}}")
        zero_shot = zero_shot_classifier(bundle.model, templates=(expected,), **prompts)
        torch.testing.assert_close(method.class_embeddings(), zero_shot.class_embeddings, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'the digit zero' takes 5 of the 20 tokens and leaves 15"):
        CoOp(bundle.model, context=16, templates=("{}",), **prompts)


def test_a_tokenizer_without_opening_and_closing_tokens_is_understood(prompts):
    """As SigLIP's: texts are closed and filled by one token, nothing opens them, and the last token is pooled."""

    def filled(texts):
        rows = [[2 + (ord(c) - 97) % 27 for c in text[:15]] for text in texts]
        return torch.tensor([row + [1] * (15 - len(row)) for row in rows])

    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
    text = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2}
    text |= {"no_causal_mask": True, "pool_type": "last", "pad_id": 1}
    model = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).double()
    prompts = {**prompts, "tokenizer": filled, "templates": ("{}x",)}
    for position, template in (("end", "of{}x"), ("front", "{}ofx")):
        found = CoOp(model, context="of", position=position, **prompts).class_embeddings()
        expected = zero_shot_classifier(model, **{**prompts, "templates": (template,)})
        torch.testing.assert_close(found, expected.class_embeddings)


def test_the_initial_context_is_a_function_of_the_seed_with_standard_deviation_two_hundredths(clip_model, hosts):
    first, again, other = (CoOp(clip_model, context=9, seed=seed, **hosts).context for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    specific = CoOp(clip_model, context=9, class_specific=True, **hosts).context
    assert specific.shape == (3, 9, 8) and abs(specific.std().item() - 0.02) < 0.003


@pytest.mark.parametrize("host, name", [(CoOp, "context"), (CoCoOp, "context"), (ProDA, "contexts")])
def test_chunks_of_captions_change_neither_loss_nor_gradient(clip_model, hosts, batches, host, name):
    whole, chunked = (host(clip_model, context=CONTEXT, chunk_size=size, **hosts) for size in (None, 2))
    losses = [method.step(batches[0]).loss for method in (whole, chunked)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(getattr(chunked, name).grad, getattr(whole, name).grad)


def test_a_name_too_long_for_the_context_is_refused_by_name(clip_model, hosts):
    names = ("ant", "hippopotamus", "cow")
    with pytest.raises(ValueError, match="'hippopotamus' takes 13 of the 15 tokens and leaves 2.*at most 2"):
        CoOp(clip_model, context=3, **{**hosts, "class_names": names})
    CoOp(clip_model, context=2, **{**hosts, "class_names": names})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"context": 0}, "context: expected some words or at least one token, got 0"),
        ({"context": ""}, "context: expected some words"),
        ({"position": "top"}, "position must be"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"templates": (lambda name: "thing",)}, "does not hold the name"),
        ({"class_names": ("ant", "")}, "blank"),
        ({"templates": ()}, "at least one template"),
    ],
)
def test_bad_arguments_are_refused(clip_model, hosts, bad, message):
    with pytest.raises(ValueError, match=message):
        CoOp(clip_model, **{**hosts, "context": 2, **bad})
    with pytest.raises(ValueError, match="weight"):
        KgCoOp(clip_model, weight=-1.0, **hosts)


def test_only_the_context_is_trained_and_saved(clip_model, hosts, batches):
    method = CoOp(clip_model, context=CONTEXT, **hosts).train()
    before = copy.deepcopy(method.model.state_dict())
    assert {name for name, p in method.named_parameters() if p.requires_grad} == {"context"}
    assert set(method.state_dict()) == {"context", "steps", "run_steps"}
    assert not method.model.training and method.training
    method.step(batches[0]).loss.backward()
    assert all(p.grad is None for p in method.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    with pytest.raises(ValueError, match="CoOp needs labels"):
        method.step((batches[0][0], ["a"] * 6))
    with pytest.raises(RuntimeError, match="context"):
        method.load_state_dict({"steps": torch.tensor(3)})


def test_cocoop_equals_its_plain_restatement_at_every_step(clip_model, hosts, batches):
    method = CoCoOp(clip_model, context=CONTEXT, objective=Objective(misalignment=0.5), **hosts)
    trained = [method.context, method.narrow.weight, method.narrow.bias, method.shift.weight, method.shift.bias]
    parts = [part.detach().clone().requires_grad_() for part in trained]
    context, v, a, up, b = parts
    assert v.shape == (1, 8) and up.shape == (8, 1)
    scale = clip_model.logit_scale.exp().detach()

    def plain_logits(images):
        rows = []
        for u in F.normalize(clip_model.encode_image(images), dim=-1).detach():
            shifted = context + up @ torch.relu(v @ u + a) + b
            rows.append(scale * plain_head(clip_model, hosts, shifted) @ u)
        return torch.stack(rows)

    train_beside(method, parts, batches[:4], lambda x, y, _: plain_objective(plain_logits(x), y, 0.5))
    torch.testing.assert_close(trained, parts, rtol=1e-8, atol=1e-10)
    images = batches[8][0]
    classifier, expected = method.classifier(), plain_logits(images).detach()
    torch.testing.assert_close(classifier.logits(images), expected)
    classifier.captions = 7  # two images at a time
    torch.testing.assert_close(classifier.logits(images), expected)
    torch.testing.assert_close(classifier.restrict(["cow", "ant"]).logits(images), expected[:, [2, 0]])


def test_locoop_equals_its_plain_restatement_at_every_step(clip_model, hosts, batches):
    method = LoCoOp(clip_model, context=CONTEXT, weight=0.25, top_k=2, **hosts)
    context = method.context.detach().clone().requires_grad_()
    scale, chosen = clip_model.logit_scale.exp().detach(), []

    def plain_loss(images, labels, _step):
        u = F.normalize(clip_model.encode_image(images), dim=-1).detach()
        patches = clip.encode_patches(clip_model, images).detach()
        w = plain_head(clip_model, hosts, context)
        entropies = []
        for local, y in zip(patches, labels, strict=True):
            for p in (scale * local @ w.T).softmax(-1):
                if int(y) not in p.topk(2).indices.tolist():
                    entropies.append(-(p * p.log()).sum())
        chosen.append(len(entropies))
        return F.cross_entropy(scale * u @ w.T, labels) - 0.25 * torch.stack(entropies).mean()

    train_beside(method, [context], batches[:5], plain_loss)
    torch.testing.assert_close(method.context, context, rtol=1e-8, atol=1e-10)
    assert 0 < min(chosen) and max(chosen) < 6 * 4, "some patches are background, some are not"


def test_locoop_without_background_is_coop_and_its_default_is_a_fifth_of_the_classes(clip_model, hosts, batches):
    coop, locoop = CoOp(clip_model, context=CONTEXT, **hosts), LoCoOp(clip_model, context=CONTEXT, top_k=3, **hosts)
    losses = [method.step(batches[0]) for method in (coop, locoop)]
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-12, atol=0)  # patches take the last block whole
    assert losses[1].terms["background_entropy"] == 0
    names = tuple("abcdefghijklmnopqrst")
    assert LoCoOp(clip_model, context=CONTEXT, **{**hosts, "class_names": names}).top_k == 4
    assert LoCoOp(clip_model, context=CONTEXT, **hosts).top_k == 1


def test_proda_equals_its_plain_restatement_at_every_step(clip_model, prompts, batches):
    prompts = {**prompts, "templates": ("a {}s",)}
    method = ProDA(clip_model, context=CONTEXT, prompts=8, prompt_batch=4, weight=0.1, **prompts)
    contexts = method.contexts.detach().clone().requires_grad_()
    places = ["front"] * 2 + ["middle"] * 2 + ["end"] * 4
    scale, turns = clip_model.logit_scale.exp().detach(), []

    def head(p):
        return plain_head(clip_model, prompts, contexts[p], places[p], rest="s")

    def plain_loss(images, labels, _step):
        chosen = method.chosen().tolist()
        turns.append(chosen)
        u = F.normalize(clip_model.encode_image(images), dim=-1).detach()
        w = torch.stack([head(p) for p in chosen], 1)  # (K, P, D)
        mean = w.mean(1)
        # The covariance between classes, one of each feature: (D, K, K), and of the image's logits: (N, K, K).
        covariance = torch.einsum("ipd,jpd->dij", w - mean[:, None], w - mean[:, None]) / 5
        of_logits = torch.einsum("nd,dij->nij", u**2, covariance)
        z = scale * u @ mean.T
        rows = []
        for n, y in enumerate(labels):
            variance = torch.stack([of_logits[n, c, c] + of_logits[n, y, y] - 2 * of_logits[n, c, y] for c in range(3)])
            rows.append(z[n] + scale**2 / 2 * variance)
        nameless = {**prompts, "class_names": ("",)}
        v = [plain_head(clip_model, nameless, contexts[p], rest="s")[0] for p in chosen]
        overlap = torch.stack([(v[i] @ v[j]).abs() for i in range(4) for j in range(4) if i != j]).mean()
        return F.cross_entropy(torch.stack(rows), labels) + 0.1 * overlap

    train_beside(method, [contexts], batches[:4], plain_loss, lr=0.01)
    torch.testing.assert_close(method.contexts, contexts, rtol=1e-8, atol=1e-10)
    assert sorted(turns[0] + turns[1]) == sorted(turns[2] + turns[3]) == list(range(8))
    expected = torch.stack([head(p) for p in range(8)]).mean(0)
    torch.testing.assert_close(method.classifier().class_embeddings, expected.detach(), rtol=1e-8, atol=1e-10)


def test_the_variance_of_a_difference_is_that_of_the_prompts_logits():
    u, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1])
    found = difference_variance(u, w - w.mean(0), labels)
    torch.testing.assert_close(found.gather(1, labels[:, None]), torch.zeros(5, 1, dtype=torch.float64))
    for n, y in enumerate(labels):
        # One feature at a time, as the covariance is diagonal in them.
        differences = u[n] * (w - w[:, y : y + 1])
        torch.testing.assert_close(found[n], (differences.var(0, correction=0) * 6 / 7).sum(-1))


@pytest.mark.parametrize("depth", [1, 2])
def test_maple_equals_its_plain_restatement_at_every_step(hosts, batches, depth):
    model = deep_model()
    method = MaPLe(model, context=CONTEXT, depth=depth, **hosts)
    trained = [method.context, *method.deep]
    for coupling in method.couplings:
        trained += [coupling.weight, coupling.bias]
    parts = [part.detach().clone().requires_grad_() for part in trained]
    texts, maps = parts[:depth], parts[depth:]
    scale = model.logit_scale.exp().detach()

    def plain_logits(images):
        visual = [p @ maps[2 * j].T + maps[2 * j + 1] for j, p in enumerate(texts)]
        u = F.normalize(plain_image_tower(model, images, visual), dim=-1)
        embeddings, closing = plain_captions(model, hosts, texts[0])
        w = F.normalize(plain_text_tower(model, embeddings, closing, texts[1:]), dim=-1)
        return scale * u @ w.T

    train_beside(method, parts, batches[:4], lambda x, y, _: F.cross_entropy(plain_logits(x), y))
    torch.testing.assert_close(trained, parts, rtol=1e-7, atol=1e-9)
    images = batches[8][0]
    classifier, expected = method.classifier(), plain_logits(images).detach()
    torch.testing.assert_close(classifier.logits(images), expected)
    torch.testing.assert_close(classifier.restrict([2]).logits(images), expected[:, [2]])


def test_deep_prompts_leave_the_model_as_it_was(hosts, batches):
    model = deep_model()
    method = MaPLe(model, context=CONTEXT, **hosts)
    assert len(method.couplings) == 2, "three quarters of the shallower tower's three blocks"
    inputs = ((clip.encode_images, batches[0][0]), (clip.encode_texts, hosts["tokenizer"](["ant"])))
    before = [encode(method.model, x) for encode, x in inputs]
    method.step(batches[0])
    assert all(torch.equal(encode(method.model, x), y) for (encode, x), y in zip(inputs, before, strict=True))


def test_image_prompts_are_gone_before_pooling(hosts, batches):
    method = MaPLe(deep_model(), context=CONTEXT, **hosts)
    seen = []
    method.model.visual.transformer.resblocks[3].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    method.model.visual.ln_post.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    method.step(batches[0])
    assert seen == [5 + CONTEXT, 5]


def test_deep_prompts_are_the_same_in_towers_that_put_the_sequence_first(hosts, batches):
    expected = MaPLe(deep_model(), context=CONTEXT, **hosts).step(batches[0]).loss
    model = deep_model()
    for tower in (model, model.visual):
        tower.transformer.batch_first = False
        for block in tower.transformer.resblocks:
            block.attn.batch_first = False
    torch.testing.assert_close(MaPLe(model, context=CONTEXT, **hosts).step(batches[0]).loss, expected)


def test_what_a_host_cannot_do_is_refused(clip_model, resnet_model, hosts):
    checkpointed = deep_model()
    checkpointed.set_grad_checkpointing(True)
    for host, model, arguments, message in (
        (MaPLe, resnet_model, {}, "need a ViT as image tower, .* got ModifiedResNet. CoOp, KgCoOp"),
        (MaPLe, clip_model, {"depth": 2}, r"depth must lie in \[1, 1\]"),
        (MaPLe, clip_model, {"position": "front"}, "position: the context of MaPLe"),
        (MaPLe, checkpointed, {}, "gradient checkpointing off"),
        (CoCoOp, clip_model, {"class_specific": True}, "class_specific"),
        (LoCoOp, clip_model, {"top_k": 0}, "top_k"),
        (LoCoOp, clip_model, {"weight": -1.0}, "weight"),
        (ProDA, clip_model, {"prompts": 6, "prompt_batch": 4}, "prompts must be a multiple of prompt_batch"),
        (ProDA, clip_model, {"prompts": 2, "prompt_batch": 1}, "at least 2"),
        (ProDA, clip_model, {"context": "a photo"}, "context is 'a photo'; expected an integer"),
        (ProDA, clip_model, {"weight": float("nan")}, "weight"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            host(model, **{"context": 2, **arguments}, **hosts)


def deep_model():
    """The tiny CLIP with towers of three and four blocks."""
    torch.manual_seed(0)
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 4}
    text = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 3}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).double()


# Embedded texts


def towers():
    """Text towers of open_clip: `CLIP`, the same in `CustomTextCLIP`, and without a causal mask, pooled at the last."""
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
    text = {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 2}
    free = {**text, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    padded = {**text, "no_causal_mask": True, "pool_type": "eos", "eos_id": 29}
    yield "CLIP", open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    yield "custom", open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
    yield "last", open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=free)
    masked = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg=padded)
    masked.text.use_pad_mask = True
    yield "padding", masked
    yield "class token", open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=vision, text_cfg={**text, "embed_cls": True})


def test_embedded_tokens_are_encoded_as_the_tokens_in_every_layout(prompts):
    tokens = prompts["tokenizer"](["ant", "a bee", "the cow here"])
    for name, model in towers():
        model = model.double()
        embeddings = clip.token_embedding(model)(tokens)
        for normalize in (True, False):
            expected = clip.encode_texts(model, tokens, normalize=normalize)
            found = clip.encode_embedded_texts(model, embeddings, tokens, normalize=normalize)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(clip.encode_texts(model, tokens), clip.encode_texts(model, tokens.clone()))
        other = embeddings.clone()
        other[0, 1, 0] += 1.0
        moved = (clip.encode_embedded_texts(model, other, tokens) - clip.encode_texts(model, tokens)).norm(dim=1)
        assert moved[0] > 1e-3 and moved[1:].max() < 1e-12, name


def test_texts_are_encoded_to_their_ends_as_by_the_whole_tower(prompts):
    tokens = prompts["tokenizer"](["ant", "a bee", "bee"])
    for name, model in towers():
        model = model.double()
        lengths = []
        model_blocks = clip.text_tower(model).transformer.resblocks
        model_blocks[0].register_forward_hook(lambda _m, _i, out, seen=lengths: seen.append(out.shape[1]))
        whole = model.encode_text(tokens)
        for given in (tokens, clip.trim_padding(model, tokens), clip.trim_padding(model, tokens, multiple=4)):
            found = clip.encode_texts(model, given, normalize=False)
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12, msg=name)
        early = name in ("CLIP", "custom")
        ends = int(tokens.argmax(-1).max()) + 1
        assert ends == 6 and len(tokens[0]) == 15
        assert lengths[1:] == ([6, 6, 8] if early else [lengths[0]] * 3), name
        assert clip.trim_padding(model, tokens).shape == ((3, 6) if early else (3, 15)), name
        found, whole = (
            torch.autograd.grad(features.square().sum(), clip.token_embedding(model).weight)[0]
            for features in (clip.encode_texts(model, tokens, normalize=False), model.encode_text(tokens))
        )
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12, msg=name)


def test_what_cannot_be_looked_at_is_not_trimmed(clip_model, prompts):
    tokens = prompts["tokenizer"](["ant", "a bee"])
    assert clip.trim_padding(clip_model, tokens.to("meta")).shape == tokens.shape
    assert clip.encode_texts(clip_model.to("meta"), tokens.to("meta")).shape == (2, 8)


def test_texts_of_several_lengths_may_be_encoded_by_several_threads(clip_model, prompts):
    texts = [["ant"], ["the cow here"], ["a bee"], ["ant the cow here"]] * 8
    tokens = [prompts["tokenizer"](some) for some in texts]
    alone = [clip.encode_texts(clip_model, some).detach() for some in tokens]
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda some: clip.encode_texts(clip_model, some).detach(), tokens))
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)


def test_the_gradient_of_embedded_texts_is_that_of_the_written_out_tower(clip_model, prompts):
    tokens = prompts["tokenizer"](["ant", "the cow here"])
    embeddings = clip_model.token_embedding(tokens).detach().requires_grad_()
    found = clip.encode_embedded_texts(clip_model, embeddings, tokens, normalize=False)
    expected = plain_text_tower(clip_model, embeddings, tokens.argmax(-1))
    torch.testing.assert_close(found, expected)
    for value in (found, expected):
        value.square().sum().backward(retain_graph=True)
    first, second = (torch.autograd.grad(value.square().sum(), embeddings)[0] for value in (found, expected))
    torch.testing.assert_close(first, second)


def test_what_is_after_the_pooled_token_is_not_computed(clip_model, prompts):
    tokens = prompts["tokenizer"](["ant", "bee"])
    seen = []
    clip_model.transformer.resblocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    clip.encode_embedded_texts(clip_model, clip_model.token_embedding(tokens), tokens)
    assert seen == [4]


def test_other_text_towers_and_shapes_are_refused(clip_model, prompts):
    tokens = prompts["tokenizer"](["ant"])
    with pytest.raises(ValueError, match=r"embeddings: expected \(M, L, 8\).*got \(1, 15, 7\)"):
        clip.encode_embedded_texts(clip_model, torch.zeros(1, 15, 7), tokens)
    clip_model.text = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="text tower of this CLIP, a Linear, has no table of token embeddings"):
        clip.token_embedding(clip_model)
