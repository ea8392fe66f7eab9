"""A student's task: the three losses against the formula written out, who teaches when, and that a student learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import weights
from benchmarks.models.seeded import normal
from ldm.changes import surgery
from ldm.conditioning.cond import Sizes
from ldm.config import FAMILIES, SDXL
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.unet import UNet, timestep_embedding
from ldm.train.data.batch import Batch
from ldm.train.distil import Distil, _difference, stages
from ldm.train.draws import Draws
from ldm.train.recipe import Objective
from ldm.train.tasks import Diffusion
from tests.made.families import UNET, build, tiny

CONFIG = replace(
    tiny("sd1"), unet=replace(UNET, num_res_blocks=2, down_depth=((1, 1), (0, 0)), up_depth=((0, 0, 0), (1, 1, 1)))
)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build(CONFIG)


def batch_of(n: int = 2, *, first: int = 0, weight: Tensor | None = None) -> Batch:
    moments = torch.cat([normal("mean", (n, 4, 8, 8)), torch.full((n, 4, 8, 8), -9.0)], dim=1)
    return Batch(
        tuple(range(first, first + n)),
        ("a red cube", "a blue sphere")[:n],
        (64, 64),
        (Sizes(),) * n,
        torch.ones(n) if weight is None else weight,
        moments=moments,
    )


def distil(student: LatentDiffusion, *teachers: UNet, **settings) -> Distil:
    return Distil(Diffusion(student, Objective()), teachers, **({"steps": 10, "batch": 2} | settings))


def by_hand(
    unet: UNet, x: Tensor, t: Tensor, context: Tensor, down: list[int], up: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """A UNet's forward written out, with what its numbered blocks and its middle give."""
    emb = unet.time_embed(timestep_embedding(t, unet.config.model_channels))
    skips, seen = [], []
    for i, block in enumerate(unet.input_blocks):
        x = block(x, emb, context)
        skips.append(x)
        seen += [x] if i in down else []
    x = unet.middle_block(x, emb, context)
    seen.append(x)
    for i, block in enumerate(unet.output_blocks):
        x = torch.cat([x, skips.pop()], dim=1)
        x = block(x, emb, context, size=skips[-1].shape[2:] if skips else x.shape[2:])
        seen += [x] if i in up else []
    return unet.out(x), seen


def test_the_loss_is_the_task_s_the_outputs_and_the_sum_of_the_features(model):
    """BK-SDM: Kim et al. 2023, section 3.2. A student of one block a level has its stages' ends elsewhere than the
    teacher of two."""
    student = surgery.prune(model, "half")
    for p in student.unet.parameters():
        p.mul_(1.01)
    task = distil(student, model.unet, output_weight=0.5, feature_weight=0.25)
    batch, draws = batch_of(weight=torch.tensor([1.0, 3.0])), Draws(0, (0, 1))
    found = task(batch, draws)
    asked = task.task.prepare(batch, draws)
    with torch.no_grad():
        ours, seen = by_hand(student.unet, asked.x, asked.t, asked.context, [2, 3], [1, 3])
        teachers, shown = by_hand(model.unet, asked.x, asked.t, asked.context, [3, 5], [2, 5])
        own = (ours - asked.target).square().mean(dim=(1, 2, 3))
        output = (ours - teachers).square().mean(dim=(1, 2, 3))
        features = sum((a - b).square().mean(dim=(1, 2, 3)) for a, b in zip(seen, shown, strict=True))
    assert len(seen) == 5
    assert features.min() > 0
    wanted = (own + 0.5 * output + 0.25 * features) * torch.tensor([1.0, 3.0])
    assert torch.allclose(found.each, wanted, rtol=1e-5)
    assert found.t.equal(asked.t)
    assert torch.allclose(task.at(batch, draws, asked.t).each, own * torch.tensor([1.0, 3.0]), rtol=1e-5), (
        "the validation loss is the student's own"
    )


def test_the_stages_of_sdxl_and_of_its_student_end_in_the_same_blocks():
    assert stages(SDXL) == [
        "input_blocks.3",
        "input_blocks.6",
        "input_blocks.8",
        "middle_block",
        "output_blocks.2",
        "output_blocks.5",
        "output_blocks.8",
    ]
    assert stages(FAMILIES["ssd-1b"].unet) == stages(SDXL)


def test_a_narrower_student_is_compared_with_the_channels_that_it_began_with():
    ships = weights.load()
    student = surgery.prune(ships, "half")
    with torch.no_grad():
        _, seen = by_hand(
            ships.unet,
            normal("x", (1, 4, 8, 8)),
            torch.tensor([500]),
            normal("context", (1, 5, 64)),
            [2, 4, 5],
            [1, 3, 5],
        )
    assert [x.shape[1] for x in seen] == [64, 128, 192, 192, 192, 128, 64]
    kept = torch.arange(32)[:, None] * 6 + torch.arange(4)  # four of the six channels of each group
    assert _difference(seen[3][:, kept.flatten()], seen[3]).item() == 0
    assert _difference(seen[3][:, :128], seen[3]).item() > 0
    task = distil(student, ships.unet)
    assert task(batch_of(), Draws(0, (0, 1))).each.isfinite().all()


def test_teachers_follow_each_other_in_equal_parts_of_the_run(model):
    student = surgery.prune(model, "half")
    first, second, third = (build(CONFIG).unet for _ in range(3))
    task = distil(student, first, second, third, steps=7, batch=4)  # 28 examples: updates 0 to 2, 3 and 4, 5 and 6
    taught = [[task.teacher(4 * step + j) for j in range(4)] for step in range(7)]
    assert [{id(unet) for unet in each} for each in taught] == [
        {id(unet)} for unet in (first, first, first, second, second, third, third)
    ]
    assert task.teacher(1000) is third, "validation is not part of the run"


def test_a_student_learns_from_its_teacher_and_the_teacher_does_not_change(model):
    student = surgery.prune(model, "half")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = distil(student, model.unet)
    parameters = [p.requires_grad_(True) for p in student.unet.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(4):
        loss = task(batch_of(), Draws(0, (0, 1))).each.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in parameters)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in task.teachers.parameters())
    assert not any(block._forward_hooks for unet in (student.unet, model.unet) for block in unet.modules())


def test_a_teacher_that_cannot_teach_is_refused(model):
    student = surgery.prune(model, "half")
    for change, message in {
        ("context_dim", 32): "its UNet has context_dim 32, the student's 64",
        ("in_channels", 9): "its UNet has in_channels 9, the student's 4",
        ("channel_mult", (1, 1)): r"its levels have widths \[32, 32\], the student's \[32, 64\]",
    }.items():
        other = UNet(replace(CONFIG.unet, **dict([change])))
        with pytest.raises(ArgumentError, match=message):
            distil(student, model.unet, other)
    with pytest.raises(ArgumentError, match="shares parameters with the student"):
        distil(student, student.unet)
