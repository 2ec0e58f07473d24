"""Our worker and one on the official SDK before the same host, with the same jobs: the same calls with the same words.

The SDK's handler answers what ours answered, so that what is compared is the protocol around it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fake_host import FakeHost

SMALL = {"prompt": "a fox", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
JOBS = [
    {"id": "11111111-aaaa-bbbb-cccc-222222222222-u1", "input": SMALL},
    {"id": "sync-33333333-aaaa-bbbb-cccc-444444444444-u1", "input": SMALL | {"seed": 6}, "webhook": "http://x"},
    {"id": "55555555-aaaa-bbbb-cccc-666666666666-e1", "input": SMALL | {"width": 65}, "delayTime": 3, "status": 200},
    {"id": "77777777-aaaa-bbbb-cccc-888888888888-u1", "input": SMALL | {"prompt": "café ☕ 狐"}},
]
FAILURE_KEYS = ["error_type", "error_message", "error_traceback", "hostname", "worker_id", "runpod_version"]


def run(command: list, host: FakeHost, cwd: Path) -> None:
    """Runs a worker until every job has its result, then ends it as the platform does."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)} | host.variables()
    with open(cwd / "worker.log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, stdout=log, stderr=log)
        try:
            host.wait_for_results(len(JOBS), 60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def hosts(worker):
    ours, sdk = FakeHost(JOBS), FakeHost(JOBS)
    with tempfile.TemporaryDirectory() as folder:
        run([worker, "--device", "cpu"], ours, Path(folder))
        outcomes = {job_id: json.loads(call["body"]) for job_id, call in ours.results().items()}
        (Path(folder) / "outcomes.json").write_text(json.dumps(outcomes))
        script = Path(__file__).with_name("sdk_worker.py")
        run([sys.executable, script, Path(folder) / "outcomes.json"], sdk, Path(folder))
    return ours, sdk


def test_results_have_the_same_bodies(hosts):
    ours, sdk = (host.results() for host in hosts)
    assert list(ours) == list(sdk) == [job["id"] for job in JOBS]
    for job_id in ours:
        mine, theirs = json.loads(ours[job_id]["body"]), json.loads(sdk[job_id]["body"])
        if "error" not in mine:
            assert mine == theirs and list(mine) == ["output"]
            continue
        assert list(mine) == list(theirs) == ["error"]
        mine, theirs = json.loads(mine["error"]), json.loads(theirs["error"])
        assert list(theirs) == FAILURE_KEYS == list(mine)[: len(FAILURE_KEYS)]
        for key in ("hostname", "worker_id"):
            assert mine[key] == theirs[key]


def test_results_go_to_the_same_addresses_with_the_same_headers(hosts):
    ours, sdk = (host.results() for host in hosts)
    compared = ("authorization", "content-type", "charset", "x-request-id")
    for job_id in ours:
        mine, theirs = ours[job_id], sdk[job_id]
        assert (mine["path"], mine["query"]) == (theirs["path"], theirs["query"])
        assert {name: mine["headers"].get(name) for name in compared} == {
            name: theirs["headers"].get(name) for name in compared
        }


def test_jobs_are_taken_alike(hosts):
    """The SDK's later takes carry an earlier job's X-Request-ID; ours must not."""
    ours, sdk = ([call for call in host.calls if call["route"] == "job-take"] for host in hosts)
    mine, theirs = ours[0], sdk[0]
    assert (mine["path"], mine["query"]) == (theirs["path"], theirs["query"])
    for name in ("authorization", "content-type"):
        assert mine["headers"].get(name) == theirs["headers"].get(name)
    assert not any("x-request-id" in call["headers"] for call in ours)


def test_the_heartbeat_and_the_stop_poll_look_alike(hosts):
    for route in ("ping", "job-stop"):
        mine, theirs = ([call for call in host.calls if call["route"] == route] for host in hosts)
        assert mine and theirs, route
        assert mine[0]["path"] == theirs[0]["path"]
        assert mine[0]["headers"]["authorization"] == theirs[0]["headers"]["authorization"]
        names = [{name for call in calls for name, _ in call["query"]} - {"job_id"} for calls in (mine, theirs)]
        assert names[0] == names[1], route
