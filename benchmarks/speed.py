"""Times text encoding, one guided step, VAE decoding and a whole picture, in turn with diffusers on the same weights, inputs, dtype and threads."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.peers import peer, require, seeded_model
from ldm.config import FAMILIES, SD1, ModelConfig, VAEConfig
from ldm.model import LatentDiffusion
from ldm.tasks import txt2img
from ldm.tokenizer import tokenize
from samplers import seeded
from tests.networks import CLIP_L_TINY
from tests.seeded import normal

TINY = ModelConfig("tiny", unet=replace(SD1, model_channels=32, context_dim=64), vae=VAEConfig(channels=32), text=(CLIP_L_TINY,), size=64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROMPT, NEGATIVE, SEED, GUIDANCE = "a photograph of an astronaut riding a horse", "", 7, 7.5
STAGES = {
    "text": "the text tower, prompt and negative prompt as one batch",
    "step": "one guided step: the UNet at batch 2",
    "decode": "VAE decoding of one latent",
    "picture": "end to end: a prompt to an 8-bit picture",
}

# What passes as the same output, as mean errors. float32: 1e-5 of the output's root mean square, the project's bound; guidance 7.5 makes up to
# 14 times as much of it, and at 127.5 levels to the unit about 0.02 of all values then round to the neighbouring level.
FLOAT32, FLOAT32_LEVELS = 1e-5, 0.05
HALF = 1.5  # half precision: our error against the same networks in float32, in units of theirs

Stages = Mapping[str, Callable[[], Tensor]]


# --- the two sides ----------------------------------------------------------------------------------------------------


def config_of(args: argparse.Namespace) -> ModelConfig:
    """The model that is timed."""
    return TINY if args.tiny else FAMILIES["sd1"]


def inputs(model: LatentDiffusion, size: int) -> dict[str, Tensor]:
    """What both sides are given: token ids, and seeded x, t and context for the UNet and the VAE."""
    config = model.config
    x = normal("x", model.latent_shape(1, size, size)).to(model.device, model.dtype)
    context = normal("context", (2, config.text[0].length, config.unet.context_dim)).to(model.device, model.dtype)
    t = torch.full((2,), 500.0, device=model.device)
    return {"ids": tokenize([NEGATIVE, PROMPT]).to(model.device), "x": x, "t": t, "context": context}


def our_stages(model: LatentDiffusion, size: int, steps: int) -> Stages:
    """Every stage as this project runs it."""
    given = inputs(model, size)
    options: dict[str, Any] = {"seeds": [SEED], "negative": NEGATIVE, "height": size, "width": size, "sampler": "ddim", "steps": steps, "cfg": GUIDANCE}
    return {
        "text": lambda: model.text[0](given["ids"])[0],
        "step": lambda: model.unet(torch.cat([given["x"]] * 2), given["t"], given["context"]),
        "decode": lambda: model.vae.decode(given["x"]),
        "picture": lambda: levels(txt2img(model, PROMPT, **options)[0]),
    }


def their_stages(model: LatentDiffusion, size: int, steps: int) -> Stages:
    """Every stage as diffusers runs it. Its pipeline is given our token ids, embedded by its own text tower: its tokenizer would need a download."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    given, theirs = inputs(model, size), peer(model)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )  # as in the published model's own settings
    pipe = StableDiffusionPipeline(
        vae=theirs.vae, text_encoder=theirs.text, tokenizer=None, unet=theirs.unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Tensor:
        cond, uncond = (theirs.text(tokenize([prompt]).to(model.device)).last_hidden_state for prompt in (PROMPT, NEGATIVE))
        noise = seeded([SEED], model.device)(model.latent_shape(1, size, size)).to(model.dtype)
        made = pipe(
            prompt_embeds=cond, negative_prompt_embeds=uncond, latents=noise, height=size, width=size, num_inference_steps=steps, guidance_scale=GUIDANCE
        )
        return levels(made.images[0])

    return {
        "text": lambda: theirs.text(given["ids"]).last_hidden_state,
        "step": lambda: theirs.unet(torch.cat([given["x"]] * 2), given["t"], given["context"]).sample,
        "decode": lambda: theirs.vae.decode(given["x"] / model.config.vae.scale).sample,
        "picture": picture,
    }


SIDES = {"ldm": our_stages, "diffusers": their_stages}


def levels(picture: Image.Image) -> Tensor:
    """[H, W, 3] uint8."""
    return torch.from_numpy(np.array(picture))


# --- time -------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Tensor], device: str) -> float:
    """Seconds until the result is there."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


def in_turn(calls: Mapping[str, Callable[[], Tensor]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of each call, {median, p10, p90}: A, B, A, B, ... so that whatever else the machine does falls on both. The callers have warmed up."""
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(repeats):
        for side, call in calls.items():
            seconds[side].append(timed(call, device))
    return {side: dict(zip(("p10", "median", "p90"), np.percentile(values, (10, 50, 90)).tolist(), strict=True)) for side, values in seconds.items()}


# --- sameness ---------------------------------------------------------------------------------------------------------


def error(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Largest and mean absolute difference: of pictures in 8-bit levels, of anything else in units of the root mean square of `theirs`."""
    unit = 1.0 if theirs.dtype == torch.uint8 else theirs.double().square().mean().sqrt().item()
    difference = (ours.double() - theirs.double()).abs() / unit
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def check(outputs: Mapping[str, Tensor], reference: Tensor | None) -> dict[str, Any]:
    """Do both sides compute the same? `same` is None where there is nothing to compare with.

    outputs    of each side
    reference  our float32 output, for half precision
    """
    found: dict[str, Any] = {"same": None}
    if not all(torch.isfinite(out.float()).all() for out in outputs.values()):
        return {"same": False, "why": "NaN or infinity"}
    if reference is not None:
        found["against_float32"] = {side: error(out, reference) for side, out in outputs.items()}
    if "diffusers" in outputs:
        found["between"] = error(outputs["ldm"], outputs["diffusers"])
        if reference is not None:
            means = {side: errors["mean"] for side, errors in found["against_float32"].items()}
            found["same"] = means["ldm"] <= HALF * means["diffusers"]
        else:
            found["same"] = found["between"]["mean"] <= (FLOAT32_LEVELS if outputs["ldm"].dtype == torch.uint8 else FLOAT32)
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def resident(field: str) -> int | None:
    """Bytes of this process in memory: now ("VmRSS") or at their peak ("VmHWM"). None where the system does not say."""
    try:
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None


def forget_peak(device: str) -> None:
    """Begin the peaks anew. Linux lets a process do that to its own; elsewhere peaks only ever rise."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def alone(args: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own: what it holds before and with the weights, and at its peak in every stage. Writes its outputs to `args.save`."""
    if args.alone == "diffusers":
        import diffusers
        import transformers

        _ = diffusers.StableDiffusionPipeline, transformers.CLIPTextModel  # they import when used; their code is not their weights
    imported = resident("VmRSS")
    stages = SIDES[args.alone](seeded_model(config_of(args), DTYPES[args.dtype], args.device), args.size, args.steps)
    forget_peak(args.device)
    found: dict[str, Any] = {"imported": imported, "weights": resident("VmRSS"), "peak": {}, "device_peak": {}}
    outputs = {}
    for name, call in stages.items():
        forget_peak(args.device)
        outputs[name] = call().cpu().contiguous()
        found["peak"][name] = resident("VmHWM")
        if args.device.startswith("cuda"):
            found["device_peak"][name] = torch.cuda.max_memory_allocated(args.device)
    if args.save:
        save_file(outputs, args.save)
    return found


def in_own_process(args: argparse.Namespace, side: str, **changes: str) -> dict[str, Any]:
    """`alone` in a new process. Raises RuntimeError with what it said if it fails."""
    options = {"alone": side, **{name: getattr(args, name) for name in ("size", "dtype", "steps", "device", "threads")}, "peer": "none", **changes}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items() if value is not None), *["--tiny"] * args.tiny]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} alone failed: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the command ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures: memory first, each side alone; then both sides together, stage by stage."""
    sides = ["ldm"] + ["diffusers"] * (args.peer == "diffusers")
    memory = {side: in_own_process(args, side) for side in sides}
    reference: dict[str, Tensor] = {}
    if args.dtype != "float32":
        with tempfile.TemporaryDirectory() as folder:
            in_own_process(args, "ldm", dtype="float32", save=f"{folder}/reference.safetensors")
            reference = {name: tensor.clone() for name, tensor in load_file(f"{folder}/reference.safetensors").items()}

    model = seeded_model(config_of(args), DTYPES[args.dtype], args.device)
    stages = {side: SIDES[side](model, args.size, args.steps) for side in sides}
    rows = []
    for name in STAGES:
        calls = {side: stages[side][name] for side in sides}
        outputs = {side: call().cpu() for side, call in calls.items()}  # the warm-up, too
        row = {"stage": name, "seconds": in_turn(calls, args.repeats, args.device), **check(outputs, reference.get(name))}
        if row["same"]:
            row["ratio"] = row["seconds"]["diffusers"]["median"] / row["seconds"]["ldm"]["median"]
        show(row)
        rows.append(row)
    return {"machine": machine(args.device, ("diffusers", "transformers")), "rows": rows, "memory": memory}


def show(row: Mapping[str, Any]) -> None:
    """Print one line of the table."""
    cells = [f"{row['stage']:8}"]
    for side in SIDES:
        times = row["seconds"].get(side)
        cells.append(f"{times['median']:9.4g} ({times['p10']:.4g} to {times['p90']:.4g})".ljust(32) if times else " " * 32)
    cells.append(f"{row['ratio']:6.2f}" if "ratio" in row else " " * 6)
    errors = row.get("between")
    cells.append(f"{errors['max']:9.1e} {errors['mean']:9.1e}" if errors else " " * 19)
    cells.append({True: "same", False: f"REJECTED {row.get('why', '')}", None: "not compared"}[row["same"]])
    print("  ".join(cells).rstrip(), flush=True)


def show_memory(memory: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what each side held."""
    for side, found in memory.items():
        if found["weights"] is not None:
            peaks = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in found["peak"].items())
            print(f"memory of {side} in a process of its own, GB resident: {found['imported'] / 1e9:.2f} imported, {found['weights'] / 1e9:.2f} with weights; peaks: {peaks}")
        if found["device_peak"]:
            print(f"  allocated on the device, GB: {', '.join(f'{name} {value / 1e9:.2f}' for name, value in found['device_peak'].items())}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked. Exits with status 2 where it cannot be honoured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, help="pixels along a side, a multiple of 64 (default: 512; 64 with --tiny)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each stage and side, after one warm-up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="DDIM steps of the whole picture (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: torch's own choice)")
    parser.add_argument("--tiny", action="store_true", help="networks of 2 million parameters: shows that this works, not how fast it is")
    parser.add_argument("--peer", choices=("none", "diffusers"), default="diffusers", help="what to time in turn with (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.size = args.size or (64 if args.tiny else 512)
    if args.size < 64 or args.size % 64:
        parser.error(f"--size {args.size}: give a multiple of 64, which both sides take without padding")
    for name, most in (("repeats", 10**6), ("steps", 1000), ("threads", 4096)):
        if (value := getattr(args, name)) is not None and not 1 <= value <= most:
            parser.error(f"--{name} {value}: give 1 to {most}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0, or 1 if a row was rejected because the two sides' outputs differ."""
    args = arguments(argv)
    if "diffusers" in (args.peer, args.alone):
        require("bench", "diffusers", "transformers")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    if args.alone:
        print(json.dumps(alone(args)))
        return 0
    settings = {name: getattr(args, name) for name in ("size", "dtype", "repeats", "steps", "device", "tiny", "peer")} | {"guidance": GUIDANCE}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"{'stage':8}  {'ldm: median (p10 to p90), s':32}  {'diffusers':32}  {'ratio':>6}  {'max error':>9} {'mean':>9}   of the two outputs")
    found = {"settings": settings, "stages": STAGES, **measure(args)}
    show_memory(found["memory"])
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items() if value is not None))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(row["same"] is False for row in found["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
