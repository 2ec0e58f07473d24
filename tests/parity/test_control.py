"""ControlNets, alone and together, from text, from a picture and under a mask, equal diffusers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetUnionModel
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel

from pictures import encode, mask, photo
from support import (
    BASE, Case, Reference, check, covers_twice, pairwise, product, relative, run_worker,
)  # fmt: skip

MAPS = [encode(photo(seed, 140 + seed, 135)) for seed in range(4)]
INIT, OTHER_INIT = encode(photo(10)), encode(photo(11))
MASK, OTHER_MASK = encode(mask(1)), encode(mask(5))
SIZE = {"width": 128, "height": 128}
TASKS = {
    "text": {},
    "image": {"image": INIT},
    "inpaint": {"image": INIT, "mask_image": MASK, "strength": 0.9},
}
# Model and mode of each control.
NETS = {
    "plain": [("plain", None)],
    "small": [("small", None)],
    "two nets": [("plain", None), ("small", None)],
    "union": [("union", 3)],
    "union, two": [("union", 1), ("union", 3)],
    "two unions": [("union", 0), ("union8", 6)],
}
AXES = {
    "task": ("text", "image", "inpaint"),
    "nets": tuple(NETS),
    "guidance": ("on", "off"),
    "images": (1, 2),
    "guess": (False, True),
    "window": ("whole", "part"),
    "scale": (0.0, 0.5, 1.0, "mixed"),
    "model": ("default", "second"),
}
WINDOWS = {"whole": {}, "part": {"start": 0.2, "end": 0.7}}


def is_union(nets: str) -> bool:
    return NETS[nets][0][1] is not None


def allowed(row: dict) -> bool:
    """diffusers cannot run a union net in guess mode with guidance: it crashes (`test_union_in_guess_mode`)."""
    return not (row["guess"] and row["guidance"] == "on" and is_union(row["nets"]))


def control(index: int, model: str, mode: int | None, **fields) -> dict:
    entry = {"image": MAPS[index], "model": model} | ({} if mode is None else {"mode": mode})
    return entry | fields


def swapped(controls: list[dict], index: int = 0) -> list[dict]:
    """The same controls, one of them with another picture."""
    return [one | {"image": MAPS[3]} if i == index else one for i, one in enumerate(controls)]


def scaled(controls: list[dict], scales: list[float]) -> list[dict]:
    return [one | {"scale": scale} for one, scale in zip(controls, scales)]


def combined(row: dict) -> Case:
    nets = NETS[row["nets"]]
    scales = [0.6, 1.1] if row["scale"] == "mixed" else [row["scale"]] * 2
    fields = WINDOWS[row["window"]] | ({"guess_mode": True} if row["guess"] else {})
    controls = [control(i, *net, scale=scales[i], **fields) for i, net in enumerate(nets)]
    request = SIZE | TASKS[row["task"]] | {"num_images": row["images"], "controlnets": controls}
    request["guidance_scale"] = 5.0 if row["guidance"] == "on" else 1.0
    changes = [{"controlnets": scaled(controls, [1.6, 1.7])}]
    inside = row["nets"] == "union, two"  # their scales and windows act on the inputs, so even 0 adds something
    if row["scale"] != 0.0:
        changes.append({"controlnets": swapped(controls, len(nets) - 1)})
        if row["window"] == "part" and not inside:
            changes.append({"controlnets": [one | {"start": 0.0, "end": 1.0} for one in controls]})
    if row["task"] != "text":
        changes.append({"image": OTHER_INIT})
    return Case("-".join(map(str, row.values())), request, changes, model=row["model"])


COVER = [combined(row) for row in pairwise(AXES, allowed)]


def without_model(row: dict) -> dict:
    return {axis: value for axis, value in row.items() if axis != "model"}


def full_product() -> list[Case]:
    """Everything that combines, each on one of the two models by turns, with the first of its proofs."""
    rows = [row for row in product(without_model(AXES)) if allowed(row)]
    models = itertools.cycle(AXES["model"])
    cases = [combined(row | {"model": next(models)}) for row in rows]
    return [replace(case, changes=case.changes[:1]) for case in cases]


PRODUCT = full_product()


def modes(model: str, *numbers: int) -> Case:
    controls = [control(i, model, number) for i, number in enumerate(numbers)]
    others = [one | {"mode": (one["mode"] + 1) % 6} for one in controls]
    changes = [{"controlnets": swapped(controls)}, {"controlnets": others}]
    return Case(f"{model} modes {numbers}", SIZE | {"controlnets": controls}, changes)


EVERY_PAIR = [modes("union", *pair) for pair in itertools.combinations(range(6), 2)]
UNION_TWO = [control(0, "union", 0, scale=0.4), control(1, "union", 5, scale=0.9)]
SINGLE = [
    *(modes("union", number) for number in range(6)),
    *(modes("union", *pair) for pair in ((0, 1), (2, 3), (4, 5), (5, 0))),
    *(modes("union8", *numbers) for numbers in ((6,), (7,), (6, 7))),
    modes("union", 0, 1, 2, 3),
    Case(
        "windows that differ",
        SIZE | {"controlnets": [control(0, "plain", None, end=0.5), control(1, "plain", None, start=0.5)]},
        [{"controlnets": [control(0, "plain", None), control(1, "plain", None)]}],
    ),
    Case(
        "a control that is not square, tall picture",
        {"width": 72, "height": 136, "controlnets": [control(0, "union", 4)]},
        [{"controlnets": [control(3, "union", 4)]}],
    ),
    Case(
        "mask of a part, with a control",
        SIZE
        | {"image": INIT, "mask_image": MASK, "padding_mask_crop": 12, "strength": 0.9}
        | {"controlnets": [control(0, "plain", None)]},
        [{"controlnets": [control(3, "plain", None)]}, {"mask_image": OTHER_MASK}, {"padding_mask_crop": None}],
    ),
    Case(
        "a UNet for inpainting, with a control",
        SIZE | TASKS["inpaint"] | {"controlnets": [control(0, "plain", None)]},
        [{"controlnets": [control(3, "plain", None)]}, {"mask_image": OTHER_MASK}],
        model="inpaint",
    ),
]


@pytest.mark.parametrize("case", COVER + SINGLE, ids=lambda case: case.name)
def test_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", PRODUCT + EVERY_PAIR, ids=lambda case: case.name)
def test_every_combination_equals_diffusers(case, worker, test_models, reference, tmp_path):
    check(case, worker, test_models, reference, tmp_path)


def test_the_cover_meets_every_value_at_least_twice():
    assert covers_twice(AXES, pairwise(AXES, allowed))


# Where diffusers cannot or should not be followed: what we do instead, by diffusers' own forward with the difference put in.


@pytest.fixture
def patched(monkeypatch):
    """Lets a test change the arguments of the union net's forward; results of such runs are not kept."""

    def patch(change) -> Reference:
        original = ControlNetUnionModel.forward
        monkeypatch.setattr(ControlNetUnionModel, "forward", lambda self, *a, **k: original(self, *a, **change(k)))
        return Reference()

    return patch


