"""The command line, from what is typed to the files and lines that come out, on the default model."""

import base64
import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from PIL import Image
from safetensors.numpy import load_file

from program import (
    DEMO, GRAPHS, PROGRAM, copy_of, environment, error_of, files_in, pictures, python, run, whole_text,
)

REQUEST = {
    "prompt": "a red fox, in the snow",
    "negative_prompt": "blurry",
    "num_inference_steps": 2,
    "width": 64,
    "height": 64,
    "seed": 8,
}
REPLY_KEYS = ["images", "image_url", "seed", "seeds", "image_details", "timings", "warnings", "loras", "version"]
LOG_LINE = re.compile(r"(ERROR|WARN|INFO|DEBUG|TRACE) *\| ")
EXIF_DESCRIPTION, EXIF_COMMENT, EXIF_IFD = 0x010E, 0x9286, 0x8769


def typed(**changes: object) -> list[str]:
    """REQUEST as options, with changes."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in (REQUEST | changes).items()]


@dataclass
class Made:
    """What one run made: its first picture, its latents, its stderr."""

    path: Path
    bytes: bytes
    latents: numpy.ndarray
    stderr: str


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Made:
    """The picture of REQUEST. Others are compared with it."""
    folder = tmp_path_factory.mktemp("one")
    result = run("generate", *typed(), "--output", "out", "--save-latents", "new/latents.safetensors", cwd=folder)
    (path,) = pictures(result, folder)
    latents = load_file(folder / "new" / "latents.safetensors")
    assert list(latents) == ["latents"]
    return Made(path, path.read_bytes(), latents["latents"], result.stderr)


def generate(folder: Path, *arguments: object, **options) -> Path:
    (path,) = pictures(run("generate", *arguments, cwd=folder, **options), folder)
    return path


def pixels(picture: Path | bytes) -> numpy.ndarray:
    source = picture if isinstance(picture, Path) else io.BytesIO(picture)
    return numpy.asarray(Image.open(source).convert("RGB")).astype(int)


def difference(a: Path | bytes, b: Path | bytes) -> int:
    """The largest, of 255."""
    return int(numpy.abs(pixels(a) - pixels(b)).max())


def stored_request(picture: Path) -> dict:
    return json.loads(Image.open(picture).text["sdxl-worker"])


# --- Where a request comes from ---------------------------------------------------------------------------------------


def test_a_prompt_is_all_that_is_needed(tmp_path: Path):
    path = generate(tmp_path, "--prompt", "a lighthouse")
    assert path.parent == tmp_path / "out" and files_in(tmp_path) == [f"out/{path.name}"]
    picture = Image.open(path)
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (128, 128))
    assert pixels(path).std() > 5
    last = picture.text["parameters"].splitlines()[-1]
    assert last.startswith(f"Steps: 30, Sampler: Euler, CFG scale: 5, Seed: {path.stem}, Size: 128x128, Model: demo")


def test_a_request_from_a_file_is_the_same_request(tmp_path: Path, one: Made):
    (tmp_path / "job.json").write_text(json.dumps({"id": "x", "input": REQUEST}))
    assert generate(tmp_path, "--input", "job.json").read_bytes() == one.bytes


def test_a_bare_request_from_standard_input_is_the_same_request(tmp_path: Path, one: Made):
    assert generate(tmp_path, "--input", "-", stdin=json.dumps(REQUEST)).read_bytes() == one.bytes


def test_what_is_typed_wins_over_the_file(tmp_path: Path, one: Made):
    other = REQUEST | {"prompt": "an owl", "seed": 1, "num_inference_steps": 1, "width": 128}
    wanted = ("--prompt", REQUEST["prompt"], "--seed", "8", "--steps", "2", "--set", "width=64")
    path = generate(tmp_path, "--input", "-", *wanted, stdin=json.dumps(other))
    assert path.read_bytes() == one.bytes


def test_set_gives_any_other_field_and_bare_words_are_strings(tmp_path: Path):
    settings = {"clip_skip": 1, "original_size": [512, 256], "guidance_rescale": 0.5, "scheduler": "ddim", "eta": 0.5}
    words = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()]
    stored = stored_request(generate(tmp_path, *typed(), *(f"--set={word}" for word in words)))
    assert {name: stored[name] for name in settings} == settings
    assert {name: stored[name] for name in REQUEST} == REQUEST


def test_aliases_are_read_and_named_in_warnings(tmp_path: Path, one: Made):
    request = {name: REQUEST[name] for name in ("prompt", "negative_prompt", "seed")}
    request |= {"steps": 2, "cfg_scale": 5, "size": "64x64", "n": 1, "sampler_name": "K_EULER"}
    result = run("generate", "--input", "-", cwd=tmp_path, stdin=json.dumps(request))
    assert pictures(result, tmp_path)[0].read_bytes() == one.bytes
    warnings = [line for line in result.stderr.splitlines() if line.startswith("WARN")]
    for alias, name in [
        ("steps", "num_inference_steps"), ("cfg_scale", "guidance_scale"), ("size", "width"), ("n", "num_images"),
        ("sampler_name", "scheduler"),
    ]:
        assert any(f"`{alias}` was read as `{name}`" in line for line in warnings), alias


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_several_pictures_have_seeds_in_order_and_each_is_as_if_it_were_alone(tmp_path: Path, one: Made):
    arguments = (*typed(seed=7, num_images=3), "--output", ".", "--save-latents", "latents.safetensors")
    paths = pictures(run("generate", *arguments, cwd=tmp_path), tmp_path)
    assert [path.name for path in paths] == ["7.png", "8.png", "9.png"]
    latents = load_file(tmp_path / "latents.safetensors")["latents"]
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == numpy.float32
    assert numpy.abs(latents[1] - one.latents[0]).max() < 1e-4
    assert difference(paths[1], one.path) <= 1
    assert [stored_request(path)["seed"] for path in paths] == [7, 8, 9]
    alone = generate(tmp_path, *typed(seed=9), "--output", "alone")
    assert difference(paths[2], alone) <= 1
    assert difference(paths[0], paths[1]) > 10


def test_the_same_seed_makes_the_same_bytes_beside_an_earlier_picture_never_over_it(tmp_path: Path, one: Made):
    (tmp_path / "8.png").write_text("somebody's picture")
    for name in ("8-2.png", "8-3.png"):
        path = generate(tmp_path, *typed(), "--output", tmp_path)
        assert path.name == name and path.read_bytes() == one.bytes
    assert (tmp_path / "8.png").read_text() == "somebody's picture"
    assert files_in(tmp_path) == ["8-2.png", "8-3.png", "8.png"]


@pytest.mark.parametrize("size, scheduler", [((72, 136), "euler"), ((200, 72), "ddim")])
def test_sizes_that_are_only_multiples_of_8_work(tmp_path: Path, size: tuple[int, int], scheduler: str):
    width, height = size
    arguments = ("--width", width, "--height", height, "--scheduler", scheduler, "--save-latents", "l.safetensors")
    path = generate(tmp_path, "--prompt", "a tower", "--steps", "2", *arguments)
    assert Image.open(path).size == size and pixels(path).std() > 5
    assert load_file(tmp_path / "l.safetensors")["latents"].shape == (1, 4, height // 8, width // 8)


def test_guidance_off_and_guidance_on_are_different_pictures(tmp_path: Path, one: Made):
    assert difference(generate(tmp_path, *typed(guidance_scale=1)), one.path) > 2


def test_tiles_change_the_seams_and_not_the_picture(tmp_path: Path):
    arguments = ("--prompt", "a fox", "--seed", "5", "--steps", "1", "--width", "200", "--height", "136")
    made = {}
    for tiling in ("on", "off"):
        latents = tmp_path / f"{tiling}.safetensors"
        path = generate(tmp_path, *arguments, "--vae-tiling", tiling, "--output", tiling, "--save-latents", latents)
        made[tiling] = (pixels(path), load_file(latents)["latents"])
    assert numpy.array_equal(made["on"][1], made["off"][1])
    assert made["on"][0].shape == (136, 200, 3)
    distance = numpy.abs(made["on"][0] - made["off"][0])
    assert 0 < distance.mean() < 10


# --- File formats and what is stored in them --------------------------------------------------------------------------


def test_a_png_carries_the_parameters_as_other_tools_read_them_and_makes_itself_again(tmp_path: Path, one: Made):
    text = Image.open(one.path).text["parameters"]
    settings = r"Steps: 2, Sampler: Euler, CFG scale: 5, Seed: 8, Size: 64x64, Model: demo, Version: sdxl-worker [\d.]+"
    assert re.fullmatch(rf"a red fox, in the snow\nNegative prompt: blurry\n{settings}", text)
    assert {name: stored_request(one.path)[name] for name in REQUEST} == REQUEST
    assert generate(tmp_path, "--from", one.path).read_bytes() == one.bytes


UNICODE = "日本の fox, déjà vu 🦊"


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> Path:
    """The picture of REQUEST with a prompt that needs Unicode."""
    path = generate(tmp_path_factory.mktemp("lossless"), *typed(prompt=UNICODE))
    assert Image.open(path).text["parameters"].startswith(f"{UNICODE}\nNegative prompt: blurry\nSteps: 2")
    return path


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_jpeg_and_webp_are_what_they_say_and_make_themselves_again(tmp_path: Path, lossless: Path, form: str):
    path = generate(tmp_path, *typed(prompt=UNICODE, output_format=form))
    picture = Image.open(path)
    assert (picture.format, picture.size, path.name) == (form.upper(), (64, 64), f"8.{form}")
    exif = picture.getexif()
    comment = exif.get(EXIF_COMMENT) or exif.get_ifd(EXIF_IFD)[EXIF_COMMENT]
    assert comment.startswith(b"UNICODE\0")
    parameters = comment[8:].decode("utf-16-be")
    assert parameters == Image.open(lossless).text["parameters"]
    assert exif[EXIF_DESCRIPTION].startswith("sdxl-worker: {")
    assert generate(tmp_path, "--from", path, "--output", "again").read_bytes() == path.read_bytes()

    small = generate(tmp_path, "--from", path, "--set", "output_quality=20", "--output", "small")
    assert small.stat().st_size < path.stat().st_size
    theirs = tmp_path / "theirs"
    Image.open(lossless).save(theirs, form, quality=95)
    loss = {
        name: numpy.abs(pixels(file) - pixels(lossless)).mean()
        for name, file in (("ours", path), ("theirs", theirs), ("small", small))
    }
    assert 0 < loss["ours"] < 1.2 * loss["theirs"] and loss["ours"] < loss["small"]


def test_a_picture_without_parameters_has_the_same_pixels_and_none_to_read(tmp_path: Path, one: Made):
    result = run("generate", *typed(), "--set", "embed_metadata=false", "--quiet", cwd=tmp_path)
    (path,) = pictures(result, tmp_path)
    assert Image.open(path).text == {} and b"fox" not in path.read_bytes()
    assert difference(path, one.path) == 0
    assert "step" not in result.stderr
    error_of(run("generate", "--from", path, cwd=tmp_path), 2, "no_parameters")


# --- Without a command ------------------------------------------------------------------------------------------------


def test_without_a_command_the_job_in_the_folder_is_run_and_answered_on_standard_output(tmp_path: Path, one: Made):
    request = REQUEST | {"num_images": 1}
    request["steps"] = request.pop("num_inference_steps")
    (tmp_path / "test_input.json").write_text(json.dumps({"input": request}))
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1 and result.stdout.endswith("}\n")
    reply = json.loads(result.stdout)
    assert list(reply) == REPLY_KEYS
    header, data = reply["images"][0].split(",", 1)
    assert header == "data:image/png;base64" and base64.b64decode(data, validate=True) == one.bytes
    assert reply["image_url"] == reply["images"][0]
    assert (reply["seed"], reply["seeds"], reply["version"]) == (8, [8], stored_version())
    assert reply["image_details"] == [{"width": 64, "height": 64, "format": "png", "bytes": len(one.bytes)}]
    assert list(reply["timings"]) == ["encode_prompt", "prepare", "denoise", "decode", "encode_image", "total"]
    assert reply["timings"]["total"] >= reply["timings"]["denoise"] > 0
    assert reply["warnings"] == ["`steps` was read as `num_inference_steps`"]
    assert "model loaded" in result.stderr
    assert all(LOG_LINE.match(line) for line in result.stderr.splitlines())
    assert files_in(tmp_path) == ["test_input.json"]


def stored_version() -> str:
    return subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.split()[-1]


def test_a_job_given_with_the_sdks_flag_is_answered_in_the_form_it_asks_for(tmp_path: Path):
    (tmp_path / "test_input.json").write_text("not read")
    request = REQUEST | {"num_images": 2, "output_format": "webp", "response_format": "b64_json"}
    result = run("--test_input", json.dumps({"input": request}), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    assert reply["seeds"] == [8, 9] and len(reply["images"]) == len(reply["image_details"]) == 2
    for image, details in zip(reply["images"], reply["image_details"]):
        data = base64.b64decode(image, validate=True)
        assert Image.open(io.BytesIO(data)).format == "WEBP" and details["bytes"] == len(data)


def test_without_a_command_and_without_a_job_the_way_out_is_told(tmp_path: Path):
    error = error_of(run(cwd=tmp_path), 1, "test_input_missing")
    assert "test_input.json" in whole_text(error) and "--help" in error["remedy"]


@pytest.mark.parametrize("job, code", [("{", "invalid_json"), ('{"prompt": "a"}', "missing_field")])
def test_a_job_that_is_none_is_an_error(tmp_path: Path, job: str, code: str):
    (tmp_path / "test_input.json").write_text(job)
    assert "test_input.json" in error_of(run(cwd=tmp_path), 1, code)["message"]


# --- What is told while it runs ---------------------------------------------------------------------------------------


def test_progress_is_told_in_lines_where_there_is_no_terminal(one: Made):
    lines = [line for line in one.stderr.splitlines() if not LOG_LINE.match(line)]
    assert lines and all(re.fullmatch(r"step \d+/2, [\d.]+ it/s, \d+ s left", line) for line in lines)
    assert lines[-1].startswith("step 2/2")


def on_a_terminal(*arguments: object, cwd: Path) -> tuple[int, str]:
    """Exit status and what a terminal of 100 columns got to see on stderr."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", "100", "rows", "30"], stdin=theirs, check=True)
    process = subprocess.Popen(
        [str(PROGRAM), *map(str, arguments)], cwd=cwd, env=environment(TERM="xterm"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    os.close(ours)
    process.communicate(timeout=60)
    return process.returncode, seen.decode()


def test_a_terminal_gets_a_bar_with_steps_speed_and_time_left(tmp_path: Path):
    status, seen = on_a_terminal("generate", *typed(num_inference_steps=20), cwd=tmp_path)
    assert status == 0
    assert re.search(r"denoising .* step \d+/20 .*\d it/s .*left", seen), seen
    assert "\r" in seen


def test_a_terminal_is_spared_the_json_of_an_error(tmp_path: Path):
    status, seen = on_a_terminal("generate", "--input", "nowhere.json", cwd=tmp_path)
    assert status == 2 and "nowhere.json" in seen and "unreadable_file" in seen
    assert "{" not in seen


def test_nothing_of_a_prompt_is_logged(tmp_path: Path):
    words = {"prompt": "xylophone " * 60, "negative_prompt": "quagmire " * 60, "prompt_2": "zeppelin"}
    request = json.dumps(REQUEST | words)
    result = run("generate", "--input", "-", "--log-level", "trace", cwd=tmp_path, stdin=request)
    pictures(result, tmp_path)
    for word in ("xylophone", "quagmire", "zeppelin"):
        assert word not in result.stderr
    for field in ("prompt", "negative_prompt"):
        assert re.search(rf"WARN.*\b{field} was cut to 77 tokens", result.stderr)


def test_an_interrupted_run_leaves_nothing_half_written(tmp_path: Path):
    arguments = ("generate", *typed(num_inference_steps=200), "--save-latents", "latents.safetensors")
    process = subprocess.Popen(
        [str(PROGRAM), *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        # a shell's background job ignores it, and so would all that the job starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any("model loaded" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for either
    assert files_in(tmp_path) == []


# --- Number formats ---------------------------------------------------------------------------------------------------


def float32_graphs(folder: Path) -> Path:
    """The graphs without those in 16 bits, which they have where there is a graphics card."""
    graphs = copy_of(GRAPHS, folder)
    manifest = json.loads((graphs / "manifest.json").read_text())
    manifest["graphs"] = [entry for entry in manifest["graphs"] if entry["dtype"] == "float32"]
    (graphs / "manifest.json").write_text(json.dumps(manifest))
    return graphs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_number_format_without_graphs_names_the_command_that_makes_them(tmp_path: Path, dtype: str):
    graphs = float32_graphs(tmp_path / "g")
    result = run("generate", "--prompt", "a", "--dtype", dtype, "--graphs", graphs, cwd=tmp_path)
    error = error_of(result, 3, "no_matching_graph")
    assert f"dtype is float32, not {dtype}" in error["message"]
    command = f"python torchscript/export.py --model {DEMO} --dtype {dtype} --out {graphs}"
    assert command in error["remedy"]


def float32_latents_from_noise_drawn_in(dtype: str) -> numpy.ndarray:
    """REQUEST's, by diffusers. Which numbers a seed draws depends on the number format, so that two formats cannot be
    compared by the seed alone: the same noise has to be given to both."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO)
    pipeline.set_progress_bar_config(disable=True)
    request = {name: value for name, value in REQUEST.items() if name != "seed"}
    generator = torch.Generator("cpu").manual_seed(REQUEST["seed"])
    noise = torch.randn((1, 4, 8, 8), generator=generator, dtype=getattr(torch, dtype)).float()
    return pipeline(**request, latents=noise, output_type="latent").images.numpy()


@pytest.mark.full
@pytest.mark.parametrize("dtype, furthest", [("bfloat16", 0.1), ("float16", 0.02)])
def test_the_command_an_error_names_makes_graphs_that_compute_the_same_picture(
    tmp_path: Path, dtype: str, furthest: float
):
    arguments = (*typed(), "--dtype", dtype, "--graphs", float32_graphs(tmp_path / "g"))
    remedy = error_of(run("generate", *arguments, cwd=tmp_path), 3, "no_matching_graph")["remedy"]
    command = shlex.split(remedy.removeprefix("run: "))
    assert command[:2] == ["python", "torchscript/export.py"]
    python(*command[1:])
    picture = generate(tmp_path, *arguments, "--save-latents", "latents.safetensors")
    assert pixels(picture).shape == (64, 64, 3) and pixels(picture).std() > 5
    ours = load_file(tmp_path / "latents.safetensors")["latents"]
    theirs = float32_latents_from_noise_drawn_in(dtype)
    assert ours.dtype == numpy.float32
    distance = numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs)
    assert 0 < distance < furthest


# --- The doctor -------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_wrong_here(tmp_path: Path):
    parameters = len(load_file(DEMO / "unet" / "diffusion_pytorch_model.safetensors"))
    result = run("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    for line in ("libtorch  ok", "device    ok", "graphs    ok", "model     ok"):
        assert line in result.stdout
    for words in (f"unet float32 ({parameters} parameters)", "all weights bound on cpu float32", "128x128, euler"):
        assert words in result.stdout


def test_the_doctor_times_the_phases_of_a_start(tmp_path: Path):
    result = run("doctor", "--timing", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout.split("phase of the start")[1].splitlines()[1:]
    phases = {name: float(milliseconds) for name, milliseconds in (line.split() for line in table)}
    parts = [phases[f"load_{part}"] for part in ("text_encoder", "text_encoder_2", "unet_graphs", "unet_weights", "vae")]
    assert all(0 < part <= phases["load_model"] for part in parts)
    assert phases["load_libtorch"] > 0 and 0 < phases["denoise"] < phases["total"] <= phases["first_picture"] + 1


def test_the_doctor_says_what_is_wrong_with_a_model_and_what_to_do(tmp_path: Path):
    model = copy_of(DEMO, tmp_path / "model")
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    result = run("doctor", "--model", model, cwd=tmp_path)
    assert result.returncode == 3
    assert "graphs    ok" in result.stdout and "model     FAILED" in result.stdout
    assert str(model / "vae") in result.stdout and "to do: " in result.stdout
    assert json.loads(result.stderr.splitlines()[-1])["code"] == "weights_missing"


def test_the_doctor_says_what_is_wrong_with_graphs_and_what_to_do(tmp_path: Path):
    graphs = copy_of(GRAPHS, tmp_path / "graphs")
    (graphs / "manifest.json").write_text("{")
    result = run("doctor", "--graphs", graphs, cwd=tmp_path)
    assert result.returncode == 3
    assert "graphs    FAILED" in result.stdout and "export.py" in result.stdout
    assert json.loads(result.stderr.splitlines()[-1])["code"] == "graphs_invalid"
