"""Who is compared: the sides by name, what each needs, and what must be converted for it first."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import without_folders
from benchmarks.sides.cells import GRID, GUIDANCE, NEGATIVE, PROMPT, SEED, Cell, Job, Side, config_of, levels
from benchmarks.sides.diffusers import diffusers, diffusers_best
from benchmarks.sides.openvino import PRECISION, openvino, to_openvino
from benchmarks.sides.ours import fast, ldm
from benchmarks.sides.process import Answer, Unmeasured, command, environment, serve
from samplers import GRIDS, Schedule


def sdcpp(job: Job) -> Side:
    """stable-diffusion.cpp, which gives whole pictures only: the same noise levels, the noise of torch's generator."""
    from stable_diffusion_cpp import StableDiffusion

    model = StableDiffusion(
        model_path=job.converted, wtype=PRECISION[job.dtype], n_threads=torch.get_num_threads(), rng_type="cpu",
        sampler_rng_type="cpu", verbose=False,
    )  # fmt: skip
    config = config_of(job.family, tiny=job.tiny).schedule
    schedule = Schedule(config.start, config.end, config.steps)

    def side(cell: Cell) -> Callable[[], Tensor]:
        if cell.stage != "picture":
            raise Unmeasured("stable-diffusion.cpp gives whole pictures only")
        sigmas = ",".join(f"{sigma:.9g}" for sigma in GRIDS[GRID[cell.sampler]](schedule, cell.steps))
        method = {"ddim": "euler", "dpmpp_2m": "dpm++2m"}[cell.sampler]
        return lambda: levels(
            model.generate_image(
                PROMPT, negative_prompt=NEGATIVE, width=cell.size, height=cell.size, batch_count=cell.batch, seed=SEED,
                sample_method=method, sample_steps=cell.steps, sigmas=sigmas, cfg_scale=GUIDANCE,
            )
        )  # fmt: skip

    return side


def to_one_file(job: Job, target: Path) -> None:
    """The folder of weights as one file, for stable-diffusion.cpp."""
    import weights

    weights.convert(job.folder, target)


SIDES: dict[str, Callable[[Job], Side]] = {
    "ldm": ldm, "fast": fast, "diffusers": diffusers, "diffusers-best": diffusers_best, "openvino": openvino,
    "sdcpp": sdcpp,
}  # fmt: skip
NEEDS = {  # side: its module, and the package to install
    "openvino": ("openvino", "openvino"),
    "sdcpp": ("stable_diffusion_cpp", "stable-diffusion-cpp-python"),
}
CONVERSIONS: dict[str, Callable[[Job, Path], None]] = {"openvino": to_openvino, "sdcpp": to_one_file}


def missing(side: str, device: str) -> str | None:
    """Why this side cannot be measured here, or None."""
    module, package = NEEDS.get(side, ("torch", ""))
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: pip install {package}"
    if side == "openvino" and device != "cpu":
        return f"OpenVINO does not run on {device}"
    if side == "sdcpp" and device != "cpu":
        return "stable-diffusion.cpp does not say which device it was built for: it is measured on the CPU alone"
    return None


def convert(job: Job) -> str | None:
    """Convert the weights for the side of this job, unless that was done before. Returns why it failed, or None."""
    if job.side not in CONVERSIONS or Path(job.converted).exists():
        return None
    # Another process does it, whose memory is free again afterwards.
    done = subprocess.run(command(__name__, job), capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        return f"conversion failed: {without_folders(done.stderr.strip())[-300:] or done.returncode}"
    return None


def converted(job: Job, _: Callable[[Answer], None]) -> None:
    """Convert for a job, under a passing name until all of it is written."""
    target = Path(job.converted)
    passing = target.with_name(f"passing-{target.name}")
    shutil.rmtree(passing, ignore_errors=True)
    CONVERSIONS[job.side](job, passing)
    passing.rename(target)


if __name__ == "__main__":
    serve(Job, converted)
