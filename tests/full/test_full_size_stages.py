"""The refiner, and a UNet that takes its guidance, at full size: all parameters bound, one step each."""

from pathlib import Path

import pytest

from full_size import FullSize

pytestmark = pytest.mark.full


def test_the_refiner_takes_over(full_size: FullSize, worker: Path, tmp_path: Path) -> None:
    refiner = full_size.part("sdxl_refiner")
    hand_over = ["--set", "denoising_end=0.5", "--set", 'refiner={"num_inference_steps": 4}']
    result = full_size.generate(worker, tmp_path, "--refiner", f"refiner={refiner}", *hand_over, steps=2)
    assert result.status == 0, result.errors
    assert (tmp_path / "7.png").read_bytes().startswith(b"\x89PNG")
    print(f"{result.at[-1]:.0f} s, {result.peaks.private / 1e9:.2f} GB of private memory at the peak")
    # a copy of the refiner's weights would be 4.5 GB
    assert result.peaks.private < 3e9


def test_a_unet_takes_its_guidance_as_an_input(full_size: FullSize, worker: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for part in full_size.model.iterdir():
        if part.name != "unet":
            (model / part.name).symlink_to(part)
    (model / "unet").symlink_to(full_size.part("unet_lcm"))
    result = FullSize(model, full_size.graphs).generate(worker, tmp_path / "out", "--scheduler", "lcm")
    assert result.status == 0, result.errors
    assert (tmp_path / "out" / "7.png").is_file()
