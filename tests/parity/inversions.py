"""Random textual inversions, and what diffusers makes of a prompt with them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

# As files name the vectors: of both encoders, of the web UI's single one, of diffusers' own.
FORMATS = {
    "sdxl": lambda token, first, second: {"clip_l": first, "clip_g": second},
    "a1111": lambda token, first, second: {"emb_params": first},
    "diffusers": lambda token, first, second: {token: second[0]},
    "diffusers_both": lambda token, first, second: {f"{token}.0": first, f"{token}.1": second},
}


class Inversions:
    """A pipeline of its own, since loaded tokens stay."""

    def __init__(self, model: Path, folder: Path) -> None:
        variant = "fp16" if list(model.glob("*/*.fp16.safetensors")) else None
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model, variant=variant, torch_dtype=torch.float32)
        self.folder = folder
        self.request: list[dict[str, str]] = []

    def add(self, token: str, format: str = "sdxl", vectors: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Writes a file for the worker, and loads the same into diffusers."""
        pipeline = self.pipeline
        stages = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
        generator = torch.Generator().manual_seed(len(self.request) + vectors)
        widths = [encoder.config.hidden_size for _, encoder in stages]
        first, second = (torch.randn(vectors, width, generator=generator).to(dtype) for width in widths)
        tensors = {name: tensor.contiguous() for name, tensor in FORMATS[format](token, first, second).items()}
        path = self.folder / f"{len(self.request)}.safetensors"
        save_file(tensors, path)
        self.request.append({"path": str(path), "token": token})
        for tensor in tensors.values():
            tokenizer, encoder = stages[widths.index(tensor.shape[-1])]
            pipeline.load_textual_inversion(tensor.float(), token=token, tokenizer=tokenizer, text_encoder=encoder)

    @torch.no_grad()
    def embeds(self, prompt: str, negative: str) -> dict[str, torch.Tensor]:
        positive, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt, negative_prompt=negative, do_classifier_free_guidance=True
        )
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": negative_embeds,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }

    @torch.no_grad()
    def pooled_at_the_end(self, prompt: str) -> torch.Tensor:
        """The second encoder's projected output of `<|endoftext|>`, wherever the encoder itself would pool."""
        tokenizer, encoder = self.pipeline.tokenizer_2, self.pipeline.text_encoder_2
        prompt = self.pipeline.maybe_convert_prompt(prompt, tokenizer)
        ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        place = ids[0].tolist().index(tokenizer.eos_token_id)
        return encoder.text_projection(encoder(ids).last_hidden_state[:, place])
