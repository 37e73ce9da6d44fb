"""What every method shares.

A CLIP classifier is a similarity with a fixed set of texts,

    u = normalize(f(x))  (N, D)     image features
    w                    (K, D)     class embeddings, one row a class
    z = s u w^T + b      (N, K)     logits;  p = softmax(z)
    c = u normalize(w)^T (N, K)     cosines, what OOD scores such as MCM are made of

and a method is a way to train f (and w): `step(batch)` gives a loss, `after_step()` follows the optimiser's
step, `classifier()` gives the `Predictor` learnt so far. Everything random in a step is a function of (seed,
step), so that a resumed run repeats it exactly.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Required, TypedDict

from robustft import clip
from robustft.clip.adapters import adopted, base
from robustft.clip.encoding import unwrap
from robustft.clip.prompts import Template, Tokenizer, captions, split_names, tokenize
from robustft.clip.spread import Spread, current, drawn_seed, joined, seeded, spread
from robustft.data.classes import ClassNames
from robustft.data.sources import Batch, check_labels, column, in_parts, on_host, to_device, unpack
from robustft.losses import weighted_sum
from robustft.machine import Tune
from robustft.methods.options import Configured, digest
from robustft.methods.tuning import check_tune, set_trained
from robustft.ops import ranks
from robustft.ops.kinds import checked, described
from robustft.predictors.base import Classifier, Predictor
from robustft.predictors.zero_shot import zero_shot_classifier


class Step(NamedTuple):
    """One step: the weighted sum to differentiate, and its terms, un-weighted and detached, to log."""

    loss: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Step:
        """The step of un-weighted terms and their weights."""
        return cls(weighted_sum(terms, weights), {name: value.detach() for name, value in terms.items()})


class Shared(TypedDict, total=False):
    """The options of every method, which `Method` describes: a constructor hands them on as `**shared`."""

    tokenizer: Required[Tokenizer]
    class_names: Required[Sequence[str] | Mapping[str, str]]
    templates: Required[Sequence[Template]]
    total_steps: int | None
    seed: int
    tune: Tune | None
    lora: clip.LoRA | Mapping[str, Any] | None


def check_alone(name: str) -> None:
    """RuntimeError in one of several processes of torch.distributed."""
    if dist.is_available() and dist.is_initialized() and (world := dist.get_world_size()) > 1:
        raise RuntimeError(
            f"{name} sees the rows of this process alone, and torch.distributed runs {world}: over the whole batch the "
            "loss is another one. Call the method, or the DistributedDataParallel around it, with the group: "
            "method(batch, group=torch.distributed.group.WORLD)"
        )


class Method(Configured, nn.Module):
    """A way to fine-tune a CLIP model: `step`, the optimiser, `after_step`; at any time, `classifier`.

    The method trains a copy, `method.model`; the model it was given stays the zero-shot one. `parameters()`
    that are not trained do not require a gradient, and `state_dict()` holds all that a resume needs: student,
    head, teacher, the length of the run and the number of steps done. `config` tells apart what must not be resumed
    as one another.

    Args:
        model: an open_clip model, in whatever wrappers; parameters frozen in it stay frozen.
        tokenizer: its tokenizer.
        class_names: K names, at least two, in the order of the labels; or {name in data sets, such as a folder: name in
            captions}. The keys become `classes`, the method's and its predictors'; the values stay `class_names`. Data
            sets are matched by keys or by values.
        templates: prompts with a place for the name, "a photo of a {}".
        total_steps: length of the run, for methods with a schedule; None: `begin_run` tells it, as `fit` does.
        seed: of everything random in `step`, and of the adapters.
        tune: which parameters of the model are trained, "full", "visual", "text", "projection", "lora" or "prompts"
            (`robustft.methods.tuning`); None for what the method trains by itself.
        lora: the adapters of tune="lora", a `robustft.clip.LoRA` or its arguments by name.

    Under adapters, tune="lora" or those of a model that peft has wrapped, they alone are trained, not the scale either.
    The frozen weights are in memory once, whatever frozen copies a method keeps, and not in `state_dict()`: `config`
    has their fingerprint.
    """

    uncompared: ClassVar[tuple[str, ...]] = (
        "model",
        "tokenizer",
        "templates",
    )  # `config` has the captions that they make
    takes_features = False  # whether a batch may hold unit features (N, D) in the images' place: with a frozen tower
    recomputes = True  # whether the towers may compute their activations once more in the backward, and not keep them
    towers: ClassVar[tuple[str, ...]] = clip.TOWERS  # of the model, those that are trained: what `tune` may name
    learns_prompts: ClassVar[bool] = False
    scheduled = False  # whether `run_length` was asked for: what was trained depends on the length of the run
    model: Any  # an open_clip model, of whose attributes `robustft.clip` takes care
    steps: Tensor
    run_steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Tokenizer,
        class_names: Sequence[str] | Mapping[str, str],
        templates: Sequence[Template],
        total_steps: int | None = None,
        seed: int = 0,
        tune: Tune | None = None,
        lora: clip.LoRA | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        adapters = check_tune(tune, lora, type(self))
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        texts = captions(class_names, templates)  # refuses what is no list of names or templates
        if len(class_names) < 2:
            raise ValueError(
                f"class_names must name at least two classes, got {list(class_names)}: the probability of a single one "
                "is always 1 and teaches nothing. Add a class for what it is not, or leave the model as it is and tell "
                'the class from everything else by Detector("max_cosine")'
            )
        self.model = adopted(copy.deepcopy(unwrap(model)))
        set_trained(self.model, tune, adapters, self.towers, seed)
        self.tokenizer = tokenizer
        keys, words = split_names(class_names)
        self.classes, self.class_names = ClassNames(keys), tuple(words)
        self.templates = templates
        self.total_steps = total_steps
        self.seed = seed
        self._versions: tuple[int, int] | None = None  # of steps and of the weights, at the last step
        self._numbers: dict[str, tuple[Tensor, int, int]] = {}  # of buffers, by `_number`
        self._noticed = False
        # The first captions' tokens tell tokenizers apart.
        self.config = {
            "method": type(self).__name__,
            "captions": digest(texts, tokenize(tokenizer, [first for first, *_ in texts], names=self.class_names)),
        }
        self._base: tuple[str, ...] = ()
        if clip.has_adapters(self.model):
            self._base = tuple(name for name, p in self.model.named_parameters() if not p.requires_grad)
            self.config["model"] = clip.fingerprint(base(self.model))
            self.register_state_dict_post_hook(_without_the_base)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("run_steps", torch.zeros((), dtype=torch.int64))  # 0 where nobody told it

    @classmethod
    def summary(cls) -> str:
        """What the method is for: the first line of its docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @checked
    def begin_run(self, total_steps: int) -> None:
        """Tell the length of the run that begins, once, before its first step; `fit` does.

        The one that the constructor was given, if any, goes before it. It is part of `state_dict()`.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        self.run_steps.fill_(total_steps)

    @property
    def told_length(self) -> int:
        """Steps of the whole run, or 0 where nobody told it."""
        return self.total_steps or self._number("run_steps")

    def run_length(self) -> int:
        """Steps of the whole run, for schedules; ValueError where nobody told it."""
        self.scheduled = True
        if not (length := self.told_length):
            raise ValueError(
                f"total_steps is needed: {type(self).__name__} has a schedule over the run. Give it, or call "
                "begin_run(total_steps) before the first step, as robustft.fit does"
            )
        return length

    def step(self, batch: Any) -> Step:
        """The loss of one batch: (images, labels), (images, texts) or {"image", "label" and / or "text"}.

        Under several processes of torch.distributed this is the loss of the process's own rows: right where `additive`,
        RuntimeError elsewhere, because calling the method with `group` gives the loss of the whole batch.
        """
        raise NotImplementedError

    @property
    def additive(self) -> bool:
        """Whether a batch's loss is the mean of what `step` gives for each of its samples, so that parts add up."""
        return False

    def forward(self, batch: Any, *, parts: int = 1, group: dist.ProcessGroup | None = None) -> Step:
        """`step` of a batch that is larger than memory, or of which each process has some rows.

        The loss and its gradients are those of the whole batch in one pass, to rounding; with dropout, whose draws are
        other ones, those of its parts. `out.loss.backward()` comes after it as after `step`.

        Args:
            batch: as for `step`; with `parts`, its images may stay on the CPU, and are moved part by part.
            parts: so many passes of the towers. Memory is that of one part's activations and O(N D) for the features;
                the towers encode all once more in the backward (GradCache, Gao et al. 2021, arXiv 2101.06983).
            group: the processes over which the batch is spread: this one has some of the rows, at least one, and maybe
                another number than others. `loss` has the value of the whole batch on each. The mean of a parameter's
                gradients over the processes, which `DistributedDataParallel(method)` takes, is the whole batch's. Every
                process makes the same calls. Features, labels and captions of all rows go to each of them.

        Raises:
            ValueError: a BatchNorm in training mode, whose statistics would be those of a part; prompts in the image
                tower with an objective that parts do not add up to; otherwise as `step`.
            RuntimeError: another process has ended.
        """
        how = Spread(parts, group)
        if parts < 1:
            raise ValueError(f"parts must be at least 1, got {parts}")
        if parts * how.processes.count == 1:
            return self.step(batch)
        self._check_spreading(how)
        if self.additive:
            return self.summed(batch, how, self._recomputed_step if parts > 1 else self.step)
        with spread(how):
            return self.step(batch)

    def summed(
        self, batch: Any, how: Spread, step: Callable[[Any], Step], backward: Callable[[Tensor], None] | None = None
    ) -> Step:
        """The step of a batch from that of each of its parts, for an `additive` method.

        backward: called with each part's share of the loss, whose graph is then let go; the loss returned has none.
        """
        device, steps = self.steps.device, []
        pieces = in_parts(batch, how.parts)
        sizes = [len(unpack(piece, self.takes_features).images) for piece in pieces]
        with spread(Spread(group=how.group)):
            counts = joined(torch.tensor([sum(sizes)], device=device)).tolist()
        seed, first = drawn_seed(), sum(counts[: how.processes.rank])
        for piece, size in zip(pieces, sizes, strict=True):
            with seeded(seed, first):
                out = step(to_device(piece, device))
            share, first = how.processes.count * size / sum(counts), first + size
            loss = share * out.loss
            if backward is not None:
                backward(loss)
                loss = loss.detach()
            steps.append(Step(loss, {name: share * value for name, value in out.terms.items()}))
        loss = torch.stack([part.loss for part in steps]).sum()
        names = list(steps[0].terms)
        sums = [torch.stack([part.terms[name] for part in steps]).sum() for name in names]
        values = torch.stack([loss.detach(), *sums])
        with spread(Spread(group=how.group)):
            values = joined(values[None]).mean(0)
        return Step(loss + (values[0] - loss.detach()), dict(zip(names, values[1:], strict=True)))

    def _recomputed_step(self, batch: Any) -> Step:
        terms: dict[str, Tensor] = {}

        def step() -> Tensor:
            out = self.step(batch)
            terms.update(out.terms)
            return out.loss

        return Step(checkpoint(step, use_reentrant=False), terms)

    def _check_spreading(self, how: Spread) -> None:
        if how.parts > 1 and not (self.recomputes or self.additive):
            raise ValueError(
                f"parts must be 1 for {type(self).__name__} with this objective, got {how.parts}: its prompts are not "
                "there any more when the images are encoded again"
            )
        for name, module in self.named_modules():
            alike = isinstance(module, nn.SyncBatchNorm) and how.parts == 1
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and not alike:
                raise ValueError(
                    f"{name} of {type(self).__name__} is a BatchNorm in training mode: in {how.parts} parts on "
                    f"{how.processes.count} processes its statistics would be those of a part, and the loss another "
                    "one. Train on one process in one part, with a tower without BatchNorm"
                    + " or with torch.nn.SyncBatchNorm"
                    * (how.parts == 1)
                )

    def after_step(self) -> None:
        """Call after every optimiser step: counts it, and moves whatever follows the weights."""
        done = self.steps_done
        self.steps += 1
        self._numbers["steps"] = self.steps, self.steps._version, done + 1

    @property
    def steps_done(self) -> int:
        """`steps` as a number. A device is asked for it only where something other than `after_step` has written it."""
        return self._number("steps")

    def _number(self, name: str) -> int:
        """What a buffer holds, read once for each time that it was written."""
        buffer = getattr(self, name)
        known = self._numbers.get(name)
        if known is None or known[0] is not buffer or known[1] != buffer._version:
            known = self._numbers[name] = buffer, buffer._version, int(buffer)
        return known[2]

    def classifier(self) -> Predictor:
        """The predictor learnt so far; it shares the method's model."""
        raise NotImplementedError

    def zero_shot_classifier(self, model: nn.Module | None = None) -> Classifier:
        """The prompts' classifier on this method's model, or another; a frozen image tower is shared."""
        return zero_shot_classifier(
            self.model if model is None else model,
            tokenizer=self.tokenizer,
            class_names=self._named(),
            templates=self.templates,
        )

    def _named(self) -> Sequence[str] | Mapping[str, str]:
        """The class names as they were given."""
        if self.classes == self.class_names:
            return self.classes
        return dict(zip(self.classes, self.class_names, strict=True))

    def frozen_copy(self) -> Any:
        """A copy of the model as it is now, frozen and in evaluation mode; weights under adapters are shared."""
        return clip.copied(self.model).requires_grad_(False).eval()

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The frozen weights under adapters by name, under each name where a copy shares them; without adapters {}."""
        held = {id(self.model.get_parameter(name)) for name in self._base}
        return {name: p for name, p in self.named_parameters(remove_duplicate=False) if id(p) in held}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; frozen weights under adapters stay what they are."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is {described(state_dict)}; expected what state_dict() gave")
        return super().load_state_dict({**state_dict, **self.base_parameters()}, strict, assign)

    def checked(self, batch: Any) -> Batch:
        """The batch's parts, or an error that says what is wrong with them, or with taking a step here.

        Where the method is called with `group`, all but the images are those of the whole batch.
        """
        how = current()
        if (how is None or how.group is None) and not self.additive:
            check_alone(f"{type(self).__name__}.step")
        self._notice_after_step()
        if how is None or how.group is None:
            return self._own(batch)
        images, labels, texts = ranks.checked(how.group, lambda: self._own(batch))
        ranks.agree({"function": f"{type(self).__name__}.step", "labels": labels is not None}, how.group)
        if isinstance(texts, Tensor):
            texts = joined(texts)
        elif texts is not None:
            lists: list[Any] = [None] * how.processes.count
            dist.all_gather_object(lists, list(texts), group=how.group)
            texts = [text for rows in lists for text in rows]
        images = joined(images) if images.ndim == 2 else images
        return Batch(images, None if labels is None else joined(labels), texts)

    def _own(self, batch: Any) -> Batch:
        """The rows of this process, checked; with the encoders in parts, images may be elsewhere than the model."""
        images, labels, texts = unpack(batch, self.takes_features)
        device = next(self.model.parameters()).device
        if current() is not None and images.ndim == 2:
            images = images.to(device)
        elif images.device != device and current() is None:
            raise ValueError(f"images are on {images.device}, the model is on {device}")
        if labels is not None:
            check_labels(on_host(labels), len(self.class_names))
            labels = labels.to(device, torch.int64)
        return Batch(images, labels, texts)

    def _notice_after_step(self) -> None:
        """Warns once where an optimiser has moved the weights since the last step and `after_step` was not called."""
        moved = sum(p._version for p in self.parameters() if p.requires_grad)
        before, self._versions = self._versions, (self.steps._version, moved)
        if before is not None and before[0] == self.steps._version and before[1] != moved and not self._noticed:
            self._noticed = True
            name = type(self).__name__
            warnings.warn(
                f"the weights of {name} moved since its last step, and {name}.after_step() was not called: what "
                "follows the weights (steps, captions, a teacher, the groups' weights) stands still. Call it after "
                "every optimizer.step(), or say optimizer.register_step_post_hook(lambda *_: method.after_step())",
                stacklevel=2,
            )

    def column(self, batch: Any, name: str) -> Tensor | None:
        """A further tensor of a dictionary batch, one row for each image, on the model's device; None for none."""
        value = column(batch, name, unpack(batch, self.takes_features).images)
        return None if value is None else joined(value.to(self.steps.device))

    def labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch; ValueError for one of texts."""
        images, labels, _ = self.checked(batch)
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels in the batch, which has texts only")
        return images, labels


def _without_the_base(method: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the frozen weights under adapters out of a state."""
    assert isinstance(method, Method)
    for name in method.base_parameters():
        state.pop(prefix + name, None)
