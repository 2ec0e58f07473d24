"""Adapters from the Hub and from addresses: tokens, broken connections, sizes and the cache, before a host of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from test_inputs import ask, image_of, serving
from test_lora_jobs import lora

PADDING = 400_000  # so that half a file is more than what waits in buffers
TOKENS = {"HF_TOKEN": "hf-secret-of-the-tests", "CIVITAI_TOKEN": "civitai-secret-of-the-tests"}


class Host:
    """Serves one LoRA under several paths and remembers every request."""

    def __init__(self, body: bytes) -> None:
        self.body, self.requests, self.cdn = body, [], ""
        self.breaks = 0  # connections that end in the middle
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.requests.append((self.path, dict(self.headers)))
                if self.path.startswith("/api/models/org/one/"):
                    files = [{"rfilename": name} for name in ("README.md", "style.safetensors")]
                    self.answer(200, json.dumps({"siblings": files}).encode())
                elif self.path.startswith("/org/") and host.cdn:
                    self.answer(302, b"", Location=f"{host.cdn}/cdn/style.safetensors")
                elif self.path.endswith("/gone.safetensors"):
                    self.answer(404, b"")
                else:
                    self.file()

            def file(self) -> None:
                if self.headers.get("If-None-Match") == '"v1"':
                    return self.answer(304, b"", ETag='"v1"')
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                rest = host.body[start:]
                self.send_response(206 if start else 200)
                self.send_header("ETag", '"v1"')
                self.send_header("Content-Length", str(len(rest)))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(host.body) - 1}/{len(host.body)}")
                self.end_headers()
                if host.breaks:
                    host.breaks -= 1
                    self.wfile.write(rest[: len(rest) // 2])
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True
                else:
                    self.wfile.write(rest)

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

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def secrets(self) -> list[str]:
        """Paths whose requests carried a token."""
        return [path for path, headers in self.requests if any(token in str(headers) for token in TOKENS.values())]


@pytest.fixture
def host(tmp_path) -> Iterator[Host]:
    host = Host(lora(tmp_path, "style", 7, padding=PADDING).read_bytes())
    yield host
    host.server.shutdown()


@pytest.fixture
def worker_at(host, test_models, tmp_path):
    """Starts workers that take that host for the Hub; each with the same cache."""

    def start(*options: object):
        variables = TOKENS | {"HF_ENDPOINT": host.address, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS": "1"}
        return serving(test_models, "--adapter-cache", tmp_path / "cache", *options, **variables)

    return start


def error_of_job(answer: dict) -> tuple[str, str]:
    assert answer["status"] == "FAILED", answer
    error = json.loads(answer["error"]) if isinstance(answer["error"], str) else answer["error"]
    return error["code"], error["field"]


def test_the_hub_s_token_goes_to_the_hub_alone_and_a_file_is_fetched_once(host, worker_at):
    cdn = Host(host.body)
    host.cdn = cdn.address
    fields = {"loras": [{"path": "org/one/style.safetensors"}]}
    with worker_at() as (address, logged):
        picture = image_of(ask(address, fields))
        assert host.paths() == ["/org/one/resolve/main/style.safetensors"] and cdn.paths() == ["/cdn/style.safetensors"]
        assert host.secrets() == host.paths() and cdn.secrets() == []
        image_of(ask(address, fields))
        assert len(host.requests) == len(cdn.requests) == 1
    with worker_at() as (address, again):  # another process, the same volume
        assert (image_of(ask(address, fields)) == picture).all()
    assert len(cdn.requests) == 1
    assert not any(token in line for line in logged + again for token in TOKENS.values())


def test_the_only_file_of_a_repository_is_found(host, worker_at):
    with worker_at() as (address, _):
        answer = ask(address, {"loras": [{"path": "org/one@v2"}]})
        image_of(answer)
    assert host.paths() == ["/api/models/org/one/revision/v2", "/org/one/resolve/v2/style.safetensors"]
    assert answer["output"]["loras"][0]["matched"] == 6


def test_a_download_goes_on_where_it_broke_off(host, worker_at):
    elsewhere = Host(host.body)
    elsewhere.breaks = 2
    with worker_at() as (address, _):
        image_of(ask(address, {"loras": [{"url": f"{elsewhere.address}/files/style.safetensors"}]}))
    starts = [headers.get("range", "bytes=0-") for _, headers in elsewhere.requests]
    half = len(host.body) // 2
    assert starts == ["bytes=0-", f"bytes={half}-", f"bytes={half + (len(host.body) - half) // 2}-"]
    assert elsewhere.secrets() == []


def test_what_is_too_large_missing_or_damaged_is_told(host, worker_at, tmp_path):
    with worker_at("--max-lora-bytes", "300K") as (address, _):
        url = {"url": f"{host.address}/files/style.safetensors"}
        assert error_of_job(ask(address, {"loras": [url]})) == ("download_too_large", "loras[0].url")
        gone = {"path": "org/one/gone.safetensors"}
        assert error_of_job(ask(address, {"loras": [gone]})) == ("lora_not_found", "loras[0].path")
        host.body = b"<html>please log in</html>"
        assert error_of_job(ask(address, {"loras": [url]})) == ("lora_damaged", "loras[0].url")
        image_of(ask(address, {}))


def test_the_cache_makes_room(host, worker_at, tmp_path):
    with worker_at("--lora-cache", "600K") as (address, _):
        for seed in range(3):
            host.body = lora(tmp_path, "style", 20 + seed, padding=PADDING).read_bytes()
            image_of(ask(address, {"loras": [{"url": f"{host.address}/{seed}/style.safetensors"}]}))
    kept = list((tmp_path / "cache" / "files").iterdir())
    assert len(kept) == 1 and sum(path.stat().st_size for path in kept) < 600 << 10
    assert list((tmp_path / "cache" / "parts").glob("*.part")) == []


def test_a_textual_inversion_comes_from_the_hub_too(host, worker_at, tmp_path):
    from test_prompt_jobs import inversion

    host.body = Path(inversion(tmp_path)["path"]).read_bytes()
    fields = {"prompt": "a fox in <ink>"}
    with worker_at() as (address, _):
        plain = image_of(ask(address, fields))
        inked = image_of(ask(address, fields | {"textual_inversions": [{"path": "org/ink/ink.safetensors", "token": "<ink>"}]}))
    assert not (plain == inked).all()
