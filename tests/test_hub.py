"""Models that are named by their place on the Hub, before a Hub of our own: what is fetched, what is checked, what
happens when it breaks, and where else a model is found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from program import PROGRAM, environment, error_of, pictures, run, serving

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf-secret-of-the-tests"
PIECE = 32 << 20


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """Repositories by name, each a dict from file name to content. Large files are "LFS" and come from `/cdn/`."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.gated: set[str] = set()
        self.cut_after: list[int] = []  # of the next large transfers: so many bytes, then the connection ends
        self.busy = 0  # answers of 429 to come
        self.wrong = 0  # large transfers to come that have a wrong byte
        self.claims: dict[str, int] = {}  # another size than the true one
        self.delay = 0.0  # seconds before each large transfer
        self.knows_ranges = True
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append((self.path, dict(self.headers)))
                path, _, _ = self.path.partition("?")
                if hub.busy:
                    hub.busy -= 1
                    return self.answer(429, b"", **{"Retry-After": "1"})
                parts = path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self.listing("/".join(parts[2:4]))
                if parts[0] == "cdn":
                    return self.content(hub.repositories["/".join(parts[1:3])]["/".join(parts[3:])])
                name, file = "/".join(parts[:2]), "/".join(parts[4:])
                if name in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, b"")
                content = hub.repositories.get(name, {}).get(file)
                if content is None:
                    return self.answer(404, b"")
                if file.endswith(".safetensors"):
                    return self.answer(302, b"", Location=f"/cdn/{name}/{file}")
                self.answer(200, content)

            def listing(self, name: str) -> None:
                if name in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, b"")
                if name not in hub.repositories:
                    return self.answer(404, b"")
                siblings = []
                for file, content in hub.repositories[name].items():
                    entry = {"rfilename": file, "size": hub.claims.get(file, len(content)), "blobId": git_blob(content)}
                    if file.endswith(".safetensors"):
                        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": entry["size"]}
                    siblings.append(entry)
                self.answer(200, json.dumps({"sha": REVISION, "siblings": siblings}).encode())

            def content(self, content: bytes) -> None:
                time.sleep(hub.delay)
                wanted = self.headers.get("Range") if hub.knows_ranges else None
                first, last = 0, len(content) - 1
                if wanted:
                    first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                body = content[first : last + 1]
                if hub.wrong:
                    hub.wrong -= 1
                    body = bytes([body[0] ^ 1]) + body[1:]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(body)))
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                self.end_headers()
                if hub.cut_after:
                    body = body[: hub.cut_after.pop(0)]
                    self.close_connection = True
                self.wfile.write(body)

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetched(self) -> list[str]:
        """Files, in no order: each as often as a part of it was asked for."""
        return [path.split("/", 4)[4] for path, _ in self.requests if path.startswith("/cdn/")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.server.shutdown()


@pytest.fixture
def model(hub, test_models) -> str:
    """The tiny model as a repository, with much that is not needed beside it."""
    files = files_of(test_models["default"])
    unet = "unet/diffusion_pytorch_model.safetensors"
    hub.repositories["org/tiny"] = files | {
        "README.md": b"# a model",
        "tiny.safetensors": b"all in one file",
        unet.replace(".safetensors", ".bin"): b"a pickle",
        unet.replace(".safetensors", ".non_ema.safetensors"): b"another variant",
        "text_encoder/openvino_model.xml": b"<xml/>",
    }
    return "org/tiny"


@pytest.fixture
def big(hub) -> str:
    """A VAE of two and a half pieces."""
    rng = np.random.default_rng(1)
    weights = save({"decoder.conv_in.weight": rng.integers(0, 255, 5 * PIECE // 2, dtype=np.uint8)})
    hub.repositories["org/big"] = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": weights}
    return "org/big"


def at(hub: FakeHub, cache: Path, **variables: object) -> dict[str, object]:
    return {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": cache, "NETWORK_VOLUME": cache / "no-volume"} | variables


def fetch(hub: FakeHub, cache: Path, *options: object, **variables: object) -> subprocess.CompletedProcess:
    return run("fetch", *options, cwd=cache.parent, variables=at(hub, cache, **variables))


def snapshot(result: subprocess.CompletedProcess) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])



# --- What comes -------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_makes_the_picture_of_its_folder(hub, model, test_models, tmp_path):
    cache, graphs = tmp_path / "cache", ("--graphs", test_models["graphs"])
    request = ("--prompt", "a fox", "--steps", "2", "--width", "64", "--height", "64", "--seed", "3", *graphs)
    made = run("generate", *request, "--model", model, "--output", "a", cwd=tmp_path, variables=at(hub, cache))
    (ours,) = pictures(made, tmp_path)
    (theirs,) = pictures(run("generate", *request, "--model", test_models["default"], "--output", "b", cwd=tmp_path), tmp_path)
    assert ours.read_bytes().split(b"IDAT")[1] == theirs.read_bytes().split(b"IDAT")[1]
    assert b"Model: org/tiny" in ours.read_bytes()
    asked = len(hub.requests)
    again = run("generate", *request, "--model", model, "--output", "c", cwd=tmp_path, variables=at(hub, cache, HF_ENDPOINT="http://127.0.0.1:1"))
    assert pictures(again, tmp_path) and len(hub.requests) == asked
    assert "source=hub-cache" in again.stderr and "source=download" in made.stderr


def test_only_what_is_needed_comes_and_lies_as_python_s_library_wants_it(hub, model, test_models, tmp_path):
    folder = snapshot(fetch(hub, tmp_path / "cache", "--model", model))
    assert folder == tmp_path / "cache" / "models--org--tiny" / "snapshots" / REVISION
    assert files_of(folder) == files_of(test_models["default"])
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cache = tmp_path / "cache"
    assert snapshot_download(model, cache_dir=cache, local_files_only=True) == str(folder)
    found = try_to_load_from_cache(model, "unet/config.json", cache_dir=cache)
    assert Path(found).resolve().parent == cache / "models--org--tiny" / "blobs"


def test_half_precision_comes_first_unless_float32_is_asked_for(hub, model, tmp_path):
    name = "vae/diffusion_pytorch_model.fp16.safetensors"
    hub.repositories[model][name] = hub.repositories[model]["vae/diffusion_pytorch_model.safetensors"] + b""
    fetch(hub, tmp_path / "a", "--model", model)
    assert name in hub.fetched() and "vae/diffusion_pytorch_model.safetensors" not in hub.fetched()
    hub.requests.clear()
    fetch(hub, tmp_path / "b", "--model", model, "--dtype", "float32")
    assert name not in hub.fetched() and "vae/diffusion_pytorch_model.safetensors" in hub.fetched()


def test_vae_and_controlnets_come_from_the_hub_too(hub, model, test_models, tmp_path):
    hub.repositories["org/vae"] = files_of(test_models["default"] / "vae")
    hub.repositories["org/net"] = {f"nets/{name}": data for name, data in files_of(Path(f"{test_models['default']}-plain")).items()}
    options = ("--model", model, "--vae", "org/vae", "--controlnet", "edges=org/net/nets", "--graphs", test_models["graphs"])
    variables = at(hub, tmp_path / "cache")
    made = run("generate", *options, "--prompt", "a fox", "--steps", "1", "--width", "64", "--height", "64", cwd=tmp_path, variables=variables)
    pictures(made, tmp_path)
    lines = fetch(hub, tmp_path / "cache", *options[:6]).stdout.splitlines()
    assert [Path(line).parts[-3] for line in lines[:2]] == ["models--org--tiny", "models--org--vae"]
    assert lines[2].endswith(f"models--org--net/snapshots/{REVISION}/nets")


def test_a_checkpoint_in_one_file_comes_from_the_hub(hub, test_models, tmp_path):
    from test_single_file import in_one_file

    file = in_one_file(test_models["default"], tmp_path / "one.safetensors")
    hub.repositories["org/one"] = {"README.md": b"", "models/one.safetensors": file.read_bytes(), "models/two.safetensors": b"another"}
    options = ("--model", "org/one/models/one.safetensors", "--model-config", test_models["default"], "--graphs", test_models["graphs"])
    request = ("--prompt", "a fox", "--steps", "1", "--width", "64", "--height", "64")
    pictures(run("generate", *request, *options, cwd=tmp_path, variables=at(hub, tmp_path / "cache")), tmp_path)
    assert hub.fetched() == ["models/one.safetensors"]
    error = error_of(fetch(hub, tmp_path / "cache", "--model", "org/one/models/three.safetensors"), 3, "model_not_found")
    assert "three.safetensors" in error["message"]


def test_several_pieces_come_side_by_side_and_make_the_file(hub, big, tmp_path):
    folder = snapshot(fetch(hub, tmp_path / "cache", "--vae", big, "--model", tmp_path))
    assert files_of(folder) == hub.repositories[big]
    ranges = [headers["range"] for path, headers in hub.requests if path.startswith("/cdn/")]
    assert sorted(ranges) == sorted(f"bytes={i * PIECE}-{min((i + 1) * PIECE, len(hub.repositories[big]['diffusion_pytorch_model.safetensors'])) - 1}" for i in range(3))


def test_a_host_that_knows_no_pieces_will_do(hub, big, tmp_path):
    hub.knows_ranges = False
    folder = snapshot(fetch(hub, tmp_path / "cache", "--vae", big, "--model", tmp_path))
    assert files_of(folder) == hub.repositories[big]


# --- What breaks ------------------------------------------------------------------------------------------------------


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub, big, tmp_path):
    hub.cut_after = [1000, 10_000_000]
    folder = snapshot(fetch(hub, tmp_path / "cache", "--vae", big, "--model", tmp_path))
    assert files_of(folder) == hub.repositories[big]
    starts = [int(headers["range"].split("=")[1].split("-")[0]) for path, headers in hub.requests if path.startswith("/cdn/")]
    assert len(starts) == 5 and sum(start % PIECE > 0 for start in starts) == 2


def test_a_worker_that_is_killed_leaves_what_has_come_to_the_next(hub, big, tmp_path):
    cache = tmp_path / "cache"
    hub.delay = 0.5
    command = [PROGRAM, "fetch", "--vae", big, "--model", tmp_path]
    process = subprocess.Popen([*map(str, command)], env=environment(**at(hub, cache)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pieces = cache / "models--org--big" / "blobs"
    while not list(pieces.glob("*.pieces")) or len(hub.fetched()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(pieces.glob("*.safetensors")) and not list((cache / "models--org--big").glob("snapshots/*/*"))
    done = len((list(pieces.glob("*.pieces"))[0]).read_text().split()) - 2
    hub.requests.clear()
    folder = snapshot(fetch(hub, cache, "--vae", big, "--model", tmp_path))
    assert files_of(folder) == hub.repositories[big]
    ranges = [headers['range'] for path, headers in hub.requests if path.startswith('/cdn/')]
    assert done >= 1 and len(ranges) == 3 - done, (done, ranges)


def test_a_wrong_byte_is_found_and_the_file_fetched_again(hub, model, tmp_path):
    hub.wrong = 1
    folder = snapshot(fetch(hub, tmp_path / "cache", "--model", model))
    assert all(hub.repositories[model][name] == data for name, data in files_of(folder).items())
    assert len(hub.fetched()) == len(set(hub.fetched())) + 1


def test_wrong_bytes_twice_are_an_error_and_nothing_gets_a_name(hub, model, tmp_path):
    hub.wrong = 1000
    error = error_of(fetch(hub, tmp_path / "cache", "--model", model), 3, "checksum_mismatch")
    assert "org/tiny" in error["message"]
    assert not list((tmp_path / "cache").rglob("snapshots/*/*")) and not list((tmp_path / "cache").rglob("refs/*"))
    blobs = [path.name for path in (tmp_path / "cache").rglob("blobs/*") if "." not in path.name]
    assert not {hashlib.sha256(data).hexdigest() for data in hub.repositories[model].values()} & set(blobs)


def test_a_gated_model_says_what_to_do_and_opens_to_the_token(hub, model, tmp_path):
    hub.gated.add(model)
    error = error_of(fetch(hub, tmp_path / "cache", "--model", model), 3, "model_gated")
    assert "HF_TOKEN" in error["remedy"] and "licence" in error["remedy"]
    result = fetch(hub, tmp_path / "cache", "--model", model, HF_TOKEN=TOKEN)
    assert snapshot(result).is_dir() and TOKEN not in result.stderr + result.stdout


def test_a_model_that_the_hub_does_not_have_is_named(hub, tmp_path):
    error = error_of(fetch(hub, tmp_path / "cache", "--model", "org/nowhere@v7"), 3, "model_not_found")
    assert "org/nowhere@v7" in error["message"] and "--model" in error["remedy"]


def test_a_repository_of_something_else_is_told(hub, tmp_path):
    hub.repositories["org/text"] = {"config.json": b"{}", "model.safetensors": b"x"}
    error = error_of(fetch(hub, tmp_path / "cache", "--model", "org/text"), 3, "unsupported_model")
    assert "model_index.json" in error["message"]
    hub.repositories["org/net"] = {"config.json": b"{}", "diffusion_pytorch_model.bin": b"x"}
    error = error_of(fetch(hub, tmp_path / "cache", "--model", tmp_path, "--controlnet", "a=org/net"), 3, "weights_missing")
    assert "pickle" in error["message"]


def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(hub, model, tmp_path):
    hub.busy = 2
    started = time.monotonic()
    assert snapshot(fetch(hub, tmp_path / "cache", "--model", model)).is_dir()
    assert hub.busy == 0 and time.monotonic() - started >= 0.5


def test_a_hub_that_is_not_there_is_an_error_of_the_network(hub, model, tmp_path):
    error = error_of(fetch(hub, tmp_path / "cache", "--model", model, HF_ENDPOINT="http://127.0.0.1:1"), 3, "hub_unreachable")
    assert "org/tiny" in error["message"] and "HF_ENDPOINT" in error["remedy"]


def test_a_disk_without_room_is_told_before_anything_comes(hub, model, tmp_path):
    hub.claims["unet/diffusion_pytorch_model.safetensors"] = 10**16
    error = error_of(fetch(hub, tmp_path / "cache", "--model", model), 3, "disk_full")
    assert "GB" in error["message"] and "HF_HUB_CACHE" in error["remedy"]
    assert hub.fetched() == []


def test_a_cache_that_cannot_be_written_is_told(hub, model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    error = error_of(fetch(hub, tmp_path / "cache", "--model", model), 3, "model_cache")
    assert "HF_HUB_CACHE" in error["remedy"]


# --- Two workers, and none that is online -----------------------------------------------------------------------------


def test_two_workers_fetch_a_file_once(hub, big, tmp_path):
    cache = tmp_path / "cache"
    hub.delay = 0.3
    command = [str(part) for part in (PROGRAM, "fetch", "--vae", big, "--model", tmp_path)]
    both = [
        subprocess.Popen(command, env=environment(**at(hub, cache)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(hub.fetched()) == 3 and said[0][0] == said[1][0]
    assert files_of(Path(said[0][0].splitlines()[-1])) == hub.repositories[big]
    assert any("another worker" in errors for _, errors in said)


def test_offline_a_model_of_the_cache_works_and_another_says_where_it_was_looked_for(hub, model, tmp_path):
    cache = tmp_path / "cache"
    offline = error_of(fetch(hub, cache, "--model", model, HF_HUB_OFFLINE=1), 3, "offline")
    assert str(cache) in offline["message"] and "huggingface-cache" in offline["message"] and hub.requests == []
    folder = snapshot(fetch(hub, cache, "--model", model))
    hub.requests.clear()
    assert snapshot(fetch(hub, cache, "--model", model, HF_HUB_OFFLINE=1)) == folder and hub.requests == []


def test_a_model_that_lacks_a_file_is_not_taken_from_the_cache(hub, model, tmp_path):
    cache = tmp_path / "cache"
    folder = snapshot(fetch(hub, cache, "--model", model))
    (folder / "text_encoder" / "model.safetensors").unlink()
    error_of(fetch(hub, cache, "--model", model, HF_HUB_OFFLINE=1), 3, "offline")
    hub.requests.clear()
    assert (snapshot(fetch(hub, cache, "--model", model)) / "text_encoder" / "model.safetensors").exists()
    assert hub.fetched() == []  # its content was still there


def test_runpod_s_cache_comes_before_all_others(hub, model, test_models, tmp_path):
    volume = tmp_path / "volume"
    (volume / "huggingface-cache").mkdir(parents=True)
    snapshot(fetch(hub, volume / "huggingface-cache" / "hub", "--model", model))
    (volume / "huggingface-cache" / "hub" / "models--org--tiny" / "refs" / "main").unlink()
    hub.requests.clear()
    variables = at(hub, tmp_path / "cache", NETWORK_VOLUME=volume)
    with serving("--model", model, "--graphs", test_models["graphs"], **variables) as (address, logged):
        import urllib.request

        def metrics() -> str:
            with urllib.request.urlopen(f"{address}/metrics") as response:
                return response.read().decode()

        deadline = time.monotonic() + 60
        while "sdxl_worker_models" not in metrics() or 'source="' not in metrics():
            assert time.monotonic() < deadline, logged
            time.sleep(0.1)
        assert 'sdxl_worker_models{source="runpod-cache"} 1' in metrics()
    assert hub.requests == []


def test_downloads_go_onto_the_volume_where_no_cache_is_named(hub, model, tmp_path):
    (tmp_path / "volume").mkdir()
    variables = {"HF_ENDPOINT": hub.address, "NETWORK_VOLUME": tmp_path / "volume", "HOME": tmp_path}
    folder = snapshot(run("fetch", "--model", model, cwd=tmp_path, variables=variables))
    assert folder.is_relative_to(tmp_path / "volume" / "sdxl-worker" / "hub")
    again = run("fetch", "--model", model, cwd=tmp_path, variables=variables | {"HF_HUB_OFFLINE": 1})
    assert snapshot(again) == folder and "volume" in again.stderr


def test_the_doctor_says_that_a_model_is_not_here_yet(hub, model, test_models, tmp_path):
    result = run("doctor", "--model", model, "--graphs", test_models["graphs"], cwd=tmp_path, variables=at(hub, tmp_path / "cache"))
    assert error_of_doctor(result) == "model_not_here" and hub.requests == []
    snapshot(fetch(hub, tmp_path / "cache", "--model", model))
    result = run("doctor", "--model", model, "--graphs", test_models["graphs"], cwd=tmp_path, variables=at(hub, tmp_path / "cache"))
    assert result.returncode == 0, result.stdout


def error_of_doctor(result: subprocess.CompletedProcess) -> str:
    return json.loads(result.stderr.splitlines()[-1])["code"]
