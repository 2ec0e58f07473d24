"""SDXL at its full size in one file, as Civitai has it: every name is known, and the latents are those of the folder."""

import sys

import pytest
from safetensors.torch import load_file

from full_size import FullSize
from program import ROOT, run

sys.path.insert(0, str(ROOT / "tests"))
from test_single_file import closeness, in_one_file  # noqa: E402

pytestmark = pytest.mark.full

REQUEST = ("--prompt", "a fox", "--seed", "3", "--steps", "1", "--width", "256", "--height", "256", "--guidance-scale", "1")


def test_one_file_of_full_size_gives_the_latents_of_its_folder(full_size: FullSize, tmp_path) -> None:
    file = in_one_file(full_size.model, full_size.model.with_name("checkpoint.safetensors"))
    try:
        found = []
        for model in (full_size.model, file):
            options = ("--model", model, "--graphs", full_size.graphs, "--dtype", "bfloat16", "--save-latents", "l.safetensors")
            # random weights come with a vocabulary of their own
            config = () if model is full_size.model else ("--model-config", full_size.model)
            result = run("generate", *REQUEST, *options, *config, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            found.append(load_file(tmp_path / "l.safetensors")["latents"].clone())
        assert closeness(found[1], found[0]) < 1e-2
    finally:
        file.unlink()
