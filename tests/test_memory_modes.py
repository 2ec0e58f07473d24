"""Memory: weights that leave while they do not compute, and jobs for which memory runs out. Pictures stay what they are."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from program import PROGRAM, ROOT, TEST_MODELS, environment, error_of, pictures
from test_inputs import PHOTO, ask, control, encode, image_of, serving
from test_lora_jobs import lora

sys.path.insert(0, str(ROOT / "torchscript"))
import tiny_models  # noqa: E402

INTERVAL = 0.002  # seconds between two looks at a process


def in_bfloat16(folder: Path) -> None:
    """Halves the weight files, so that weights computed with in float32 are copies."""
    import torch
    from safetensors.torch import load_file, save_file

    for path in folder.rglob("*.safetensors"):
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
        save_file(tensors, path)


@pytest.fixture(scope="module")
def heavy(test_models) -> tuple[Path, Path]:
    """A model of bfloat16 files whose weights in float32 are most of what a process takes: 130 MB in the UNet, 110 MB in
    the text encoders. And its graphs."""
    model, graphs = TEST_MODELS / "heavy", TEST_MODELS / "heavy-graphs"
    with FileLock(TEST_MODELS / "heavy.lock"):
        made = model / "model_index.json"
        if not made.exists() or made.stat().st_mtime < Path(__file__).stat().st_mtime:
            unet = {"block_out_channels": [16, 32, 256], "transformer_layers_per_block": [1, 1, 6]}
            variant = tiny_models.Variant(
                unet=tiny_models.UNET | unet,
                text_encoder=tiny_models.TEXT | {"intermediate_size": 40_000},
                text_encoder_2=tiny_models.TEXT_2 | {"intermediate_size": 60_000},
            )
            tiny_models.write_model(model, variant)
            in_bfloat16(model)
        export = [sys.executable, ROOT / "torchscript" / "export.py", "--model", model, "--dtype", "float32", "--out", graphs]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    return model, graphs


@pytest.fixture(scope="module")
def halved(test_models, tmp_path_factory) -> dict[str, Path]:
    """The small test models in bfloat16 files."""
    folder = tmp_path_factory.mktemp("halved")
    names = ("default", "default-plain", "default-union", "refiner")
    for name in names:
        shutil.copytree(TEST_MODELS / name, folder / name)
    in_bfloat16(folder)
    return {name: folder / name for name in names} | {"graphs": test_models["graphs"]}


def peak_of(*arguments: object, cwd: Path, variables: dict | None = None, **options) -> tuple[subprocess.CompletedProcess, dict[str, int]]:
    """Runs the program; the most that it had of each figure of /proc/PID/status, in bytes."""
    process = subprocess.Popen(
        [str(PROGRAM), *map(str, arguments)], cwd=cwd, env=environment(**(variables or {})), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    peaks: dict[str, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for key, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.M):
                peaks[key] = max(peaks.get(key, 0), int(size) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, errors = process.communicate(timeout=120)
    ended.set()
    watcher.join()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors), peaks


# --- Offload ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_offload_takes_less_memory_for_the_same_picture(heavy, tmp_path):
    model, graphs = heavy
    request = ["--prompt", "a fox", "--steps", 2, "--width", 64, "--height", 64, "--seed", 5, "--quiet"]
    private, seen = {}, {}
    for offload in ("none", "text-encoders", "all"):
        files = ["--model", model, "--graphs", graphs, "--dtype", "float32", "--output", offload]
        result, peaks = peak_of("generate", "--offload", offload, *files, *request, cwd=tmp_path)
        (path,) = pictures(result, tmp_path)
        private[offload], seen[offload] = peaks["RssAnon"], path.read_bytes()
    assert seen["text-encoders"] == seen["none"] and seen["all"] == seen["none"]
    print({offload: f"{size / 1e6:.0f} MB" for offload, size in private.items()})
    # of so small a picture the text encoders are the peak, and with `text-encoders` the UNet is there then
    assert private["all"] < private["none"] - 90e6, private


KINDS = {
    "text": {},
    "another text": {"prompt": "a dog", "negative_prompt": "snow"},
    "weights in the prompt": {"prompt": "a (red:1.3) fox", "prompt_weighting": "compel"},
    "a picture": {"image": encode(PHOTO), "strength": 0.9},
    "a mask": {"image": encode(PHOTO), "mask_image": encode(Image.new("L", PHOTO.size, 255)), "strength": 0.9},
    "a net": control(model="plain", mode=None),
    "a union net": control(),
    "a second pass": {"hires": {"scale": 2, "upscaler": "lanczos"}},
    "a refiner": {"denoising_end": 0.5, "num_inference_steps": 4, "refiner": {"num_inference_steps": 4}},
    "previews": {"preview_every": 1, "num_inference_steps": 3},
    "a LoRA": {"loras": [{"name": "ink", "scale": 0.7}]},
    "two LoRAs": {"loras": [{"name": "ink", "scale": 0.7}, {"name": "wool", "scale": -0.5}]},
    "a LoRA and another text": {"prompt": "a cat", "loras": [{"name": "ink", "scale": 0.7}]},
    "text again": {"prompt": "a fox"},
}


@pytest.fixture(scope="module")
def answers(test_models, halved, tmp_path_factory) -> dict[tuple[str, str, str], dict]:
    """What workers answer to all kinds of jobs, one after the other, by files, offload and kind."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "wool"), 1):
        lora(folder, name, seed)
    found = {}
    for files, models in (("float32", test_models | {"refiner": TEST_MODELS / "refiner"}), ("bfloat16", halved)):
        for offload in ("none", "text-encoders", "all"):
            options = ("--offload", offload, "--lora-dir", folder, "--refiner", models["refiner"])
            with serving(models, *options) as (address, _):
                for kind, fields in KINDS.items():
                    found[files, offload, kind] = ask(address, fields)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload", ["text-encoders", "all"])
