"""What a file without a UNet in it is instead of a model: one table of kinds, each with what to do about it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal

from weights.names.sizes import UNET, VAE, Shapes

What = Literal[
    "model", "unet", "vae", "text tower", "safety checker", "lora", "embedding", "controlnet", "transformer", "other"
]
LORA = r"^lora_|\.lora_|_lora\.|hada_w|lokr_w"  # in keys of LoRAs
LARGEST_VECTORS = 1_000_000  # numbers in a tensor of an embedding


@dataclass(frozen=True)
class Kind:
    """A kind of file that holds weights and is not what was wanted."""

    what: What
    mark: str | Callable[[Shapes], str | None]  # a pattern in the key by which it is known, or what finds that key
    title: str  # in words
    remedy: str  # what to do with such a file
    detail: str = ""  # what of it is shown; {} stands for the key

    def key(self, shapes: Shapes) -> str | None:
        """The key by which a file is known to be of this kind; None: it is of another."""
        if isinstance(self.mark, str):
            return next((key for key in shapes if re.search(self.mark, key)), None)
        return self.mark(shapes)


def vae_key(keys: Container[str]) -> str | None:
    """A key of the VAE in a file that has an encoder and a decoder, under any known names."""
    pairs = ([f"{prefix}{half}.conv_in.weight" for half in ("encoder", "decoder")] for prefix in ("", VAE))
    return next((encoder for encoder, decoder in pairs if encoder in keys and decoder in keys), None)


def _diffusers_unet(shapes: Shapes) -> str | None:
    there = "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes)
    return "conv_in.weight" if there else None


def _embedding(shapes: Shapes) -> str | None:
    small = all(len(shape) <= 2 and math.prod(shape) <= LARGEST_VECTORS for shape in shapes.values())
    wrapped = any(key.startswith("string_to_param.") for key in shapes)
    return next(iter(shapes)) if wrapped or (small and len(shapes) <= 3) else None


MADE_FOR = "beside the model that it was made for"
KINDS = (  # a file is of the first kind that fits
    Kind("model", rf"^{re.escape(UNET)}input_blocks\.0\.0\.weight$", "a whole model", "give it as the model"),
    Kind("lora", LORA, "a LoRA", f"use it with --lora, {MADE_FOR}", "{}"),
    Kind("transformer", r"(double|joint)_blocks\.", "a Flux or SD 3 transformer",
         "use a Stable Diffusion checkpoint, which has a UNet"),
    Kind("controlnet", r"^(control_model\.|controlnet_)", "a ControlNet", "load the model that it steers"),
    Kind("vae", vae_key, "a VAE alone", "use it with --vae (weights.load_vae), beside a complete checkpoint"),
    Kind("unet", _diffusers_unet, "a diffusers UNet alone",
         "name the folder that unet/, vae/ and text_encoder/ are in"),
    Kind("unet", r"^(diffusion_model\.)?input_blocks\.0\.0\.weight$", "a bare UNet", "use a complete checkpoint",
         f"no {UNET} in its names"),
    Kind("safety checker", "^special_care_embeds", "a safety checker", "use it with --safety"),
    Kind("text tower", r"text_model\.encoder\.layers\.0\.", "a text tower alone", "use a complete checkpoint"),
    Kind("embedding", _embedding, "a textual-inversion embedding", f"use it with --embedding, {MADE_FOR}", "{}"),
)  # fmt: skip


def kind_of(shapes: Shapes) -> Kind | None:
    """What a file with tensors of these shapes is; None: it is of no known kind."""
    return next((kind for kind in KINDS if kind.key(shapes) is not None), None)


def instead(shapes: Shapes, wanted: What = "model") -> str:
    """What a file is instead of what was wanted, and what to do with it: the text of an error."""
    kind, a_wanted = kind_of(shapes), f"a {'VAE' if wanted == 'vae' else wanted}"
    another = f"use a file of {a_wanted}"
    if kind is not None and kind.what == wanted:
        return f"is {a_wanted} whose names this version does not know; {another} of the original code or of diffusers"
    if kind is not None:
        shown = kind.detail.format((kind.key(shapes) or "")[:60])
        remedy = kind.remedy if "model" in (wanted, kind.what) else another
        return f"is {kind.title}{f' ({shown})' if shown else ''}, not {a_wanted}; {remedy}"
    first = next(iter(shapes))[:40]
    if wanted == "model":
        what = f"has no UNet ({UNET}input_blocks.0.0.weight is missing; it begins with {first})"
        return f"{what}; use a Stable Diffusion checkpoint"
    return f"begins with {first}: that is not {a_wanted}; {another}"
