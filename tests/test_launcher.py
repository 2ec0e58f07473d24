"""The launcher on machines without libtorch, and on ones where it has to look for it.

The two programs are copied into an empty folder and started with an empty environment. Where only the launcher is
asked about, a script that prints how it was started stands in for the engine.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RELEASE = ROOT / "target" / "release"
TORCH = (ROOT / ".libtorch").resolve()

STUB = """#!/bin/sh
# Like a program whose libraries are missing, unless the loader was told where they are.
[ -n "$LD_LIBRARY_PATH$DYLD_LIBRARY_PATH" ] || { echo "error while loading shared libraries: libtorch.so" >&2; exit 127; }
echo "pid $$"
echo "libtorch $SDXL_WORKER_LIBTORCH"
echo "path $LD_LIBRARY_PATH$DYLD_LIBRARY_PATH"
for argument in "$@"; do echo "argument $argument"; done
exit 7
"""


class Machine:
    """A folder with the programs in `bin`, an empty home, and a PATH on which there is no Python."""

    def __init__(self, root: Path):
        self.root, self.bin, self.work = root, root / "project" / "bin", root / "work"
        self.program = self.bin / "sdxl-worker"
        for folder in (self.bin, self.work, root / "home", root / "tools"):
            folder.mkdir(parents=True)
        self.program.write_bytes((RELEASE / "sdxl-worker").read_bytes())
        self.program.chmod(0o755)

    def engine(self, content: bytes) -> None:
        engine = self.bin / "sdxl-worker-engine"
        engine.write_bytes(content)
        engine.chmod(0o755)

    def real_engine(self) -> None:
        """The engine as on another machine: the folder it was linked in, which it remembers, is not there."""
        content = (RELEASE / "sdxl-worker-engine").read_bytes()
        given = Path(os.environ.get("LIBTORCH", TORCH))
        for folder in {str(torch / "lib") for torch in (ROOT / ".libtorch", TORCH, given)}:
            content = content.replace(folder.encode(), b"/" + b"x" * (len(folder.encode()) - 1))
        self.engine(content)

    def run(self, *arguments: str, cwd: Path | None = None, **variables: object) -> subprocess.CompletedProcess:
        environment = {"PATH": str(self.root / "tools"), "HOME": str(self.root / "home")}
        environment |= {name: str(value) for name, value in variables.items()}
        return subprocess.run(
            [str(self.program), *arguments],
            cwd=cwd or self.work, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )


def install(folder: Path, version: str = "2.11.0+cpu") -> Path:
    """What the launcher takes for a libtorch. Returns its lib folder."""
    (folder / "lib").mkdir(parents=True)
    for name in ("libtorch.so", "libtorch.dylib"):
        (folder / "lib" / name).touch()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder / "lib"


def error_of(result: subprocess.CompletedProcess) -> dict:
    return json.loads(result.stderr.strip().splitlines()[-1])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for place in ("/usr/local/libtorch", "/opt/libtorch"):
        if Path(place).exists():
            pytest.skip(f"this machine has {place}")
    machine = Machine(tmp_path)
    machine.engine(STUB.encode())
    return machine


# --- No libtorch at all -----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(machine: Machine) -> Machine:
    machine.real_engine()
    return machine


def test_the_engine_itself_cannot_start_there_so_the_case_is_real(bare: Machine):
    program, bare.program = bare.program, bare.bin / "sdxl-worker-engine"
    assert bare.run("--version").returncode == 127
    bare.program = program


@pytest.mark.parametrize("option", ["--help", "--version", "-h"])
def test_help_and_version_answer_without_libtorch(bare: Machine, option: str):
    result = bare.run(option)
    assert result.returncode == 0, result.stderr
    assert "sdxl-worker" in result.stdout
    assert result.stderr == ""


def test_help_of_a_command_answers_without_libtorch(bare: Machine):
    result = bare.run("generate", "--help")
    assert result.returncode == 0
    assert "--save-latents" in result.stdout and "Examples:" in result.stdout


def test_doctor_says_what_is_missing_and_what_to_do(bare: Machine):
    result = bare.run("doctor")
    assert result.returncode == 3
    for words in ("libtorch  FAILED", "model     FAILED", "graphs    FAILED", "To do:", "pip install torch==2.11.0"):
        assert words in result.stdout, words


@pytest.mark.parametrize("arguments", [["generate", "--prompt", "a fox"], []])
def test_a_command_that_needs_libtorch_names_where_it_looked_and_the_remedy(bare: Machine, arguments: list[str]):
    result = bare.run(*arguments)
    assert result.returncode == 3
    assert result.stdout == ""
    error = error_of(result)
    assert error["code"] == error["error_type"] == "libtorch_not_found"
    assert "VIRTUAL_ENV" in error["message"] and "LIBTORCH" in error["remedy"]
    assert result.stderr.startswith("error: libtorch 2.11 was not found")
    assert list(bare.work.iterdir()) == []


def test_mistakes_on_the_command_line_are_told_without_libtorch(bare: Machine):
    result = bare.run("generat")
    assert result.returncode == 2
    assert "similar" in result.stderr
    assert error_of(result)["code"] == "usage"


# --- The real engine, found -------------------------------------------------------------------------------------------


def test_the_real_engine_runs_from_any_folder_with_libtorch(bare: Machine):
    result = bare.run("generate", "--input", "/nonexistent/request.json", LIBTORCH=TORCH)
    assert "loading shared libraries" not in result.stderr
    assert error_of(result)["code"] != "libtorch_not_found"
    assert result.returncode == 2, result.stderr


def test_the_real_engine_runs_from_the_projects_link(bare: Machine):
    (bare.root / "project" / ".libtorch").symlink_to(TORCH)
    result = bare.run("generate", "--input", "/nonexistent/request.json", cwd=Path("/"))
    assert result.returncode == 2, result.stderr


def test_the_launcher_itself_is_linked_against_nothing_of_torch():
    result = subprocess.run(["ldd", str(RELEASE / "sdxl-worker")], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("no ldd here")
    libraries = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]  # the addresses are any digits
    assert "libc.so.6" in libraries
    assert not [name for name in libraries if "torch" in name or "c10" in name]


# --- Where libtorch is looked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anywhere/torch", "anywhere/torch/lib"])
def test_libtorch_names_the_package_or_its_lib_folder(machine: Machine, name: str):
    lib = install(machine.root / "anywhere" / "torch")
    result = machine.run("doctor", LIBTORCH=machine.root / name)
    assert f"libtorch {lib}\n" in machine.run("generate", LIBTORCH=machine.root / name).stdout
    assert f"2.11.0+cpu {lib}" in result.stdout  # doctor reports that the engine, here the stub, does not start


@pytest.mark.parametrize("place", ["bin/libtorch", ".libtorch", ".venv/lib/python3.12/site-packages/torch"])
def test_libtorch_is_found_beside_and_above_the_program(machine: Machine, place: str):
    lib = install(machine.root / "project" / place)
    assert f"libtorch {lib}\n" in machine.run("generate", cwd=Path("/")).stdout


@pytest.mark.parametrize("place", [".libtorch", ".venv/lib/python3.11/site-packages/torch"])
def test_libtorch_is_found_in_the_working_folder(machine: Machine, place: str):
    lib = install(machine.work / place)
    assert f"libtorch {lib}\n" in machine.run("generate").stdout


def test_libtorch_is_found_through_a_link_to_the_program(machine: Machine):
    lib = install(machine.root / "project" / ".libtorch")
    link = machine.root / "tools" / "sdxl"
    link.symlink_to(machine.program)
    machine.program = link
    assert f"libtorch {lib}\n" in machine.run("generate").stdout


def test_libtorch_is_found_in_an_active_virtual_environment(machine: Machine):
    lib = install(machine.root / "venv" / "lib" / "python3.13" / "site-packages" / "torch")
    assert f"libtorch {lib}\n" in machine.run("generate", VIRTUAL_ENV=machine.root / "venv").stdout


def test_libtorch_is_found_through_the_python_on_path(machine: Machine):
    lib = install(machine.root / "packages" / "torch")
    python = machine.root / "tools" / "python3"
    real = (ROOT / ".venv" / "bin" / "python").resolve()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={machine.root}/packages exec "{real}" -S "$@"\n')
    python.chmod(0o755)
    (machine.work / "torch").mkdir()  # somebody's data, no package
    assert f"libtorch {lib}\n" in machine.run("generate").stdout


def test_a_libtorch_that_is_set_wrongly_is_an_error_though_there_is_another(machine: Machine):
    install(machine.root / "project" / ".libtorch")
    result = machine.run("generate", LIBTORCH="/nonexistent")
    assert result.returncode == 3
    assert error_of(result)["code"] == "libtorch_not_found"
    assert "/nonexistent" in error_of(result)["message"]


def test_another_version_is_refused_by_name_unless_it_is_bypassed(machine: Machine):
    folder = machine.root / "old"
    lib = install(folder, "2.5.1+cu121")
    result = machine.run("generate", LIBTORCH=folder)
    assert result.returncode == 3
    error = error_of(result)
    assert error["code"] == "libtorch_version"
    assert "2.11" in error["message"] and "2.5.1+cu121" in error["message"]
    bypassed = machine.run("generate", LIBTORCH=folder, LIBTORCH_BYPASS_VERSION_CHECK=1)
    assert f"libtorch {lib}\n" in bypassed.stdout


def test_a_libtorch_that_the_loader_knows_is_used(machine: Machine):
    lib = install(machine.root / "system")
    result = machine.run("generate", LD_LIBRARY_PATH=lib, DYLD_LIBRARY_PATH=lib)
    assert result.returncode == 7, result.stderr


# --- Becoming the engine ----------------------------------------------------------------------------------------------


def test_arguments_exit_status_and_process_are_the_engines(machine: Machine):
    lib = install(machine.root / "project" / ".libtorch")
    arguments = ["generate", "--prompt", "two  spaces, \"quotes\" and ünïcode", "--seed", "-1", "--set", "clip_skip=1"]
    process = subprocess.Popen(
        [str(machine.program), *arguments],
        env={"PATH": "", "LD_LIBRARY_PATH": "/before"}, cwd=machine.work, stdout=subprocess.PIPE, text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    lines = output.splitlines()
    assert lines[0] == f"pid {process.pid}"
    assert lines[1] == f"libtorch {lib}"
    assert lines[2].startswith(f"path {lib}")
    assert [line.removeprefix("argument ") for line in lines[3:]] == arguments
    if os.uname().sysname == "Linux":
        assert lines[2] == f"path {lib}:/before"


def test_a_missing_engine_is_named(machine: Machine):
    install(machine.root / "project" / ".libtorch")
    (machine.bin / "sdxl-worker-engine").unlink()
    result = machine.run("generate")
    assert result.returncode == 3
    assert error_of(result)["code"] == "engine_not_found"
    assert "sdxl-worker-engine" in error_of(result)["message"]
    doctor = machine.run("doctor")
    assert doctor.returncode == 3
    assert "engine    FAILED" in doctor.stdout and "libtorch  ok" in doctor.stdout


def test_doctor_repeats_the_loaders_words_when_libtorch_is_incomplete(machine: Machine):
    install(machine.root / "project" / ".libtorch")
    machine.engine(b"#!/bin/sh\necho 'error while loading shared libraries: libcudnn.so.9' >&2\nexit 127\n")
    result = machine.run("doctor")
    assert result.returncode == 3
    assert "libcudnn.so.9" in result.stdout and "To do:" in result.stdout


# --- Options from the environment, as the launcher's doctor shows them -------------------------------------------------


def test_variables_stand_for_options_and_options_win(machine: Machine):
    assert "/variable does not exist" in machine.run("doctor", MODEL_ID="/variable").stdout
    for arguments in (["doctor", "--model", "/typed"], ["--sdxl_model_path", "/typed", "doctor"]):
        assert "/typed does not exist" in machine.run(*arguments, MODEL_ID="/variable").stdout


def test_an_empty_variable_is_no_variable(machine: Machine):
    result = machine.run("doctor", MODEL_ID="", DEVICE="", MAX_PIXELS="", RUNPOD_LOG_LEVEL="", LIBTORCH="")
    assert result.returncode == 3
    assert "models/demo is not here" in result.stdout


def test_a_wrong_variable_is_a_usage_error(machine: Machine):
    result = machine.run("doctor", DEVICE="toaster")
    assert result.returncode == 2
    assert "toaster" in error_of(result)["message"]
