"""The command line: `robustft quickstart`, `robustft doctor`, `robustft info`."""

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

    commands.add_parser("doctor", help="check the installation; exit code 1 when something is wrong")
    commands.add_parser("info", help="print what was compiled, as JSON")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        match command:
            case "quickstart":
                return _quickstart(**options)
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
    from robustft.quickstart import RECIPES, quickstart

    quickstart(method_names=tuple(methods or RECIPES), **options)
    return 0
