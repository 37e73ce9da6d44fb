"""What is asked for classes: a `Predictor`, those of one model, and the plain one of them, a CLIP model with a head.

u = normalize(f(x))  (N, D)     image features
w                    (K, D)     class embeddings, one row a class
z = s u w^T + b      (N, K)     logits;  p = softmax(z)
c = u normalize(w)^T (N, K)     cosines
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from robustft import clip
from robustft.clip.computation import is_equal
from robustft.clip.loading import load_model
from robustft.clip.outputs import Outputs, evaluating, similarities
from robustft.data.classes import ClassNames, Matching, matching_of
from robustft.data.images import Skipped
from robustft.data.sources import batches, image_statistics, takes_statistics
from robustft.files import load_fitted, refusing, save_fitted
from robustft.ops.kinds import checked, described
from robustft.ops.precision import at_least_float32
from robustft.ops.processes import current


class Predictor(nn.Module):
    """Images (N, C, H, W) to `Outputs` over `classes`; `predictor(images)` is its logits.

    A subclass says what `outputs` are and how to `restrict` them. One that can be kept says how in `save` and
    `restore`; `robustft.load_predictor` knows it by its `kind`, the class's name unless another is given.
    """

    classes: tuple[str, ...]
    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Predictor]]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.kind = cls.__dict__.get("kind", cls.__name__)
        known = Predictor.kinds.get(cls.kind, cls)
        if known.__module__ != cls.__module__ and known.__module__.startswith("robustft."):
            raise TypeError(f"{cls.__name__}: robustft has a predictor of kind {cls.kind!r}; give yours another `kind`")
        Predictor.kinds[cls.kind] = cls

    def outputs(self, images: Tensor) -> Outputs:
        """Features, cosines and logits of transformed images, in evaluation mode; gradients as usual."""
        raise NotImplementedError

    def restrict(self, classes: Sequence[int] | Sequence[str]) -> Predictor:
        """The predictor over some classes, indices or names in their order; restricts before the softmax."""
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, tokenizer: Any = None) -> Path:
        """Writes all there is of the predictor into a directory; `robustft.load_predictor` gives it back.

        `config` is a `Bundle`'s, describing the model; `tokenizer`, replacing and errors as in `clip.export`.
        """
        raise NotImplementedError

    @classmethod
    def restore(cls, directory: Path, device: torch.device | str, dtype: torch.dtype) -> Predictor:
        """What `save` wrote; ValueError that names the file for a damaged one."""
        raise NotImplementedError

    @property
    def encoder(self) -> nn.Module | None:
        """The model of whose unit image features, and nothing else, the outputs are a function; None if there is none.

        Predictors of one encoder share its pass.
        """
        return None

    def head_outputs(self, features: Tensor) -> Outputs:
        """Outputs of unit features (N, D) of `encoder` that exist already, such as `robustft.clip.encode` keeps."""
        raise NotImplementedError

    @property
    def joined(self) -> tuple[Predictor, ...]:
        """The predictors of whose outputs, and nothing else, the outputs are a function: `combined`. () for none."""
        return ()

    def combined(self, outputs: Sequence[Outputs]) -> Outputs:
        """Outputs from those of `joined` on the same images."""
        raise NotImplementedError

    @checked
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.outputs(images).logits

    @checked
    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (N, K), at least float32."""
        return self.logits(images).softmax(-1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)

    @checked
    def predict(
        self, data: Any, batch_size: int = 256, *, labelled: bool = True, workers: int | None = None
    ) -> Outputs:
        """Outputs and labels of a whole set, in evaluation mode, on the CPU in at least float32; no gradient.

        data: as for `robustft.data.sources`. Where it tells its classes' names, its labels are matched to `classes` by
        name; of a set with some of them, the outputs are those of the predictor restricted to these, in the order of
        `classes`, and their `classes` tell which. labelled: False for a set of other classes, such as an
        out-of-distribution one: labels and names are not looked at. workers: processes that read images, as
        `robustft.data.sources.reading_workers` says. ValueError for names that are not among the classes, for images
        without a label or with one beyond the classes, and for NaN or infinite logits. Images that `data` wants skipped
        (`robustft.data.open`, on_error) have no row; `Outputs.skipped` has them.
        """
        (outputs,) = predict_each((self,), data, batch_size, labelled=labelled, workers=workers)
        return outputs

    def matched(self, data: Any) -> tuple[Predictor, Matching | None]:
        """The predictor restricted to the classes whose names a data set tells, and how its labels read.

        The predictor itself where the set has all classes, and None where it tells no names.
        """
        matching = matching_of(data, getattr(self, "classes", ()), of="the predictor")
        if matching is None or not matching.partial:
            return self, matching
        return self.restrict(matching.kept), matching

    def _indices(self, classes: Sequence[int] | Sequence[str]) -> list[int]:
        if isinstance(classes, (str, bytes)) or not isinstance(classes, Iterable) or getattr(classes, "ndim", 1) != 1:
            raise TypeError(f"classes is {described(classes)}; expected a sequence of names or of indices")
        entries: list[Any] = list(classes.tolist() if hasattr(classes, "tolist") else classes)
        if wrong := [c for c in entries if isinstance(c, bool) or not isinstance(c, (str, Integral))]:
            raise TypeError(f"classes holds {described(wrong[0])}; expected names or indices")
        words = [c for c in entries if isinstance(c, str)]
        rows = ClassNames(self.classes).rows
        names = next((row for row in rows if all(row.count(c) == 1 for c in words)), rows[0])
        if unclear := [c for c in words if names.count(c) != 1]:
            raise ValueError(f"classes {unclear[:5]} are not one each of the classifier's {len(self.classes)} names")
        indices = [names.index(c) if isinstance(c, str) else int(c) for c in entries]
        if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(len(self.classes))):
            raise ValueError(f"classes must be distinct indices in [0, {len(self.classes)}), got {indices[:10]}")
        return indices


