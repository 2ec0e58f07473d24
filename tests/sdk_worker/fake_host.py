"""A host that speaks RunPod's worker protocol on loopback: gives jobs from a list, records every call."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

HOLD = 0.3  # seconds that a take without a job is held


class FakeHost:
    def __init__(self, jobs: list[dict[str, Any]]) -> None:
        self.jobs = list(jobs)
        self.calls: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                route = host.record(self, "")
                job = host.next_job() if route == "job-take" else None
                if job is None:
                    time.sleep(HOLD if route != "ping" else 0)
                    return self.answer(204 if route != "ping" else 200, b"")
                self.answer(200, json.dumps(job).encode())

            def do_POST(self) -> None:
                host.record(self, self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.answer(200, b"{}")

            def answer(self, status: int, body: bytes) -> None:
                try:
                    self.write(status, body)
                except ConnectionError:
                    pass  # the worker has ended

            def write(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/v2/mock-endpoint"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def record(self, request: BaseHTTPRequestHandler, body: str) -> str:
        url = urlsplit(request.path)
        route = url.path.split("/")[3]
        call = {
            "method": request.command,
            "route": route,
            "path": url.path,
            "query": parse_qsl(url.query, keep_blank_values=True),
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": body,
        }
        with self.lock:
            self.calls.append(call)
        return route

    def next_job(self) -> dict[str, Any] | None:
        with self.lock:
            return self.jobs.pop(0) if self.jobs else None

    def results(self) -> dict[str, dict[str, Any]]:
        """The final posts, by job id."""
        with self.lock:
            posts = [call for call in self.calls if call["route"] == "job-done"]
        return {call["path"].split("/")[-1]: call for call in posts if json.loads(call["body"]).get("status") is None}

    def wait_for_results(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while len(self.results()) < count:
            assert time.monotonic() < end, f"{len(self.results())} of {count} results after {seconds} s"
            time.sleep(0.05)

    def variables(self) -> dict[str, str]:
        gpu = "gpu=NVIDIA+GeForce+RTX+4090"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.base}/job-take/$ID?{gpu}",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.base}/job-done/$RUNPOD_POD_ID/$ID?{gpu}",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.base}/job-stream/$RUNPOD_POD_ID/$ID?{gpu}",
            "RUNPOD_WEBHOOK_PING": f"{self.base}/ping/$RUNPOD_POD_ID?{gpu}",
            "RUNPOD_PING_INTERVAL": "2000",
            "RUNPOD_AI_API_KEY": "mock-api-key",
            "RUNPOD_POD_ID": "mockpod01",
            "RUNPOD_POD_HOSTNAME": "mockpod01-host",
            "RUNPOD_ENDPOINT_ID": "mock-endpoint",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "PYTHONUNBUFFERED": "1",
        }
