"""How the model that ships is trained, from its renderer to its weights: the autoencoder first, then the UNet with its text tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import blocks
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import FileError
from ldm.fast import fast_group_norms
from ldm.model import LatentDiffusion
from ldm.tokenizer import tokenize
from ldm.train import Settings, diffusion_loss, fit, vae_loss
from ldm.vae import VAE

BLOCKS = ModelConfig(
    "blocks",
    unet=UNetConfig(
        model_channels=64, channel_mult=(1, 2, 3), num_res_blocks=1, context_dim=64, heads=None, head_dim=32,
        down_depth=((0,), (1,), (1,)), up_depth=((1, 1), (1, 1), (0, 0)), cross_only=(False, False, False),
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, scale=1.0),
    text=(TextConfig(length=32, width=64, layers=4, heads=4, mlp=256),),
    size=128,
)  # fmt: skip

VAE_SETTINGS = Settings(steps=7000, batch=2, lr=1e-3, warmup=200, decay=0.3, ema=0.998, save_every=500)
DIFFUSION_SETTINGS = Settings(steps=7500, batch=16, lr=8e-4, warmup=200, decay=0.3, ema=0.998, save_every=100)

KL_WEIGHT = 5e-4
SCENES = 16_000  # pictures whose latents the UNet learns from
CAPTIONS = 4  # ways each of them is described
DROPOUT = 0.1  # share of examples without caption, for guidance (Ho & Salimans 2022, algorithm 1)
SNR_LIMITS = (0.2, 5.0)  # the upper one from Hang et al. 2023, section 4
READING = 0.1  # weight of the reader's loss beside the UNet's

Log = Callable[[dict[str, float]], None]


# --- the autoencoder ------------------------------------------------------------------------------------------------

def vae_step(vae: nn.Module, seeds: Iterable[int], generator: torch.Generator, *, crops: bool, kl_weight: float = KL_WEIGHT) -> Tensor:
    """`vae_loss` on the scenes of these seeds: on whole pictures, or on four crops of half the size from each.

    Crops lie where the solids are: at the same cost they hold three times as much of what is hard.
    """
    image = blocks.batch(seeds)[0]
    if crops:
        half = image.shape[1] // 2
        top, left = (torch.randint(half // 4, 3 * half // 4 + 1, (4 * len(image),), generator=generator).tolist() for _ in range(2))
        image = np.stack([image[i // 4, y : y + half, x : x + half] for i, (y, x) in enumerate(zip(top, left, strict=True))])
    device = vae.quant_conv.weight.device
    picture = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    size = picture.shape[2] // vae.config.factor
    noise = torch.randn(len(picture), vae.config.z_channels, size, size, generator=generator)
    return vae_loss(vae, picture.to(device), noise.to(device), kl_weight)


def train_vae(out: Path, settings: Settings = VAE_SETTINGS, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, on_log: Log = print) -> VAE:
    """Train the autoencoder in directory `out`; write its averaged weights to `out`/vae.safetensors. Resumes an interrupted run.

    Most updates see crops, those in which the learning rate falls see whole pictures. Scenes are rendered as they are needed, never twice.
    """
    torch.manual_seed(settings.seed)
    vae = VAE(BLOCKS.vae).to(device)
    if device == "cpu":
        fast_group_norms(vae)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        seeds = range(step * settings.batch, (step + 1) * settings.batch)
        return vae_step(vae, seeds, generator, crops=step < (1 - settings.decay) * settings.steps)

    averaged = fit(dict(vae.named_parameters()), loss, settings, out, device=device, dtype=dtype, on_log=on_log)
    save_file({name: tensor.cpu() for name, tensor in averaged.items()}, out / "vae.safetensors")
    return vae


# --- the latents ----------------------------------------------------------------------------------------------------


def load_vae(path: Path) -> VAE:
    """The autoencoder that `train_vae` left in the directory `path`, scale 1. Raises FileError if there is none."""
    file = path / "vae.safetensors"
    if not file.exists():
        raise FileError("holds no trained autoencoder (vae.safetensors); run 'ldm train vae' first", path=path)
    vae = VAE(BLOCKS.vae)
    vae.load_state_dict(load_file(file))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_scenes(vae: VAE, scenes: int, cache: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, on_log: Log = print) -> tuple[Tensor, Tensor]:
    """Latent means [n, 4, 16, 16] float16, unscaled, and token ids [n, CAPTIONS, length] of the scenes with seeds 0 to n - 1.

    Kept in the file `cache`, which is made if it is not there.
    """
    if cache.exists():
        kept = load_file(cache)
        if len(kept["latents"]) == scenes:
            return kept["latents"], kept["ids"]
    latents, ids = [], []
    vae = vae.to(device)
    for first in range(0, scenes, 64):
        seeds = range(first, min(first + 64, scenes))
        pictures = torch.from_numpy(blocks.batch(seeds)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            latents.append(vae.encode(pictures.to(device)).half().cpu())
        captions = [blocks.caption(blocks.sample(seed), seed + k * scenes) for seed in seeds for k in range(CAPTIONS)]
        ids.append(tokenize(captions, BLOCKS.text[0].length, BLOCKS.text[0].pad).view(len(seeds), CAPTIONS, -1).int())
        if first % 3200 == 0:
            on_log({"encoded": first})
    result = {"latents": torch.cat(latents).contiguous(), "ids": torch.cat(ids)}
    save_file(result, cache)
    return result["latents"], result["ids"]


# --- the UNet and the text tower ------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Names a scene from the text tower's end token. Trained beside the UNet, so that the tower learns early who stands where; not kept."""

    def __init__(self, width: int):
        super().__init__()
        self.kinds, self.places = (len(blocks.COLORS), 1 + len(blocks.SHAPES)), (len(blocks.COLORS) ** 2, 2 + len(blocks.RELATIONS))
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, math.prod(self.kinds) + math.prod(self.places)))

    def forward(self, pooled: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy per caption, in nats: pooled [b, width], `facts_of` the scenes [b, colours + colours squared]."""
        kinds, places = self.layers(pooled).float().split([math.prod(self.kinds), math.prod(self.places)], dim=1)
        answers = torch.cat([F.pad(kinds.view(-1, *self.kinds), (0, self.places[1] - self.kinds[1]), value=-torch.inf), places.view(-1, *self.places)], dim=1)
        return F.cross_entropy(answers.flatten(0, 1), facts.flatten().long(), reduction="sum") / len(facts)


def facts_of(scene: blocks.Scene) -> Tensor:
    """For each colour: no solid (0) or which of SHAPES; for each two colours: nothing said (0), which of RELATIONS, or under (6)."""
    colors, under = list(blocks.COLORS), 1 + len(blocks.RELATIONS)
    kinds, places = torch.zeros(len(colors), dtype=torch.uint8), torch.zeros(len(colors), len(colors), dtype=torch.uint8)
    for solid in scene.solids:
        kinds[colors.index(solid.color)] = 1 + blocks.SHAPES.index(solid.shape)
    for a, relation, b in scene.pairs():
        i, j = colors.index(a.color), colors.index(b.color)
        places[i, j] = 1 + blocks.RELATIONS.index(relation)
        places[j, i] = 1 + blocks.RELATIONS.index(blocks.INVERSE[relation]) if relation in blocks.INVERSE else under
    return torch.cat([kinds, places.flatten()])


def initialise(model: LatentDiffusion) -> None:
    """CLIP's initial embeddings (Radford et al. 2021: std 0.02 and 0.01); the rest stays as the modules made it."""
    for tower in model.text:
        nn.init.normal_(tower.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(tower.text_model.embeddings.position_embedding.weight, std=0.01)


def train_diffusion(
    vae_dir: Path, out: Path, settings: Settings = DIFFUSION_SETTINGS, *, scenes: int = SCENES, device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16, on_log: Log = print,
) -> LatentDiffusion:  # fmt: skip
    """Train UNet and text tower together on the latents of rendered scenes, in directory `out`; return the model with averaged weights.

    vae_dir  where `train_vae` left the autoencoder
    Resumes an interrupted run.
    """
    vae = load_vae(vae_dir)
    latents, ids = encode_scenes(vae, scenes, out.with_name(out.name + "-latents.safetensors"), device=device, dtype=dtype, on_log=on_log)
    scale = 1 / latents.float().std().item()
    latents, ids = (latents.float() * scale).to(device), ids.to(device)
    torch.manual_seed(settings.seed)
    model = LatentDiffusion(replace(BLOCKS, vae=replace(BLOCKS.vae, scale=scale)))
    model.vae.load_state_dict(vae.state_dict())
    model.vae.requires_grad_(False)
    initialise(model)
    model.to(device)
    if device == "cpu":
        fast_group_norms(model)
    alphas = torch.tensor(model.schedule.alphas_cumprod, dtype=torch.float64).float().to(device)
    empty = tokenize([""], BLOCKS.text[0].length, BLOCKS.text[0].pad).to(device)
    reader = Reader(BLOCKS.text[0].width).to(device)
    facts = torch.stack([facts_of(blocks.sample(seed)) for seed in range(scenes)]).to(device)
    weights = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        b = settings.batch
        rows, which = (torch.randint(n, (b,), generator=generator).to(device) for n in (len(latents), CAPTIONS))
        t = ((torch.arange(b) + torch.rand(b, generator=generator)) / b * model.config.schedule.steps).long().to(device)  # spread: Kingma et al. 2021, I.1
        drop = (torch.rand(b, generator=generator) < DROPOUT).to(device)
        x0 = latents[rows]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        tokens, pooled = model.text[0](torch.cat([ids[rows].flatten(0, 1).long(), empty]))
        context = tokens[torch.where(drop, b * CAPTIONS, torch.arange(b, device=device) * CAPTIONS + which)]
        told = diffusion_loss(lambda x, t: model.unet(x, t, context), x0, t, noise, alphas, snr_limits=SNR_LIMITS)
        return told + READING * reader(pooled[:-1], facts[rows].repeat_interleave(CAPTIONS, dim=0))

    parameters = weights | {f"reader.{name}": p for name, p in reader.named_parameters()}
    averaged = fit(parameters, loss, settings, out, device=device, dtype=dtype, on_log=on_log)
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(averaged[name])
    return model.eval().requires_grad_(False)
