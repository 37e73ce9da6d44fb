"""Prompts: templates, class names, concept descriptions, and the table that draws captions from them.

A *caption* is `template(class name)`. A batch of N labels uses few distinct captions (at most K T for K
classes and T templates), and a text tower without dropout maps equal captions to equal features, so

    v_i = encode(caption_i) = encode(unique captions)[index_i]

holds exactly: `PromptTable.sample` returns the distinct captions of a batch and the index that spreads their
features, values and gradients alike, over the batch. Captions are tokenised once, when the table is built.

Every text of this package goes through `tokenize`, which refuses what the tokenizer would cut.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustft.clip.library import import_open_clip
from robustft.data.classes import ClassNames
from robustft.files import read_json, read_text
from robustft.ops.arguments import INTEGERS
from robustft.ops.kinds import checked, described

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
    if not isinstance(class_name, str):
        raise TypeError(f"class_name: expected a string, got {class_name!r:.80}")
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


def captions(
    class_names: Sequence[str] | Mapping[str, str], templates: Sequence[Template]
) -> tuple[tuple[str, ...], ...]:
    """K tuples of T captions, one for each class and template.

    class_names: names in label order, or {folder: name} in label order. Duplicate names are allowed (some label sets
    have them); names that look like those of folders ("n01440764", "class_01") get a warning. Raises ValueError when
    either list is empty or a name is blank, TypeError when either is a bare string.
    """
    _, names = split_names(class_names)
    _check_strings("class_names", names)
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise TypeError(f"templates: expected a sequence of templates, got {templates!r}")
    if not templates:
        raise ValueError("templates: expected at least one template, got none")
    if wrong := [template for template in templates if not (isinstance(template, str) or callable(template))]:
        raise TypeError(f"templates: expected strings or callables, got {wrong[0]!r:.80}")
    if codes := [name for name in names if _CODE.fullmatch(name)]:
        # At this line, not the caller's, so that a method that builds several heads says it once.
        warnings.warn(
            f"class_names: {_few(codes, 3)} look like names of folders, which no text tower knows, and become "
            f"captions such as {format_template(templates[0], codes[0])!r}: give names in words, or "
            "class_names={folder: name}",
            stacklevel=1,
        )
    return tuple(tuple(format_template(template, name) for template in templates) for name in names)


# WordNet's synsets; class_01, label-3; 001.Black_footed_Albatross; 007. One digit may be the name of a digit.
_CODE = re.compile(
    r"n\d{8}|(class|cls|label|category|folder|dir|group|id)[ _-]?\d+|\d+\.[^\W\d].*|\d{2,}", re.IGNORECASE
)


def split_names(class_names: Sequence[str] | Mapping[str, str]) -> tuple[Sequence[str], Sequence[str]]:
    """What data sets call the classes, and what captions do: keys and values of {folder: name}, or a list for both.

    The keys remember the values, by which data sets may call the classes too.
    """
    if isinstance(class_names, Mapping):
        values = tuple(class_names.values())
        return (ClassNames.of(class_names) if all(isinstance(v, str) for v in values) else tuple(class_names)), values
    return class_names, class_names


class Truncating:
    """A tokenizer whose texts may be cut at the model's context: the way to say so where a tokenizer is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._whole = tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        return self._whole(texts)

    def __getattr__(self, name: str) -> Any:
        if name == "_whole":  # asked for by copy and pickle before it is there
            raise AttributeError(name)
        return getattr(self._whole, name)


@checked
def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], *, truncate: bool = False, names: Sequence[str] | None = None
) -> Tensor:
    """Tokens (M, L) of texts, of which none is cut.

    truncate: let the tokenizer cut texts that are longer than the context of L tokens; a `Truncating` tokenizer says
    the same. names: what the error calls each text, such as its class.

    How many tokens a text takes is known exactly of open_clip's tokenizers. Any other callable is asked, for a text
    whose row ends in no padding, for the text without its last letter and for its last word: it was cut if the first
    has the same row, or the tokens of the second are not the last of the row. One whose rows grow with the text cuts
    none, and one that fails when asked for other texts is not asked.

    Raises ValueError naming the texts that do not fit, their numbers of tokens and L; TypeError for a tokenizer that
    gives no integers (M, L).
    """
    tokens = tokenizer(list(texts))
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or len(tokens) != len(texts):
        got = f"{tuple(tokens.shape)} {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokenizer: expected integers (M, L) of {len(texts)} texts, as a tensor, got {got}")
    if truncate or isinstance(tokenizer, Truncating) or not len(tokens):
        return tokens
    if cut := _cut(tokenizer, texts, tokens):
        length = tokens.shape[1]
        told = [
            f"{'' if names is None else f'{names[i]!r}, '}{texts[i]!r:.80} "
            f"takes {f'more than {length}' if taken is None else taken}"
            for i, taken in cut[:3]
        ]
        raise ValueError(
            f"{len(cut)} of {len(texts)} texts do not fit the model's context of {length} tokens and would be cut: "
            f"{'; '.join(told)}{'; ...' if len(cut) > 3 else ''}. Shorten them, or allow it: truncate=True, or "
            "clip.prompts.Truncating(tokenizer) as the tokenizer"
        )
    return tokens


