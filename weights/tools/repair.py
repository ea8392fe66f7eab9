"""Known kinds of damage to a file of weights -> a sound file, and nothing else changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.config import FAMILIES
from ldm.errors import FileError
from ldm.targets import require_writable
from samplers.schedule import Schedule
from weights.files import torchfiles
from weights.files.opened import Weights, kind_of, read_header
from weights.files.source import Source
from weights.files.write import TORCH_FILES, OnWrite, Pending, guarded, write
from weights.names.places import Shape, short

Tensors = dict[str, Pending]
Refuse = Callable[[str, str | None], FileError]  # what is wrong, the tensor concerned -> the error to raise
Mended = tuple[Tensors, list[str], list[str]]  # the tensors, what was repaired, what was noticed and left


_TOWERS = r"(?:cond_stage_model|conditioner\.embedders\.0)\.transformer\."  # of transformers, in single files
_BARE = re.compile(rf"({_TOWERS})((?:embeddings|encoder|final_layer_norm)\..+)")
_IDS = re.compile(r"(.*\bembeddings\.)position_ids")
_WHERE_IDS_BELONG = re.compile(rf"({_TOWERS}text_model\.embeddings\.)position_embedding\.weight")
_PROJECTION = re.compile(r"((?:cond_stage_model|conditioner\.embedders\.\d)\.model\.text_projection)\.weight")
_KERNEL = re.compile(r"(?:first_stage_model\.)?(?:encoder|decoder)\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight")
_ROUNDED = {
    torch.float16: (2.0**-10, 2.0**-24),
    torch.bfloat16: (2.0**-7, 2.0**-133),
    torch.float64: (2.0**-23, 0.0),
}  # error: relative, absolute


def prefixes(tensors: Tensors, refuse: Refuse) -> Mended:
    """`text_model.` back into the names of a text tower, which some versions of transformers leave out."""
    renamed: dict[str, str] = {}
    count: Counter[str] = Counter()
    for key in tensors:
        if match := _BARE.fullmatch(key):
            renamed[key] = f"{match[1]}text_model.{match[2]}"
            count[match[1]] += 1
    repaired = [f"{n} names under {prefix} lack text_model.: put in" for prefix, n in count.items()]
    return _moved(tensors, renamed, refuse), repaired, []


def projections(tensors: Tensors, refuse: Refuse) -> Mended:
    """A doubled `.weight` of the text projection made single; one of two copies of the projection left out."""
    doubled = {key: key.removesuffix(".weight") for key in tensors if key.endswith("text_projection.weight.weight")}
    tensors = _moved(tensors, doubled, refuse)
    repaired = [f"{short(key, 60)}: its doubled .weight made single" for key in doubled]
    for key in [*tensors]:
        match = _PROJECTION.fullmatch(key)
        if match and match[1] in tensors:  # the matrix of a Linear layer beside OpenCLIP's x @ w
            _require_same(tensors[match[1]].make(), tensors[key].make().T, match[1], key, refuse)
            del tensors[key]
            repaired.append(f"{short(key, 60)}: the same projection is there as text_projection, this copy left out")
    return tensors, repaired, []


def position_ids(tensors: Tensors, refuse: Refuse) -> Mended:
    """0, 1, 2, ... as int64 [1, n], n being the length of the position embedding beside it."""
    tensors, repaired = dict(tensors), []
    for key in [*tensors]:
        if match := _IDS.fullmatch(key):
            beside = tensors.get(f"{match[1]}position_embedding.weight")
            n = beside.shape[0] if beside and beside.shape else max(tensors[key].shape, default=0)
            if fault := _ids_fault(tensors[key], n):
                tensors[key] = _counting(n)
                repaired.append(f"{short(key, 60)} {fault}: now 0 to {n - 1} as int64")
        elif (
            (match := _WHERE_IDS_BELONG.fullmatch(key))
            and f"{match[1]}position_ids" not in tensors
            and tensors[key].shape
        ):
            n = tensors[key].shape[0]
            tensors[f"{match[1]}position_ids"] = _counting(n)
            repaired.append(f"{short(match[1], 50)}position_ids is missing: 0 to {n - 1} as int64 put in")
    return tensors, repaired, []


def _ids_fault(entry: Pending, n: int) -> str | None:
    if entry.shape != (1, n):
        return f"has the shape {list(entry.shape)}"
    ids = entry.make()[0]
    wrong = "" if ids.double().equal(torch.arange(n).double()) else "counts wrongly"
    kind = "" if entry.dtype == torch.int64 else f"is stored as {str(entry.dtype).removeprefix('torch.')}"
    return " and ".join(filter(None, (kind, wrong))) or None


def _counting(n: int) -> Pending:
    return Pending(torch.int64, (1, n), lambda: torch.arange(n)[None])


def schedules(tensors: Tensors, refuse: Refuse) -> Mended:
    """Noise schedules that were rounded, computed anew; those that no published family has are left, and noted."""
    tensors = dict(tensors)
    mended: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    tables = [_buffers(schedule) for schedule in dict.fromkeys(family.schedule for family in FAMILIES.values())]
    for key, entry in tensors.items():
        name = key.removeprefix("low_scale_model.")
        if name not in tables[0] or not entry.dtype.is_floating_point or entry.shape != tables[0][name].shape:
            continue
        stored = entry.make()
        exactly = (d for d in (torch.bfloat16, torch.float16) if stored.equal(stored.to(d).to(stored.dtype)))
        rounding = next(exactly, entry.dtype)
        if rounding not in _ROUNDED:
            continue
        relative, absolute = _ROUNDED[rounding]
        found = [table[name] for table in tables]
        near = (t for t in found if ((stored.double() - t).abs() <= relative * t.abs() + absolute).all())
        exact = next(near, None)
        narrow = rounding != torch.float64
        rounded = f"rounded to {str(rounding).removeprefix('torch.')}" if narrow else "stored as float64"
        if exact is None:
            odd[rounded] += 1
        elif entry.dtype != torch.float32 or not stored.equal(exact.float()):
            tensors[key] = Pending(torch.float32, entry.shape, exact.float)
            mended[rounded] += 1
    buffers, anew = "noise schedule buffers are", "computed anew in float64, stored as float32"
    repaired = [f"{n} {buffers} {rounded}: {anew}" for rounded, n in mended.items()]
    left = "of a schedule that no published model has: left as they are"
    return tensors, repaired, [f"{n} {buffers} {rounded}, {left}" for rounded, n in odd.items()]


def _buffers(schedule: Schedule) -> dict[str, Tensor]:
    """A schedule in float64: beta_t, products of alpha_t, q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 4, 6, 7)."""
    betas = torch.linspace(schedule.start**0.5, schedule.end**0.5, schedule.steps, dtype=torch.float64).numpy() ** 2
    product = np.cumprod(1 - betas)
    before = np.append(1.0, product[:-1])
    variance = betas * (1 - before) / (1 - product)
    found = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(product),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - product),
        "log_one_minus_alphas_cumprod": np.log(1 - product),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / product),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / product - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # 0 at the first step
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - product),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - product),
    }
    return {name: torch.from_numpy(values) for name, values in found.items()}


def kernels(tensors: Tensors, refuse: Refuse) -> Mended:
    """The VAE's attention as the 1x1 convolutions that it is made of."""
    tensors = dict(tensors)
    count: Counter[Shape] = Counter()
    for key, entry in tensors.items():
        if _KERNEL.fullmatch(key) and len(entry.shape) == 2:
            tensors[key] = Pending(entry.dtype, (*entry.shape, 1, 1), partial(_as_kernel, entry))
            count[entry.shape] += 1
    convolutions = "of the VAE's attention: now 1x1 convolutions"
    repaired = [f"{n} matrices [{a}, {b}] {convolutions} [{a}, {b}, 1, 1]" for (a, b), n in count.items()]
    return tensors, repaired, []


