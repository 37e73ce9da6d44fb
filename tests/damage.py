"""A fitted object's file with one value changed, as nothing that saves would write it, under a checksum that is right:
so that what reads the value has to look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from robustft.files import content_checksum


def change(path: Path, name: str, value: Any) -> None:
    """Sets a setting, or every element of a tensor, or the tensor itself."""
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["robustft"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    if name not in tensors:
        settings[name] = value
    elif isinstance(value, (int, float)):
        tensors[name].fill_(value)
    else:
        tensors[name] = value
    del settings["checksum"]
    settings = {"checksum": content_checksum(settings, tensors), **settings}
    path.unlink()
    save_file(tensors, path, metadata={"robustft": json.dumps(settings)})