def outputs_of_each(
    predictors: Sequence[Predictor], images: Tensor, equals: Mapping[nn.Module, nn.Module] | None = None
) -> tuple[Outputs, ...]:
    """What each predictor makes of the same images; those of one encoder share its pass, and so do their ensembles.

    equals: which encoder may stand for which, as `equal_encoders` finds.
    """
    passes: dict[nn.Module, Tensor] = {}

    def single(predictor: Predictor) -> Outputs:
        encoder = predictor.encoder
        if encoder is not None and equals is not None:
            encoder = equals.get(encoder, encoder)
        if encoder is not None and encoder in passes:
            return predictor.head_outputs(passes[encoder])
        outputs = predictor.outputs(images)
        if encoder is not None:
            passes[encoder] = outputs.features
        return outputs

    return joined_outputs(predictors, single)


def joined_outputs(predictors: Sequence[Predictor], single: Callable[[Predictor], Outputs]) -> tuple[Outputs, ...]:
    """What each predictor makes of the same images, where `single` tells, once each, what those make that join none."""
    made: dict[int, Outputs] = {}

    def of(predictor: Predictor) -> Outputs:
        if id(predictor) not in made:
            joined = predictor.joined
            made[id(predictor)] = predictor.combined([of(member) for member in joined]) if joined else single(predictor)
        return made[id(predictor)]

    return tuple(map(of, predictors))


def equal_encoders(predictors: Iterable[Predictor]) -> dict[nn.Module, nn.Module]:
    """For each encoder of the predictors, and of those they join, the first one of the same weights: as many methods
    leave the image tower as it was, or a mixture is one of its ends."""
    found: dict[nn.Module, nn.Module] = {}
    waiting = list(predictors)
    for predictor in waiting:
        waiting += predictor.joined
        encoder = predictor.encoder
        if encoder is not None and encoder not in found:
            first = (other for other, stands in found.items() if other is stands and is_equal(other, encoder))
            found[encoder] = next(first, encoder)
    return found