@checked
def tokenize_classes(
    tokenizer: Tokenizer,
    captions: Sequence[Sequence[str]],
    *,
    truncate: bool = False,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, dict[str, int]]:
    """Tokens (P, L) of the P distinct captions of K classes, and the row of each caption.

    truncate: as for `tokenize`. names: of the classes, for errors. Raises ValueError, as `tokenize` does, and naming
    two classes of different captions whose tokens are the same: no model tells them apart. With truncation that is a
    warning.
    """
    names = [f"class {number}" for number in range(len(captions))] if names is None else names
    if len(names) != len(captions):
        raise ValueError(f"names has {len(names)} entries; expected {len(captions)}, one for each class of captions")
    name_of: dict[str, str] = {}
    for name, texts in zip(names, captions, strict=True):
        for text in texts:
            name_of.setdefault(text, name)
    distinct = list(name_of)
    tokens = tokenize(tokenizer, distinct, truncate=truncate, names=list(name_of.values()))
    row = {text: number for number, text in enumerate(distinct)}
    content = [values.tobytes() for values in np.ascontiguousarray(tokens.cpu().numpy())]
    first: dict[frozenset[bytes], tuple[str, frozenset[str]]] = {}
    for name, texts in zip(names, captions, strict=True):
        whole = frozenset(texts)
        other, its_texts = first.setdefault(frozenset(content[row[text]] for text in whole), (name, whole))
        if its_texts != whole:
            told = (
                f"the captions of {other!r} and {name!r} become the same tokens, so that nothing tells the two classes "
                f"apart: {min(its_texts)!r:.80} and {min(whole)!r:.80}"
            )
            if not (truncate or isinstance(tokenizer, Truncating)):
                raise ValueError(told)
            warnings.warn(told, stacklevel=3)
    return tokens, row


def _cut(tokenizer: Any, texts: Sequence[str], tokens: Tensor) -> list[tuple[int, int | None]]:
    """The texts that do not fit, by index, with the number of tokens each takes where that can be known."""
    words = getattr(tokenizer, "tokenizer", None)  # of open_clip's wrappers of Hugging Face's tokenizers
    if callable(words) and hasattr(tokenizer, "context_length"):
        padding, count = words.pad_token_id, _hugging_face_count
    elif callable(getattr(tokenizer, "encode", None)) and hasattr(tokenizer, "eot_token_id"):  # open_clip's own
        padding, count = 0, _simple_count
    else:
        return [(i, None) for i in _seem_cut(tokenizer, texts, tokens)]
    # The last two places, because the closing token may have been made padding (strip_sep_token).
    full = (tokens[:, -2:] != padding).any(1).nonzero()[:, 0].tolist()
    taken = [count(tokenizer, texts[i]) for i in full]
    return [(i, n) for i, n in zip(full, taken, strict=True) if n > tokens.shape[1]]


def _hugging_face_count(tokenizer: Any, text: str) -> int:
    if hasattr(tokenizer, "clean_fn"):
        text = tokenizer.clean_fn(text)
    else:  # SigLipTokenizer, which always cleans in one way
        import_open_clip()
        from open_clip.tokenizer import basic_clean, canonicalize_text

        text = canonicalize_text(basic_clean(text))
    clips = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # which frames the text itself, with three tokens
    how = {"add_special_tokens": not clips, "truncation": False, "padding": False, "verbose": False}
    return len(tokenizer.tokenizer(text, **how)["input_ids"]) + 3 * clips


def _simple_count(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text)) + 2


