"""What the tests of the command line share: starting the program, judging how it failed, and files of a model that are
read and changed without the libraries that normally write them."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "target" / "release" / "sdxl-worker"
DEMO = ROOT / "models" / "demo"
GRAPHS = ROOT / "graphs"
TEST_MODELS = ROOT / "target" / "test-models"

# What a person should never have to read: the words of an interpreter, of a panic, of a C++ stack.
NOISE = re.compile(r"Traceback|panicked|RUST_BACKTRACE|frame #\d|c10::|at::|torch::|std::|<unknown function>|\\n")

# The cheapest request there is.
SMALL = ("--steps", "1", "--width", "64", "--height", "64")


def environment(**variables: object) -> dict[str, str]:
    """Only what a start needs, so that no variable of the machine that tests stands for an option. One thread, since
    threads that wait for each other on a busy machine take ten times as long."""
    kept = ("PATH", "HOME", "LIBTORCH", "LIBTORCH_BYPASS_VERSION_CHECK", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    own = {name: os.environ[name] for name in kept if name in os.environ}
    return own | {"DEVICE": "cpu", "THREADS": "1"} | {name: str(value) for name, value in variables.items()}


def run(*arguments: object, cwd: Path, stdin: str = "", variables: dict | None = None, **options):
    """Starts the program as a shell would. stdin ends at once, so that a program that waits for it does not hang."""
    return subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        cwd=cwd, env=environment(**(variables or {})), input=stdin, capture_output=True, text=True, timeout=120,
        **options,
    )


@contextmanager
def serving(*options: object, **variables: object) -> Iterator[tuple[str, list[str]]]:
    """A worker's address, and the lines that it logs."""
    process = subprocess.Popen(
        [str(PROGRAM), "serve", "--port", "0", *map(str, options)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(**variables),
    )  # fmt: skip
    address = next(line for line in process.stderr if line.startswith("listening on")).split()[-1]
    logged: list[str] = []
    reader = threading.Thread(target=lambda: logged.extend(process.stderr))
    reader.start()
    try:
        yield address, logged
    finally:
        process.terminate()
        process.wait(timeout=30)
        reader.join()


def ask(address: str, fields: dict) -> dict:
    """The reply to a job."""
    body = json.dumps({"input": fields}).encode()
    request = urllib.request.Request(f"{address}/runsync?wait=60000", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=90) as response:
        return json.load(response)


def python(*arguments: object) -> None:
    """Runs one of the project's own scripts."""
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def pictures(result: subprocess.CompletedProcess, folder: Path) -> list[Path]:
    """The files that a successful `generate`, started in `folder`, says it wrote."""
    assert result.returncode == 0, result.stderr
    paths = [folder / line for line in result.stdout.splitlines()]
    assert paths and all(path.is_file() for path in paths), result.stdout
    return paths


def error_of(result: subprocess.CompletedProcess, status: int, code: str) -> dict:
    """The error of a run that failed as it should: one JSON object, the last line of stderr, after words for a person.

    Every error says what is wrong and what to do, in words that are neither ours nor libtorch's insides.
    """
    assert result.returncode == status, f"{result.returncode}: {result.stdout}{result.stderr}"
    *words, last = result.stderr.strip().splitlines()
    error = json.loads(last)
    assert error["code"] == error["error_type"] == code, result.stderr
    assert error["message"] == error["error_message"]
    assert {"field", "remedy", "error_traceback", "hostname", "worker_id", "runpod_version"} <= error.keys()
    noise = NOISE.search("\n".join([*words, *filter(None, (error["message"], error["remedy"]))]))
    assert not noise and not NOISE.search(error["error_traceback"]), result.stderr[:2000]
    assert any(line.startswith("error: ") and error["message"].splitlines()[0] in line for line in words)
    assert [line.strip() for line in words if line.strip().startswith("code: ")] == [f"code: {code}"]
    assert len(error["message"]) < 4000
    assert error["remedy"], f"no word on what to do about: {error['message']}"
    assert result.stdout == ""
    return error


def whole_text(error: dict) -> str:
    """Everything that the error says, for tests to look for words in."""
    return "\n".join(filter(None, (error["message"], error["error_traceback"], error["remedy"])))


def files_in(folder: Path) -> list[str]:
    """Every file below, hidden and temporary ones too. A folder that is not there holds none."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# --- Models and their files -------------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_safetensors(path: Path) -> tuple[dict, bytes]:
    """The header's entries and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, content[8 + length :]


def write_safetensors(path: Path, header: dict, data: bytes, padding: int = 0) -> None:
    """`padding` spaces behind the header move the data by as many bytes."""
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def take(header: dict, data: bytes, names: list[str]) -> tuple[dict, bytes]:
    """A file with these tensors alone."""
    taken, parts, start = {}, [], 0
    for name in names:
        begin, end = header[name]["data_offsets"]
        taken[name] = header[name] | {"data_offsets": [start, start + end - begin]}
        parts.append(data[begin:end])
        start += end - begin
    return taken, b"".join(parts)
