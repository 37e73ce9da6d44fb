"""`check` as a command: the report of `robustft.data.check` on what lies at a path."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from robustft.pipeline import flags


@flags.checked
def check_data(
    data: str | os.PathLike[str],
    *,
    shifts: Mapping[str, str] | None = None,
    ood: Mapping[str, str] | None = None,
    images: str | None = None,
    csv_img_key: str | None = None,
    csv_label_key: str | None = None,
    csv_caption_key: str | None = None,
    csv_split_key: str | None = None,
    groups: Sequence[str] = (),
    csv_separator: str | None = None,
    class_names: str | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> int:
    """Decodes every image once and says what is damaged, odd, or there twice; 1 where something is serious.

    Args:
        shifts: further sets of the same classes, NAME=DATA.
        ood: sets of other classes, NAME=DATA.
        images: folder that the paths of a table or a split are relative to.
        csv_img_key: column of a table with the image files.
        csv_label_key: column of a table with the classes.
        csv_caption_key: column of a table with captions.
        csv_split_key: column of a table that tells train, val and test.
        groups: columns of a table that tell groups.
        csv_separator: between the columns of a table.
        class_names: what the classes are called in captions, as for train.
        workers: processes that decode; by default one a core.
        seed: of the split, where the data are not split.
    """
    from robustft.data.checking import check
    from robustft.data.opening import open as open_data
    from robustft.data.table import Columns
    from robustft.pipeline.opening import read_names

    flags.check_source(data)
    found = open_data(
        data,
        shifts=shifts,
        ood=ood,
        class_names=read_names(class_names),
        columns=Columns(csv_img_key, csv_caption_key, csv_label_key, csv_split_key, tuple(groups), csv_separator),
        images=images,
        seed=seed,
        near_duplicates=False,  # `check` looks for them everywhere
    )
    report = check(found, workers=workers if workers is not None else min(len(os.sched_getaffinity(0)), 16))
    print(report.table())
    return 1 if any(finding.serious for finding in report.findings) else 0