def _seem_cut(tokenizer: Tokenizer, texts: Sequence[str], tokens: Tensor) -> list[int]:
    """Which texts a callable has cut, that tells nothing but tokens."""
    try:
        layout = TokenLayout.of(tokenizer)
        full = (tokens[:, -1] != layout.padding).nonzero()[:, 0].tolist()
        if not full:
            return []
        asked = [texts[i].rstrip() for i in full]
        shorter = tokenizer([_LAST_LETTER.sub("", text) for text in asked]).tolist()
        tail = tokenizer([text[max(text.rfind(" "), 0) :] for text in asked]).tolist()
        if tokenizer([f"{texts[i]} {texts[i]}" for i in full[:1]]).shape[1] > tokens.shape[1]:
            return []
    except Exception:
        return []
    cut = []
    for i, without, last in zip(full, shorter, tail, strict=True):
        row = tokens[i].tolist()
        end, word = layout.content(row), layout.content(last)
        if without == row or end[len(end) - len(word) :] != word:
            cut.append(i)
    return cut


_LAST_LETTER = re.compile(r"\w\W*$")  # with what follows, which some tokenizers drop


class TokenLayout(NamedTuple):
    """How a tokenizer frames a text: numbers of tokens before and after it, the token that fills a row, and a word."""

    opening: int
    closing: int
    padding: int
    word: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenLayout:
        """Found by asking for three short texts."""
        empty, a, b = tokenizer(["", "a", "b"]).tolist()
        opening = next(
            (i for i, column in enumerate(zip(empty, a, b, strict=True)) if len(set(column)) > 1), len(empty)
        )
        layout = cls(opening, 0, empty[-1], a[opening])
        return layout._replace(closing=len(layout.content(empty)))

    def spare(self, row: Sequence[int]) -> int:
        """How many tokens of padding a row ends in."""
        return next((i for i, token in enumerate(reversed(row)) if token != self.padding), len(row))

    def content(self, row: Sequence[int]) -> list[int]:
        return list(row[self.opening : len(row) - self.spare(row) - self.closing])


class SampledCaptions(NamedTuple):
    tokens: Tensor  # (U, L) the batch's distinct captions
    inverse: Tensor  # (N,) caption of each image: features[inverse] are the N text features


