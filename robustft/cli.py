"""The command line: each command is a function of the package, with its arguments as flags."""

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
from robustft.pipeline import flags
from robustft.pipeline.checking import check_data
from robustft.pipeline.evaluating import evaluate_runs
from robustft.pipeline.exporting import export_run
from robustft.pipeline.recipes import DEFAULT_WORLD, RECIPES, SEEDS, STUDY_WORLD, WORLDS
from robustft.pipeline.reporting import report_runs
from robustft.pipeline.train import methods_table
from robustft.pipeline.train import train as train_function


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="robustft", description="Robust fine-tuning of CLIP-like models.")
    top.add_argument("--version", action="version", version=f"robustft {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    _add_own_data(commands)

    names = ", ".join(RECIPES)
    quickstart = commands.add_parser(
        "quickstart",
        help="fine-tune the bundled CLIP on the bundled data and write a report",
        description=f"Fine-tunes a tiny bundled CLIP on bundled images by {names}, mixes each with "
        "zero-shot (WiSE-FT, OSE), measures all on ID, shifts and OOD sets, and writes a report. Works offline.",
    )
    _add_bundled(quickstart, "run", DEFAULT_WORLD)
    quickstart.add_argument("--seed", type=int, default=0, help="of the fine-tuning (default: %(default)s)")
    quickstart.add_argument(
        "--methods", nargs="+", default=tuple(RECIPES), metavar="NAME", help=f"some of {names} (default: all)"
    )
    quickstart.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    quickstart.add_argument(
        "--precision", default=PRECISIONS[0], choices=PRECISIONS, help="of the training (default: %(default)s)"
    )
    quickstart.add_argument("--from-scratch", action="store_true", help="pre-train a model first")
    quickstart.add_argument("--pretrain-pairs", type=int, metavar="N", help="how long, in image-caption pairs")
    quickstart.add_argument("--limit-batches", type=int, metavar="N", help="at most N batches an epoch")
    quickstart.add_argument("--dry-run", action="store_true", help="one batch through everything, write nothing")

    study = commands.add_parser(
        "study",
        help="run every method on a bundled benchmark and say which papers' findings appear there",
        description="Runs every method on a bundled benchmark with several seeds, mixing weights chosen on ID "
        "validation, and writes study.html and study.md: tables, and for each claim of a paper whether it appears. "
        "Works offline.",
    )
    _add_bundled(study, "study", STUDY_WORLD)
    seeds = " ".join(map(str, SEEDS))
    study.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help=f"of the fine-tuning (default: {seeds})"
    )
    study.add_argument("--sections", nargs="+", default=(), metavar="NAME", help="some of the questions (default: all)")

    commands.add_parser("bench", help="measure every reduction against its peers on this machine", add_help=False)
    commands.add_parser("doctor", help="check the installation; exit code 1 when something is wrong")
    commands.add_parser("info", help="print what was compiled, as JSON")
    return top


def _add_bundled(command: argparse.ArgumentParser, held: str, world: str) -> None:
    """What the commands on the bundled data share; `held` is what their folder holds, `world` what they run on."""
    folder = f"runs/{command.prog.split()[-1]}"
    command.add_argument("--output", default=folder, help="folder to write (default: %(default)s)")
    command.add_argument(
        "--world",
        default=world,
        choices=WORLDS,
        help="handwritten digits, or emoji by ten studios (default: %(default)s)",
    )
    command.add_argument("--quick", action="store_true", help="fewer epochs and test images")
    command.add_argument("--resume", action="store_true", help=f"continue the {held} that the folder holds")


