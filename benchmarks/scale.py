"""Time and memory of a step against the parts of its batch and the processes, beside what a model of them predicts.

    time(k)   = t1                              k = 1: a pass and its backward, forward 1/3 of it, backward 2/3
                t1 (1 + 1/3)                    k > 1: every part is encoded once more
    memory(k) = m0 + (m1 - m0) / k              activations of one part; m0 is what is there without any
    time on p processes, of one core each = time(1) / p

On paper, of a ViT-B/16 on GPUs: `python -m benchmarks.scale --paper` computes bytes on the wire, the share of the
loss, what one-sided losses would save of a step, and the seconds of a checkpoint, from the same model and the rates
that it is given.

    python -m benchmarks.scale [--batch 256] [--parts 1 2 4 8 16 32 64] [--processes 1 2] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import machine

REPEATS = 3
VISION = {"image_size": 64, "patch_size": 8, "width": 192, "head_width": 64, "layers": 6}
TEXT = {"context_length": 16, "vocab_size": 64, "width": 96, "heads": 4, "layers": 3}
KEPT = 34
"""Bytes that a layer keeps of each number of its width for the backward, in 16 bits and with attention that is not kept
(Korthikanti et al. 2022, arXiv 2205.05198, section 4)."""
PAPER = {
    "parameters": 149.6e6,
    "forward_flops": 41e9,
    "features": 512,
    "activation_bytes": KEPT * 12 * (197 * 768 + 77 * 512),
}
"""Of a ViT-B/16 with its text tower, and one pair."""


def measured(batch: int, parts: int, processes: int) -> dict[str, float]:
    """Seconds and peak memory of a step, in processes of their own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", str(batch), str(parts)]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launch, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))


def one(batch: int, parts: int) -> None:
    """Prints what a step of this process takes, as the main one of those that there are."""
    import open_clip
    import torch

    from robustft.methods import FLYP
    from robustft.ops.processes import joined

    def tokens(texts: list[str]) -> torch.Tensor:
        rows = [[1 + ord(letter) % 60 for letter in text[:14]] + [63] for text in texts]
        return torch.tensor([row + [0] * (16 - len(row)) for row in rows])

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=64, vision_cfg=VISION, text_cfg=TEXT)
    names = {"tokenizer": tokens, "class_names": ("ant", "bee", "cow"), "templates": ("a {}",)}
    method = FLYP(model, **names).train()
    with joined() as processes:
        rows = torch.arange(batch).tensor_split(processes.count)[processes.rank]
        images, labels = torch.randn(len(rows), 3, 64, 64), rows % 3
        before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for _ in range(REPEATS):
            method.zero_grad()
            started = time.perf_counter()
            method((images, labels), parts=parts, group=processes.group).loss.backward()
            processes.average([p for p in method.parameters() if p.requires_grad])
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if processes.main:
            print(json.dumps({"seconds": statistics.median(seconds), "bytes": (peak - before) * 1024}), flush=True)


def rows_of(batch: int, parts: list[int], processes: list[int]) -> list[dict[str, Any]]:
    """A row for each number of parts and of processes, with the prediction from the first of each."""
    rows: list[dict[str, Any]] = []
    for count in processes:
        for k in parts:
            found = measured(batch, k, count)
            first = rows[0]["seconds"] if rows else found["seconds"]
            whole = rows[0]["bytes"] if rows else found["bytes"]
            rows.append(
                {
                    "batch": batch,
                    "parts": k,
                    "processes": count,
                    **found,
                    "predicted_seconds": first * (1 if k == 1 else 4 / 3) / count,
                    "predicted_bytes": whole / k / count,
                }
            )
            print(machine_line(rows[-1]), flush=True)
    return rows


def machine_line(row: dict[str, Any]) -> str:
    return (
        f"{row['processes']} processes, {row['parts']:3} parts: {row['seconds']:7.2f} s (predicted "
        f"{row['predicted_seconds']:7.2f}), {row['bytes'] / 2**20:7.0f} MiB "
        f"(predicted {row['predicted_bytes'] / 2**20:7.0f})"
    )


def paper(
    images: float = 1.28e6,
    gpus: int = 8,
    batch: int = 32768,
    part: int = 128,
    flops: float = 400e12,
    wire: float = 300e9,
    disk: float = 1e9,
) -> dict[str, float]:
    """By the model, of a ViT-B/16: what a step and an epoch take on GPUs of so many FLOP/s, bytes/s between them and
    bytes/s to the disk."""
    n, d = batch / gpus, PAPER["features"]
    parts = n / part
    towers = n * PAPER["forward_flops"] * (3 if parts <= 1 else 4) / flops
    loss = 3 * 2 * batch * batch * d / flops  # each GPU has the whole loss
    gradients = 2 * 4 * PAPER["parameters"] * (gpus - 1) / gpus
    features = 2 * 4 * batch * d * 3 * (gpus - 1) / gpus  # gathered once, their gradients added up
    step = towers + loss + (gradients + features) / wire
    # One-sided, a GPU has its share of the products, gathers texts alone and scatters their gradients' sum.
    saved = (loss + 2 * 2 * 4 * batch * d / wire) * (gpus - 1) / gpus
    return {
        "parts": max(1.0, parts),
        "memory_bytes": part * PAPER["activation_bytes"] + 4 * 4 * PAPER["parameters"] + 4 * 4 * 2 * batch * d,
        "wire_bytes_a_step": gradients + features,
        "share_of_the_loss": loss / step,
        "share_that_one_sided_losses_save": saved / step,
        "seconds_a_step": step,
        "hours_an_epoch": images / batch * step / 3600,
        "checkpoint_seconds": 3 * 4 * PAPER["parameters"] / disk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, type=int, metavar=("BATCH", "PARTS"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--paper", action="store_true", help="only what the model says of GPUs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/scale.json")
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    sizes = ((1, 32768), (8, 512), (8, 4096), (8, 32768), (64, 32768))
    found: dict[str, Any] = {"paper": {f"{n} GPUs, batch {b}": paper(gpus=n, batch=b) for n, b in sizes}}
    print(json.dumps(found["paper"], indent=2))
    if not given.paper:
        found["rows"] = rows_of(given.batch, given.parts, given.processes)
    if given.write:
        machine.write("scale", f"python -m benchmarks.scale {' '.join(sys.argv[1:])}", found)


if __name__ == "__main__":
    main()
