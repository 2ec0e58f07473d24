"""The listing in RunPod's Hub: its files have the fields that the Hub knows and name settings that the program has, and
its tests pass on the worker, asked as the Hub asks."""

import json
import os
import re
import signal
import subprocess

import jsonschema
import pytest

from fake_host import FakeHost
from program import DEMO, GRAPHS, PROGRAM, ROOT, run

HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())
INPUTS = {entry["key"]: entry["input"] for entry in HUB["config"]["env"]}

# Variables that are not in the listing, and why.
LEFT_OUT = {
    "PORT": "of the local API",
    "SERVE_API_KEY": "of the local API",
}


def closed(required: dict, optional: dict | None = None) -> dict:
    """An object with these fields and no others."""
    properties = required | (optional or {})
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def listed(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
POSITIVE = {"type": "integer", "minimum": 1}
VERSIONS = listed({"type": "string", "pattern": r"^\d+\.\d+$"})
SCALAR = {"type": ["string", "number", "boolean"]}
VALUE = closed({"key": TEXT, "value": {"type": "string"}})
INPUT = closed(
    {
        "name": TEXT,
        "type": {"enum": ["string", "number", "boolean", "huggingface"]},
        "description": TEXT,
        "default": SCALAR,
    },
    {
        "required": {"type": "boolean"},
        "advanced": {"type": "boolean"},
        "options": listed(closed({"label": TEXT, "value": {"type": "string"}})),
        "min": {"type": "number"},
        "max": {"type": "number"},
        "trueValue": TEXT,
        "falseValue": TEXT,
    },
)
HUB_SCHEMA = closed(
    {
        "title": TEXT,
        "description": TEXT,
        "type": {"const": "serverless"},
        "category": {"enum": ["audio", "embedding", "language", "video", "image"]},
        "config": closed(
            {
                "runsOn": {"const": "GPU"},
                "containerDiskInGb": POSITIVE,
                "gpuCount": POSITIVE,
                "gpuIds": {"type": "string", "pattern": "^[A-Z0-9_]+(,[A-Z0-9_]+|,-[A-Za-z0-9 ]+)*$"},
                "allowedCudaVersions": VERSIONS,
                "env": listed({"oneOf": [VALUE, closed({"key": TEXT, "input": INPUT})]}),
                "presets": listed(
                    closed({"name": TEXT, "defaults": {"type": "object", "additionalProperties": SCALAR}})
                ),
            }
        ),
    },
    {"iconUrl": {"type": "string", "format": "uri"}},
)
TESTS_SCHEMA = closed(
    {
        "tests": listed(closed({"name": TEXT, "input": {"type": "object"}}, {"timeout": POSITIVE})),
        "config": closed(
            {"gpuTypeId": TEXT, "gpuCount": POSITIVE},
            {"runsOn": {"enum": ["GPU", "CPU"]}, "env": listed(VALUE), "allowedCudaVersions": VERSIONS},
        ),
    }
)


def variables_of_help() -> dict[str, list[str]]:
    """The program's variables, and the values that each may have, where they are a few words."""
    text = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    found = {}
    for option in re.split(r"\n\s+(?=-)", text):
        option = " ".join(option.split())
        if variable := re.search(r"\[env: ([A-Z_]+)", option):
            values = re.search(r"\[possible values: (.*?)\]", option)
            found[variable[1]] = values[1].split(", ") if values else []
    return found


def as_text(key: str, value: object) -> str:
    """What the Hub puts into the environment for a value of the form."""
    if isinstance(value, bool):
        return INPUTS[key]["trueValue" if value else "falseValue"]
    return str(value)


def test_the_files_have_the_fields_that_the_hub_knows():
    jsonschema.validate(HUB, HUB_SCHEMA)
    jsonschema.validate(TESTS, TESTS_SCHEMA)
    assert len(INPUTS) == len(HUB["config"]["env"]), "a variable twice"
    for name in ("Dockerfile", "README.md", ".runpod/handler.py"):
        assert (ROOT / name).is_file()
    compile((ROOT / ".runpod/handler.py").read_text(), "handler.py", "exec")


def test_every_variable_is_one_that_the_program_reads(worker):
    known = variables_of_help()
    engine = PROGRAM.with_name("sdxl-worker-engine").read_bytes()
    unknown = [key for key in INPUTS if key not in known and key.encode() not in engine]
    assert not unknown
    assert known.keys() - INPUTS.keys() == LEFT_OUT.keys()


def test_every_variable_of_our_own_in_the_documentation_is_listed():
    text = (ROOT / "docs/runpod.md").read_text()
    own = text.split("## Our own")[1].split("\n## ")[0] + text.split("## Buckets")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in own.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    # which SDK this worker claims to be is the platform's matter
    assert len(named) > 40 and named - INPUTS.keys() - {"RUNPOD_VERSION_REPORTED"} == set()


@pytest.mark.parametrize("preset", [None, *HUB["config"]["presets"]], ids=lambda p: p["name"] if p else "defaults")
def test_values_are_of_their_kind(preset):
    values = preset["defaults"] if preset else {key: entry["default"] for key, entry in INPUTS.items()}
    for key, value in values.items():
        entry = INPUTS[key]
        if "options" in entry:
            assert value in [option["value"] for option in entry["options"]], key
        if entry["type"] == "number":
            assert entry.get("min", value) <= value <= entry.get("max", value), key
        assert isinstance(value, bool) == (entry["type"] == "boolean"), key
        assert entry["type"] != "boolean" or {"trueValue", "falseValue"} <= entry.keys(), key


def test_the_program_takes_every_default(worker, tmp_path):
    variables = {key: as_text(key, entry["default"]) for key, entry in INPUTS.items()}
    here = {"MODEL_ID": DEMO, "GRAPHS": GRAPHS, "DEVICE": "cpu", "DTYPE": "float32", "HOME": tmp_path}
    result = run("doctor", cwd=tmp_path, variables=variables | here)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_options_are_those_of_the_program(worker):
    known = variables_of_help()
    for key, entry in INPUTS.items():
        chosen = {option["value"] for option in entry.get("options", [])} - {""}
        assert not known.get(key) or chosen == set(known[key]) or entry["type"] == "boolean", key


def test_the_cuda_versions_are_those_that_run_the_default_image():
    image = re.search(r"^ARG CUDA=(\d+)\.(\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    least = tuple(map(int, image.groups()))
    for versions in (HUB["config"]["allowedCudaVersions"], TESTS["config"]["allowedCudaVersions"]):
        assert min(tuple(map(int, version.split("."))) for version in versions) == least


@pytest.fixture(scope="module")
def outcomes(worker, tmp_path_factory) -> dict[str, dict]:
    """The results of the listing's tests. The Hub gives no address for pings and streams."""
    folder = tmp_path_factory.mktemp("hub")
    host = FakeHost([{"id": str(number), "input": test["input"]} for number, test in enumerate(TESTS["tests"])])
    given = host.variables()
    kept = ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_AI_API_KEY", "RUNPOD_POD_ID")
    environment = {name: given[name].split("?")[0] for name in kept}
    environment |= {"PATH": os.environ["PATH"], "HOME": str(folder), "RUNPOD_LOG_LEVEL": "INFO", "DEVICE": "cpu"}
    environment |= {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "THREADS": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(["sh", "-c", str(PROGRAM)], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        host.wait_for_results(len(TESTS["tests"]), 120)
        # a worker that ends by itself fails the Hub's whole run
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    results = {job_id: json.loads(call["body"]) for job_id, call in host.results().items()}
    return {test["name"]: results[str(number)] for number, test in enumerate(TESTS["tests"])}


@pytest.mark.parametrize("test", TESTS["tests"], ids=lambda test: test["name"])
def test_the_listings_tests_pass(outcomes, test):
    outcome = outcomes[test["name"]]
    assert list(outcome) == ["output"], outcome
    assert len(outcome["output"]["images"]) == test["input"].get("num_images", 1)
