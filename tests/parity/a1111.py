"""AUTOMATIC1111's prompt weighting for SDXL, told again in a few lines of Python: what the worker is compared with."""

from __future__ import annotations

import re

import torch
from diffusers import StableDiffusionXLPipeline

CHUNK = 75
SYNTAX = re.compile(r"\\[()\[\]\\]|:\s*([+-]?[.\d]+)\s*\)|[()\[\]\\:]|[^()\[\]\\:]+")


def parse(prompt: str) -> list[tuple[str | None, float]]:
    """Texts with their weights; None is a BREAK."""
    parts: list[list] = []
    open_brackets: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        for part in parts[start:]:
            part[1] *= factor

    for match in SYNTAX.finditer(prompt):
        piece, weight = match[0], match[1]
        if piece[0] == "\\":
            parts.append([piece[1:], 1.0])
        elif piece in open_brackets:
            open_brackets[piece].append(len(parts))
        elif weight and open_brackets["("]:
            scale(open_brackets["("].pop(), float(weight))
        elif piece == ")" and open_brackets["("]:
            scale(open_brackets["("].pop(), 1.1)
        elif piece == "]" and open_brackets["["]:
            scale(open_brackets["["].pop(), 1 / 1.1)
        else:
            for index, text in enumerate(re.split(r"\s*\bBREAK\b\s*", piece)):
                parts += [[None, 1.0]] * bool(index) + [[text, 1.0]]
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in open_brackets[bracket]:
            scale(start, factor)
    joined: list[list] = []
    for text, weight in parts:
        if text is not None and joined and joined[-1][0] is not None and joined[-1][1] == weight:
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return [(text, weight) for text, weight in joined]


def chunks(prompt: str, tokenizer) -> list[list[tuple[int, float]]]:
    """Up to 75 pairs of id and weight each."""
    comma = tokenizer.get_vocab()[",</w>"]
    done: list[list[tuple[int, float]]] = []
    chunk: list[tuple[int, float]] = []
    for text, weight in parse(prompt):
        if text is None:
            done.append(chunk)
            chunk = []
            continue
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            if len(chunk) == CHUNK:
                commas = [index for index, (other, _) in enumerate(chunk) if other == comma]
                cut = commas[-1] + 1 if commas and token != comma and commas[-1] >= CHUNK - 20 else CHUNK
                done.append(chunk[:cut])
                chunk = chunk[cut:]
            chunk.append((token, weight))
    return [*done, chunk] if chunk or not done else done


@torch.no_grad()
def encode(prompt: str, tokenizer, encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of all chunks and the first one's pooled output."""
    hidden, pooled = [], None
    for chunk in chunks(prompt, tokenizer):
        ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (CHUNK + 2 - len(ids))
        weights = torch.tensor([1.0, *(weight for _, weight in chunk)])
        weights = torch.nn.functional.pad(weights, (0, CHUNK + 2 - len(weights)), value=1.0)
        output = encoder(torch.tensor([ids]), output_hidden_states=True)
        z = output.hidden_states[-2]
        scaled = z * weights[None, :, None]
        hidden.append(scaled * (z.mean() / scaled.mean()))
        pooled = output[0] if pooled is None else pooled
    return torch.cat(hidden, dim=1), pooled


def embeds(pipeline: StableDiffusionXLPipeline, prompt: str, negative: str) -> dict[str, torch.Tensor]:
    """The four tensors that the pipeline takes in the place of texts, of one length."""
    stages = [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]
    both = [[encode(text, *stage) for stage in stages] for text in (prompt, negative)]
    empty = torch.cat([encode("", *stage)[0] for stage in stages], dim=2)
    rows = []
    for encoded in both:
        parts = [hidden for hidden, _ in encoded]
        most = max(part.shape[1] for part in parts)
        for index, part in enumerate(parts):  # the tokenizers are alike, but a stage may end a chunk earlier
            missing = (most - part.shape[1]) // (CHUNK + 2)
            parts[index] = torch.cat([part, encode("", *stages[index])[0].repeat(1, missing, 1)], dim=1)
        rows.append(torch.cat(parts, dim=2))
    most = max(row.shape[1] for row in rows)
    rows = [torch.cat([row, empty.repeat(1, (most - row.shape[1]) // (CHUNK + 2), 1)], dim=1) for row in rows]
    return {
        "prompt_embeds": rows[0],
        "negative_prompt_embeds": rows[1],
        "pooled_prompt_embeds": both[0][-1][1],
        "negative_pooled_prompt_embeds": both[1][-1][1],
    }