@pytest.mark.parametrize("files", ["float32", "bfloat16"])
def test_every_kind_of_job_makes_the_same_picture(answers, files: str, offload: str, kind: str):
    plain, other = answers[files, "none", kind], answers[files, offload, kind]
    assert np.array_equal(image_of(other), image_of(plain))
    assert "upload" not in plain["output"]["timings"]
    if offload == "all":
        assert other["output"]["timings"]["upload"] > 0
    assert other["output"]["warnings"] == plain["output"]["warnings"]
    assert other["output"]["loras"] == plain["output"]["loras"]


def test_loras_act_where_weights_come_and_go(answers):
    for files in ("float32", "bfloat16"):
        images = [image_of(answers[files, "all", kind]) for kind in ("text", "a LoRA", "two LoRAs", "text again")]
        assert np.array_equal(images[0], images[3])
        assert len({image.tobytes() for image in images}) == 3


# --- Memory that runs out ---------------------------------------------------------------------------------------------
# The limit is real: above it the system gives the process no more private memory (RLIMIT_DATA), and torch's allocator fails.
# It counts addresses, so glibc is told to give back what is freed rather than to keep it for later.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": 1 << 17, "MALLOC_ARENA_MAX": 1}


def under(limit: int | None) -> dict:
    """Options of a process that may have so many private bytes."""
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))} if limit else {}
    return limits | {"variables": MALLOC}


class Limited:
    """One model and one request, run under limits."""

    def __init__(self, folder: Path, *options: object, **fields: object) -> None:
        self.folder, self.options = folder, options
        self.fields = {"prompt": "a fox", "num_inference_steps": 2, "seed": 5} | fields

    def run(self, *options: object, limit: int | None = None, **fields: object) -> tuple[dict, int]:
        """The reply, and the most private memory that was asked for."""
        job = json.dumps({"input": self.fields | fields})
        arguments = ("--test_input", job, *self.options, *options)
        result, peaks = peak_of(*arguments, cwd=self.folder, **under(limit))
        text = result.stdout.strip()
        assert text, result.stderr
        reply = json.loads(text)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return reply, peaks["VmData"]


def images_of(reply: dict) -> list[np.ndarray]:
    return [image_of({"status": "COMPLETED", "output": {"images": [image]}}) for image in reply["images"]]


def near(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.abs(x.astype(int) - y.astype(int)).max() <= 1 for x, y in zip(a, b))


TILES, ONE_BY_ONE = "the VAE ran in tiles", "denoised one by one"
TEXT_ENCODERS, EVERYTHING = "--offload text-encoders", "--offload all"


