"""The folder of weights as the other runtimes want it: OpenVINO's networks traced from diffusers', and one file for stable-diffusion.cpp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from benchmarks.machine import without_folders
from benchmarks.sides.all import Job, pipeline
from benchmarks.sides.cells import Cell, config_of, inputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # what OpenVINO calls them


def convert(job: Job) -> str | None:
    """Make what the side of this job needs, unless it is there, in a process of its own, whose memory goes with it. Why that failed, or None."""
    if Path(job.converted).exists() or job.side not in _MAKE:
        return None
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asdict(job))],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    return (
        f"conversion failed: {without_folders(done.stderr.strip())[-300:] or done.returncode}"
        if done.returncode
        else None
    )


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


class _UNet(nn.Module):
    """diffusers' UNet with its inputs in a row, as a trace has them."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        more = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, t, context, added_cond_kwargs=more, return_dict=False)[0]


class _Decoder(nn.Module):
    """The half of diffusers' VAE that makes pictures."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


class _Text(nn.Module):
    """A text tower of transformers: the tokens before its last block, after it, and the projected pooled token where it has one."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        out = self.tower(ids, output_hidden_states=True)
        projected = (out.text_embeds,) if "text_embeds" in out else ()
        return out.hidden_states[-2], out.last_hidden_state, *projected


@torch.no_grad()
def _to_openvino(job: Job, target: Path) -> None:
    """Every network as `target`/name.xml, of any batch and size, in float32: OpenVINO itself chooses what it computes in."""
    import openvino

    pipe = pipeline(replace(job, dtype="float32"))
    given = inputs(
        config_of(job.family, tiny=job.tiny), Cell("step", 1, 64), "cpu", torch.float32
    )  # a small example is traced sooner
    told = (given.x, given.t, given.context) + (() if given.pooled is None else (given.pooled, given.sizes))
    networks = {"unet": (_UNet(pipe.unet), told), "decoder": (_Decoder(pipe.vae), (given.latent,))}
    for name, ids in zip(_towers(pipe), given.ids, strict=True):
        networks[name] = _Text(getattr(pipe, name)), (ids,)
    for name, (network, example) in networks.items():
        openvino.save_model(
            openvino.convert_model(network.eval(), example_input=example),
            target / f"{name}.xml",
            compress_to_fp16=False,
        )


def _towers(pipe: DiffusionPipeline) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]


def runner(path: Path, dtype: str) -> Callable[..., list[Tensor]]:
    """A function of tensors that runs a converted network on the CPU, compiled for their shapes when they change: one compilation is kept."""
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": PRECISION[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: dict[tuple[torch.Size, ...], Any] = {}

    def run(*given: Tensor) -> list[Tensor]:
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in compiled:
            compiled.clear()
            model = core.read_model(path)
            model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
            compiled[shapes] = core.compile_model(model, "CPU", options).create_infer_request()
        found = compiled[shapes].infer(
            [tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy() for tensor in given]
        )
        return [torch.from_numpy(found[i].copy()) for i in range(len(found))]

    return run


def run_by_openvino(pipe: DiffusionPipeline, folder: Path, dtype: str) -> None:
    """Let OpenVINO run the networks of a diffusers pipeline, which keeps its own weights but touches them no more."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    unet, decoder = (runner(folder / f"{name}.xml", dtype) for name in ("unet", "decoder"))

    def predict(
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        more = () if not added_cond_kwargs else (added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"])
        return (unet(x, t.float().expand(len(x)).contiguous(), encoder_hidden_states, *more)[0].to(x.dtype),)

    def encode(run: Callable[..., list[Tensor]], kind: torch.dtype) -> Callable[..., Any]:
        def forward(ids: Tensor, **_: Any) -> Any:
            before, last, *pooled = (out.to(kind) for out in run(ids))
            if pooled:
                return CLIPTextModelOutput(text_embeds=pooled[0], last_hidden_state=last, hidden_states=(before, last))
            return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(before, last))

        return forward

    pipe.unet.forward = predict
    pipe.vae.decode = lambda z, **_: (decoder(z)[0].to(z.dtype),)
    for name in _towers(pipe):
        tower = getattr(pipe, name)
        tower.forward = encode(runner(folder / f"{name}.xml", dtype), tower.dtype)


def openvino_note(dtype: str) -> str | None:
    """What OpenVINO computes in instead where this processor has no such type, or None."""
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    wanted = {"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}[dtype]
    return None if wanted in able else f"OpenVINO computes in float32 on this processor, not in {dtype}"


# --- stable-diffusion.cpp ---------------------------------------------------------------------------------------------


def _to_one_file(job: Job, target: Path) -> None:
    import weights

    weights.convert(job.folder, target)


# --- the command ------------------------------------------------------------------------------------------------------

_MAKE: dict[str, Callable[[Job, Path], None]] = {"openvino": _to_openvino, "sdcpp": _to_one_file}


def main(argv: list[str]) -> None:
    """Convert for the job that is told as JSON; under a passing name until all is there."""
    job = Job(**json.loads(argv[0]))
    target = Path(job.converted)
    passing = target.with_name(f"passing-{target.name}")
    shutil.rmtree(passing, ignore_errors=True)
    if job.side == "openvino":
        passing.mkdir()
    _MAKE[job.side](job, passing)
    passing.rename(target)


if __name__ == "__main__":
    main(sys.argv[1:])