class PromptTable:
    """Captions of K classes, tokenised once to length L, to look up or draw from by label.

    `captions` (P, L) holds the distinct captions, `rows` (K, T) the caption of each class and template,
    `counts` (K,) how many templates a class has. Memory: P L + K T integers; 80 templates of 1000 classes
    take 50 MB at L = 77.
    """

    @checked
    def __init__(
        self,
        tokenizer: Tokenizer,
        class_names: Sequence[str] | Mapping[str, str],
        templates: Sequence[Template],
        *,
        truncate: bool = False,
    ) -> None:
        """class_names, templates: as for `captions`; truncate: as for `tokenize_classes`, whose errors it raises."""
        _, names = split_names(class_names)
        self._fill(tokenizer, captions(names, templates), names, truncate)

    @classmethod
    @checked
    def from_captions(
        cls,
        tokenizer: Tokenizer,
        captions: Sequence[Sequence[str]],
        *,
        names: Sequence[str] | None = None,
        truncate: bool = False,
    ) -> PromptTable:
        """A table from ready captions, one sequence a class; classes may have different numbers of them.

        names, truncate: as for `tokenize_classes`."""
        table = cls.__new__(cls)
        table._fill(tokenizer, captions, names, truncate)
        return table

    def _fill(
        self, tokenizer: Tokenizer, captions: Sequence[Sequence[str]], names: Sequence[str] | None, truncate: bool
    ) -> None:
        check_captions(captions)
        self.captions, row = tokenize_classes(tokenizer, captions, names=names, truncate=truncate)
        counts = [len(texts) for texts in captions]
        most = max(counts)
        # A class with fewer captions repeats its last; `counts` keeps the repeats from being drawn.
        padded = [[*texts, *[texts[-1]] * (most - len(texts))] for texts in captions]
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

    @checked
    def tokens(self, labels: Tensor, template_indices: Tensor | int) -> Tensor:
        """Tokens (N, L) of each label's caption; `template_indices` (N,) or an integer for all."""
        return self.captions[self._captions_of(labels, template_indices)]

    @checked
    def unique(self, labels: Tensor, template_indices: Tensor | int) -> SampledCaptions:
        """The distinct captions of a batch, with `tokens[index]` equal to `self.tokens(...)`."""
        return self._distinct(self._captions_of(labels, template_indices))

    @checked
    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> SampledCaptions:
        """Draws a template for each label, uniformly, and returns the batch's distinct captions.

        labels, generator, errors: as for `draw`.
        """
        return self._distinct(self.draw(labels, generator))

    @checked
    def draw(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws a template for each label, uniformly: the rows (N,) of `captions` that it makes with them.

        labels: (N,) integers in [0, K). generator: the source of randomness; one on the CPU draws the same
        templates whatever device the table is on. Raises ValueError for labels out of range.
        """
        device = generator.device if generator is not None else "cpu"
        # float64, so that a draw just below 1 cannot round up to the count.
        draw = torch.rand(labels.shape, dtype=torch.float64, device=device, generator=generator)
        labels = self._checked(labels)
        return self.rows[labels, (draw.to(labels.device) * self.counts[labels]).long()]

    def _distinct(self, rows: Tensor) -> SampledCaptions:
        distinct, index = rows.unique(return_inverse=True)
        return SampledCaptions(self.captions[distinct], index)

    def _captions_of(self, labels: Tensor, template_indices: Tensor | int) -> Tensor:
        labels = self._checked(labels)
        template_indices = torch.as_tensor(template_indices)
        if template_indices.dtype not in INTEGERS or template_indices.is_meta:
            raise ValueError(f"template_indices: expected integers, got {described(template_indices)}")
        if template_indices.shape not in ((), labels.shape):
            raise ValueError(
                f"template_indices: expected one integer, or one for each of {len(labels)} labels, got "
                f"{tuple(template_indices.shape)}"
            )
        template_indices = template_indices.to(labels.device, torch.int64)
        counts = self.counts[labels]
        if ((template_indices < 0) | (template_indices >= counts)).any():
            raise ValueError(
                f"template_indices: expected values in [0, {int(counts.max())}), got "
                f"{int(template_indices.min())} to {int(template_indices.max())}"
            )
        return self.rows[labels, template_indices]

    def _checked(self, labels: Tensor) -> Tensor:
        if labels.ndim != 1 or labels.dtype not in INTEGERS or labels.is_meta:
            raise ValueError(f"labels: expected (N,) integers, got {tuple(labels.shape)} {labels.dtype}")
        labels, classes = labels.to(self.rows.device, torch.long), len(self.rows)
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < classes):
            raise ValueError(
                f"labels: expected values in [0, {classes}), got {int(labels.min())} to {int(labels.max())}"
            )
        return labels


@checked
def read_class_names(path: str | Path, *, dataset: str | None = None) -> tuple[str, ...]:
    """Class names in label order: a text file, one a line, or JSON, a list of names, an object's keys, {name: label} or
    {label: name}.

    dataset: whose names, of an object of lists {data set: [names]} such as CLIP_benchmark's; not needed where the
    object holds one. ValueError, naming the file, for anything else.
    """
    return _strings(path, "class names: a list of them, an object of which they are the keys, or one a line", dataset)


@checked
def read_templates(path: str | Path, *, dataset: str | None = None) -> tuple[str, ...]:
    """Templates from a text file, one a line, or a JSON list; each holds `{}` or `{c}`.

    dataset: as for `read_class_names`.
    """
    templates = _strings(path, "templates: a list of strings with {} or {c}, or one a line", dataset)
    try:
        for template in templates:
            format_template(template, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return templates


@checked
def read_descriptions(
    path: str | Path, class_names: Sequence[str], *, missing: str = "error"
) -> tuple[tuple[str, ...], ...]:
    """`match_descriptions` of a JSON file (or of a text file with one description a line, in label order)."""
    descriptions = _read(path, "descriptions: an object {class name: [descriptions]}, or a list in label order")
    try:
        return match_descriptions(descriptions, class_names, missing=missing)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@checked
def match_descriptions(
    descriptions: Mapping[str, str | Sequence[str]] | Sequence[str | Sequence[str]],
    class_names: Sequence[str],
    *,
    missing: str = "error",
) -> tuple[tuple[str, ...], ...]:
    """Concept descriptions (DRM, arXiv 2411.19757) in label order: K tuples of one or more descriptions.

    A mapping {class name: description or [descriptions]} is matched by name: raises ValueError naming the
    classes without a description and the names that are no class. A sequence is matched by position and must
    have K entries. missing: of a class without a description, or with an empty list of them, "error", or "name",
    which describes it as "a photo of a <name>.". Classes of different names and the same descriptions are one class to
    a model, and get a warning that names them.
    """
    _check_strings("class_names", class_names)
    if missing not in ("error", "name"):
        raise ValueError(f'missing: expected "error" or "name", got {missing!r}')
    if isinstance(descriptions, Mapping):
        classes = dict.fromkeys(class_names)
        absent = [name for name in classes if name not in descriptions] if missing == "error" else []
        unknown = [name for name in descriptions if name not in classes]
        if absent or unknown:
            raise ValueError(
                "descriptions do not match class_names: "
                + "; ".join(
                    f"{what} {_few(names)}"
                    for what, names in (("no description of", absent), ("no class called", unknown))
                    if names
                )
                + ('; missing="name" describes classes by their names' if absent else "")
            )
        descriptions = [descriptions.get(name, ()) for name in class_names]
    elif isinstance(descriptions, str) or not isinstance(descriptions, Sequence):
        raise TypeError(f"descriptions: expected a mapping or a sequence, got {type(descriptions).__name__}")
    elif len(descriptions) != len(class_names):
        raise ValueError(
            f"descriptions: {len(descriptions)} entries cannot be matched by position to {len(class_names)} "
            "classes; give a mapping {class name: description}"
        )
    matched = []
    for name, entry in zip(class_names, descriptions, strict=True):
        texts = (entry,) if isinstance(entry, str) else entry
        if isinstance(texts, Sequence) and not texts:
            if missing == "error":
                raise ValueError(f'descriptions of {name!r}: got none; missing="name" describes it by its name')
            texts = (format_template(SIMPLE_TEMPLATES[0], name),)
        _check_strings(f"descriptions of {name!r}", texts)
        matched.append(tuple(texts))
    _warn_of_equals(matched, class_names)
    return tuple(matched)


def _warn_of_equals(descriptions: Sequence[tuple[str, ...]], class_names: Sequence[str]) -> None:
    same: dict[frozenset[str], dict[str, None]] = {}
    for name, texts in zip(class_names, descriptions, strict=True):
        same.setdefault(frozenset(texts), {})[name] = None
    if equal := [list(names) for names in same.values() if len(names) > 1]:
        told = "; ".join(_few(names) for names in equal[:5])
        warnings.warn(
            f"descriptions: {sum(map(len, equal))} of {len(class_names)} classes share theirs with another, so that "
            f"these heads cannot tell them apart: {told}{'; ...' if len(equal) > 5 else ''}",
            stacklevel=4,
        )


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


def _strings(path: str | Path, expected: str, dataset: str | None) -> tuple[str, ...]:
    """The list of strings in a file, or the keys of the object in it, or the one of its lists that is asked for."""
    found = _read(path, expected)
    if isinstance(found, dict):
        lists = [key for key, value in found.items() if isinstance(value, list)]
        if dataset is not None:
            if dataset not in lists:
                raise ValueError(f"{path}: no list called {dataset!r}, there are {_few(lists) or 'none'}")
            found = found[dataset]
        elif lists and len(lists) == len(found):
            if len(lists) > 1:
                raise ValueError(f"{path}: {len(lists)} lists, {_few(lists)}: say which, as dataset={lists[0]!r}")
            found = found[lists[0]]
        else:
            found = _of_object(path, found)
    elif dataset is not None:
        raise ValueError(f"{path}: dataset is {dataset!r}, but the file is no object of lists")
    try:
        _check_strings(str(path), found)
    except TypeError as error:
        raise ValueError(f"{error}; expected {expected}") from error
    return tuple(found)


def _of_object(path: str | Path, found: dict[str, Any]) -> list[str]:
    """The names that an object holds: its keys; in the order of {name: number}, and the values of {number: name}."""
    values, numbers = list(found.values()), range(len(found))
    if nested := [key for key, value in found.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{path}: {nested[0]!r} holds {described(found[nested[0]])}: which names are meant is not known"
        )
    if set(found) == set(map(str, numbers)) and all(isinstance(value, str) for value in values):
        return [found[str(number)] for number in numbers]
    if values and all(type(value) is int for value in values):
        if sorted(values) != list(numbers):
            raise ValueError(f"{path}: the numbers of the names are not 0 to {len(values) - 1}, each once")
        return sorted(found, key=found.__getitem__)
    return list(found)


def _read(path: str | Path, expected: str) -> Any:
    """A JSON file's value, or any other file's lines without the blank ones at its end."""
    if Path(path).suffix.lower() == ".json":
        return read_json(path, expected)
    return [line.strip() for line in read_text(path, expected).rstrip().splitlines()]
