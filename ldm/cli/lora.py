"""`ldm lora`: LoRA files made from two checkpoints, merged into one, cut to a rank, spelled for other tools."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import weights
from ldm.cli import arguments, files, terminal
from ldm.errors import printable

FORMATS = ("kohya", "diffusers", "peft")


def add_lora(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm lora`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=arguments.Parser)
    extract = _action(
        actions, "extract", "the difference of two checkpoints, by singular value decomposition, in kohya's names"
    )
    extract.add_argument(
        "base", metavar="BASE", help="the checkpoint that the LoRA will be used with: a file or a diffusers folder"
    )
    extract.add_argument("tuned", metavar="TUNED", help="the checkpoint that BASE becomes by it, of the same family")
    _add_rank(extract)
    extract.add_argument(
        "--conv-rank",
        type=arguments.whole,
        metavar="N",
        help="ResBlocks and resamplers too, at this rank; with --variance at this at most",
    )
    extract.add_argument("--no-text", dest="text", action="store_false", help="leave the text towers out")
    extract.add_argument(
        "--full-rest",
        action="store_true",
        help="keep what low rank cannot carry (norms, biases, embeddings, other layers) as full differences",
    )
    extract.add_argument(
        "--dtype",
        type=files.stored_type,
        default="fp16",
        metavar="TYPE",
        help="of the factors: fp32, fp16 or bf16 (default: %(default)s)",
    )

    merge = _action(actions, "merge", "a checkpoint with LoRAs merged into it")
    merge.add_argument("checkpoint", metavar="CKPT", help=".safetensors or .ckpt; every key keeps its name and place")
    merge.add_argument(
        "loras",
        nargs="+",
        type=scaled_lora,
        metavar="LORA[:SCALE]",
        help="LoRA and its scale (default: 1), or UNET:TEXT, one of the UNet and one of the text towers",
    )
    merge.add_argument(
        "--dtype",
        type=files.stored_type,
        metavar="TYPE",
        help="of the networks: fp32, fp16 or bf16 (default: as they are)",
    )

    resize = _action(actions, "resize", "the same LoRA, of another rank")
    convert = _action(actions, "convert", "the same LoRA, in the names of another tool")
    for action in (resize, convert):
        action.add_argument("lora", metavar="LORA", help="a file, or a folder of diffusers or peft")
    _add_rank(resize)
    convert.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="whose names; peft's are a directory with a folder for each network",
    )
    resize.add_argument("--to", choices=FORMATS, help="whose names (default: those of LORA)")
    convert.add_argument(
        "--as-lora",
        type=arguments.whole,
        metavar="RANK",
        help="re-express what --to cannot hold (LoHa, LoKr, cores, full differences) as products of this rank",
    )
    for action in (resize, convert):
        family = action.add_mutually_exclusive_group()
        family.add_argument(
            "--family", metavar="NAME", help="of the models that it is for (default: the one whose layers it names)"
        )
        family.add_argument("--ckpt", metavar="FILE", help="a model that it is for, where it is of no published size")
        action.add_argument(
            "--dtype",
            type=files.stored_type,
            metavar="TYPE",
            help="of the factors: fp32, fp16 or bf16 (default: as they are)",
        )
    for action in (extract, resize):
        action.add_argument(
            "--list",
            action="store_true",
            help="a line for each module: its rank and the share of its energy that is kept",
        )


def _action(actions: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=what, description=f"Write {what}.", allow_abbrev=False)
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="where to write; .ckpt, .pt and .bin are written as torch does, all else as .safetensors",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace PATH if it is there")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _add_rank(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--rank", type=arguments.whole, metavar="N", help="of every module")
    group.add_argument(
        "--variance",
        type=arguments.number,
        metavar="SHARE",
        help="instead, for each module the least rank that keeps this share of its energy, 0.95 for example",
    )
    parser.add_argument("--max-rank", type=arguments.whole, metavar="N", help="with --variance: no more than this")


def scaled_lora(text: str) -> tuple[str, float | tuple[float, float]]:
    """a.pt:0.8 -> ("a.pt", 0.8); a.pt:0.8:0.5 -> ("a.pt", (0.8, 0.5)). Other colons belong to the name."""
    path, scale = arguments.scaled_file(text)
    if path != text and re.search(r":[+-]?(\d|\.\d)[^:/]*$", path):
        name, unet = arguments.scaled_file(path)
        if name != path:
            return name, (unet, scale)
    return path, scale


def lora(args: argparse.Namespace) -> None:
    """Make a LoRA from two checkpoints, merge LoRAs into a checkpoint, change a LoRA's rank, \
or write it in another tool's names."""
    {"extract": _extract, "merge": _merge, "resize": _resize, "convert": _convert}[args.action](args)


def _extract(args: argparse.Namespace) -> None:
    with files.bytes_bar("extracting") as on_write:
        made = weights.extract_lora(
            args.base, args.tuned, args.out, rank=args.rank, variance=args.variance, max_rank=args.max_rank,
            conv_rank=args.conv_rank, text=args.text, full_rest=args.full_rest, dtype=args.dtype,
            overwrite=args.overwrite, on_module=_counter(), on_write=on_write,
        )  # fmt: skip
    _show_modules(made.modules, args)
    energy = _energy(made.energy, made.modules)
    terminal.show(f"{len(made.modules)} modules of {made.family}{energy}; {made.unchanged} parameters do not differ")
    for kept, what in ((True, "kept as full differences"), (False, "not in the LoRA, which cannot carry them")):
        rest = [one for one in made.rest if one.kept == kept]
        if rest:
            size = files.shown_bytes(sum(one.size for one in rest))
            terminal.show(f"{len(rest)} parameters ({size}) {what}: {_first([one.parameter for one in rest])}")
    if made.unpaired:
        what = "parameters are in one of the two alone and were left out"
        terminal.show(f"{len(made.unpaired)} {what}: {_first(made.unpaired)}")
    _done(made.path)


def _merge(args: argparse.Namespace) -> None:
    with files.bytes_bar("merging") as on_write:
        made = weights.merge_lora(
            args.checkpoint, args.loras, args.out, dtype=args.dtype, overwrite=args.overwrite, on_write=on_write
        )
    for line in made.lines:
        terminal.show(printable(line))
    if made.dropped:
        terminal.show(f"{len(made.dropped)} tensors left out: {next(iter(made.dropped.values()))}")
    _done(made.path)


def _resize(args: argparse.Namespace) -> None:
    with files.bytes_bar("resizing") as on_write:
        made = weights.resize_lora(
            args.lora, args.out, rank=args.rank, variance=args.variance, max_rank=args.max_rank, to=args.to,
            model_config=_config(args), dtype=args.dtype, overwrite=args.overwrite, on_write=on_write,
        )  # fmt: skip
    _show_modules(made.kept, args)
    terminal.show(f"{len(made.kept)} modules of {made.family}{_energy(made.energy, made.kept)}")
    if made.untouched:
        terminal.show(f"{len(made.untouched)} full differences are as they were: {_first(made.untouched)}")
    _done(made.path)


def _convert(args: argparse.Namespace) -> None:
    with files.bytes_bar("converting") as on_write:
        made = weights.convert_lora(
            args.lora, args.out, args.to, _config(args), as_lora=args.as_lora, dtype=args.dtype,
            overwrite=args.overwrite, on_write=on_write,
        )  # fmt: skip
    terminal.show(f"{made.modules} modules of {made.family}, as {made.dialect} has them")
    if made.kept:
        terminal.show(f"{len(made.kept)} of them re-expressed{_energy(made.energy, made.kept)}")
    _done(made.path)


def _config(args: argparse.Namespace) -> Any:
    return weights.config_of(args.ckpt) if args.ckpt is not None else args.family


def _counter() -> Any:
    """A line on the terminal now and then, of decompositions that take minutes."""
    count = 0

    def on_module(kept: Any) -> None:
        nonlocal count
        count += 1
        if count % 50 == 0:
            terminal.say(f"ldm: {count} modules decomposed")

    return on_module


def _show_modules(modules: Sequence[Any], args: argparse.Namespace) -> None:
    if args.list:
        for one in modules:
            terminal.show(f"{one.rank:5} {100 * one.energy:7.3f} %  {one.parameter.removesuffix('.weight')}")


def _energy(whole: float, modules: Sequence[Any]) -> str:
    """, rank 4 to 16, 98.7 % of the energy kept (least 91.2 %)"""
    if not modules:
        return ""
    ranks = sorted(one.rank for one in modules)
    span = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"rank {ranks[0]} to {ranks[-1]}"
    return f", {span}, {100 * whole:.4g} % of the energy kept (least: {100 * min(one.energy for one in modules):.4g} %)"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _done(path: Path) -> None:
    terminal.show(printable(str(path)))
