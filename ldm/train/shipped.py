"""How the model that ships is trained: its autoencoder first, then its UNet with its text tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ldm import blocks
from ldm.conditioning.tokenizer import tokenize
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.fast import fast_group_norms
from ldm.model import LatentDiffusion
from ldm.networks.vae import VAE
from ldm.targets import write_whole
from ldm.train.data.batch import Batch
from ldm.train.data.cache import weights_digest
from ldm.train.data.scenes import CAPTIONS, captions_of
from ldm.train.data.source import digest
from ldm.train.draws import Draws
from ldm.train.losses import noised, snr_weight, vae_loss
from ldm.train.modes import Trainee
from ldm.train.recipe import Run
from ldm.train.tasks import Loss, Task

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

# The settings of its training are the recipes blocks-vae and blocks.
KL_WEIGHT = 5e-4
DROPOUT = 0.1  # share of examples without caption, for guidance (Ho & Salimans 2022, algorithm 1)
SNR_LIMITS = (0.2, 5.0)  # the upper one from Hang et al. 2023, section 4
READING = 0.1  # weight of the reader's loss beside the UNet's
MADE_FROM = "ldm.made_from"  # in the metadata of kept latents


class SceneAutoencoding(Task):
    """`vae_loss` on rendered scenes: on whole pictures, or on four crops of half the size from each.

    Crops lie where the solids are: at the same cost they hold three times as much detail. Most of a run sees
    crops; its end, in which the learning rate falls, sees whole pictures. Scenes are rendered as they are needed, never
    twice.
    """

    def __init__(self, vae: VAE, crops: int):
        """crops: examples of the run that are seen as crops, from its beginning."""
        super().__init__()
        self.vae, self.crops = vae, crops

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each scene; an example's number is its scene's seed."""
        scenes = zip(blocks.batch(batch.index)[0], batch.index, draws.generators("crop"), strict=True)
        images = [self.views(image, i, generator) for image, i, generator in scenes]
        picture = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        of_each = len(picture) // len(batch.index)
        cells = picture.shape[2] // self.vae.config.factor
        noise = draws.normal("posterior", (of_each, self.vae.config.z_channels, cells, cells)).flatten(0, 1)
        device = self.vae.quant_conv.weight.device
        return Loss(vae_loss(self.vae, picture.to(device), noise.to(device), KL_WEIGHT).view(-1, of_each).mean(dim=1))

    def views(self, image: np.ndarray, number: int, generator: torch.Generator) -> np.ndarray:
        """The picture or crops [n, s, s, 3] of example `number`, from its scene [S, S, 3]."""
        if number >= self.crops:
            return image[None]
        half = image.shape[0] // 2
        places = torch.randint(half // 4, 3 * half // 4 + 1, (4, 2), generator=generator).tolist()
        return np.stack([image[y : y + half, x : x + half] for y, x in places])


def vae_trainee(run: Run, whole: float) -> Trainee:
    """The autoencoder of the model that ships, from nothing. `whole`: share of the updates that see whole pictures."""
    torch.manual_seed(run.seed)
    model = LatentDiffusion(BLOCKS)
    fast_group_norms(model.vae)
    task = SceneAutoencoding(model.vae, int((1 - whole) * run.steps) * run.batch)
    return Trainee.of(model, task, {f"vae.{name}": p for name, p in model.vae.named_parameters()})


@torch.no_grad()
def encode_scenes(
    vae: VAE, scenes: int, cache: Path, *, device: str = "cpu", on_batch: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, Tensor]:
    """Latent means [n, 4, 16, 16] float16, unscaled, and token ids [n, CAPTIONS, length] of scenes 0 to n - 1.

    Kept in the file `cache`, which is made anew for another autoencoder, other scenes or another renderer.
    """
    made_from = digest(weights_digest(vae.encoder, vae.quant_conv), blocks.RENDERER, f"{scenes}")
    with suppress(OSError, SafetensorError), safe_open(cache, "pt") as file:
        if (file.metadata() or {}).get(MADE_FROM) == made_from:
            return file.get_tensor("latents"), file.get_tensor("ids")
    latents, ids = [], []
    vae = vae.to(device)
    for first in range(0, scenes, 64):
        seeds = range(first, min(first + 64, scenes))
        pictures = torch.from_numpy(blocks.batch(seeds)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encode(pictures.to(device)).half().cpu())
        captions = [caption for seed in seeds for caption in captions_of(seed, scenes)]
        ids.append(tokenize(captions, BLOCKS.text[0].length, BLOCKS.text[0].pad).view(len(seeds), CAPTIONS, -1).int())
        on_batch(len(latents) * 64)
    result = {"latents": torch.cat(latents).contiguous(), "ids": torch.cat(ids)}
    write_whole(cache, save(result, {MADE_FROM: made_from}))
    return result["latents"], result["ids"]


class SceneReader(nn.Module):
    """Names the solids of a scene, and how they stand, from the text tower's end token.

    It is trained beside the UNet, so that the tower learns early to tell scenes apart, and is not kept.
    """

    def __init__(self, width: int):
        super().__init__()
        self.kinds = len(blocks.COLORS), 1 + len(blocks.SHAPES)
        self.places = len(blocks.COLORS) ** 2, 2 + len(blocks.RELATIONS)
        answers = math.prod(self.kinds) + math.prod(self.places)
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, answers))

    def forward(self, pooled: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy per caption, in nats; pooled [b, width], `facts_of` the scenes [b, colours + their square]."""
        kinds, places = self.layers(pooled).float().split([math.prod(self.kinds), math.prod(self.places)], dim=1)
        missing = self.places[1] - self.kinds[1]
        padded = F.pad(kinds.view(-1, *self.kinds), (0, missing), value=-torch.inf)
        answers = torch.cat([padded, places.view(-1, *self.places)], dim=1)
        return F.cross_entropy(answers.flatten(0, 1), facts.flatten().long(), reduction="sum") / len(facts)


def facts_of(scene: blocks.Scene) -> Tensor:
    """For each colour: no solid (0) or one of SHAPES; for each two: no relation (0), one of RELATIONS, or under (6)."""
    colors, under = list(blocks.COLORS), 1 + len(blocks.RELATIONS)
    kinds = torch.zeros(len(colors), dtype=torch.uint8)
    places = torch.zeros(len(colors), len(colors), dtype=torch.uint8)
    for solid in scene.solids:
        kinds[colors.index(solid.color)] = 1 + blocks.SHAPES.index(solid.shape)
    for a, relation, b in scene.pairs():
        i, j = colors.index(a.color), colors.index(b.color)
        places[i, j] = 1 + blocks.RELATIONS.index(relation)
        places[j, i] = 1 + blocks.RELATIONS.index(blocks.INVERSE[relation]) if relation in blocks.INVERSE else under
    return torch.cat([kinds, places.flatten()])


def initialise(model: LatentDiffusion) -> None:
    """CLIP's initial embeddings (Radford et al. 2021: std 0.02 and 0.01); the rest stays as the modules made it."""
    for name, weight in model.text.named_parameters():
        if name.endswith(("token_embedding.weight", "position_embedding.weight")):
            nn.init.normal_(weight, std=0.02 if "token" in name else 0.01)


class SceneDiffusion(Task):
    """The diffusion loss of rendered scenes with a text tower that learns too, and the reader's beside it."""

    latents: Tensor
    ids: Tensor
    facts: Tensor
    empty: Tensor  # token ids of the empty caption
    alphas: Tensor  # alpha_bar of every timestep

    def __init__(self, model: LatentDiffusion, latents: Tensor, ids: Tensor, batch: int):
        """
        latents  [n, 4, 16, 16] of the scenes with seeds 0 to n - 1, scaled
        ids      [n, CAPTIONS, length] their token ids
        batch    examples per update
        """
        super().__init__()
        self.model, self.reader, self.batch = model, SceneReader(BLOCKS.text[0].width), batch
        self.levels = model.config.schedule.steps
        facts = torch.stack([facts_of(blocks.sample(seed)) for seed in range(len(latents))])
        empty = tokenize([""], BLOCKS.text[0].length, BLOCKS.text[0].pad)
        alphas = torch.tensor(model.schedule.alphas_cumprod, dtype=torch.float64).float()
        buffers = {"latents": latents, "ids": ids, "facts": facts, "empty": empty, "alphas": alphas}
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each example: a scene, one of its captions or none, a noise level from its part of all."""
        b, device, steps = len(draws), self.latents.device, self.levels
        rows = draws.integers("scene", len(self.latents)).to(device)
        which = draws.integers("caption", CAPTIONS).to(device)
        parts = torch.tensor([i % self.batch for i in draws.index]) + draws.uniform("timestep")
        t = (parts / self.batch * steps).long().to(device)  # spread: Kingma et al. 2021, I.1
        drop = (draws.uniform("drop") < DROPOUT).to(device)
        x0 = self.latents[rows]
        noise = draws.normal("noise", x0.shape[1:]).to(device)
        tokens, pooled = self.model.text[0](torch.cat([self.ids[rows].flatten(0, 1).long(), self.empty]))
        context = tokens[torch.where(drop, b * CAPTIONS, torch.arange(b, device=device) * CAPTIONS + which)]
        alpha = self.alphas[t]
        out = self.model.unet(noised(x0, noise, alpha), t, context).float()
        denoised = (out - noise).square().mean(dim=(1, 2, 3)) * snr_weight("eps", alpha, *SNR_LIMITS)
        read = self.reader(pooled[:-1], self.facts[rows].repeat_interleave(CAPTIONS, dim=0))
        return Loss(denoised + READING * read, t, steps)


def diffusion_trainee(run: Run, vae: VAE, scenes: int, cache: Path, *, device: str = "cpu") -> Trainee:
    """The UNet and text tower of the model that ships, from nothing, on latents of `vae`, kept in the file `cache`."""
    latents, ids = encode_scenes(vae, scenes, cache, device=device)
    scale = 1 / (latents.float().std().item() if len(latents) > 1 else 1.0)
    torch.manual_seed(run.seed)
    model = LatentDiffusion(replace(BLOCKS, vae=replace(BLOCKS.vae, scale=scale)))
    model.vae.load_state_dict(vae.state_dict())
    model.requires_grad_(False)
    initialise(model)
    fast_group_norms(model)
    task = SceneDiffusion(model, latents.float() * scale, ids, run.batch)
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("vae.")}
    return Trainee.of(model, task, parameters | {f"reader.{name}": p for name, p in task.reader.named_parameters()})
