"""Pictures and controls that a client got wrong: one worker answers them all by field, and goes on working."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import urllib.request
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

import program
from program import error_of, pictures, run

SMALL = {"prompt": "a fox", "num_inference_steps": 2, "seed": 3, "width": 64, "height": 64}


def encode(picture: Image.Image, kind: str = "PNG", **options) -> str:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return base64.b64encode(out.getvalue()).decode()


PHOTO = Image.fromarray(np.random.default_rng(1).integers(0, 256, (80, 96, 3), dtype=np.uint8))
MAP = encode(PHOTO)
WHITE = encode(Image.new("L", PHOTO.size, 255))
CUT = base64.b64encode(base64.b64decode(MAP)[:3000]).decode()


def huge_png() -> str:
    """A PNG whose header claims 100 megapixels, and next to nothing else."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 999))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def control(**fields) -> dict:
    return {"controlnets": [{"image": MAP, "model": "union", "mode": "canny"} | fields]}


def on(preprocess: dict) -> dict:
    return control(preprocess=preprocess)


WRONG = {
    "a cut control image": (control(image=CUT), "image_damaged", "controlnets[0].image"),
    "a control image that is a text": (control(image=base64.b64encode(b"a text").decode()), "image_format", "controlnets[0].image"),
    "a control image that is no base64": (control(image="?!"), "invalid_base64", "controlnets[0].image"),
    "a control image of 100 megapixels": (control(image=huge_png()), "image_too_large", "controlnets[0].image"),
    "a control image on this machine": (control(image="http://127.0.0.1:1/x.png"), "url_refused", "controlnets[0].image"),
    "a control without an image": (control(image=None), "missing_field", "controlnets[0].image"),
    "a mode that nobody knows": (control(mode="elephant"), "unknown_mode", "controlnets[0].mode"),
    "a mode of a larger union net": (control(mode=6), "unknown_mode", "controlnets[0].mode"),
    "no mode on a union net": (control(mode=None), "missing_field", "controlnets[0].mode"),
    "a net that is not there": (control(model="depth"), "controlnet_not_available", "controlnets[0].model"),
    "twenty controls": ({"controlnets": control()["controlnets"] * 20}, "too_large", "controlnets"),
    "a window that ends before it starts": (control(start=0.7, end=0.2), "out_of_range", "controlnets[0].end"),
    "a window beyond the run": (control(end=1.5), "out_of_range", "controlnets[0].end"),
    "a map that needs a net": (on({"name": "depth"}), "preprocessor_unavailable", "controlnets[0].preprocess.name"),
    "a preprocessor without a name": (on({}), "missing_field", "controlnets[0].preprocess.name"),
    "a threshold that is none": (
        on({"name": "canny", "params": {"low_threshold": "x"}}),
        "invalid_type",
        "controlnets[0].preprocess.params.low_threshold",
    ),
    "a field that no control has": (control(strenght=1), "unknown_field", "controlnets[0].strenght"),
    "a mask of another size": ({"image": MAP, "mask_image": encode(Image.new("L", (64, 64)))}, "mask_size", "mask_image"),
    "a mask without a picture": ({"mask_image": WHITE}, "missing_field", "image"),
    "a damaged mask": ({"image": MAP, "mask_image": CUT}, "image_damaged", "mask_image"),
    "nothing masked, and only that is wanted": (
        {"image": MAP, "mask_image": encode(Image.new("L", PHOTO.size)), "padding_mask_crop": 8},
        "empty_mask",
        "mask_image",
    ),
    "a strength that runs no step": ({"image": MAP, "strength": 0.1}, "out_of_range", "strength"),
    "a picture by its checksum": ({"image": "sha256:00", "strength": 1}, "picture_needed", "image"),
}  # fmt: skip


@pytest.fixture(scope="module")
def worker_at(test_models) -> str:
    """The address of a worker with a net of one type and a union net."""
    with serving(test_models) as (address, _):
        yield address


def serving(test_models, *options: object, **variables: object):
    """A worker's address, and the lines that it logs."""
    nets = [f"--controlnet={name}={test_models['default']}-{name}" for name in ("plain", "union")]
    model = ("--model", test_models["default"], "--graphs", test_models["graphs"])
    return program.serving(*model, *nets, *options, **variables)


