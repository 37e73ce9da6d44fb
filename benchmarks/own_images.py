"""Folders of images through the commands: memory that does not grow, cores that decode, seconds to the first report.

    python -m benchmarks.own_images      # results/own_images.json

    memory      `evaluate` on 10,000 and on 100,000 small images: the most memory that its process, and one of its
                readers, have had. The images are a thousand digits under many names.
    decoding    `evaluate` on photographs of 640 x 480: the processor time of all processes, as a share of the time of
                all cores while images are read and classified
    report      `train` on 500 images, from the start of the command to its report

The model is the bundled tiny one, so that what is measured is everything but the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import machine

MEASURED = """
import json, os, resource, sys, time
from robustft.pipeline.evaluating import evaluate_runs
data, model, few = sys.argv[1:]
quiet = {"model": model, "log": lambda line: None, "progress": False, "device": "cpu"}
evaluate_runs(few, **quiet)  # what is imported, is so now

def used():
    own, readers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own, readers, own.ru_utime + own.ru_stime + readers.ru_utime + readers.ru_stime

before, started = used()[2], time.monotonic()
evaluation = evaluate_runs(data, **quiet)
own, readers, after = used()
seconds = time.monotonic() - started
print(json.dumps({
    "images": evaluation.models["zero-shot"].id.calibration.count,
    "seconds": round(seconds, 1),
    "busy_share": round((after - before) / seconds / len(os.sched_getaffinity(0)), 3),
    "peak_mb": round(own.ru_maxrss / 1024),
    "peak_mb_of_a_reader": round(readers.ru_maxrss / 1024),
}))
"""


def digits(root: Path, part: str, count: int, distinct: int = 1000) -> Path:
    """Class folders of `count` digits, of which `distinct` are different: the others are links to them."""
    from robustft.data import glyphworld

    images = glyphworld.digits(part)
    files: list[Path] = []
    for number in range(count):
        image, label = images[number % min(distinct, len(images))]
        file = root / images.classes[label].replace(" ", "_") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            image.save(file)
            files.append(file)
        else:
            os.link(files[number % distinct], file)
    return root


def photographs(root: Path, count: int, distinct: int = 50) -> Path:
    """JPEG files of 640 x 480 with edges, gradients and some noise, in ten class folders."""
    from PIL import Image

    chance = np.random.default_rng(0)
    files: list[Path] = []
    for number in range(count):
        file = root / f"class_{number % 10}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            coarse = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
            noisy = np.clip(smooth + chance.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file, quality=90)
            files.append(file)
        else:
            os.link(files[number % distinct], file)
    return root


def evaluated(data: Path, model: Path, few: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", MEASURED, str(data), f"local-dir:{model}", str(few)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout.splitlines()[-1]))


def first_report(folder: Path, model: Path) -> dict[str, Any]:
    started = time.monotonic()
    command = ["train", str(folder), "--model", f"local-dir:{model}", "--output", str(folder.parent / "run")]
    subprocess.run([sys.executable, "-m", "robustft", *command], check=True, capture_output=True)
    seconds = time.monotonic() - started
    if not (folder.parent / "run" / "report.html").is_file():
        raise RuntimeError("train has left no report")
    return {"images": sum(1 for _ in folder.rglob("*.png")), "seconds": round(seconds, 1)}


def measure(small: int, large: int, photos: int) -> dict[str, Any]:
    from robustft import clip
    from robustft.data import glyphworld

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        bundle = glyphworld.load_clip()
        model = clip.export(bundle.model, root / "clip", bundle.config, tokenizer=bundle.tokenizer)
        found: dict[str, Any] = {"report": first_report(digits(root / "photos", "train", 500), model)}
        print(found, flush=True)
        few = digits(root / "few", "train", 20)
        found["memory"] = [evaluated(digits(root / str(count), "train", count), model, few) for count in (small, large)]
        print(found["memory"], flush=True)
        # Its classes are the model's only by name; how well they are told apart does not matter.
        found["decoding"] = evaluated(photographs(root / "jpeg", photos), model, few)
        print(found["decoding"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=4_000)
    options = parser.parse_args()
    results = measure(options.small, options.large, options.photos)
    command = "python -m benchmarks.own_images"
    for name, value in vars(options).items():
        command += f" --{name} {value}" if value != parser.get_default(name) else ""
    print(machine.write("own_images", command, results))


if __name__ == "__main__":
    main()
