"""Trains the demo model, stage by stage, and writes it to `models/demo`.

    python torchscript/demo/train.py                      every stage that is not done yet
    python torchscript/demo/train.py vae unet             these stages

A stage writes a checkpoint to the work folder every 500 steps and goes on from it; a sheet of samples is there too. The
stages, each resting on what the ones before wrote: `vae`; `unet` with both text encoders; `union` and `canny`,
the control nets; `lora`, outlines. On two CPU cores they take hours.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
CONTROL_SCENES = 3_000  # with maps
LORA_SCENES = 1_500
CAPTIONS = 4  # different ones of each scene
CROP = 64  # pixels; enough to learn a VAE from
DECAY = 0.999  # of the averaged weights
NO_TEXT = 0.1  # the share of samples without a prompt, for guidance
SNR = 5.0  # signal-to-noise ratios above this count less
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


STAGES = {
    "vae": Stage(8_000, 8, 2e-3),
    "unet": Stage(12_000, 16, 1e-3),
    "union": Stage(5_000, 24, 1e-3),
    "canny": Stage(2_000, 24, 1e-3),
    "lora": Stage(800, 32, 2e-3),
}

Loss = Callable[[np.random.Generator, torch.Generator, int], torch.Tensor]


def fit(name: str, stage: Stage, work: Path, module: nn.Module, loss: Loss) -> None:
    """Trains what requires a gradient; leaves the average of the last steps' weights in the module."""
    parameters = {key: p for key, p in module.named_parameters() if p.requires_grad}
    average = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    file = work / f"{name}.checkpoint.pt"
    first = 0
    if file.exists():
        saved = torch.load(file)
        first, average = saved["step"], saved["average"]
        module.load_state_dict(saved["weights"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    bar = tqdm(range(first, stage.steps), initial=first, total=stage.steps, desc=name, smoothing=0.05, mininterval=5)
    mean = 0.0
    for step in bar:
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 200)
            group["lr"] = stage.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))
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
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255 * (1 - low) + low


@torch.no_grad()
def encode(vae: nn.Module, images: np.ndarray) -> torch.Tensor:
    """The pictures' latents as the UNet sees them, float32 (N, 4, 16, 16)."""
    batches = tqdm(range(0, len(images), 64), desc="latents", mininterval=5)
    means = [vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean for i in batches]
    return torch.cat(means) * model.SCALING


