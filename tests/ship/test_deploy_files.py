"""The compose file, the Kubernetes manifests and the workflows: they fit their schemas, and what they name is there."""

import os
import re
import socket
import subprocess
import urllib.request
from pathlib import Path

import jsonschema
import pytest
import yaml

from program import GRAPHS, ROOT, serving
from test_listing import PROGRAM, TEXT, closed, listed, variables_of_help

BIN = ROOT / ".venv/bin"
COMPOSE = ROOT / "deploy/compose.yaml"
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

# Of KEDA's kinds what is used here; its own schemas are in its charts.
SPELLED = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = closed({"name": TEXT})
WHOLE = {"type": "integer", "minimum": 0}
TRIGGER = closed(
    {
        "type": {"const": "metrics-api"},
        "name": TEXT,
        "metadata": SPELLED | {"required": ["url", "valueLocation", "targetValue"]},
    },
    {"authenticationRef": closed({"name": TEXT})},
)
KEDA = {
    "TriggerAuthentication": closed(
        {"secretTargetRef": listed(closed({"parameter": TEXT, "name": TEXT, "key": TEXT}))}
    ),
    "ScaledObject": closed(
        {"scaleTargetRef": closed({"name": TEXT}), "triggers": listed(TRIGGER)},
        {
            "minReplicaCount": WHOLE,
            "maxReplicaCount": WHOLE,
            "pollingInterval": WHOLE,
            "advanced": closed(
                {},
                {
                    "scalingModifiers": closed({"formula": TEXT, "target": TEXT}),
                    "horizontalPodAutoscalerConfig": {"type": "object"},
                },
            ),
        },
    ),
}


def documents() -> list[dict]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict:
    (found,) = (document for document in documents() if document["kind"] == kind)
    return found


def check(*command: object) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_compose_file_fits_its_schema():
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflows_fit_their_schema(schema):
    assert WORKFLOWS
    check(BIN / "check-jsonschema", "--builtin-schema", schema, *WORKFLOWS)


def test_the_manifests_fit_the_schemas_of_kubernetes(tmp_path):
    core = [document for document in documents() if "keda.sh" not in document["apiVersion"]]
    assert {"Deployment", "Service", "Secret", "PersistentVolumeClaim", "Job"} == {item["kind"] for item in core}
    file = tmp_path / "core.yaml"
    file.write_text(yaml.safe_dump_all(core))
    check(BIN / "kubernetes-validate", "--strict", "--quiet", file)


@pytest.mark.parametrize("kind", KEDA)
def test_the_manifests_fit_the_schemas_of_keda(kind):
    document = of_kind(kind)
    version = {"const": "keda.sh/v1alpha1"}
    whole = closed({"apiVersion": version, "kind": TEXT, "metadata": METADATA, "spec": KEDA[kind]})
    jsonschema.validate(document, whole)


def test_the_names_that_manifests_share_agree():
    deployment, service, scaled = of_kind("Deployment"), of_kind("Service"), of_kind("ScaledObject")
    pod = deployment["spec"]["template"]
    assert pod["metadata"]["labels"] == service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["spec"]["advanced"]["scalingModifiers"]["formula"] == " + ".join(
        trigger["name"] for trigger in scaled["spec"]["triggers"]
    )
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    for trigger in scaled["spec"]["triggers"]:
        address = f"http://{service['metadata']['name']}.default.svc.cluster.local:{port['containerPort']}/metrics"
        assert trigger["metadata"]["url"] == address
    keys = of_kind("Secret")["stringData"].keys()
    fetch = of_kind("Job")["spec"]["template"]["spec"]["containers"][0]
    for entry in [*container["env"], *fetch["env"]]:
        if "valueFrom" in entry:
            assert entry["valueFrom"]["secretKeyRef"]["key"] in keys
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]}
    assert claims == {of_kind("PersistentVolumeClaim")["metadata"]["name"]}


def test_every_variable_is_one_that_the_program_or_the_image_reads(worker):
    known = variables_of_help()
    engine = PROGRAM.with_name("sdxl-worker-engine").read_bytes()
    start = (ROOT / "docker/start.sh").read_text()
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    named = {name for service in services for name in service["environment"]}
    for kind in ("Deployment", "Job"):
        for container in of_kind(kind)["spec"]["template"]["spec"]["containers"]:
            named |= {entry["name"] for entry in container["env"]}
    assert not [name for name in named if name not in known and name.encode() not in engine and name not in start]


def test_scaling_reads_numbers_that_metrics_has(worker):
    request = urllib.request.Request
    with serving("--graphs", GRAPHS, SERVE_API_KEY="key") as (address, _):
        with urllib.request.urlopen(request(f"{address}/metrics", headers={"Authorization": "Bearer key"})) as answer:
            metrics = dict(line.split(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    for trigger in of_kind("ScaledObject")["spec"]["triggers"]:
        assert metrics[trigger["metadata"]["valueLocation"]] == "0"


@pytest.mark.parametrize(("status", "expected"), [("200 OK", 0), ("204 No Content", 1), ("503 Service Unavailable", 1)])
def test_ready_is_a_worker_that_takes_jobs(status, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen(
            [ROOT / "docker/ready.sh"], env={"PATH": os.environ["PATH"], "PORT": str(server.getsockname()[1])}
        )
        connection, _ = server.accept()
        asked = ""
        while not asked.endswith("\r\n\r\n"):  # the shell sends it line by line
            asked += connection.recv(1000).decode()
        connection.sendall(f"HTTP/1.0 {status}\r\n\r\n".encode())
        connection.close()
        assert process.wait(10) == expected and asked.startswith("GET /ping HTTP/1.0\r\n")


def test_ready_is_not_a_port_that_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert subprocess.run([ROOT / "docker/ready.sh"], env={"PORT": str(port)}, capture_output=True).returncode == 1


def test_links_of_the_guide_lead_somewhere():
    for link in re.findall(r"\]\(([^)#:]+)", (ROOT / "docs/deploy.md").read_text()):
        assert (ROOT / "docs" / Path(link)).exists(), link