@torch.no_grad()
def each_batch(
    predictors: Sequence[Predictor],
    data: Any,
    batch_size: int = 256,
    *,
    labelled: bool = True,
    workers: int | None = None,
    skipped: list[Skipped] | None = None,
) -> Iterator[tuple[Outputs, ...]]:
    """What each predictor makes of a set, batch by batch, read once; as in `Predictor.predict`. A list `skipped`
    receives, at the end, the images that were. Processes that do it together (`robustft.ops.processes.together`) take
    turns, and each gets the batches of all."""
    for predictor in predictors:
        if not isinstance(predictor, Predictor):
            raise TypeError(
                f"expected a robustft.predictors.Predictor, which has outputs(images), got {type(predictor).__name__}"
            )
    pairs = [predictor.matched(data) if labelled else (predictor, None) for predictor in predictors]
    used = tuple(predictor for predictor, _ in pairs)
    device = next((p.device for p in predictors[-1].parameters()), torch.device("cpu"))
    turns, own, equals = current(), list[Skipped](), equal_encoders(used)

    def made() -> Iterator[tuple[Outputs, ...]]:
        read = batches(data, predictors[-1], batch_size=batch_size, workers=workers, skipped=own, turns=turns)
        for images, labels in read:
            if labelled and (missing := int((labels < 0).sum())):
                raise ValueError(f"{missing} of {len(labels)} images of a batch have no label: expected a labelled set")
            found = outputs_of_each(used, images.to(device), equals)
            for out, (_, matching) in zip(found, pairs, strict=True):
                if labelled and matching is None:
                    _check_labels(labels, out)
            yield tuple(
                _kept(out, getattr(predictor, "classes", None), _read(labels.cpu(), matching) if labelled else None)
                for out, (predictor, matching) in zip(found, pairs, strict=True)
            )

    with evaluating(*used):
        yield from turns.in_turns(made())
    if skipped is not None:
        skipped += turns.merged(own)


def _check_labels(labels: Tensor, outputs: Outputs) -> None:
    """ValueError for labels that are no column of the logits: every prediction of theirs would count as wrong."""
    if outputs.has("logits") and len(labels) and int(labels.max()) >= outputs.logits.shape[1]:
        raise ValueError(
            f"labels must lie in [0, {outputs.logits.shape[1] - 1}], numbers of classes, got {int(labels.max())}"
        )


def _kept(outputs: Outputs, classes: Sequence[str] | None, labels: Tensor | None) -> Outputs:
    return outputs.map(lambda part: at_least_float32(part).cpu()).replace(labels=labels, classes=classes)


def _read(labels: Tensor, matching: Matching | None) -> Tensor:
    return labels if matching is None else matching.among_kept(labels)


