"""Exporting: a model as a directory that open_clip itself loads, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from robustft.clip.adapter_files import ADAPTER_FILE, digest, write_adapters
from robustft.clip.adapters import base, has_adapters
from robustft.clip.adapters import merged as merge
from robustft.clip.computation import check_same_computation
from robustft.clip.encoding import unwrap
from robustft.clip.loading import CLASSIFIER_FILE, COMPANIONS, CONFIG_FILE, WEIGHTS_FILE, build_on_meta, found_by
from robustft.clip.messages import few
from robustft.clip.prompts import Tokenizer
from robustft.files import new_folder, write_json, write_tensors, write_text
from robustft.ops.kinds import checked

CARD_FILE = "README.md"
PREPROCESSING = ("size", "interpolation", "resize_mode")
"""Beside mean and std, which `check_same_computation` compares."""


@checked
def export(
    model: nn.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    classifier: Callable[[Path], object] | None = None,
    merged: bool = False,
) -> Path:
    """Writes a directory that `open_clip.create_model_and_transforms("local-dir:...")` loads bit for bit.

    config: a `Bundle`'s, describing this model. tokenizer: needed only where it is a Hugging Face one (the
    configuration names it), whose files are then written too. card: text of README.md; None writes a short
    one. classifier: writes the file classifier.safetensors, as `Classifier.save` asks for it; None for none.

    Of a model with adapters, the adapters are written, as peft writes them, with what finds the weights below them
    (`robustft.clip.adapter_files`): these too, unless `config` has a source of which they can be loaded again.
    `robustft.clip.load` reads such a directory, open_clip does not. merged: write the merged weights instead.

    The directory is built beside its place and then renamed, so that it is whole or not there. An earlier
    export is replaced, with its classifier, detector and calibrator. Raises FileExistsError when `directory` holds
    anything else, ValueError when `config` is incomplete, describes a model of other weights (one with adapters, say),
    or one that computes something else with them. Memory: one copy of the weights on the CPU.
    """
    if not all(isinstance(config.get(key), Mapping) for key in ("model_cfg", "preprocess_cfg")):
        raise ValueError(f"config: expected the mappings 'model_cfg' and 'preprocess_cfg', got {config!r:.80}")
    source, config = config.get("source"), {key: value for key, value in config.items() if key != "source"}
    model = merge(model) if merged else unwrap(model)
    below = base(model)
    check_described(below, config)
    directory = Path(directory).resolve()
    with new_folder(directory) as fresh:
        write_json(fresh / CONFIG_FILE, config, indent=2)
        write_text(fresh / CARD_FILE, _card(directory.name, model) if card is None else card)
        if classifier is not None:
            classifier(fresh / CLASSIFIER_FILE)
        if callable(save := getattr(tokenizer, "save_pretrained", None)):
            save(fresh)
        _check_replaceable(directory, {path.name for path in fresh.iterdir()} | {WEIGHTS_FILE} | COMPANIONS)
        if has_adapters(model):
            weights = digest(below.state_dict())
            found = None if source is None else found_by(source, config, weights)
            kept = found is not None and directory not in found.resolve().parents  # and not about to be replaced
            write_adapters(model, fresh, source if kept else None, weights)
            if kept:
                return directory
        write_tensors(fresh / WEIGHTS_FILE, below.state_dict(), {"format": "pt"})
    return directory


def check_described(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the model that `config` builds has the weights of `model` and computes with them what
    it does. A text tower of Hugging Face's is not checked: building it may need the network."""
    if "hf_model_name" in config["model_cfg"].get("text_cfg", {}):
        return
    described = build_on_meta(config)
    ours, theirs = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model, described))
    differences = (
        few([key for key in ours if key not in theirs], "keys of the model unknown to it"),
        few([key for key in theirs if key not in ours], "keys that the model lacks"),
        few(
            [f"{key} {shape}, described as {theirs[key]}" for key, shape in ours.items() if theirs.get(key) != shape],
            "other shapes",
        )
        if ours.keys() == theirs.keys()
        else "",
    )
    if any(differences):
        cure = "; merge its adapters first: model.merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise ValueError(f"config: describes another model: {'; '.join(filter(None, differences))}{cure}")
    check_same_computation(model, described, "the model", "its config")
    stated, given = getattr(model.visual, "preprocess_cfg", None) or {}, config["preprocess_cfg"]
    differing = [
        f"{key} is {stated[key]!r} and {given[key]!r}"
        for key in PREPROCESSING
        if key in stated and key in given and _square(stated[key]) != _square(given[key])
    ]
    if differing:
        raise ValueError(f"the model and its config prepare images in two ways: {few(differing, 'settings')}")


def _square(value: Any) -> Any:
    """A side as height and width."""
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list) else value


def _check_replaceable(directory: Path, names: set[str]) -> None:
    """Raises FileExistsError unless `directory` is absent, empty, or an export of no files but `names`."""
    if not directory.exists():
        return
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    if held and (held - names or CONFIG_FILE not in held or not held & {WEIGHTS_FILE, ADAPTER_FILE}):
        raise FileExistsError(
            f"{directory}: holds something other than an earlier export: "
            f"{few(sorted(held), 'files')}; choose another directory or empty it"
        )


def _card(name: str, model: nn.Module) -> str:
    if has_adapters(model):
        return f"""---
library_name: peft
pipeline_tag: zero-shot-image-classification
---
# {name}

Adapters of a CLIP model, {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters, exported by
robustft. base.json says where the weights below them are.

```python
from robustft import clip

bundle = clip.load("local-dir:path/to/{name}")
clip.export(bundle.model, "path/to/merged", bundle.config, merged=True)  # a folder that open_clip loads
```
"""
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
---
# {name}

A CLIP model of {sum(parameter.numel() for parameter in model.parameters()):,} parameters, exported by
robustft.

```python
import open_clip

model, train_transform, eval_transform = open_clip.create_model_and_transforms("local-dir:path/to/{name}")
tokenizer = open_clip.get_tokenizer("local-dir:path/to/{name}")
```
"""
