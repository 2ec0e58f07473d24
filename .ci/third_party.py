"""What a release is made of: a bill of materials, and the licences of the crates that are compiled in.

    python .ci/third_party.py OUT     writes OUT/sbom.cdx.json (CycloneDX) and OUT/THIRD-PARTY-LICENCES.txt

The crates are those that cargo resolves for Linux, without the ones that only tests and build scripts use.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "x86_64-unknown-linux-gnu"
# also one folder down, where crates keep the C libraries that they bring
TEXTS = re.compile(r"(licen[cs]e|copying|notice|unlicense|patents)([-._].*)?", re.IGNORECASE)


def crates() -> tuple[dict, list[dict]]:
    """Our own package, and all that is linked into it."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={PLATFORM}"]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    packages = {package["id"]: package for package in found["packages"]}
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    root = found["resolve"]["root"]
    seen, open_ends = set(), [root]
    while open_ends:
        for dependency in nodes[open_ends.pop()]["deps"]:
            is_linked = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_linked and dependency["pkg"] not in seen:
                seen.add(dependency["pkg"])
                open_ends.append(dependency["pkg"])
    linked = sorted((packages[name] for name in seen), key=lambda package: (package["name"], package["version"]))
    return packages[root], linked


def component(package: dict, checksums: dict) -> dict:
    name, version = package["name"], package["version"]
    checksum = checksums.get((name, version))
    return {
        "type": "library",
        "bom-ref": f"pkg:cargo/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:cargo/{name}@{version}",
        # an old way to write OR
        "licenses": [{"expression": package["license"].replace("/", " OR ")}],
        **({"hashes": [{"alg": "SHA-256", "content": checksum}]} if checksum else {}),
    }


def bill(own: dict, linked: list[dict]) -> dict:
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    checksums = {(package["name"], package["version"]): package.get("checksum") for package in lock["package"]}
    torch = re.search(r"^torch==(.*)$", (ROOT / "torchscript/requirements.in").read_text(), re.MULTILINE)[1]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "name": own["name"],
                "version": own["version"],
                "licenses": [{"expression": own["license"]}],
            }
        },
        "components": [
            *(component(package, checksums) for package in linked),
            # linked at run time; a release does not bring it, the slim image does
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/torch@{torch}",
                "name": "torch",
                "version": torch,
                "purl": f"pkg:pypi/torch@{torch}",
                "licenses": [{"expression": "BSD-3-Clause"}],
            },
        ],
    }


def licences(linked: list[dict]) -> str:
    """Every text once, under the names of the crates that have it."""
    holders: dict[str, list[str]] = {}
    for package in linked:
        folder = Path(package["manifest_path"]).parent
        files = [*folder.glob("*"), *folder.glob("*/*")]
        files = [file for file in files if file.is_file() and TEXTS.fullmatch(file.name)]
        texts = {file.read_text(errors="replace").strip() for file in files}
        name = f"{package['name']} {package['version']} ({package['license']})"
        for text in sorted(texts) or ["(no text in the crate)"]:
            holders.setdefault(text, []).append(name)
    line = "=" * 80
    return "".join(f"{line}\n{chr(10).join(names)}\n{line}\n\n{text}\n\n" for text, names in holders.items())


def main() -> None:
    out = Path(sys.argv[1])
    own, linked = crates()
    (out / "sbom.cdx.json").write_text(json.dumps(bill(own, linked), indent=1) + "\n")
    (out / "THIRD-PARTY-LICENCES.txt").write_text(licences(linked))


main()
