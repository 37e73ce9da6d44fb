"""Loading open_clip models: by name, from the hub, or from a directory, without ever opening a pickle."""

from __future__ import annotations

import contextlib
import copy
import difflib
import errno
import functools
import importlib.util
import json
import logging
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robustft.clip.adapter_files import BASE_FILE, check_base, digest, holds_adapters, put_adapters, read_base
from robustft.clip.adapter_files import FILES as ADAPTER_FILES
from robustft.clip.from_transformers import THEIR_CONFIG, is_transformers, read_settings, read_weights, register
from robustft.clip.library import import_open_clip
from robustft.clip.messages import few
from robustft.clip.prompts import Tokenizer
from robustft.files import COMPANIONS as FITTED
from robustft.files import read_json, write_json
from robustft.ops.kinds import checked

CONFIG_FILE = "open_clip_config.json"


WEIGHTS_FILE = "open_clip_model.safetensors"


CLASSIFIER_FILE = "classifier.safetensors"  # the head of a `methods.Classifier`; open_clip does not look at it


COMPANIONS = {CLASSIFIER_FILE, *FITTED, *ADAPTER_FILES}  # beside the weights, and replaced with them


class Bundle(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    # {"model_cfg": ..., "preprocess_cfg": ...} as in open_clip_config.json, and "source": what `load` found it by
    config: dict[str, Any]


@checked
def load(
    name: str,
    pretrained: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Bundle:
    """An open_clip model in evaluation mode, with its tokenizer, transforms and configuration.

    name: an architecture ("ViT-B-32"), "hf-hub:org/repo" or "local-dir:/path"; or the path of a folder, or of its
        config.json, that transformers' CLIPModel or SiglipModel saved.
    pretrained: one of an architecture's pretrained tags, or, for any name, a checkpoint file: safetensors, or
    a state dict (or open_clip training checkpoint) saved by torch. None means random weights for an
    architecture, and the weights stored there for the other names.

    A tag trained with QuickGELU builds QuickGELU whatever the name says, and `config` says what was built; a
    file does not tell, so fine-tunes of OpenAI's weights need the "-quickgelu" name. The network is used only
    for `hf-hub:` names, tags, and architectures whose text tower or tokenizer lives on the hub.

    image_size: of other images than the model was trained on, a side or (height, width), as open_clip's
    `force_image_size`: positions are interpolated. `config` says it, so that exports come back with it, by robustft;
    open_clip itself cannot load the export of a timm tower that was resized. Adapters of a folder go with any size; the
    weights below them are loaded twice then, for their checksum is that of the size that they were trained at.

    Raises ValueError for an unknown name or tag, for an image_size that the tower cannot have, and for a checkpoint
    that is truncated, pickled, or of another architecture; FileNotFoundError for a missing file; ImportError, naming
    the extra, when open_clip, or what a text tower or its tokenizer needs, is not installed.
    """
    name = named_folder(name)
    place = None if cache_dir is None else str(cache_dir)
    if ":" not in name and (listed := import_open_clip().get_model_config(name.replace("/", "-"))):
        _check_installed(name, {"model_cfg": listed}, _PARTS)  # before weights are fetched
    model, transforms, config = _load_model(name, pretrained, device, dtype, place, image_size)
    tokenizer_name = name if ":" in name else name.replace("/", "-")
    with _naming_config(name) if name.startswith("local-dir:") else contextlib.nullcontext():
        tokenizer = _tokenizer(tokenizer_name, config, cache_dir)
    return Bundle(model, tokenizer, *transforms, config)


def load_model(directory: str | Path, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The model alone of an exported directory, as `load` gives it: a tokenizer takes longer than a small model."""
    return _load_model(f"local-dir:{directory}", None, device, dtype, None)[0]


def named_folder(name: str) -> str:
    """The name, or of a folder that transformers saved, or its configuration, "local-dir:" and the folder."""
    place = Path(name.removeprefix("local-dir:"))
    folder = place.parent if place.name == THEIR_CONFIG else place
    return f"local-dir:{folder}" if is_transformers(folder) else name


def _load_model(
    name: str,
    pretrained: str | Path | None,
    device: torch.device | str,
    dtype: torch.dtype,
    cache_dir: str | None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[nn.Module, tuple[Any, Any], dict[str, Any]]:
    """The model, its transforms for training and evaluation, and its configuration."""
    open_clip = import_open_clip()
    config, checkpoint = _resolve(open_clip, name, pretrained, cache_dir)
    directory = name.startswith("local-dir:")
    _check_installed(name, config, _PARTS[:1])
    if image_size is not None:
        _check_image_size(image_size, config)
    with _naming_config(name) if directory else contextlib.nullcontext():
        if directory and checkpoint is not None and not is_transformers(checkpoint):
            _check_size(config, checkpoint)
        of_timm = "timm_model_name" in config["model_cfg"]["vision_cfg"]
        if image_size is not None and not of_timm:
            config["model_cfg"]["vision_cfg"]["image_size"] = image_size
        model, train_transform, eval_transform = _built(open_clip, config, resized=directory)
        made_for, vision = _trunk_size(model), config["model_cfg"]["vision_cfg"]
        if not directory and made_for not in (None, _sides(vision.get("image_size", made_for))):
            # One of open_clip's, ViTamin-XL-384, states another, and then fails on the images that it asks for.
            vision["image_size"] = made_for
            model, train_transform, eval_transform = _built(open_clip, config)
    config["preprocess_cfg"] = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    if checkpoint is not None:
        _load_weights(open_clip, model, checkpoint)
    if image_size is not None and of_timm:  # whose weights fit the size that they were trained at
        config = _resized(model, config, image_size)
        train_transform, eval_transform = (_transform(config["preprocess_cfg"], train) for train in (True, False))
        open_clip.set_model_preprocess_cfg(model, config["preprocess_cfg"])
    if checkpoint is not None:
        config["source"] = _source(name, pretrained)
    if directory and holds_adapters(folder := Path(name.partition(":")[2])):
        config["source"] = read_base(folder)["source"]
        if image_size is None:
            check_base(model, folder)
        else:  # the weights below have other positions now: they are looked at in their own size
            _load_model(name, pretrained, "cpu", torch.float32, cache_dir)
        model = put_adapters(model, folder)
    move(model, device, dtype)
    return model.eval(), (train_transform, eval_transform), config


def build(config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a configuration describes, with random weights, in evaluation mode; and the configuration, with
    the preparation of images that it then has."""
    open_clip = import_open_clip()
    model = _built(open_clip, config)[0].eval()
    prepared = json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model)))
    return model, {"model_cfg": copy.deepcopy(config["model_cfg"]), "preprocess_cfg": prepared}