def ask(address: str, fields: dict) -> dict:
    return program.ask(address, SMALL | fields)


def test_the_first_reply_and_the_metrics_tell_how_long_the_start_took(test_models):
    with serving(test_models) as (address, _):
        first, second = (ask(address, {})["output"]["timings"] for _ in range(2))
        with urllib.request.urlopen(f"{address}/metrics") as response:
            metrics = response.read().decode()
    start = [phase for phase in first if phase not in second]
    assert {"load_libtorch", "load_model", "load_text_encoder", "load_text_encoder_2", "load_unet_graphs", "load_unet_weights", "load_vae", "warm_up"} == set(start)
    for phase in start:
        assert first[phase] > 0
        assert f'sdxl_worker_cold_start_seconds{{phase="{phase}"}}' in metrics


def test_it_is_ready_for_the_sizes_that_were_named(test_models):
    with serving(test_models, "--log-level", "debug", WARM_UP="64x96,96x64") as (address, logged):
        assert ask(address, {})["status"] == "COMPLETED"
    for width, height in ((64, 96), (96, 64)):
        assert any("warmed up" in line and f"width={width} height={height}" in line for line in logged), logged


@pytest.mark.parametrize("fields, code, field", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_by_field(worker_at, fields: dict, code: str, field: str):
    answer = ask(worker_at, fields)
    assert answer["status"] == "FAILED", answer
    error = json.loads(answer["error"]) if isinstance(answer["error"], str) else answer["error"]
    assert (error["code"], error["field"]) == (code, field), error
    assert error["message"] and error["remedy"]


def image_of(answer: dict) -> np.ndarray:
    assert answer["status"] == "COMPLETED", answer
    data = answer["output"]["images"][0].split(",", 1)[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_worker_that_was_asked_all_that_still_works(worker_at):
    assert image_of(ask(worker_at, control())).shape == (64, 64, 3)


def cmyk(picture: Image.Image) -> Image.Image:
    return picture.convert("CMYK")


def rotated(picture: Image.Image) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees
    return encode(picture.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())


SMOOTH = PHOTO.resize((12, 10)).resize(PHOTO.size, Image.Resampling.BICUBIC)
SAME = {
    "alpha": encode(SMOOTH.convert("RGBA")),
    "WebP": encode(SMOOTH, "WEBP", lossless=True),
    "EXIF rotation": rotated(SMOOTH),
    "a data URI": f"data:image/png;base64,{encode(SMOOTH)}",
}


@pytest.mark.parametrize("image", SAME.values(), ids=SAME)
def test_a_control_image_in_another_form_is_the_same(worker_at, image: str):
    assert (image_of(ask(worker_at, control(image=image))) == image_of(ask(worker_at, control(image=encode(SMOOTH))))).all()


def test_pictures_are_fetched_from_where_they_are(test_models, tmp_path):
    """Several, one of them by a redirect."""
    SMOOTH.save(tmp_path / "map.png")

    class Files(SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/map.png")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=tmp_path)) as host:
        threading.Thread(target=host.serve_forever).start()
        url = f"http://127.0.0.1:{host.server_port}"
        with serving(test_models, RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS=1) as (address, _):
            fetched = ask(address, {"image": f"{url}/map.png", "strength": 1} | control(image=f"{url}/moved"))
            inline = ask(address, {"image": encode(SMOOTH), "strength": 1} | control(image=encode(SMOOTH)))
            gone = ask(address, control(image=f"{url}/gone.png"))
        host.shutdown()
    assert (image_of(fetched) == image_of(inline)).all()
    error = json.loads(gone["error"]) if isinstance(gone["error"], str) else gone["error"]
    assert (error["code"], error["field"]) == ("download_failed", "controlnets[0].image")


GRAY = SMOOTH.convert("L")
NEARLY = {
    "a grey picture": (encode(GRAY), encode(GRAY.convert("RGB"))),
    "grey of 16 bits": (
        encode(Image.fromarray(np.array(GRAY).astype(np.uint16) * 257)),
        encode(GRAY.convert("RGB")),
    ),
    "a CMYK JPEG": (
        encode(cmyk(SMOOTH), "JPEG", quality=98),
        encode(Image.open(io.BytesIO(base64.b64decode(encode(cmyk(SMOOTH), "JPEG", quality=98)))).convert("RGB")),
    ),
}


@pytest.mark.parametrize("image, as_pillow_reads_it", NEARLY.values(), ids=NEARLY)
def test_grey_and_cmyk_are_read_as_pillow_reads_them(worker_at, image: str, as_pillow_reads_it: str):
    ours = image_of(ask(worker_at, control(image=image))).astype(int)
    expected = image_of(ask(worker_at, control(image=as_pillow_reads_it))).astype(int)
    other = image_of(ask(worker_at, control(image=MAP))).astype(int)
    assert np.abs(ours - expected).mean() < 0.02 * np.abs(other - expected).mean()


def test_time_that_a_finished_window_saves_is_told(worker_at):
    timings = ask(worker_at, control(end=0.5))["output"]["timings"]
    assert timings["controlnet_saved"] > 0
    assert "controlnet_saved" not in ask(worker_at, control())["output"]["timings"]


def test_a_net_makes_room_for_another_and_comes_back(test_models):
    alone = ("--controlnet-memory", "1K")
    with serving(test_models, *alone) as (address, logged):
        first, other, again = (image_of(ask(address, control(model=net))) for net in ("plain", "union", "plain"))
        assert (first == again).all() and (first != other).any()
    assert sum("dropped to make room" in line for line in logged) == 2
    assert sum("ControlNet loaded" in line for line in logged) == 3


def test_a_union_net_under_the_name_of_a_plain_one_is_known_by_its_weights(test_models, tmp_path):
    net = test_models["default"].parent / "default-union"
    (tmp_path / "net").mkdir()
    config = json.loads((net / "config.json").read_text()) | {"_class_name": "ControlNetModel"}
    (tmp_path / "net" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "num_control_type"}))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "net" / weights).symlink_to(net / weights)
    with serving(test_models, f"--controlnet=published={tmp_path / 'net'}") as (address, _):
        published, union = (image_of(ask(address, control(model=name))) for name in ("published", "union"))
    assert (published == union).all()


