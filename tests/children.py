"""Python processes of their own that do not pay for importing torch and the other libraries again.

A server that has imported these, and nothing of robustft, forks one process for each program. What it gives a program
is what `python -c` or `python -m` would: its own modules, environment, folder, arguments, standard streams, and the
functions registered for its end. Not for tests of PYTHONHASHSEED or TRITON_INTERPRET.

A worker of `-n`, which needs the libraries anyway, forks its servers off itself while it has imported no more than
these; elsewhere a server starts as a process of its own, with the first program.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple, NoReturn

BARE = "torch"
LIBRARIES = "torch torchvision open_clip matplotlib.pyplot sklearn.metrics yaml"

SERVER = """
import atexit, contextlib, gc, importlib, json, os, runpy, sys, traceback
for name in sys.argv[1].split():
    with contextlib.suppress(ImportError):  # one that is not installed; who needs it will say so
        importlib.import_module(name)
if sys.dont_write_bytecode:  # so that each program does not compile robustft again
    sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[2]
answers = os.fdopen(os.dup(1), "w")
def answer(number):
    print(number, file=answers, flush=True)
answer(os.getpid())
gc.collect()
gc.freeze()  # a collection in a child would touch, and so copy, every page of what is shared
while line := sys.stdin.readline():
    asked = json.loads(line)
    if "wait" in asked:
        answer(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]))
    elif "alive" in asked:
        answer(int(os.waitid(os.P_PID, asked["alive"], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None))
    elif pid := os.fork():
        answer(pid)
    else:
        break
else:
    os._exit(0)
answers.close()
for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
    os.dup2(os.open(path, os.O_RDWR), number)
inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
first = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
sys.path[:] = ["", *first, *(path for path in sys.path if path and path not in inherited)]
kind, program, *arguments = asked["command"]
sys.argv = [kind, *arguments]
code = 0
try:
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
except SystemExit as end:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
except BaseException:
    traceback.print_exc()
    code = 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # freeing what was imported would take longer than most programs
"""


class Server(NamedTuple):
    """The streams to it, and the number of its process."""

    questions: IO[str]
    answers: IO[str]
    pid: int


FORKED: dict[str, Server] = {}
"""By their libraries, servers that this process has forked off itself."""
BYTECODE = tempfile.TemporaryDirectory(prefix="robustft-pycache-")
"""Of the programs of these, where none is written otherwise."""


def import_and_fork() -> None:
    """Imports the libraries and forks a server of each kind, before anything else is imported."""
    command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    path = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    for libraries in (BARE, LIBRARIES):
        for name in libraries.split():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        asked, questions = os.pipe()
        answers, told = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the thread that speaks with pytest's first process
            pid = os.fork()
        if pid == 0:
            _serve(asked, told, path)
        os.close(asked)
        os.close(told)
        FORKED[libraries] = Server(os.fdopen(questions, "w"), os.fdopen(answers), pid)
        FORKED[libraries].answers.readline()


def end_forked() -> None:
    """Ends the servers that were forked off, and waits for them."""
    while FORKED:
        _, server = FORKED.popitem()
        server.questions.close()
        server.answers.close()
        os.waitpid(server.pid, 0)


def _serve(asked: int, told: int, path: list[str]) -> NoReturn:
    """Makes what this fork has of pytest's process as in a new one, and is the server."""
    try:
        os.dup2(asked, 0)
        os.dup2(told, 1)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            stream = open(number, "w" if number else "r", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        faulthandler.disable()
        atexit._clear()
        sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_pytest")]
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == Path(__file__).parent:
                del sys.modules[name]
        sys.path[:] = path
        sys.argv = ["-c", "", BYTECODE.name]
        exec(compile(SERVER, "<server>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    finally:
        os._exit(1)


class Child:
    """A process that was started: as much of `subprocess.Popen` as the tests need."""

    def __init__(self, server: Children, pid: int, out: Path, err: Path) -> None:
        self.server, self.pid, self.out, self.err = server, pid, out, err
        self.returncode: int | None = None

    def line(self) -> str:
        """The first that it prints, waited for."""
        while not (text := self.out.read_text()).count("\n"):
            assert self.server.ask(alive=self.pid), self.err.read_text()
            time.sleep(0.01)
        return text.partition("\n")[0]

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit code, negative for a signal, and what it printed."""
        if self.returncode is None:
            self.returncode = self.server.ask(wait=self.pid)
        return subprocess.CompletedProcess(str(self.pid), self.returncode, self.out.read_text(), self.err.read_text())


class Children:
    """Starts the server at the first program, if there is none."""

    def __init__(self, folder: Path, libraries: str = LIBRARIES) -> None:
        self.folder, self.libraries = folder, libraries
        self.started = 0
        self.server = FORKED.get(libraries)
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **question: object) -> int:
        if self.server is None:
            command = [sys.executable, "-c", SERVER, self.libraries, str(self.folder / "pycache")]
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self.server = Server(self.process.stdin, self.process.stdout, self.process.pid)
            self.server.answers.readline()
        print(json.dumps(question), file=self.server.questions, flush=True)
        return int(self.server.answers.readline())

    def start(self, *command: object, folder: Path | None = None, environment: Mapping[str, str] | None = None):
        """`python COMMAND...`: `-c` and a program or `-m` and a module, and arguments."""
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        pid = self.ask(
            command=[str(part) for part in command],
            folder=str(folder or self.folder),
            environment=dict(os.environ if environment is None else environment),
            out=str(out),
            err=str(err),
        )
        return Child(self, pid, out, err)

    def run(self, *command: object, check: bool = False, **how) -> subprocess.CompletedProcess[str]:
        done = self.start(*command, **how).wait()
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