def test_union_in_guess_mode_crashes_in_diffusers_and_runs_for_the_prompt_alone_here(
    worker, test_models, reference, patched, tmp_path
):
    controls = [control(0, "union", 3, guess_mode=True)]
    case = Case("guess", SIZE | {"controlnets": controls}, [{"controlnets": swapped(controls)}])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        reference.latents(test_models["default"], BASE | case.request, {})
    half = patched(lambda k: k | {"control_type": k["control_type"].chunk(2)[1]})
    check(case, worker, test_models, half, tmp_path)


def test_scale_0_of_two_union_controls_still_adds_residuals_as_in_diffusers(worker, test_models, reference, tmp_path):
    controls = scaled(UNION_TWO, [0.0, 0.0])
    check(
        Case("zero", SIZE | {"controlnets": controls}, [{"controlnets": []}]), worker, test_models, reference, tmp_path
    )


def test_residual_scales_mean_the_same_for_one_control_and_several(worker, test_models, patched, tmp_path):
    """The largest scale multiplies the residuals, the others go in by what they are of it."""

    def change(k: dict) -> dict:
        scales = k["conditioning_scale"]
        return k | {"conditioning_scale": [scale / max(scales) for scale in scales], "largest": max(scales)}

    original = ControlNetUnionModel.forward

    def forward(self, *args, **kwargs):
        kwargs = change(kwargs)
        largest = kwargs.pop("largest")
        down, mid = original(self, *args, **kwargs)
        return [one * largest for one in down], mid * largest

    for number, scales in enumerate(([0.5, 0.5], [0.4, 0.9])):
        controls = scaled(UNION_TWO, scales)
        request = SIZE | {"controlnets": controls}
        changed = Reference()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(ControlNetUnionModel, "forward", forward)
            theirs = changed.latents(test_models["default"], BASE | request, {})
        changed.results = {}
        plain = changed.latents(test_models["default"], BASE | request, {})
        assert relative(theirs, plain) > 1e-2, "the two modes must differ"
        ours = latents_of(worker, test_models, request | {"scale_mode": "residual"}, tmp_path / str(number))
        assert relative(ours, theirs) <= 1e-4


