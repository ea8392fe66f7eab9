"""Models cut from models: what they compute, what they keep, and what they are taken for once saved."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weights
from benchmarks.models.published import tiny as narrow
from benchmarks.models.seeded import normal, weight
from ldm.changes import surgery
from ldm.config import FAMILIES, SSD1B, UNetConfig, VisionConfig
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.unet import UNet
from ldm.networks.vision import CLIPVision
from ldm.train.shipped import BLOCKS
from tests.made.families import build, tiny
from weights.names.blank import shapes


@pytest.fixture(scope="module")
def ships() -> LatentDiffusion:
    return weights.load()


@pytest.fixture(scope="module")
def sdxl() -> LatentDiffusion:
    """All blocks of SDXL, ten times as narrow."""
    return build(narrow("sdxl-base"))


def parameters(config: UNetConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(UNet, config).values())


def predicted(model: LatentDiffusion, x: torch.Tensor) -> torch.Tensor:
    unet = model.config.unet
    y = None if unet.vector_dim is None else normal("y", (2, unet.vector_dim))
    with torch.no_grad():
        return model.unet(x, torch.tensor([900.0, 3.0]), normal("context", (2, 7, unet.context_dim)), y)


def same(a: LatentDiffusion, b: LatentDiffusion) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "concat", "name", "channels"),
    [
        ("sd1", ("mask", "masked_image"), "sd1-inpainting", 9),
        ("sd2-base", ("mask", "masked_image"), "sd2-inpainting", 9),
        ("sd2-base", ("depth",), "sd2-depth", 5),
        ("sdxl-base", ("mask", "masked_image"), "sdxl-inpainting", 9),
        ("sd1", ("masked_image",), "sd1", 8),
        ("sd2-v", ("mask", "masked_image"), "sd2-v", 9),
    ],
)
def test_a_widened_model_predicts_what_it_did_whatever_is_in_the_new_channels(family, concat, name, channels):
    model = build(tiny(family))
    wide = surgery.widen(model, concat)
    assert (wide.config.name, wide.config.concat, wide.config.unet.in_channels) == (name, concat, channels)
    assert wide.depth is None
    x, more = normal("x", (2, 4, 8, 8)), 100 * normal("more", (2, channels - 4, 8, 8))
    before, after = predicted(model, x), predicted(wide, torch.cat([x, more], dim=1))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()  # the zeros are added in another order of sums
    if name in ("sd1-inpainting", "sdxl-inpainting", "sd2-inpainting"):
        assert FAMILIES[name].concat == concat


def test_widening_changes_one_tensor_and_copies_no_other(ships):
    wide = surgery.widen(ships, ("mask", "masked_image"))
    assert wide.config == replace(
        ships.config, unet=replace(ships.config.unet, in_channels=9), concat=("mask", "masked_image")
    )
    before, after = ships.state_dict(), wide.state_dict()
    assert [name for name in after if after[name].data_ptr() != before[name].data_ptr()] == [
        "unet.input_blocks.0.0.weight"
    ]
    assert ships.unet.input_blocks[0][0].weight.shape[1] == 4


def test_a_widened_model_is_recognised_when_saved(tmp_path: Path):
    wide = surgery.widen(build(narrow("sd1")), ("mask", "masked_image"))
    again = weights.load(weights.save(wide, tmp_path / "x.safetensors", dtype=None))
    assert again.config == wide.config == narrow("sd1-inpainting")
    assert again.unet.input_blocks[0][0].weight.equal(wide.unet.input_blocks[0][0].weight)


def test_inputs_that_cannot_be_added_are_refused(ships):
    for concat in ((), ("masked_image", "mask"), ("mask", "mask"), ("low_res",)):
        with pytest.raises(ArgumentError, match="give some of mask, masked_image, depth, in this order"):
            surgery.widen(ships, concat)
    with pytest.raises(ArgumentError, match="takes mask, masked_image already"):
        surgery.widen(surgery.widen(ships, ("mask", "masked_image")), ("depth",))


# -- the conditioner ---------------------------------------------------------------------------------------------------


def vision(projection: int) -> CLIPVision:
    config = VisionConfig(image=28, patch=7, width=64, layers=2, heads=4, mlp=128, projection=projection)
    tower = CLIPVision(config)
    tower.load_state_dict({name: weight(name, value.shape) for name, value in tower.state_dict().items()})
    return tower


def test_a_model_whose_conditioner_was_swapped_predicts_the_same_for_the_same_context(tmp_path: Path):
    model, tower = build(tiny("sd1")), vision(64)
    swapped = surgery.swap_conditioner(model, tower)
    x = normal("x", (2, 4, 8, 8))
    assert predicted(swapped, x).equal(predicted(model, x))
    assert len(swapped.text) == 0
    assert swapped.config.vision == tower.config
    assert swapped.config.name == "sd-image-variations"
    pixels = normal("pixels", (1, 3, 28, 28))
    with torch.no_grad():
        assert swapped.vision(pixels).equal(tower(pixels))
    again = weights.load(weights.save(swapped, tmp_path / "x.safetensors", dtype=None))
    assert again.config == swapped.config
    assert same(again, swapped)


def test_a_tower_that_does_not_fit_is_refused(ships):
    with pytest.raises(ArgumentError, match="its embedding has 48 numbers, the UNet's context 64"):
        surgery.swap_conditioner(ships, vision(48))
    for family in ("sdxl-base", "x4-upscaler"):
        with pytest.raises(ArgumentError, match="takes more than a context"):
            surgery.swap_conditioner(build(tiny(family)), vision(64))


# -- fewer blocks ------------------------------------------------------------------------------------------------------


def test_ssd_1b_has_the_published_sizes_and_every_block_begins_as_one_of_sdxl_s(sdxl):
    assert surgery.ssd_1b(FAMILIES["sdxl-base"]) == FAMILIES["ssd-1b"]
    assert surgery.ssd_1b(narrow("sdxl-base")) == narrow("ssd-1b")
    small = surgery.prune(sdxl, "ssd-1b")
    assert small.config.unet.up_depth == SSD1B.up_depth
    state = sdxl.unet.state_dict()
    begins = {}
    for name, value in small.unet.state_dict().items():
        (source,) = [
            theirs for theirs in state if state[theirs].equal(value) and theirs.split(".")[-2:] == name.split(".")[-2:]
        ]
        if block := re.match(r"(.+\.transformer_blocks)\.(\d+)\.", name):
            theirs = re.match(r"(.+\.transformer_blocks)\.(\d+)\.", source)
            assert theirs[1] == block[1]
            begins.setdefault(block[1], {})[int(block[2])] = int(theirs[2])
        else:
            assert source == name
    four, two, one = {0: 0, 1: 1, 2: 2, 3: 6}, {0: 0, 1: 1}, {0: 0}
    assert begins == {
        f"{block}.1.transformer_blocks": layers
        for block, layers in {
            "input_blocks.4": two, "input_blocks.5": two, "input_blocks.7": four, "input_blocks.8": four,
            "output_blocks.0": four, "output_blocks.1": four, "output_blocks.2": {i: i for i in range(10)},
            "output_blocks.3": two, "output_blocks.4": one, "output_blocks.5": one,
        }.items()
    }  # fmt: skip


def test_a_pruned_sdxl_is_recognised_as_ssd_1b_when_saved(sdxl, tmp_path: Path):
    small = surgery.prune(sdxl, "ssd-1b")
    path = weights.save(small, tmp_path / "x.safetensors", dtype=None)
    again = weights.load(path)
    assert again.config == small.config == narrow("ssd-1b")
    assert same(again, small)


def test_the_unet_of_a_pruned_model_is_a_copy_and_the_rest_is_shared(ships):
    small = surgery.prune(ships, "half")
    assert {p.untyped_storage().data_ptr() for p in small.unet.parameters()}.isdisjoint(
        p.untyped_storage().data_ptr() for p in ships.unet.parameters()
    )
    for part in ("vae", "text"):
        ours, theirs = getattr(small, part).state_dict(), getattr(ships, part).state_dict()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    assert small.schedule is ships.schedule


def test_half_of_the_model_that_ships_loads_again_and_still_predicts(ships, tmp_path: Path):
    small = surgery.prune(ships, "half")
    assert (parameters(BLOCKS.unet), parameters(surgery.half(BLOCKS).unet)) == (10_713_220, 5_925_572)
    again = weights.load(weights.save(small, tmp_path / "x.safetensors", dtype=None))
    assert again.config == small.config
    assert again.config.name == "blocks"
    x = normal("x", (2, 4, 16, 16))
    before, after = predicted(ships, x), predicted(again, x)
    assert after.equal(predicted(small, x))
    assert (
        after - before
    ).square().mean() < 0.1 * before.square().mean()  # what is left still tells noise from picture; 0 would be 1.0


@pytest.mark.parametrize(
    ("family", "share"),
    [("sd1", 0.597), ("sd2-v", 0.597), ("x4-upscaler", 0.581), ("sdxl-base", 0.493), ("sdxl-refiner", 0.635)],
)
def test_half_of_a_family_is_about_half(family, share):
    config = FAMILIES[family]
    assert parameters(surgery.half(config).unet) / parameters(config.unet) == pytest.approx(share, abs=5e-4)


def test_half_of_sd_1_keeps_the_blocks_of_bk_sdm():
    model = build(replace(tiny("sd1"), unet=replace(narrow("sd1").unet, context_dim=64)))
    small, state = surgery.prune(model, "half"), model.unet.state_dict()
    for ours, theirs in {
        "input_blocks.1": "input_blocks.1", "input_blocks.2": "input_blocks.3", "input_blocks.3": "input_blocks.4",
        "input_blocks.7": "input_blocks.10", "middle_block.0": "middle_block.0", "output_blocks.0": "output_blocks.0",
        "output_blocks.1": "output_blocks.2", "output_blocks.2": "output_blocks.3",
        "output_blocks.3": "output_blocks.5", "output_blocks.7": "output_blocks.11", "out": "out",
        "time_embed": "time_embed",
    }.items():  # fmt: skip
        found = {
            name.removeprefix(ours): value
            for name, value in small.unet.state_dict().items()
            if name.startswith(ours + ".")
        }
        assert found
        assert all(value.equal(state[theirs + name]) for name, value in found.items())
    assert predicted(small, normal("x", (2, 4, 8, 8))).isfinite().all()


def test_half_of_sdxl_keeps_every_second_block_of_a_transformer(sdxl):
    small = surgery.prune(sdxl, "half")
    assert small.config.unet.up_depth == ((5, 5, 5), (1, 1, 1), (0, 0, 0))
    ours, theirs = (model.unet.output_blocks[2][1].transformer_blocks for model in (small, sdxl))
    assert all(ours[i].norm1.weight.equal(theirs[2 * i].norm1.weight) for i in range(5))


NARROWED = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=24, heads=None, head_dim=16, mid_depth=1,
    down_depth=((0,), (1,)), up_depth=((1, 1), (0, 0)), cross_only=(False, False),
)  # fmt: skip


def doubled(value: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter of NARROWED's half as NARROWED needs it: what gives a channel gives it twice, side by side; nothing
    takes the doubles."""
    stream = 2 * torch.arange(32)
    joined = {
        0: torch.cat([stream, 64 + stream]),
        1: torch.cat([stream, 64 + torch.arange(32)]),
        2: torch.cat([stream, 64 + torch.arange(32)]),
    }
    block = re.match(r"output_blocks\.(\d)\.0\.(in_layers|skip_connection)", name)
    for axis in [axis for axis in range(value.ndim) if value.shape[axis] != shape[axis]]:
        if (axis == 0 and re.search(r"to_[qkv]\.weight", name)) or (axis == 1 and "to_out.0" in name):
            places = torch.arange(32)  # two heads of four
        elif axis == 0 and ".ff.net.0.proj" in name:
            places = torch.cat([torch.arange(128), 256 + torch.arange(128)])
        elif axis == 1 and ".ff.net.2." in name:
            places = torch.arange(128)
        elif block and (axis == 1 or ".in_layers.0." in name):
            places = joined[int(block[1])]
        elif axis == 0:
            value = value.repeat_interleave(2, dim=0)
            continue
        else:
            places = stream
        value = value.new_zeros([*value.shape[:axis], shape[axis], *value.shape[axis + 1 :]]).index_copy(
            axis, places, value
        )
    return value


