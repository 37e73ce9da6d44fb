"""The files of a model with adapters: peft's own two, and where the weights below them are.

adapter_model.safetensors, adapter_config.json    for PeftModel.from_pretrained(model, folder)
base.json    "source", {"name", "pretrained"} by which `clip.load` finds the weights below, null if they lie here
             "weights", their SHA-256; "out_updates", how often peft adds the update of an attention's out-projection
open_clip_model.safetensors    the weights below, where it is not known from where they could be loaded again
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustft.clip.adapters import ADAPTER, adopted, import_peft
from robustft.clip.messages import few
from robustft.files import read_json, read_tensors, write_json, write_tensors

ADAPTER_FILE, SETTINGS_FILE, BASE_FILE = "adapter_model.safetensors", "adapter_config.json", "base.json"
FILES = {ADAPTER_FILE, SETTINGS_FILE, BASE_FILE}
_PREFIX = "base_model.model."  # of what peft wraps


def holds_adapters(folder: Path) -> bool:
    """Whether a folder is of a model with adapters."""
    return (folder / BASE_FILE).is_file()


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of weights, in single precision if they are floating point."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        found.update(f"{name}:{tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_adapters(model: nn.Module, folder: Path, source: Mapping[str, Any] | None, weights: str) -> None:
    """Writes the adapters of an unwrapped model; source: where the weights below, of that `digest`, are loaded from.

    ValueError for a model with several adapters, which peft would write into several folders.
    """
    peft = import_peft()
    from robustft.clip.adapted_attention import OUT_UPDATES

    configs: Any = model.peft_config
    if len(configs) != 1:
        raise ValueError(
            f"model has several adapters, {sorted(configs)}: merge it (robustft.clip.merged), or delete all but one"
        )
    (name,) = configs
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    write_tensors(folder / ADAPTER_FILE, {_PREFIX + key: value for key, value in state.items()}, {"format": "pt"})
    configs[name].save_pretrained(folder)
    about = {"source": source and dict(source), "weights": weights, "out_updates": OUT_UPDATES}
    write_json(folder / BASE_FILE, about, indent=2)


def read_base(folder: Path) -> dict[str, Any]:
    """What base.json says; ValueError where it is damaged, or peft computes otherwise than the one that wrote it."""
    import_peft()
    from robustft.clip.adapted_attention import OUT_UPDATES

    path = folder / BASE_FILE
    found = read_json(path, "an object with 'source' and 'weights'")
    source = found.get("source") if isinstance(found, dict) else ()
    if not isinstance(source, (dict, type(None))) or not isinstance(found.get("weights"), str):
        raise ValueError(f"{path}: expected an object with 'source' and 'weights'")
    if source is not None and not isinstance(source.get("name"), str):
        raise ValueError(f"{path}: source is {source!r:.80}, expected an object with a 'name'")
    if (wanted := found.get("out_updates")) != OUT_UPDATES:
        raise ValueError(
            f"{path}: written with a peft that adds the update of an attention's out-projection {wanted} times, and "
            f"this one does so {OUT_UPDATES} times: install that version, and merge the adapters there"
        )
    return found


def check_base(model: nn.Module, folder: Path) -> None:
    """ValueError, naming the file, for a model of other weights than a folder's adapters were trained on."""
    if digest(model.state_dict()) != read_base(folder)["weights"]:
        raise ValueError(
            f"{folder / BASE_FILE}: the adapters were trained on other weights than those that were found; its source "
            "says where to find them"
        )


def put_adapters(model: nn.Module, folder: Path) -> Any:
    """The model with a folder's adapters in it, in place; ValueError, naming the file, for damaged files."""
    peft = import_peft()
    path = folder / ADAPTER_FILE
    for file in (path, folder / SETTINGS_FILE):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a model with adapters has it")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
        state = read_tensors(path)
        given = peft.set_peft_model_state_dict(wrapped, state, adapter_name=ADAPTER)
        there = peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False)
        unknown = [*given.unexpected_keys, *(key for key in there if key not in state)]
        if unknown:
            raise ValueError(few(unknown, "weights that only one of file and model has"))
        if bad := [key for key, value in state.items() if not bool(value.isfinite().all())]:
            raise ValueError(few(bad, "weights that are not finite"))
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # whatever peft and safetensors raise for values of the wrong type, range or name
        raise ValueError(f"{path}: damaged, or no adapters of this model: {error!r:.300}") from error
    return adopted(wrapped)
