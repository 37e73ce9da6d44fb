"""Unpacks IconWorld into a folder: `python -m robustft.data.iconworld FOLDER [--task kinds | concepts]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from robustft.data.iconworld.world import TASKS, unpack


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m robustft.data.iconworld",
        description="Unpack IconWorld into a folder of images with a table, as `robustft train` takes them.",
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="which classes (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(unpack(options.folder, options.task))
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
