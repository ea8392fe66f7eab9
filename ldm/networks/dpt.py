"""MiDaS' DPT-hybrid, which guesses the depth that depth-to-image is conditioned on."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import DepthConfig
from ldm.errors import ArgumentError
from ldm.networks.clip import MLP
from ldm.networks.modules import Modules

MULTIPLE = 32  # of height and width: the coarsest map has H/32 x W/32 cells


def pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros with which windows give size / stride cells, an odd one right and below. The stride divides the size."""
    whole = max(kernel - stride, 0)
    return F.pad(x, (whole // 2, whole - whole // 2) * 2)


class StdConv(nn.Conv2d):
    """A convolution whose kernels get mean 0 and variance 1 (Qiao et al. 2019, eq. 4), padded by `pad_same`."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__(channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))  # 1e-8 is 0 in float16
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = ((weight - mean) * torch.rsqrt(var + 1e-8)).to(self.weight.dtype)
        return F.conv2d(pad_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class ConvNorm(nn.Module):
    """A convolution and its GroupNorm: the stem, and the way around a block that changes shape."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int):
        super().__init__()
        self.conv, self.norm = StdConv(channels, out_channels, kernel, stride), nn.GroupNorm(32, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Three convolutions at a quarter of the width, and x added. A stage's first block changes the shape."""

    def __init__(self, channels: int, out_channels: int, stride: int, first: bool):
        super().__init__()
        inner = out_channels // 4
        self.downsample = ConvNorm(channels, out_channels, 1, stride) if first else nn.Identity()
        self.conv1, self.norm1 = StdConv(channels, inner, 1), nn.GroupNorm(32, inner)
        self.conv2, self.norm2 = StdConv(inner, inner, 3, stride), nn.GroupNorm(32, inner)
        self.conv3, self.norm3 = StdConv(inner, out_channels, 1), nn.GroupNorm(32, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(self.downsample(x) + self.norm3(self.conv3(h)))


class Stage(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, channels: int, out_channels: int, blocks: int, stride: int):
        super().__init__()
        first = Bottleneck(channels, out_channels, stride, first=True)
        others = (Bottleneck(out_channels, out_channels, 1, first=False) for _ in range(blocks - 1))
        self.blocks = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResNet(nn.Module):
    """BiT's ResNet (Kolesnikov et al. 2020) to its third stage: [b, 3, H, W] -> maps of 1/4, 1/8 and 1/16 the size."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        widths = [config.stem, *(config.stem * m for m in (4, 8, 16))]
        self.stem = ConvNorm(3, config.stem, 7, 2)
        self.stages = Modules(
            Stage(widths[i], widths[i + 1], blocks, 2 if i else 1) for i, blocks in enumerate(config.blocks)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(pad_same(F.relu(self.stem(x)), 3, 2), 3, 2)  # nothing is below the zeros of the padding
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Attention(nn.Module):
    """Multi-head self-attention, q, k and v from one matrix."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (part h d) -> part b h n d", part=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class TransformerBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))  # as trained
        self.attn = Attention(config.width, config.heads)
        self.mlp = MLP(config.width, config.mlp, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The ResNet, and its last map as tokens."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.backbone = ResNet(config)
        self.proj = nn.Conv2d(16 * config.stem, config.width, 1)


class VisionTransformer(nn.Module):
    """ViT-B/16 on the ResNet (Dosovitskiy et al. 2021, section 3.1). Its last `norm` is in every file, and unused."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.side = config.image // config.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = Modules(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def embed(self, coarse: Tensor) -> Tensor:
        """The ResNet's last map [b, c, h, w] -> tokens [b, 1 + h w, width], the first for the whole picture."""
        x = rearrange(self.patch_embed.proj(coarse), "b c h w -> b (h w) c")
        places = rearrange(self.pos_embed[:, 1:], "b (h w) c -> b c h w", h=self.side)
        places = rearrange(F.interpolate(places, coarse.shape[2:], mode="bilinear"), "b c h w -> b (h w) c")
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return tokens + torch.cat([self.pos_embed[:, :1], places], dim=1)


class Readout(nn.Module):
    """Joins the token for the whole picture to every other one: [b, 1 + n, width] -> [b, n, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        whole, patches = x[:, :1], x[:, 1:]
        return self.project(torch.cat([patches, whole.expand_as(patches)], dim=2))


class Reassemble(nn.ModuleDict):
    """Tokens [b, 1 + h w, width] -> h x w cells, or half that. Named by places in the original's list."""

    def __init__(self, width: int, halve: bool):
        super().__init__({"0": Readout(width), "3": nn.Conv2d(width, width, 1)})
        self["4"] = nn.Conv2d(width, width, 3, stride=2, padding=1) if halve else nn.Identity()

    def forward(self, x: Tensor, height: int) -> Tensor:
        return self["4"](self["3"](rearrange(self["0"](x), "b (h w) c -> b c h w", h=height)))


class Pretrained(nn.Module):
    """[b, 3, H, W] -> maps of 1/4, 1/8, 1/16 and 1/32 the size: two from the ResNet, two from the transformer."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.hooks = config.hooks
        self.model = VisionTransformer(config)
        self.act_postprocess3 = Reassemble(config.width, halve=False)
        self.act_postprocess4 = Reassemble(config.width, halve=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second, coarse = self.model.patch_embed.backbone(x)
        tokens, read = self.model.embed(coarse), []
        for i, block in enumerate(self.model.blocks):
            tokens = block(tokens)
            if i in self.hooks:
                read.append(tokens)
        height = coarse.shape[2]
        return [first, second, self.act_postprocess3(read[0], height), self.act_postprocess4(read[1], height)]


class ResidualConvUnit(nn.Module):
    """Two convolutions around which x is added."""

    def __init__(self, features: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(features, features, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Adds a finer map to that of the coarser ones, and doubles the size. The coarsest `resConfUnit1` is unused."""

    def __init__(self, features: int):
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = ResidualConvUnit(features), ResidualConvUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2.0, mode="bilinear", align_corners=True)  # as trained
        return self.out_conv(x)


class Scratch(nn.Module):
    """Four maps, finest first -> [b, 1, H, W], not negative. This part was trained from scratch, hence its name."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        for i, channels in enumerate((4 * config.stem, 8 * config.stem, config.width, config.width), start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(channels, config.features, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", Fusion(config.features))
        half = config.features // 2
        self.output_conv = nn.Sequential(
            nn.Conv2d(config.features, half, 3, padding=1), nn.UpsamplingBilinear2d(scale_factor=2),
            nn.Conv2d(half, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, x = (getattr(self, f"layer{i}_rn")(x) for i, x in enumerate(maps, start=1))
        for i in (4, 3, 2, 1):
            x = getattr(self, f"refinenet{i}")(x, finer[i - 1] if i < 4 else None)
        return self.output_conv(x)


class DPT(nn.Module):
    """DPT-hybrid (Ranftl et al. 2021, section 3), with the names of MiDaS.

    The published depth-to-image file has them under `depth_model.model.`, and perhaps `pretrained.model.head.*`, the
    classifier of the transformer's pretraining; it is not built, because nothing reads it and folders lack it.
    """

    def __init__(self, config: DepthConfig):
        super().__init__()
        self.config = config
        self.pretrained, self.scratch = Pretrained(config), Scratch(config)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, H, W] in [-1, 1], from `depth_input` -> relative inverse depth [b, H, W], at least 0, near is large.

        Raises ArgumentError unless H and W are multiples of 32.
        """
        if x.shape[2] % MULTIPLE or x.shape[3] % MULTIPLE or 0 in x.shape:
            what = f"a picture of {x.shape[3]}x{x.shape[2]} for the depth network"
            raise ArgumentError(f"{what}: both must be multiples of {MULTIPLE}; see depth_input")
        return self.scratch(self.pretrained(x)).squeeze(1)


def depth_input(image: Tensor, side: int = 384) -> Tensor:
    """[b, 3, H, W] in [-1, 1] -> the network's input: about the same shape, one side near `side`, both multiples of 32.

    Of the two scales that make a side `side`, the one nearer to 1 is taken, as MiDaS' "minimal" does; each side is then
    rounded, halves to the even multiple. Cubic without antialias, as OpenCV's INTER_CUBIC. The original's
    (x - 0.5) / 0.5 of levels in [0, 1] is [-1, 1] again.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ArgumentError(f"pictures are tensors [b, 3, H, W]; this one is {list(image.shape)}")
    scales = (side / length for length in image.shape[2:])
    scale = min(scales, key=lambda scale: abs(1 - scale))  # of two as near, the height's
    # the original's minimum is 0, at which a picture of 40 : 1 fails in it
    height, width = (max(MULTIPLE, round(scale * length / MULTIPLE) * MULTIPLE) for length in image.shape[2:])
    return F.interpolate(image.float(), (height, width), mode="bicubic", align_corners=False)


def normalised_depth(depth: Tensor, size: tuple[int, int]) -> Tensor:
    """Depth [b, 1, H, W] of any scale, near is large -> [b, 1, h, w] float32, each picture stretched to [-1, 1].

    size  (h, w) in latent cells
    The 0.001 is training's: where other programs leave it out, constant depth gives NaN. Here it gives -1.
    Original: LatentDepth2ImageDiffusion.get_input of Stability-AI/stablediffusion.
    """
    depth = F.interpolate(depth.float(), size, mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    return 2 * (depth - low) / (high - low + 0.001) - 1


def depth_map(model: DPT, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [b, 3, H, W] in [-1, 1] -> sd2-depth's input [b, 1, h, w] in [-1, 1] for latents of `size` (h, w)."""
    weight = model.pretrained.model.cls_token
    x = depth_input(image, model.config.image).to(weight.device, weight.dtype)
    return normalised_depth(model(x)[:, None], size)
