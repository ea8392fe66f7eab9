"""Known kinds of damage to a file of weights -> a sound file, and nothing else changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from weights import torchfiles
from weights.files import Weights, kind_of, read_header
from weights.output import require_writable
from weights.repairs import REPAIRS, Tensors
from weights.source import Source
from weights.write import TORCH_FILES, OnWrite, Pending, guarded, write

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
    path: str | PathLike[str], out: str | PathLike[str] | None = None, *, dry_run: bool = False, overwrite: bool = False, on_write: OnWrite | None = None
) -> Repaired:
    """Repair a file of weights and write it anew; where nothing is wrong nothing is written.

    path     .safetensors, or what torch.save wrote, whatever its extension
    out      None: `path` with -repaired before the extension, which is that of the file's content
    dry_run  find the damage, write nothing

    Damage that is known, in this order: bytes after the last tensor of a .safetensors; names of a text tower that lack `text_model.`; a
    doubled `text_projection.weight.weight`, or the same projection twice; position_ids that are missing, no integers or not 0, 1, 2, ...;
    noise schedules rounded to float16 or bfloat16; 1x1 convolutions of the VAE's attention stored as matrices.
    All other tensors are copied bit by bit, with their metadata; of a torch file, what is neither a tensor nor a plain fact (callbacks,
    optimizer states) is not. One tensor is in memory at a time. Raises FileError for damage that cannot be repaired, OutputError.
    """
    if out is not None and not dry_run:
        require_writable(out, overwrite)
    file, stray, notes = _open(path)
    with file:
        tensors: Tensors = {key: Pending(spec.dtype, spec.shape, _reading(file, key)) for key, spec in file.specs.items()}
        done = [f"{stray} stray bytes after the last tensor: left out"] if stray else []
        for mend in REPAIRS:
            tensors, said, seen = mend(tensors, file.error)
            done, notes = [*done, *said], [*notes, *seen]
        if dry_run or not done:
            return Repaired(None, tuple(done), tuple(notes))
        metadata = {key: value for key, value in file.metadata.items() if key not in TAKEN} | {NOTE: "; ".join(done)}
        written = write(tensors, _beside(file) if out is None else out, metadata, overwrite=overwrite, on_write=guarded([file], on_write))
        return Repaired(written, tuple(done), tuple(notes))


def _open(path: str | PathLike[str]) -> tuple[Weights, int, list[str]]:
    """The file, how many bytes follow its last tensor, and what its name gets wrong."""
    source = Source(path)
    try:
        kind = kind_of(source)
        suffix = source.path.suffix.lower()
        if kind == "safetensors":
            contents, end = read_header(source)
            wrong = suffix in TORCH_FILES and f"is a .safetensors by its content, a torch file by its name: rename it to {source.path.stem}.safetensors"
        else:
            contents, end = (torchfiles.read_zip if kind == "zip" else torchfiles.read_stream)(source), source.size
            wrong = suffix == ".safetensors" and f"is a torch file by its content, a .safetensors by its name: rename it to {source.path.stem}.ckpt"
        return Weights(source, kind, contents), source.size - end, [wrong] if wrong else []
    except BaseException:
        source.close()
        raise


def _beside(file: Weights) -> Path:
    suffix = ".safetensors" if file.kind == "safetensors" else file.path.suffix if file.path.suffix in TORCH_FILES else ".ckpt"
    return file.path.with_name(f"{file.path.stem}-repaired{suffix}")


def _reading(file: Weights, key: str) -> Callable[[], Tensor]:
    return lambda: file.read(key, mapped=False)