def predict_each(
    predictors: Sequence[Predictor],
    data: Any,
    batch_size: int = 256,
    *,
    labelled: bool = True,
    workers: int | None = None,
    parts: Sequence[str] = Outputs.PARTS,
) -> tuple[Outputs, ...]:
    """`Predictor.predict` of several predictors on one set, which is read once; those of one encoder share its pass.

    parts: of the outputs, those to keep: features are most of the memory.
    """
    alike: dict[Any, list[int]] = {}  # predictors to which the same tensors are shown
    for index, predictor in enumerate(predictors):
        device = next((p.device for p in predictor.parameters()), None) if isinstance(predictor, nn.Module) else None
        statistics = image_statistics(predictor) if takes_statistics(data) else None
        alike.setdefault((device, statistics), []).append(index)
    found: list[Any] = [None] * len(predictors)
    for indices in alike.values():
        skipped: list[Skipped] = []
        batches_of = (
            tuple(outputs.only(*parts) for outputs in batch)
            for batch in each_batch(
                [predictors[i] for i in indices],
                data,
                batch_size,
                labelled=labelled,
                workers=workers,
                skipped=skipped,
            )
        )
        for index, column in zip(indices, zip(*batches_of, strict=True), strict=True):
            found[index] = Outputs.cat(column).replace(skipped=skipped)
    for outputs in found:
        bad = int((~outputs.logits.isfinite()).any(1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(outputs.logits)} rows of the classifier's logits hold NaN or infinity")
    return tuple(found)


ALSO = "also"  # the setting of a saved predictor that holds its classes' other names
P = TypeVar("P", bound="ModelPredictor")


class ModelPredictor(Predictor):
    """Images to `Outputs` by one model, some tensors and some settings.

    `model` is shared, not copied: after more training, ask the method for a new predictor. The tensors are copied, to
    the model's device, into buffers. A subclass is made from (model, classes) and, by keyword, the tensors and
    settings that it declares. `classes` are names, or {name: another name, by which data sets may call it too}.

        tensors   by name their shapes, such as "K D": a letter is a size, the same in all, and K the number of classes;
                  integers say so, "K L int"; what ends in "?" may be missing
        settings  names of attributes that JSON can hold
    """

    tensors: ClassVar[Mapping[str, str]] = {}
    settings: ClassVar[tuple[str, ...]] = ()
    model: nn.Module
    classes: ClassNames

    @checked
    def __init__(self, model: nn.Module, classes: Sequence[str] | Mapping[str, str], **tensors: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.classes = ClassNames.of(classes)
        _check_tensors(self.tensors, tensors, len(self.classes))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for name in self.tensors:
            value = tensors.get(name)
            self.register_buffer(name, None if value is None else value.detach().to(device, copy=True))

    @checked
    def outputs(self, images: Tensor) -> Outputs:
        with evaluating(self.model):
            return self._outputs(images)

    def _outputs(self, images: Tensor) -> Outputs:
        """Outputs of images; the model is in evaluation mode."""
        raise NotImplementedError

    def restrict(self: P, classes: Sequence[int] | Sequence[str]) -> P:
        keep = self._indices(classes)
        own = {name: value[keep] for name, value in self._held().items() if self.tensors[name].startswith("K")}
        return self._with(self.classes.at(keep), **own)

    def _held(self) -> dict[str, Tensor]:
        return {name: value for name in self.tensors if (value := getattr(self, name)) is not None}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.settings}

    def _with(self: P, classes: Sequence[str], **changed: Tensor) -> P:
        """This predictor with other classes and some other tensors."""
        return type(self)(model=self.model, classes=classes, **self._held() | changed, **self._settings())

    @checked
    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, tokenizer: Any = None) -> Path:
        """Writes the model as `clip.export` does, a directory that open_clip loads, with the rest beside it.

        That is `kind`, classes, settings and tensors, in classifier.safetensors. `robustft.load_predictor` gives the
        predictor back. `config`, `tokenizer`, replacing and errors: as in `clip.export`.
        """
        settings: dict[str, Any] = {"classes": self.classes, **self._settings()}
        if self.classes.also:
            settings[ALSO] = self.classes.also
        write = partial(save_fitted, kind=self.kind, settings=settings, tensors=self._held())
        return clip.export(self.model, Path(directory), config, tokenizer=tokenizer, classifier=write)

    def merged(self: P) -> P:
        """This predictor on a model of its own with its adapters merged into the weights; without any, itself."""
        if not clip.has_adapters(self.model):
            return self
        return type(self)(model=clip.merged(self.model), classes=self.classes, **self._held(), **self._settings())

    @classmethod
    def restore(cls, directory: Path, device: torch.device | str, dtype: torch.dtype) -> ModelPredictor:
        path = directory / clip.CLASSIFIER_FILE
        settings, tensors = load_fitted(path, cls.kind)
        with refusing(path, cls.kind):
            classes, also = settings.pop("classes"), settings.pop(ALSO, [])
            for name, rows in (("classes", [classes]), (ALSO, also)):
                if not isinstance(rows, list) or not all(map(_are_names, rows)):
                    raise ValueError(f"{name} must be a list of names, got {rows!r:.80}")
            classes = ClassNames(classes, also)
            _check_tensors(cls.tensors, tensors, len(classes))
            for name, value in tensors.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"{name} must be finite, but holds NaN or infinity")
                if name == "logit_scale" and not float(value) > 0.0:
                    raise ValueError(f"logit_scale must be positive, got {float(value)}")
        model = load_model(directory, device, dtype)
        with refusing(path, cls.kind):
            predictor = cls(model=model, classes=classes, **tensors, **settings)
            predictor.check_fits()
        return predictor

    def check_fits(self) -> None:
        """ValueError where tensors are not of the model's widths, as those of another model's file are not."""
        width = clip.feature_width(self.model)
        for name, value in self._held().items():
            letters = [letter for letter in self.tensors[name].rstrip("?").split() if letter != "int"]
            found = dict(zip(letters, value.shape, strict=True)).get("D", width)
            if width is not None and found != width:
                raise ValueError(f"{name} are made for features of width {found}, but the model's have width {width}")


