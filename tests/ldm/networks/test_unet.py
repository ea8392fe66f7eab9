"""The UNet against the original implementations, and its own table of blocks."""

from dataclasses import replace

import pytest
import torch

from benchmarks.models.golden import TINY_UNETS, relative, run_unet, tiny_unet
from benchmarks.models.seeded import golden, normal
from ldm.config import FAMILIES, SD1, UNetConfig
from ldm.errors import ArgumentError
from ldm.networks.unet import UNet, timestep_embedding

# float32 accumulates about 1e-7 per operation over the ~100 layers in series of these networks, and the reference ran
# its attention and convolutions in another order; 4e-6 to 6e-6 of the output's rms is what remains of it in the worst
# element.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", TINY_UNETS)
def test_the_unet_gives_what_the_original_gives(name: str) -> None:
    assert relative(run_unet(name), golden("unet")[f"{name}/out"]) < TOLERANCE


def test_timesteps_may_be_fractional() -> None:
    between = timestep_embedding(torch.tensor([10.5]), 32)
    assert torch.isfinite(between).all()
    assert not torch.equal(between, timestep_embedding(torch.tensor([10.0]), 32))


def test_a_latent_of_odd_size_comes_back_at_its_own_size() -> None:
    x = normal("odd", (1, 4, 13, 10))
    assert tiny_unet("sd1-tiny")(x, torch.tensor([5.0]), normal("odd/context", (1, 7, 64))).shape == x.shape


def test_a_picture_does_not_depend_on_its_batch() -> None:
    unet, x, context = tiny_unet("sd2-tiny"), normal("batch/x", (3, 4, 16, 16)), normal("batch/context", (3, 77, 64))
    t = torch.tensor([900.0, 500.0, 3.0])
    together = unet(x, t, context)
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1]) for i in range(3)])
    assert relative(together, alone) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_describe_names_every_block_once(family) -> None:
    with torch.device("meta"):
        unet = UNet(family.unet)
    table = unet.describe().splitlines()
    assert len(table) == 1 + len(unet.input_blocks) + 1 + len(unet.output_blocks)
    assert table[0].split() == ["block", "layers", "resolution", "channels", "depth", "diffusers"]
    assert len({row.split()[-1] for row in table[1:]}) == len(table) - 1


def test_describe_tells_resolution_channels_and_depth() -> None:
    with torch.device("meta"):
        table = UNet(FAMILIES["ssd-1b"].unet).describe()
    rows = [row.split() for row in table.splitlines()]
    assert ["middle_block", "res", "1/4", "1280", "-", "mid_block"] in rows
    assert ["output_blocks.2", "res", "transformer", "up", "1/4", "1280", "10", "up_blocks.0.resnets.2"] in rows


def test_an_untrained_unet_predicts_nothing() -> None:
    """The last layer starts at zero, as in the original."""
    unet = UNet(TINY_UNETS["sd1-tiny"])
    assert not unet(normal("x", (1, 4, 8, 8)), torch.tensor([3.0]), normal("c", (1, 4, 64))).any()


@pytest.mark.parametrize(
    "change",
    [{"num_res_blocks": 3}, {"channel_mult": (1, 2)}, {"cross_only": (True,)}, {"heads": None}, {"head_dim": 8}],
    ids=["blocks", "levels", "cross_only", "no heads", "heads twice"],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict) -> None:
    with pytest.raises(ArgumentError, match="UNetConfig"):
        replace(SD1, **change)


def test_the_default_config_is_sd1() -> None:
    assert UNetConfig() == SD1 == FAMILIES["sd1"].unet
