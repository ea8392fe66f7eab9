"""Prints how far every output is from the original implementations', and at full size from diffusers'."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.models import families
from benchmarks.models import golden as nets
from benchmarks.models.mixture import RUNS, SCHEDULE, TIMESTEPS, noised_latent, run
from benchmarks.models.peers import peer, require, seeded_model
from benchmarks.models.seeded import GOLDEN, golden, normal
from ldm.conditioning.cond import size_embedding
from ldm.conditioning.tokenizer import TruncationWarning, tokenize
from ldm.config import FAMILIES, DepthConfig, ModelConfig
from samplers import GRIDS, finish

LIMIT = 1e-5  # relative; the tests say of each output why, and hold some to less


@dataclass(frozen=True)
class Row:
    """One output against its reference, in float32."""

    kind: str  # which part of the house
    name: str  # of the output
    max: float  # largest error, in units of the reference's root mean square
    rms: float  # root mean square of the error, in the same units
    exact: str = ""  # what must be equal and not only near, counted: "50/50 timesteps"
    elementwise: bool = True  # is `max` held to LIMIT, or `rms`?

    @property
    def ok(self) -> bool:
        """Within the limit, and equal where it must be."""
        equal, _, of = self.exact.split(" ")[0].partition("/")
        return (self.max if self.elementwise else self.rms) < LIMIT and equal == of


def compared(kind: str, name: str, ours: Tensor, theirs: Tensor, exact: str = "", elementwise: bool = True) -> Row:
    """The row for an output and its reference. Raises ValueError if they differ in shape."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our output is {list(ours.shape)}, the reference {list(theirs.shape)}")
    error, unit = ours.double() - theirs.double(), theirs.double().square().mean().sqrt()
    worst, rms = error.abs().max() / unit, error.square().mean().sqrt() / unit
    return Row(kind, name, worst.item(), rms.item(), exact, elementwise)