_PARTS = ("hf_model_name", "text tower"), ("hf_tokenizer_name", "tokenizer")
"""Entries of text_cfg that ask for transformers, and for what."""
_IN_THE_EXTRA = ("sentencepiece", "protobuf", "google", "tokenizers", "transformers")


def _check_installed(name: str, config: Mapping[str, Any], parts: Sequence[tuple[str, str]]) -> None:
    """ImportError, before anything is built, where what a configuration asks for has no library."""
    asked = [part for key, part in parts if (config["model_cfg"].get("text_cfg") or {}).get(key)]
    if asked and importlib.util.find_spec("transformers") is None:
        raise _missing(f"{name}: its {asked[0]} needs", "transformers")


def _missing(what: str, library: str) -> ImportError:
    package = "'robustft[transformers]'" if library in _IN_THE_EXTRA else library
    return ImportError(f"{what} {library}: pip install {package}", name=library)


MOST_PIXELS = 8192
"""Of a side: positions for more would take more memory than any tower."""


def _check_image_size(image_size: int | tuple[int, int], config: Mapping[str, Any]) -> None:
    sides = image_size if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size is {image_size!r}; expected a side, or (height, width), in pixels")
    vision = config["model_cfg"].get("vision_cfg", {})
    least = 1 if "timm_model_name" in vision else vision.get("patch_size") or 1
    if not least <= min(sides) <= max(sides) <= MOST_PIXELS:
        raise ValueError(f"image_size is {image_size!r}; expected {least} to {MOST_PIXELS} pixels a side")
    if isinstance(vision.get("layers"), list):
        raise ValueError(
            f"image_size is {image_size!r}, but the attention pool of a ModifiedResNet has positions for images of one "
            "size: leave it out"
        )


