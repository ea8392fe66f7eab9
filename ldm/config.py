"""Sizes and facts of every published family as frozen dataclasses, and the table `FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ldm.errors import ArgumentError
from samplers.schedule import Schedule


@dataclass(frozen=True)
class UNetConfig:
    """The denoising network. Levels are resolutions; level 0 is the finest. Defaults: SD 1."""

    in_channels: int = 4  # latent channels, plus those of concatenated inputs (mask, depth, low-resolution image)
    out_channels: int = 4  # channels of the prediction: the latent's
    model_channels: int = 320  # width of level 0, and of the sinusoidal time embedding
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, in units of model_channels
    num_res_blocks: int = 2  # ResBlocks per level going down; one more per level coming up
    context_dim: int = 768  # width of one token of the conditioning
    heads: int | None = 8  # heads of every attention, whatever its width; or None and ...
    head_dim: int | None = None  # ... the width of one head, the number of heads following from the width
    linear_proj: bool = False  # proj_in/proj_out of a SpatialTransformer stored as matrices, not as 1x1 convolutions
    # transformer blocks after each ResBlock, 0: none. Going down, finest level first; coming up, coarsest level first
    down_depth: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    up_depth: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    mid_depth: int | None = 1  # transformer blocks in the middle; None: the middle is one lone ResBlock
    cross_only: tuple[bool, ...] = (False,) * 4  # per level: attn1 attends to the context instead of the picture
    vector_dim: int | None = None  # width of the conditioning vector that joins the time embedding; None: no such input
    noise_levels: int | None = None  # entries of the noise-level embedding (x4 upscaler); None: no such input

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        down, up = [self.num_res_blocks] * levels, [self.num_res_blocks + 1] * levels
        depths = [len(level) for level in self.down_depth], [len(level) for level in self.up_depth]
        if depths != (down, up) or len(self.cross_only) != levels:
            raise ArgumentError(
                f"UNetConfig: {levels} levels of {self.num_res_blocks} blocks need as many entries in down_depth, "
                f"one more per level in up_depth, and {levels} in cross_only"
            )
        if (self.heads is None) == (self.head_dim is None):
            raise ArgumentError("UNetConfig: give either heads or head_dim; the other is None")

    def heads_of(self, channels: int) -> int:
        """Attention heads of a level of this width."""
        return self.heads or channels // (self.head_dim or channels)

    @property
    def factor(self) -> int:
        """Latent sizes that are multiples of this come back from the UNet at their own size."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents. Defaults: SD 1."""

    channels: int = 128  # width of the finest level
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level; one level more halves the latent again
    num_res_blocks: int = 2  # ResBlocks per level in the encoder; one more in the decoder
    z_channels: int = 4  # channels of the latent
    scale: float = 0.18215  # the UNet sees latent * scale, about unit variance

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one side: 8, or 4 for the upscaler."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text tower and the layer that is read from it. Defaults: SD 1's CLIP ViT-L/14."""

    vocab: int = 49408  # rows of the token embedding
    length: int = 77  # tokens of a prompt, start and end included
    width: int = 768  # width of a token
    layers: int = 12  # blocks, counting those that are skipped
    heads: int = 12  # attention heads
    mlp: int = 3072  # hidden width of the feed-forward part
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # as trained: OpenAI's towers; OpenCLIP's have gelu
    projection: int | None = None  # width of the projected pooled embedding; None: the tower has no projection
    pad: int = 49407  # id that fills a prompt up to `length`: 49407 (end of text) or 0
    skip: int = 0  # last blocks left out of the tokens: 1 is "penultimate"
    norm: bool = True  # final LayerNorm on the tokens


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower. Defaults: ViT-L/14."""

    image: int = 224  # pixels along a side
    patch: int = 14  # pixels along a side of a patch
    width: int = 1024  # width of a patch embedding
    layers: int = 24  # blocks
    heads: int = 16  # attention heads
    mlp: int = 4096  # hidden width of the feed-forward part
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # as in TextConfig
    projection: int = 768  # width of the image embedding


@dataclass(frozen=True)
class DepthConfig:
    """A DPT-hybrid: a ResNet, a vision transformer on it, convolutions that turn both into depth. Defaults: MiDaS's."""

    image: int = 384  # pixels along a side of the training pictures; sets how many places the position embedding has
    stem: int = 64  # channels of the first convolution; the ResNet's stages have 4, 8, 16 times as many
    blocks: tuple[int, ...] = (3, 4, 9)  # bottleneck blocks in each of the three stages
    width: int = 768  # width of a token of the transformer
    layers: int = 12  # its blocks
    heads: int = 12  # its attention heads
    mlp: int = 3072  # hidden width of its feed-forward part
    hooks: tuple[int, ...] = (8, 11)  # its two blocks, counted from 0, whose output is read
    features: int = 256  # channels of the fusion

    def __post_init__(self) -> None:
        if len(self.blocks) != 3 or len(self.hooks) != 2 or not 0 <= self.hooks[0] < self.hooks[1] < self.layers:
            raise ArgumentError(
                f"DepthConfig: three entries in blocks, and two rising hooks below {self.layers} layers; "
                f"not {self.blocks} and {self.hooks}"
            )

    @property
    def patch(self) -> int:
        """Pixels along a side of what becomes one token: the ResNet halves four times."""
        return 16


ScheduleConfig = Schedule  # the noise schedule of training


