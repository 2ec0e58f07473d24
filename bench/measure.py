"""Running a program while watching its time and memory, and the table of what came out. Needs nothing but Python."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
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
    """A finished process: its lines on stdout, the seconds from its start to each, and its peaks."""

    lines: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    errors: str = ""
    status: int = 0
    peaks: Peaks = field(default_factory=Peaks)


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
        watchers = [threading.Thread(target=watch_host, args=(process.pid, result.peaks, ended))]
        if gpu:
            watchers.append(threading.Thread(target=gpu.watch, args=(process.pid, result.peaks, ended)))
        for watcher in watchers:
            watcher.start()
        try:
            for line in process.stdout:
                result.at.append(time.perf_counter() - started)
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


def watch_host(pid: int, peaks: Peaks, ended: threading.Event) -> None:
    while not ended.wait(INTERVAL):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        sizes = {key: int(kilobytes) * 1024 for key, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M)}
        peaks.include(Peaks(sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("VmHWM", 0)))


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
    """One line of the table. Both values are in `unit`."""

    quantity: str
    unit: str
    ours: float
    theirs: float
    aim: float | None = None
    noise: tuple[float, float] | None = None

    def cells(self) -> list[str]:
        ratio = self.ours / self.theirs if self.theirs else float("nan")
        aim = "" if self.aim is None else f"<= {self.aim:g} {'met' if ratio <= self.aim else 'MISSED'}"
        noise = "" if self.noise is None else f"{self.noise[0]:.2f} to {self.noise[1]:.2f}"
        ours, theirs = (f"{digits(value)} {self.unit}" for value in (self.ours, self.theirs))
        return [self.quantity, ours, theirs, f"{ratio:.2f}", aim, noise]


def digits(value: float) -> str:
    """Three that matter, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown that also reads well in a terminal."""
    lines = [["quantity", "ours", "diffusers", "ratio", "aim", "ours against itself"], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths)) + " |" for line in lines)


# --- Where it was measured --------------------------------------------------------------------------------------------


def machine() -> str:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = cpu[1] if cpu else platform.machine()
    return f"{name}, {threads()} threads, {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}"


def threads() -> int:
    return len(os.sched_getaffinity(0))


def versions(worker: Path) -> str:
    ours = run([worker, "--version"]).lines[0]
    packages = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
    return ", ".join([ours, f"Python {platform.python_version()}", *packages])
