"""The task of a student: its own, and to predict what its teacher predicts, with like features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.changes.surgery import kept_channels
from ldm.config import UNetConfig
from ldm.errors import ArgumentError
from ldm.networks.modules import Modules
from ldm.networks.unet import UNet
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.tasks import Diffusion, Loss, Prepared, Task


class Distil(Task):
    """Task loss + output_weight * output loss + feature_weight * feature loss (BK-SDM: Kim et al. 2023, section 3.2).

    The output loss is the mean squared difference of both predictions. The feature loss is the sum, over the stages of
    the UNet, of the mean squared difference of their outputs, down- or upsampling included; of a wider teacher the
    channels that the student began with are compared. Segmind's distill_sdxl.py, published beside SSD-1B, has both
    weights 0.5 and compares each ResBlock and each transformer instead of stages.
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
        Raises ArgumentError for a teacher with other inputs than the student, a narrower one, and one that shares
        parameters with it.
        """
        super().__init__()
        for teacher in teachers:
            _require_teacher(task.model.unet, teacher)
            teacher.requires_grad_(False).eval()
        self.task, self.teachers = task, Modules(teachers)
        self.steps, self.batch, self.output_weight, self.feature_weight = steps, batch, output_weight, feature_weight
        self.levels = task.levels

    def teacher(self, index: int) -> UNet:
        """The teacher of example `index` of the run, the same for all of an update; the last one after the run."""
        return self.teachers[min(index // self.batch * len(self.teachers) // self.steps, len(self.teachers) - 1)]

    def forward(self, batch: Batch, draws: Draws, t: Tensor | None = None) -> Loss:
        """The loss of each example, at drawn timesteps or at `t` [b]."""
        inputs = self.task.prepare(batch, draws, t)
        out, features = _followed(self.task.model.unet, inputs)
        with torch.no_grad():
            teachers_out, teachers_features = _followed(self.teacher(batch.index[0]), inputs)
        of_features = sum(_difference(ours, other) for ours, other in zip(features, teachers_features, strict=True))
        taught = self.output_weight * _difference(out, teachers_out) + self.feature_weight * of_features
        own = self.task.weigh(out, inputs)
        return own._replace(each=own.each + taught * batch.weight.to(taught))

    def at(self, batch: Batch, draws: Draws, t: Tensor) -> Loss:
        """The student's own loss at given timesteps [b], without the teacher: it compares with other models' losses."""
        return self.task.at(batch, draws, t)


def stages(config: UNetConfig) -> list[str]:
    """The last block of each of a UNet's stages.

    On the way down the Downsample of each level, and the last block; the middle; on the way up the last of each level.
    """
    n, levels = config.num_res_blocks + 1, len(config.channel_mult)
    down = [f"input_blocks.{level * n}" for level in range(1, levels)] + [f"input_blocks.{levels * n - 1}"]
    return [*down, "middle_block", *(f"output_blocks.{level * n - 1}" for level in range(1, levels + 1))]


def _followed(unet: UNet, inputs: Prepared) -> tuple[Tensor, list[Tensor]]:
    """A UNet's prediction, and the outputs of its stages."""
    features: list[Tensor] = []
    blocks = [unet.get_submodule(name) for name in stages(unet.config)]
    handles = [block.register_forward_hook(lambda block, given, out: features.append(out)) for block in blocks]
    try:
        return unet(inputs.x, inputs.t, inputs.context, inputs.y), features
    finally:
        for handle in handles:
            handle.remove()


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference [b] in float32; of a wider teacher the channels that the student began with."""
    if student.shape[1] != teacher.shape[1]:
        kept = kept_channels(teacher.shape[1], student.shape[1])
        teacher = teacher.index_select(1, kept.to(teacher.device))
    return (student.float() - teacher.float()).square().mean(dim=(1, 2, 3))


def _require_teacher(student: UNet, teacher: UNet) -> None:
    ours, other = student.config, teacher.config
    for name in ("in_channels", "out_channels", "context_dim", "vector_dim", "noise_levels"):
        if getattr(ours, name) != getattr(other, name):
            what = f"its UNet has {name} {getattr(other, name)}, the student's {getattr(ours, name)}"
            raise ArgumentError(f"teacher: {what}; use a model of the student's family", key="method.teachers")
    mine, wider = ([config.model_channels * m for m in config.channel_mult] for config in (ours, other))
    if len(mine) != len(wider) or any(a > b for a, b in zip(mine, wider, strict=True)):
        what = f"its levels have widths {wider}, the student's {mine}"
        raise ArgumentError(f"teacher: {what}; use the model that the student was pruned from", key="method.teachers")
    if {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}:
        what = "shares parameters with the student, and would learn with it; load it anew"
        raise ArgumentError(f"teacher: {what}", key="method.teachers")
