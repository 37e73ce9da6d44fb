"""Loading open_clip models: by name, from the hub, or from a directory, without ever opening a pickle."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustft.clip.library import import_open_clip
from robustft.clip.messages import few
from robustft.clip.prompts import Tokenizer
from robustft.files import CALIBRATOR_FILE, DETECTOR_FILE, read_json, write_json

CONFIG_FILE = "open_clip_config.json"


WEIGHTS_FILE = "open_clip_model.safetensors"


CLASSIFIER_FILE = "classifier.safetensors"  # the head of a `methods.Classifier`; open_clip does not look at it


COMPANIONS = {CLASSIFIER_FILE, DETECTOR_FILE, CALIBRATOR_FILE}  # beside the weights, and replaced with them


class Bundle(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    config: dict[str, Any]  # {"model_cfg": ..., "preprocess_cfg": ...}, as in open_clip_config.json


def load(
    name: str,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> Bundle:
    """An open_clip model in evaluation mode, with its tokenizer, transforms and configuration.

    name: an architecture ("ViT-B-32"), "hf-hub:org/repo" or "local-dir:/path".
    pretrained: one of an architecture's pretrained tags, or, for any name, a checkpoint file: safetensors, or
    a state dict (or open_clip training checkpoint) saved by torch. None means random weights for an
    architecture, and the weights stored there for the other names.

    A tag trained with QuickGELU builds QuickGELU whatever the name says, and `config` says what was built; a
    file does not tell, so fine-tunes of OpenAI's weights need the "-quickgelu" name. The network is used only
    for `hf-hub:` names, tags, and architectures whose text tower or tokenizer lives on the hub.

    Raises ValueError for an unknown name or tag and for a checkpoint that is truncated, pickled, or of
    another architecture; FileNotFoundError for a missing file; ImportError when open_clip is not installed.
    """
    open_clip = import_open_clip()
    config, checkpoint = _resolve(open_clip, name, pretrained, None if cache_dir is None else str(cache_dir))
    with tempfile.TemporaryDirectory() as folder, _without_random_weights_warning():
        # Building from the written configuration is the way an export is loaded, hence the same model.
        write_json(Path(folder) / CONFIG_FILE, config)
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False
        )
    config["preprocess_cfg"] = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    if checkpoint is not None:
        _load_weights(open_clip, model, checkpoint)
    tokenizer_name = name if ":" in name else name.replace("/", "-")
    tokenizer = open_clip.get_tokenizer(tokenizer_name, cache_dir=cache_dir)
    model = model.to(device=device, dtype=dtype).eval()
    return Bundle(model, tokenizer, train_transform, eval_transform, config)


def _resolve(
    open_clip: ModuleType, name: str, pretrained: str | Path | None, cache_dir: str | None
) -> tuple[dict[str, Any], Path | None]:
    """The configuration of a named model and the file with its weights (None: random)."""
    from open_clip.pretrained import download_pretrained_from_hf
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        config = _read_config(Path(place) / CONFIG_FILE)
        return config, _existing(pretrained) if pretrained else _weights_in(Path(place))
    if scheme == "hf-hub":
        download = functools.partial(download_pretrained_from_hf, place, cache_dir=cache_dir)
        config = _read_config(Path(download(filename=CONFIG_FILE)))
        return config, _existing(pretrained) if pretrained else Path(download())

    architecture = name.replace("/", "-")
    known = {known.lower(): known for known in open_clip.list_models()}
    if architecture not in known.values():
        close = difflib.get_close_matches(architecture.lower(), known, n=3)
        hint = f"did you mean {' or '.join(known[match] for match in close)}?" if close else "see list_models()"
        if Path(name).is_dir():
            hint = f"for a directory write 'local-dir:{name}'"
        raise ValueError(f"name: open_clip has no architecture {name!r}; {hint}")
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    if not pretrained:
        return config, None
    tag = open_clip.get_pretrained_cfg(architecture, str(pretrained))
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        return config, _existing(pretrained, f"no tag of {architecture}, which has {tags}")
    if tag.get("quick_gelu"):
        config["model_cfg"]["quick_gelu"] = True
    config["preprocess_cfg"] = merge_preprocess_dict(PreprocessCfg(), tag)
    return config, Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))


def _existing(path: str | Path, otherwise: str = "") -> Path:
    path = Path(path)
    if path.is_file():
        return path
    message = f"pretrained: {str(path)!r} is no file" + (f" and {otherwise}" if otherwise else "")
    # A bare word was meant as a tag, anything with a suffix or a folder as a file.
    raise (FileNotFoundError if path.suffix or len(path.parts) > 1 or not otherwise else ValueError)(message)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an open_clip model directory holds {CONFIG_FILE}")
    config = read_json(path, "an object with 'model_cfg'")
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path}: expected an object with 'model_cfg'")
    preprocessing = config.get("preprocess_cfg", {})
    if not isinstance(preprocessing, dict):
        raise ValueError(f"{path}: preprocess_cfg is {preprocessing!r:.80}; expected an object")
    return {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocessing}


def _weights_in(folder: Path) -> Path:
    def rank(path: Path) -> tuple[bool, bool, str]:
        return path.suffix != ".safetensors", "open_clip" not in path.name, path.name

    suffixes = {".safetensors", ".bin", ".pt", ".pth"}
    found = [path for path in folder.iterdir() if path.suffix in suffixes and path.name not in COMPANIONS]
    if not found:
        raise FileNotFoundError(f"{folder}: no weights; expected {WEIGHTS_FILE}")
    return min(found, key=rank)


def _load_weights(open_clip: ModuleType, model: nn.Module, path: Path) -> None:
    """Loads every weight of `model` from `path`, or raises ValueError; open_clip converts older layouts."""
    try:
        # strict=False returns the keys that do not match, which make a shorter message than its own.
        incompatible = open_clip.load_checkpoint(model, str(path), strict=False, weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in text:
            raise ValueError(
                f"{path}: not a plain state dict. Pickled modules and TorchScript archives can run code when "
                "opened and are refused. If you trust the file, convert it once: torch.save(torch.load(path, "
                "weights_only=False).state_dict(), 'weights.pt'), with torch.jit.load(path) for an archive"
            ) from error
        if "size mismatch" in text:
            lines = [line.strip() for line in text.splitlines() if "size mismatch" in line]
            raise ValueError(f"{path}: does not fit the model: {few(lines, 'mismatched shapes')}") from error
        raise ValueError(f"{path}: truncated, or no checkpoint of this model: {error!r:.300}") from error
    if incompatible and (incompatible.missing_keys or incompatible.unexpected_keys):
        keys = (
            few(incompatible.missing_keys, "keys missing from the file"),
            few(incompatible.unexpected_keys, "keys unknown to the model"),
        )
        raise ValueError(f"{path}: does not fit the model: {'; '.join(filter(None, keys))}")


@contextlib.contextmanager
def _without_random_weights_warning() -> Iterator[None]:
    """Hides open_clip's warnings that a model has no weights yet: they come after it is built."""

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not message.startswith(("No pretrained weights loaded", "Local config loaded, but no CLIP"))

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
