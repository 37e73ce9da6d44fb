"""How files get to disk: whole or as they were, of the umask's mode, equal content in equal bytes, one process at a
time; and that nothing in the package writes in another way."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import robustft
from robustft import files
from robustft.neighbors import NeighborIndex

PACKAGE = Path(robustft.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2, dtype=torch.int64), "c": torch.tensor(1.5)}


def write_folder(path):
    with files.new_folder(path) as fresh:
        files.write_text(fresh / "below" / "a.txt", "a")
        (fresh / "plain").write_bytes(b"by somebody else")


WRITERS = {
    "bytes": lambda path: files.write_file(path, b"\0data"),
    "text": lambda path: files.write_text(path, "Öl\n"),
    "json": lambda path: files.write_json(path, {"b": [1, None], "a": 0.1}),
    "tensors": lambda path: files.write_tensors(path, TENSORS, {"format": "pt"}),
    "fitted": lambda path: files.save_fitted(path, "Thing", {"x": 1, "y": [2.5]}, TENSORS),
    "index": lambda path: NeighborIndex(torch.arange(12.0).reshape(4, 3)).save(path),
    "folder": write_folder,
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def content(path):
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_are_those_that_the_umask_gives(tmp_path, writer, mask):
    before = os.umask(mask)
    try:
        writer(tmp_path / "new" / "below" / "it")
        (tmp_path / "plain").write_bytes(b"")
    finally:
        os.umask(before)
    for path in (tmp_path / "new").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == expected, path


def test_the_umask_of_the_process_is_never_touched(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("other threads would write under it"))
    writer(tmp_path / "it")


@pytest.mark.exhaustive
def test_equal_content_is_equal_bytes_in_any_process(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / "own" / name)
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import test_files; "
    code += "from pathlib import Path; "
    code += "[write(Path(sys.argv[1], name)) for name, write in test_files.WRITERS.items()]"
    for number in range(2):
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", code, tmp_path / str(number)], check=True, env=environment, timeout=300)
    own = content(tmp_path / "own")
    assert len(own) == len(WRITERS) + 1
    assert all(content(tmp_path / str(number)) == own for number in range(2))


def test_a_second_writing_takes_the_place_of_the_first(tmp_path, writer):
    (tmp_path / "it").mkdir() if writer is write_folder else (tmp_path / "it").write_bytes(b"old")
    if writer is write_folder:
        (tmp_path / "it" / "old").write_bytes(b"old")
    writer(tmp_path / "it")
    writer(tmp_path / "other")
    assert content(tmp_path / "it") == content(tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["it", "other"]


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
def test_whatever_fails_leaves_the_old_content_and_nothing_else(tmp_path, writer, call, monkeypatch):
    """Every call in turn: the first, the second, ... until none fails any more."""
    path, original = tmp_path / "it", getattr(os, call)
    writer(path)
    if writer is write_folder:
        files.write_text(path / "old", "old")
    old = content(path)
    for place in range(100):
        count = iter(range(1000))

        def fails(*arguments, count=count, place=place, **options):
            if next(count) == place:
                raise OSError(28, "No space left on device")
            return original(*arguments, **options)

        monkeypatch.setattr(os, call, fails)
        try:
            writer(path)
        except OSError as error:
            assert "No space left" in str(error)
        else:
            break
        finally:
            monkeypatch.setattr(os, call, original)
        assert os.listdir(tmp_path) == ["it"], place
        # Once the new content is in place, only the last sync can still fail.
        if content(path) != old:
            assert call == "fsync"
            writer(path)
            if writer is write_folder:
                files.write_text(path / "old", "old")
    else:
        pytest.fail("the writer never succeeds")


def test_a_full_disk_leaves_the_old_file(tmp_path, python):
    code = (
        "import resource, sys, torch; from pathlib import Path; from robustft import files; path = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
        "for write in (lambda: files.write_tensors(path, {'x': torch.ones(10**5)}), "
        "lambda: files.write_file(path, bytes(10**5))):\n"
        "    try:\n        write()\n    except OSError as error:\n        print(error)\n"
    )
    path = tmp_path / "it"
    path.write_bytes(b"old")
    run = python.run("-c", code, path)
    assert run.stdout.count("File too large") == 2, run.stderr
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["it"]


def test_a_folder_whose_writing_fails_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "it") as fresh:
        files.write_text(fresh / "a", "a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_what_a_kill_leaves_is_told_from_other_files(tmp_path, python):
    code = "import os, sys; from pathlib import Path; from robustft import files\n"
    code += "os.replace = os.rename = lambda *_: os.kill(os.getpid(), 9)\n"
    code += "if sys.argv[2] == 'file':\n    files.write_text(Path(sys.argv[1]), 'a')\n"
    code += "with files.new_folder(Path(sys.argv[1])):\n    pass\n"
    for kind in ("file", "folder"):
        run = python.run("-c", code, tmp_path / f"{kind}.x", kind)
        assert run.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert len(left) == 2 and all(map(files.is_unfinished, left))
    assert not any(map(files.is_unfinished, (Path("a.txt"), Path(".hidden"), Path("step_00000001"), Path(".a.tmp"))))


def test_tensors_may_share_memory_and_have_any_strides(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    shared = {"x": x, "t": x.T, "row": x[1], "wide": x[:1].expand(5, 4), "leaf": torch.nn.Parameter(x)}
    files.write_tensors(tmp_path / "it", shared)
    read = load_file(tmp_path / "it")
    assert all(torch.equal(read[name], value) for name, value in shared.items())


def test_several_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metadata must have one key, .* got \['a', 'b'\]"):
        files.write_tensors(tmp_path / "it", {}, {"a": "1", "b": "2"})


# Fitted objects


def test_fitted_objects_come_back(tmp_path):
    path = tmp_path / "it"
    files.save_fitted(path, "Thing", {"x": 1, "y": [2.5]}, TENSORS)
    settings, tensors = files.load_fitted(path, "Thing")
    assert settings == {"x": 1, "y": [2.5]} and files.fitted_kind(path) == "Thing"
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    with pytest.raises(ValueError, match="it: holds a Thing, expected a Other"):
        files.load_fitted(path, "Other")
    for found in (settings, tensors):
        with pytest.raises(ValueError, match="it: damaged, or of another version of robustft: it holds no 'z'"):
            found["z"]


@pytest.mark.parametrize(
    "text", ["[]", "null", '"kind"', '{"kind": 1}', "{", "{}", '{"kind": "Thing", "x": NaN}', "[" * 10**5]
)
def test_settings_that_are_damaged_name_the_file(tmp_path, text):
    files.write_tensors(tmp_path / "it", TENSORS, {"robustft": text})
    with pytest.raises(ValueError, match="it: truncated, or no Thing saved by robustft"):
        files.load_fitted(tmp_path / "it", "Thing")


def test_numbers_that_are_none_are_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(ValueError, match="settings of a Thing must be finite numbers"):
        files.save_fitted(tmp_path / "it", "Thing", {"x": float("nan")}, {})
    files.save_fitted(tmp_path / "it", "Thing", {}, {"x": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ValueError, match="it: x of the Thing must be finite, but holds NaN"):
        files.load_fitted(tmp_path / "it", "Thing")


# Locks

HOLD = (
    "import sys, time; from pathlib import Path; from robustft import files\n"
    "with files.locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


@pytest.fixture
def holder(tmp_path, python):
    """Another process that holds the lock."""
    process = python.start("-c", HOLD, tmp_path / "lock")
    assert process.line() == "held"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_refused_at_once_while_another_process_lives(tmp_path, holder):
    started = time.monotonic()
    with pytest.raises(BlockingIOError, match=rf"{tmp_path} is in use by another run \(process {holder.pid}\)"):
        with files.locked(tmp_path / "lock"):
            pass
    assert time.monotonic() - started < 5
    holder.kill()
    holder.wait()
    with files.locked(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_can_be_waited_for(tmp_path, holder):
    threading.Timer(0.3, holder.kill).start()
    with files.locked(tmp_path / "lock", wait=True):
        assert holder.wait().returncode == -signal.SIGKILL


def test_who_waits_for_a_lock_goes_on_when_it_is_let_go(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path / "run", wait=True):
            order.append("second")

    with files.locked(tmp_path / "run", wait=True):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_holds_against_threads_and_one_after_another_gets_it(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with files.locked(tmp_path / "lock", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 80
    with files.locked(tmp_path / "lock"), pytest.raises(BlockingIOError), files.locked(tmp_path / "lock"):
        pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path, python):
    code = (
        "import os, sys, time; from pathlib import Path; from robustft import files\n"
        "with files.locked(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        time.sleep(600)\n"
        "    print(child, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    child = int(python.run("-c", code, tmp_path / "lock").stdout)
    try:
        with files.locked(tmp_path / "lock"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


# The one way

WRITES = {
    "save_file", "mkstemp", "NamedTemporaryFile", "replace", "rename", "renames", "write_text", "write_bytes", "tofile",
    "savez", "savetxt", "copyfile", "copytree", "umask",
}  # fmt: skip
WRITING_MODULES = {"torch.save", "np.save", "json.dump", "pickle.dump", "yaml.dump", "shutil.move", "shutil.copy"}
EXCEPTIONS = {
    ("files.py", "save_file"),
    ("files.py", "replace"),
    ("files.py", "rename"),
    ("files.py", "write_bytes"),
    ("files.py", "open"),
    ("small_clip.py", "torch.save"),  # into memory
    ("fuzz_loaders.py", "write_bytes"),  # what is read is damaged: it need not be whole
    ("fuzz_loaders.py", "torch.save"),
    ("fuzz_loaders.py", "open"),
    ("loading.py", "torch.save"),  # scratch, for open_clip to read
    ("gpu_check.py", "open"),  # a standard stream
    ("memory.py", "write_text"),  # /proc/self/clear_refs, which is no file
    ("triton_resources.py", "NamedTemporaryFile"),  # scratch, for a disassembler
}


def writers(path):
    """Calls in a source file that may write, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        modes = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        if last == "open" and any(
            isinstance(m, str) and set(m) <= set("rwaxbt+") & set(m) and set(m) & set("wax+") for m in modes
        ):
            yield "open"
        elif name in WRITING_MODULES:
            yield name
        elif last == "replace" and name != "os.replace" and (len(node.args) != 1 or node.keywords):
            continue  # a string's, or dataclasses': a Path's has one argument
        elif last in WRITES and name != "write_text":  # which is ours
            yield last


@pytest.mark.parametrize("folder", [PACKAGE, BENCHMARKS], ids=lambda path: path.name)
def test_nothing_else_writes_files(folder):
    found = {(path.name, name) for path in folder.rglob("*.py") for name in writers(path)}
    assert found - EXCEPTIONS == set(), "write through robustft.files"
    if folder == PACKAGE:
        assert {name for file, name in found if file == "files.py"} == {
            "save_file",
            "replace",
            "rename",
            "write_bytes",
            "open",
        }


def test_another_writer_would_be_found(tmp_path):
    found = ["p.write_text('')", "os.replace(a, b)", "p.replace(q)", "open(p, 'w')", "p.open(mode='ab')"]
    found += ["torch.save(x, p)", "save_file(x, p)"]
    (tmp_path / "a.py").write_text("\n".join([*found, "open(p)", "text.replace('a', 'b')", "write_text(p, 'a')"]))
    expected = ["write_text", "replace", "replace", "open", "open", "torch.save", "save_file"]
    assert list(writers(tmp_path / "a.py")) == expected
