"""Concurrent jobs share the UNet's calls, and each gets the picture that it would have got alone."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable

import numpy as np
import pytest

from test_inputs import SMALL, ask, control, image_of, serving
from test_lora_jobs import lora

# Kernels differ by batch, so that float32 differs in its last bits: of 255, after rounding.
MAX_DIFFERENCE = 1

JOBS = [
    {"prompt": "a lighthouse", "seed": 1, "num_inference_steps": 9},
    {"prompt": "a fox in the snow", "seed": 2, "num_inference_steps": 14, "scheduler": "ddim"},
    {"prompt": "a harbour", "seed": 3, "num_inference_steps": 6, "guidance_scale": 1},
    {"prompt": "a red barn", "seed": 4, "num_inference_steps": 11, "scheduler": "unipc", "guidance_scale": 9},
    {"prompt": "a cat", "negative_prompt": "a dog", "seed": 5, "num_inference_steps": 8, "scheduler": "euler_a"},
    {"prompt": "two boats", "seed": 6, "num_inference_steps": 7, "num_images": 2},
    {"prompt": "a bridge", "seed": 7, "num_inference_steps": 10, "guidance_start": 0.2, "guidance_end": 0.6},
    {"prompt": "a tower", "seed": 8, "num_inference_steps": 12, "scheduler": "dpmpp_2m", "guidance_rescale": 0.7},
    {"prompt": "an owl", "seed": 9, "num_inference_steps": 5, "scheduler": "euler_a", "guidance_scale": 1},
    {"prompt": "(a long street:1.3), " * 20, "prompt_weighting": "a1111", "seed": 10, "num_inference_steps": 9},
    {"prompt": "a mill", "seed": 11, "num_inference_steps": 8, "preview_every": 2, "clip_skip": 1},
    {"prompt": "a lake", "seed": 12, "num_inference_steps": 13, "scheduler": "ddim", "eta": 0.5},
]  # fmt: skip
LONG = {"prompt": "a long road", "seed": 20, "num_inference_steps": 200}
LONG_TOO = LONG | {"prompt": "a river", "seed": 21, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def alone(test_models) -> Callable[[dict], dict]:
    """The answer to a job that is alone at a worker without batching."""
    known: dict[str, dict] = {}
    with serving(test_models) as (address, _):

        def answer_to(fields: dict) -> dict:
            key = json.dumps(fields)
            if key not in known:
                known[key] = ask(address, fields)
            return known[key]

        yield answer_to
        assert calls(address) == {}


@pytest.fixture(scope="module")
def batching(test_models, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("loras")
    lora(folder, "ink", 1)
    with serving(test_models, "--max-batch", "4", "--concurrency", "16", "--lora-dir", folder) as (address, _):
        ask(address, {})  # the model is loaded
        yield address


def get(address: str, route: str) -> bytes:
    with urllib.request.urlopen(f"{address}/{route}", timeout=60) as response:
        return response.read()


def post(address: str, route: str, body: dict) -> dict:
    request = urllib.request.Request(f"{address}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def start(address: str, fields: dict) -> str:
    return post(address, "run", {"input": SMALL | fields})["id"]


def answer(address: str, job: str) -> dict:
    while (state := json.loads(get(address, f"status/{job}")))["status"] in ("IN_QUEUE", "IN_PROGRESS"):
        time.sleep(0.02)
    return state


def calls(address: str) -> dict[int, int]:
    """The UNet's calls so far, by the number of images in them."""
    found = re.findall(r'^sdxl_worker_unet_calls_total{images="(\d+)"} (\d+)$', get(address, "metrics").decode(), re.M)
    return {int(images): int(count) for images, count in found}


def until_more(address: str, images: int, before: dict[int, int]) -> None:
    """Waits for a call with so many images."""
    deadline = time.monotonic() + 60
    while calls(address).get(images, 0) == before.get(images, 0):
        assert time.monotonic() < deadline, f"no call with {images} images"
        time.sleep(0.002)


def steps(counts: dict[int, int]) -> int:
    """Steps of single images."""
    return sum(images * count for images, count in counts.items())


def assert_same(one: dict, other: dict) -> None:
    for images in (one, other):
        assert images["status"] == "COMPLETED", images
    assert len(one["output"]["images"]) == len(other["output"]["images"])
    for index in range(len(one["output"]["images"])):
        first, second = (
            image_of(job | {"output": {"images": job["output"]["images"][index:]}}).astype(int) for job in (one, other)
        )
        assert np.abs(first - second).max() <= MAX_DIFFERENCE


