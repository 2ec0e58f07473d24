"""Running a program while watching its time, memory and reads, and the table of what came out. Needs nothing but
Python."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "target" / "release" / "sdxl-worker"
INTERVAL = 0.01  # seconds between two looks at a process
GPU_INTERVAL = 0.1

Command = Sequence[str | os.PathLike[str]]


class ProgramFailed(SystemExit):
    """A program ended with an error; its last words are inside. Uncaught, it ends this one."""


# --- One process ------------------------------------------------------------------------------------------------------


@dataclass
class Peaks:
    """The most memory a process had, in bytes. `private` is RssAnon + RssShmem: what only this process needs.
    `resident` (VmHWM) adds mapped files, which the page cache holds anyway. `gpu` is the driver's figure."""

    private: int = 0
    resident: int = 0
    gpu: int = 0

    def include(self, other: Peaks) -> None:
        self.private = max(self.private, other.private)
        self.resident = max(self.resident, other.resident)
        self.gpu = max(self.gpu, other.gpu)


@dataclass
class Run:
    """A finished process: its lines on stdout, the seconds from its start to each, the processor's seconds it had used
    by then, its peaks, and what it had read from the disk by when (seconds, bytes)."""

    lines: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    reads: list[tuple[float, int]] = field(default_factory=list)
    errors: str = ""
    status: int = 0
    peaks: Peaks = field(default_factory=Peaks)

    def read_rate(self) -> float:
        """Bytes per second from the first hundredth of what it read to the last; 0 when that is too quick to see."""
        total = self.reads[-1][1] if self.reads else 0
        inner = [(seconds, read) for seconds, read in self.reads if total / 100 <= read <= total * 99 / 100]
        if len(inner) < 2:
            return 0
        (start, first), (end, last) = inner[0], inner[-1]
        return (last - first) / (end - start)


def run(command: Command, gpu: Gpu | None = None, environment: dict[str, str] | None = None, check: bool = True) -> Run:
    """Runs a program to its end. Reads its lines as they come."""
    result = Run()
    with tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [os.fspath(part) for part in command],
            stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | (environment or {}),
        )  # fmt: skip
        ended = threading.Event()
        watchers = [threading.Thread(target=watch_host, args=(process.pid, result, started, ended))]
        if gpu:
            watchers.append(threading.Thread(target=gpu.watch, args=(process.pid, result.peaks, ended)))
        for watcher in watchers:
            watcher.start()
        try:
            for line in process.stdout:
                result.at.append(time.perf_counter() - started)
                result.cpu.append(cpu_seconds(process.pid))
                result.lines.append(line.rstrip("\n"))
            result.status = process.wait()
        finally:
            ended.set()
            process.kill()
            process.wait()
            for watcher in watchers:
                watcher.join()
        errors.seek(0)
        result.errors = errors.read()
    if check and result.status:
        words = " ".join(map(str, command))
        raise ProgramFailed(f"failed with status {result.status}: {words}\n{result.errors[-3000:]}")
    return result


def watch_host(pid: int, result: Run, started: float, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL):
        try:
            status, io = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "io"))
        except OSError:
            return
        sizes = {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}
        result.peaks.include(Peaks(sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("VmHWM", 0)))
        read = int(re.search(r"^read_bytes: (\d+)", io, re.M)[1])
        if read > (result.reads[-1][1] if result.reads else 0):
            result.reads.append((time.perf_counter() - started, read))


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Gpu:
    """The driver's view of the first GPU."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self.nvml = pynvml
        self.device = pynvml.nvmlDeviceGetHandleByIndex(0)
        self.per_process = True

    def watch(self, pid: int, peaks: Peaks, ended: threading.Event) -> None:
        """Takes the process's own figure; where the driver does not tell it, what the card's use grew by."""
        before = self.used()
        own = grown = 0
        while not ended.wait(GPU_INTERVAL):
            own = max(own, self.used_by(pid))
            grown = max(grown, self.used() - before)
        self.per_process &= own > 0
        peaks.include(Peaks(gpu=own or grown))

    def used(self) -> int:
        return self.nvml.nvmlDeviceGetMemoryInfo(self.device).used

    def used_by(self, pid: int) -> int:
        """0 where the driver does not know the process, or does not tell."""
        processes = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.device)
        return next((process.usedGpuMemory or 0 for process in processes if process.pid == pid), 0)

    def clock(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.device, self.nvml.NVML_CLOCK_SM)


# --- A server --------------------------------------------------------------------------------------------------------


@contextmanager
def serving(worker: Path, options: Command) -> Iterator[str]:
    """The address of `sdxl-worker serve`, which has loaded its model and ends with the block."""
    command = [os.fspath(part) for part in (worker, "serve", "--port", "0", *options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("listening on"):
                break
        else:
            raise ProgramFailed(f"failed with status {process.wait()}: {' '.join(command)}\n{''.join(lines)}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or its log would fill the pipe
        address = line.split()[-1]
        while process.poll() is None and urllib.request.urlopen(f"{address}/ping").status != 200:
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address: str, request: dict[str, object]) -> tuple[dict[str, object], float]:
    """The reply, and the seconds from sending the request to the reply's last byte."""
    body = json.dumps({"input": request}).encode()
    call = urllib.request.Request(f"{address}/runsync?wait=300000", body, {"Content-Type": "application/json"})
    started = time.perf_counter()
    with urllib.request.urlopen(call) as response:
        text = response.read()
    seconds = time.perf_counter() - started
    answer = json.loads(text)
    if answer["status"] != "COMPLETED":
        raise ProgramFailed(f"a job failed: {answer}")
    return answer["output"], seconds


