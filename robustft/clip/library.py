"""The door to open_clip, imported when the first model, tokenizer or template is asked for."""

from __future__ import annotations

import functools
from types import ModuleType

import torch


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
