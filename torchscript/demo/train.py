"""Trains the demo model, stage by stage, and writes it to `models/demo`.

    python torchscript/demo/train.py                      every stage that is not done yet
    python torchscript/demo/train.py vae unet             these stages

A stage writes a checkpoint to the work folder every 500 steps and goes on from it; a sheet of samples is there too. The
stages, each resting on what the ones before wrote: `vae`; `unet` with both text encoders; `polish`, more of the same in
larger batches; `union` and `canny`, the control nets; `lora`, outlines; `decoder`, the VAE's other half, sharper. On two
CPU cores they take hours; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

import model
import world

SEED = 7
SCENES = 12_000  # for the VAE and the UNet
MODES = [2 / 7] + [1 / 7] * 5  # how often the union net sees each: openpose, the hardest, most
CONTROL_SCENES = 3_000  # with maps
LORA_SCENES = 1_500
CAPTIONS = 4  # different ones of each scene
CROP = 64  # pixels; enough to learn a VAE from
DECAY = 0.999  # of the averaged weights
NO_TEXT = 0.1  # the share of samples without a prompt, for guidance
SNR = 25.0  # signal-to-noise ratios above this count less
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHEET_PROMPTS = [
    "a large red star on a blue background, left",
    "a small green circle on a white background, right",
    "a large yellow heart on a purple background, center",
    "a small white square on a black background, top",
    "a large orange triangle on a gray background, bottom",
    "a large blue person waving on a yellow background, center",
    "a large purple cross on a white background with a floor, center",
    "a small red heart on the left and a large black square on the right, green background",
]


@dataclass(frozen=True)
class Stage:
    """How one part is trained."""

    steps: int
    batch: int
    rate: float
    bfloat16: bool = False


STAGES = {
    "vae": Stage(8_000, 8, 2e-3),
    "unet": Stage(12_000, 16, 1e-3),
    "polish": Stage(5_000, 32, 8e-4),
    "union": Stage(7_000, 16, 1e-3),
    "canny": Stage(2_000, 16, 1e-3),
    "lora": Stage(800, 16, 2e-3),
    "decoder": Stage(3_000, 8, 5e-4),
}

Loss = Callable[[np.random.Generator, torch.Generator, int], torch.Tensor]


def fit(name: str, stage: Stage, work: Path, module: nn.Module, loss: Loss) -> None:
    """Trains what requires a gradient; leaves the average of the last steps' weights in the module."""
    module.to(DEVICE)
    parameters = {key: p for key, p in module.named_parameters() if p.requires_grad}
    average = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    file = work / f"{name}.checkpoint.pt"
    first = 0
    if file.exists():
        saved = torch.load(file, map_location=DEVICE)
        first, average = saved["step"], saved["average"]
        module.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=name, smoothing=0.05, mininterval=5)
    mean = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 200)
            group["lr"] = stage.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
        with mixed_precision() if stage.bfloat16 else nullcontext():
            value = loss(np.random.default_rng([SEED, step]), torch.Generator().manual_seed(SEED + step), stage.batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        mean += (float(value.detach()) - mean) / min(step - first + 1, 200)
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == stage.steps:
            state = {"average": average, "weights": parameters, "optimizer": optimizer.state_dict()}
            save(file, {"step": step + 1} | state)
    module.load_state_dict(average, strict=False)
    module.cpu()


@contextmanager
def mixed_precision() -> Iterator[None]:
    """Convolutions and products in bfloat16, if asked for. A CPU's attention is faster in float32."""
    attention = F.scaled_dot_product_attention

    def in_float32(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        with torch.autocast(DEVICE.type, enabled=False):
            return attention(query.float(), key.float(), value.float(), *rest, **named)

    if DEVICE.type == "cpu":
        F.scaled_dot_product_attention = in_float32
    with torch.autocast(DEVICE.type, torch.bfloat16, cache_enabled=False):
        yield
    F.scaled_dot_product_attention = attention


def save(path: Path, value: object) -> None:
    """A file that is whole or not there."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    partial.rename(path)


# --- Data -------------------------------------------------------------------------------------------------------------


def scenes(count: int, salt: int, people: float = 0.0) -> list[world.Scene]:
    """Scenes that may be trained on; at least a share of them with a person."""
    rng = np.random.default_rng([SEED, salt])
    found: list[world.Scene] = []
    while len(found) < count:
        scene = world.random_scene(rng, shape="person" if rng.random() < people else "")
        if not world.is_held_out(scene):
            found.append(scene)
    return found


def picture(scene: world.Scene) -> np.ndarray:
    return world.draw(scene).picture


def outlines(scene: world.Scene) -> np.ndarray:
    return world.draw(scene, outlines=True).picture


def picture_and_maps(scene: world.Scene) -> np.ndarray:
    drawing = world.draw(scene)
    return np.stack([drawing.picture, *(drawing.maps[name] for name in world.CONTROLS)])


def drawn(work: Path, name: str, what: Callable[[world.Scene], np.ndarray], of: list[world.Scene]) -> np.ndarray:
    """Draws scenes on all cores, once: uint8 (N, ..., SIZE, SIZE, 3), read from the file as needed."""
    file = work / f"{name}.npy"
    if not file.exists():
        partial = file.with_suffix(".partial.npy")
        out = None
        with multiprocessing.Pool() as pool:
            images = pool.imap(what, of, chunksize=16)
            for i, image in enumerate(tqdm(images, total=len(of), desc=f"drawing {name}", mininterval=5)):
                if out is None:
                    out = np.lib.format.open_memmap(partial, "w+", np.uint8, (len(of), *image.shape))
                out[i] = image
        partial.rename(file)
    return np.load(file, mmap_mode="r")


def to_tensor(images: np.ndarray, low: float = -1.0) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) from `low` to 1."""
    return torch.from_numpy(np.array(images)).to(DEVICE).permute(0, 3, 1, 2).float() / 255 * (1 - low) + low


@torch.no_grad()
def encode(vae: nn.Module, images: np.ndarray) -> torch.Tensor:
    """The pictures' latents as the UNet sees them, float32 (N, 4, 16, 16)."""
    batches = tqdm(range(0, len(images), 64), desc="latents", mininterval=5)
    vae.to(DEVICE)
    return torch.cat([vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean for i in batches]) * model.SCALING


def tokenize(work: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    names = ["tokenizer", "tokenizer_2"]
    model.tiny_models.write_tokenizers(work, model.MERGES, names)

    def ids(name: str) -> torch.Tensor:
        tokenizer = CLIPTokenizer.from_pretrained(work / name)
        return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids

    first, second = map(ids, names)
    return first, second


# --- The VAE ----------------------------------------------------------------------------------------------------------


def train_vae(stage: Stage, work: Path, out: Path) -> None:
    vae = model.vae()
    images = fit_vae("vae", vae, stage, work)
    standardize(vae, images[:512])
    model.save_vae(out, vae.cpu())


def train_decoder(stage: Stage, work: Path, out: Path) -> None:
    vae = model.load_vae(out)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    fit_vae("decoder", vae, stage, work)
    model.save_vae(out, vae)


def fit_vae(name: str, vae: nn.Module, stage: Stage, work: Path) -> np.ndarray:
    """Returns the pictures that it learned from."""
    of = scenes(SCENES, 0)
    images = drawn(work, "scenes", picture, of)

    def crop(rng: np.random.Generator) -> np.ndarray:
        """A piece of a picture: of four, three with a thing in it."""
        row = rng.integers(len(images))
        last = world.SIZE - CROP
        x, y = rng.integers(last + 1, size=2)
        if rng.random() < 0.75:
            thing = of[row].things[rng.integers(len(of[row].things))]
            x, y = (int(np.clip(at - rng.uniform(8, CROP - 8), 0, last)) for at in (thing.x, thing.y))
        return images[row, y : y + CROP, x : x + CROP]

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        x = to_tensor(np.stack([crop(rng) for _ in range(batch)]))
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(DEVICE)
        y = vae.decode(z).sample
        slopes = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + slopes + 1e-4 * posterior.kl().mean() / z[0].numel()

    fit(name, stage, work, vae, loss)
    with torch.no_grad():
        back = vae.to(DEVICE).decode(vae.encode(to_tensor(images[:8])).latent_dist.mean).sample
    world.tile([list(images[:8]), to_pixels(back)]).save(work / f"{name}.png")
    return images


@torch.no_grad()
def standardize(vae: nn.Module, images: np.ndarray) -> None:
    """Moves each latent channel to mean 0 and deviation 1 / SCALING, inside the 1x1 convolutions at both ends."""
    latents = encode(vae, images) / model.SCALING
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * model.SCALING
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] /= scale.view(4, 1, 1, 1)
    before.bias[:4] = (before.bias[:4] - mean) / scale
    before.bias[4:] -= 2 * scale.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= scale.view(1, 4, 1, 1)


def to_pixels(images: torch.Tensor) -> list[np.ndarray]:
    return list(world.to_bytes((images * 127.5 + 127.5).permute(0, 2, 3, 1).cpu().numpy()))


# --- The UNet and what is trained beside it ---------------------------------------------------------------------------

ALPHAS = DDPMScheduler.from_config(model.VARIANT.scheduler).alphas_cumprod


@dataclass(frozen=True)
class Batch:
    """Noisy latents at random steps, what the UNet is told of them, and the velocity that it is to predict."""

    rows: np.ndarray  # which scenes
    noisy: torch.Tensor
    timesteps: torch.Tensor
    told: dict[str, Any]
    velocity: torch.Tensor
    weight: torch.Tensor

    def error(self, predicted: torch.Tensor) -> torch.Tensor:
        return (self.weight * (predicted - self.velocity) ** 2).mean()


class Examples:
    """Scenes as latents, each with several captions as token ids."""

    def __init__(self, of: list[world.Scene], latents: torch.Tensor, work: Path, place: float = 1.0) -> None:
        rng = np.random.default_rng(SEED)
        texts = [world.caption(scene, rng, place=rng.random() < place) for scene in of for _ in range(CAPTIONS)]
        self.latents, self.ids = latents, tokenize(work, texts)

    def batch(self, parts: nn.ModuleDict, rows: np.ndarray, rng: np.random.Generator, noise: torch.Generator) -> Batch:
        captions = rows * CAPTIONS + rng.integers(CAPTIONS, size=len(rows))
        hidden, pooled = model.embed(parts, *(ids[captions].to(DEVICE) for ids in self.ids))
        keep = (torch.rand(len(rows), 1, generator=noise) >= NO_TEXT).float().to(DEVICE)
        told = {
            "encoder_hidden_states": hidden * keep[..., None],
            "added_cond_kwargs": model.conditions(pooled * keep),
        }
        latents = self.latents[rows]
        timesteps = torch.randint(len(ALPHAS), (len(rows),), generator=noise)
        alpha = ALPHAS[timesteps].view(-1, 1, 1, 1).to(DEVICE)
        epsilon = torch.randn(latents.shape, generator=noise).to(DEVICE)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * epsilon
        velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * latents
        # Steps with little noise are not to outweigh the others.
        weight = 1 / (1 + alpha / (1 - alpha) / SNR)
        return Batch(rows, noisy, timesteps.to(DEVICE), told, velocity, weight)


def train_unet(stage: Stage, work: Path, out: Path) -> None:
    fit_unet("unet", model.denoiser(), stage, work, out)


def train_polish(stage: Stage, work: Path, out: Path) -> None:
    fit_unet("polish", model.load_denoiser(out).requires_grad_(True), stage, work, out)


def fit_unet(name: str, parts: nn.ModuleDict, stage: Stage, work: Path, out: Path) -> None:
    of = scenes(SCENES, 0)
    vae = model.load_vae(out)
    examples = Examples(of, encode(vae, drawn(work, "scenes", picture, of)), work)

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        x = examples.batch(parts, rng.integers(len(of), size=batch), rng, noise)
        return x.error(parts["unet"](x.noisy, x.timesteps, **x.told).sample)

    fit(name, stage, work, parts.train(), loss)
    model.save_pipeline(out, {**parts, "vae": vae.cpu()})
    samples(out).save(work / f"{name}.png")


def samples(out: Path, lora: str | None = None) -> "world.Image.Image":
    pipe = model.pipeline(out)
    if lora:
        pipe.load_lora_weights(out / "loras", weight_name=lora)
    rows = []
    for seed in (0, 1):
        generators = [torch.Generator().manual_seed(seed) for _ in SHEET_PROMPTS]
        images = pipe(SHEET_PROMPTS, generator=generators, num_inference_steps=25).images
        rows.append([np.asarray(image) for image in images])
    return world.tile(rows)


@contextmanager
def by_itself(net: nn.Module) -> Iterator[None]:
    """The union net's attention runs over the batch, which in a picture's own batch is one scene and in training many:
    here each sample attends to itself alone."""
    attentions = [block.attn for block in net.transformer_layes]
    originals = [attention.forward for attention in attentions]

    def alone(original: Callable) -> Callable:
        def forward(x: torch.Tensor, *_: torch.Tensor, **options: object) -> tuple[torch.Tensor, None]:
            flat = x.reshape(1, -1, x.shape[-1])
            return original(flat, flat, flat, **options)[0].view_as(x), None

        return forward

    for attention, original in zip(attentions, originals):
        attention.forward = alone(original)
    yield
    for attention in attentions:
        del attention.forward


def train_controlnet(name: str, stage: Stage, work: Path, out: Path) -> None:
    of = scenes(CONTROL_SCENES, 1, people=0.3)
    images = drawn(work, "controls", picture_and_maps, of)
    examples = Examples(of, encode(model.load_vae(out), images[:, 0]), work, place=0.4)
    parts = model.load_denoiser(out)
    net = model.controlnet(name, parts["unet"])
    parts.to(DEVICE)
    people = np.flatnonzero([any(thing.shape == "person" for thing in scene.things) for scene in of])

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        if name == "union":
            modes = rng.choice(6, size=2 if rng.random() < 0.25 else 1, replace=False, p=MODES)
        else:
            modes = np.array([world.CONTROLS.index("canny")])
        rows = people[rng.integers(len(people), size=batch)] if 0 in modes else rng.integers(len(of), size=batch)
        x = examples.batch(parts, rows, rng, noise)
        maps = [to_tensor(images[rows, 1 + mode], low=0.0) for mode in modes]
        types = torch.zeros(batch, 6, device=DEVICE)
        types[:, modes] = 1
        options = {"control_type": types, "control_type_idx": modes.tolist()} if name == "union" else {}
        cond = maps if name == "union" else maps[0]
        down, mid = net(x.noisy, x.timesteps, controlnet_cond=cond, return_dict=False, **x.told, **options)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return x.error(parts["unet"](x.noisy, x.timesteps, **x.told, **residuals).sample)

    with by_itself(net) if name == "union" else nullcontext():
        fit(name, stage, work, net, loss)
    model.save_controlnet(out / "controlnets" / name, net)


def train_lora(stage: Stage, work: Path, out: Path) -> None:
    of = scenes(LORA_SCENES, 2)
    examples = Examples(of, encode(model.load_vae(out), drawn(work, "outlines", outlines, of)), work)
    parts = model.load_denoiser(out).to(DEVICE)
    unet = parts["unet"]
    unet.add_adapter(
        LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
    )

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        x = examples.batch(parts, rng.integers(len(of), size=batch), rng, noise)
        return x.error(unet(x.noisy, x.timesteps, **x.told).sample)

    fit("lora", stage, work, unet, loss)
    adapter = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    model.save_lora(out / "loras" / "outlines.safetensors", {f"unet.{key}": value for key, value in adapter.items()})
    samples(out, "outlines.safetensors").save(work / "lora.png")


TRAIN: dict[str, Callable[[Stage, Path, Path], None]] = {
    "vae": train_vae,
    "unet": train_unet,
    "polish": train_polish,
    "union": lambda *arguments: train_controlnet("union", *arguments),
    "canny": lambda *arguments: train_controlnet("canny", *arguments),
    "lora": train_lora,
    "decoder": train_decoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--work", type=Path, default=Path("target/demo"), help="checkpoints, cached data and samples")
    parser.add_argument("--steps", type=int, help="in place of a stage's own number, to try things")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bfloat16", action="store_true", help="where the processor has instructions for it")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # weights near zero slow a CPU down
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in STAGES if "all" in arguments.stages else arguments.stages:
        torch.manual_seed(SEED)
        stage = replace(STAGES[name], bfloat16=arguments.bfloat16)
        if arguments.steps:
            stage = replace(stage, steps=arguments.steps)
        TRAIN[name](stage, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
