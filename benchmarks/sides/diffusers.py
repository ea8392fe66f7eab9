"""diffusers' side: as it comes, and by its own guide to fast inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.sides.cells import (
    DTYPES,
    GRID,
    GUIDANCE,
    NEGATIVE,
    PROMPT,
    Cell,
    Job,
    Side,
    config_of,
    inputs,
    levels,
    seeds,
)
from samplers import seeded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def diffusers(job: Job) -> Side:
    """diffusers as it comes."""
    return theirs(job, pipeline(job))


def diffusers_best(job: Job) -> Side:
    """diffusers by its guide to fast inference: channels last, fused q, k and v, UNet and decoder compiled."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    for name in ("conv_1x1_as_mm", "coordinate_descent_tuning", "coordinate_descent_check_all_directions"):
        setattr(inductor, name, True)
    inductor.epilogue_fusion = False
    inductor.freezing = job.device == "cpu"  # frozen weights are what the backend for CPUs is made for
    pipe = pipeline(job)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    pipe.fuse_qkv_projections()
    dynamo.recompile_limit = 1000  # every cell has shapes of its own, for which it is compiled anew
    pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True, dynamic=False)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True, dynamic=False)
    return theirs(job, pipe)


def pipeline(job: Job) -> DiffusionPipeline:
    """diffusers' pipeline for the folder, quiet."""
    import diffusers as library
    from transformers.utils import logging

    for each in (library.logging, logging):
        each.set_verbosity_error()
        each.disable_progress_bar()
    dtype = DTYPES[job.dtype]
    pipe = library.DiffusionPipeline.from_pretrained(job.folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(job.device)


def theirs(job: Job, pipe: DiffusionPipeline) -> Side:
    """What a pipeline of diffusers does in every stage, whoever runs its networks."""
    config, dtype = config_of(job.family, tiny=job.tiny), DTYPES[job.dtype]
    towers = [tower for tower in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if tower is not None]
    schedulers = {sampler: scheduler(pipe, sampler) for sampler in GRID}

    def text(ids: tuple[Tensor, ...]) -> Tensor:
        outputs = [tower(each, output_hidden_states=True) for tower, each in zip(towers, ids, strict=True)]
        last = len(towers) == 1
        return torch.cat([out.last_hidden_state if last else out.hidden_states[-2] for out in outputs], dim=-1)

    def decode(latent: Tensor) -> Tensor:
        upcast = pipe.vae.dtype == torch.float16 and pipe.vae.config.get("force_upcast")  # as its pipelines do
        if upcast:
            pipe.vae.to(torch.float32)
        picture = pipe.vae.decode(latent.to(pipe.vae.dtype) / config.vae.scale, return_dict=False)[0]
        if upcast:
            pipe.vae.to(torch.float16)
        return picture

    def picture(cell: Cell) -> Tensor:
        pipe.scheduler = schedulers[cell.sampler]
        n, cells = cell.batch, cell.size // config.vae.factor
        noise = seeded(seeds(cell), job.device)((n, config.vae.z_channels, cells, cells)).to(dtype)
        size = {"height": cell.size, "width": cell.size, "num_inference_steps": cell.steps}
        made = pipe([PROMPT] * n, negative_prompt=[NEGATIVE] * n, latents=noise, guidance_scale=GUIDANCE, **size)
        return levels(made.images)

    def side(cell: Cell) -> Callable[[], Tensor]:
        given = inputs(config, cell, job.device, dtype)
        more: dict[str, Any] = {}
        if given.pooled is not None:
            more["added_cond_kwargs"] = {"text_embeds": given.pooled, "time_ids": given.sizes}
        return {
            "text": lambda: text(given.ids),
            "step": lambda: pipe.unet(given.x, given.t, given.context, return_dict=False, **more)[0],
            "decode": lambda: decode(given.latent),
            "picture": lambda: picture(cell),
        }[cell.stage]

    return side


def scheduler(pipe: DiffusionPipeline, sampler: str) -> Any:
    """diffusers' scheduler for one of our samplers on its grid in GRID."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if sampler == "ddim":
        options = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
        return DDIMScheduler.from_config(pipe.scheduler.config, **options)
    options = {"timestep_spacing": "trailing", "use_karras_sigmas": False, "final_sigmas_type": "zero"}
    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