def _add_own_data(commands: Any) -> None:
    """The commands for one's own images."""
    train = commands.add_parser(
        "train",
        help="fine-tune a model on your images: a folder that serves, and a report",
        description="Fine-tunes a CLIP model on your images, chooses on validation data, measures, and leaves a folder "
        "with model, threshold and report. robustft check DATA first finds what is wrong with the images.",
    )
    train.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help="see docs/own_data.md")
    flags.add_flags(train, train_function)
    train.add_argument("--config", metavar="FILE", help="YAML of these options; a flag goes before it")
    train.add_argument("--print-config", action="store_true", help="print all options as YAML, and do nothing")
    train.add_argument("--list-methods", action="store_true", help="say what each method is for and needs")

    predict = commands.add_parser(
        "predict",
        help="what a run's model says of images",
        description="Labels images by the model of a run: class, calibrated probability, OOD score (higher = more "
        "in-distribution) and whether the image is accepted. Exit code 1 when a file could not be read.",
    )
    predict.add_argument("run", metavar="RUN", help="folder that robustft train wrote")
    predict.add_argument("files", nargs="+", metavar="FILE", help="images, or folders of them")
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a header")
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes named in JSON (default: %(default)s)")
    predict.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: 64)")
    predict.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes the GPU if there is one")
    predict.add_argument("--workers", type=int, metavar="N", help="processes that read images; by default one a core")
    predict.add_argument("--output", metavar="FILE", help="write to this file, which must not be there")
    predict.add_argument("--resume", action="store_true", help="go on behind the last line of the output file")

    evaluate = commands.add_parser("evaluate", help="measure runs, or a zero-shot model, on your data")
    evaluate.add_argument("data", metavar="DATA", help="as for train")
    evaluate.add_argument("runs", nargs="*", metavar="RUN", help="folders that robustft train wrote")
    flags.add_flags(evaluate, evaluate_runs)

    report = commands.add_parser("report", help="compare runs made at different times on one page")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or of reports")
    flags.add_flags(report, report_runs)

    export = commands.add_parser("export", help="write a run's model for open_clip, transformers, ONNX, torch.export")
    export.add_argument("run", metavar="RUN", help="folder that robustft train wrote")
    flags.add_flags(export, export_run)

    check = commands.add_parser("check", help="find what is wrong with your images before you train")
    check.add_argument("data", metavar="DATA", help="as for train")
    flags.add_flags(check, check_data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = given[0] if given else ""
    try:
        if command == "bench":  # its options are the benchmarks' own
            return _bench(given[1:])
        options = vars(parser().parse_args(given))
        match options.pop("command"):
            case "train":
                return _train(options)
            case "predict":
                return _predict(**options)
            case "evaluate":
                evaluate_runs(**flags.given(options))
                return 0
            case "report":
                if "output" not in options:
                    raise ValueError("--output is missing: robustft report RUN... --output FOLDER")
                report_runs(**options)
                return 0
            case "export":
                if missing := [name for name in ("to", "output") if name not in options]:
                    raise ValueError(f"--{missing[0]} is missing: robustft export RUN --to FORM --output FOLDER")
                export_run(**options)
                return 0
            case "check":
                return check_data(**flags.given(options))
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


def _train(options: dict[str, Any]) -> int:
    if options.pop("list_methods"):
        print(methods_table())
        return 0
    config, shown = options.pop("config"), options.pop("print_config")
    asked = flags.given(options)
    if config is None and asked.get("resume") and "data" not in asked and "output" in asked:
        config = os.path.join(asked["output"], "config.yaml")  # all that the run was asked for
    asked = (flags.read_config(config, train_function) if config else {}) | asked
    if shown:
        print(flags.config_text(train_function, asked), end="")
        return 0
    if missing := [name for name in ("data", "output") if asked.get(name) is None]:
        raise ValueError(f"{missing[0]} is missing: robustft train DATA --output FOLDER")
    train_function(**asked)
    return 0


def _predict(run: str, files: list[str], json: bool, csv: bool, top: int, **options: Any) -> int:
    from robustft.pipeline.predicting import predict_files

    failed = predict_files(run, files, form="json" if json else "csv" if csv else "table", top=top, **options)
    return 1 if failed else 0


def _quickstart(methods: list[str], **options: Any) -> int:
    from robustft.pipeline.quickstart import quickstart

    quickstart(method_names=methods, **options)
    return 0


def _study(**options: Any) -> int:
    from robustft.pipeline.study import study

    study(**options)
    return 0


def _bench(arguments: list[str]) -> int:
    # In the source tree the benchmarks lie beside the package, installed within it; others are not this robustft's.
    beside = find_spec("benchmarks")
    own = beside is not None and beside.origin == str(ROOT / "benchmarks" / "__init__.py")
    package = "benchmarks" if own else "robustft.benchmarks"
    options = import_module(f"{package}.options").parser("robustft bench").parse_args(arguments)
    return import_module(f"{package}.__main__").run(**vars(options))
