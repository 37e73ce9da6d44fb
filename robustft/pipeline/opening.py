"""From what somebody asked for, paths and names, to the model and the data that a run is made of."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustft import clip
from robustft.clip import prompts
from robustft.clip.loading import named_folder
from robustft.data.checking import no_word
from robustft.data.classes import few
from robustft.data.families import imagenet_names, imagenet_synsets
from robustft.data.opening import Data
from robustft.data.opening import open as open_data
from robustft.data.table import Columns
from robustft.files import read_json
from robustft.methods.tuning import check_tune
from robustft.pipeline.job import to_device
from robustft.pipeline.recipes import NEEDS, Recipe
from robustft.pipeline.training import Materials, method_class, number_of_groups

NOT_OF_THE_RUN = (
    "data",
    "output",
    "resume",
    "dry_run",
    "progress",
    "log",
    "workers",
    "cache",
    "accumulate",
    "compile",
    "compile_mode",
    "process_timeout",
)
"""Arguments of `train` that may change when a run is resumed; the data are told by what was found."""
TEMPLATES = {"photo": "SIMPLE_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES", "imagenet": "IMAGENET_TEMPLATES"}
_WITH_SYNSET = re.compile(r" \(n\d{8}\)$")  # of names that two classes of ImageNet share


def open_materials(arguments: Mapping[str, Any], log: Callable[[str], None]) -> Materials:
    """The data and the model of `train`'s arguments, and what captions say; errors name the argument."""
    check_pretrained(arguments["model"], arguments["pretrained"])
    data = open_sets(arguments)
    if data.train is None:
        raise ValueError(f"{arguments['data']}: no images to train on; it holds {', '.join(data.sets()) or 'nothing'}")
    if not data.classes:
        raise ValueError(f"{arguments['data']}: no labels; a classifier needs classes, captions alone do not name any")
    log(data.describe())
    spoken = spoken_names(data.classes, log)
    descriptions = arguments["descriptions"]
    described = None if descriptions is None else prompts.read_descriptions(descriptions, data.classes)
    captions = read_templates(arguments["templates"])
    bundle = clip.load(arguments["model"], arguments["pretrained"])
    to_device(bundle, arguments["device"])
    materials = Materials.of(bundle, data, captions, descriptions=described, seed=arguments["seed"])
    cache = None if arguments["cache"] is None else Path(arguments["cache"])
    return replace(materials, prompts={**materials.prompts, "class_names": spoken}, cache=cache)


def open_sets(arguments: Mapping[str, Any]) -> Data:
    """The data of `train`'s arguments, as `robustft.data.open` finds them."""
    data = open_data(
        arguments["data"],
        validation=arguments["validation"],
        test=arguments["test"],
        shots=arguments["shots"],
        seed=arguments["seed"],
        on_error=arguments["on_bad_image"],
        **places(arguments),
    )
    workers = arguments["workers"]
    return data if workers is None else data.map(lambda part: read_by(part, workers))


