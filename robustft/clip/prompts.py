"""Prompts: templates, class names, concept descriptions, and the table that draws captions from them.

A *caption* is `template(class name)`. A batch of N labels uses few distinct captions (at most K T for K
classes and T templates), and a text tower without dropout maps equal captions to equal features, so

    v_i = encode(caption_i) = encode(unique captions)[index_i]

holds exactly: `PromptTable.sample` returns the distinct captions of a batch and the index that spreads their
features, values and gradients alike, over the batch. Captions are tokenised once, when the table is built.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from robustft.clip.library import import_open_clip

Template = str | Callable[[str], str]
Tokenizer = Callable[[list[str]], Tensor]

SIMPLE_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)

if TYPE_CHECKING:
    IMAGENET_TEMPLATES: tuple[str, ...]
    SIMPLE_IMAGENET_TEMPLATES: tuple[str, ...]


def __getattr__(name: str) -> tuple[str, ...]:
    """The 80 and 7 templates of CLIP's authors, as `{}` strings, read from open_clip when first asked for."""
    source = {
        "IMAGENET_TEMPLATES": "OPENAI_IMAGENET_TEMPLATES",
        "SIMPLE_IMAGENET_TEMPLATES": "SIMPLE_IMAGENET_TEMPLATES",
    }.get(name)
    if source is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    templates = tuple(template("{}") for template in getattr(import_open_clip(), source))
    globals()[name] = templates
    return templates


def format_template(template: Template, class_name: str) -> str:
    """The caption of one class: `{}` or `{c}` in a string becomes the name, a callable is called with it.

    Other braces in the template or the name are left alone. Raises ValueError when the string has neither
    placeholder (every class would get the same caption), TypeError when the result is not a string.
    """
    if isinstance(template, str):
        if "{}" not in template and "{c}" not in template:
            raise ValueError(f"templates: {template!r} has no '{{}}' or '{{c}}' for the class name")
        return template.replace("{c}", "{}").replace("{}", class_name)
    if not callable(template):
        raise TypeError(f"templates: expected strings or callables, got {template!r}")
    caption = template(class_name)
    if not isinstance(caption, str):
        raise TypeError(f"templates: {template!r} returned {caption!r} for {class_name!r}, expected a string")
    return caption


def captions(class_names: Sequence[str], templates: Sequence[Template]) -> tuple[tuple[str, ...], ...]:
    """K tuples of T captions, one for each class and template.

    Duplicate class names are allowed (some label sets have them). Raises ValueError when either list is empty
    or a name is blank, TypeError when either is a bare string.
    """
    _check_strings("class_names", class_names)
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise TypeError(f"templates: expected a sequence of templates, got {templates!r}")
    if not templates:
        raise ValueError("templates: expected at least one template, got none")
    return tuple(tuple(format_template(template, name) for template in templates) for name in class_names)


class SampledCaptions(NamedTuple):
    tokens: Tensor  # (U, L) the batch's distinct captions
    inverse: Tensor  # (N,) caption of each image: features[inverse] are the N text features