def measures(reply: dict) -> list[str]:
    """Which measures the reply speaks of, in order."""
    known = (TILES, ONE_BY_ONE, TEXT_ENCODERS, EVERYTHING)
    found = [[name for name in known if name in warning] for warning in reply["warnings"]]
    assert all(len(names) == 1 for names in found), reply["warnings"]
    return [name for names in found for name in names]


@pytest.fixture(scope="module")
def tiny(test_models, tmp_path_factory) -> Limited:
    files = ("--model", test_models["default"], "--graphs", test_models["graphs"])
    return Limited(tmp_path_factory.mktemp("tiny"), *files, width=1024, height=1024)


@pytest.mark.full
def test_a_decode_without_memory_is_done_again_in_tiles(tiny):
    whole, most = tiny.run()
    tiled, least = tiny.run("--vae-tiling", "on")
    assert measures(whole) == measures(tiled) == [] and least < most - 100e6
    reply, _ = tiny.run(limit=(least + most) // 2)
    assert measures(reply) == [TILES]
    assert images_of(reply)[0].tobytes() == images_of(tiled)[0].tobytes() != images_of(whole)[0].tobytes()


@pytest.mark.full
def test_a_batch_without_memory_is_denoised_image_by_image(tiny):
    options, fields = ("--vae-tiling", "on"), {"num_images": 8, "num_inference_steps": 1}
    batch, most = tiny.run(*options, **fields)
    planned, least = tiny.run(*options, "--memory-limit", "900M", **fields)
    assert measures(planned) == [ONE_BY_ONE] and least < most - 80e6
    reply, _ = tiny.run(*options, limit=(least + most) // 2, **fields)
    assert measures(reply) == [ONE_BY_ONE] and reply["seeds"] == batch["seeds"]
    assert near(images_of(reply), images_of(batch))


@pytest.mark.full
def test_weights_leave_when_nothing_else_helps_and_stay_away(heavy, tmp_path):
    model, graphs = heavy
    files = ("--model", model, "--graphs", graphs, "--dtype", "float32", "--vae-tiling", "off")
    # without guidance the decoder needs more than the UNet
    jobs = Limited(tmp_path, *files, width=1024, height=1024, num_inference_steps=1, guidance_scale=1)
    plain, most = jobs.run()
    _, least = jobs.run("--offload", "all")
    assert least < most - 150e6
    some, _ = jobs.run(limit=most - 50_000_000)
    assert measures(some) == [TEXT_ENCODERS]
    limit = least + 40_000_000
    reply, _ = jobs.run(limit=limit)
    assert measures(reply) == [TEXT_ENCODERS, EVERYTHING]
    assert reply["images"] == some["images"] == plain["images"]

    (tmp_path / "job.json").write_text(json.dumps(jobs.fields))
    result, _ = peak_of("bench", "--input", "job.json", "--repeat", 2, *files, cwd=tmp_path, **under(limit))
    assert result.returncode == 0, result.stderr
    # the first job dropped what the second brings back
    assert ["upload" in json.loads(line) for line in result.stdout.splitlines()] == [False, True]
    assert result.stderr.count("going on with less") == 2, result.stderr


@pytest.mark.full
def test_when_nothing_is_left_to_try_the_job_fails_and_says_so(tiny):
    _, least = tiny.run("--offload", "all", "--vae-tiling", "on", width=128, height=128)
    job = json.dumps({"input": tiny.fields | {"width": 2048, "height": 2048}})
    arguments = ("--test_input", job, *tiny.options)
    result, _ = peak_of(*arguments, cwd=tiny.folder, **under(least + 100_000_000))
    assert error_of(result, 1, "out_of_memory")["remedy"]


@pytest.mark.full
def test_a_job_that_would_not_fit_is_planned_with_less(tiny):
    """By the estimate alone, before memory runs out."""
    fields = {"guidance_scale": 1}
    tiled, _ = tiny.run("--vae-tiling", "on", **fields)
    reply, _ = tiny.run("--memory-limit", "300M", **fields)
    assert measures(reply) == [TILES] and reply["images"] == tiled["images"]
    fields |= {"num_images": 3, "num_inference_steps": 1}
    batch, _ = tiny.run("--vae-tiling", "on", **fields)
    reply, _ = tiny.run("--memory-limit", "400M", **fields)
    assert measures(reply) == [TILES, ONE_BY_ONE] and near(images_of(reply), images_of(batch))
