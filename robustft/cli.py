"""The command line: `robustft quickstart`, `study`, `bench`, `doctor`, `info`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from robustft import __version__
from robustft.machine import PRECISIONS, ROOT
from robustft.pipeline.recipes import RECIPES, SEEDS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="robustft", description="Robust fine-tuning of CLIP-like models.")
    top.add_argument("--version", action="version", version=f"robustft {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    names = ", ".join(RECIPES)
    quickstart = commands.add_parser(
        "quickstart",
        help="fine-tune the bundled CLIP on the bundled data and write a report",
        description=f"Fine-tunes a tiny bundled CLIP on handwritten digits by {names}, mixes each with "
        "zero-shot (WiSE-FT, OSE), measures all on ID, shifts and OOD sets, and writes a report. Works offline.",
    )
    quickstart.add_argument("--output", default="runs/quickstart", help="folder to write (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="of the fine-tuning (default: %(default)s)")
    quickstart.add_argument(
        "--methods", nargs="+", default=tuple(RECIPES), metavar="NAME", help=f"some of {names} (default: all)"
    )
    quickstart.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    quickstart.add_argument(
        "--precision", default=PRECISIONS[0], choices=PRECISIONS, help="of the training (default: %(default)s)"
    )
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
    seeds = " ".join(map(str, SEEDS))
    study.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help=f"of the fine-tuning (default: {seeds})"
    )
    study.add_argument("--sections", nargs="+", metavar="NAME", help="some of the questions (default: all)")
    study.add_argument("--quick", action="store_true", help="fewer epochs and test images")
    study.add_argument("--resume", action="store_true", help="continue the study that the folder holds")

    commands.add_parser("bench", help="measure every reduction against its peers on this machine", add_help=False)
    commands.add_parser("doctor", help="check the installation; exit code 1 when something is wrong")
    commands.add_parser("info", help="print what was compiled, as JSON")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = given[0] if given else ""
    try:
        if command == "bench":  # its options are the benchmarks' own
            return _bench(given[1:])
        options = vars(parser().parse_args(given))
        match options.pop("command"):
            case "quickstart":
                return _quickstart(**options)
            case "study":
                return _study(**options)
            case "doctor":
                from robustft import doctor

                return doctor.run()
            case _:
                from robustft.ops.dispatch import build_info

                print(json.dumps(build_info(), indent=2))
                return 0
    except KeyboardInterrupt as interrupt:
        print(f"\nrobustft: interrupted. {interrupt}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # AssertionError is what a torch without CUDA raises when asked for it; ImportError names what is to be installed.
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, AssertionError, ImportError) as error:
        if os.environ.get("ROBUSTFT_TRACEBACK") == "1":
            raise
        print(f"robustft {command}: {error}", file=sys.stderr)
        print("(ROBUSTFT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def _quickstart(methods: list[str], **options: Any) -> int:
    from robustft.pipeline.quickstart import quickstart

    quickstart(method_names=methods, **options)
    return 0


def _study(sections: list[str] | None, **options: Any) -> int:
    from robustft.pipeline.study import SECTIONS, study

    study(sections=sections or tuple(SECTIONS), **options)
    return 0


def _bench(arguments: list[str]) -> int:
    # In the source tree the benchmarks lie beside the package, installed within it; others are not this robustft's.
    beside = find_spec("benchmarks")
    own = beside is not None and beside.origin == str(ROOT / "benchmarks" / "__init__.py")
    package = "benchmarks" if own else "robustft.benchmarks"
    options = import_module(f"{package}.options").parser("robustft bench").parse_args(arguments)
    return import_module(f"{package}.__main__").run(**vars(options))
