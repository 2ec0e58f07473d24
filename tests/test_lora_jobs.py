"""LoRAs of many jobs at one worker, and files that are none: the base model comes back bit by bit."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest

from program import DEMO, SMALL as SMALL_OPTIONS, error_of, files_in, pictures, run, write_safetensors
from test_inputs import SMALL, ask, image_of, serving

QUERY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"  # 32 x 32 in the default test model
TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"  # the same


def lora(
    folder: Path, name: str, seed: int = 0, modules: tuple[str, ...] = (QUERY, TEXT), padding: int = 0, **changes: object
) -> Path:
    """A LoRA of rank 4 as kohya's scripts write it, with a tensor of `padding` bytes that names nothing; `changes` are
    `value`, `width` and `rank` of the first module."""
    rng = np.random.default_rng(seed)
    header = {"padding": {"dtype": "U8", "shape": [padding], "data_offsets": [0, padding]}} if padding else {}
    data = b"\0" * padding
    for index, module in enumerate(modules):
        own = changes if index == 0 else {}
        width, rank = own.get("width", 32), own.get("rank", 4)
        parts = {"lora_down.weight": (4, width), "lora_up.weight": (32, rank), "alpha": ()}
        for part, shape in parts.items():
            values = rng.standard_normal(shape).astype("<f4") if shape else np.array(4, "<f4")
            if "value" in own and part == "lora_up.weight":
                values[0, 0] = own["value"]
            blob = values.tobytes()
            offsets = [len(data), len(data) + len(blob)]
            header[f"{module}.{part}"] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
            data += blob
    path = folder / f"{name}.safetensors"
    write_safetensors(path, header, data)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "wool", "glass", "sand"), 1):
        lora(folder, name, seed)
    lora(folder, "query", 9, modules=(QUERY,))
    return folder


@pytest.fixture(scope="module", params=["file", "copy"])
def at(test_models, folder, request):
    """Where the base comes back from: the checkpoint's file, or a copy in memory."""
    with serving(test_models, "--lora-dir", folder, "--lora-backup", request.param) as (address, _):
        yield address


def worker_memory() -> int:
    """Private bytes of the one worker that runs here."""
    children = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
    (worker,) = children
    memory = worker.memory_full_info()
    return memory.uss


def test_a_hundred_jobs_of_changing_loras_leave_the_base_as_it_was(at):
    names, rng = ["ink", "wool", "glass", "sand", "query"], random.Random(5)
    plain = image_of(ask(at, {}))
    sets = [
        [{"name": name, "scale": rng.choice([-0.5, 0.3, 1.0])} for name in rng.sample(names, rng.randint(0, 3))]
        for _ in range(12)
    ]
    sets = [each for index, each in enumerate(sets) if each and each not in sets[:index]]
    first: dict[str, np.ndarray] = {}
    memory = []
    for count in range(100):
        loras = rng.choice(sets)
        picture = image_of(ask(at, {"loras": loras}))
        expected = first.setdefault(json.dumps(loras), picture)
        assert np.array_equal(picture, expected), f"job {count} depends on those before it"
        if count >= 40:
            memory.append(worker_memory())
    assert len(first) > 5 and len({picture.tobytes() for picture in first.values()}) == len(first)
    assert np.array_equal(image_of(ask(at, {})), plain)
    # the least of several: the allocator keeps some megabytes now and then and gives them back
    grown = min(memory[-20:]) - min(memory[:20])
    assert grown < 4 << 20, f"{grown} bytes more, {min(memory)} to {max(memory)}"


def test_the_order_in_which_loras_are_named_does_not_matter(at):
    both = [{"name": "ink", "scale": 0.7}, {"name": "wool", "scale": -0.4}]
    assert np.array_equal(image_of(ask(at, {"loras": both})), image_of(ask(at, {"loras": both[::-1]})))


def test_the_reply_names_the_keys_and_no_time_is_spent_on_the_same_set(at, folder):
    with_more = lora(folder, "more", 3, modules=(QUERY, "lora_unet_nowhere_to_q"))
    fields = {"loras": [{"name": "more", "scale": 0.5}]}
    first, again = ask(at, fields)["output"], ask(at, fields)["output"]
    unmatched = [f"lora_unet_nowhere_to_q.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")]
    expected = {"name": "more", "scale": 0.5, "matched": 3, "unmatched": unmatched, "unmatched_count": 3}
    assert first["loras"] == again["loras"] == [expected]
    assert any("3 keys name nothing" in warning for warning in first["warnings"])
    assert "lora_fuse" in first["timings"] and "lora_fuse" not in again["timings"]
    assert ask(at, {})["output"]["loras"] == []
    with_more.unlink()


def test_a_lora_is_asked_for_in_the_prompt_where_weighting_is_on(at):
    listed = image_of(ask(at, {"prompt": "a fox", "loras": [{"name": "ink", "scale": 0.8}]}))
    tagged = {"prompt": "a fox<lora:ink:0.8>", "prompt_weighting": "a1111"}
    assert np.array_equal(listed, image_of(ask(at, tagged)))
    assert not np.array_equal(listed, image_of(ask(at, {"prompt": "a fox"})))
    off = ask(at, tagged | {"prompt_weighting": "off"})["output"]
    assert off["loras"] == [] and any("plain text" in warning for warning in off["warnings"])


