"""OpenVINO's side: diffusers' pipeline, whose networks are traced and run by OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.sides.cells import Cell, Job, Side, config_of, inputs
from benchmarks.sides.diffusers import pipeline, theirs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PRECISION = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # what OpenVINO and stable-diffusion.cpp call them


def openvino(job: Job) -> Side:
    """diffusers' pipeline with its networks run by OpenVINO."""
    pipe = pipeline(job)
    run_by_openvino(pipe, Path(job.converted), job.dtype)
    return theirs(job, pipe)


class Traced(nn.Module):
    """A function of a network and tensors, as a trace wants it: a module, whose inputs are tensors in a row."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *given: Tensor) -> Any:
        return self.function(self.network, *given)


def _unet(unet: Any, x: Tensor, t: Tensor, context: Tensor, *sdxl: Tensor) -> Tensor:
    more = dict(zip(("text_embeds", "time_ids"), sdxl, strict=True)) if sdxl else None
    return unet(x, t, context, added_cond_kwargs=more, return_dict=False)[0]


def _decode(vae: Any, z: Tensor) -> Tensor:
    return vae.decode(z, return_dict=False)[0]


def _text(tower: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The tokens before and after the last block, and the projected pooled token if the tower has one."""
    out = tower(ids, output_hidden_states=True)
    projected = (out.text_embeds,) if "text_embeds" in out else ()
    return out.hidden_states[-2], out.last_hidden_state, *projected


@torch.no_grad()
def to_openvino(job: Job, target: Path) -> None:
    """Every network as `target`/name.xml, of any batch and size, in float32: OpenVINO chooses what it computes in."""
    import openvino

    target.mkdir()
    pipe = pipeline(replace(job, dtype="float32"))
    small = Cell("step", 1, 64)  # a small example is traced sooner
    given = inputs(config_of(job.family, tiny=job.tiny), small, "cpu", torch.float32)
    sdxl = () if given.pooled is None else (given.pooled, given.sizes)
    networks: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "unet": (Traced(pipe.unet, _unet), (given.x, given.t, given.context, *sdxl)),
        "decoder": (Traced(pipe.vae, _decode), (given.latent,)),
    }
    for name, ids in zip(_towers(pipe), given.ids, strict=True):
        networks[name] = Traced(getattr(pipe, name), _text), (ids,)
    for name, (network, example) in networks.items():
        traced = openvino.convert_model(network.eval(), example_input=example)
        openvino.save_model(traced, target / f"{name}.xml", compress_to_fp16=False)


def _towers(pipe: DiffusionPipeline) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]


def runner(path: Path, dtype: str) -> Callable[..., list[Tensor]]:
    """A function of tensors that runs a converted network on the CPU. New shapes of them compile it anew."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    options |= {"PERFORMANCE_HINT": "LATENCY"}
    compiled: dict[tuple[torch.Size, ...], Any] = {}  # one at most, which is forgotten before the next is made

    def run(*given: Tensor) -> list[Tensor]:
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in compiled:
            compiled.clear()
            model = core.read_model(path)
            model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
            compiled[shapes] = core.compile_model(model, "CPU", options).create_infer_request()
        arrays = [(tensor.float() if tensor.is_floating_point() else tensor).numpy() for tensor in given]
        found = compiled[shapes].infer(arrays)
        return [torch.from_numpy(found[i].copy()) for i in range(len(found))]

    return run


def run_by_openvino(pipe: DiffusionPipeline, folder: Path, dtype: str) -> None:
    """Let OpenVINO run the networks of a diffusers pipeline, which keeps its own weights unused."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.clip.modeling_clip import CLIPTextModelOutput

    unet, decoder = (runner(folder / f"{name}.xml", dtype) for name in ("unet", "decoder"))

    def predict(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        sdxl = more.get("added_cond_kwargs") or {}
        named = [sdxl[name] for name in ("text_embeds", "time_ids") if name in sdxl]
        return (unet(x, t.float().expand(len(x)).contiguous(), encoder_hidden_states, *named)[0].to(x.dtype),)

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