# --- Files ------------------------------------------------------------------------------------------------------------


def random_checkpoint(out: Path, arch: str | Path, dtype: str = "bfloat16", device: str = "cpu") -> Path:
    """Random weights of an architecture or a folder of configurations, made where they are not there yet."""
    script = Path(__file__).with_name("random_checkpoint.py")
    if not out.is_dir() or out.stat().st_mtime < script.stat().st_mtime:
        command = [sys.executable, script, "--arch", arch, "--dtype", dtype, "--device", device, "--out", out]
        print(*run(command).lines, sep="\n", file=sys.stderr, flush=True)
    return out


def export(out: Path, *options: object) -> Path:
    """The folder of graphs (and packages); what is up to date stays."""
    run([sys.executable, ROOT / "torchscript" / "export.py", *map(str, options), "--out", out])
    return out


def read_once(file: Path) -> None:
    """Brings a file into the page cache."""
    piece = bytearray(2**24)
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(piece):
            pass


# --- Numbers ----------------------------------------------------------------------------------------------------------


def noise_band(blocks: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Ours against itself: the lowest and highest median of a block, over the median of all. A ratio inside this band
    is no difference. One block tells nothing."""
    if len(blocks) < 2:
        return None
    middle = median(value for block in blocks for value in block)
    medians = [median(block) / middle for block in blocks]
    return min(medians), max(medians)


@dataclass
class Row:
    """One line of the table. Both values are in `unit`. What must not be above `bar` and shall not be above `aim` is
    the ratio; of a row without a peer, our own value."""

    name: str
    unit: str
    ours: float
    peer: float | None
    bar: float | None = None
    aim: float | None = None
    noise: tuple[float, float] | None = None

    def cells(self) -> list[str]:
        ratio = None if self.peer is None else self.ours / self.peer if self.peer else float("nan")
        value, unit = (self.ours, f" {self.unit}") if ratio is None else (ratio, "")

        def limit(most: float | None) -> str:
            return "" if most is None else f"{most:g}{unit}, {'met' if value <= most else 'missed'}"

        return [
            self.name,
            f"{digits(self.ours)} {self.unit}",
            "" if self.peer is None else f"{digits(self.peer)} {self.unit}",
            "" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}",
            limit(self.bar),
            limit(self.aim),
            "" if self.noise is None else f"{self.noise[0]:.2f} to {self.noise[1]:.2f}",
        ]


def digits(value: float) -> str:
    """Three that matter, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown that also reads well in a terminal."""
    head = ["quantity", "ours", "diffusers eager", "ratio", "bar", "aim", "ours against itself"]
    lines = [head, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths)) + " |" for line in lines)


# --- Where it was measured --------------------------------------------------------------------------------------------


def machine() -> str:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = cpu[1] if cpu else platform.machine()
    return f"{name}, {threads()} cores, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}"


def threads() -> int:
    return len(os.sched_getaffinity(0))


def versions(worker: Path) -> str:
    ours = run([worker, "--version"]).lines[0]
    packages = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
    return ", ".join([f"{ours} ({commit()})", f"Python {platform.python_version()}", *packages])


def commit() -> str:
    """Of the checkout; a `+` says that files differ from it."""
    try:
        found = run(["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"], check=False)
    except OSError:
        return "commit unknown"
    return found.lines[0] if found.lines else "commit unknown"


def heading(worker: Path, conditions: str) -> str:
    """What stands above every table."""
    return f"{date.today()}; {conditions}; {versions(worker)}."
