"""Token ids equal those of `transformers.CLIPTokenizer`, with the real CLIP vocabulary."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import open_clip
import pytest
from transformers import CLIPTokenizer

from strings import STRINGS

MERGES = 48_894  # of the file's 262,145; the others were never used


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with SDXL's two tokenizers and nothing else."""
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.open(packed, "rt", encoding="utf-8").read().split("\n")[1 : MERGES + 1]
    symbols = byte_symbols()
    words = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49_408
    folder = tmp_path_factory.mktemp("clip")
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        special = {
            "bos_token": {"content": "<|startoftext|>", **token},
            "eos_token": {"content": "<|endoftext|>", **token},
            "unk_token": {"content": "<|endoftext|>", **token},
            "pad_token": pad,
        }
        files = {
            "vocab.json": json.dumps({word: index for index, word in enumerate(words)}),
            "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
            "special_tokens_map.json": json.dumps(special),
            "tokenizer_config.json": json.dumps(special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}),
        }
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(model, worker) -> list[dict[str, list[int]]]:
    lines = "".join(json.dumps(text) + "\n" for text in STRINGS)
    done = subprocess.run(
        [worker, "tokenize", "--model", model], input=lines, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_there_are_enough_strings():
    assert len(STRINGS) == len(set(STRINGS)) >= 200


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids_equal_transformers(name, model, ours):
    theirs = CLIPTokenizer.from_pretrained(model / name)
    assert theirs("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(ours) == len(STRINGS)
    wrong = []
    for text, ids in zip(STRINGS, ours):
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        if ids[name] != expected:
            wrong.append((text, ids[name][:12], expected[:12]))
    assert not wrong, f"{len(wrong)} of {len(STRINGS)} differ: {wrong[:5]}"