def test_the_prompt_cache_knows_which_loras_the_text_encoder_had(at):
    fields = {"prompt": "a fox in the cache"}
    plain = image_of(ask(at, fields))
    changed = image_of(ask(at, fields | {"loras": [{"name": "ink"}]}))
    assert not np.array_equal(plain, changed)
    assert np.array_equal(image_of(ask(at, fields)), plain)


def header_of(path: Path, length: int) -> None:
    """A file whose header says it is that long."""
    path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 1000)


def zip_bomb(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * (64 << 20))


def sparse_header(path: Path) -> None:
    """10 GB of header, which takes no room on the disk."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 10 << 30) + b"{")
        file.truncate((10 << 30) + 100)


def cut(path: Path) -> None:
    whole = lora(path.parent, path.stem).read_bytes()
    path.write_bytes(whole[: len(whole) - 100])


SD15 = ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",)  # 768 wide there
HOSTILE = {
    "cut short": (cut, "lora_damaged"),
    "empty": (lambda path: path.write_bytes(b""), "lora_damaged"),
    "noise": (lambda path: path.write_bytes(bytes(range(7, 250)) * 40), "lora_damaged"),
    "a rank that does not fit": (lambda path: lora(path.parent, path.stem, rank=5), "lora_damaged"),
    "not a number": (lambda path: lora(path.parent, path.stem, value=np.nan), "lora_damaged"),
    "infinite": (lambda path: lora(path.parent, path.stem, value=np.inf), "lora_damaged"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00true"), "lora_unsupported"),
    "zip bomb": (zip_bomb, "lora_unsupported"),
    "a header of 10 GB that is not there": (lambda path: header_of(path, 10 << 30), "lora_damaged"),
    "a header of 10 GB": (sparse_header, "lora_too_large"),
    "a header of 2^64 - 1 bytes": (lambda path: header_of(path, 2**64 - 1), "lora_damaged"),
    "of SD 1.5": (lambda path: lora(path.parent, path.stem, modules=SD15, width=768), "lora_mismatch"),
    "of nothing here": (lambda path: lora(path.parent, path.stem, modules=("lora_unet_nowhere",)), "lora_mismatch"),
    "of another algorithm": (lambda path: lora(path.parent, path.stem, modules=("lora_unet_x.oft_blocks",)), "lora_mismatch"),
}


@pytest.mark.parametrize("make, code", HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_none_is_told_and_the_base_stays(at, folder, make, code):
    plain = image_of(ask(at, {}))
    path = folder / "hostile.safetensors"
    make(path)
    answer = ask(at, {"loras": [{"name": "ink"}, {"name": "hostile"}]})
    path.unlink()
    assert answer["status"] == "FAILED", answer
    error = json.loads(answer["error"]) if isinstance(answer["error"], str) else answer["error"]
    assert (error["code"], error["field"]) == (code, "loras[1].name"), error
    assert error["remedy"] and str(folder) not in json.dumps(error)
    assert np.array_equal(image_of(ask(at, {})), plain)


@pytest.mark.parametrize(
    "entry, code, field",
    [
        ({"name": "nowhere"}, "lora_not_found", "loras[0].name"),
        ({"name": "../ink"}, "path_refused", "loras[0].name"),
        ({"name": "/etc/passwd"}, "path_refused", "loras[0].name"),
        ({"name": "ink.pt"}, "lora_unsupported", "loras[0].name"),
        ({"path": str(DEMO / "unet" / "diffusion_pytorch_model.safetensors")}, "path_refused", "loras[0].path"),
        ({"name": "out"}, "path_refused", "loras[0].name"),
        ({"name": "ink", "scale": 11}, "out_of_range", "loras[0].scale"),
        ({"name": "ink", "url": "https://a.test/x"}, "conflicting_fields", "loras[0].url"),
        ({"url": "http://127.0.0.1:1/x.safetensors"}, "url_refused", "loras[0].url"),
        ({"name": "ink", "sha256": "0" * 64}, "lora_changed", "loras[0].name"),
    ],
)
def test_a_name_leads_nowhere_else(at, folder, tmp_path, entry, code, field):
    outside = lora(tmp_path, "outside")
    link = folder / "out.safetensors"
    link.symlink_to(outside)
    answer = ask(at, {"loras": [entry]})
    link.unlink()
    error = json.loads(answer["error"]) if isinstance(answer["error"], str) else answer["error"]
    assert (error["code"], error["field"]) == (code, field), error


def test_the_command_line_takes_any_file_and_the_picture_remembers_it(test_models, tmp_path):
    path = lora(tmp_path, "mine", 4)
    files = ["--model", test_models["default"], "--graphs", test_models["graphs"]]
    fixed = [*files, *SMALL_OPTIONS, "--prompt", "a fox"]
    plain = pictures(run("generate", *fixed, "--output", tmp_path / "a", cwd=tmp_path), tmp_path)[0].read_bytes()
    result = run("generate", *fixed, "--lora", f"{path}:0.5", "--output", tmp_path / "b", cwd=tmp_path)
    (picture,) = pictures(result, tmp_path)
    assert picture.read_bytes() != plain
    again = run("generate", *files, "--from", picture, "--output", tmp_path / "c", cwd=tmp_path)
    assert pictures(again, tmp_path)[0].read_bytes() == picture.read_bytes()
    lora(tmp_path, "mine", 5)  # another file under that name is not what made the picture
    error = error_of(run("generate", *files, "--from", picture, "--output", tmp_path / "d", cwd=tmp_path), 2, "lora_changed")
    assert error["field"] == "loras[0].path" and files_in(tmp_path / "d") == []
