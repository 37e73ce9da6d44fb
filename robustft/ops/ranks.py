"""What the ranks of a process group tell each other before they exchange data, so that all raise the same error.

A collective trusts that every rank brings the same kind of data. Where one does not, it mixes bytes of different
meaning, ends the process, or waits. So a call over a group begins with one all-gather of a description, a fixed number
of bytes that every rank can send whatever its arguments are: what it calls, the shapes, dtypes and options, or the
error that its own checks raised. If two differ, every rank raises an error that names the argument and what each had.
The backward begins with such an exchange as well: ranks that are at different places of the program meet in it.

What this cannot tell: a rank that never calls anything over the group again while it lives. The others then wait for
the group's time-out, the `timeout` of `init_process_group`. Where a rank has ended, gloo raises at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

R = TypeVar("R")

BYTES = 1024  # of a description; the longest of ours has about 500, and an error's text is cut
ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "TypeError": TypeError}


def check_group(group: object) -> None:
    """TypeError unless it is a process group, ValueError unless this rank is a member."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not have this process as a member; expected a group it belongs to")
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group is {type(group).__name__}; expected a torch.distributed.ProcessGroup")


def checked(group: ProcessGroup, check: Callable[[], R]) -> R:
    """What the check of a rank's own arguments returns; its error is raised on every rank, which all wait here or in
    `agree`."""
    try:
        return check()
    except Exception as error:
        name, text = type(error).__name__, " ".join(str(error).split())
        failed = {"error": f"{name}: {text}"}
        try:
            _compare(_exchange(failed, group, "the checks of its arguments"))
        except (ValueError, TypeError, RuntimeError) as everywhere:
            raise everywhere from error
        raise  # every rank has this very error


def agree(description: Mapping[str, object], group: ProcessGroup) -> str:
    """Raises the same error on every rank unless all of them describe the same; returns a name of this call, random and
    the same on every rank, for `agree` of its backward.

    Costs an all-gather of 1 KB, which a group without a CPU backend, such as NCCL's alone, sends by way of the GPU and
    waits for. `torch.compile` breaks its graph here: a compiled program makes the exchange at every call as well.
    """
    told = _exchange({**description, "call": os.urandom(6).hex()}, group, str(description["function"]))
    calls = [rank.pop("call", "") for rank in told]
    _compare(told)
    return calls[0]


def _exchange(description: Mapping[str, object], group: ProcessGroup, where: str) -> list[dict[str, str]]:
    """Every rank's description, in the order of ranks."""
    text = "\n".join(f"{name}={value}" for name, value in description.items()).encode()[:BYTES]
    has_cpu = "cpu:" in str(dist.get_backend_config(group))
    device = torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())
    mine = torch.frombuffer(bytearray(text.ljust(BYTES, b"\0")), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(parts, mine, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"group: rank {dist.get_rank(group)} is in {where} and got no answer from every other rank, one of which "
            f"has ended or left out this call: {error}"
        ) from error
    lines = (bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore").split("\n") for part in parts)
    return [{name: value for name, _, value in (line.partition("=") for line in rank)} for rank in lines]


def _compare(told: list[dict[str, str]]) -> None:
    """The same error on every rank: of a rank that failed, of ranks at different calls, or of what differs first."""
    if all(rank == told[0] for rank in told):
        return
    failed = {number: rank["error"] for number, rank in enumerate(told) if "error" in rank}
    if failed:
        kind = next(iter(failed.values())).split(":", 1)[0]
        raise ERRORS.get(kind, RuntimeError)(
            "group: " + "; ".join(f"rank {number} failed with {error}" for number, error in failed.items())
        )
    names = list(dict.fromkeys(name for rank in told for name in rank))
    differing = [name for name in names if len({rank.get(name) for rank in told}) > 1]
    if "function" in differing:  # what else differs follows from it
        places = "; ".join(f"rank {number}: {rank['function']}" for number, rank in enumerate(told))
        raise ValueError(f"group: the ranks are at different calls: {places}. Every rank must make the same, in order")
    raise ValueError(
        "group: "
        + ". ".join(
            f"{name} differs between ranks: " + "; ".join(f"rank {n}: {rank[name]}" for n, rank in enumerate(told))
            for name in differing
        )
    )
