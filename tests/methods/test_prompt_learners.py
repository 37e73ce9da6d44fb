"""Prompt learners against plain float64 restatements of their papers, step by step."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F

from robustft import clip
from robustft.methods import CoOp, KgCoOp, zero_shot_classifier
from robustft.objective import Objective

CONTEXT = 3


def plain_text_tower(model, embeddings, closing, deep=()):
    """CLIP's text transformer from embeddings (M, L, width), written out; `deep` replaces tokens 0 .. n of layers."""
    x = embeddings + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        if layer and layer <= len(deep):
            prompt = deep[layer - 1]
            x = torch.cat([prompt.expand(len(x), -1, -1), x[:, len(prompt) :]], 1)
        h = block.ln_1(x)
        x = x + block.attn(h, h, h, attn_mask=model.attn_mask, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    return model.ln_final(x)[torch.arange(len(x)), closing] @ model.text_projection


def plain_captions(model, prompts, context, position="end"):
    """Embeddings (K, L, width) of the captions around a context (n, width) or (K, n, width), and where they end."""
    rows, closing = [], []
    for c, name in enumerate(prompts["class_names"]):
        tokens = prompts["tokenizer"]([name])[0]
        words, end = model.token_embedding(tokens[: len(name)]), model.token_embedding(tokens[len(name) :])
        v = context if context.ndim == 2 else context[c]
        half = {"end": len(v), "middle": len(v) // 2, "front": 0}[position]
        row = torch.cat([v[:half], words, v[half:], end])
        rows.append(row[: len(tokens)])
        closing.append(len(v) + len(name))
    return torch.stack(rows), torch.tensor(closing)


def plain_head(model, prompts, context, position="end"):
    embeddings, closing = plain_captions(model, prompts, context, position)
    return F.normalize(plain_text_tower(model, embeddings, closing), dim=-1)


def plain_objective(logits, labels, misalignment=0.0):
    """Cross-entropy plus lambda times the mean of logsumexp over the classes above the true one, minus its logit."""
    loss = F.cross_entropy(logits, labels)
    for z, y in zip(logits, labels, strict=True):
        above = z[z > z[y]]
        if misalignment and len(above):
            loss = loss + misalignment * (above.logsumexp(0) - z[y]) / len(logits)
    return loss


def train_beside(method, trained, batches, plain_loss, lr=0.05):
    """Steps of a method and of a restatement of it, compared at every one."""
    optimizers = [torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr)]
    optimizers.append(torch.optim.SGD(trained, lr=lr))
    for step, (images, labels) in enumerate(batches):
        out, loss = method.step((images, labels)), plain_loss(images, labels, step)
        torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
        for optimizer, value in zip(optimizers, (out.loss, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        method.after_step()


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


def test_the_initial_context_is_a_function_of_the_seed_with_standard_deviation_two_hundredths(clip_model, hosts):
    first, again, other = (CoOp(clip_model, context=9, seed=seed, **hosts).context for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    specific = CoOp(clip_model, context=9, class_specific=True, **hosts).context
    assert specific.shape == (3, 9, 8) and abs(specific.std().item() - 0.02) < 0.003


def test_chunks_of_classes_change_neither_loss_nor_gradient(clip_model, hosts, batches):
    whole, chunked = (CoOp(clip_model, context=CONTEXT, chunk_size=size, **hosts) for size in (None, 2))
    for method in (whole, chunked):
        method.step(batches[0]).loss.backward()
    torch.testing.assert_close(chunked.context.grad, whole.context.grad)


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
    assert set(method.state_dict()) == {"context", "steps"} and not method.model.training and method.training
    method.step(batches[0]).loss.backward()
    assert all(p.grad is None for p in method.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())
    with pytest.raises(ValueError, match="CoOp needs labels"):
        method.step((batches[0][0], ["a"] * 6))
    with pytest.raises(RuntimeError, match="context"):
        method.load_state_dict({"steps": torch.tensor(3)})


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
    with pytest.raises(ValueError, match="open_clip's own text tower, which this CLIP lacks"):
        clip.token_embedding(clip_model)