def test_nets_that_fit_are_loaded_at_start(test_models):
    with serving(test_models, "--preload-controlnets") as (address, logged):
        ask(address, control())
    assert sum("ControlNet loaded" in line for line in logged) == 2


def test_files_of_the_command_line_make_a_picture_that_can_be_made_again(test_models, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    options = ["--model", test_models["default"], "--graphs", test_models["graphs"]]
    options += ["--controlnet", f"union={test_models['default']}-union", "--seed", 5, "--steps", 2]
    control_options = ["--control-image", tmp_path / "photo.png", "--control-mode", "canny", "--preprocess", "canny"]
    first = run("generate", *options, "--prompt", "a fox", *control_options, "--output", "a", cwd=tmp_path)
    [picture] = pictures(first, tmp_path)
    again = run("generate", *options, "--from", picture, "--output", "b", cwd=tmp_path)
    assert error_of(again, 2, "picture_needed")["field"] == "controlnets[0].image"
    again = run("generate", *options, "--from", picture, *control_options, "--output", "b", cwd=tmp_path)
    assert pictures(again, tmp_path)[0].read_bytes() == picture.read_bytes()
    assert "Module: canny, Model: union, Mode: canny" in Image.open(picture).text["parameters"]


def test_a_preprocessor_can_be_tried_alone(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    done = run("preprocess", "canny", "photo.png", "map.png", "--set", "low_threshold=50", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    edges = np.array(Image.open(tmp_path / "map.png"))
    assert set(np.unique(edges)) == {0, 255} and edges.shape == (80, 96, 3)
    error_of(run("preprocess", "depth", "photo.png", "map.png", cwd=tmp_path), 2, "preprocessor_unavailable")


def test_a_folder_that_holds_no_controlnet_is_told_at_start(test_models, tmp_path):
    options = ["--model", test_models["default"], "--graphs", test_models["graphs"], "--prompt", "x"]
    gone = run("generate", *options, "--controlnet", "canny=/nowhere", cwd=tmp_path)
    assert "/nowhere" in error_of(gone, 3, "controlnet_not_found")["message"]
    model = run("generate", *options, "--controlnet", f"canny={test_models['default'] / 'unet'}", cwd=tmp_path)
    assert "UNet2DConditionModel" in error_of(model, 3, "unsupported_model")["message"]
