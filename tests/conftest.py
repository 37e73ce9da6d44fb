from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

# Set before torch starts its pool: on a busy machine two threads that wait for each other are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `benchmarks` beside the tests; last, so that robustft is the installed one.
sys.path.append(str(Path(__file__).parent.parent))

import children  # noqa: E402  (the environment above must come first)
import pytest  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPUINFO = Path("/proc/cpuinfo")
if INTERPRETED and CPUINFO.exists() and " avx512f" in CPUINFO.read_text():
    # The interpreter's products are numpy's, in another order of sums on each processor. With AVX-512 their rounding is
    # the larger one and takes up what is allowed to the kernels that are tested.
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")


def pytest_configure(config: pytest.Config) -> None:
    """The process of `-n` that hands out the tests runs none: it need not wait for torch."""
    if not getattr(config.option, "numprocesses", None) or hasattr(config, "workerinput"):
        gc.disable()  # what is imported stays; to look through it again and again takes a tenth of the time
        if hasattr(config, "workerinput") and not INTERPRETED:
            children.import_and_fork()
        import tiny_clip
        import torch_fixtures

        config.pluginmanager.register(torch_fixtures)
        config.pluginmanager.register(tiny_clip)


def pytest_unconfigure() -> None:
    children.end_forked()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker that has no tests left takes over half of a busy one's."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Runs `python -c` and `python -m` in processes of their own: see children.py."""
    with children.Children(tmp_path_factory.mktemp("python")) as started:
        yield started


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """The same where torch alone is imported, for tests of what imports the other libraries, and when."""
    with children.Children(tmp_path_factory.mktemp("python"), children.BARE) as started:
        yield started


SUITES = [
    *("test_contrastive.py", "test_sigmoid.py", "test_class_losses.py", "test_scores.py", "test_risks.py"),
    "ops/test_offsets.py",
]
"""What the Triton kernels compute too. Under the interpreter these are collected and its own, of both kinds the tests
that are for it (targets.py); elsewhere all but its own."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    own = collection_path.name.startswith("interpreted_")
    of_suites = collection_path.relative_to(Path(__file__).parent).as_posix() in SUITES
    return True if INTERPRETED != own and not (INTERPRETED and of_suites) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if INTERPRETED:
        items[:] = [i for i in items if "target" in i.fixturenames or i.path.name.startswith("interpreted")]
