"""`manifest.json`: what a folder of graphs holds. The reader is the Rust side, so every field here is a contract."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from configs import ExportError, Job, PackageJob, read_json

FORMAT = 1
NAME = "manifest.json"
SOURCES = ("checks.py", "configs.py", "export.py", "graphs.py", "manifest.py", "packages.py", "tracing.py")

Entry = dict[str, Any]


def versions() -> dict[str, str]:
    """What a graph was made with. Read from the packages' metadata: no import."""
    return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}


def source_hash() -> str:
    """Changes with the export code, so that graphs of an older export are made again."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]


def load(folder: Path, kind: str = "graphs") -> list[Entry]:
    """The entries of that kind: `graphs` or `packages`."""
    path = folder / NAME
    if not path.exists():
        return []
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ExportError(f"{path}: format {manifest.get('format')!r}, this export writes {FORMAT}: use another --out")
    return manifest.get(kind, [])


def same_graph(entry: Entry, job: Job) -> bool:
    key = (entry["component"], entry["class"], entry["dtype"], entry["config"])
    return key == (job.component, job.class_name, job.dtype, job.config)


def is_current(folder: Path, entries: list[Entry], job: Job) -> bool:
    """Whether the job's graph is there, made by this export code with these versions."""
    return any(same_graph(entry, job) and is_stamped(folder, entry) for entry in entries)


def is_current_package(folder: Path, entries: list[Entry], job: PackageJob) -> bool:
    """The same for a package. Its file's name says all that it was made for."""
    return any(entry["file"] == job.file and is_stamped(folder, entry) for entry in entries)


def is_stamped(folder: Path, entry: Entry) -> bool:
    stamp = versions() | {"source": source_hash()}
    return all(entry.get(name) == value for name, value in stamp.items()) and (folder / entry["file"]).is_file()


def add(folder: Path, job: Job, entry: Entry) -> None:
    """Puts the entry into the manifest, in place of an equal one. Reads it anew, so that what others added stays."""
    entries = [other for other in load(folder) if not same_graph(other, job)]
    store(folder, [*entries, entry], load(folder, "packages"))


def add_package(folder: Path, entry: Entry) -> None:
    """The same for a package."""
    entries = [other for other in load(folder, "packages") if other["file"] != entry["file"]]
    store(folder, load(folder), [*entries, entry])


def store(folder: Path, graphs: list[Entry], packages: list[Entry]) -> None:
    by_file = {"graphs": graphs, "packages": packages}
    by_file = {kind: sorted(entries, key=lambda entry: entry["file"]) for kind, entries in by_file.items() if entries}
    text = json.dumps({"format": FORMAT, **by_file}, indent=1) + "\n"
    write_atomically(folder / NAME, text.encode())


def write_atomically(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(data)
    temporary.rename(path)
