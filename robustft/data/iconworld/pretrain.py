"""Pre-train IconWorld's small CLIP on drawings with their words, from a seed, on one thread.

A batch has N images u (N, D), M different captions v (M, D), one prompt for each of K kinds w (K, D), the scale s. The
captions are those of the images and `FURTHER` names of other emoji, from which every image is to be told as well. P is
which caption is true of which image: one that says the image's name, or no more than its kind. k(i) is the kind of an
image of which one is known, e(j) the teacher's embedding of what caption j says.

    L_images   = mean_i mean_{j in P(i)} -log softmax_j(s u_i . v_j)       over captions
    L_captions = mean_j mean_{i in P(j)} -log softmax_i(s u_i . v_j)       over images, of captions that are true of one
    L_kinds    = mean_i -log softmax_k(s u_i . w_k)[k(i)]
    L_teacher  = mean_j 1 - v_j . e(j)
    L          = (L_images + L_captions) / 2 + L_kinds / 2 + t L_teacher,  t = max(.1, 1 - step / 2000)

The teacher is a sentence model: it tells the text tower that an eagle is a bird before any image does. The first
`WORDS_FIRST` steps minimise L_teacher alone, without images. Images are drawings as they are at first, and over `RAMP`
steps more and more changed; and so the share of the patches that are dropped rises. This makes steps shorter and keeps
drawings from being learnt by heart (Li et al., 2023). In the last `COOL_DOWN` of the run, in which the rate falls, none
is dropped. What is written is the mean of the iterates with exponentially falling weights.

Every random number of step n comes from (seed, n), and until the rate falls nothing depends on the run's length: a
killed run resumes bit for bit, and a longer or shorter one may go on from its state.

    python -m robustft.data.iconworld.pretrain --corpus CORPUS --output model.safetensors --pairs 4000000
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from robustft import clip
from robustft.data import small_clip
from robustft.data.iconworld import corpus, world
from robustft.data.iconworld.corpus import Words
from robustft.data.iconworld.model import CONFIG, load_clip
from robustft.data.iconworld.packages import SEEN, STUDIOS
from robustft.data.iconworld.taxonomy import SUBGROUPS, TEMPLATES
from robustft.data.images import normalized
from robustft.files import write_text
from robustft.machine import processor

PAIRS = 4_000_000
BATCH = 256
EMOJI = 0.45  # of a batch; the rest are icons
FURTHER = 128  # captions
WORDS_FIRST = 300  # steps
LEARNING_RATE = 2e-3
WARM_UP = 50, 200  # steps, of words alone and of pairs
COOL_DOWN = 0.15  # of the run
WEIGHT_DECAY = 0.05
DROPPED = 0.4  # of the patches, unless told otherwise
RAMP = 2000  # steps of pairs until as many are dropped, and drawings differ as much as they ever do
AVERAGE = 0.999
EMBEDDING_STD = 0.1
TEXT_PARTS = 4
KINDS = tuple(dict.fromkeys(SUBGROUPS.values()))

CARD = """\
# The small CLIP of IconWorld

A toy: a CLIP with a ViT of {parameters} parameters that knows drawings of 40 x 40 pixels and the words of emoji. It
exists so that robust fine-tuning can be seen on a CPU on shifts that people drew. Its numbers say nothing about
full-size models.

| | |
|---|---|
| made by | `{command}` |
| took | {minutes} minutes of CPU time on one thread of {machine} |
| saw | {pairs} image-caption pairs from seed {seed}: each emoji {passes:.1f} times, each icon {icon_passes:.1f} times |
| file | {bytes} bytes, fp16, SHA-256 `{sha256}` |

## Data

{emoji} drawings of emoji by {studios}; {icons} icons of {sets} free sets, whose licences are {licences}. Captions say
the name, the keywords or the kind that Unicode gives an emoji, or the words of an icon's name. Drawings were turned,
moved, mirrored and painted in other colours. `robustft.data.iconworld.corpus` makes the corpus; no drawing of it is in
this file.

Of the bundled benchmark it has seen the studios {seen}, drawings of tested concepts too. It has **not** seen {unseen},
so neither of the ID studios. Of the benchmark's unknowns the icons hold 85 of 130 letters and 52 of 200 symbols, with
their names, no flag and no emoji of a held-out kind by an ID studio (`python -m robustft.data.iconworld.corpus
--packages packages --unknowns`). It has seen other sets of the hands that drew fluent-emoji and streamline-emojis. Two
of the studios it has seen, openmoji and emojione-v1, are under CC BY-SA. Its text tower began from embeddings of
all-MiniLM-L6-v2 (Apache-2.0), which are no part of it.

