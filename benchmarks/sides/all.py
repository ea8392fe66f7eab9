"""How each side makes pictures from the same folder of weights: ours, ours made faster, diffusers, its best recipe, OpenVINO, stable-diffusion.cpp."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.sides.cells import GUIDANCE, NEGATIVE, PROMPT, SEED, Cell, config_of, inputs
from ldm.conditioning.cond import Sizes, vector
from ldm.model import LatentDiffusion
from samplers import GRIDS, Schedule, seeded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRID = {"ddim": "ddim", "dpmpp_2m": "trailing"}  # of each sampler's noise levels: those that all sides have

Side = Callable[[Cell], Callable[[], Tensor]]  # a cell -> what makes its output


class Unmeasured(Exception):
    """This side cannot do what was asked, for the reason given: not a fault of its own."""


@dataclass(frozen=True)
class Job:
    """One side, on one model."""

    side: str  # a name in SIDES
    family: str
    tiny: bool  # a narrow model of this family
    folder: str  # its weights, as diffusers stores them
    converted: str  # the same as this side needs it, made before by `benchmarks.sides.openvino`
    dtype: str  # a name in DTYPES
    device: str
    threads: int | None  # None: torch's own choice


# --- ours -------------------------------------------------------------------------------------------------------------


def ldm(job: Job) -> Side:
    """The plain, readable networks."""
    return _ours(_model(job))


def fast(job: Job) -> Side:
    """The same model made faster."""
    from ldm.fast import optimize

    return _ours(optimize(_model(job)))


def _model(job: Job) -> LatentDiffusion:
    import weights

    return weights.load(job.folder, device=job.device, dtype=DTYPES[job.dtype])


def _ours(model: LatentDiffusion) -> Side:
    from ldm.tasks import txt2img

    config = model.config

    def side(cell: Cell) -> Callable[[], Tensor]:
        given = inputs(config, cell, str(model.device), model.dtype)
        y = (
            None
            if given.pooled is None
            else vector(given.pooled, Sizes(), (cell.size, cell.size), config.unet.vector_dim)
        )
        seeds = list(range(SEED, SEED + cell.batch))
        options: dict[str, Any] = {
            "negative": NEGATIVE,
            "height": cell.size,
            "width": cell.size,
            "sampler": cell.sampler,
            "grid": GRID.get(cell.sampler),
        }
        return {
            "text": lambda: torch.cat(
                [
                    tower(ids, told.skip, told.norm)[0]
                    for tower, told, ids in zip(model.text, config.text, given.ids, strict=True)
                ],
                dim=-1,
            ),
            "step": lambda: model.unet(given.x, given.t, given.context, y),
            "decode": lambda: model.vae.decode(given.latent),
            "picture": lambda: levels(txt2img(model, PROMPT, seeds=seeds, steps=cell.steps, cfg=GUIDANCE, **options)),
        }[cell.stage]

    return side


def levels(pictures: list[Image.Image]) -> Tensor:
    """[b, H, W, 3] uint8."""
    return torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))


# --- diffusers --------------------------------------------------------------------------------------------------------


def diffusers(job: Job) -> Side:
    """diffusers as it comes."""
    return theirs(job, pipeline(job))


def diffusers_best(job: Job) -> Side:
    """diffusers with what its guide to fast inference adds up to: channels last, fused q, k and v, and UNet and decoder compiled with "max-autotune".

    The compiler's settings are that guide's. On a CPU weights are frozen too, which its backend is made for.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    inductor.conv_1x1_as_mm = inductor.coordinate_descent_tuning = inductor.coordinate_descent_check_all_directions = (
        True
    )
    inductor.epilogue_fusion = False
    inductor.freezing = job.device == "cpu"
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
    pipe = library.DiffusionPipeline.from_pretrained(
        job.folder, torch_dtype=DTYPES[job.dtype], local_files_only=True
    ).to(job.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(job: Job, pipe: DiffusionPipeline) -> Side:
    """What a pipeline of diffusers does in every stage, whoever runs its networks."""
    config, dtype = config_of(job.family, tiny=job.tiny), DTYPES[job.dtype]
    towers = [tower for tower in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if tower is not None]
    schedulers = {sampler: scheduler(pipe, sampler) for sampler in GRID}

    def text(ids: tuple[Tensor, ...]) -> Tensor:
        outputs = [tower(each, output_hidden_states=True) for tower, each in zip(towers, ids, strict=True)]
        return torch.cat(
            [out.hidden_states[-2] if len(towers) > 1 else out.last_hidden_state for out in outputs], dim=-1
        )

    def decode(latent: Tensor) -> Tensor:
        upcast = pipe.vae.dtype == torch.float16 and pipe.vae.config.get(
            "force_upcast"
        )  # as its pipelines do where the VAE would overflow
        if upcast:
            pipe.vae.to(torch.float32)
        picture = pipe.vae.decode(latent.to(pipe.vae.dtype) / config.vae.scale, return_dict=False)[0]
        if upcast:
            pipe.vae.to(torch.float16)
        return picture

    def picture(cell: Cell) -> Tensor:
        pipe.scheduler = schedulers[cell.sampler]
        cells = cell.size // config.vae.factor
        noise = seeded(list(range(SEED, SEED + cell.batch)), job.device)(
            (cell.batch, config.vae.z_channels, cells, cells)
        ).to(dtype)
        made = pipe(
            [PROMPT] * cell.batch, negative_prompt=[NEGATIVE] * cell.batch, latents=noise, height=cell.size, width=cell.size,
            num_inference_steps=cell.steps, guidance_scale=GUIDANCE,
        )  # fmt: skip
        return levels(made.images)

    def side(cell: Cell) -> Callable[[], Tensor]:
        given = inputs(config, cell, job.device, dtype)
        more = (
            {}
            if given.pooled is None
            else {"added_cond_kwargs": {"text_embeds": given.pooled, "time_ids": given.sizes}}
        )
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
        return DDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False
        )
    return DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", use_karras_sigmas=False, final_sigmas_type="zero"
    )


