"""The Triton kernels where there is no GPU: values by Triton's interpreter, resources by compiling for one.

And what can be known of their launches: these are recorded, on tensors without data, instead of run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from importlib.metadata import version
from itertools import product
from pathlib import Path

import pytest
import torch
from targets import case, exhaustive

import robustft
import robustft.functional  # declares the operators
from benchmarks import sass
from benchmarks import triton_resources as resources
from robustft.ops import accelerator, dispatch, layouts, registry
from robustft.ops.triton import configs, table

TESTS = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(dispatch.LIBRARIES["cpu"] != "loaded", reason="installed without compiled code (no compiler)"),
]


# Of the suites that conftest.py collects for the interpreter; .ci/run has `TRITON_INTERPRET=1 pytest` run all of them.
SOME = [
    "test_contrastive.py::test_contrastive_loss_is_as_accurate_as_eager[labels-100.0-triton-cpu-float32]",
    "test_sigmoid.py::test_distillation_is_as_accurate_as_eager[10.0--10.0-triton-cpu-float32]",
    "test_class_losses.py::test_classification_loss_is_as_accurate_as_eager[softplus-100.0-triton-cpu-float32]",
    "test_class_losses.py::test_dual_risk_is_as_accurate_as_eager[True-triton-cpu-float16]",
    "test_scores.py::test_scores_are_as_accurate_as_eager[scales1-triton-cpu-float32]",
    "test_risks.py::test_penalty_is_as_accurate_as_eager[neg_log_ratio-False-triton-cpu-float32]",
    "ops/interpreted_triton.py::test_labels_that_are_no_class_make_their_own_losses_nan",
    "ops/interpreted_triton.py::test_rectangles_are_as_the_reference[panels-dtype0-False-False]",
    "ops/interpreted_triton.py::test_rectangles_are_as_the_reference[library-dtype2-False-True]",
]

# They launch every kernel: on the oldest torch .ci/run has no others.
NOTING = """
import sys

import pytest
import robustft.functional
from robustft.ops.triton import class_losses, classes, contrastive, launch, misalignment, scores, sigmoid