def test_the_channels_that_are_kept_of_a_level_belong_together():
    """A UNet in which each channel of a level was doubled computes what it did (Chen et al. 2016, Net2Net), and its
    half is what it was made from.

    Doubles leave the statistics of GroupNorm and LayerNorm as they were. Not so where they are joined with what has
    none: the residual branches of the two ResBlocks there are 0."""
    config = replace(tiny("sd1"), unet=NARROWED)
    small = build(surgery.half(config)).unet
    large = (
        LatentDiffusion(config).eval().requires_grad_(False)
    )  # as made, the middle's transformer and second ResBlock add nothing
    for i in (1, 2):
        small.output_blocks[i][0].out_layers[3].weight.zero_()
    state = large.unet.state_dict()
    for name, value in small.state_dict().items():
        state[name].copy_(doubled(value, name, state[name].shape))
    for kind in ("weight", "bias"):  # both halves of what is joined have doubles
        norm = f"output_blocks.0.0.in_layers.0.{kind}"
        state[norm].copy_(small.state_dict()[norm].repeat_interleave(2))
    widening = large.unet.input_blocks[3][
        0
    ].skip_connection  # which is no layer where the level is as wide as the one above
    widening.weight.copy_(torch.eye(32).repeat_interleave(2, dim=0)[:, :, None, None])
    widening.bias.zero_()
    x, t, context = normal("x", (2, 4, 8, 8)), torch.tensor([900.0, 3.0]), normal("context", (2, 7, 24))
    with torch.no_grad():
        ours, theirs = small(x, t, context), large.unet(x, t, context)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    again, meant = surgery.prune(large, "half").unet.state_dict(), small.state_dict()
    assert [name for name in meant if not again[name].equal(meant[name])] == []


def test_plans_that_do_not_fit_are_refused(ships):
    with pytest.raises(ArgumentError, match="'third' is unknown; there are ssd-1b, half"):
        surgery.prune(ships, "third")
    with pytest.raises(ArgumentError, match="'ssd-1b' is for SDXL base, this is a model of family blocks; use 'half'"):
        surgery.prune(ships, "ssd-1b")
    flat = replace(BLOCKS, unet=replace(BLOCKS.unet, channel_mult=(1, 2, 2)))
    with pytest.raises(ArgumentError, match=r"nothing to halve in a UNet of one block a level and widths \(1, 2, 2\)"):
        surgery.half(flat)