# --- others -----------------------------------------------------------------------------------------------------------


def openvino(job: Job) -> Side:
    """diffusers' pipeline with its networks run by OpenVINO."""
    from benchmarks.sides.openvino import run_by_openvino

    pipe = pipeline(job)
    run_by_openvino(pipe, Path(job.converted), job.dtype)
    return theirs(job, pipe)


def sdcpp(job: Job) -> Side:
    """stable-diffusion.cpp, which gives whole pictures only: the same noise levels, and the noise of torch's generator."""
    from stable_diffusion_cpp import StableDiffusion

    kinds = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    model = StableDiffusion(
        model_path=job.converted,
        wtype=kinds[job.dtype],
        n_threads=torch.get_num_threads(),
        rng_type="cpu",
        sampler_rng_type="cpu",
        verbose=False,
    )
    told = config_of(job.family, tiny=job.tiny).schedule
    schedule = Schedule(told.start, told.end, told.steps)

    def side(cell: Cell) -> Callable[[], Tensor]:
        if cell.stage != "picture":
            raise Unmeasured("stable-diffusion.cpp gives whole pictures only")
        sigmas = ",".join(f"{sigma:.9g}" for sigma in GRIDS[GRID[cell.sampler]](schedule, cell.steps))
        options = {
            "width": cell.size,
            "height": cell.size,
            "cfg_scale": GUIDANCE,
            "sample_steps": cell.steps,
            "seed": SEED,
            "batch_count": cell.batch,
            "sigmas": sigmas,
        }
        method = {"ddim": "euler", "dpmpp_2m": "dpm++2m"}[cell.sampler]
        return lambda: levels(model.generate_image(PROMPT, negative_prompt=NEGATIVE, sample_method=method, **options))

    return side


SIDES: dict[str, Callable[[Job], Side]] = {
    "ldm": ldm, "fast": fast, "diffusers": diffusers, "diffusers-best": diffusers_best, "openvino": openvino, "sdcpp": sdcpp,
}  # fmt: skip
NEEDS = {
    "openvino": ("openvino", "openvino"),
    "sdcpp": ("stable_diffusion_cpp", "stable-diffusion-cpp-python"),
}  # module, what to install


def missing(side: str, device: str) -> str | None:
    """Why this side cannot be measured here, or None."""
    module, package = NEEDS.get(side, ("torch", ""))
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {package}"
    if side == "openvino" and device != "cpu":
        return f"OpenVINO does not run on {device}"
    if side == "sdcpp" and device != "cpu":
        return (
            "stable-diffusion.cpp runs where it was built for, which it does not say: it is measured on the CPU alone"
        )
    return None