class PromptTable:
    """Captions of K classes, tokenised once to length L, to look up or draw from by label.

    `captions` (P, L) holds the distinct captions, `rows` (K, T) the caption of each class and template,
    `counts` (K,) how many templates a class has. Memory: P L + K T integers; 80 templates of 1000 classes
    take 50 MB at L = 77.
    """

    def __init__(self, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[Template]) -> None:
        self._fill(tokenizer, captions(class_names, templates))

    @classmethod
    def from_captions(cls, tokenizer: Tokenizer, captions: Sequence[Sequence[str]]) -> PromptTable:
        """A table from ready captions, one sequence a class; classes may have different numbers of them."""
        table = cls.__new__(cls)
        table._fill(tokenizer, captions)
        return table

    def _fill(self, tokenizer: Tokenizer, captions: Sequence[Sequence[str]]) -> None:
        check_captions(captions)
        distinct = list(dict.fromkeys(text for texts in captions for text in texts))
        row = {text: number for number, text in enumerate(distinct)}
        counts = [len(texts) for texts in captions]
        most = max(counts)
        # A class with fewer captions repeats its last; `counts` keeps the repeats from being drawn.
        padded = [[*texts, *[texts[-1]] * (most - len(texts))] for texts in captions]
        self.captions = tokenizer(distinct)
        self.rows = torch.tensor([[row[text] for text in texts] for texts in padded])
        self.counts = torch.tensor(counts)

    def __repr__(self) -> str:
        classes, templates = self.rows.shape
        return f"PromptTable({classes} classes, {templates} templates, {len(self.captions)} captions)"

    def to(self, device: torch.device | str) -> PromptTable:
        """Moves the table; look-ups then return tensors on `device`."""
        self.captions, self.rows = self.captions.to(device), self.rows.to(device)
        self.counts = self.counts.to(device)
        return self

    def tokens(self, labels: Tensor, template_indices: Tensor | int) -> Tensor:
        """Tokens (N, L) of each label's caption; `template_indices` (N,) or an integer for all."""
        return self.captions[self._captions_of(labels, template_indices)]

    def unique(self, labels: Tensor, template_indices: Tensor | int) -> SampledCaptions:
        """The distinct captions of a batch, with `tokens[index]` equal to `self.tokens(...)`."""
        return self._distinct(self._captions_of(labels, template_indices))

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> SampledCaptions:
        """Draws a template for each label, uniformly, and returns the batch's distinct captions.

        labels: (N,) integers in [0, K). generator: the source of randomness; one on the CPU draws the same
        templates whatever device the table is on. Raises ValueError for labels out of range.
        """
        device = generator.device if generator is not None else "cpu"
        # float64, so that a draw just below 1 cannot round up to the count.
        draw = torch.rand(labels.shape, dtype=torch.float64, device=device, generator=generator)
        labels = self._checked(labels)
        return self._distinct(self.rows[labels, (draw.to(labels.device) * self.counts[labels]).long()])

    def _distinct(self, rows: Tensor) -> SampledCaptions:
        distinct, index = rows.unique(return_inverse=True)
        return SampledCaptions(self.captions[distinct], index)

    def _captions_of(self, labels: Tensor, template_indices: Tensor | int) -> Tensor:
        labels = self._checked(labels)
        template_indices = torch.as_tensor(template_indices, device=labels.device)
        counts = self.counts[labels]
        if ((template_indices < 0) | (template_indices >= counts)).any():
            raise ValueError(
                f"template_indices: expected values in [0, {int(counts.max())}), got "
                f"{int(template_indices.min())} to {int(template_indices.max())}"
            )
        return self.rows[labels, template_indices]

    def _checked(self, labels: Tensor) -> Tensor:
        if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point():
            raise ValueError(f"labels: expected (N,) integers, got {tuple(labels.shape)} {labels.dtype}")
        labels, classes = labels.to(self.rows.device, torch.long), len(self.rows)
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < classes):
            raise ValueError(
                f"labels: expected values in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
            )
        return labels


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Class names in label order: a text file, one a line, or JSON, a list of names or an object's keys."""
    names = _read(path)
    names = list(names) if isinstance(names, dict) else names
    _check_strings(str(path), names)
    return tuple(names)


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a text file, one a line, or a JSON list; each holds `{}` or `{c}`."""
    templates = _read(path)
    _check_strings(str(path), templates)
    for template in templates:
        format_template(template, "")
    return tuple(templates)


def read_descriptions(path: str | Path, class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """`match_descriptions` of a JSON file (or of a text file with one description a line, in label order)."""
    descriptions = _read(path)
    try:
        return match_descriptions(descriptions, class_names)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def match_descriptions(
    descriptions: Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str]],
    class_names: Sequence[str],
) -> tuple[tuple[str, ...], ...]:
    """Concept descriptions (DRM, arXiv 2411.19757) in label order: K tuples of one or more descriptions.

    A mapping {class name: description or [descriptions]} is matched by name: raises ValueError naming the
    classes without a description and the names that are no class. A sequence is matched by position and must
    have K entries.
    """
    _check_strings("class_names", class_names)
    if isinstance(descriptions, Mapping):
        classes = dict.fromkeys(class_names)
        missing = [name for name in classes if name not in descriptions]
        unknown = [name for name in descriptions if name not in classes]
        if missing or unknown:
            raise ValueError(
                "descriptions do not match class_names: "
                + "; ".join(
                    f"{what} {_few(names)}"
                    for what, names in (("no description of", missing), ("no class called", unknown))
                    if names
                )
            )
        descriptions = [descriptions[name] for name in class_names]
    elif isinstance(descriptions, str) or not isinstance(descriptions, Sequence):
        raise TypeError(f"descriptions: expected a mapping or a sequence, got {type(descriptions).__name__}")
    elif len(descriptions) != len(class_names):
        raise ValueError(
            f"descriptions: {len(descriptions)} entries cannot be matched by position to {len(class_names)} "
            "classes; give a mapping {class name: description}"
        )
    matched = [(entry,) if isinstance(entry, str) else entry for entry in descriptions]
    for name, entry in zip(class_names, matched, strict=True):
        _check_strings(f"descriptions of {name!r}", entry)
    return tuple(tuple(entry) for entry in matched)


def check_captions(captions: Sequence[Sequence[str]]) -> None:
    """Raises TypeError or ValueError unless `captions` is K >= 1 non-empty sequences of non-blank strings."""
    if isinstance(captions, str) or not isinstance(captions, Sequence):
        raise TypeError(f"captions: expected a sequence of sequences of strings, got {type(captions).__name__}")
    if not captions:
        raise ValueError("captions: expected at least one class, got none")
    for number, texts in enumerate(captions):
        _check_strings(f"captions of class {number}", texts)


def _check_strings(what: str, values: Any) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{what}: expected a sequence of strings, got {values!r:.80}")
    if not values:
        raise ValueError(f"{what}: expected at least one string, got none")
    for position, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{what}: entry {position} is {value!r:.80}, expected a string")
        if not value.strip():
            raise ValueError(f"{what}: entry {position} is blank")


def _few(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _read(path: str | Path) -> Any:
    """A JSON file's value, or any other file's lines without the blank ones at its end."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if Path(path).suffix.lower() != ".json":
        return [line.strip() for line in text.rstrip().splitlines()]

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of two equal keys: a class would lose its descriptions unseen.
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"{path}: duplicate keys {_few(twice)}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