def _trunk_size(model: Any) -> tuple[int, int] | None:
    """(height, width) of the images that the trunk of a timm tower takes; None for any size, and for other towers."""
    patches = getattr(getattr(model.visual, "trunk", None), "patch_embed", None)
    size = getattr(patches, "img_size", None)
    return None if size is None else _sides(size)


def _sides(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return height, width


def _resized(model: Any, config: dict[str, Any], size: int | tuple[int, int]) -> dict[str, Any]:
    """Gives a timm tower another size of images, and returns the configuration that says so."""
    try:
        model.visual.set_input_size(size)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        kind = type(model.visual.trunk).__name__
        raise ValueError(f"image_size is {size!r}, which timm's {kind} cannot have: {error}") from error
    vision = {**config["model_cfg"]["vision_cfg"], "image_size": size}
    preprocessing = {**config["preprocess_cfg"], "size": list(_sides(size))}
    return {"model_cfg": {**config["model_cfg"], "vision_cfg": vision}, "preprocess_cfg": preprocessing}


def _transform(settings: Mapping[str, Any], is_train: bool) -> Callable[[Any], Tensor]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    size = settings.get("size")
    sized = {"size": tuple(size)} if isinstance(size, list) else {}
    transform: Callable[[Any], Tensor] = image_transform_v2(PreprocessCfg(**{**settings, **sized}), is_train=is_train)
    return transform


def _source(name: str, pretrained: str | Path | None) -> dict[str, str | None]:
    """What a model was found by; places on this machine as they are called from anywhere."""
    scheme, colon, place = name.partition(":")
    if scheme == "local-dir":
        name = f"{scheme}{colon}{Path(place).resolve()}"
    if pretrained is not None:
        pretrained = str(Path(pretrained).resolve() if Path(pretrained).is_file() else pretrained)
    return {"name": name, "pretrained": pretrained}


_TOKENIZERS: dict[tuple[str, str], Any] = {}
"""open_clip's own tokenizers, by what tells which; of a directory its configuration alone."""


def _tokenizer(name: str, config: Mapping[str, Any], cache_dir: str | Path | None) -> Tokenizer:
    open_clip = import_open_clip()
    folder = Path(name.removeprefix("local-dir:"))
    if is_transformers(folder):
        return _their_tokenizer(open_clip, folder, config["model_cfg"]["text_cfg"])
    told = "" if name.startswith("local-dir:") else name, json.dumps(config["model_cfg"].get("text_cfg"))
    if told not in _TOKENIZERS:
        try:
            found: Tokenizer = open_clip.get_tokenizer(name, cache_dir=cache_dir)
        except (ImportError, ValueError) as error:
            library = getattr(error, "name", None) or next((w for w in _IN_THE_EXTRA if w in str(error).lower()), None)
            if library is None:
                raise
            raise _missing(f"{name}: its tokenizer needs", library) from error
        if type(found) is not open_clip.SimpleTokenizer:  # others have files of their own
            return found
        _TOKENIZERS[told] = found
    return copy.copy(_TOKENIZERS[told])


def _their_tokenizer(open_clip: ModuleType, folder: Path, text: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a folder that transformers saved; open_clip's own, of its vocabulary, where no files are."""
    if text.get("hf_tokenizer_name"):
        found: Tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=text["context_length"])
        return found
    plain: Any = open_clip.SimpleTokenizer(context_length=text["context_length"])
    if plain.vocab_size != text["vocab_size"]:
        raise FileNotFoundError(
            f"{folder}: has no tokenizer's files, and its vocabulary of {text['vocab_size']} is not CLIP's"
        )
    found = plain
    return found


def move(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
    """Puts a module on a device; ValueError, naming it, for one that is not there or that holds no values."""
    if torch.device(device).type == "meta":
        raise ValueError(f"device is {device!r}, where a model has no weights")
    try:
        module.to(device=device, dtype=dtype)
    # torch's own: AssertionError where it was built without CUDA, NotImplementedError for "meta".
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device is {device!r}, where the model cannot be put: {error}") from error


@checked
def eval_transform(directory: str | Path) -> Callable[[Any], Tensor]:
    """The evaluation transform of an exported model, as `load` gives it, without loading the model."""
    import_open_clip()
    config = _read_config(Path(directory) / CONFIG_FILE)
    with _naming_config(f"local-dir:{directory}"):
        return _transform(config["preprocess_cfg"], is_train=False)


@contextlib.contextmanager
def _naming_config(name: str) -> Iterator[None]:
    """Around a model that is built from a directory's configuration: what that does not allow is told of its file."""
    try:
        yield
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever open_clip and torch raise for values of the wrong type, range or name
        path = Path(name.partition(":")[2]) / CONFIG_FILE
        raise ValueError(f"{path}: damaged, or open_clip builds no model from it: {error!r:.200}") from error


_MOST = {"layers": 1000}  # of blocks: each is built
_MOST_OTHERWISE = 1 << 22


def _check_size(config: Mapping[str, Any], weights: Path) -> None:
    """ValueError where the configured model has more parameters than a file of weights has bytes: before it is built,
    for one wrong digit makes it too large for any memory."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else ((name, inner) for inner in value):
                check(key, inner)
        elif isinstance(value, (int, float)) and not abs(value) <= _MOST.get(name, _MOST_OTHERWISE):
            raise ValueError(f"{name} is {value!r:.80}")

    check("model_cfg", config["model_cfg"])
    parameters = sum(p.numel() for p in build_on_meta(config).parameters())
    if weights.suffix not in (".npz", ".npy") and parameters > weights.stat().st_size:
        raise ValueError(f"its model has {parameters:,} parameters, {weights} {weights.stat().st_size:,} bytes")


def build_on_meta(config: Mapping[str, Any]) -> nn.Module:
    """The model that a configuration describes, without weights, and with no draw from torch's generator. It is kept,
    to be looked at only.

    ValueError where open_clip builds none from it."""
    try:
        return _on_meta(json.dumps(config))
    except (TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"config: open_clip builds no model from it: {error!r:.200}") from error


@functools.lru_cache(maxsize=8)
def _on_meta(told: str) -> nn.Module:
    config = json.loads(told)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _built(import_open_clip(), config, "meta")[0]
        except (NotImplementedError, RuntimeError):  # a tower that reads a number off a tensor while it is built
            return _built(import_open_clip(), config)[0].to("meta")


def _built(
    open_clip: ModuleType, config: Mapping[str, Any], device: str = "cpu", *, resized: bool = True
) -> tuple[nn.Module, Any, Any]:
    """The model that a configuration describes, with random weights, and its transforms.

    resized: a timm tower gets the size of images that the configuration states, whatever its trunk is made for."""
    register(config["model_cfg"].get("vision_cfg", {}).get("timm_model_name"))
    with tempfile.TemporaryDirectory() as folder, _without_random_weights_warning():
        # Building from the written configuration is the way an export is loaded, hence the same model.
        write_json(Path(folder) / CONFIG_FILE, config)
        model, train_transform, eval_transform = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=device
        )
    stated = config["model_cfg"]["vision_cfg"].get("image_size")
    if resized and stated is not None and _trunk_size(model) not in (None, _sides(stated)):
        model.visual.set_input_size(stated)  # open_clip does so only when it is asked to by force_image_size
    return model, train_transform, eval_transform


def _resolve(
    open_clip: ModuleType, name: str, pretrained: str | Path | None, cache_dir: str | None
) -> tuple[dict[str, Any], Path | None]:
    """The configuration of a named model and the file with its weights (None: random)."""
    from open_clip.pretrained import download_pretrained_from_hf
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    scheme, _, place = name.partition(":")
    if scheme == "local-dir":
        if is_transformers(Path(place)):
            return read_settings(Path(place)), _existing(pretrained) if pretrained else Path(place)
        config = _read_config(Path(place) / CONFIG_FILE)
        if not pretrained and holds_adapters(Path(place)):
            return config, _base_weights(open_clip, Path(place), cache_dir)
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
    quick = f"{architecture}-quickgelu"
    tag = open_clip.get_pretrained_cfg(architecture, str(pretrained))
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        path = _existing(pretrained, f"no tag of {architecture}, which has {tags}")
        if quick in known.values():
            # At this line, not the caller's, so that it is said once of each file.
            warnings.warn(
                f"{path} does not tell its activation: {architecture} is taken at its name, with GELU. Fine-tunes of "
                f"OpenAI's weights, and of other tags with QuickGELU, need the name {quick!r}",
                stacklevel=1,
            )
        return config, path
    if tag.get("quick_gelu"):
        config["model_cfg"]["quick_gelu"] = True
    config["preprocess_cfg"] = merge_preprocess_dict(PreprocessCfg(), tag)
    return config, Path(open_clip.download_pretrained(tag, cache_dir=cache_dir))


def _base_weights(open_clip: ModuleType, folder: Path, cache_dir: str | None) -> Path | None:
    """The file with the weights below a folder's adapters."""
    source = read_base(folder)["source"]
    if source is None:
        return _weights_in(folder)
    try:
        return _resolve(open_clip, source["name"], source.get("pretrained"), cache_dir)[1]
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder / BASE_FILE}: the weights below the adapters are not found by {source}: {error}. Write there "
            f"where they are now, or give them: robustft.clip.load('local-dir:{folder}', pretrained=FILE)"
        ) from error


