"""CLIP models of any open_clip architecture: load, encode, build heads from prompts, interpolate, export.

    u = normalise(f(x))                                          image features (N, D)
    l = normalise(value path of f's last attention)              patch features (N, P, D), `robustft.patches`
    v = normalise(g(t))                                          text features (M, D)
    w_c = normalise(mean_t normalise(g(template_t(name_c))))     class embeddings (K, D)
    z = s u w^T,  s = exp(model.logit_scale)                     zero-shot logits (N, K)
    theta = (1 - a) theta_zs + a theta_ft                        WiSE-FT weights

A model is used through `encode_image`, `encode_text` and `logit_scale` alone, never through `forward`, whose
output differs between open_clip's versions and settings. A `Bundle` carries the configuration its model was
built from, so that every model can be exported as a directory that open_clip itself loads: nothing (the
activation, the context length, the image statistics) is left to be guessed from a name.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustft import patches
from robustft.files import CALIBRATOR_FILE, DETECTOR_FILE
from robustft.prompts import Template, Tokenizer, captions, check_captions

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CARD_FILE = "README.md"
CLASSIFIER_FILE = "classifier.safetensors"  # the head of a `methods.Classifier`; open_clip does not look at it
COMPANIONS = {CLASSIFIER_FILE, DETECTOR_FILE, CALIBRATOR_FILE}  # beside the weights, and replaced with them


class LocalFeatures(NamedTuple):
    """Image features (N, D) and the features of their patches (N, P, D)."""

    image_features: Tensor
    patch_features: Tensor


class Bundle(NamedTuple):
    model: nn.Module
    tokenizer: Tokenizer
    train_transform: Callable[[Any], Tensor]
    eval_transform: Callable[[Any], Tensor]
    config: dict[str, Any]  # {"model_cfg": ..., "preprocess_cfg": ...}, as in open_clip_config.json


# Loading


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
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
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


def import_open_clip() -> ModuleType:
    """The open_clip module; every import of it in this package goes through here.

    PyPI's torchvision cannot load its compiled operators under a CPU-only torch, and then fails to import
    because it describes two of them, `nms` and `qnms`, all the same. Declaring the two lets it import;
    open_clip uses neither. Raises ImportError, naming what to install, when open_clip is not installed.
    """
    try:
        import open_clip
    except RuntimeError as error:
        if torch.version.cuda is not None or "operator torchvision::nms does not exist" not in str(error):
            raise
        _declare_torchvision_operators()
        import open_clip
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ImportError("open_clip is not installed: pip install open_clip_torch") from error
    return open_clip


@functools.cache  # the declarations live as long as the Library object
def _declare_torchvision_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ValueError(f"{path}: expected an object with 'model_cfg'")
    return {"model_cfg": config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}


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
            raise ValueError(f"{path}: does not fit the model: {_few(lines, 'mismatched shapes')}") from error
        raise ValueError(f"{path}: truncated, or no checkpoint of this model: {error!r:.300}") from error
    if incompatible and (incompatible.missing_keys or incompatible.unexpected_keys):
        keys = (
            _few(incompatible.missing_keys, "keys missing from the file"),
            _few(incompatible.unexpected_keys, "keys unknown to the model"),
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


# Encoding


def logit_scale(model: nn.Module) -> Tensor:
    """s = exp(model.logit_scale), a 0-d tensor in at least float32; the gradient reaches the parameter."""
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise ValueError(f"model: expected a logit_scale of one element, got {scale!r:.80}")
    return _at_least_float32(scale).exp().reshape(())


def encode_images(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Image features (N, D) of transformed images (N, 3, H, W); the gradient reaches tower and images.

    images: floating point, on the model's device; cast to the tower's dtype. normalize: unit rows, computed
    and returned in at least float32, also under autocast; otherwise the features as the tower gives them.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images: expected (N, 3, H, W) floating point, as the transforms give, got "
            f"{tuple(images.shape)} {images.dtype}"
        )
    parameter = next(getattr(model, "visual", model).parameters(), images)
    features = _pooled(model.encode_image(images.to(parameter.dtype)))
    return F.normalize(_at_least_float32(features), dim=-1) if normalize else features


def encode_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> Tensor:
    """Patch features (N, P, D) of transformed images, comparable with text features; gradients as in `encode_images`.

    P patches row by row: (H / patch)^2 for a ViT, (H / 32)^2 for a ModifiedResNet. They are the value path of the last
    attention, as in GL-MCM and LoCoOp (`robustft.patches` has the formulas). The model stays as it is. images,
    normalize: as in `encode_images`. Costs one pass and the last block once more: `encode_images_and_patches` gives
    the image features of that pass too. ValueError for towers without such patches (timm, Hugging Face, CoCa).
    """
    return encode_images_and_patches(model, images, normalize=normalize).patch_features


def encode_images_and_patches(model: nn.Module, images: Tensor, *, normalize: bool = True) -> LocalFeatures:
    """`encode_images` and `encode_patches` in one pass. Memory: N P D floats for the patches."""
    visual = unwrap(model).visual
    with patches.last_inputs(visual) as inputs:
        image_features = encode_images(model, images, normalize=normalize)
    patch_features = patches.local_features(visual, inputs[0])
    if normalize:
        patch_features = F.normalize(_at_least_float32(patch_features), dim=-1)
    return LocalFeatures(image_features, patch_features)


def encode_texts(model: nn.Module, tokens: Tensor, *, normalize: bool = True) -> Tensor:
    """Text features (M, D) of tokenised captions (M, L), with `normalize` as in `encode_images`."""
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens: expected (M, L) integers, got {tuple(tokens.shape)} {tokens.dtype}")
    features = _pooled(model.encode_text(tokens))
    return F.normalize(_at_least_float32(features), dim=-1) if normalize else features


def class_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template],
    *,
    batch_size: int = 256,
) -> Tensor:
    """The zero-shot head (K, D): unit mean over templates of unit text features (CLIP, section 3.1.4).

    templates: strings with `{}` or `{c}`, or callables of the class name. Classes of the same name get
    identical rows. The gradient reaches the text tower unless disabled. Memory: K T D floats, and the
    activations of `batch_size` captions (of all K T when gradients are on). Raises ValueError for empty lists
    and blank names.
    """
    return caption_embeddings(model, tokenizer, captions(class_names, templates), batch_size=batch_size)


def caption_embeddings(
    model: nn.Module, tokenizer: Tokenizer, captions: Sequence[Sequence[str]], *, batch_size: int = 256
) -> Tensor:
    """A head (K, D) from ready captions, such as concept descriptions: one or more of them a class.

    Otherwise as `class_embeddings`.
    """
    check_captions(captions)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    distinct = {texts: row for row, texts in enumerate(dict.fromkeys(map(tuple, captions)))}
    texts = [text for group in distinct for text in group]
    device = next(model.parameters()).device
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    features = torch.cat([encode_texts(model, tokenizer(batch).to(device)) for batch in batches])
    means = torch.stack([group.mean(dim=0) for group in features.split([len(group) for group in distinct])])
    rows = torch.tensor([distinct[tuple(group)] for group in captions], device=device)
    return F.normalize(means, dim=-1)[rows]


def visual_projection(model: nn.Module) -> Tensor:
    """W (width, D) with image feature = h @ W (+ bias): the parameter or a view of it; gradients reach it.

    Found for open_clip's ViT (`visual.proj`), ModifiedResNet (`visual.attnpool.c_proj`) and timm towers with
    a linear head (`visual.head.proj`). Raises ValueError for towers without a final linear map.
    """
    return _projection(model, "visual", "visual.proj", "visual.attnpool.c_proj", "visual.head.proj")


def text_projection(model: nn.Module) -> Tensor:
    """W (width, D) with text feature = h @ W (+ bias): the parameter or a view of it; gradients reach it.

    Found for open_clip's own text tower, in `CLIP` and `CustomTextCLIP`, and for Hugging Face towers with a
    linear projection. Raises ValueError for towers without a final linear map.
    """
    return _projection(model, "text", "text_projection", "text.text_projection", "text.proj")


def _projection(model: nn.Module, tower: str, *paths: str) -> Tensor:
    for path in paths:
        match functools.reduce(lambda owner, part: getattr(owner, part, None), path.split("."), model):
            case nn.Linear() as linear:
                return linear.weight.T
            case Tensor() as weight:
                return weight
    raise ValueError(
        f"model: the {tower} tower of this {type(model).__name__} does not end in a linear projection "
        f"(looked for {', '.join(paths)})"
    )


def _pooled(features: Any) -> Tensor:
    # Towers built with output_tokens return (pooled, tokens).
    return features[0] if isinstance(features, tuple) else features


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None), nn.Module):
        model = inner
    return model


# Interpolating, exporting, naming


def interpolate(zero_shot: nn.Module, fine_tuned: nn.Module, alpha: float) -> nn.Module:
    """WiSE-FT (arXiv 2109.01903, section 3): a model with weights (1 - alpha) zero_shot + alpha fine_tuned.

    It is a copy of `fine_tuned` (device, mode, requires_grad) with the state of `interpolate_state`.
    """
    fine_tuned = unwrap(fine_tuned)
    state = interpolate_state(unwrap(zero_shot).state_dict(), fine_tuned.state_dict(), alpha)
    model = copy.deepcopy(fine_tuned)
    model.load_state_dict(state)
    return model


def interpolate_state(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) zero_shot + alpha fine_tuned, entry by entry, as new tensors on fine_tuned's devices.

    Floating-point entries, buffers too, are interpolated in at least float32; integer ones are fine_tuned's.
    Entries equal in both stay as they are, and alpha 0 and 1 give the two states back, bit for bit. No
    gradient. Raises ValueError when alpha is outside [0, 1], or keys, shapes or dtypes differ, naming them.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    differences = (
        _few([key for key in zero_shot if key not in fine_tuned], "keys only in zero_shot"),
        _few([key for key in fine_tuned if key not in zero_shot], "keys only in fine_tuned"),
        _few(
            [
                f"{key} {tuple(zero_shot[key].shape)} {zero_shot[key].dtype} and {tuple(ft.shape)} {ft.dtype}"
                for key, ft in fine_tuned.items()
                if key in zero_shot and (zero_shot[key].shape, zero_shot[key].dtype) != (ft.shape, ft.dtype)
            ],
            "different shapes or dtypes",
        ),
    )
    if any(differences):
        raise ValueError(f"zero_shot and fine_tuned do not match: {'; '.join(filter(None, differences))}")

    def mix(zs: Tensor, ft: Tensor) -> Tensor:
        if alpha in (0, 1) or not ft.is_floating_point():
            return (zs.to(ft.device) if alpha == 0 else ft).detach().clone()
        wide = torch.promote_types(ft.dtype, torch.float32)
        # lerp, unlike the two products, returns x for lerp(x, x, alpha): frozen weights stay as they are.
        return torch.lerp(zs.detach().to(ft.device, wide), ft.detach().to(wide), float(alpha)).to(ft.dtype)

    return {key: mix(zero_shot[key], ft) for key, ft in fine_tuned.items()}


def export(
    model: nn.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    classifier: bytes | None = None,
) -> Path:
    """Writes a directory that `open_clip.create_model_and_transforms("local-dir:...")` loads bit for bit.

    config: a `Bundle`'s, describing this model. tokenizer: needed only where it is a Hugging Face one (the
    configuration names it), whose files are then written too. card: text of README.md; None writes a short
    one. classifier: content of classifier.safetensors, as `methods.Classifier.save` gives it; None writes none.

    The directory is built beside its place and then renamed, so that it is whole or not there. An earlier
    export is replaced, with its classifier, detector and calibrator. Raises FileExistsError when `directory` holds
    anything else, ValueError when `config` is incomplete. Memory: one copy of the weights on the CPU.
    """
    from safetensors.torch import save_file

    if not all(isinstance(config.get(key), Mapping) for key in ("model_cfg", "preprocess_cfg")):
        raise ValueError(f"config: expected the mappings 'model_cfg' and 'preprocess_cfg', got {config!r:.80}")
    model = unwrap(model)
    directory = Path(directory).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        fresh.mkdir()
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (fresh / CARD_FILE).write_text(_card(directory.name, model) if card is None else card, encoding="utf-8")
        if classifier is not None:
            (fresh / CLASSIFIER_FILE).write_bytes(classifier)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(fresh)
        _check_replaceable(directory, {path.name for path in fresh.iterdir()} | {WEIGHTS_FILE} | COMPANIONS)
        # Copies, because safetensors refuses tensors that share memory.
        state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(state, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        _replace_directory(directory, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _check_replaceable(directory: Path, names: set[str]) -> None:
    """Raises FileExistsError unless `directory` is absent, empty, or an export of no files but `names`."""
    if not directory.exists():
        return
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    if held and (held - names or not {CONFIG_FILE, WEIGHTS_FILE} <= held):
        raise FileExistsError(
            f"{directory}: holds something other than an earlier export: "
            f"{_few(sorted(held), 'files')}; choose another directory or empty it"
        )


def _replace_directory(directory: Path, fresh: Path) -> None:
    if not directory.exists():
        os.rename(fresh, directory)
        return
    old = fresh.with_name(f"{fresh.name}.old")
    os.rename(directory, old)
    try:
        os.rename(fresh, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old)


def _card(name: str, model: nn.Module) -> str:
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


def fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, of a model's state (names, shapes, dtypes, bytes), module types and settings.

    Equal for copies of a model, whatever their device and mode. Types and settings (public attributes that are plain
    numbers, strings or sequences of them: the number of heads, a stride, an epsilon) tell apart models of equal weights
    that compute different features. Memory: one tensor at a time on the CPU.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        settings = [(key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)]
        digest.update(f"{name}:{type(module).__name__}:{settings}\n".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_setting(name: str, value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    plain = all(isinstance(v, (bool, int, float, str)) for v in values)
    # The images' statistics, which open_clip leaves on the tower, tell how to prepare images, not what is computed.
    return plain and name not in {"training", "image_mean", "image_std"} and not name.startswith("_")


def _few(names: Sequence[str], what: str, limit: int = 3) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"
