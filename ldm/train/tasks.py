"""The tasks that networks learn: from a batch and its draws to the loss of each example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning.cond import Sizes, vector
from ldm.conditioning.prompts import Embedding, encode_text
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.dpt import depth_map, normalised_depth
from ldm.networks.vae import VAE
from ldm.networks.vision import preprocess
from ldm.pictures.masks import cells
from ldm.train import losses
from ldm.train.data.batch import Batch
from ldm.train.data.holes import hole
from ldm.train.draws import Draws
from ldm.train.recipe import Objective

CONCATENATED = {"mask", "masked_image", "depth"}  # inputs that can be made from a picture


class Loss(NamedTuple):
    """The losses of a batch's examples."""

    each: Tensor  # [b] float32, weighted: their mean is minimised
    t: Tensor | None = None  # [b] timesteps, if the task has any
    steps: int = 1  # of the noise schedule


@dataclass(frozen=True)
class Prepared:
    """The inputs of the UNet for a batch, and its target."""

    x: Tensor  # [b, in_channels, h, w] noisy latent and the inputs concatenated to it
    t: Tensor  # [b] int64 timesteps
    context: Tensor  # [b, n, d]
    y: Tensor | None  # [b, vector_dim]
    target: Tensor  # [b, c, h, w]
    weight: Tensor  # [b]


class Task(nn.Module):
    """A network with what it learns: `task(batch, draws) -> Loss`."""

    levels = 1  # of noise; 1 for an autoencoder, which has none

    def at(self, batch: Batch, draws: Draws, t: Tensor) -> Loss:
        """The loss at given timesteps [b], which a task without noise levels ignores."""
        return self(batch, draws, t)


