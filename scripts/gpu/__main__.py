"""Test and measure everything that needs a GPU, part by part, within a number of minutes.

    python -m scripts.gpu                                   8 minutes; the results are in report/gpu
    python -m scripts.gpu --data cifar10.tar --minutes 9
    python -m scripts.gpu --only prices benchmark
    python -m scripts.gpu --dry                             all of it on the CPU, tiny, to see that it runs

Each part is a process with a time limit. It prints to `<part>.log` and writes to the folder `<part>`. After each part,
summary.md and summary.json are updated. If a part fails or exceeds its limit, the next one still runs, and the exit
status is 1.

The first parts need torch, triton, numpy, scipy, timm, rich, matplotlib and pytest; the trainer's and the detector's
need more. Wheels in the folder .wheels (`make gpu-wheels`) are installed into a folder that only the parts see.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from scripts.arguments import argument_parser
from scripts.gpu.parts import Part, Run, parts_of

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / ".wheels"
GRACE = 10.0  # seconds between asking a part to stop and killing it
LEAST = 5.0  # seconds: with less left, no part is started
TAIL = 25  # lines of a failed part's log in the summary


@dataclass
class Result:
    part: str
    status: str  # "ok", "failed", "stopped" (at its limit) or "left out" (no time was left)
    seconds: float = 0.0
    wrote: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    run, only = parse(arguments)
    run.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running part is stopped, too
    deadline = time.monotonic() + 60 * run.minutes
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of(run, install_wheels(Path(folder)))
        machine = describe()
        print(machine, flush=True)
        if problem := import_problem(environment):
            print(f"No part can run: {problem}\nmake gpu-wheels, run where there is a package index, helps.")
            return 1
        results: list[Result] = []
        for part in parts_of(run):
            if only and part.name not in only:
                continue
            result = run_part(part, run, environment, deadline - time.monotonic())
            results.append(result)
            report(result, run.out, machine, results)
    return int(any(result.status != "ok" for result in results))


def parse(arguments: list[str] | None) -> tuple[Run, list[str]]:
    parser = argument_parser("gpu", __doc__)
    add = parser.add_argument
    add("--dry", action="store_true", help="run everything on the CPU, at the smallest sizes")
    add("--out", type=Path, default=Path("report/gpu"), help="folder for the results (default: report/gpu)")
    add("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    names = [part.name for part in parts_of(Run(Path(), 8.0))]
    add("--only", nargs="+", choices=names, metavar="PART", default=[], help=f"of {', '.join(names)}")
    add("--data", type=Path, help="CIFAR-10 for data=cifar10; without it the last part trains on digits")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.exists():
        parser.error(f"--data: {options.data} does not exist.")
    if not options.dry and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here. --dry runs everything on the CPU, tiny.")
    return Run(options.out.absolute(), options.minutes, options.dry, options.data), options.only


def install_wheels(target: Path) -> Path | None:
    """Install the carried wheels into `target`, without a package index and without changing the running Python."""
    wheels = sorted(str(path) for path in WHEELS.glob("*.whl"))
    if not wheels:
        return None
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # parts that need no wheel still run
        print(f"The wheels in {WHEELS.name} were not installed:\n{done.stderr.strip()}", flush=True)
        return None
    return target


def environment_of(run: Run, wheels: Path | None) -> dict[str, str]:
    """The parts' environment: paths of this checkout and of the wheels; in a dry run, no GPU."""
    paths = [str(ROOT), *([str(wheels)] if wheels else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if run.dry:  # also on a machine that has a GPU
        environment |= {"GPU_DRY": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def import_problem(environment: dict[str, str]) -> str | None:
    """Why this project cannot be imported here, such as a library that is too old."""
    command = [sys.executable, "-c", "import kw"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["it crashed"])[-1] if done.returncode else None


def describe() -> str:
    """One line with what figures depend on: card, driver, versions, commit."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        asked = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        card = f"{asked or torch.cuda.get_device_name()}, capability {major}.{minor}"
    else:
        card = "no GPU"
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    return f"{card}; torch {torch.__version__}, triton {compiler}, Python {platform.python_version()}; commit {commit}"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run_part(part: Part, run: Run, environment: dict[str, str], left: float) -> Result:
    """Run one part in a process; what it prints goes to its log."""
    limit = min(left, part.seconds or left) - GRACE
    if limit < LEAST:
        return Result(part.name, "left out")
    print(f"\n== {part.name}: at most {limit:.0f} s", flush=True)
    began, log = time.monotonic(), run.out / f"{part.name}.log"
    shutil.rmtree(run.out / part.name, ignore_errors=True)  # of an earlier run, which a training would resume
    before = _files(run.out, part)
    with log.open("w") as file:
        command = part.command(limit)
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment | part.environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=listen_to_interrupts,
        )  # fmt: skip
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "stopped"
        finally:
            stop(process)
    wrote = [path for path, changed in _files(run.out, part).items() if before.get(path) != changed]
    for path in wrote:  # so that the report is complete
        if any((ROOT / path).resolve().is_relative_to(place.resolve()) for place in part.writes):
            (run.out / part.name).mkdir(exist_ok=True)
            shutil.copy(ROOT / path, run.out / part.name)
    lines = log.read_text(errors="replace").splitlines()
    return Result(part.name, status, time.monotonic() - began, wrote, lines[-TAIL:] if status != "ok" else lines[-1:])


def listen_to_interrupts() -> None:
    """In a part's process, before it begins: a shell has what it starts in the background ignore Ctrl-C's signal, by
    which parts are asked to stop."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the part to stop, as Ctrl-C does, so that it can save or report; then kill it and its child processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _files(out: Path, part: Part) -> dict[str, int]:
    """The modification times of the files that the part may write."""
    places = [out / part.name, *out.glob(f"{part.name}.*"), *part.writes]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    return {os.path.relpath(file, ROOT): file.stat().st_mtime_ns for file in files if file.is_file()}


def report(result: Result, out: Path, machine: str, results: list[Result]) -> None:
    """Print the result of a part, and rewrite the summary."""
    print(*result.tail, f"== {result.part}: {result.status}, {result.seconds:.0f} s", sep="\n", flush=True)
    summary = {"machine": machine, "parts": [asdict(each) for each in results]}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    lines = ["# GPU run", "", machine, "", "| part | status | seconds | wrote |", "|---|---|---:|---|"]
    lines += [f"| {r.part} | {r.status} | {r.seconds:.0f} | {_listed(r.wrote)} |" for r in results]
    for each in results:
        if each.status in ("failed", "stopped"):
            lines += ["", f"## {each.part}: {each.status}", "", "```", *each.tail, "```"]
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def _listed(files: list[str]) -> str:
    return ", ".join(files[:6]) + (f" and {len(files) - 6} more" if len(files) > 6 else "")


if __name__ == "__main__":
    sys.exit(main())
