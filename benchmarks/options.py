"""The options of `robustft bench` and of `python -m benchmarks`. Loads nothing, so that --help answers at once."""

from __future__ import annotations

import argparse


def parser(prog: str) -> argparse.ArgumentParser:
    bench = argparse.ArgumentParser(
        prog=prog,
        description="Measures robustft's functions beside eager PyTorch, torch.compile, open_clip and faiss, "
        "interleaved in one run: time, memory and share of the matrix-product rate. Ends with the bar of the project, "
        "row by row. A killed run goes on where it was.",
    )
    bench.add_argument("--quick", action="store_true", help="smaller and fewer rows, in about two minutes")
    bench.add_argument("--only", default="", metavar="PATTERN", help="rows whose name matches, as 'contrastive N=512'")
    bench.add_argument("--threads", type=int, nargs="+", metavar="N", help="of all candidates (default: all cores)")
    bench.add_argument(
        "--output",
        metavar="FOLDER",
        help="of the results (default: benchmarks/results in the source tree, else robustft-benchmarks)",
    )
    bench.add_argument("--fresh", action="store_true", help="measure again what was measured already")
    return bench
