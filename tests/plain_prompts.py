"""Prompt learning written out in plain PyTorch, one block, class and sample after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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


def plain_image_tower(model, images, prompts):
    """CLIP's ViT with tokens prompts[j] (n, width) appended before block j, those of the block before taken away."""
    visual = model.visual
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    length = x.shape[1]
    x = visual.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1))
    for layer, block in enumerate(visual.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[:, :length], prompts[layer].expand(len(x), -1, -1)], 1)
        h = block.ln_1(x)
        x = x + block.attn(h, h, h, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]) @ visual.proj


def plain_captions(model, prompts, context, position="end", rest=""):
    """Embeddings (K, L, width) of the captions around a context (n, width) or (K, n, width), and where they end."""
    rows, closing = [], []
    for c, name in enumerate(prompts["class_names"]):
        tokens = prompts["tokenizer"]([name + rest])[0]
        words, end = model.token_embedding(tokens[: len(name)]), model.token_embedding(tokens[len(name) :])
        v = context if context.ndim == 2 else context[c]
        half = {"end": len(v), "middle": len(v) // 2, "front": 0}[position]
        row = torch.cat([v[:half], words, v[half:], end])
        rows.append(row[: len(tokens)])
        closing.append(len(v) + len(name + rest))
    return torch.stack(rows), torch.tensor(closing)


def plain_head(model, prompts, context, position="end", rest=""):
    embeddings, closing = plain_captions(model, prompts, context, position, rest)
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