@dataclass(frozen=True)
class ModelConfig:
    """A family: its networks and what shapes cannot show."""

    name: str  # key in FAMILIES
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: tuple[TextConfig, ...] = (TextConfig(),)  # towers whose tokens are concatenated along their width
    vision: VisionConfig | None = None  # tower whose image embedding is the context (image variations)
    depth: DepthConfig | None = None  # network that guesses the depth of a picture (sd2-depth)
    prediction: Literal["eps", "v"] = "eps"  # what the UNet was trained to predict
    schedule: Schedule = field(default_factory=Schedule)
    size: int = 512  # pixels along a side of the training pictures: the default size
    concat: tuple[str, ...] = ()  # what joins the latent as input, in order: mask, masked_image, depth, low_res
    zero_empty: bool = False  # without a negative prompt, guidance steers away from zeros, not from the empty prompt
    title: str = field(default="", compare=False)  # what a model of this family is, in words: "an SD 1 model"
    base: str = field(default="", compare=False)  # the family it was made from, by more inputs or another prediction

    def __post_init__(self) -> None:
        if self.schedule.zero_snr and self.prediction == "eps":
            raise ArgumentError(
                "ModelConfig: zero_snr with prediction 'eps': of pure noise it says nothing of the picture; "
                "set prediction='v'",
                key="zero_snr",
            )

    @property
    def pooled_tower(self) -> int | None:
        """The text tower, counted from 0, whose pooled text is read; None: no last block or projection is needed."""
        return len(self.text) - 1 if self.text and self.unet.vector_dim is not None else None

    @property
    def family(self) -> ModelConfig:
        """The family of this name, whose title and base count; a model's own config, where there is none."""
        return FAMILIES.get(self.name, self)

    @property
    def kin(self) -> str:
        """The family that shapes show: that it was made from, where they differ in the prediction alone, or itself."""
        base = FAMILIES.get(self.family.base)
        return self.name if base is None or base.concat != self.concat else base.name

    def twin(self, prediction: Literal["eps", "v"]) -> ModelConfig | None:
        """The family with this prediction, where two differ in that alone (SD 2), so no shape shows it; or None."""
        twins = [one for one in FAMILIES.values() if one.kin == self.kin]
        return next((one for one in twins if one.prediction == prediction), None) if len(twins) > 1 else None


CLIP_L = TextConfig()
OPENCLIP_H = TextConfig(width=1024, layers=24, heads=16, mlp=4096, activation="gelu", projection=1024, pad=0, skip=1)
OPENCLIP_BIGG = TextConfig(
    width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280, pad=0, skip=1, norm=False
)

SD1 = UNetConfig()
SD2 = replace(SD1, context_dim=1024, heads=None, head_dim=64, linear_proj=True)
X4 = replace(
    SD2, in_channels=7, model_channels=256, channel_mult=(1, 2, 2, 4), heads=8, head_dim=None,
    down_depth=((0, 0), (1, 1), (1, 1), (1, 1)), up_depth=((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    cross_only=(True, True, True, False), noise_levels=1000,
)  # fmt: skip
SDXL = replace(
    SD2, channel_mult=(1, 2, 4), context_dim=2048, vector_dim=2816, mid_depth=10, cross_only=(False,) * 3,
    down_depth=((0, 0), (2, 2), (10, 10)), up_depth=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
)  # fmt: skip
REFINER = replace(
    SD2, model_channels=384, context_dim=1280, vector_dim=2560, mid_depth=4,
    down_depth=((0, 0), (4, 4), (4, 4), (0, 0)), up_depth=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
)  # fmt: skip
SSD1B = replace(SDXL, mid_depth=None, down_depth=((0, 0), (2, 2), (4, 4)), up_depth=((4, 4, 10), (2, 1, 1), (0, 0, 0)))

VAE_F8 = VAEConfig()
VAE_F4 = VAEConfig(channel_mult=(1, 2, 4), scale=0.08333)
VAE_SDXL = VAEConfig(scale=0.13025)

_sd1 = ModelConfig("sd1", title="an SD 1 model")
_sd2 = ModelConfig("sd2-base", unet=SD2, text=(OPENCLIP_H,), title="an SD 2 model")
_sdxl = ModelConfig(
    "sdxl-base", unet=SDXL, vae=VAE_SDXL, text=(replace(CLIP_L, skip=1, norm=False), OPENCLIP_BIGG),
    size=1024, zero_empty=True, title="an SDXL base model",
)  # fmt: skip


def _inpainting(base: ModelConfig, name: str, title: str) -> ModelConfig:
    """The family of the inpainting models that were made from another family's."""
    unet = replace(base.unet, in_channels=9)
    return replace(base, name=name, unet=unet, concat=("mask", "masked_image"), title=title, base=base.name)


FAMILIES: dict[str, ModelConfig] = {
    family.name: family
    for family in (
        _sd1,
        _inpainting(_sd1, "sd1-inpainting", "an SD 1 inpainting model"),
        replace(_sd1, name="sd-image-variations", text=(), vision=VisionConfig(), title="an SD Image Variations model"),
        _sd2,
        replace(_sd2, name="sd2-v", prediction="v", size=768, base="sd2-base"),
        _inpainting(_sd2, "sd2-inpainting", "an SD 2 inpainting model"),
        replace(
            _sd2, name="sd2-depth", unet=replace(SD2, in_channels=5), depth=DepthConfig(), concat=("depth",),
            title="an SD 2 depth model",
        ),
        replace(
            _sd2, name="x4-upscaler", unet=X4, vae=VAE_F4, prediction="v", schedule=Schedule(0.0001, 0.02),
            concat=("low_res",), title="an SD x4 upscaler",
        ),
        _sdxl,
        _inpainting(_sdxl, "sdxl-inpainting", "an SDXL inpainting model"),
        replace(
            _sdxl, name="sdxl-refiner", unet=REFINER, text=(OPENCLIP_BIGG,), zero_empty=False, title="an SDXL refiner"
        ),
        replace(_sdxl, name="ssd-1b", unet=SSD1B, title="an SSD-1B model"),
    )
}  # fmt: skip
