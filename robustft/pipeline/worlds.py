"""The bundled benchmarks that `robustft quickstart` and `robustft study` run on, by name, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from robustft.data import glyphworld, iconworld
from robustft.data.iconworld.packages import SEEN
from robustft.pipeline.recipes import WORLDS, Recipe

if TYPE_CHECKING:
    from robustft.clip import Bundle
    from robustft.data.images import ImageDataset
    from robustft.data.opening import Data


TOWERS: Mapping[str, str] = {
    **{method: method for method in ("FineTune", "LPFT", "FLYP", "CaRot", "DRM", "WorstCaseFineTune")},
    **dict.fromkeys(("LipsumFT", "CARFT"), "FineTune"),
    "StarFT": "FLYP",
}
"""Methods that train the image tower, each with the one whose factor of the learning rate it takes: its own, or that of
the method to which it adds a term."""


def rate_of(recipe: Recipe) -> str:
    """The name under which a benchmark has a factor of the recipe's learning rate: a worst-case risk has its own. Empty
    where no image tower is trained."""
    risk: str = recipe.options.get("risk", {}).get("risk", "")
    return risk or TOWERS.get(recipe.method, "")


@dataclass(frozen=True)
class Benchmark:
    """A bundled benchmark: a module with `load_clip`, `sets`, `spurious`, CLASS_NAMES, TEMPLATES, and words about it.

    `descriptions` of the classes are DRM's; the templates `by_chance`, which put a class where it is by chance, are
    StarFT's, and `contexts` that the model tells apart CAR-FT's, or none where it tells `templates` apart; `near` and
    `far` are OOD sets, and `further` those beside `far` that are far, too; `usual` gives the group, of `spurious`, that
    goes with each label, and `misleading` says what the group is. `seen` are the shifts that the model knows from its
    pre-training, which has not seen the others. `adjectives` and `superclasses` make negative texts (CSP), none of
    which names an OOD set. `concepts` says whether there is a task of many classes and few images. `tested` is the
    number of ID test images, `noise_floor` that of an ECE on them, in %.

    Recipes are the digits'. Of them the image towers here have `rates` of the learning rates, by `rate_of`, and
    `epochs` of the epochs, which makes `steps` of a fine-tuning; few-shot recipes have as many steps as there, so
    `few_shot_epochs` of the epochs. Where colours mislead, image towers have `misled_rates`: a model that does not know
    the frames has more to learn. `chosen` says how rates were, `looked_at` at what the soups were found; `lambdas`
    are those of DRM that are tried; `tells` says whether ID validation accuracy tells trained models apart.
    """

    name: str
    title: str
    module: ModuleType
    shown: str
    toy: str
    measured: str
    descriptions: Mapping[str, Sequence[str]]
    by_chance: tuple[str, ...]
    near: str
    far: str
    near_is: str
    far_is: str
    misleads: str
    misleading: str
    usual: Callable[[Tensor], Tensor]
    tested: int
    noise_floor: int
    chosen: str
    looked_at: str
    lambdas: tuple[float, ...]
    contexts: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    adjectives: tuple[str, ...] = ()
    superclasses: tuple[str, ...] = ()
    pretrains: bool = False
    concepts: bool = False
    tells: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    misled_rates: Mapping[str, float] = field(default_factory=dict)
    epochs: float = 1.0
    steps: int = 70

    @property
    def class_names(self) -> tuple[str, ...]:
        names: tuple[str, ...] = self.module.CLASS_NAMES
        return names

    @property
    def templates(self) -> tuple[str, ...]:
        templates: tuple[str, ...] = self.module.TEMPLATES
        return templates

    @property
    def few_shot_epochs(self) -> float:
        """The share of a few-shot recipe's epochs that has as many steps as it has with the digits' ten classes."""
        return len(glyphworld.CLASS_NAMES) / len(self.class_names)

    def recipe(self, recipe: Recipe, *, few_shot: bool = False, misled: bool = False) -> Recipe:
        """A recipe as it is for this benchmark's model and data, or those of few images or of misleading colours."""
        name = rate_of(recipe)
        share = self.few_shot_epochs if few_shot else self.epochs if name else 1.0
        rate = (self.misled_rates if misled else self.rates).get(name, 1.0)
        return replace(recipe, lr=recipe.lr * rate, epochs=max(1, round(recipe.epochs * share)))

    def load_clip(self, path: Path | None = None) -> Bundle:
        bundle: Bundle = self.module.load_clip(path)
        return bundle

    def sets(self, limit: int | None = None) -> Data:
        data: Data = self.module.sets(limit)
        return data

    def spurious(self, split: str, *, conflicting: bool = False) -> ImageDataset:
        data: ImageDataset = self.module.spurious(split, conflicting=conflicting)
        return data


