"""`check` as a command: the report of `robustft.data.check` on what lies at a path."""

from __future__ import annotations

import os

from typing_extensions import Unpack

from robustft.pipeline import flags
from robustft.pipeline.arguments import TrainingSets, spelled_out


@spelled_out
@flags.checked
def check_data(
    data: str | os.PathLike[str],
    *,
    workers: int | None = None,
    seed: int = 0,
    **where: Unpack[TrainingSets],
) -> int:
    """Decodes every image once and says what is damaged, odd, or there twice; 1 where something is serious.

    Args:
        workers: processes that decode; by default one a core.
        seed: of the split, where the data are not split.
    """
    from robustft.data.checking import check
    from robustft.data.opening import open as open_data
    from robustft.pipeline.opening import places

    flags.check_source(data)
    found = open_data(
        data,
        seed=seed,
        near_duplicates=False,  # `check` looks for them everywhere
        **places(where),
    )
    report = check(found, workers=workers if workers is not None else min(len(os.sched_getaffinity(0)), 16))
    print(report.table())
    return 1 if any(finding.serious for finding in report.findings) else 0
