"""Predictors made of predictors (ensembles, a temperature) and how they are saved: a directory for each member.

<directory>/zero_shot/              as the member's own `save` writes it: a directory that open_clip loads
<directory>/fine_tuned/
<directory>/ensemble.safetensors    what mixes them: kind, numbers and tensors
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from robustft import clip
from robustft.files import COMPANIONS, load_fitted, new_folder, refusing, save_fitted
from robustft.predictors.base import FeaturePredictor, Predictor
from robustft.predictors.saving import ENSEMBLE_FILE, load_predictor


class Composite(Predictor):
    """A predictor of the predictors that `members` names, which are attributes and arguments of its constructor.

    A subclass says what else it holds: `settings`, numbers by the constructor's argument, as JSON can hold them; or,
    if it is more, `write` and `read`.
    """

    members: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()

    def save(self, directory: str | os.PathLike[str], config: Mapping[str, Any], *, tokenizer: Any = None) -> Path:
        """Writes every member into a directory of its name, and beside them what mixes them.

        `robustft.load_predictor` gives the predictor back. `config` and `tokenizer` are those of the members,
        fine-tunings of one model. The directory is built beside its place and then renamed, so that it is whole or not
        there. An earlier ensemble is replaced, with its detector, calibrator and conformal sets; FileExistsError when
        `directory` holds anything else. Other errors as in `clip.export`.
        """
        path = Path(directory).resolve()
        with new_folder(path) as fresh:
            for name in self.members:
                getattr(self, name).save(fresh / name, config, tokenizer=tokenizer)
            self.write(fresh / ENSEMBLE_FILE)
            _check_replaceable(path, fresh)
        return Path(directory)

    def write(self, path: Path) -> None:
        """Writes what this holds beside its members, as `files.save_fitted` does, under its `kind`."""
        save_fitted(path, self.kind, {name: getattr(self, name) for name in self.settings}, {})

    @classmethod
    def read(cls, path: Path, members: Mapping[str, Predictor]) -> Composite:
        """What `write` wrote, with its members."""
        settings, _ = load_fitted(path, cls.kind)
        return cls(**members, **settings)

    @classmethod
    def restore(cls, directory: Path, device: torch.device | str, dtype: torch.dtype) -> Composite:
        """What `save` wrote; classifiers of one encoder share it, and its pass, again."""
        path = directory / ENSEMBLE_FILE
        members = {name: load_predictor(directory / name, device=device, dtype=dtype) for name in cls.members}
        encoders: dict[str, torch.nn.Module] = {}
        for member in members.values():
            if isinstance(member, FeaturePredictor):
                member.model = encoders.setdefault(clip.fingerprint(member.model), member.model)
        with refusing(path, cls.kind):
            return cls.read(path, members)


def _check_replaceable(directory: Path, fresh: Path) -> None:
    """FileExistsError where `directory` holds what is in no ensemble like the `fresh` one."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is a file: choose another directory")
    known = {path.relative_to(fresh) for path in fresh.rglob("*")}
    held = sorted(path.relative_to(directory) for path in directory.rglob("*"))
    other = [str(path) for path in held if path not in known and path.name not in COMPANIONS]
    if other:
        raise FileExistsError(f"{directory} holds {other[:3]}, which no ensemble does: choose another directory")
