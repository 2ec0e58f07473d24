"""The images, without Docker: the Dockerfile is linted, what the programs link is looked at, and the Dockerfile's
scripts run in a clean root until the worker there makes the picture of test_input.json.

The clean root is a Debian with nothing but its essential packages. CUDA's base images have no more that matters here;
the libtorch is this machine's. With --full the programs are compiled in there, and all graphs exported.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from PIL import Image

from program import GRAPHS, PROGRAM, ROOT

IN_ROOT = ROOT / "tests/ship/in_root.sh"
TORCH = (ROOT / ".libtorch").resolve()
BIN = ROOT / ".venv/bin"
DOCKERFILE = (ROOT / "Dockerfile").read_text()

# What the programs may link: libtorch, which in turn links CUDA, and what every Linux has. So one binary runs with the
# libtorch of any CUDA.
SYSTEM = "ld-linux-x86-64|libc|libm|libgcc_s|libstdc\\+\\+|libdl|libpthread|librt"
LINKED = re.compile(rf"(libtorch|libc10)\w*\.so|({SYSTEM})\.so\.\d")


def call(*command: object, **options) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_dockerfile_is_well_written():
    assert call(BIN / "hadolint", "Dockerfile") == ""


def test_the_scripts_are_well_written():
    scripts = [*ROOT.glob("docker/*.sh"), *ROOT.glob(".ci/*.sh"), ROOT / ".ci/run", IN_ROOT]
    assert call(BIN / "shellcheck", *scripts) == ""


def test_each_image_builds_on_its_own_base_and_starts_the_worker():
    stages = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.MULTILINE)}
    assert list(stages)[-1] == "slim", "RunPod builds the last one"
    for target in ("ngc", "slim"):
        assert stages[target] == stages[f"{target}-build"]
        final = DOCKERFILE.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert 'CMD ["/app/start.sh"]' in final and "USER" not in final
    for script in re.findall(r"docker/\w+\.sh", DOCKERFILE):
        assert os.access(ROOT / script, os.X_OK), script


@pytest.mark.parametrize("program", [PROGRAM, PROGRAM.with_name("sdxl-worker-engine")], ids=lambda path: path.name)
def test_the_programs_link_libtorch_and_the_system_alone(worker, program):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", call("readelf", "-d", program))
    assert needed and [name for name in needed if not LINKED.fullmatch(name)] == []
    assert any("torch" in name for name in needed) == (program != PROGRAM)


# --- In a clean root --------------------------------------------------------------------------------------------------


def unpacked_base(folder: Path) -> Path:
    """A new root of Debian's essential packages. They are fetched once for this checkout."""
    if os.geteuid() != 0:
        pytest.skip("a root to change into needs root")
    if not shutil.which("debootstrap"):
        pytest.skip("needs debootstrap (apt-get install debootstrap)")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("namespaces cannot be made here")
    kept = ROOT / "target/ship/debian.tar"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            command = ["debootstrap", "--variant=minbase", "bookworm", str(folder / "made")]
            if subprocess.run(command, capture_output=True).returncode:
                pytest.skip("debootstrap cannot reach a mirror of Debian")
            call("tar", "--one-file-system", "-C", folder / "made", "-cf", kept.with_suffix(".part"), ".")
            kept.with_suffix(".part").rename(kept)
            shutil.rmtree(folder / "made")
    root = folder / "root"
    root.mkdir()
    call("tar", "-C", root, "-xpf", kept)
    return root


