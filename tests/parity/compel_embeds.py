"""PyPI `compel` itself, as SDXL's users call it."""

from __future__ import annotations

import torch
from compel import CompelForSDXL
from diffusers import StableDiffusionXLPipeline


def embeds(pipeline: StableDiffusionXLPipeline, prompt: str, negative: str) -> dict[str, torch.Tensor]:
    """The four tensors that the pipeline takes in the place of texts, of one length."""
    compel = CompelForSDXL(pipeline)
    build = compel.compel_2.build_conditioning_tensor

    # For a weight in `.and()` compel 2.5.1 asks itself for the empty prompt and, of the encoder with a pooled output,
    # gets two tensors where it handles one. The first is what it is about.
    def one(text: str, return_tokenization: bool = False):
        return build(text, return_tokenization) if return_tokenization else build(text)[0]

    compel.compel_2.build_conditioning_tensor = one
    made = compel(prompt, negative_prompt=negative)
    return {
        "prompt_embeds": made.embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