def places(where: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `robustft.data.open` that say where images are, from `ImageSets` or `TrainingSets`.

    Of the first, which name neither, captions and groups are not read.
    """
    columns = Columns(
        image=where["csv_img_key"],
        caption=where.get("csv_caption_key", ""),
        label=where["csv_label_key"],
        split=where["csv_split_key"],
        groups=tuple(where.get("groups", ())),
        separator=where["csv_separator"],
    )
    names = read_names(where["class_names"])
    return {name: where[name] for name in ("shifts", "ood", "images")} | {"class_names": names, "columns": columns}


def read_by(data: Any, workers: int) -> Any:
    """A data set that is read by so many processes, if it is of files."""
    return replace(data, workers=workers) if hasattr(data, "workers") else data


def check_pretrained(model: str, pretrained: Any) -> None:
    """ValueError for an architecture without weights: a random model has nothing to start from."""
    if pretrained is None and ":" not in named_folder(model):
        tags = clip.import_open_clip().list_pretrained_tags_by_model(model.replace("/", "-"))
        raise ValueError(
            f"pretrained is missing: without it {model} has random weights. Give one of its tags "
            f"({', '.join(tags) or 'it has none'}) or a file of weights"
        )


def check_needs(recipes: Mapping[str, Recipe], materials: Materials) -> None:
    """ValueError where a method asks for more than the data have, before anything is trained."""
    for name, recipe in recipes.items():
        check_tune(recipe.options.get("tune"), recipe.options.get("lora"), method_class(recipe))
        missing = {
            "DRM": materials.descriptions is None,
            "StarFT": "spurious" not in recipe.options,
            "CARFT": "contexts" not in recipe.options and len(materials.prompts["templates"]) < 2,
        }
        if missing.get(recipe.method):
            raise ValueError(f"{name} needs {NEEDS[recipe.method]}")
        risk = recipe.options.get("risk", {})
        if isinstance(risk, Mapping) and risk.get("risk") in NEEDS and "num_groups" not in risk:
            number_of_groups(materials.data.train)


def read_names(class_names: Any) -> Any:
    """Class names as `robustft.data.open` takes them: of a file, of "imagenet", or as they are given."""
    if class_names == "imagenet":
        return _imagenet_labels()
    if not isinstance(class_names, (str, os.PathLike)):
        return class_names
    if class_names == "":
        raise ValueError("class_names is an empty string; expected a file, or names")
    path = Path(class_names)
    if path.suffix.lower() == ".json":
        found = read_json(path, "class names: a list of them, or an object {folder: name}")
        if isinstance(found, dict) and all(isinstance(value, str) for value in found.values()):
            return found
    return prompts.read_class_names(path)


def _imagenet_labels() -> dict[str, str]:
    """ImageNet's names by synset and by number; of those that two classes share, with the synset behind."""
    synsets, names = imagenet_synsets(), imagenet_names()
    count = Counter(names)
    labels = [name if count[name] == 1 else f"{name} ({synset})" for synset, name in zip(synsets, names, strict=True)]
    return dict(zip(synsets, labels, strict=True)) | {str(place): label for place, label in enumerate(labels)}


def read_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates by the name of a set, from a file, or as they are given."""
    if not isinstance(templates, (str, os.PathLike)):
        return tuple(templates)
    if str(templates) in TEMPLATES:
        found: tuple[str, ...] = getattr(prompts, TEMPLATES[str(templates)])
        return found
    if not Path(templates).is_file():
        raise FileNotFoundError(f"templates: {templates!r} is no file and none of {', '.join(TEMPLATES)}")
    return prompts.read_templates(templates)


def spoken_names(classes: Sequence[str], log: Callable[[str], None]) -> Any:
    """The classes, or {class: what captions call it} where their names have underscores for spaces."""
    if strange := [name for name in classes if no_word(name)]:
        log(
            f"warning: {few(strange)} are no words, of which captions could be made: say what they are called by "
            "--class-names"
        )
    spoken = {name: " ".join(name.replace("_", " ").split()) or name for name in classes}
    if len(set(spoken.values())) < len(spoken):
        spoken = {name: name for name in classes}
    spoken = {name: _WITH_SYNSET.sub("", word) for name, word in spoken.items()}
    if all(name == word for name, word in spoken.items()):
        return tuple(classes)
    changed = [word for name, word in spoken.items() if word != _WITH_SYNSET.sub("", name)]
    if changed:
        log(f"captions say {few(changed)}, with spaces for underscores")
    return spoken


def config_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What config.yaml keeps of the arguments: all that says what the run computes, in types that YAML has."""
    data = arguments["data"]
    told = {"data": list(data.understood) if isinstance(data, Data) else os.path.abspath(data)}
    kept = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_RUN}
    return {**told, **{name: _plain(value) for name, value in kept.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