def test_several_union_nets_may_have_several_controls_each_scaled_as_residuals_are(
    worker, test_models, reference, monkeypatch, tmp_path
):
    """diffusers has one control for each net. Given the same net twice it runs it twice; put together they are one call
    here, each control with its scale and window."""
    fields = [{"scale": 0.4}, {"scale": 0.9, "end": 0.5}, {"scale": 0.7}]
    nets = [("union", 0), ("union", 5), ("union8", 6)]
    controls = [control(i, *net, **own) for i, (net, own) in enumerate(zip(nets, fields))]

    def forward(self, *args, **k):
        """The first two entries as one call of their net."""
        maps, types, modes, scales = (
            k.pop(name) for name in ("controlnet_cond", "control_type", "control_type_idx", "conditioning_scale")
        )
        acting = [index for index in (0, 1) if scales[index] > 0]
        largest = max(scales[index] for index in acting)
        inside = [scales[index] / largest for index in acting]
        down, mid = self.nets[0](
            *args,
            controlnet_cond=[maps[index][0] for index in acting],
            control_type=sum(types[index] for index in acting),
            control_type_idx=[modes[index][0] for index in acting],
            conditioning_scale=inside,
            **k,
        )
        more, last = self.nets[2](
            *args, controlnet_cond=maps[2], control_type=types[2], control_type_idx=modes[2],
            conditioning_scale=scales[2], from_multi=True, **k,
        )  # fmt: skip
        return [a * largest + b for a, b in zip(down, more)], mid * largest + last

    request = BASE | SIZE | {"controlnets": controls}
    apart = reference.call(test_models["default"], request, {}, "latent", every_control_a_net=True)
    monkeypatch.setattr(MultiControlNetUnionModel, "forward", forward)
    theirs = reference.call(test_models["default"], request, {}, "latent", every_control_a_net=True)
    assert relative(theirs, apart) > 1e-2, "one call and two must differ"
    assert relative(latents_of(worker, test_models, request, tmp_path), theirs) <= 1e-4


def test_a_residual_scale_of_0_is_a_control_that_is_not_there(worker, test_models, tmp_path):
    one = latents_of(worker, test_models, SIZE | {"controlnets": scaled(UNION_TWO[:1], [0.7])}, tmp_path / "one")
    both = SIZE | {"controlnets": scaled(UNION_TWO, [0.7, 0.0]), "scale_mode": "residual"}
    assert torch.equal(latents_of(worker, test_models, both, tmp_path / "both"), one)
    none = SIZE | {"controlnets": scaled(UNION_TWO, [0.0, 0.0]), "scale_mode": "residual"}
    assert torch.equal(
        latents_of(worker, test_models, none, tmp_path / "none"), latents_of(worker, test_models, SIZE, tmp_path / "no")
    )


def latents_of(worker, test_models, request: dict, scratch) -> torch.Tensor:
    return run_worker(worker, test_models["default"], test_models["graphs"], BASE | request, scratch)[0]