def _as_kernel(matrix: Pending) -> Tensor:
    return matrix.make()[:, :, None, None]


REPAIRS: tuple[Callable[[Tensors, Refuse], Mended], ...] = (prefixes, projections, position_ids, schedules, kernels)


def _moved(tensors: Tensors, renamed: dict[str, str], refuse: Refuse) -> Tensors:
    """The tensors renamed, in the same order. Where a name is taken the numbers must be the same; one copy stays."""
    for old, new in renamed.items():
        if new in tensors and not _IDS.fullmatch(new):  # which are known, whatever both say
            _require_same(tensors[new].make(), tensors[old].make(), new, old, refuse)
    return {renamed.get(key, key): entry for key, entry in tensors.items() if renamed.get(key) not in tensors}


def _require_same(one: Tensor, two: Tensor, name: str, other: str, refuse: Refuse) -> None:
    if one.dtype != two.dtype or not one.equal(two):
        raise refuse(f"{short(name)} and {short(other)} differ and should not; use another copy", other)


NOTE = "ldm.repair"  # metadata: what was repaired
TAKEN = ("state_dict",)  # the name that a torch file has for its tensors


@dataclass(frozen=True)
class Repaired:
    """What was wrong with a file, and what was done about it, one line each."""

    path: Path | None  # what was written; None: nothing
    done: tuple[str, ...]  # the damage, and how it was repaired
    notes: tuple[str, ...]  # what looks odd and was left as it is

    def lines(self) -> list[str]:
        """The same for people."""
        return [*(self.done or ("nothing is wrong that this version repairs",)), *self.notes]