## Training

AdamW, batches of {batch}, rate {rate} with {warm_up} steps of warm-up, weight decay {decay}; up to {dropped:.0%} of
the patches dropped, and drawings changed as much as they ever are, after {ramp} steps of pairs, of which this run had
{steps} before the rate fell; the mean of the iterates with weights that fall by {average} a step. {fallen}

## Zero-shot accuracy, %

`python -m robustft.data.iconworld.pretrain --measure {name}`: prompts are `iconworld.TEMPLATES`; kinds are the 46
classes on their test concepts, concepts the 400 classes of `iconworld.concepts`, by studio. Chance is 2.2 and 0.25.

| studio | seen | kinds | concepts |
|---|---|---:|---:|
{accuracy}
"""


class Progress(NamedTuple):
    """How far pre-training has come: pairs seen and to be seen, seconds of CPU time, the last step's losses."""

    seen: int
    pairs: int
    seconds: float
    contrastive: float
    kinds: float
    teacher: float


class Said(NamedTuple):
    """A caption, and what it says: a name ("" for none), a kind, keywords."""

    text: str
    name: str
    kind: str
    tags: tuple[str, ...] = ()


class Drawings(NamedTuple):
    """The corpus in memory: parts of emoji and of icons, and where each drawing lies as (part, row)."""

    parts: tuple[corpus.Part, ...]
    emoji: tuple[tuple[int, int], ...]
    icons: tuple[tuple[int, int], ...]
    texts: dict[str, int]
    embeddings: Tensor


def read(folder: Path) -> Drawings:
    """A corpus that `corpus.build` and `corpus.embed` wrote. FileNotFoundError where it holds no emoji."""
    parts = tuple(corpus.parts(folder))
    places = [
        [(i, row) for i, part in enumerate(parts) if part.name.startswith(kind) for row in range(len(part.words))]
        for kind in ("emoji-", "icons-")
    ]
    if not all(places):
        raise FileNotFoundError(f"{folder}: no corpus; python -m robustft.data.iconworld.corpus makes one")
    texts, embeddings = corpus.read_embeddings(folder)
    return Drawings(parts, tuple(places[0]), tuple(places[1]), {t: i for i, t in enumerate(texts)}, embeddings)


def caption(words: Words, rng: np.random.Generator) -> Said:
    """One of the captions of a drawing."""
    template, which = TEMPLATES[rng.integers(len(TEMPLATES))], rng.random()
    if not words.kind or which < 0.35:
        return Said(template.format(words.name), words.name, "")
    if which < 0.6:
        return Said(f"{template.format(words.name)}, {words.kind}", words.name, words.kind)
    if which < 0.75 or not words.tags:
        return Said(template.format(words.kind), "", words.kind)
    tags = tuple(words.tags[i] for i in rng.permutation(len(words.tags))[:2])
    return Said(f"{template.format(words.name)}, {', '.join(tags)}", words.name, "", tags)


def true_of(images: Sequence[Words], captions: Sequence[Said]) -> Tensor:
    """P (N, M), bool: whether the caption says the image's name, or no more than its kind."""
    number: dict[str, int] = {"": -1}

    def numbers(texts: Sequence[str]) -> Tensor:
        return torch.tensor([number.setdefault(text, len(number)) for text in texts])

    names, kinds = numbers([i.name for i in images]), numbers([i.kind for i in images])
    said_names, said_kinds = numbers([c.name for c in captions]), numbers([c.kind for c in captions])
    by_name = names[:, None] == said_names
    return torch.where(said_names >= 0, by_name, (kinds[:, None] == said_kinds) & (said_kinds >= 0))