def found_by(source: Mapping[str, Any], config: Mapping[str, Any], weights: str) -> Path | None:
    """The file that `load` finds by a source, if it holds the weights of this `digest`."""
    open_clip = import_open_clip()
    try:
        checkpoint = _resolve(open_clip, source["name"], source.get("pretrained"), None)[1]
        if checkpoint is None:
            return None
        model = _built(open_clip, config)[0]
        _load_weights(open_clip, model, checkpoint)
    except (OSError, ValueError, KeyError):
        return None
    return checkpoint if digest(model.state_dict()) == weights else None


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


# What a state dict of OpenAI's archives holds beside weights.
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}


def _load_weights(open_clip: ModuleType, model: nn.Module, path: Path) -> None:
    """Loads every weight of `model` from `path`, or raises ValueError; open_clip converts older layouts."""
    if is_transformers(path):
        model.load_state_dict(read_weights(path, model))
        return
    try:
        with _plain_state(path) as plain:
            # strict=False returns the keys that do not match, which make a shorter message than its own.
            incompatible = open_clip.load_checkpoint(model, str(plain), strict=False, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a place in a damaged file that it cannot have
            raise
        text = str(error)
        if "TorchScript" in text:
            raise ValueError(
                f"{path}: not a plain state dict but a TorchScript archive, which can run code when opened. If you "
                "trust the file, convert it once: torch.save(torch.jit.load(path).state_dict(), 'weights.pt')"
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path}: not a plain state dict: it holds pickled objects, which can run code when opened. If you "
                "trust the file, convert it once: x = torch.load(path, weights_only=False); x = x.get('state_dict', x) "
                "if isinstance(x, dict) else x.state_dict(); torch.save(x, 'weights.pt')"
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
def _plain_state(path: Path) -> Iterator[Path]:
    """A file of the weights at `path` under the names that open_clip looks for: `path` itself, if it has them.

    Wrappers put "module." and "_orig_mod." before names, in any order, and torch.compile of a part before the part's.
    """
    if path.suffix in (".npz", ".npy"):  # big_vision's, which open_clip reads in its own way
        yield path
        return
    with torch.serialization.safe_globals(_numpy_numbers()):
        state = _read_state(path)
        names = {key: key.replace("_orig_mod.", "") for key in state}
        while names and all(name.startswith("module.") for name in names.values()):
            names = {key: name.removeprefix("module.") for key, name in names.items()}
        kept = {name: state[key] for key, name in names.items() if name not in _NO_WEIGHTS}
        if list(kept) in ([*state], [key.removeprefix("module.") for key in state]):  # one prefix open_clip takes away
            yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(kept, Path(folder) / "weights.pt")
            del state, kept
            yield Path(folder) / "weights.pt"


def _read_state(path: Path) -> dict[str, Any]:
    """The state dict in a file, or in the training checkpoint in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    mapped = zipfile.is_zipfile(path)  # of older files torch maps none; the values of the others are not read twice
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"holds a {type(found).__name__}, expected a state dict")
    return found


def _numpy_numbers() -> list[Any]:
    """The globals of a pickle that numpy's numbers and arrays are made with: they hold data alone."""
    number: Any = np.float64(0).__reduce__()[0]
    array: Any = np.array(0).__reduce__()[0]
    core = array.__module__.rpartition(".")[0]  # numpy.core, or numpy._core since 2.0
    made = [
        (function, f"{package}.multiarray.{function.__name__}")
        for function in (number, array)
        for package in {"numpy.core", core}
    ]
    return [*made, np.ndarray, np.dtype, *{type(np.dtype(name)) for name in np.typecodes["AllInteger"] + "?efd"}]


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
