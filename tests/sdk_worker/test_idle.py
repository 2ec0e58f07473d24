"""What the worker costs while it has nothing to do."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fake_host import FakeHost

MEMORY = 60e6  # bytes beyond libtorch's own
CPU = 0.01  # of one core
WATCHED = 5.0  # seconds


@contextmanager
def running(command: list, variables: dict[str, str], cwd: Path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LOAD_FAILURE_WAIT": "60"} | variables
    with open(cwd / "log", "w") as log:
        command = list(map(str, command))
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


def private(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return memory.uss


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_without_a_model_adds_little_to_libtorch(worker, tmp_path):
    # one that only reads lines has libtorch and two small tokenizers
    with running([worker, "tokenize"], {}, tmp_path) as reader:
        time.sleep(3)
        libtorch = private(reader)
    host = FakeHost([])
    with running([worker, "--model", tmp_path / "none"], host.variables(), tmp_path) as process:
        wait_for(lambda: "model_not_found" in (tmp_path / "log").read_text() or host.calls)
        time.sleep(3)
        added = private(process) - libtorch
    print(f"{added / 1e6:.0f} MB beyond libtorch's {libtorch / 1e6:.0f} MB")
    assert added < MEMORY


def test_an_idle_worker_leaves_the_processor_alone(worker, tmp_path):
    host = FakeHost([])
    with running([worker, "--device", "cpu"], host.variables(), tmp_path) as process:
        wait_for(lambda: any(call["route"] == "job-take" for call in host.calls))
        time.sleep(1)
        before = sum(process.cpu_times()[:2])
        time.sleep(WATCHED)
        share = (sum(process.cpu_times()[:2]) - before) / WATCHED
    print(f"{share:.1%} of a core")
    assert share <= CPU, "takes come back every 0.3 s here, ten times as often as on the platform"


@pytest.mark.full
def test_a_thousand_jobs_leave_no_memory_behind(worker, tmp_path):
    small = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 1, "output_format": "jpeg"}
    jobs = [{"id": f"{index}-u1", "input": small | {"seed": index}} for index in range(1000)]
    host = FakeHost(jobs)
    with running([worker, "--device", "cpu"], host.variables(), tmp_path) as process:
        wait_for(lambda: len(host.results()) >= 200, 300)
        early = private(process)
        wait_for(lambda: len(host.results()) == 1000, 300)
        late = private(process)
    print(f"{early / 1e6:.0f} MB after 200 jobs, {late / 1e6:.0f} MB after 1000")
    assert late < early * 1.1
