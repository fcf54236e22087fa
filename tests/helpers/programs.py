"""The programs of this clone, each run in a process of its own, as the command line does it.

To import torch, timm and the rest takes longer than most of these runs. So one server process imports them once, and a
run is a fork of it (multiprocessing's "forkserver"), with its own arguments, environment, working directory and output.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 240  # after which a process counts as hung

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["helpers.preloaded"])


def _start_server() -> None:
    """Does nothing if it runs. It finds modules by PYTHONPATH alone: up to Python 3.12 it ignores sys.path. And torch
    reads OMP_NUM_THREADS when it is imported."""
    before = dict(os.environ)
    os.environ.update({"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"})
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs this clone's programs on one thread, anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def _run(module: str, words: list[str], cwd: str, env: dict[str, str], out: str, errors: str, own_group: bool,
         largest_file: int | None) -> None:  # fmt: skip
    """In the fork: what `python -m MODULE WORDS` does."""
    # A process of the forkserver starts its own by it too. A program's DataLoader forks: its workers then have the
    # program's signal handlers.
    multiprocessing.set_start_method("fork", force=True)
    if own_group:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, out), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.path[:0] = ["", str(ROOT)]
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Program:
    """A running `python -m MODULE WORDS`, with the methods of subprocess.Popen.

    `largest_file`: bytes that no file it writes may exceed, its output neither.
    """

    def __init__(self, module: str, *words: object, cwd: object = None, env: dict[str, str] | None = None,
                 start_new_session: bool = False, largest_file: int | None = None):  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._texts = [Path(self._folder.name) / name for name in ("out", "errors")]
        for path in self._texts:
            path.touch()
        arguments = (module, [*map(str, words)], str(cwd or Path.cwd()), env or environment(), *map(str, self._texts))
        _start_server()
        limits = (start_new_session, largest_file)
        self._process = _forks.Process(target=_run, args=(*arguments, *limits), daemon=False)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def output(self) -> tuple[str, str]:
        """What it has printed so far: standard output, standard error."""
        out, errors = (path.read_text() for path in self._texts)
        return out, errors

    def communicate(self, timeout: float = SECONDS) -> tuple[str, str]:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it is killed, and what it printed is in the error.
        """
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            out, errors = self.output()
            raise subprocess.TimeoutExpired(self._process.name, timeout, out, errors)
        return self.output()


def finish(program: Program, code: int | None = 0, timeout: float = SECONDS) -> subprocess.CompletedProcess:
    """Wait for a program; `code` is the exit status it must have, None is any."""
    out, errors = program.communicate(timeout)
    assert code is None or program.returncode == code, errors
    return subprocess.CompletedProcess(program, program.returncode, out, errors)


def run(module: str, *words: object, code: int | None = 0, timeout: float = SECONDS, **options):
    """`python -m MODULE WORDS` to its end."""
    return finish(Program(module, *words, **options), code, timeout)


def command(*words: object, check: bool = True, timeout: float = SECONDS, **options) -> subprocess.CompletedProcess:
    """Any other command to its end, in this clone's environment and within a time limit."""
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": timeout, **options}
    done = subprocess.run([*map(str, words)], **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def ranks(count: int, module: str, *words: object, cwd=None) -> list[Program]:
    """`count` processes with the environment that torchrun gives to those of one node."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    programs = []
    for rank in range(count):
        more = {key: str(value) for key, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        programs.append(Program(module, *words, cwd=cwd, env=environment(**more)))
    return programs


def wait_for(path: Path, program: Program, seconds: float = SECONDS) -> None:
    """Wait until a program that goes on has made a file."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert program.poll() is None, program.output()[1]
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.02)
