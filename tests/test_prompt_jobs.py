"""Prompts of many jobs at one worker: what it keeps of one for the next, and what it must not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from program import error_of, pictures, run, write_safetensors
from test_batching import LONG, answer, start
from test_inputs import SMALL, ask, image_of, serving

WIDTHS = {"clip_l": 32, "clip_g": 40}  # of the default test model
CACHED = "prompt from the cache"


def inversion(folder: Path, token: str = "<ink>", value: float = 1.0, widths: dict[str, int] = WIDTHS) -> dict:
    """A textual inversion whose vectors have one value throughout."""
    header, data = {}, b""
    for name, width in widths.items():
        part = np.full(width, value, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": [1, width], "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    path = folder / f"{value}-{'-'.join(widths)}.safetensors"
    write_safetensors(path, header, data)
    return {"path": str(path), "token": token}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the worker looks for textual inversions."""
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def at(test_models, folder):
    with serving(test_models, "--log-level", "debug", "--embedding-dir", folder) as (address, logged):
        yield address, logged


def hits(at, fields: dict) -> tuple[int, np.ndarray]:
    """How many of a job's texts were encoded before, and its picture."""
    address, logged = at
    before = sum(CACHED in line for line in logged)
    picture = image_of(ask(address, fields))
    return sum(CACHED in line for line in logged) - before, picture


def test_a_prompt_seen_before_is_not_encoded_again(at, folder):
    texts = {"prompt": "a red fox at night", "negative_prompt": "blurry at night"}
    found, first = hits(at, texts)
    assert found == 0
    found, again = hits(at, texts)
    assert found == 2 and np.array_equal(first, again)
    # what changes nothing of the texts, and what changes only one of them
    assert hits(at, texts | {"seed": 9, "num_inference_steps": 1})[0] == 2
    assert hits(at, texts | {"clip_skip": 1})[0] == 1
    assert hits(at, texts | {"prompt_2": "a blue bird"})[0] == 1
    assert hits(at, texts | {"prompt_weighting": "a1111"})[0] == 0
    assert hits(at, texts | {"prompt_weighting": "compel"})[0] == 0
    with_ink = [texts | {"textual_inversions": [inversion(folder, value=value)]} for value in (1.0, 2.0)]
    assert [hits(at, fields)[0] for fields in (*with_ink, *with_ink)] == [0, 0, 2, 2]


@pytest.mark.parametrize("switch, ahead", [("on", 2), ("off", 0)])
def test_the_next_job_s_prompt_is_encoded_during_the_last_step(at, test_models, switch, ahead):
    waiting = {"prompt": "a quiet harbour", "negative_prompt": "a storm", "seed": 3}
    options = ("--log-level", "debug", "--concurrency", "2", "--encode-ahead", switch)
    with serving(test_models, *options) as (address, logged):
        ask(address, {})  # the model is loaded
        long = start(address, LONG)
        own = image_of(answer(address, start(address, waiting)))
        assert answer(address, long)["status"] == "COMPLETED"
    assert sum(CACHED in line for line in logged) == ahead
    assert np.array_equal(own, hits(at, waiting)[1])


def test_a_warning_comes_with_the_prompt_from_the_cache(at):
    address, _ = at
    fields = {"prompt": "a very long prompt " * 40, "negative_prompt": "a <lora:ink:0.5> tag"}
    wanted = [
        "prompt was cut to 77 tokens; `prompt_weighting` lifts the limit",
        "prompt_2 was cut to 77 tokens; `prompt_weighting` lifts the limit",
        "<lora:...> in negative_prompt is plain text without `prompt_weighting`",
        "<lora:...> in negative_prompt_2 is plain text without `prompt_weighting`",
    ]
    for _ in range(2):
        assert ask(address, fields)["output"]["warnings"] == wanted
    assert ask(address, fields | {"prompt_weighting": "a1111"})["output"]["warnings"] == []


def test_a_textual_inversion_is_gone_after_its_job(at, test_models, folder):
    address, _ = at
    # of words that the last ids of the small vocabulary are for: their rows are lent first
    plain = {"prompt": "horxq hill highxq", "negative_prompt": "hair green horxq"}
    with serving(test_models) as (fresh, _):
        expected = image_of(ask(fresh, plain))
    added = {"textual_inversions": [inversion(folder, value=3.0)]}
    inked = image_of(ask(address, {"prompt": "a fox in <ink>", "negative_prompt": "<ink>"} | added))
    assert not np.array_equal(inked, image_of(ask(address, {"prompt": "a fox in <ink>", "negative_prompt": "<ink>"})))
    failed = ask(address, {"prompt": "a fox in <ink> again", "clip_skip": 11} | added)
    assert failed["status"] == "FAILED" and "clip_skip" in json.dumps(failed["error"])
    assert np.array_equal(image_of(ask(address, plain)), expected)


@pytest.mark.parametrize(
    "change, code, field",
    [
        ({"path": "nowhere.safetensors"}, "textual_inversion_not_found", "path"),
        ({"path": __file__}, "path_refused", "path"),
        ({"path": "../x.safetensors"}, "path_refused", "path"),
        ({"path": "style.pt"}, "textual_inversion_unsupported", "path"),
        ({"token": "a</w>"}, "textual_inversion_invalid", "token"),
        ({"token": "<|endoftext|>"}, "textual_inversion_invalid", "token"),
        ({"widths": {"clip_l": 40}}, "textual_inversion_invalid", "path"),
        ({"widths": {"emb_params": 33}}, "textual_inversion_invalid", "path"),
        ({"value": float("nan")}, "textual_inversion_invalid", "path"),
    ],
)
def test_a_textual_inversion_that_cannot_be_is_told_by_field(at, folder, change, code, field):
    made = {name: change[name] for name in ("widths", "value") if name in change}
    entry = inversion(folder, **made) | {name: change[name] for name in ("path", "token") if name in change}
    answer = ask(at[0], {"textual_inversions": [inversion(folder, "<other>"), entry]})
    assert answer["status"] == "FAILED", answer
    error = json.loads(answer["error"]) if isinstance(answer["error"], str) else answer["error"]
    assert (error["code"], error["field"]) == (code, f"textual_inversions[1].{field}")
    assert error["remedy"] and str(folder) not in error["message"]


def test_what_compel_cannot_do_is_told_by_field(tmp_path: Path):
    for prompt, code in (("a cat.swap(dog)", "unsupported_option"), ('("a", "b").blend(1)', "prompt_syntax")):
        fields = SMALL | {"negative_prompt": prompt, "prompt_weighting": "compel"}
        result = run("generate", "--input", "-", cwd=tmp_path, stdin=json.dumps(fields))
        assert error_of(result, 2, code)["field"] == "negative_prompt"


def test_weights_are_written_into_the_picture_s_parameters(tmp_path: Path, test_models):
    files = ("--model", test_models["default"], "--graphs", test_models["graphs"])
    fields = SMALL | {"prompt": "a (fox:1.4)", "prompt_weighting": "a1111", "textual_inversions": [inversion(tmp_path)]}
    first = run("generate", *files, "--input", "-", cwd=tmp_path, stdin=json.dumps(fields))
    (picture,) = pictures(first, tmp_path)
    again = run("generate", *files, "--from", picture, cwd=tmp_path)
    assert picture.read_bytes() == pictures(again, tmp_path)[0].read_bytes()
