"""The official SDK's own clients, unchanged, against `sdxl-worker serve`."""

import asyncio
import re
import subprocess
import threading
import time

import aiohttp
import pytest
import requests
import runpod

QUICK = {"prompt": "a red fox", "num_inference_steps": 2, "seed": 7, "width": 64, "height": 64}
# Long enough to be met while it runs; every test that starts it also stops it.
SLOW = QUICK | {"num_inference_steps": 200, "num_images": 8}
STARTS_WITHIN = 120


@pytest.fixture(scope="module")
def url(worker):
    process = subprocess.Popen(
        [worker, "serve", "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines, found = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if "listening on http://" in line:
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    found.wait(STARTS_WITHIN)
    match = re.search(r"listening on (http://127\.0\.0\.1:\d+)", "".join(lines))
    assert match, "".join(lines)
    yield match[1]
    process.terminate()
    assert process.wait(30) == 0, "".join(lines)


@pytest.fixture(scope="module", autouse=True)
def sdk(url):
    runpod.api_key = "anything"
    runpod.endpoint_url_base = f"{url}/v2"
    ready = time.monotonic() + STARTS_WITHIN
    while requests.get(f"{url}/ping", timeout=5).status_code == 204:
        assert time.monotonic() < ready, "the model does not get ready"
        time.sleep(0.1)


@pytest.fixture
def endpoint():
    return runpod.Endpoint("any-id")


def is_reply(output) -> bool:
    return output["seed"] == 7 and output["images"][0].startswith("data:image/png;base64,")


def wait_for(status: str, job) -> None:
    end = time.monotonic() + 30
    while job.status() != status:
        assert time.monotonic() < end, f"never {status}"
        time.sleep(0.02)


def test_run_status_and_output(endpoint):
    job = endpoint.run(QUICK)
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    assert is_reply(job.output(timeout=60))
    assert job.status() == "COMPLETED"


def test_run_takes_a_whole_body(endpoint):
    job = endpoint.run({"input": QUICK, "policy": {"executionTimeout": 60000, "ttl": 120000}})
    assert is_reply(job.output(timeout=60))


def test_run_sync(endpoint):
    assert is_reply(endpoint.run_sync(QUICK, timeout=60))


def test_a_failed_job_has_no_output(endpoint):
    assert endpoint.run_sync({"prompt": ""}, timeout=60) is None
    job = endpoint.run({"prompt": "a fox", "nonsense": 1})
    assert job.output(timeout=60) is None
    assert job.status() == "FAILED"


def test_stream_ends_and_has_every_step_in_order(endpoint):
    job = endpoint.run(QUICK | {"num_inference_steps": 4, "stream": True})
    steps = [chunk["step"] for chunk in job.stream() if "step" in chunk]
    assert steps == sorted(steps) and steps[-1] == 4
    assert is_reply(job.output())


def test_the_stream_of_a_job_that_does_not_stream_is_empty(endpoint):
    assert list(endpoint.run(QUICK).stream()) == []


def test_cancel(endpoint):
    job = endpoint.run(SLOW)
    wait_for("IN_PROGRESS", job)
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    assert job.status() == "CANCELLED"
    assert is_reply(endpoint.run_sync(QUICK, timeout=30)), "the next job runs"


def test_purge_queue(endpoint):
    running = endpoint.run(SLOW)
    wait_for("IN_PROGRESS", running)
    waiting = [endpoint.run(QUICK), endpoint.run(QUICK)]
    assert [job.status() for job in waiting] == ["IN_QUEUE", "IN_QUEUE"]
    assert endpoint.purge_queue() == {"removed": 2, "status": "completed"}
    assert [job.status() for job in waiting] == ["CANCELLED", "CANCELLED"]
    assert running.cancel()["status"] == "CANCELLED"


def test_health(endpoint):
    endpoint.run_sync(QUICK, timeout=60)
    health = endpoint.health()
    assert set(health["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}
    assert health["jobs"]["completed"] >= 1
    assert {"idle", "running"} <= set(health["workers"])


def test_an_unknown_job_is_an_error_of_the_client(endpoint):
    job = endpoint.run(QUICK)
    job.output(timeout=60)
    stranger = type(job)("any-id", "never-was", endpoint.rp_client)
    with pytest.raises(requests.HTTPError, match="404"):
        stranger.status()


def in_session(act):
    """Runs `act(endpoint)` with the asyncio client."""

    async def run():
        async with aiohttp.ClientSession() as session:
            return await act(runpod.AsyncioEndpoint("any-id", session))

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_asyncio_run_status_and_output():
    async def act(endpoint):
        job = await endpoint.run(QUICK)
        assert await job.status() in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
        assert is_reply(await job.output(timeout=60))
        assert await job.status() == "COMPLETED"

    in_session(act)


def test_asyncio_jobs_at_the_same_time():
    async def act(endpoint):
        jobs = await asyncio.gather(*(endpoint.run(QUICK) for _ in range(5)))
        assert len({job.job_id for job in jobs}) == 5
        outputs = await asyncio.gather(*(job.output(timeout=60) for job in jobs))
        assert all(map(is_reply, outputs))

    in_session(act)


def test_asyncio_stream():
    async def act(endpoint):
        job = await endpoint.run(QUICK | {"num_inference_steps": 4, "stream": True})
        steps = [chunk["step"] async for chunk in job.stream() if "step" in chunk]
        assert steps == sorted(steps) and steps[-1] == 4

    in_session(act)


def test_asyncio_cancel_and_purge_queue():
    async def act(endpoint):
        running = await endpoint.run(SLOW)
        while await running.status() != "IN_PROGRESS":
            await asyncio.sleep(0.02)
        waiting = await endpoint.run(QUICK)
        assert await endpoint.purge_queue() == {"removed": 1, "status": "completed"}
        assert await waiting.status() == "CANCELLED"
        assert await running.cancel() == {"id": running.job_id, "status": "CANCELLED"}
        assert await running.status() == "CANCELLED"

    in_session(act)


def test_asyncio_health():
    async def act(endpoint):
        health = await endpoint.health()
        assert health["workers"]["idle"] + health["workers"]["running"] == 1
        assert health["jobs"]["inQueue"] == 0

    in_session(act)