class Diffusion(Task):
    """Denoising score matching of a latent diffusion model with its own conditioning (Rombach et al. 2022, eq. 3)."""

    alphas: Tensor  # alpha_bar of every timestep

    def __init__(
        self,
        model: LatentDiffusion,
        objective: Objective,
        *,
        batch: int = 1,
        trains_text: bool = False,
        embeddings: Sequence[Embedding] = (),
    ):
        """
        batch        examples per update, for `timesteps = "spread"`
        trains_text  gradients flow into the text towers and `embeddings`; otherwise the towers are run without
        Raises ArgumentError for a model whose inputs cannot be made from a picture (the upscaler's).
        """
        super().__init__()
        if not CONCATENATED.issuperset(model.config.concat) or model.config.unet.noise_levels is not None:
            what = f"family {model.config.name}: its inputs ({', '.join(model.config.concat)}) are not trained here"
            raise ArgumentError(f"{what}; use a text, inpainting, depth or image model")
        self.model, self.objective, self.batch = model, objective, batch
        self.trains_text, self.embeddings = trains_text, tuple(embeddings)
        self.levels = model.config.schedule.steps
        alphas = torch.tensor(model.schedule.alphas_cumprod, dtype=torch.float64).float()
        self.register_buffer("alphas", alphas, persistent=False)

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each example: at drawn timesteps with the objective, or, to compare runs, plain at `t` [b]."""
        inputs = self.prepare(batch, draws, t)
        return self.weigh(self.model.unet(inputs.x, inputs.t, inputs.context, inputs.y), inputs)

    def weigh(self, out: Tensor, inputs: Prepared) -> Loss:
        """The weighted squared error of a prediction, mean over its values."""
        each = (out.float() - inputs.target).square().mean(dim=(1, 2, 3))
        return Loss(each * inputs.weight, inputs.t, self.levels)

    def timesteps(self, draws: Draws) -> Tensor:
        """[b] int64: each drawn alone, or one from each of `batch` equal parts (Kingma et al. 2021, appendix I.1).

        Which example has which part is drawn, too: where every other micro-batch is of a prior, both kinds shall see
        all noise levels.
        """
        steps = self.levels
        if self.objective.timesteps == "uniform":
            return draws.integers("timestep", steps)
        places = draws.places("part", self.batch) + draws.uniform("timestep")
        return (places / self.batch * steps).long().clamp(max=steps - 1)

    def prepare(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Prepared:
        """The UNet's inputs and target; `t` as in `forward`. The frozen networks run in float32, without gradient."""
        device, objective = self.alphas.device, self.objective if t is None else Objective()
        t = (self.timesteps(draws) if t is None else t).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x0 = self.latent(batch, draws)
            noise = draws.normal("noise", x0.shape[1:]).to(device)
            if objective.noise_offset:
                noise = noise + objective.noise_offset * draws.normal("offset", (x0.shape[1], 1, 1)).to(device)
            alpha = self.alphas[t]
            target = losses.target(self.model.config.prediction, x0, noise, alpha)
            if objective.input_perturbation:
                noise = noise + objective.input_perturbation * draws.normal("perturbation", x0.shape[1:]).to(device)
            concat = self.concat(batch, draws, x0)
            x = torch.cat([losses.noised(x0, noise, alpha), *concat], dim=1)
            weight = batch.weight.to(device)
            if objective.min_snr or objective.least_snr:
                limits = objective.least_snr, objective.min_snr or torch.inf
                weight = weight * losses.snr_weight(self.model.config.prediction, alpha, *limits)
        context, y = self.condition(batch, draws.uniform("caption") < objective.caption_dropout)
        return Prepared(x, t, context, y, target, weight)

    def latent(self, batch: Batch, draws: Draws) -> Tensor:
        """Scaled latents [b, c, h, w], samples of the autoencoder's posterior as in the original training."""
        vae, device = self.model.vae, self.alphas.device
        moments = vae.moments(pixels(batch).to(device)) if batch.moments is None else batch.moments.to(device)
        return vae.latent(moments, draws.normal("posterior", (moments.shape[1] // 2, *moments.shape[2:])).to(device))

    def concat(self, batch: Batch, draws: Draws, x0: Tensor) -> list[Tensor]:
        """What joins the latent at the UNet's input: a mask, the picture with a grey hole where it is, depth."""
        kinds, vae, device = self.model.config.concat, self.model.vae, self.alphas.device
        made: dict[str, Tensor] = {}
        if {"mask", "masked_image"} & set(kinds):
            holes = [hole(*batch.size, g, self.objective.whole_hole) for g in draws.generators("hole")]
            mask = torch.stack(holes).to(device)
            made["mask"] = cells(mask, vae.config.factor, any_pixel=False)
        if "masked_image" in kinds:
            noise = draws.normal("masked posterior", x0.shape[1:]).to(device)
            made["masked_image"] = vae.encode(pixels(batch).to(device) * (mask < 0.5), noise)
        if "depth" in kinds:
            made["depth"] = self.depth(batch, (x0.shape[2], x0.shape[3]))
        return [made[kind] for kind in kinds]

    def depth(self, batch: Batch, size: tuple[int, int]) -> Tensor:
        """[b, 1, h, w] in [-1, 1]: the maps beside the pictures, or the estimate of the model's own network."""
        device = self.alphas.device
        if batch.depth is not None:
            return normalised_depth(batch.depth.to(device), size)
        if self.model.depth is None:
            raise ArgumentError("this model holds no depth network; put depth maps into depth/ beside the pictures")
        return depth_map(self.model.depth, pixels(batch).to(device), size)

    def condition(self, batch: Batch, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """Context [b, n, d] and vector [b, vector_dim] of each example, those of the empty caption where `drop` [b]."""
        config, device = self.model.config, self.alphas.device
        dropped = drop.to(device)
        if self.model.vision is not None and config.vision is not None:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                image = preprocess(pixels(batch), "original", config.vision.image).to(device)
                return self.model.vision(image)[:, None] * ~dropped[:, None, None], None
        pooled: Tensor | None
        if batch.context is None:
            rows = zip(batch.captions, drop.tolist(), strict=True)
            context, pooled = self._text(["" if is_dropped else caption for caption, is_dropped in rows])
        else:
            context, pooled = batch.context.to(device), None if batch.pooled is None else batch.pooled.to(device)
            if drop.any():
                empty, empty_pooled = self._text([""])
                context = torch.where(dropped[:, None, None], empty, context)
                pooled = None if pooled is None else torch.where(dropped[:, None], empty_pooled, pooled)
        if config.zero_empty:
            context = context * ~dropped[:, None, None]
            pooled = None if pooled is None else pooled * ~dropped[:, None]
        return context, self._vector(pooled, batch.sizes, batch.size)

    def _text(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens and pooled embedding of prompts, cut to the length of the tower."""
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return encode_text(self.model.text, prompts, chunks=1, embeddings=self.embeddings)

    def _vector(self, pooled: Tensor | None, sizes: Sequence[Sizes], size: tuple[int, int]) -> Tensor | None:
        dim = self.model.config.unet.vector_dim
        if dim is None or pooled is None:
            return None
        return torch.cat([vector(pooled[i : i + 1], each, size, dim) for i, each in enumerate(sizes)])


class Autoencoding(Task):
    """The autoencoder's own task: the picture from a sample of its latent, and a posterior near N(0, 1)."""

    def __init__(self, vae: VAE, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each picture; there are no timesteps."""
        config = self.vae.config
        image = pixels(batch).to(self.vae.quant_conv.weight.device)
        cells = [side // config.factor for side in batch.size]
        noise = draws.normal("posterior", (config.z_channels, *cells)).to(image)
        return Loss(losses.vae_loss(self.vae, image, noise, self.kl_weight) * batch.weight.to(image))


def places(task: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """{name: name in the task} of parameters that it holds: FSDP puts other objects under the names in the task."""
    found = {id(p): place for place, p in task.named_parameters()}
    return {name: found[id(p)] for name, p in parameters.items()}


def pixels(batch: Batch) -> Tensor:
    """The pictures [b, 3, H, W] of a batch. Raises ArgumentError where only their latents were kept."""
    if batch.image is None:
        raise ArgumentError(
            "this task needs pictures, and the batch has only their latents; set data.cache_latents to false"
        )
    return batch.image