def losses(image: Tensor, text: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """(L_images + L_captions) / 2; each row of `true` (N, M) holds at least one True."""
    logits, weight = scale * image @ text.T, true.to(image.dtype)
    images = -(F.log_softmax(logits, 1) * weight).sum(1) / weight.sum(1)
    of_captions = weight.sum(0)
    captions = -(F.log_softmax(logits, 0) * weight).sum(0) / of_captions.clamp(min=1)
    return (images.mean() + captions.sum() / of_captions.count_nonzero()) / 2


def painted(images: Sequence[Tensor], size: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Drawings, (S, S, 4) in colour or (S, S) opacity, as images (N, 3, size, size) in [0, 1] that differ each time.

    Mirrored; turned, moved, scaled; on white or a coloured ground; icons in black or a colour, or light on dark; emoji
    in other colours, grey, as silhouettes, or as lines. All but the first the less, or the seldomer, the lower
    `strength` in [0, 1] is.
    """

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def seldom(share: float) -> Tensor:
        return (random(n) < share * strength).view(n, 1, 1, 1)

    n = len(images)
    mono = torch.tensor([image.ndim == 2 for image in images])
    drawn = torch.stack([image[..., None].expand(-1, -1, 4) if image.ndim == 2 else image for image in images])
    drawn = drawn.permute(0, 3, 1, 2).float() / 255
    opacity = drawn[:, 3:]
    angle = (random(n) - 0.5) * 0.6 * strength
    zoom, stretch = 1 + (0.4 * random(n) - 0.1) * strength, 1 + (0.16 * random(n) - 0.08) * strength
    mirrored = torch.where(random(n) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    moved = (random(n, 2) - 0.5) * 0.3 * strength
    turn = torch.stack([cos * stretch * mirrored, -sin, moved[:, 0], sin * mirrored, cos / stretch, moved[:, 1]], 1)
    grid = F.affine_grid(turn.view(n, 2, 3), [n, 4, size, size], align_corners=False)
    premultiplied = torch.cat([drawn[:, :3] * opacity, opacity], 1)
    premultiplied = F.grid_sample(premultiplied, grid, padding_mode="zeros", align_corners=False)
    colour, opacity = premultiplied[:, :3], premultiplied[:, 3:]

    # Emoji: other colours, grey, lines.
    gain = 0.6 + 0.8 * random(n, 3, 1, 1)
    changed = (colour * gain).clamp(max=1)
    colour = torch.where(seldom(0.5), changed.minimum(opacity), colour)
    grey = colour.mean(1, keepdim=True).expand_as(colour)
    colour = torch.where(seldom(0.12), grey, colour)
    over_white = (colour + 1 - opacity).mean(1, keepdim=True)
    across = (over_white[..., 1:] - over_white[..., :-1]).abs()
    down = (over_white[..., 1:, :] - over_white[..., :-1, :]).abs()
    edges = (4 * (F.pad(across, (0, 1)) + F.pad(down, (0, 0, 0, 1)))).clamp(max=1)

    ink = torch.where(seldom(0.5), 0.85 * random(n, 3, 1, 1), 0.25 * random(n, 1, 1, 1))
    icons = mono.view(n, 1, 1, 1)
    lines = ~icons & seldom(0.1)
    flat = icons | lines | seldom(0.05)
    mask = torch.where(lines, edges, opacity)
    colour, opacity = torch.where(flat, ink * mask, colour), torch.where(flat, mask, opacity)
    ground = torch.where(seldom(0.45), 0.5 + 0.5 * random(n, 3, 1, 1), torch.ones(1))
    image = colour + ground * (1 - opacity)
    return torch.where(flat & seldom(0.15), 1 - image, image)


class Batch(NamedTuple):
    """Drawings of a step with the words of each, a caption of each, and further captions."""

    images: list[Tensor]
    words: list[Words]
    captions: list[Said]
    further: list[Said]


def sampled(drawings: Drawings, seed: int, step: int) -> Batch:
    """The batch of a step, a function of seed and step."""
    rng = np.random.default_rng((seed, step))
    emoji = round(BATCH * EMOJI)
    chosen = [drawings.emoji[i] for i in rng.integers(len(drawings.emoji), size=emoji)]
    chosen += [drawings.icons[i] for i in rng.integers(len(drawings.icons), size=BATCH - emoji)]
    words = [drawings.parts[part].words[row] for part, row in chosen]
    captions = [caption(one, rng) for one in words]
    others = [drawings.emoji[i] for i in rng.integers(len(drawings.emoji), size=FURTHER)]
    names = [drawings.parts[part].words[row].name for part, row in others]
    further = [
        Said(TEMPLATES[i].format(name), name, "")
        for i, name in zip(rng.integers(len(TEMPLATES), size=FURTHER), names, strict=True)
    ]
    return Batch([drawings.parts[part].pixels[row] for part, row in chosen], words, captions, further)


def _encoded(model: Any, tokens: Tensor) -> Tensor:
    """Text features (M, D) of tokens (M, L), of texts of alike lengths at a time, none longer than it has to be."""
    order = tokens.argmax(1).argsort(stable=True)
    parts = [clip.encode_texts(model, clip.trim_padding(model, tokens[rows])) for rows in order.chunk(TEXT_PARTS)]
    return torch.cat(parts)[order.argsort()]


def _taught(drawings: Drawings, said: Sequence[Said]) -> Tensor:
    """The teacher's embeddings e (M, D): of all that a caption says, summed."""
    rows = [[drawings.texts[text] for text in (one.name, one.kind, *one.tags) if text] for one in said]
    return F.normalize(torch.stack([drawings.embeddings[row].sum(0) for row in rows]), dim=-1)


def stable_steps(steps: int) -> int:
    """How many steps of pairs do not depend on the run's length."""
    return math.floor(steps * (1 - COOL_DOWN))


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, of words alone where it is negative: it rises, stays, and falls in the end."""
    if step < 0:
        return LEARNING_RATE * min(1, (step + WORDS_FIRST + 1) / WARM_UP[0])
    falling = (steps - step) / max(1, steps - stable_steps(steps))
    return LEARNING_RATE * min(1, (step + 1) / WARM_UP[1], falling)


def _seed_of(seed: int, step: int) -> int:
    return (seed << 32) + WORDS_FIRST + step


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    vocabulary: small_clip.Vocabulary,
    drawings: Drawings,
    seed: int,
    step: int,
    steps: int,
    dropped: float,
) -> tuple[float, float, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate(step, steps)
    batch = sampled(drawings, seed, WORDS_FIRST + step)
    template = TEMPLATES[step % len(TEMPLATES)]
    said = list(dict.fromkeys([*batch.captions, *batch.further]))
    kinds = [Said(template.format(kind), "", kind) for kind in KINDS]
    text = _encoded(model, vocabulary([one.text for one in said + kinds]))
    teacher = (1 - (text * _taught(drawings, said + kinds)).sum(1)).mean()
    if step < 0:
        contrastive = of_kinds = torch.zeros(())
        loss = teacher
    else:
        generator = torch.Generator().manual_seed(_seed_of(seed, step))
        preprocess = CONFIG["preprocess_cfg"]
        strength = min(1.0, step / RAMP)
        pixels = painted(batch.images, preprocess["size"][0], generator, strength)
        pixels = (pixels - preprocess["mean"][0]) / preprocess["std"][0]
        torch.manual_seed(_seed_of(seed, step))  # of the patches that are dropped
        model.visual.patch_dropout.prob = dropped * strength if step < stable_steps(steps) else 0.0
        image = F.normalize(model.encode_image(pixels), dim=-1)
        scale = model.logit_scale.exp()
        contrastive = losses(image, text[: len(said)], true_of(batch.words, said), scale)
        rows, labels = torch.tensor([(i, KINDS.index(w.kind)) for i, w in enumerate(batch.words) if w.kind]).T
        of_kinds = F.cross_entropy(scale * image[rows] @ text[len(said) :].T, labels)
        loss = contrastive + of_kinds / 2 + max(0.1, 1 - step / 2000) * teacher
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return contrastive.item(), of_kinds.item(), teacher.item()


def vocabulary_of(drawings: Drawings) -> small_clip.Vocabulary:
    """All tokens that captions of a corpus can have."""
    words = [template.replace("{}", " ") for template in TEMPLATES]
    return small_clip.Vocabulary([*words, *drawings.texts, *(f"a {kind}, {kind}" for kind in KINDS)], CONFIG)


def pretrain(
    folder: Path,
    output: str | Path,
    *,
    seed: int = 0,
    pairs: int = PAIRS,
    dropped: float = DROPPED,
    progress: Callable[[Progress], None] | None = None,
    save_every: int = 50_000,
) -> Path:
    """Pre-train on `pairs` pairs of the corpus in `folder`, in whole batches, and write the model to `output`.

    `dropped` is the share of patches that training leaves out. Every `save_every` pairs the model so far is written to
    `output` and the state of the run to `output` + ".state"; a call with the same seed and share goes on from there,
    with another number of pairs as long as the rate has fallen in neither. `progress` is called after every step. One
    thread. Raises ValueError when `pairs` is under one batch, `dropped` is none of [0, 1) or the state is of another
    run, FileNotFoundError where there is no corpus.
    """
    output = Path(output)
    state_path = output.with_name(output.name + ".state")
    steps = pairs // BATCH
    if steps < 1:
        raise ValueError(f"pairs: expected at least one batch of {BATCH}, got {pairs}")
    if not 0.0 <= dropped < 1.0:
        raise ValueError(f"dropped is a share of the patches and must lie in [0, 1), got {dropped}")
    drawings = read(folder)
    vocabulary, threads = vocabulary_of(drawings), torch.get_num_threads()
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"]["patch_dropout"] = DROPPED  # the layer: each step sets its share
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_clip.build(config, len(vocabulary.rows)).train()
        nn.init.normal_(model.token_embedding.weight, std=EMBEDDING_STD)
        optimizer = small_clip.optimizer(model, LEARNING_RATE, WEIGHT_DECAY)
        first, seconds = -WORDS_FIRST, 0.0
        average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        state = small_clip.read_state(state_path)
        if state is not None:
            first, total = state["step"], state["pairs"] // BATCH
            same = (state["seed"], state["dropped"]) == (seed, dropped)
            if not same or total != steps and first > min(stable_steps(total), stable_steps(steps)):
                raise ValueError(
                    f"{state_path} is of a run with seed {state['seed']}, {state['pairs']} pairs and "
                    f"{state['dropped']} dropped, at {first * BATCH}; it cannot go on with seed {seed}, {pairs} pairs "
                    f"and {dropped} dropped: remove it, or choose another output"
                )
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average, seconds = state["average"], state["seconds"]
        start = time.process_time() - seconds
        torch.set_num_threads(1)
        try:
            for step in range(first, steps):
                shown = _step(model, optimizer, vocabulary, drawings, seed, step, steps, dropped)
                keep = min(AVERAGE, (1 + max(0, step)) / (10 + max(0, step)))
                for name, value in model.state_dict().items():
                    average[name].lerp_(value, 1 - keep)
                seen, seconds = max(0, step + 1) * BATCH, time.process_time() - start
                if step + 1 == steps or step >= 0 and (step + 1) % max(1, save_every // BATCH) == 0:
                    small_clip.save(output, CONFIG, average, vocabulary.rows, {"seed": seed, "seen": seen})
                    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
                    about = {"seed": seed, "pairs": pairs, "dropped": dropped, "step": step + 1, "seconds": seconds}
                    small_clip.write_state(state_path, held | about)
                if progress is not None:
                    progress(Progress(seen, steps * BATCH, seconds, *shown))
        finally:
            torch.set_num_threads(threads)
    state_path.unlink()
    return output


class Accuracy(NamedTuple):
    """Zero-shot accuracy in % on a studio's drawings: of test concepts among kinds, and among concepts (None where it
    draws too few)."""

    kinds: float
    concepts: float | None


@torch.no_grad()
def zero_shot(path: str | Path | None = None) -> dict[str, Accuracy]:
    """Zero-shot accuracy of `load_clip(path)` on the drawings of each studio."""
    bundle, bundled = load_clip(path), world.drawings()
    preprocess = bundle.config["preprocess_cfg"]

    def right(shown: Sequence[tuple[int, str]], classes: Sequence[str]) -> float:
        head = clip.class_embeddings(bundle.model, bundle.tokenizer, classes, TEMPLATES)
        images = normalized(bundled.images([row for row, _ in shown]), preprocess["mean"], preprocess["std"])
        labels = torch.tensor([classes.index(name) for _, name in shown])
        return 100 * ((clip.encode_images(bundle.model, images) @ head.T).argmax(1) == labels).double().mean().item()

    found = {}
    for studio in STUDIOS:
        drawn = bundled.rows_of(studio)
        kinds = [(row, bundled.rows[row].kind) for name, row in drawn.items() if bundled.splits[name] == "test"]
        concepts = [(drawn[name], name) for name in bundled.concepts if name in drawn]
        of_concepts = right(concepts, bundled.concepts) if studio in world.CONCEPT_STUDIOS else None
        found[studio] = Accuracy(right(kinds, world.CLASS_NAMES), of_concepts)
    return found


def model_card(folder: Path, path: Path, *, seed: int, pairs: int, dropped: float, seconds: float) -> str:
    """The model card, in Markdown, of a checkpoint that `pretrain` wrote to `path` from the corpus in `folder`."""
    rows = []
    for studio, accuracy in zero_shot(path).items():
        concepts = "" if accuracy.concepts is None else f"{accuracy.concepts:.1f}"
        rows.append(f"| {studio} | {'yes' if studio in SEEN else 'no'} | {accuracy.kinds:.1f} | {concepts} |")
    sizes = {part.name: len(part.words) for part in corpus.parts(folder)}
    emoji = sum(count for name, count in sizes.items() if name.startswith("emoji-"))
    icons = sum(sizes.values()) - emoji
    with safe_open(path, "pt") as file:
        seen = json.loads(file.metadata()["robustft"])["seen"]
    model: Any = load_clip(path).model
    fallen = seen > stable_steps(pairs // BATCH) * BATCH
    return CARD.format(
        parameters=f"{sum(p.numel() for p in model.visual.parameters()) / 1e6:.2f} million",
        command=f"python -m robustft.data.iconworld.pretrain --corpus {folder.name} --output {path.name} "
        f"--seed {seed} --pairs {pairs} --dropped {dropped}",
        minutes=f"{seconds / 60:.0f}",
        machine=processor(),
        pairs=f"{seen:,}",
        seed=seed,
        passes=seen * EMOJI / emoji,
        icon_passes=seen * (1 - EMOJI) / icons,
        bytes=f"{path.stat().st_size:,}",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        emoji=f"{emoji:,}",
        icons=f"{icons:,}",
        sets=sum(name.startswith("icons-") for name in sizes),
        studios=", ".join(SEEN),
        licences=", ".join(corpus.FREE),
        seen=", ".join(name for name in STUDIOS if name in SEEN),
        unseen=", ".join(name for name in STUDIOS if name not in SEEN),
        batch=BATCH,
        rate=LEARNING_RATE,
        warm_up=WARM_UP[1],
        decay=WEIGHT_DECAY,
        average=AVERAGE,
        dropped=dropped,
        ramp=RAMP,
        steps=stable_steps(pairs // BATCH),
        fallen=f"The rate fell in the last {COOL_DOWN:.0%} of the run, without dropping patches."
        if fallen
        else "The rate had not begun to fall: the run was not finished.",
        name=path.name,
        accuracy="\n".join(rows),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m robustft.data.iconworld.pretrain",
        description="Pre-train IconWorld's small CLIP on its corpus. A killed run goes on where it was.",
    )
    parser.add_argument("--corpus", type=Path, help="folder that robustft.data.iconworld.corpus wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="safetensors file to write, and beside it a .md card")
    what.add_argument("--card", type=Path, metavar="FILE", help="write the card of a model of an unfinished run")
    what.add_argument("--measure", type=Path, metavar="FILE", help="print a model's zero-shot accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="image-caption pairs to see (%(default)s)")
    parser.add_argument(
        "--dropped", type=float, default=DROPPED, help="share of patches that training leaves out (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.measure is not None:
        for studio, accuracy in zero_shot(options.measure).items():
            concepts = "" if accuracy.concepts is None else f", concepts {accuracy.concepts:.1f} %"
            print(f"{studio}: kinds {accuracy.kinds:.1f} %{concepts}")
        return
    if options.corpus is None:
        parser.error("--corpus is needed")
    if options.card is not None:
        state = small_clip.read_state(options.card.with_name(options.card.name + ".state"))
        if state is None:
            parser.error(f"{options.card}: no state of an unfinished run lies beside it")
        told = {name: state[name] for name in ("seed", "pairs", "dropped", "seconds")}
        write_text(options.card.with_suffix(".md"), model_card(options.corpus, options.card, **told))
        return
    sums: list[Progress] = []
    seconds = 0.0

    def show(now: Progress) -> None:
        nonlocal seconds
        seconds = now.seconds
        sums.append(now)
        if len(sums) == 50 or now.seen == now.pairs:
            contrastive, kinds, teacher = (
                sum(getattr(one, name) for one in sums) / len(sums) for name in ("contrastive", "kinds", "teacher")
            )
            print(
                f"{now.seen} of {now.pairs} pairs, {now.seconds:.0f} s of CPU time, contrastive loss "
                f"{contrastive:.3f}, kinds {kinds:.3f}, teacher {teacher:.3f}",
                flush=True,
            )
            sums.clear()

    asked = {"seed": options.seed, "pairs": options.pairs, "dropped": options.dropped}
    path = pretrain(options.corpus, options.output, progress=show, **asked)
    write_text(path.with_suffix(".md"), model_card(options.corpus, path, seconds=seconds, **asked))


if __name__ == "__main__":
    main()
