"""The config.json files of a diffusers folder -> `ModelConfig`: every number in range and as the tensors have it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from ldm.config import DepthConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.errors import FileError
from samplers.schedule import Schedule
from weights.files.folders import read_json
from weights.files.opened import Tensors
from weights.names.detect import without_unread
from weights.names.family import family, named, require_family
from weights.names.folders import diffusers, shown_in_folder
from weights.names.layout import Layout
from weights.names.prediction import SCHEDULER, ZERO_SNR
from weights.names.sizes import Config, visible, visible_unet

# Settings of which the published models have one value; another would need another network.
UNET_FIXED = {
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "downsample_padding": 1, "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default",
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "time_embedding_type": "positional", "time_embedding_act_fn": None, "timestep_post_act": None,
    "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "class_embed_type": None, "class_embeddings_concat": False, "cross_attention_norm": None,
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
}  # fmt: skip
VAE_FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_num_groups": 32, "shift_factor": None,
             "latents_mean": None, "use_quant_conv": True, "use_post_quant_conv": True,
             "mid_block_add_attention": True}  # fmt: skip
DEPTH_FIXED = {
    "is_hybrid": True, "readout_type": "project", "use_batch_norm_in_fusion_residual": False, "add_projection": False,
    "qkv_bias": True,
}  # fmt: skip
MAX_CELLS = 4096  # of a latent along one side
SCHEDULERS = ("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
              "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "KDPM2Discrete", "KDPM2AncestralDiscrete",
              "DEISMultistep", "UniPCMultistep", "SASolver", "LCM", "TCD")  # fmt: skip


def describe(folder: Tensors, config: ModelConfig | str | None) -> tuple[ModelConfig, Layout]:
    """The config of the model in a folder, and the layout of its tensors.

    The folder's metadata get what its scheduler says of the training. `config` overrules as in `detect`. Raises
    FileError that names the file and field for numbers out of range, classes and settings that this version does not
    know, and numbers that the tensors contradict.
    """
    if isinstance(config, str):
        require_family(config)
    shapes = {key: folder.shape(key) for key in folder}
    folders = {key.split("/")[0] for key in shapes}
    towers = [name for name in ("text_encoder", "text_encoder_2") if name in folders]
    there = shown_in_folder(shapes)
    if isinstance(config, ModelConfig):
        known = without_unread(config, there.text)
        return known, diffusers(known, folders)

    path = folder.path
    fields = component(path, "unet", "UNet2DConditionModel")
    unet = _agreeing(folder, "unet", _unet(fields), there.unet)
    marks = {"cc_projection.": ()} if (path / "cc_projection").is_dir() else {}
    known = named(family(visible_unet(unet), "image_encoder" in folders, marks), config, path)
    vae = _agreeing(folder, "vae", read_vae_config(component(path, "vae", "AutoencoderKL"), known.vae), there.vae)
    cells = fields.whole("sample_size", known.size // vae.factor, MAX_CELLS)
    known = replace(known, unet=unet, vae=vae, schedule=_schedule(folder, known.schedule), size=cells * vae.factor)
    if len(towers) != len(known.text):
        what = f"has {len(towers)} text encoders, a model of family {known.name} has {len(known.text)}"
        raise folder.error(f"{what}; download the whole folder")
    text = []
    for i, name in enumerate(towers):
        tower = there.text[i]
        if tower is not None and i != known.pooled_tower:
            tower = replace(tower, projection=None)
        text.append(_agreeing(folder, name, _text(component(path, name, "CLIP"), known, i), tower))
    known = replace(known, text=tuple(text))
    if known.vision is not None:
        vision = read_vision_config(component(path, "image_encoder", "CLIP"))
        known = replace(known, vision=_agreeing(folder, "image_encoder", vision, there.vision))
    if known.depth is not None and "depth_estimator" in folders:
        known = replace(known, depth=_depth(component(path, "depth_estimator", "DPTForDepthEstimation"), known.depth))
    return known, diffusers(known, folders)


def _agreeing(folder: Tensors, name: str, claimed: Config, there: Config | None) -> Any:
    """The config that was claimed, if the tensors show the same: nothing is built from its numbers alone."""
    shown = visible(claimed)
    if there != shown:
        odd = (
            ""
            if there is None
            else next(
                field.name for field in fields_of(shown) if getattr(there, field.name) != getattr(shown, field.name)
            )
        )
        detail = f"; {odd} is {getattr(shown, odd)} there, {getattr(there, odd)} here" if odd else ""
        raise FileError(
            f"does not describe the tensors beside it{detail}", path=folder.path / name / "config.json", key=odd or None
        )
    return claimed


def _unet(fields: Fields) -> UNetConfig:
    fields.require(UNET_FIXED)
    widths = fields.widths("block_out_channels", [320, 640, 1280, 1280])
    levels = len(widths)
    blocks = fields.single("layers_per_block", 2, levels, MAX_LAYERS)
    down = _attends(fields, "down_block_types", "CrossAttnDownBlock2D", "DownBlock2D", levels, [True] * 3 + [False])
    up = _attends(fields, "up_block_types", "CrossAttnUpBlock2D", "UpBlock2D", levels, [False] + [True] * 3)
    mid = fields.one_of("mid_block_type", "UNetMidBlock2DCrossAttn", ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"))
    depths = fields.listed("transformer_layers_per_block", 1, levels)
    reverse = fields.values.get("reverse_transformer_layers_per_block")
    ups = depths[::-1] if reverse is None else fields.listed("reverse_transformer_layers_per_block", 1, levels)

    def per_block(field: str, depth: Any, n: int, there: bool) -> tuple[int, ...]:
        if not there:
            return (0,) * n
        each = depth if isinstance(depth, list) else [depth] * n
        if len(each) != n:
            raise fields.error(field, f"has {len(each)} entries for a level of {n} blocks")
        return tuple(fields.count(field, one, MAX_LAYERS) for one in each)

    def by_level(field: str, depths: list[Any], n: int, attends: list[bool]) -> tuple[tuple[int, ...], ...]:
        return tuple(per_block(field, depth, n, there) for depth, there in zip(depths, attends, strict=True))

    down_depth = by_level("transformer_layers_per_block", depths, blocks, down)
    up_depth = by_level("reverse_transformer_layers_per_block", ups, blocks + 1, up)
    heads, head_dim = _heads(fields, widths)
    cross_only = tuple(map(bool, fields.listed("only_cross_attention", False, levels)))
    vector = fields.values.get("addition_embed_type")
    if vector is not None:
        fields.one_of("addition_embed_type", None, ("text_time",))
    levels_of_noise = fields.values.get("num_class_embeds")
    return UNetConfig(
        in_channels=fields.whole("in_channels", 4),
        out_channels=fields.whole("out_channels", 4),
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=blocks,
        context_dim=fields.single("cross_attention_dim", 1280, levels),
        heads=heads,
        head_dim=head_dim,
        linear_proj=fields.flag("use_linear_projection", False),
        down_depth=down_depth,
        up_depth=up_depth,
        mid_depth=None
        if mid == "UNetMidBlock2D"
        else fields.count("transformer_layers_per_block", depths[-1], MAX_LAYERS),
        cross_only=cross_only,
        vector_dim=None if vector is None else fields.whole("projection_class_embeddings_input_dim", 2816),
        noise_levels=None if levels_of_noise is None else fields.count("num_class_embeds", levels_of_noise),
    )


def _attends(fields: Fields, field: str, cross: str, plain: str, levels: int, default: list[bool]) -> list[bool]:
    """Which levels have transformers, by the classes named."""
    kinds = fields.listed(field, [cross if there else plain for there in default], levels)
    for kind in kinds:
        if kind not in (cross, plain):
            raise fields.error(field, f"has {str(kind)[:40]}; this version knows {cross} and {plain}")
    return [kind == cross for kind in kinds]


def _heads(fields: Fields, widths: list[int]) -> tuple[int | None, int | None]:
    """(heads, None) or (None, width of a head). diffusers' attention_head_dim is the number of heads, as they say."""
    field = "num_attention_heads" if fields.values.get("num_attention_heads") is not None else "attention_head_dim"
    heads = [fields.count(field, n) for n in fields.listed(field, 8, len(widths))]
    if any(width % n for width, n in zip(widths, heads, strict=True)):
        raise fields.error(field, f"is {heads}, which does not divide the widths {widths}")
    if len(set(heads)) == 1:
        return heads[0], None
    dims = {width // n for width, n in zip(widths, heads, strict=True)}
    if len(dims) > 1:
        raise fields.error(field, f"is {heads}: neither the heads nor their width are the same at all levels")
    return None, dims.pop()


def read_vae_config(fields: Fields, known: VAEConfig) -> VAEConfig:
    """A VAE's config.json; the scale is `known`'s where it is not told."""
    fields.require(VAE_FIXED)
    widths = fields.widths("block_out_channels", [64])
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if fields.listed(field, [kind], len(widths)) != [kind] * len(widths):
            raise fields.error(field, f"are not all {kind}, the only kind this version knows")
    return VAEConfig(
        channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=fields.whole("layers_per_block", 1, MAX_LAYERS),
        z_channels=fields.whole("latent_channels", 4),
        scale=fields.number("scaling_factor", known.scale, 1e-4, 100.0),
    )


def _text(fields: Fields, known: ModelConfig, i: int) -> TextConfig:
    """Tower i: sizes from the file, the rest from its family. SD 2's folders end with the last block that is read."""
    usual = known.text[i]
    fields.require({"layer_norm_eps": 1e-5})
    width, layers = fields.whole("hidden_size", 512), fields.whole("num_hidden_layers", 12, MAX_LAYERS)
    return replace(
        usual,
        vocab=fields.whole("vocab_size", 49408, 2**20),
        length=fields.whole("max_position_embeddings", 77),
        width=width,
        layers=layers,
        heads=fields.dividing("num_attention_heads", 8, width),
        mlp=fields.whole("intermediate_size", 2048),
        activation=fields.one_of("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        projection=fields.whole("projection_dim", 512) if i == known.pooled_tower else None,
        skip=min(usual.skip, layers - 1) if known.unet.vector_dim is not None else 0,
    )


def read_vision_config(fields: Fields) -> VisionConfig:
    """The config.json of a vision tower, alone or in a CLIP or a safety checker."""
    inner = (
        fields.inner("vision_config") if "vision_config" in fields.values else fields
    )  # the first folders held a whole CLIP
    inner.require({"layer_norm_eps": 1e-5, "num_channels": 3})
    width, image = inner.whole("hidden_size", 768), inner.whole("image_size", 224)
    return VisionConfig(
        image=image,
        patch=inner.dividing("patch_size", 32, image),
        width=width,
        layers=inner.whole("num_hidden_layers", 12, MAX_LAYERS),
        heads=inner.dividing("num_attention_heads", 12, width),
        mlp=inner.whole("intermediate_size", 3072),
        activation=inner.one_of("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
        projection=fields.whole("projection_dim", 512),
    )


def _depth(fields: Fields, known: DepthConfig) -> DepthConfig:
    """The depth network: a hybrid, whose transformer is read at the last two of its hooks."""
    fields.require(DEPTH_FIXED)
    resnet = fields.inner("backbone_config")
    resnet.require({"layer_type": "bottleneck", "num_groups": 32})
    width = fields.whole("hidden_size", known.width)
    layers = fields.whole("num_hidden_layers", known.layers, MAX_LAYERS)
    hooks = fields.listed("backbone_out_indices", [0, 0, *known.hooks], 4)[2:]
    if any(type(hook) is not int for hook in hooks) or not 0 <= hooks[0] < hooks[1] < layers:
        raise fields.error("backbone_out_indices", f"ends in {hooks}, not in two rising numbers below {layers}")
    return DepthConfig(
        image=fields.whole("image_size", known.image),
        stem=resnet.whole("embedding_size", known.stem),
        blocks=tuple(resnet.count("depths", n, MAX_LAYERS) for n in resnet.listed("depths", [*known.blocks], 3)),
        width=width,
        layers=layers,
        heads=fields.dividing("num_attention_heads", known.heads, width),
        mlp=fields.whole("intermediate_size", known.mlp),
        hooks=tuple(hooks),
        features=fields.whole("fusion_hidden_size", known.features),
    )


def _schedule(folder: Tensors, known: Schedule) -> Schedule:
    """The noise schedule of training, where the folder tells it; what is predicted goes to the folder's metadata."""
    path = folder.path / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return known
    fields = Fields(path, read_json(path))
    name = fields.values.get("_class_name")
    if name is not None and name not in [f"{kind}Scheduler" for kind in SCHEDULERS]:
        raise fields.error("_class_name", f"is {str(name)[:40]}, a schedule that this version does not know")
    fields.require({"trained_betas": None})
    fields.one_of("beta_schedule", "scaled_linear", ("scaled_linear",))
    start = fields.number("beta_start", known.start, 1e-9, 0.999)
    end = fields.number("beta_end", known.end, 1e-9, 0.999)
    if start > end:
        raise fields.error("beta_start", f"is {start}, above beta_end {end}")
    prediction = fields.values.get("prediction_type")
    if prediction is not None:
        folder.metadata[SCHEDULER] = str(prediction)
    if fields.flag("rescale_betas_zero_snr", False):
        folder.metadata[ZERO_SNR] = "true"
    return Schedule(start, end, fields.whole("num_train_timesteps", known.steps))


MAX_WIDTH, MAX_LAYERS, MAX_ITEMS = 2**16, 128, 16


@dataclass(frozen=True)
class Fields:
    """The fields, and the file that errors name."""

    path: Path
    values: Mapping[str, Any]

    def error(self, field: str, what: str) -> FileError:
        """The error to raise about a field."""
        return FileError(f"{field} {what}", path=self.path, key=field)

    def inner(self, field: str) -> Fields:
        """The fields of an object inside; none where it is not there."""
        value = self.values.get(field, {})
        if not isinstance(value, dict):
            raise self.error(field, "is not an object")
        return Fields(self.path, value)

    def whole(self, field: str, default: int, limit: int = MAX_WIDTH) -> int:
        """A whole number from 1 to `limit`."""
        return self.count(field, self.values.get(field, default), limit)

    def count(self, field: str, value: Any, limit: int = MAX_WIDTH) -> int:
        """`value`, if it is a whole number from 1 to `limit`."""
        if type(value) is not int or not 1 <= value <= limit:
            raise self.error(field, f"is {str(value)[:40]}, not a whole number from 1 to {limit}")
        return value

    def dividing(self, field: str, default: int, width: int) -> int:
        """A whole number that divides `width`."""
        n = self.whole(field, default)
        if width % n:
            raise self.error(field, f"is {n}, which does not divide {width}")
        return n

    def number(self, field: str, default: float, low: float, high: float) -> float:
        """A finite number within [low, high]."""
        value = self.values.get(field, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.error(field, f"is {str(value)[:40]}, not a number from {low} to {high}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        return self.one_of(field, default, (True, False))

    def one_of(self, field: str, default: Any, options: Sequence[Any]) -> Any:
        """One of a few values."""
        value = self.values.get(field, default)
        if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options):
            raise self.error(field, f"is {str(value)[:40]}; this version knows {', '.join(map(str, options))}")
        return value

    def require(self, fixed: Mapping[str, Any]) -> None:
        """Refuse settings that would need another network."""
        for field, value in fixed.items():
            self.one_of(field, value, (value,))

    def listed(self, field: str, default: Any, length: int | None = None) -> list[Any]:
        """A list of 1 to MAX_ITEMS, or of `length`, items; where a length is asked for, one value stands for all."""
        value = self.values.get(field, default)
        if length is not None and not isinstance(value, list):
            value = [value] * length
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ITEMS or len(value) != (length or len(value)):
            raise self.error(field, f"is not a list of {length or f'1 to {MAX_ITEMS}'} items")
        return value

    def widths(self, field: str, default: Any) -> list[int]:
        """Widths of levels: multiples of 32, as GroupNorm wants, and of the first."""
        widths = [self.count(field, width) for width in self.listed(field, default)]
        if any(width % widths[0] or width % 32 for width in widths):
            raise self.error(field, f"is {widths}, not multiples of 32 and of the first")
        return widths

    def single(self, field: str, default: Any, length: int, limit: int = MAX_WIDTH) -> int:
        """A whole number, given once or for every level the same."""
        values = {self.count(field, value, limit) for value in self.listed(field, default, length)}
        if len(values) > 1:
            raise self.error(field, "differs from level to level, which this version does not know")
        return values.pop()


def component(folder: Path, name: str, kind: str | tuple[str, ...]) -> Fields:
    """The config.json of a component. Its class, which is never looked up, must have a name that begins with `kind`."""
    fields = Fields(folder / name / "config.json", read_json(folder / name / "config.json"))
    named = fields.values.get("_class_name")
    if named is None:
        architectures = fields.values.get("architectures")
        named = architectures[0] if isinstance(architectures, list) and architectures else None
    if named is not None and not (isinstance(named, str) and named.startswith(kind)):
        known = kind if isinstance(kind, str) else kind[0]
        raise fields.error("_class_name", f"is {str(named)[:40]}; this version knows {known}")
    return fields