class Root:
    """A root with the image's /app."""

    def __init__(self, path: Path):
        self.path = path

    def command(self, *command: str, **variables: str) -> list[str]:
        given = {"DEVICE": "cpu", "THREADS": "1"} | variables
        return [str(IN_ROOT), str(self.path), "--", *(f"{name}={value}" for name, value in given.items()), *command]

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*command, **variables), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def root(worker, is_full, tmp_path_factory) -> Root:
    folder = tmp_path_factory.mktemp("image")
    path = unpacked_base(folder)
    app = path / "app"
    # as the last stage of the Dockerfile
    shutil.copy(ROOT / "docker/system.sh", path / "tmp")
    call(IN_ROOT, path, "--", "/tmp/system.sh", "run")
    call(ROOT / "docker/libtorch.sh", TORCH, app / "libtorch")
    if is_full:
        built = unpacked_base(tmp_path_factory.mktemp("build"))
        build(built)
        shutil.copytree(built / "app", app, dirs_exist_ok=True)
    else:
        shutil.copytree(GRAPHS, app / "graphs")
        call(ROOT / "docker/app.sh", app)
    yield Root(path)
    shutil.rmtree(folder)


def build(root: Path) -> None:
    """As the build stage, with Debian's Python and this machine's Rust; the Dockerfile's is from an image."""
    home = Path.home()
    tools = {home / ".cargo": "/usr/local/cargo", home / ".rustup": "/usr/local/rustup"}
    binds = [f"{source}:{target}" for source, target in tools.items() if source.is_dir()]
    variables = ["CARGO_HOME=/usr/local/cargo", "RUSTUP_HOME=/usr/local/rustup"]
    variables += ["PATH=/usr/local/cargo/bin:/usr/local/bin:/usr/bin:/bin"]
    # a machine behind a proxy trusts more than Debian does
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if bundle.exists():
        shutil.copy(bundle, root / "etc/trusted.crt")
        variables += [f"{name}=/etc/trusted.crt" for name in ("SSL_CERT_FILE", "PIP_CERT", "CARGO_HTTP_CAINFO")]
    tracked = call("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), tracked):
        (root / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / "src" / name)
    steps = [
        ["/src/docker/system.sh", "build"],
        ["/src/docker/torch.sh", "13.0"],  # no index: the one torch that pip has by itself
        ["/src/docker/build.sh", "/app"],
    ]
    for step in steps:
        call(IN_ROOT, root, *binds, "--", *variables, *step)


def check_picture(reply: dict) -> None:
    data = base64.b64decode(reply["images"][0].split(",", 1)[1])
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (128, 128) and len(picture.getcolors(128 * 128)) > 100


def test_without_arguments_the_image_makes_the_picture_of_test_input(root):
    result = root.run("/app/start.sh")
    assert result.returncode == 0, result.stderr
    check_picture(json.loads(result.stdout))


def test_doctor_finds_the_image_complete(root):
    result = root.run("/app/sdxl-worker", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "/app/libtorch/lib" in result.stdout and "/app/models/demo" in result.stdout


@pytest.fixture
def local_api(root):
    """The process of `docker run -e SERVE_API_LOCALLY=true`, and its address."""
    port = 18000 + os.getpid() % 1000
    command = root.command("/app/start.sh", SERVE_API_LOCALLY="true", PORT=str(port))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("listening on"):
            break
    yield process, port
    process.kill()
    process.wait()


def test_serve_api_locally_serves_on_every_interface(root, local_api):
    _, port = local_api
    end = time.monotonic() + 60
    while root.run("/app/ready.sh", PORT=str(port)).returncode:
        assert time.monotonic() < end
        time.sleep(0.5)
    request = (ROOT / "test_input.json").read_bytes()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/runsync", request, timeout=120) as response:
        check_picture(json.load(response)["output"])
    listening = call("ss", "-ltn") if shutil.which("ss") else f"0.0.0.0:{port}"
    assert f"0.0.0.0:{port}" in listening


def test_as_first_process_of_a_container_it_ends_on_sigterm(local_api):
    process, _ = local_api
    (inner,) = psutil.Process(process.pid).children()
    inner.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_what_is_missing_in_libtorch_is_named(tmp_path):
    """A torch whose packages are not all there stops the build, not the worker."""
    torch = tmp_path / "site-packages/torch"
    shutil.copytree(TORCH / "lib", torch / "lib", copy_function=os.symlink, ignore=shutil.ignore_patterns("*python*"))
    script = [ROOT / "docker/libtorch.sh", torch, tmp_path / "out"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 1 and "libtorch needs libcupti.so" in result.stderr
