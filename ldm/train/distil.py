"""The task of a student: its own, and to predict and to see what its teacher does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.changes.surgery import kept_channels
from ldm.config import UNetConfig
from ldm.errors import ArgumentError
from ldm.networks.unet import UNet
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.tasks import Diffusion, Loss, Prepared


class Distil(nn.Module):
    """Task loss + output_weight * output loss + feature_weight * feature loss (BK-SDM: Kim et al. 2023, section 3.2).

    The output loss is the mean squared difference of both predictions; the feature loss is the sum, over the stages of the UNet, of the
    mean squared difference of what comes out of them, down- or upsampling included; of a wider teacher the channels that the student
    began with. Segmind's distill_sdxl.py, published beside SSD-1B, has both weights 0.5 and compares instead of stages each ResBlock and
    each transformer.
    """

    def __init__(
        self,
        task: Diffusion,
        teachers: Sequence[UNet],
        *,
        steps: int,
        batch: int,
        output_weight: float = 1.0,
        feature_weight: float = 1.0,
    ):
        """
        task      the student's
        teachers  of K teachers number k teaches updates k steps / K to (k + 1) steps / K
        steps     updates of the run
        batch     examples of one update, over all ranks
        Raises ArgumentError for a teacher that is told something else than the student, is narrower, or shares parameters with it.
        """
        super().__init__()
        student = task.model.unet
        for teacher in teachers:
            _require_teacher(student, teacher)
        self.task, self.teachers = task, nn.ModuleList(teacher.requires_grad_(False).eval() for teacher in teachers)
        self.steps, self.batch, self.output_weight, self.feature_weight = steps, batch, output_weight, feature_weight
        self.levels = task.levels

    def teacher(self, index: int) -> UNet:
        """Who teaches example `index` of the run. All examples of an update have the same teacher; after the last update it is the last one."""
        return self.teachers[min(index // self.batch * len(self.teachers) // self.steps, len(self.teachers) - 1)]

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each example, at drawn timesteps or at `t` [b]."""
        asked = self.task.prepare(batch, draws, t)
        out, seen = _followed(self.task.model.unet, asked)
        with torch.no_grad():
            told, shown = _followed(self.teacher(batch.index[0]), asked)
        features = sum(_difference(ours, theirs) for ours, theirs in zip(seen, shown, strict=True))
        taught = self.output_weight * _difference(out, told) + self.feature_weight * features
        own = self.task.weigh(out, asked)
        return own._replace(each=own.each + taught * batch.weight.to(taught))

    def at(self, batch: Batch, draws: Draws, t: Tensor) -> Loss:
        """The student's own loss at given timesteps [b], without the teacher: so that it compares with other models'."""
        return self.task.at(batch, draws, t)


def stages(config: UNetConfig) -> list[str]:
    """The blocks that a UNet's stages end in: going down the Downsample of each level, and the last block; the middle; coming up the last of each level."""
    n, levels = config.num_res_blocks + 1, len(config.channel_mult)
    down = [f"input_blocks.{level * n}" for level in range(1, levels)] + [f"input_blocks.{levels * n - 1}"]
    return [*down, "middle_block", *(f"output_blocks.{level * n - 1}" for level in range(1, levels + 1))]


def _followed(unet: UNet, asked: Prepared) -> tuple[Tensor, list[Tensor]]:
    """What a UNet predicts, and what came out of its stages on the way."""
    seen: list[Tensor] = []
    handles = [
        unet.get_submodule(name).register_forward_hook(lambda block, given, out: seen.append(out))
        for name in stages(unet.config)
    ]
    try:
        return unet(asked.x, asked.t, asked.context, asked.y), seen
    finally:
        for handle in handles:
            handle.remove()


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference [b] in float32. Where the student is narrower, with the channels that it began with."""
    if ours.shape[1] != theirs.shape[1]:
        theirs = theirs.index_select(1, kept_channels(theirs.shape[1], ours.shape[1]).to(theirs.device))
    return (ours.float() - theirs.float()).square().mean(dim=(1, 2, 3))


def _require_teacher(student: UNet, teacher: UNet) -> None:
    ours, theirs = student.config, teacher.config
    for what in ("in_channels", "out_channels", "context_dim", "vector_dim", "noise_levels"):
        if getattr(ours, what) != getattr(theirs, what):
            raise ArgumentError(
                f"teacher: its UNet has {what} {getattr(theirs, what)}, the student's {getattr(ours, what)}; use a model of the student's family",
                key="method.teachers",
            )
    widths = [[config.model_channels * m for m in config.channel_mult] for config in (ours, theirs)]
    if len(widths[0]) != len(widths[1]) or any(a > b for a, b in zip(*widths, strict=True)):
        raise ArgumentError(
            f"teacher: its levels have widths {widths[1]}, the student's {widths[0]}; use the model that the student was pruned from",
            key="method.teachers",
        )
    if {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}:
        raise ArgumentError(
            "teacher: shares parameters with the student, and would learn with it; load it anew", key="method.teachers"
        )