class Prompts:
    """Captions of scenes as token ids, several of each: int64 (N * captions, 77) for each encoder."""

    def __init__(self, of: list[world.Scene], work: Path, place: float = 1.0) -> None:
        rng = np.random.default_rng(SEED)
        texts = [world.caption(scene, rng, place=rng.random() < place) for scene in of for _ in range(CAPTIONS)]
        self.ids, self.ids_2 = tokenize(work, texts)

    def pick(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.from_numpy(rows * CAPTIONS + rng.integers(CAPTIONS, size=len(rows)))
        return self.ids[at], self.ids_2[at]


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
    of = scenes(SCENES, 0)
    images = drawn(work, "scenes", picture, of)
    vae = model.vae()

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
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
        y = vae.decode(z).sample
        slopes = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(y, x) + F.mse_loss(y, x) + slopes + 1e-4 * posterior.kl().mean() / z[0].numel()

    fit("vae", stage, work, vae, loss)
    standardize(vae, images[:512])
    model.save_vae(out, vae)
    with torch.no_grad():
        shown = to_tensor(images[:8])
        back = vae.decode(vae.encode(shown).latent_dist.mean).sample
    world.tile([list(images[:8]), to_pixels(back)]).save(work / "vae.png")


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
    return list(world.to_bytes((images * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()))


# --- The UNet and what is trained beside it ---------------------------------------------------------------------------

ALPHAS = DDPMScheduler.from_config(model.VARIANT.scheduler).alphas_cumprod


def diffusion_loss(
    latents: torch.Tensor, noise: torch.Generator, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The error of the predicted velocity. Weighed so that steps with little noise do not outweigh the others."""
    timesteps = torch.randint(len(ALPHAS), (len(latents),), generator=noise)
    alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
    epsilon = torch.randn(latents.shape, generator=noise)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * epsilon
    velocity = alpha.sqrt() * epsilon - (1 - alpha).sqrt() * latents
    weight = 1 / (1 + alpha / (1 - alpha) / SNR)
    return (weight * (predict(noisy, timesteps) - velocity) ** 2).mean()


def keep_mask(noise: torch.Generator, batch: int) -> torch.Tensor:
    return (torch.rand(batch, generator=noise) >= NO_TEXT).float()


def train_unet(stage: Stage, work: Path, out: Path) -> None:
    of = scenes(SCENES, 0)
    vae = model.load_vae(out)
    latents, prompts = encode(vae, drawn(work, "scenes", picture, of)), Prompts(of, work)
    parts = model.denoiser().train()

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        rows = rng.integers(len(latents), size=batch)
        hidden, pooled = model.embed(parts, *prompts.pick(rows, rng))
        keep = keep_mask(noise, batch)
        hidden, pooled = hidden * keep.view(-1, 1, 1), pooled * keep.view(-1, 1)

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return parts["unet"](noisy, timesteps, hidden, added_cond_kwargs=model.conditions(pooled)).sample

        return diffusion_loss(latents[rows], noise, predict)

    fit("unet", stage, work, parts, loss)
    model.save_pipeline(out, {**parts, "vae": vae})
    samples(out).save(work / "unet.png")


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


@torch.no_grad()
def embedded(parts: nn.ModuleDict, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Every caption's embeddings, hidden states in bfloat16 to save memory."""
    found = []
    for i in tqdm(range(0, len(prompts.ids), 128), desc="captions", mininterval=5):
        hidden, pooled = model.embed(parts, prompts.ids[i : i + 128], prompts.ids_2[i : i + 128])
        found.append((hidden.bfloat16(), pooled))
    return torch.cat([hidden for hidden, _ in found]), torch.cat([pooled for _, pooled in found])


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
    latents = encode(model.load_vae(out), images[:, 0])
    parts = model.load_denoiser(out)
    hidden, pooled = embedded(parts, Prompts(of, work, place=0.4))
    unet, net = parts["unet"], model.controlnet(name, parts["unet"])
    people = np.flatnonzero([any(thing.shape == "person" for thing in scene.things) for scene in of])

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        if name == "union":
            modes = rng.choice(6, size=2 if rng.random() < 0.25 else 1, replace=False)
        else:
            modes = np.array([world.CONTROLS.index("canny")])
        rows = people[rng.integers(len(people), size=batch)] if 0 in modes else rng.integers(len(of), size=batch)
        maps = [to_tensor(images[rows, 1 + mode], low=0.0) for mode in modes]
        captions = torch.from_numpy(rows * CAPTIONS + rng.integers(CAPTIONS, size=batch))
        keep = keep_mask(noise, batch)
        text = hidden[captions].float() * keep.view(-1, 1, 1)
        added = model.conditions(pooled[captions] * keep.view(-1, 1))
        types = torch.zeros(batch, 6)
        types[:, modes] = 1
        options = {"control_type": types, "control_type_idx": modes.tolist()} if name == "union" else {}

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            told = {"added_cond_kwargs": added, "encoder_hidden_states": text}
            cond = maps if name == "union" else maps[0]
            down, mid = net(noisy, timesteps, controlnet_cond=cond, return_dict=False, **told, **options)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            return unet(noisy, timesteps, **told, **residuals).sample

        return diffusion_loss(latents[rows], noise, predict)

    if name == "union":
        with by_itself(net):
            fit(name, stage, work, net, loss)
    else:
        fit(name, stage, work, net, loss)
    model.save_controlnet(out / "controlnets" / name, net)


def train_lora(stage: Stage, work: Path, out: Path) -> None:
    of = scenes(LORA_SCENES, 2)
    latents = encode(model.load_vae(out), drawn(work, "outlines", outlines, of))
    parts = model.load_denoiser(out)
    hidden, pooled = embedded(parts, Prompts(of, work))
    unet = parts["unet"]
    unet.add_adapter(
        LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
    )

    def loss(rng: np.random.Generator, noise: torch.Generator, batch: int) -> torch.Tensor:
        rows = rng.integers(len(of), size=batch)
        captions = torch.from_numpy(rows * CAPTIONS + rng.integers(CAPTIONS, size=batch))
        keep = keep_mask(noise, batch)
        text = hidden[captions].float() * keep.view(-1, 1, 1)
        added = model.conditions(pooled[captions] * keep.view(-1, 1))

        def predict(noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return unet(noisy, timesteps, text, added_cond_kwargs=added).sample

        return diffusion_loss(latents[rows], noise, predict)

    fit("lora", stage, work, unet, loss)
    adapter = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    model.save_lora(out / "loras" / "outlines.safetensors", {f"unet.{key}": value for key, value in adapter.items()})
    samples(out, "outlines.safetensors").save(work / "lora.png")


TRAIN: dict[str, Callable[[Stage, Path, Path], None]] = {
    "vae": train_vae,
    "unet": train_unet,
    "union": lambda *arguments: train_controlnet("union", *arguments),
    "canny": lambda *arguments: train_controlnet("canny", *arguments),
    "lora": train_lora,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], default=[], help="all, when none is named")
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--work", type=Path, default=Path("target/demo"), help="checkpoints, cached data and samples")
    parser.add_argument("--steps", type=int, help="in place of a stage's own number, to try things")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # weights near zero slow a CPU down
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in arguments.stages or STAGES:
        torch.manual_seed(SEED)
        stage = STAGES[name]
        TRAIN[name](Stage(arguments.steps or stage.steps, stage.batch, stage.rate), arguments.work, arguments.out)


if __name__ == "__main__":
    main()
