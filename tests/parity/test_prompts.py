"""Weights in prompts, prompts of any length, and words that files bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import a1111
import compel_embeds
from inversions import Inversions
from support import BASE, MUST_MOVE, TOLERANCE, Reference, relative, run_worker

LONG = (
    "a photograph of an astronaut riding a horse on the moon, in the style of van gogh, highly detailed, sharp focus, "
    "studio lighting, cinematic still of a city street in the rain, neon lights, reflections, wide angle. shallow "
    "depth of field, bokeh, film grain, masterpiece, best quality, intricate details, soft light, warm colors, (cold:0.6) "
)
NEGATIVE = "blurry, (low quality:1.4), watermark"
MODES = {"a1111": a1111.embeds, "compel": compel_embeds.embeds}

# Each with another prompt for the same worth: what tells the two apart must reach the picture.
A1111 = {
    "round": ("a (red fox) in the snow", "a red fox in the snow"),
    "square": ("a [[red]] fox in the snow", "a red fox in the snow"),
    "number": ("a (red:1.6) fox in the (snow: .4 )", "a (red:1.5) fox in the (snow:.5)"),
    "negative": ("a (red:-0.7) fox in the snow", "a (red:0.7) fox in the snow"),
    "nested": ("a ((red) [fox]:1.4) in ([the) snow]", "a (red fox:1.4) in ([the) snow]"),
    "open": ("a (red fox in [the snow", "a (red fox in the snow"),
    "closed": ("a red fox) in :1.3) the] snow", "a red fox in the snow"),
    "escaped": (r"a \(red\) fox \[in\] \\ the (snow\) :1.5)", "a (red) fox [in] the (snow:1.5)"),
    "colon": ("a red fox: in the snow (a:b)", "a red fox in the snow (a:b)"),
    "long": (LONG * 2, LONG),
    "break": ("a red fox BREAK in the (snow BREAK, oil:1.3) painting", "a red fox in the (snow, oil:1.3) painting"),
    "no_break": ("a red fox xBREAK BREAKs in the snow", "a red fox x BREAK s in the snow"),
    "commas": ("a red fox, " * 19 + "in the morning mist with a white beard on a hill", "a red fox " * 19),
    "tags": ("a (red:1.6) fox in the (snow: .4 )", "a (red:1.5) fox in the (snow:.5)"),
}
COMPEL = {
    "signs": ("a red++ fox in the snow---", "a red+ fox in the snow---"),
    "number": ("a (red fox)1.4 in the snow", "a (red fox)1.2 in the snow"),
    "lessened": ("a (red fox)0.5 in the snow", "a (red fox)0.8 in the snow"),
    "several": ("a (red)0.5 fox in (morning snow)0.2 and+ rain-", "a (red)0.5 fox in (morning snow)0.9 and+ rain-"),
    "none": ("a (red fox)0 in the snow", "a (red fox)1 in the snow"),
    "nested": ("a ((red)1.3 fox (in the)- snow)0.7", "a ((red)1.3 fox in the snow)0.7"),
    "quoted": ('a "red fox"1.5 in "the snow"--', 'a "red fox"1.2 in "the snow"--'),
    "attend": ("a fox.attend(1.5) in (morning snow).attend(--)", "a fox.attend(1.3) in (morning snow).attend(-)"),
    "escaped": (r"a \(red fox\)1.5 \"in\" the snow+", r"a (red fox)1.5 in the snow+"),
    "open": ("a (red fox in (the snow)1.5", "a red fox in (the snow)1.2"),
    "and": ('("a red fox", "the snow++").and()', '("a red fox", "the snow").and()'),
    "and_weights": ('("a red fox", "the snow").and(1, 0.4)', '("a red fox", "the snow").and(1, 0.8)'),
    "blend": ('("a red fox", "the snow").blend(0.8, 0.4)', '("a red fox", "the snow").blend(0.4, 0.8)'),
    "sum": ('("a red fox", "the snow").blend(0.8, 0.4, no_normalize)', '("a red fox", "the snow").blend(0.8, 0.4)'),
    "long": (LONG.replace("(cold:0.6)", "(cold colors)1.4") * 2, LONG),
    "long_lessened": (LONG + "(soft light, a dog)0.4 " + LONG, LONG + "soft light, a dog " + LONG),
    "across": (LONG[:250] + "(" + LONG[250:400].replace("(", "") + ")0.6 a dog", LONG[:400] + " a dog"),
    "long_blend": (f'("{LONG[:380]}", "the snow").blend(1, 0.4)', '("a red fox", "the snow").blend(1, 0.4)'),
}
CASES = [(mode, name, *pair) for mode, cases in (("a1111", A1111), ("compel", COMPEL)) for name, pair in cases.items()]


def expected(
    reference: Reference, model: Path, request: dict[str, Any], embeds: dict[str, torch.Tensor]
) -> torch.Tensor:
    """diffusers' latents of given embeddings."""
    texts = ("prompt", "negative_prompt", "prompt_weighting")
    rest = {key: value for key, value in request.items() if key not in texts}
    return reference.call(model, rest | embeds, {}, output_type="latent")