def equal(ours: Sequence[float], theirs: Sequence[float], what: str) -> str:
    """How many are equal, of how many there should be."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=False)) if len(ours) == len(theirs) else 0
    return f"{same}/{len(theirs)} {what}"


def golden_rows() -> Iterator[Row]:
    """Everything in tests/golden that is an output."""
    yield from _networks()
    yield from _vision()
    yield _depth()
    yield _tokens()
    yield from _samplers()


@torch.no_grad()
def _networks() -> Iterator[Row]:
    file = golden("unet")
    for name in nets.TINY_UNETS:
        yield compared("unet", name, nets.run_unet(name), file[f"{name}/out"])
    sizes = file["sdxl/size_embedding_original_crop_target"]
    yield compared("unet", "sdxl sizes", size_embedding(file["sdxl/sizes"]), sizes)
    file = golden("vae")
    for name, config in nets.TINY_VAES.items():
        vae, side = nets.tiny_vae(name), 8 * config.factor
        image, z = normal(f"{name}/image", (2, 3, side, side)).clamp(-1, 1), normal(f"{name}/z", (2, 4, 8, 8))
        yield compared("vae", f"{name} moments", vae.moments(image), file[f"{name}/moments"])
        # The worst element of what is decoded depends on the processor's instructions, hence its rms.
        yield compared("vae", f"{name} decoded", vae.decode(z), file[f"{name}/decoded"], elementwise=False)
    file = golden("text")
    clip_l = {"last_hidden_state": (0, True), "hidden_states_-2": (1, False), "pooled": None}
    openclip = {"last_ln_final": (0, True), "penultimate_ln_final": (1, True), "penultimate_raw": (1, False)}
    for name, tower, ids, outputs in (
        ("clip-l-tiny", nets.tiny_clip_l(), "ids_pad_eot", clip_l),
        ("openclip-tiny", nets.tiny_openclip(), "ids_pad0", {**openclip, "pooled_projected": None}),
    ):
        for output, layer in outputs.items():
            tokens, pooled = tower(file[ids].long(), *(layer or ()))
            yield compared("text", f"{name} {output}", tokens if layer else pooled, file[f"{name}/{output}"])


@torch.no_grad()
def _vision() -> Iterator[Row]:
    file = golden("vision")
    embedding = nets.tiny_vision()(normal("clip-vision-tiny/pixels", (2, 3, 28, 28)))
    yield compared("vision", "clip-vision-tiny image_embeds", embedding, file["clip-vision-tiny/image_embeds"])
    checker, pixels = nets.tiny_safety(), normal("safety/pixels", (6, 3, 28, 28))
    embedding = checker.visual_projection(checker.vision_model["vision_model"](pixels))
    yield compared("vision", "safety-tiny image_embeds", embedding, file["safety-tiny/image_embeds"])
    ours, theirs = checker(pixels).float(), file["safety-tiny/flags"]
    yield compared("vision", "safety-tiny flags", ours, theirs, equal(ours.tolist(), theirs.tolist(), "flags"))


@torch.no_grad()
def _depth() -> Row:
    """Full size, hence held by its rms: single elements in float32 are off by 2e-4 from those in float64."""
    ours = nets.dpt(DepthConfig())(normal("dpt-hybrid/x", (1, 3, 384, 384)).clamp(-1, 1))
    theirs = nets.as_stored(ours, golden("dpt")["dpt-hybrid/depth"])
    return compared("depth", "dpt-hybrid depth, beyond the reference's float16", ours, theirs, elementwise=False)


def _tokens() -> Row:
    file = json.loads((GOLDEN / "tokens.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        ours = tokenize(file["prompts"], pad=0)
    theirs = torch.tensor(file["ids_padded_with_0"])
    exact = equal(ours.flatten().tolist(), theirs.flatten().tolist(), "ids")
    return compared("text", f"tokens of {len(ours)} prompts", ours, theirs, exact)


def _samplers() -> Iterator[Row]:
    file = golden("samplers")
    for key in sorted(file):
        if "/sigmas/" in key:
            _, _, grid, steps = key.split("/")
            yield compared("grid", key, torch.tensor(GRIDS[grid](SCHEDULE, int(steps))), file[key])
        elif key in RUNS:
            out, timesteps = run(key)
            exact = equal(timesteps, TIMESTEPS[key], "timesteps") if key in TIMESTEPS else ""
            yield compared("sampler", key, out, file[key], exact, elementwise=False)
        elif key == "img2img/encoded_strength0.6":
            x, tail = noised_latent()
            yield compared("sampler", key, finish(x, tail[:1]), file[key], elementwise=False)


@torch.no_grad()
def peer_rows(config: ModelConfig = FAMILIES["sd1"], cells: int = 64) -> Iterator[Row]:
    """Seeded networks of `cells` x `cells` latents against diffusers' and transformers' on the same float32 tensors."""
    model = seeded_model(config)
    theirs = peer(model)
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    x, t = normal("x", (1, 4, cells, cells)), torch.tensor([500.0])
    context = normal("context", (1, 77, config.unet.context_dim))
    yield compared("diffusers", f"UNet, {millions:.1f} M", model.unet(x, t, context), theirs.unet(x, t, context).sample)
    side = cells * config.vae.factor
    image = normal("image", (1, 3, side, side)).clamp(-1, 1)
    moments = theirs.vae.encode(image).latent_dist.parameters
    yield compared("diffusers", "VAE moments", model.vae.moments(image), moments)
    z = normal("z", (1, 4, cells, cells))
    yield compared("diffusers", "VAE decoded", model.vae.decode(z), theirs.vae.decode(z / config.vae.scale).sample)
    ids = tokenize(["a photograph of an astronaut riding a horse", ""]) % config.text[0].vocab
    yield compared("transformers", "text tower", model.text[0](ids)[0], theirs.text(ids).last_hidden_state)


def family_rows() -> Iterator[Row]:
    """Every family at narrow widths, loaded from one diffusers folder by us and by diffusers."""
    for family in families.FOLDERS:
        with tempfile.TemporaryDirectory() as folder:
            for name, ours, theirs in families.rows(family, Path(folder) / family):
                yield compared(family, name, ours, theirs)


def show(row: Row) -> None:
    """Print one line of the table."""
    line = f"{row.kind:19}  {row.name:48}  {row.max:9.1e}  {row.rms:9.1e}  {'ok ' if row.ok else 'FAR'}  {row.exact}"
    print(line.rstrip(), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 0 if every output is as near as it should be, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    full = "compare full-size SD 1 networks with diffusers and transformers too: 9 GB, minutes"
    narrow = "compare narrow networks of every family with diffusers and transformers too: a minute"
    cells = "side of the full-size comparison's latent, a multiple of 8 (default: %(default)s)"
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--families", action="store_true", help=narrow)
    parser.add_argument("--cells", type=int, default=64, help=cells)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.cells < 8 or args.cells % 8:
        parser.error(f"--cells {args.cells}: give a multiple of 8")
    if args.full or args.families:
        require("bench", "diffusers", "transformers")
    head = f"{'':19}  {'output':48}  {'max':>9}  {'rms':>9}  of the error, relative to the reference's rms"
    print(f"{head}; limit {LIMIT:g}")
    rows = []
    wanted = [golden_rows()]
    wanted += [family_rows()] if args.families else []
    wanted += [peer_rows(cells=args.cells)] if args.full else []
    for row in chain(*wanted):
        show(row)
        rows.append(row)
    far = [row for row in rows if not row.ok]
    print(f"{len(rows)} outputs, {len(far)} beyond the limit")
    if args.out:
        here = machine(packages=("diffusers", "transformers") if args.full or args.families else ())
        found = {"machine": here, "limit": LIMIT, "rows": [{**asdict(row), "ok": row.ok} for row in rows]}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
