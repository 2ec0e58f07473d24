"""Several engines in one process: concurrent jobs give the pictures that single ones give."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from program import DEMO, GRAPHS, error_of, run
from test_inputs import ask, image_of, serving
from test_lora_jobs import lora

JOBS = [
    {"prompt": f"a lighthouse, {number}", "seed": number, "num_inference_steps": 4 + number % 3, "scheduler": scheduler}
    for number, scheduler in enumerate(["euler", "ddim", "unipc", "euler_a"] * 3)
]


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "wool"), 1):
        lora(folder, name, seed)
    return folder


def test_two_engines_paint_at_the_same_time_what_one_paints_alone(test_models, loras):
    jobs = [job | {"loras": [{"name": name}] if name else []} for job, name in zip(JOBS, ["", "ink", "wool", "ink"] * 3)]
    with serving(test_models, "--lora-dir", loras) as (address, _):
        alone = [image_of(ask(address, job)) for job in jobs]
    with serving(test_models, "--lora-dir", loras, "--device", "cpu,cpu") as (address, _):
        with ThreadPoolExecutor(len(jobs)) as pool:
            together = [image_of(answer) for answer in pool.map(lambda job: ask(address, job), jobs)]
    for number, (one, other) in enumerate(zip(alone, together)):
        assert np.array_equal(one, other), number
    assert len({picture.tobytes() for picture in alone}) == len(jobs)


def test_two_engines_take_two_jobs_at_a_time(test_models):
    with serving(test_models, "--device", "cpu,cpu") as (address, _):
        ask(address, {})  # the server listens before the engines are there
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(ask, address, {"num_inference_steps": 150, "seed": seed}) for seed in range(3)]
            seen = set()
            while not all(job.done() for job in jobs):
                with urllib.request.urlopen(f"{address}/metrics", timeout=30) as metrics:
                    lines = metrics.read().decode().splitlines()
                assert "sdxl_worker_engines 2" in lines
                seen |= {line for line in lines if line.startswith("sdxl_worker_jobs_in_progress ")}
        assert "sdxl_worker_jobs_in_progress 2" in seen and "sdxl_worker_jobs_in_progress 3" not in seen


def test_doctor_loads_on_every_device(tmp_path):
    arguments = ("--model", DEMO, "--graphs", GRAPHS, "--device", "cpu,cpu")
    result = run("doctor", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("all weights bound on cpu float32") == 2


def test_a_device_that_is_not_there_ends_the_start(tmp_path):
    error = error_of(run("serve", "--port", "0", "--device", "cpu,cuda:7", cwd=tmp_path), 3, "device_not_available")
    assert "cuda:7" in error["message"]
