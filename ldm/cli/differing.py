"""`ldm diff`: what two files of weights are to each other."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import weights
from ldm.cli import files, terminal
from ldm.cli.files import require_weights
from ldm.errors import printable

DIFFERENT = 6  # exit code with --fail-on-difference
LISTED = 8  # tensors that differ most, that have other shapes or are not finite
NAMED = 3  # examples of those in one alone
WIDTH = 140  # characters of a line


def add_diff(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm diff`."""
    parser.add_argument("a", metavar="A", help=".safetensors, .ckpt or a diffusers folder")
    parser.add_argument("b", metavar="B", help="what is compared with it, in the same layout or another")
    parser.add_argument("--third", metavar="C", help="estimate w of B = (1 - w) A + w C for each network")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compare names, shapes and types of all tensors, but the numbers of a few of each network",
    )
    parser.add_argument(
        "--config", metavar="NAME", help="family of models that lack tensors, whose structure cannot be seen"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--fail-on-difference", action="store_true", help=f"exit with {DIFFERENT} unless B is the same as A"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def diff(args: argparse.Namespace) -> None:
    """Compare two files of weights and say what B is to A: the same in another container, layout or type, \
a pruned copy, its moving average,
    a fine-tune, with a LoRA merged into it, with another VAE, a merge with C, or unrelated.

    Models are compared network by network, whatever the layout. \
Files that differ are a result, not an error: the exit code is 0. With
    --fail-on-difference it is 6, unless the networks are the same bit by bit; \
the container, the layout and leftovers that nothing reads
    may differ."""
    for option, path in (("A", args.a), ("B", args.b), ("--third", args.third)):
        if path is not None:
            require_weights(option, path)
    with files.bytes_bar("diff") as on_read:
        found = weights.diff(args.a, args.b, third=args.third, quick=args.quick, config=args.config, on_read=on_read)
    report = found.as_dict()
    if args.json:
        terminal.show(json.dumps(report, indent=2, allow_nan=False))
    else:
        for line in text(report):
            terminal.show(printable(line))
    if args.fail_on_difference and not found.same:
        raise SystemExit(DIFFERENT)


def text(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a report, the verdict first."""
    yield from textwrap.wrap(report["verdict"]["text"], WIDTH)
    yield from (f"  - {line}" for line in report["verdict"]["evidence"])
    yield ""
    for name in ("a", "b"):
        one = report[name]
        yield f"{name.upper()}  {one['path']}: {one['title']}, {one['container']}, {one['tensors']} tensors"
    yield ""
    yield from _table(report)
    for name in ("a", "b"):
        yield from _only(report[f"only_{name}"], f"only in {name.upper()}")
    if report["retyped"]:
        yield f"other types: {', '.join(f'{types} ({count})' for types, count in report['retyped'].items())}"
    if report["reshaped"]:
        yield f"other shapes: {len(report['reshaped'])}"
        yield from (f"  {one['name']}: {one['a']} -> {one['b']}" for one in report["reshaped"][:LISTED])
    if report["not_finite"]:
        keys = [f"{key} ({whose.upper()})" for key, whose in report["not_finite"].items()]
        yield f"NaN or infinity in: {', '.join(keys[:LISTED])}{_more(keys)}"
    if report["different"]:
        yield f"differ most, of {len(report['different'])}:"
        width = max(len(one["name"]) for one in report["different"][:LISTED])
        yield from (
            f"  {one['name']:{width}}  {_share(one['relative']):>8}  at most {one['largest']:.3g}"
            for one in report["different"][:LISTED]
        )
    if report["quick"] is not None:
        yield from textwrap.wrap(
            f"compared, because of --quick, only: {', '.join(report['quick'])}",
            WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
        )


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    rows = [("", "in both", "equal", "rounded", "different", "largest", "relative", "type")]
    for one in report["components"]:
        numbers = (
            [str(one[part]) for part in ("shared", "equal", "rounded", "different")]
            if one["shared"]
            else ["0", "", "", ""]
        )
        distance = [f"{one['largest']:.3g}", _share(one["relative"])] if one["shared"] else ["", ""]
        rows.append((one["name"], *numbers, *distance, ", ".join(one["dtypes"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            [
                f"{row[0]:{widths[0]}}",
                *(f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        ).rstrip()
    yield "(tensors; the largest absolute difference; the norm of the difference as a share of that of A's)"


def _only(only: Mapping[str, str], what: str) -> Iterator[str]:
    """Keys in one alone, by the reason why the other may lack them."""
    if not only:
        return
    yield f"{what}: {len(only)}"
    for reason, count in Counter(only.values()).most_common():
        names = [key for key, why in only.items() if why == reason]
        rest = ", ..." if count > NAMED else ""
        yield f"  {count:5}  {reason or 'no known reason'}: {', '.join(names[:NAMED])}{rest}"


def _more(items: Sequence[Any]) -> str:
    return f" and {len(items) - LISTED} more" if len(items) > LISTED else ""


def _share(share: float | None) -> str:
    return "all" if share is None else f"{100 * share:.3g} %"