def test_a_dozen_jobs_together_are_what_each_is_alone(alone, batching):
    expected = [alone(job) for job in [LONG, *JOBS]]
    assert len({job["output"]["images"][0] for job in expected}) == len(expected)
    for _ in range(5):  # the first is so long that one try is enough
        before = calls(batching)
        long = start(batching, LONG)
        until_more(batching, 1, before)
        together = [answer(batching, job) for job in [long, *[start(batching, job) for job in JOBS]]]
        after = calls(batching)
        for one, other in zip(expected, together):
            assert_same(one, other)
            assert other["output"]["warnings"] == one["output"]["warnings"]
        wanted = sum(job["num_inference_steps"] * job.get("num_images", 1) for job in [LONG, *JOBS])
        assert steps(after) - steps(before) == wanted
        assert max(after) <= 4
        if all(after.get(images, 0) > before.get(images, 0) for images in (2, 3, 4)):
            return
    raise AssertionError(f"jobs did not come together: {after}")


def test_a_cancelled_job_leaves_and_the_others_go_on(alone, batching):
    before = calls(batching)
    jobs = [start(batching, job) for job in (LONG, LONG_TOO)]
    until_more(batching, 2, before)
    post(batching, f"cancel/{jobs[1]}", {})
    answers = [answer(batching, job) for job in jobs]
    assert_same(answers[0], alone(LONG))
    assert answers[1]["status"] == "CANCELLED"
    # it took no more steps than the other's
    assert steps(calls(batching)) - steps(before) < 400


def test_jobs_that_cannot_join_wait_and_run_alone(alone, batching):
    others = [
        control(model="plain", mode=None),
        {"width": 96},
        {"num_images": 5},
        {"hires": {"scale": 2, "steps": 4}},
    ]
    before = calls(batching)
    long = start(batching, LONG)
    until_more(batching, 1, before)
    jobs = [start(batching, fields) for fields in others]
    for fields, job in zip([LONG, *others], [long, *jobs]):
        assert_same(answer(batching, job), alone(fields))
    # the wide one is a group of its own; the rest have calls that nobody can share
    assert calls(batching) == before | {1: before[1] + 200 + 2}


def test_jobs_with_other_loras_do_not_meet(batching):
    before = calls(batching)
    plain, inked = ask(batching, {}), ask(batching, {"loras": [{"name": "ink"}]})
    long = start(batching, LONG)
    until_more(batching, 1, before)
    jobs = [start(batching, {"loras": [{"name": "ink"}]}) for _ in range(2)]
    again = [answer(batching, job) for job in jobs]
    assert answer(batching, long)["status"] == "COMPLETED"
    for job in again:
        assert_same(job, inked)
    assert (image_of(inked) != image_of(plain)).any()


def test_a_job_that_is_wrong_fails_alone(alone, batching):
    before = calls(batching)
    long = start(batching, LONG)
    until_more(batching, 1, before)
    # of an LCM schedule this model has no more than 50 steps
    wrong = start(batching, {"scheduler": "lcm", "num_inference_steps": 60})
    failed = answer(batching, wrong)
    assert failed["status"] == "FAILED" and "num_inference_steps" in json.dumps(failed), failed
    assert_same(answer(batching, long), alone(LONG))


def test_a_group_that_would_not_fit_into_memory_is_none(test_models, alone):
    with serving(test_models, "--max-batch", "4", "--memory-limit", "12M") as (address, _):
        ask(address, {})
        before = calls(address)
        # 8.8 MB each, says the estimate
        large = [job | {"width": 128, "height": 128, "num_inference_steps": 50} for job in (LONG, LONG_TOO)]
        jobs = [start(address, job) for job in large]
        for fields, job in zip(large, jobs):
            assert_same(answer(address, job), alone(fields))
        assert calls(address) == before | {1: before[1] + 100}


def test_two_engines_share_the_queue(test_models, alone):
    with serving(test_models, "--max-batch", "3", "--device", "cpu,cpu") as (address, _):
        ask(address, {})
        jobs = [LONG, LONG_TOO, *JOBS[:5]]
        together = [answer(address, job) for job in [start(address, job) for job in jobs]]
        assert max(calls(address)) <= 3
    for fields, job in zip(jobs, together):
        assert_same(job, alone(fields))
