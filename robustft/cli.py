"""The command line: `robustft quickstart`, `study`, `bench`, `doctor`, `info`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="robustft", description="Robust fine-tuning of CLIP-like models.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    quickstart = commands.add_parser(
        "quickstart",
        help="fine-tune the bundled CLIP on the bundled data and write a report",
        description="Fine-tunes a tiny bundled CLIP on handwritten digits by FT, FLYP and CaRot, mixes each with "
        "zero-shot (WiSE-FT, OSE), measures all on ID, shifts and OOD sets, and writes a report. Works offline.",
    )
    quickstart.add_argument("--output", default="runs/quickstart", help="folder to write (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="of the fine-tuning (default: %(default)s)")
    quickstart.add_argument(
        "--methods", nargs="+", default=None, metavar="NAME", help="some of FT, FLYP, CaRot (default: all)"
    )
    quickstart.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    quickstart.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    quickstart.add_argument("--quick", action="store_true", help="fewer epochs and test images")
    quickstart.add_argument("--resume", action="store_true", help="continue the run that the folder holds")
    quickstart.add_argument("--from-scratch", action="store_true", help="pre-train a model first")
    quickstart.add_argument("--pretrain-pairs", type=int, metavar="N", help="how long, in image-caption pairs")
    quickstart.add_argument("--limit-batches", type=int, metavar="N", help="at most N batches an epoch")
    quickstart.add_argument("--dry-run", action="store_true", help="one batch through everything, write nothing")

    study = commands.add_parser(
        "study",
        help="run every method on the bundled benchmark and say which papers' findings appear there",
        description="Runs every method on GlyphWorld with several seeds, mixing weights chosen on ID validation, and "
        "writes study.html and study.md: tables, and for each claim of a paper whether it appears. Works offline.",
    )
    study.add_argument("--output", default="runs/study", help="folder to write (default: %(default)s)")
    study.add_argument("--seeds", type=int, nargs="+", metavar="N", help="of the fine-tuning (default: 0 1 2)")
    study.add_argument("--sections", nargs="+", metavar="NAME", help="some of the questions (default: all)")
    study.add_argument("--quick", action="store_true", help="fewer epochs and test images")
    study.add_argument("--resume", action="store_true", help="continue the study that the folder holds")

    bench = commands.add_parser(
        "bench",
        help="measure every reduction against its peers on this machine",
        description="Measures robustft's functions beside eager PyTorch, torch.compile, open_clip and faiss, "
        "interleaved in one run: time, memory and share of the matrix-product rate. Ends with the bar of the project, "
        "row by row. A killed run goes on where it was.",
    )
    add_bench_arguments(bench)

    commands.add_parser("doctor", help="check the installation; exit code 1 when something is wrong")
    commands.add_parser("info", help="print what was compiled, as JSON")
    return top


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    """The options of `robustft bench` and of `python -m benchmarks`."""
    bench.add_argument("--quick", action="store_true", help="smaller and fewer rows, in about two minutes")
    bench.add_argument("--only", default="", metavar="PATTERN", help="rows whose name matches, as 'contrastive N=512'")
    bench.add_argument("--threads", type=int, nargs="+", metavar="N", help="of all candidates (default: all cores)")
    bench.add_argument(
        "--output",
        metavar="FOLDER",
        help="of the results (default: benchmarks/results in the source tree, else robustft-benchmarks)",
    )
    bench.add_argument("--fresh", action="store_true", help="measure again what was measured already")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        match command:
            case "quickstart":
                return _quickstart(**options)
            case "study":
                return _study(**options)
            case "bench":
                return _bench(**options)
            case "doctor":
                from robustft import doctor

                return doctor.run()
            case _:
                import robustft

                print(json.dumps(robustft.build_info(), indent=2))
                return 0
    except KeyboardInterrupt as interrupt:
        print(f"\nrobustft: interrupted. {interrupt}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # AssertionError is what a torch without CUDA raises when asked for it.
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, AssertionError) as error:
        if os.environ.get("ROBUSTFT_TRACEBACK") == "1":
            raise
        print(f"robustft {command}: {error}", file=sys.stderr)
        print("(ROBUSTFT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _quickstart(methods: list[str] | None, **options: object) -> int:
    from robustft.pipeline.quickstart import RECIPES, quickstart

    quickstart(method_names=tuple(methods or RECIPES), **options)
    return 0


def _study(seeds: list[int] | None, sections: list[str] | None, **options: object) -> int:
    from robustft.pipeline.study import SECTIONS, SEEDS, study

    study(seeds=tuple(seeds or SEEDS), sections=tuple(sections or SECTIONS), **options)
    return 0


def _bench(**options: object) -> int:
    try:
        from robustft.benchmarks.__main__ import run
    except ModuleNotFoundError as error:
        if error.name != "robustft.benchmarks":
            raise
        from benchmarks.__main__ import run  # not installed: the source tree

    return run(**options)