def repair(
    path: str | PathLike[str], out: str | PathLike[str] | None = None, *, dry_run: bool = False,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> Repaired:  # fmt: skip
    """Repair a file of weights and write it anew; where nothing is wrong nothing is written.

    path     .safetensors, or what torch.save wrote, whatever its extension
    out      None: `path` with -repaired before the extension, which is that of the file's content
    dry_run  find the damage, write nothing

    Damage that is known, in this order: bytes after the last tensor of a .safetensors; names of a text tower that lack
    `text_model.`; a doubled `text_projection.weight.weight`, or the same projection twice; position_ids that are
    missing, no integers or not 0, 1, 2, ...; noise schedules rounded to float16 or bfloat16; 1x1 convolutions of the
    VAE's attention stored as matrices. All other tensors are copied bit by bit, with their metadata; of a torch file,
    what is neither a tensor nor a plain fact (callbacks, optimizer states) is not. One tensor is in memory at a time.
    Raises FileError for damage that cannot be repaired, OutputError.
    """
    if out is not None and not dry_run:
        require_writable(out, overwrite)
    file, stray, notes = _open(path)
    with file:
        tensors: Tensors = {}
        for key, spec in file.specs.items():
            tensors[key] = Pending(spec.dtype, spec.shape, partial(file.read, key, mapped=False))
        done = [f"{stray} stray bytes after the last tensor: left out"] if stray else []
        for mend in REPAIRS:
            tensors, repaired, seen = mend(tensors, file.error)
            done, notes = [*done, *repaired], [*notes, *seen]
        if dry_run or not done:
            return Repaired(None, tuple(done), tuple(notes))
        metadata = {key: value for key, value in file.metadata.items() if key not in TAKEN} | {NOTE: "; ".join(done)}
        target, report = _beside(file) if out is None else out, guarded([file], on_write)
        written = write(tensors, target, metadata, overwrite=overwrite, on_write=report)
        return Repaired(written, tuple(done), tuple(notes))


def _open(path: str | PathLike[str]) -> tuple[Weights, int, list[str]]:
    """The file, how many bytes follow its last tensor, and what its name gets wrong."""
    source = Source(path)
    try:
        kind = kind_of(source)
        suffix = source.path.suffix.lower()
        notes = []
        if kind == "safetensors":
            contents, end = read_header(source)
            if suffix in TORCH_FILES:
                what = "is a .safetensors by its content, a torch file by its name"
                notes = [f"{what}: rename it to {source.path.stem}.safetensors"]
        else:
            contents, end = (torchfiles.read_zip if kind == "zip" else torchfiles.read_stream)(source), source.size
            if suffix == ".safetensors":
                what = "is a torch file by its content, a .safetensors by its name"
                notes = [f"{what}: rename it to {source.path.stem}.ckpt"]
        return Weights(source, kind, contents), source.size - end, notes
    except BaseException:
        source.close()
        raise


def _beside(file: Weights) -> Path:
    suffix = file.path.suffix if file.path.suffix in TORCH_FILES else ".ckpt"
    suffix = ".safetensors" if file.kind == "safetensors" else suffix
    return file.path.with_name(f"{file.path.stem}-repaired{suffix}")