class FeaturePredictor(ModelPredictor):
    """A `ModelPredictor` whose outputs are those of the model's unit image features: a subclass has `head_outputs`."""

    @property
    def encoder(self) -> nn.Module | None:
        return self.model

    def _outputs(self, images: Tensor) -> Outputs:
        return self.head_outputs(clip.encode_images(self.model, images))


class Classifier(FeaturePredictor):
    """A CLIP model with a head: logits s u w^T + b.

    `model` is shared, not copied: after more training, ask the method for a new classifier.
    `class_embeddings` (K, D) need not have unit norm (a fine-tuned head does not); `logit_scale` is
    multiplied out. Embeddings, scale and bias are buffers, at least float32.

    `logit_bias` is that of a model trained by a sigmoid (SigLIP), one number for all classes. It is no part of the
    logits: a softmax, and so every probability, calibrator and OOD score here, is the same with and without it, or
    moves its threshold along. `match_probabilities` need it.
    """

    tensors = {"class_embeddings": "K D", "logit_scale": "", "bias": "K?", "logit_bias": "?"}
    class_embeddings: Tensor
    logit_scale: Tensor
    bias: Tensor | None
    logit_bias: Tensor | None

    @checked
    def __init__(
        self,
        model: nn.Module,
        class_embeddings: Tensor,
        classes: Sequence[str] | Mapping[str, str],
        *,
        logit_scale: Tensor | float | None = None,
        bias: Tensor | None = None,
        logit_bias: Tensor | None = None,
    ) -> None:
        scale = clip.logit_scale(model) if logit_scale is None else torch.as_tensor(logit_scale)
        given = {"class_embeddings": class_embeddings, "logit_scale": scale, "bias": bias, "logit_bias": logit_bias}
        super().__init__(model, classes, **{k: None if v is None else at_least_float32(v) for k, v in given.items()})

    @checked
    def head_outputs(self, features: Tensor) -> Outputs:
        """Outputs of unit features (N, D) that exist already, such as `robustft.clip.encode` keeps."""
        cosines, logits = similarities(features, self.class_embeddings, self.logit_scale)
        return Outputs(features, cosines, logits if self.bias is None else logits + self.bias)

    @checked
    def match_probabilities(self, images: Tensor) -> Tensor:
        """P(image shows class), each by itself, (N, K) in float64: sigmoid(s u w^T + b), by the model's scale and bias.

        Rows need not sum to 1: an image may show several classes, or none. ValueError for a classifier without
        `logit_bias`: a softmax teaches which class fits best, and not whether one fits. Source: SigLIP, Zhai et al.
        (arXiv 2303.15343), equation 1.
        """
        if self.logit_bias is None:
            raise ValueError(
                "this classifier has no logit_bias, so that nothing tells when a class fits: expected the zero-shot "
                'classifier of a model trained by a sigmoid (SigLIP), or that of a method with loss="sigmoid"'
            )
        return (self.logits(images).double() + self.logit_bias.double()).sigmoid()


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_tensors(shapes: Mapping[str, str], tensors: Mapping[str, Any], classes: int) -> None:
    """ValueError or TypeError for tensors that are missing, or of other shapes than declared."""
    if unknown := sorted(set(tensors) - set(shapes)):
        raise TypeError(f"{unknown[0]} is none of {', '.join(shapes)}")
    sizes = {"K": classes}
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None:
            if not shape.endswith("?"):
                raise ValueError(f"{name} is missing")
            continue
        letters = [letter for letter in shape.rstrip("?").split() if letter != "int"]
        wanted = "integers" if "int" in shape else "floating point"
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"{name} is a meta tensor, which holds no numbers; expected numbers")
        if value.ndim != len(letters) or value.is_floating_point() == ("int" in shape) or value.is_complex():
            raise ValueError(
                f"{name} must be ({', '.join(letters)}) {wanted}, got shape {tuple(value.shape)} {value.dtype}"
            )
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                expected = (
                    f"one row for each of the {classes} classes" if letter == "K" else f"{letter} = {sizes[letter]}"
                )
                raise ValueError(
                    f"{name} must be ({', '.join(letters)}) with {expected}, got shape {tuple(value.shape)}"
                )