@pytest.mark.parametrize(("mode", "name", "prompt", "other"), CASES, ids=[f"{mode}-{name}" for mode, name, *_ in CASES])
def test_a_weighted_prompt_is_encoded_as_there(mode, name, prompt, other, worker, test_models, reference, tmp_path):
    model = test_models["second" if name in ("number", "long", "long_lessened", "blend") else "default"]
    negative = NEGATIVE if mode == "a1111" else "blurry, (low quality)1.4, watermark-"
    request = BASE | {"prompt": prompt, "negative_prompt": negative, "prompt_weighting": mode, "num_inference_steps": 2}
    pipeline = reference.pipeline(model)
    theirs = expected(reference, model, request, MODES[mode](pipeline, prompt, negative))
    moved = relative(expected(reference, model, request, MODES[mode](pipeline, other, negative)), theirs)
    assert moved > MUST_MOVE, f"{name} cannot fail: {other!r} moves the latents by {moved:.1e} only"
    if name == "tags":  # which are taken out; those of negative texts ask for nothing
        request["negative_prompt"] = negative.replace("blurry", "<lora:ink:0.5>blurry")
    ours, _ = run_worker(worker, model, test_models["graphs"], request, tmp_path)
    error = relative(ours, theirs)
    assert error <= TOLERANCE, f"{name}: latents are off by {error:.1e}"


@pytest.mark.parametrize("mode", ["a1111", "compel"])
def test_a_prompt_without_weights_is_the_same_picture_to_the_bit(mode, worker, test_models, tmp_path):
    request = BASE | {"num_inference_steps": 2, "num_images": 2, "negative_prompt": "blurry", "clip_skip": 1}
    off, weighted = (
        run_worker(worker, test_models["default"], test_models["graphs"], request | more, tmp_path / str(index))[0]
        for index, more in enumerate(({}, {"prompt_weighting": mode}))
    )
    assert torch.equal(off, weighted)


# Tokens with their formats and numbers of vectors, and a prompt and a negative prompt with them.
INVERSIONS = {
    "one": ([("<ink>", "sdxl", 1)], "a red fox in <ink> style", "blurry"),
    "many": ([("<ink>", "sdxl", 4)], "<ink> a red fox, <ink>in the snow", "blurry <ink>"),
    "first": ([("ink-wash", "a1111", 3)], "a red fox, ink-wash in the snow", "blurry"),
    "second": ([("<wool>", "diffusers", 1)], "a red fox, <wool> in the snow", "ugly <wool>"),
    "both": ([("<wool>", "diffusers_both", 2)], "a red fox, <wool> in the snow", "ugly"),
    # the first has one vector, since diffusers replaces a token of several inside of longer ones too
    "two": ([("<ink>", "sdxl", 1), ("<ink>2", "sdxl", 2)], "a <ink>2 red fox, <ink> in the snow <ink>2", "blurry"),
    "any_case": ([("<ink>", "sdxl", 1)], "a red fox in <INK> style", "blurry"),
    "cut": ([("<ink>", "sdxl", 8)], "a red fox in the snow, oil painting, " * 2 + "<ink> " * 9, "blurry"),
}


@pytest.mark.parametrize("name", INVERSIONS)
def test_textual_inversions_equal_diffusers_where_it_pools_at_the_end_token(
    name, worker, test_models, reference, tmp_path
):
    model = test_models["second"]
    added, prompt, negative = INVERSIONS[name]
    inversions = Inversions(model, tmp_path)
    for token, format, vectors in added:
        inversions.add(token, format, vectors, torch.float16 if name == "both" else torch.float32)
    request = BASE | {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": 2}
    theirs = expected(reference, model, request, inversions.embeds(prompt, negative))
    plain = expected(reference, model, request, Inversions(model, tmp_path).embeds(prompt, negative))
    assert relative(plain, theirs) > MUST_MOVE
    request["textual_inversions"] = inversions.request
    ours, _ = run_worker(worker, model, test_models["graphs"], request, tmp_path / "run")
    assert relative(ours, theirs) <= TOLERANCE


def test_the_pooled_output_stays_that_of_the_end_token(worker, test_models, reference, tmp_path):
    """Where a configuration says `eos_token_id: 2`, an encoder pools at the highest id: in diffusers that of a token
    that was added, here still that of the end."""
    model = test_models["default"]
    prompt, negative = "a red fox in <ink> style", "blurry"
    inversions = Inversions(model, tmp_path)
    inversions.add("<ink>", "sdxl", 2)
    request = BASE | {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": 2}
    embeds = inversions.embeds(prompt, negative)
    at_the_end = embeds | {"pooled_prompt_embeds": inversions.pooled_at_the_end(prompt)}
    theirs, wanted = (expected(reference, model, request, these) for these in (embeds, at_the_end))
    assert relative(theirs, wanted) > MUST_MOVE  # diffusers' own
    request["textual_inversions"] = inversions.request
    ours, _ = run_worker(worker, model, test_models["graphs"], request, tmp_path / "run")
    assert relative(ours, wanted) <= TOLERANCE


@pytest.mark.parametrize("mode", ["a1111", "compel"])
def test_weights_act_on_textual_inversions(mode, worker, test_models, reference, tmp_path):
    model = test_models["second"]
    inversions = Inversions(model, tmp_path)
    inversions.add("<ink>")
    prompt, other = {
        "a1111": ("a red fox in (<ink> style:1.6) " + LONG, "a red fox in <ink> style " + LONG),
        "compel": ("a red fox in (<ink> style)1.6 " + LONG, "a red fox in <ink> style " + LONG),
    }[mode]
    request = BASE | {"prompt": prompt, "negative_prompt": "<ink>", "num_inference_steps": 2}
    theirs, plain = (
        expected(reference, model, request, MODES[mode](inversions.pipeline, text, "<ink>")) for text in (prompt, other)
    )
    assert relative(plain, theirs) > MUST_MOVE
    request |= {"textual_inversions": inversions.request, "prompt_weighting": mode}
    ours, _ = run_worker(worker, model, test_models["graphs"], request, tmp_path / "run")
    assert relative(ours, theirs) <= TOLERANCE
