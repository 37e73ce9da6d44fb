"""AdamW (Loshchilov and Hutter 2019) that leaves alone the embeddings of tokens that no caption has had.

A table of token embeddings has 49,408 rows (CLIP) to 256,000 (SigLIP 2), and the captions of a fine-tuning have some
hundred of them. The others have no gradient and no moments, and all that AdamW does to them is their decay. So the
gradient of a table is kept by row (`torch.nn.Embedding.sparse`), and moments are of the rows that ever had one. The
weights are those of `torch.optim.AdamW`: a row that had a gradient once moves on with its moments at every step,
which `torch.optim.SparseAdam` does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from robustft.machine import WEIGHT_DECAY
from robustft.ops.kinds import checked

FUSED = ("cpu", "cuda")  # devices
SMALLEST_TABLE = 4096  # rows: a table with fewer costs little in one piece
LARGEST_PART = 1 / 4  # of a table's rows: where more of them move, one pass over all is faster than to collect them


class AdamW(torch.optim.Optimizer):
    """AdamW of what a module trains: matrices and embeddings decay, biases, norms and the logit scale do not.

        theta <- (1 - lr weight_decay) theta - lr m^ / (sqrt(v^) + eps),   m^, v^ with their bias taken out

    On a CPU and a CUDA device it is one fused pass over weights, gradient and moments. On a CPU, without a process
    group of torch.distributed, the gradients of large tables of embeddings are sparse tensors, of the tokens in the
    batch: update and memory are then those of the tokens that the captions have, and all rows decay in one pass.
    Elsewhere tables stay in one piece: an accelerator would have to be waited for at each step to find the rows, and
    gradients of several processes are averaged in one piece. A gradient that comes in one piece (L2-SP's) or reaches a
    quarter of a table's rows is taken like that of any matrix.

    Args:
        module: a method or a model. Its large tables (`torch.nn.Embedding`) are set to `sparse`, which lasts:
            `whole_tables(module)` takes it back, for what takes no sparse gradient: torch's AdamW, `clip_grad_value_`.
        lr: rate; `param_groups` have it, so that schedules of torch work.
        betas, eps: as in `torch.optim.AdamW`.
        weight_decay: as there, but 0.1 unless you say otherwise, as in `fit`; torch has 0.01.

    `state_dict()` is that of a `torch.optim.AdamW` with the same two groups, moments in one piece, and either may load
    the other's. Memory: 8 bytes for each trained weight; of a table, for those in rows that had a gradient.

    Raises: ValueError for numbers out of range and a module that trains nothing; TypeError for what is no module.
    """

    @checked
    def __init__(
        self,
        module: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number from 0 up, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas}")
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type in FUSED for p in trained)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})
        self._step_supports_amp_scaling = fused  # how torch.amp.GradScaler asks
        if all(p.device.type == "cpu" for p in trained) and not _distributed():
            for table in _large_tables(module):
                table.sparse = table.weight.requires_grad and table.weight.is_leaf  # weight_norm's is none

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of what has a gradient; what `closure`, which computes them first, gives."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            self._update(group)
        return result

    def _update(self, group: dict[str, Any]) -> None:
        weights: list[Tensor] = []
        gradients: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        tables: list[tuple[Tensor, Tensor, Tensor]] = []  # whole, its rows that move, and these rows' weights
        for p in group["params"]:
            if p.grad is None:
                continue
            state, gradient = self.state[p], p.grad
            if gradient.is_sparse:
                gradient = self._of_rows(p, gradient.coalesce(), state)
            elif "rows" in state:
                _in_one_piece(state, p)
            if not state:
                state |= _fresh(p, p)
            if "rows" in state:
                tables.append((p, state["rows"], p.index_select(0, state["rows"])))
            weights.append(tables[-1][2] if "rows" in state else p)
            gradients.append(gradient)
            states.append(state)
        found = getattr(self, "found_inf", None)
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for whole, rows, moved in tables:
            if found is None or not found.item():
                whole.mul_(1 - group["lr"] * group["weight_decay"])
                whole.index_copy_(0, rows, moved)

    def _of_rows(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The gradient of the rows that have moments, which are now also those of the gradient; or of all of them."""
        (indices,), values = gradient.indices(), gradient.values()
        if state and "rows" not in state:
            return gradient.to_dense()
        if not state:
            state |= {"rows": indices.clone(), **_fresh(p, values)}
        elif not (known := torch.isin(indices, state["rows"], assume_unique=True)).all():
            _with_rows(state, indices[~known])
        if len(state["rows"]) > LARGEST_PART * len(p):
            _in_one_piece(state, p)
            return gradient.to_dense()
        found = torch.zeros_like(state["exp_avg"], dtype=values.dtype)
        return found.index_copy_(0, torch.searchsorted(state["rows"], indices), values)

    def state_dict(self) -> dict[str, Any]:
        """As that of `torch.optim.AdamW`. Memory: moments of tables in one piece."""
        packed = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in packed["state"].items():
            if "rows" in state:
                packed["state"][index] = whole = dict(state)
                _in_one_piece(whole, parameters[index])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, here or of a `torch.optim.AdamW` with the same groups.

        How it is computed, fused or not, stays as it is here. ValueError for AMSGrad and `maximize`.
        """
        groups = [{**group, "fused": self.defaults["fused"]} for group in state_dict["param_groups"]]
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in groups):
                raise ValueError(f"state_dict is of an AdamW with {name}=True; expected one without")
        super().load_state_dict({**state_dict, "param_groups": groups})
        if _distributed():  # gradients come in one piece, and FSDP's moments cannot be searched for rows
            return
        for p, state in self.state.items():
            if p.ndim == 2 and len(p) >= SMALLEST_TABLE and p.device.type == "cpu":
                _by_row(state)


@checked
def whole_tables(module: nn.Module) -> None:
    """Gradients of the module's large tables of embeddings come in one piece again, and sparse ones are dropped.

    TypeError for what is no module.
    """
    for table in _large_tables(module):
        _made_whole(table)


@contextmanager
def tables_as_before(module: nn.Module) -> Iterator[None]:
    """Each table is `sparse` afterwards if it was before, whatever an `AdamW` that is made inside has set."""
    before = {id(table) for table in _large_tables(module) if table.sparse}
    try:
        yield
    finally:
        for table in _large_tables(module):
            if id(table) in before:
                table.sparse = True
            else:
                _made_whole(table)


def values_of(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, of a sparse one without the rows that have none; of a coalesced one no copies."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _large_tables(module: nn.Module) -> list[nn.Embedding]:
    """Those that are looked up as they are, teachers' too: they may be copies that were made meanwhile."""
    large = [part for part in module.modules() if type(part) is nn.Embedding and part.num_embeddings >= SMALLEST_TABLE]
    return [table for table in large if table.max_norm is None and not table.scale_grad_by_freq]


def _made_whole(table: nn.Embedding) -> None:
    """Gradients of the table come in one piece; a sparse one is dropped."""
    table.sparse = False
    if table.weight.grad is not None and table.weight.grad.is_sparse:
        table.weight.grad = None


def _distributed() -> bool:
    """Also in a group of one: a DistributedDataParallel that is there already keeps to the flags it has found."""
    return dist.is_available() and dist.is_initialized()


def _fresh(p: Tensor, like: Tensor) -> dict[str, Tensor]:
    """Moments of a parameter before its first step."""
    device = p.device if p.device.type in FUSED else "cpu"  # an update that is not fused reads it on the host
    step = torch.zeros((), dtype=torch.float32, device=device)
    moments = {name: torch.zeros_like(like, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **moments}


def _with_rows(state: dict[str, Tensor], new: Tensor) -> None:
    """Adds rows without moments to the state of a table."""
    rows, order = torch.cat([state["rows"], new]).sort()
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state[name]
        state[name] = torch.cat([moment, moment.new_zeros(len(new), *moment.shape[1:])]).index_select(0, order)
    state["rows"] = rows


def _in_one_piece(state: dict[str, Tensor], p: Tensor) -> None:
    """Makes the state of a table's rows that of all of them."""
    rows = state.pop("rows")
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(p).index_copy_(0, rows, state[name])


def _by_row(state: dict[str, Tensor]) -> None:
    """Keeps of the state of a table the rows that have moments, where they are few."""
    rows = ((state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0)).any(1).nonzero().squeeze(1)
    if len(rows) <= LARGEST_PART * len(state["exp_avg"]):
        state |= {"rows": rows, **{name: state[name].index_select(0, rows) for name in ("exp_avg", "exp_avg_sq")}}