_DRAWN = ("a black {}", "a white {}", "a red {}", "a blue {}", "a {} in a circle", "a {} in a square")
_BENCHMARKS = (
    Benchmark(
        name="digits",
        title="GlyphWorld",
        module=glyphworld,
        shown="digits",
        toy="a tiny CLIP pre-trained on synthetic glyphs, fine-tuned on 8 x 8 handwritten digits",
        measured="OOD columns are means over the six shifts, AUROC is MCM's mean over letters and textures",
        descriptions=glyphworld.CONCEPTS,
        by_chance=(
            *(f"{{}} in {colour}" for colour in glyphworld.COLOURS),
            *(f"{{}} on a {kind} background" for kind in glyphworld.BACKGROUNDS),
        ),
        near="letters",
        far="textures",
        near_is="Letters in the style of the digits: near.",
        far_is="Textures without any character: far.",
        misleads="The ground's colour goes with the class for 97 % of the training and validation images",
        misleading="background",
        usual=lambda labels: labels // 2,
        tested=500,
        noise_floor=3,
        chosen="and so were all learning rates, once for all seeds (`python -m benchmarks.study_selection`)",
        looked_at="seed 0's test sets: seeds 1 and 2 are their test",
        lambdas=(0.25, 0.5, 1.0, 2.0, 4.0),
        pretrains=True,
    ),
    Benchmark(
        name="icons",
        title="IconWorld",
        module=iconworld,
        shown="drawings",
        toy="a small CLIP pre-trained on free icons, fine-tuned on emoji of two studios and tested on those of others",
        measured="OOD columns are means over the eight other studios, AUROC is MCM's mean over the four OOD sets; of "
        "classes with fewer images than shots, all are taken",
        descriptions=iconworld.DESCRIPTIONS,
        by_chance=_DRAWN,
        contexts=_DRAWN,  # its templates' captions have cosines above .999
        near="held-out kinds",
        far="symbols",
        near_is="Emoji of held-out kinds by the ID studios: near.",
        far_is="Interface symbols: far.",
        misleads="The frame's colour goes with the class for 95 % of the training and validation images",
        misleading="frame",
        usual=lambda labels: labels % len(iconworld.FRAME_COLOURS),
        tested=690,
        noise_floor=4,
        chosen="and so were the factors of the image towers' learning rates, once for all seeds (`python -m "
        "benchmarks.iconworld_selection`), which otherwise are the digits'",
        looked_at="GlyphWorld's test sets, and this benchmark is their test",
        lambdas=(0.5, 1.0, 2.0),
        seen=tuple(studio for studio in iconworld.SHIFTS if studio in SEEN),
        further=("letters", "flags"),
        adjectives=iconworld.ADJECTIVES,
        superclasses=iconworld.SUPERCLASSES,
        concepts=True,
        tells=True,
        rates={"FineTune": 0.1, "LPFT": 0.03, "FLYP": 0.03, "CaRot": 0.03, "DRM": 0.1},
        misled_rates={"FineTune": 1.0, "GroupDRO": 1.0, "WorstGroup": 1.0, "CVaR": 0.1, "FLYP": 3.0, "DRM": 1.0},
        epochs=0.3,
        steps=24,
    ),
)


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name; ValueError naming those there are."""
    found = {known.name: known for known in _BENCHMARKS}
    if name not in found:
        raise ValueError(f"world must be one of {', '.join(WORLDS)}, got {name!r}")
    return found[name]
