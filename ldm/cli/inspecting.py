"""`ldm inspect`: what files of weights are, for people or as JSON."""

from __future__ import annotations

import argparse
import fnmatch
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import weights
from ldm.cli import files, terminal
from ldm.errors import ArgumentError, LdmError, printable

NETWORKS = {  # groups of tensors that have a line of their own
    "unet", "vae", "text.0", "text.1", "vision", "depth", "safety", "controlnet", "lora", "embedding", "unknown",
}  # fmt: skip
USE = {"model": "--ckpt", "lora": "--lora", "embedding": "--embedding", "vae": "--vae", "safety checker": "--safety"}
LISTED, ENTRIES, WIDTH = 5, 16, 100  # names of tensors, entries of metadata and characters of each that the text shows

Lines = Iterator[tuple[str, str]]  # (what a line is about, or "" where it goes on; the line)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm inspect`."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a file of weights or a diffusers folder (default: the model that ships)",
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each file, with all that is known")
    parser.add_argument(
        "--hash", action="store_true", help="the SHA-256 too, and which published file has it; this reads everything"
    )
    parser.add_argument(
        "--config", metavar="NAME", help="the family, where the file does not tell: sd1, sd2-v, sdxl-base, ..."
    )
    parser.add_argument(
        "--keys",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="the tensors too: all, those whose names match '*.attn1.*', or /a regular expression/",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def inspect(args: argparse.Namespace) -> None:
    """Say what files of weights are, from their headers: family, prediction, networks, what is missing or damaged."""
    chosen = pattern(args.keys)
    codes = []  # of files that could not be read: they do not keep the others from being reported
    for i, path in enumerate(args.files or [None]):
        try:
            with files.bytes_bar("reading") as on_hash:
                report = weights.inspect(path, hash=args.hash, config=args.config, on_hash=on_hash)
        except ArgumentError:
            raise
        except LdmError as error:
            if len(args.files) < 2:
                raise
            if args.debug:
                traceback.print_exc()
            text, code = terminal.explain(error, args.spelled)
            terminal.say(f"ldm: error: {text}")
            codes.append(code)
            continue
        tensors = [] if chosen is None else [tensor for tensor in report.tensors if chosen(tensor.name)]
        if args.json:
            terminal.show(report.to_json(tensors))
        else:
            terminal.show(("\n" if i else "") + text_of(report, None if chosen is None else tensors))
    if codes:
        raise SystemExit(codes[0])


def pattern(text: str | None) -> Callable[[str], bool] | None:
    """Which names are meant: by /a regular expression/ found in them, a glob, or without * ? [ a part of them."""
    if text is None:
        return None
    if len(text) > 1 and text.startswith("/") and text.endswith("/"):
        try:
            expression = re.compile(text[1:-1])
        except re.error as error:
            raise ArgumentError(f"--keys: {text[:60]} is no regular expression ({error})") from None
        return lambda name: expression.search(name) is not None
    if not any(c in text for c in "*?["):
        return lambda name: text in name
    return lambda name: fnmatch.fnmatchcase(name, text)


def text_of(report: Any, tensors: list[Any] | None = None) -> str:
    """A report as aligned lines."""
    lines = [f"{printable(report.path)}: {printable(report.title)}"]
    for label, line in _lines(report):
        lines.append(f"  {label:12}{printable(line)}")
    if tensors is not None:
        lines.append(f"  {'tensors':12}{len(tensors)} of {len(report.tensors)}")
        width = max((len(printable(tensor.name)) for tensor in tensors), default=0)
        lines += [f"    {printable(tensor.name):{width}}  {tensor.dtype:8}  {[*tensor.shape]}" for tensor in tensors]
    return "\n".join(lines)


def _lines(report: Any) -> Lines:
    yield from _labelled("file", _file(report))
    if report.family:
        yield "family", report.family
    yield from _labelled("because" if report.evidence else "", report.evidence)
    if report.prediction is not None:
        yield from _prediction(report.prediction, report.loadable)
    if report.lora is not None:
        yield from _lora(report.lora)
    if report.embedding is not None:
        yield from _embedding(report.embedding)
    yield from _labelled("holds", _components(report))
    if report.missing:
        yield "missing", ", ".join(report.missing)
    if report.missing_keys:
        yield "lacks", _some(report.missing_keys, "tensor")
    if report.unknown_keys:
        yield "unknown", _some(report.unknown_keys, "tensor" if report.lora is None else "name")
    if report.ema is not None and report.ema.kind != "none":
        yield "average", _average(report.ema)
    yield from _labelled("damaged", [f"{_end(damage.key)}: {damage.what}" for damage in report.damage])
    if report.damage:
        yield "", "(loading puts this right; other programs may not)"
    if report.training is not None:
        epoch = "" if report.training.epoch is None else f", epoch {report.training.epoch}"
        yield "trained", f"step {report.training.step}{epoch} ({report.training.source})"
    yield from _labelled("metadata", _metadata(report.metadata))
    yield from _labelled(
        "hash",
        [
            line
            for file in report.files
            for line in _hashes(file, len(report.files) > 1, report.what in ("model", "vae"))
        ],
    )
    if report.problem:
        yield (
            "not loaded",
            "until the conflict is settled"
            if report.prediction and report.problem == report.prediction.conflict
            else report.problem,
        )
    elif report.what in USE:
        yield "use it with", f"{USE[report.what]} {report.path}"


def _labelled(label: str, lines: Any) -> Lines:
    for i, line in enumerate(lines):
        yield label if i == 0 else "", line


def _file(report: Any) -> Iterator[str]:
    count = f" of {len(report.files)} files" if len(report.files) > 1 else ""
    notes = [
        note
        for note in ("sharded" if report.sharded else "", f"variant {report.variant}" if report.variant else "")
        if note
    ]
    yield ", ".join(
        [f"{report.kind}{count}", files.shown_bytes(report.bytes), _number(len(report.tensors), "tensor"), *notes]
    )
    for file in report.files:
        where = f"{file.name}: " if len(report.files) > 1 else ""
        if file.published:
            yield f"{where}these are exactly the bytes of {' and '.join(file.published)}"
        elif file.sha256 is None and file.same_size:
            yield f"{where}as long as the published {' and '.join(file.same_size)}; --hash tells whether it is"
        elif file.same_size:
            yield f"{where}as long as the published {' and '.join(file.same_size)}, but not the same bytes"


def _prediction(prediction: Any, loadable: bool) -> Lines:
    yield "predicts", prediction.value or "undecided"
    yield from (("", line) for line in prediction.evidence)
    if prediction.conflict:
        yield "in doubt" if loadable else "conflict", prediction.conflict


def _lora(lora: Any) -> Lines:
    yield "made of", _counts(lora.kinds)
    yield "rank", _counts(lora.ranks) if lora.ranks else "none: whole differences"
    yield "alpha", _counts(lora.alphas, ".6g") if lora.alphas else "not stored; it is the rank"
    yield "changes", _counts(lora.modules) + " modules"
    yield "names of", ", ".join(lora.spellings)


def _embedding(embedding: Any) -> Lines:
    yield "form", embedding.form + ("" if embedding.word is None else f", for {embedding.word!r}")
    yield (
        "vectors",
        f"{embedding.vectors}, for "
        + " and ".join(f"{tower} (width {width})" for tower, width in embedding.towers.items()),
    )


def _components(report: Any) -> Iterator[str]:
    shown = [each for each in report.components if each.name in NETWORKS]
    width = max((len(each.title) for each in shown), default=0)
    for each in shown:
        tensors, parameters = _number(each.tensors, "tensor"), _count(each.parameters)
        yield f"{each.title:{width}}  {tensors:>12}  {parameters:>7} parameters  {_types(each.dtypes)}"
    rest = [
        f"{each.title} ({_number(each.tensors, 'tensor')})" for each in report.components if each.name not in NETWORKS
    ]
    if rest:
        yield "and " + ", ".join(rest)


def _average(ema: Any) -> str:
    if ema.kind == "leftover":
        return "its bookkeeping alone: the average is in the weights already"
    return f"{ema.kind}, {ema.tensors} tensors" + (
        f" of {ema.expected}" if ema.kind == "partial" and ema.expected else "; --ema loads it"
    )


def _metadata(metadata: Mapping[str, str]) -> Iterator[str]:
    width = min(max(map(len, metadata), default=0), 40)
    for key, value in [*metadata.items()][:ENTRIES]:
        value = " ".join(value.split())
        yield f"{key:{width}}  {value if len(value) <= WIDTH else value[: WIDTH - 3] + '...'}"
    if len(metadata) > ENTRIES:
        yield f"and {len(metadata) - ENTRIES} more; --json has all"


def _hashes(file: Any, several: bool, old: bool) -> Iterator[str]:
    """`old`: A1111's first hash too, by which models are named and nothing else."""
    where = f"{file.name}: " if several else ""
    if file.sha256 is not None:
        yield f"{where}sha256 {file.sha256}"
    if old and file.a1111_old is not None:
        new = "" if file.a1111_new is None else f"{file.a1111_new}, and once "
        yield f"{where}A1111 calls it {new}{file.a1111_old}"


def _types(dtypes: Mapping[str, int]) -> str:
    return next(iter(dtypes)) if len(dtypes) == 1 else ", ".join(f"{name} ({count})" for name, count in dtypes.items())


def _counts(counts: Mapping[Any, int], form: str = "") -> str:
    """How often each value occurs; of a number that is the only one, how often does not matter."""
    if len(counts) == 1 and isinstance(value := next(iter(counts)), (int, float)):
        return f"{value:{form}}"
    return ", ".join(f"{value:{form}} ({count})" for value, count in [*counts.items()][:LISTED]) + (
        ", ..." if len(counts) > LISTED else ""
    )


def _some(keys: tuple[str, ...], what: str) -> str:
    return f"{_number(len(keys), what)}: {', '.join(map(_end, keys[:LISTED]))}{', ...' if len(keys) > LISTED else ''}"


def _end(key: str, limit: int = 60) -> str:
    """The telling end of a long name."""
    return key if len(key) <= limit else "..." + key[3 - limit :]


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _count(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return str(count)
