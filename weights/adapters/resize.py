"""A LoRA file -> the same LoRA in another trainer's names, or with other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from ldm.changes.lora import Change, Decomposed, Full, LowRank, delta, plain
from ldm.config import ModelConfig
from ldm.errors import FileError
from ldm.targets import require_writable
from weights.adapters import names as lora_names
from weights.adapters.kohya import network_facts
from weights.adapters.names import Dialect
from weights.adapters.peft import TITLES, expressible, unheld
from weights.adapters.rank import Kept, Rule, energy, factored, require_rank, resized, rule
from weights.adapters.read import Source, read_lora
from weights.adapters.write import require_dialect, write_lora
from weights.checkpoint import require_dtype
from weights.files.hashes import sha256_of
from weights.files.write import OnWrite


@dataclass(frozen=True)
class Rewritten:
    """What `convert_lora` or `resize_lora` wrote."""

    path: Path
    family: str
    dialect: Dialect
    modules: int
    kept: tuple[Kept, ...]  # those whose factors are new
    untouched: tuple[str, ...] = ()  # of resize_lora: parameters with a change that has no rank to change

    @property
    def energy(self) -> float:
        """The share of the energy of all that is new that was kept."""
        return energy(self.kept)


def convert_lora(
    src: str | PathLike[str], dst: str | PathLike[str], to: Dialect, model_config: ModelConfig | str | None = None, *,
    as_lora: int | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> Rewritten:  # fmt: skip
    """Write a LoRA in another dialect: the same factors, bit for bit, and the same alphas.

    src           whatever `read_lora` reads, in any dialect and of any kind
    to            "kohya": a file for kohya's scripts, A1111 and ComfyUI; "diffusers": a file for
                  `pipe.load_lora_weights`; "peft": a directory with one folder per network,
                  `PeftModel.from_pretrained(unet, dst / "unet")`, named as transformers 5 does
    model_config  the family, or a model's config; None: found out from the targets
    as_lora       replace what the dialect cannot hold (LoHa, LoKr, cores, full differences) by the nearest products of
                  this rank; None: refuse it
    dtype         of the factors; None: as they are
    Raises FileError, with the first module that cannot be written; AmbiguousCheckpoint, ArgumentError, OutputError.
    """
    require_dialect(to)
    require_rank("as_lora", as_lora)
    if dtype is not None:
        require_dtype(dtype)
    require_writable(dst, overwrite, directory=to == "peft")
    source = read_lora(src, model_config)
    path = Path(src)
    changes, kept = dict(source.changes), []
    if as_lora is not None and to != "kohya":
        for parameter, change in changes.items():
            if unheld(change) and expressible(change):
                changes[parameter], one = _expressed(change, Rule(as_lora), parameter, source.config)
                kept.append(one)
    facts = network_facts(changes) if kept or source.dialect != "kohya" else {}
    written = _written(source, changes, path, dst, to, facts, dtype, overwrite, on_write)
    return Rewritten(written, source.config.name, to, source.changes.modules, tuple(kept))


def resize_lora(
    src: str | PathLike[str], dst: str | PathLike[str], *, rank: int | None = None, variance: float | None = None,
    max_rank: int | None = None, to: Dialect | None = None, model_config: ModelConfig | str | None = None,
    dtype: torch.dtype | None = None, overwrite: bool = False, on_write: OnWrite | None = None,
) -> Rewritten:  # fmt: skip
    """Write a LoRA of another rank: each module the nearest to the old in the Frobenius norm (Eckart and Young 1936).

    rank      of every module; a module that was made with a lower one keeps that
    variance  instead: the least rank for each module that keeps this share of its squared singular values, at most
              `max_rank`
    to        the dialect; None: that of `src`
    alpha / rank, the scale, stays what it was. Convolutions are included; full differences and the magnitudes of a DoRA
    are kept. Raises FileError for kinds that are no plain product (LoHa, LoKr, GLoRA), and as `convert_lora` does.
    """
    how = rule(rank, variance, max_rank)
    if to is not None:
        require_dialect(to)
    if dtype is not None:
        require_dtype(dtype)
    peft = to == "peft" or (to is None and Path(src).is_dir())
    require_writable(dst, overwrite, directory=peft)
    source = read_lora(src, model_config)
    path, dialect = Path(src), to or source.dialect
    if (dialect == "peft") != peft:  # a single folder or file of peft's, or a folder of diffusers'
        require_writable(dst, overwrite, directory=dialect == "peft")
    changes, kept, untouched = _resized(source, how, path, dtype)
    written = _written(source, changes, path, dst, dialect, network_facts(changes), dtype, overwrite, on_write)
    return Rewritten(written, source.config.name, dialect, source.changes.modules, kept, untouched)


def _resized(
    source: Source, how: Rule, path: Path, dtype: torch.dtype | None
) -> tuple[dict[str, Change], tuple[Kept, ...], tuple[str, ...]]:
    changes, kept, untouched = dict(source.changes), [], []
    for parameter, change in changes.items():
        inner = plain(change)
        if isinstance(inner, Full):
            untouched.append(parameter)
            continue
        if not isinstance(inner, LowRank):
            what = f"{parameter[-40:]} is {TITLES[type(inner)]}, which is no plain product"
            raise FileError(f"{what}; convert it with as_lora first", path=path, key=parameter)
        new, one = resized(inner, how, parameter, dtype)
        changes[parameter] = replace(change, inner=new) if isinstance(change, Decomposed) else new
        kept.append(one)
    if not kept:
        raise FileError("has no module with a rank: all its changes are full differences", path=path)
    return changes, tuple(kept), tuple(untouched)


def _expressed(change: Change, how: Rule, parameter: str, config: ModelConfig) -> tuple[LowRank, Kept]:
    """The product of low rank that is nearest to a change, which is computed without the weight that it changes."""
    if isinstance(change, LowRank):
        return resized(change, how, parameter)
    matrix = delta(change, torch.zeros(lora_names.shapes(config)[parameter]))
    return factored(matrix, how, parameter)


def _written(
    source: Source, changes: Mapping[str, Change], path: Path, dst: str | PathLike[str], to: Dialect,
    facts: dict[str, str], dtype: torch.dtype | None, overwrite: bool, on_write: OnWrite | None,
) -> Path:  # fmt: skip
    """Write the changes with the metadata of their source, its name and, of a file, its SHA-256."""
    history = {"ldm.source": path.name} | ({"ldm.source_sha256": sha256_of(path)} if path.is_file() else {})
    metadata = {**source.metadata, **history, **facts}
    return write_lora(
        changes, dst, to, source.config, metadata, source=path, dtype=dtype, alpha_dtype=source.alpha_dtype,
        overwrite=overwrite, on_write=on_write,
    )  # fmt: skip