modules = [module for name, module in sys.modules.items() if name.startswith("robustft.ops.triton.")]
kernels = {name: kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")}
launched, started = [], launch.launch

def noting(kernel, *arguments, **options):
    launched.append(kernel)
    started(kernel, *arguments, **options)

for module in modules:
    if getattr(module, "launch", None) is started:
        module.launch = noting
code = pytest.main(sys.argv[1:])
print("never launched:", [name for name, kernel in kernels.items() if not any(kernel is one for one in launched)])
sys.exit(code)
"""


def test_some_interpreted_kernels_of_each_suite_pass(bare_python):
    if version("triton") < "3.7" and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        pytest.skip("Triton 3.6's interpreter needs NumPy before 2.4")
    # Whether a kernel is interpreted is decided when it is defined: hence a process of its own.
    paths = (str(Path(robustft.__file__).parent.parent), str(TESTS), os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(paths).rstrip(os.pathsep)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # Of what is computed beside the matrix and thrown away, numpy says that it divides by zero.
    command = ["-c", NOTING, "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = bare_python.run(*command, *(TESTS / name for name in SOME), environment=environment)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert f"{len(SOME)} passed" in run.stdout and " skipped" not in run.stdout
    assert "never launched: []" in run.stdout, run.stdout[-500:]


def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def recorded(n: int, *, d: int = 512, teacher: bool = False, labels: bool = False, keep: bool = True):
    """The launches of a bfloat16 loss, forward and backward."""
    from robustft.ops.triton import contrastive
    from robustft.ops.triton.launch import recorded

    x, t, s, g = new(n, d, dtype=torch.bfloat16), new(n, d, dtype=torch.bfloat16), new(()), new(n)
    y = new(n, dtype=torch.int64) if labels else None
    with recorded("sm_90") as forward:
        if teacher:
            out = contrastive.contrastive_distillation_loss(x, t, s, x, t, s, y, keep)
        else:
            out = contrastive.contrastive_loss(x, t, s, y, 0.0, keep)
    with recorded("sm_90") as backward:
        if teacher:
            inputs = (g, g, x, t, s, x, t, s, y, *out[2:])
            contrastive.contrastive_distillation_loss_backward(*inputs)
        else:
            contrastive.contrastive_loss_backward(g, x, t, s, y, 0.0, *out[1:])
    return forward, backward


def test_rows_that_the_library_multiplies_are_aligned_whatever_the_size(monkeypatch):
    monkeypatch.setattr(configs, "by_library", lambda *_: True)
    for keep in (False, True):
        (strips, _), (_, weights, _) = recorded(5001, keep=keep)
        strides = strips.arguments["STRIDE"], weights.arguments["weights_stride"], weights.arguments["given_stride"]
        assert strides == (8192, 5056, 0 if keep else 5056) and 5056 % 64 == 0


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("n", [1, 512, 2047])
def test_small_losses_take_two_launches_and_one(n, labels, teacher):
    # Tensors without data also prove that nothing asks for a value, which would wait for the device.
    forward, backward = recorded(n, labels=labels, teacher=teacher)
    assert [launch.kernel.__name__ for launch in forward] == ["statistics_kernel", "combine_kernel"]
    assert [launch.kernel.__name__ for launch in backward] == ["gradient_kernel"]


@pytest.mark.parametrize(("teacher", "gradient"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("n", [1, 512, 50_001])
def test_every_entry_of_the_sigmoid_losses_is_in_one_piece(n, teacher, gradient):
    from robustft.ops.triton import sigmoid
    from robustft.ops.triton.launch import recorded

    x, s, labels, weight = new(n, 512), new(()), new(n, dtype=torch.int64), new(1 + teacher, n) if gradient else None
    of_teacher = (x, x, s, s) if teacher else (None,) * 4
    with recorded("sm_90") as launches:
        sigmoid.sigmoid_sweep(x, x, s, s, labels, labels, *of_teacher, weight, None, False, "highest")
    seen = 0
    for kernel, programs, a, _ in launches:
        assert kernel.__name__ == "sigmoid_kernel" and programs == -(-a["rows"] // a["BM"])
        assert a["rows"] <= a["S"].shape[0] and a["cols"] <= a["S"].shape[1] and (a["G"] is not None) == gradient
        seen += a["rows"] * a["cols"]
    assert seen == n * n and (n > 8192 or len(launches) == 1)


def recorded_classes(n: int, *, k: int = 1000, heads: int = 1, top1: bool = False, keep: bool = True):
    """Likewise of a loss on k classes."""
    from robustft.ops.triton import classes
    from robustft.ops.triton.launch import recorded

    x, w, s, g = new(n, 512, dtype=torch.bfloat16), new(heads * k, 512, dtype=torch.bfloat16), new(()), new(n)
    y, core = new(n, dtype=torch.int64), new(n, k)
    with recorded("sm_90") as forward:
        if heads == 2:
            out = classes.dual_risk(x, w, s, y, core, keep)
        else:
            out = classes.classification_loss(x, w, s, new(k), y, "softplus", top1, 0.1, keep)
    with recorded("sm_90") as backward:
        if heads == 2:
            classes.dual_risk_backward(g, g, x, w, s, y, core, *out[2:])
        else:
            classes.classification_loss_backward(g, g, x, w, s, new(k), y, top1, 0.1, *out[2:])
    return forward, backward


@pytest.mark.parametrize("n", [1, 512, 2047])
def test_small_class_losses_take_three_launches_at_most_and_one(n):
    def names(launches):
        return [launch.kernel.__name__ for launch in launches]

    for how, before, combine in (
        ({}, ["label_kernel"], "classification"),
        ({"top1": True}, [], "classification"),
        ({"heads": 2}, [], "dual"),
    ):
        forward, backward = recorded_classes(n, **how)
        assert names(forward) == [*before, "class_statistics_kernel", f"{combine}_combine_kernel"]
        assert names(backward) == ["class_gradient_kernel"]


def record_scores_and_penalties(n: int, k: int = 100):
    from robustft.ops.triton import misalignment, scores
    from robustft.ops.triton.launch import recorded

    x, w, z, y = new(n, 512), new(k, 512), new(n, k), new(n, dtype=torch.int64)
    with recorded("sm_90") as launches:
        scores.class_scores(x, w, 1.0, new(()), "highest")
        kept = misalignment.misalignment_penalty(z, y, "ratio", True)[2]
        misalignment.misalignment_penalty_backward(new(n), z, y, True, kept)
    return launches


def test_scores_and_penalties_take_one_launch():
    assert len(record_scores_and_penalties(999)) == 3


@pytest.mark.parametrize("heads", [1, 2])
def test_without_kept_exponentials_the_memory_of_classes_grows_with_n_alone(heads):
    def memory(n: int, k: int) -> int:
        """Besides features, embeddings and their gradients."""
        tensors = {
            id(of.untyped_storage()): of.untyped_storage().nbytes()
            for launches in recorded_classes(n, k=k, heads=heads, keep=False)
            for launch in launches
            for name, of in launch.arguments.items()
            if isinstance(of, torch.Tensor) and name not in ("X", "W", "Q", "DX")
        }
        return sum(tensors.values())

    for k in (1000, 100_000):
        assert memory(2**20, k) <= 2.01 * memory(2**19, k)
        panels = 4 * 2**28 + 2 * 4 * heads * k * 512
        assert memory(2**19, k) <= panels + 80 * 2**19 * heads


def test_every_row_is_in_one_panel_and_every_class_in_one_stretch():
    from robustft.ops.triton import configs

    for keep in (True, False):
        forward, backward = recorded_classes(200_001, keep=keep)
        for kernel, of in (("class_statistics_kernel", forward), ("class_gradient_kernel", backward)):
            panels = [(a["row0"], a["rows"]) for name, _, a, _ in of if name.__name__ == kernel]
            assert [row0 + rows for row0, rows in panels] == [*(row0 for row0, _ in panels[1:]), 200_001]
    for name, programs, a, _ in backward:
        if name.__name__ == "class_gradient_kernel":
            blocks = -(-1000 // a["BM"]) * -(-512 // a["BD"])
            of_x = -(-a["rows"] // a["BM"]) * -(-512 // a["BD"])
            assert programs == blocks * a["SPLITS"] + of_x + (a["row0"] == 0)
            assert a["DW"].shape == (a["SPLITS"], 1000, 512) and a["SPLITS"] <= configs.SPLIT_BLOCKS // blocks


def test_every_row_is_in_one_panel(monkeypatch):
    monkeypatch.setattr(configs, "LIBRARY_FROM", {})
    for keep in (True, False):
        forward, backward = recorded(50_001, keep=keep)
        for kernel, of in (("statistics_kernel", forward), ("gradient_kernel", backward)):
            panels = [(a["row0"], a["rows"]) for name, _, a, _ in of if name.__name__ == kernel]
            assert [row0 + rows for row0, rows in panels] == [*(row0 for row0, _ in panels[1:]), 50_001]


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("n", [8192, 50_001])
def test_every_entry_of_a_large_matrix_is_in_one_strip_and_one_piece(n, labels, teacher):
    for keep in (True, False):
        forward, backward = recorded(n, teacher=teacher, labels=labels, keep=keep)
        names = [launch.kernel.__name__ for launch in (*forward, *backward)]
        assert set(names) == {"strips_kernel", "combine_kernel", "factors_kernel", "weights_kernel", "finish_kernel"}
        seen = dict.fromkeys(("strips_kernel", "weights_kernel"), 0)
        for kernel, programs, a, _ in (*forward, *backward):
            if kernel.__name__ == "strips_kernel":
                width = a["BN"] * a["CHUNKS"]
                assert programs == -(-a["piece_rows"] // a["BM"]) * -(-a["piece_cols"] // width)
                assert a["row_tile"] * a["BM"] + a["piece_rows"] <= a["rows"] and a["row0"] % 64 == 0
                assert a["col_tile"] * width + a["piece_cols"] <= n
                seen["strips_kernel"] += a["piece_rows"] * a["piece_cols"]
                sides = a["BM"], width
            elif kernel.__name__ == "weights_kernel":
                assert programs == -(-a["rows"] // (a["BM"] * a["CHUNKS"])) * -(-a["cols"] // a["BN"])
                # Each of its tiles lies in one strip, by whose record it reads.
                assert (a["TILE_M"], a["TILE_N"]) == sides
                assert (
                    a["TILE_M"] % a["BM"] == a["TILE_N"] % a["BN"] == 0 == a["row0"] % sides[0] == a["col0"] % sides[1]
                )
                seen["weights_kernel"] += a["rows"] * a["cols"]
        assert set(seen.values()) == {n * n}


@pytest.mark.parametrize(("teacher", "n"), [(False, 2**19), (True, 2**19), *exhaustive((False, 2**20), (True, 2**20))])
def test_without_kept_exponentials_memory_grows_with_n(teacher, n):
    def memory(n: int) -> int:
        tensors = {
            id(of.untyped_storage()): of.untyped_storage().nbytes()
            for launches in recorded(n, teacher=teacher, keep=False)
            for launch in launches
            for of in launch.arguments.values()
            if isinstance(of, torch.Tensor)
        }
        return sum(tensors.values())

    a, b = memory(n // 2), memory(n)
    assert b <= 2.01 * a
    assert b < 40e9 * n / 2**20  # a million pairs, with features and gradients, in half of an 80 GB card


def test_memory_budgets_and_fakes_follow_the_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(96, 8, dtype=torch.bfloat16, device="cuda" if torch.version.cuda else "cpu")
        body = registry.body("contrastive_loss", x.device, x.dtype)
        if body == "triton":
            outputs = torch.ops.robustft.contrastive_loss(x, x, torch.empty((), device=x.device), None, 0.0, True)
            assert [o.shape for o in outputs[2:4]] == [(11, 96), (8, 96)]
            assert outputs[-1].shape == (96, 128) and outputs[-1].dtype == torch.bfloat16
            assert layouts.fits("auto", body, 32768, 32768, x, 2)
            assert not layouts.fits("auto", body, 32768, 32769, x, 2)


def test_importing_robustft_does_not_import_triton(bare_python):
    # torch itself may: what counts is that robustft adds no module of Triton's.
    code = (
        "import sys, torch; before = {m for m in sys.modules if m.startswith('triton')}; import robustft;"
        "print(sorted(m for m in sys.modules if m.startswith('triton') and m not in before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(robustft.__file__).parent.parent)}
    assert bare_python.run("-c", code, environment=environment, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_blocks_divide_the_tiles_that_they_read(architecture):
    from robustft.ops.triton import configs

    works, precisions = (1, 2, 3, "classes", "heads"), ("highest", "high", "medium")
    for dtype, precision, small, work in product(accelerator.DTYPES, precisions, (False, True), works):
        with case(dtype, precision, small, work):
            rows, key = configs.blocks(architecture, configs.gradient_arithmetic(dtype, precision), work, small)
            for kept_by in {1, work} if isinstance(work, int) else {work}:  # keep_kernel, statistics_kernel
                tile = configs.tile(512, architecture, configs.arithmetic(dtype, precision), kept_by, small)
                for side in (tile.bm, tile.bn):
                    assert side % rows[key].bm == side % rows[key].bk == 0 and side >= layouts.LEAST_TILE
                    assert configs.PANEL_ROWS % side == 0
    assert all(configs.PANEL_ROWS % row.bs == 0 for row in table.COMBINES.values())


def test_a_backward_reads_its_forwards_records_whatever_has_become_of_the_precision():
    from robustft.ops.triton import autotune, configs

    for work in (1, 2, 3, "classes", "heads"):
        rows = [configs.tiles("sm_90", arithmetic, work, True) for arithmetic in ("ieee", "tf32x3", "tf32")]
        first = 1 if isinstance(work, str) else 0  # of classes, records are of columns
        assert len({rows[key][first:2] for rows, key in rows}) == 1
        for row in rows:
            sides = {tile[:2] for tile in autotune.tiles(row)}
            assert sides == {row[0][row[1]][:2]}


def test_a_block_that_was_tuned_beside_larger_tiles_is_cut_to_smaller_ones(monkeypatch):
    from robustft.ops.triton import configs

    row = ("sm_90", "tf32", 1, True)
    monkeypatch.setattr(table, "FLOAT_BLOCKS", {("tf32", 1): table.Block(128, 128, 64, 8, 3)})
    assert configs.block(512, table.Tile(128, 64, 32, 8, 3), *row) == (64, 128, 64, 8, 3)
    assert configs.block(40, table.Tile(32, 64, 32, 4, 3), *row) == (32, 64, 32, 8, 3)


def half_rows(family: str, tile: tuple, block: tuple) -> set[tuple[str, object]]:
    return {("HALF_TILES", ("sm_90", *tile)), ("COMBINES", family), ("HALF_BLOCKS", ("sm_90", *block))}


FAMILIES = {
    "contrastive": lambda: recorded(4096),
    "distillation": lambda: recorded(4096, teacher=True),
    "panels": lambda: recorded(4096, teacher=True, keep=False),
    "classes": lambda: recorded_classes(4096),
    "heads": lambda: recorded_classes(512, heads=2),
    "scores and penalties": lambda: record_scores_and_penalties(9999),
}
ROWS = {
    "contrastive": half_rows("contrastive", (1, False), (1, False)),
    "distillation": half_rows("contrastive", (2, False), (2, False)),
    "panels": half_rows("contrastive", (2, False), (2, False)) | {("HALF_TILES", ("sm_90", 1, False))},
    "classes": half_rows("classes", ("classes", False), ("classes", False)),
    "heads": half_rows("classes", ("heads", True), ("heads", True)),
    "scores and penalties": {("FLOAT_TILES", ("ieee", "scores")), ("PENALTIES", "sm_90")},
}
"""Of the table, what an operator of each family meets."""


@pytest.fixture
def tuning(monkeypatch):
    """ROBUSTFT_AUTOTUNE with times of the test's choice, in place of those of a GPU: `times(candidate)`."""
    from robustft.ops.triton import autotune

    for name in autotune.TABLES:
        monkeypatch.setattr(table, name, dict(getattr(table, name)))
    monkeypatch.setattr(autotune, "WANTED", True)
    monkeypatch.setattr(autotune, "_tuned", set())
    monkeypatch.setattr(autotune, "_print_at_exit", lambda: None)
    before = {name: dict(getattr(table, name)) for name in autotune.TABLES}
    tried: dict[tuple[str, object], list] = {}
    tune, met = autotune.tune, []

    def tuned(row, *how):
        name = next(name for name in autotune.TABLES if getattr(table, name) is row[0])
        met.append((name, row[1]))
        tune(row, *how)

    def start(times):
        def milliseconds(run) -> float:
            run()
            name, key = met[-1]
            tried.setdefault(met[-1], []).append(getattr(table, name)[key])
            return times(tried[met[-1]][-1])

        monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
        monkeypatch.setattr(autotune, "tune", tuned)
        return before, tried

    return start


def some_time(candidate) -> int:
    """Its own for most candidates, the least somewhere among them."""
    return 1 + sum((k + 1) * value for k, value in enumerate(candidate)) * 37 % 101


@pytest.mark.parametrize("family", FAMILIES)
def test_autotuning_takes_the_fastest_for_the_rows_of_each_family(family, tuning, capsys):
    from robustft.ops.triton import autotune

    before, tried = tuning(some_time)
    FAMILIES[family]()
    printed = capsys.readouterr().out
    assert set(tried) == ROWS[family]
    for (name, key), candidates in tried.items():
        assert candidates[0] == before[name][key] and len(candidates) == len(set(candidates)) > 10
        best = min(candidates, key=some_time)
        assert getattr(table, name)[key] == best
        assert f"{name}[{key!r}] = {autotune._literal(best)}  # {some_time(best):.3f} ms" in printed
    for name in autotune.TABLES:
        unmet = {key for key in before[name] if (name, key) not in tried}
        assert all(getattr(table, name)[key] == before[name][key] for key in unmet)
    count = sum(map(len, tried.values()))
    FAMILIES[family]()
    assert sum(map(len, tried.values())) == count  # once a row


def test_the_table_that_autotuning_prints_is_the_one_to_commit(tuning):
    from robustft.ops.triton import autotune

    source = Path(table.__file__).read_text()
    assert source.endswith("-\n" + autotune.text())  # as it stands, to the last character
    tuning(lambda candidate: 1.0 / (1 + sum(candidate)))
    for run in FAMILIES.values():
        run()
    printed = autotune.text()
    assert printed != source.split("# ---")[1].split("\n", 1)[1]
    pasted: dict = {}
    exec(source.split("# ---")[0] + printed, pasted)
    for name in autotune.TABLES:
        assert pasted[name] == getattr(table, name)


def test_what_cannot_be_timed_leaves_the_table_as_it_was(tuning):
    from robustft.ops.triton import autotune

    before, tried = tuning(lambda candidate: float("inf"))
    FAMILIES["classes"]()
    assert tried and all(getattr(table, name) == before[name] for name in autotune.TABLES)


def test_a_candidate_that_fails_takes_forever(monkeypatch):
    from robustft.ops.triton import autotune

    def do_bench(run, **_):
        return run()

    def too_large():
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert autotune._milliseconds(lambda: 0.25) == 0.25
    assert autotune._milliseconds(too_large) == float("inf")


@pytest.mark.exhaustive
def test_autotuning_prints_its_table_when_the_process_ends(python):
    code = "from robustft.ops.triton import autotune; autotune._print_at_exit(); autotune._print_at_exit()"
    environment = {**os.environ, "PYTHONPATH": str(Path(robustft.__file__).parent.parent), "ROBUSTFT_AUTOTUNE": "1"}
    run = python.run("-c", code, environment=environment, check=True)
    assert Path(table.__file__).read_text().endswith("-\n" + run.stdout)


@pytest.mark.parametrize(
    "capability, row", [(7, "sm_80"), (8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (11, "sm_100"), (12, "sm_80")]
)
def test_a_device_takes_the_row_of_its_kind(monkeypatch, capability, row):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    assert accelerator.architecture.__wrapped__(torch.device("cuda", 0)) == row


@pytest.mark.parametrize("able", [False, True])
def test_an_older_triton_leaves_sm_100_to_the_reference(monkeypatch, able):
    def computed(x):
        by = registry.body("contrastive_loss", torch.device("cuda", 0), torch.bfloat16)
        return x + 1 if by == "triton" else x

    def architecture(device):
        print(device)  # asking a device is nothing that can be traced either
        return "sm_100"

    monkeypatch.setattr(accelerator, "architecture", architecture)
    monkeypatch.setattr(accelerator, "TENSOR_MEMORY", able)
    torch.compiler.reset()
    for function in (computed, torch.compile(computed, fullgraph=True, backend="eager")):
        assert function(torch.zeros(())) == float(able)


HELD = json.loads(resources.RESULTS.read_text())
OLDEST, NEWEST = min(HELD["triton"], key=resources.numbers), max(HELD["triton"], key=resources.numbers)


def test_the_table_of_resources_is_of_these_kernels_and_complete():
    assert HELD["sources"] == resources.sources(), "run python -m benchmarks.triton_resources"
    assert set(HELD["cases"]) == {case.name for case in resources.cases()}


def test_it_holds_what_the_oldest_triton_and_a_newer_one_make_of_each_kernel():
    assert OLDEST.startswith("3.6.") and resources.numbers(NEWEST) >= (3, 9)
    for name, kernels in HELD["cases"].items():
        assert set(kernels.values()) <= set(HELD["triton"][NEWEST]), name
        # Triton before 3.8 does not compile for sm_100.
        assert name.startswith("sm_100") or set(kernels.values()) <= set(HELD["triton"][OLDEST]), name


SPILLS = {
    (OLDEST, "sm_80, float32 highest, student, small", "gradient_kernel"): 16,
    (OLDEST, "sm_90, bfloat16, student, large", "statistics_kernel"): 24,
    (OLDEST, "sm_90, float32 high, teacher, small", "gradient_kernel"): 8,
    (OLDEST, "sm_90, float32 high, classification_loss, small", "class_gradient_kernel"): 8,
}
"""Bytes of a thread's stack, of what spills at all."""


@pytest.mark.parametrize("triton", [OLDEST, NEWEST])
def test_no_configuration_spills_more_than_is_known_or_exceeds_shared_memory(triton):
    made = HELD["triton"][triton]
    for one in resources.cases():
        with case(one.name):
            check(one, {name: made[of] for name, of in HELD["cases"][one.name].items() if of in made}, triton)
    spilling = {name for of in HELD["triton"].values() for name, kernel in of.items() if kernel["stack"]}
    assert len(spilling) == len(SPILLS)


def check(of_case: resources.Case, kernels: dict, triton: str) -> None:
    ieee = of_case.dtype == "float32" and of_case.precision == "highest"
    for name, of in kernels.items():
        assert of["shared"] <= resources.SHARED[of_case.architecture], name
        assert of["stack"] <= SPILLS.get((triton, of_case.name, name), 0), name
        elementwise = name.endswith("combine_kernel") or name.startswith(("misalignment", "sigmoid"))
        multiplies = not of_case.library and not elementwise
        if multiplies and not ieee:
            assert of["HMMA"] + of["HGMMA"] + of["UTCHMMA"] > 0, name
        if name.endswith(("statistics_kernel", "scores_kernel")) and of_case.dtype == "bfloat16":
            assert of[resources.TENSOR_CORES[of_case.architecture]] > 0


def per_logit(made: dict, name: str) -> float:
    """Instructions of a warp in the kernel's longest way, for each 32 logits of it."""
    way = made["once"] if name == "statistics_kernel" else max([*made["loops"], made["once"]])
    logits = made["BM"] * (made["BK"] if name == "gradient_kernel" else made["BN"])
    return 32 * made["num_warps"] * way[0] / logits


CEILINGS = {
    ("sm_90, bfloat16, student, small", "statistics_kernel"): (42.9, 49152),
    ("sm_90, bfloat16, student, small", "gradient_kernel"): (18.4, 50712),
    ("sm_90, bfloat16, student, large", "statistics_kernel"): (40.9, 98304),
    ("sm_90, bfloat16, student, large", "gradient_kernel"): (19.4, 99864),
    ("sm_90, bfloat16, student, by the library", "strips_kernel"): (23.5, 2048),
    ("sm_90, bfloat16, student, by the library", "weights_kernel"): (7.2, 512),
    ("sm_90, bfloat16, teacher, small", "statistics_kernel"): (104.0, 49152),
    ("sm_90, bfloat16, teacher, small", "gradient_kernel"): (33.2, 34360),
    ("sm_90, bfloat16, teacher, large", "statistics_kernel"): (89.4, 73728),
    ("sm_90, bfloat16, teacher, large", "gradient_kernel"): (33.7, 46648),
    ("sm_90, bfloat16, teacher, by the library", "strips_kernel"): (28.8, 2048),
    ("sm_90, bfloat16, teacher, by the library", "weights_kernel"): (12.0, 512),
    ("sm_90, bfloat16, sigmoid_contrastive_loss, large", "sigmoid_kernel"): (50.0, 1024),
}
"""Of the bar's kernels: instructions a logit and bytes of shared memory, of whichever Triton makes more of them."""


def test_kernels_of_the_bar_issue_no_more_instructions_than_they_did():
    for (name, kernel), (instructions, shared) in CEILINGS.items():
        for by, kernels in HELD["triton"].items():
            made = kernels[HELD["cases"][name][kernel]]
            assert per_logit(made, kernel) <= instructions and made["shared"] <= shared, (name, kernel, by)


@pytest.mark.parametrize("architecture, heads", exhaustive(*product(("sm_90", "sm_80", "sm_100"), (1, 2))))
def test_compiling_here_gives_what_the_table_says(architecture, heads):
    if not resources.able(architecture):
        pytest.skip("this Triton does not compile for sm_100: test_an_older_triton_leaves_sm_100_to_the_reference")
    # The rows that most losses take; the whole table is minutes of compiling.
    small = resources.Case(architecture, "bfloat16", "highest", heads, True)
    names, made = resources.measure(small)
    assert names == HELD["cases"][small.name]
    found = {name: made[of] for name, of in names.items()}
    check(small, found, version("triton"))
    if version("triton") in HELD["triton"]:
        held = HELD["triton"][version("triton")]
        assert json.loads(json.dumps(made)) == {of: held[of] for of in names.values()}
        return
    for name in ("statistics_kernel", "gradient_kernel"):  # a version between those: no worse than the worse of them
        limits = [kernels[names[name]] for kernels in HELD["triton"].values() if names[name] in kernels]
        assert per_logit(found[name], name) <= 1.15 * max(per_logit(limit, name) for limit in limits), name
        assert found[name]["shared"] <= 1.2 * max(limit["shared"] for limit in limits), name


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x70 ;
        /*0020*/                   SHFL.BFLY PT, R2, R3, 0x10, 0x1f ;
        /*0030*/                   MUFU.EX2 R2, R2 ;
        /*0040*/               @P1 BRA 0x60 ;
        /*0050*/                   FADD R2, R2, R2 ;
        /*0060*/               @P2 BRA 0x20 ;
        /*0070*/               @P3 EXIT ;
        /*0080*/                   HMMA.16816.F32 R0, R1, R2, RZ ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_ways_are_the_shortest_through_a_loop_and_beside_it():
    once, loops = sass.ways(SASS)
    assert once == sass.Way(5, 0, 0, 1)  # MOV, BRA, EXIT that not all take, HMMA, EXIT
    assert loops == [sass.Way(4, 1, 1, 0)]  # not FADD
    nested = SASS.replace("@P3 EXIT ;", "@P3 BRA 0x10 ;")
    _, (inner, outer) = sass.ways(nested)
    assert inner == loops[0] and outer == sass.Way(2, 0, 0, 0)  # both branches; the inner loop is its own
    left = SASS.replace("@P3 EXIT ;", "@P3 CALL.REL.NOINC 0x90 ;")  # as for sm_80: one that does not return
    assert sass.ways(left) == (sass.Way(4, 0, 0, 0), loops)  # MOV, BRA, CALL, EXIT
    ends = SASS.replace("HMMA.16816.F32 R0, R1, R2, RZ ;", "BRA 0x20 ;").replace(
        "/*0090*/                   EXIT ;", ""
    )
    assert sass.ways(ends)[0] == sass.Way(2, 0, 0, 0)  # MOV, BRA; the exit is in the loop
    nowhere = SASS.replace("HMMA.16816.F32 R0, R1, R2, RZ ;", "RET ;").replace("@P3 EXIT", "NOP")
    for wrong, said in (
        ("nothing", "no instruction"),
        (SASS.replace("0x70", "0x75"), "which is no instruction"),
        (nowhere, "no way leads"),
    ):
        with pytest.raises(ValueError, match=said):
            sass.ways(wrong)


def test_float16_is_widened_where_the_library_would_add_up_in_it():
    from robustft.ops.triton import products

    def widened():
        return [dtype for dtype in (torch.float16, torch.bfloat16) if products._sums_in_halves(dtype)]

    assert widened() == []
    torch.backends.cuda.matmul.allow_fp16_accumulation = True  # monkeypatch cannot undo it
    try:
        assert widened() == [torch.float16]
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_the_unit_of_float16_keeps_digits_from_the_bound_down():
    from robustft.ops.triton import products

    for most in (2.0**-99, 3e-9, 1.0, 1.5, 2.0, 65504.0, 3e38):
        unit = float(products.unit(torch.tensor(most)))
        assert unit == 2.0 ** round(math.log2(unit)) and 2**14 < most * unit <= 2**15
    assert float(products.unit(torch.tensor(0.0))) == 2.0**115
    assert float(products.largest(torch.tensor([1.0, -3.0]), torch.tensor([0.5]))) == 3.5
    bound = 3e-5  # of the mean of 32768 losses
    G = bound * 2.0 ** torch.linspace(-45, 0, 1000, dtype=torch.float64)
    unit = products.unit(torch.tensor(bound)).double()
    off = ((G * unit).to(torch.float16).double() / unit - G).abs()
    assert (off <= torch.maximum(2.0**-11 * G, torch.tensor(2.0**-39 * bound))).all()
    assert (off[G >= 2.0**-28 * bound] <= 2.0**-11 * G[G >= 2.0**-28 * bound]).all()
