"""A diffusers folder as one collection of tensors, each under `component/` and its key there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import FileError
from weights.files.opened import Weights, open_file
from weights.files.source import Source, refusal
from weights.files.torchfiles import Spec

COMPONENTS = {  # folder -> the name of its weights, as .safetensors and as .bin
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"), "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"), "text_encoder_2": ("model", "pytorch_model"), "image_encoder": ("model", "pytorch_model"),
    "depth_estimator": ("model", "pytorch_model"),
}  # fmt: skip
# Variants in the order in which they are taken where several are there: the numbers with all their digits come first, bfloat16, which has
# the fewest, last. `ema` and no name at all are the averaged weights. `non_ema`, the raw ones, is taken where it was asked for or is alone.
VARIANTS = ("", "fp32", "ema", "fp16", "bf16", "non_ema")
MAX_JSON = 16 * 2**20  # bytes of an index or config
MAX_JSON_PARTS = 500_000  # commas and brackets in it: what its parsed form may cost
MAX_SHARDS = 1000


class Folder(Mapping[str, Tensor]):
    """The tensors of several files by name; nothing is read before it is asked for. Reads like `Weights`."""

    def __init__(self, path: Path, metadata: Mapping[str, str] | None = None):
        self.path, self.metadata = path, dict(metadata or {})
        self.specs: dict[str, Spec] = {}
        self.files: list[Weights] = []  # all that was opened, in the order of COMPONENTS
        self._places: dict[str, tuple[Weights, str]] = {}

    def add(self, file: Weights, prefix: str) -> None:
        """Take in a file's tensors, their keys after `prefix`. The file is closed with the folder."""
        self.files.append(file)
        for key, spec in file.specs.items():
            if prefix + key in self.specs:
                raise self.error(f"{prefix}{key} is in two of its files; download it again", prefix + key)
            self.specs[prefix + key], self._places[prefix + key] = spec, (file, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __getitem__(self, key: str) -> Tensor:
        file, name = self._places[key]
        return file[name]

    def read(
        self,
        key: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: slice | None = None,
        *,
        mapped: bool = True,
    ) -> Tensor:
        """As `Weights.read`."""
        file, name = self._places[key]
        return file.read(name, device, dtype, rows, mapped=mapped)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self.specs[key].shape

    def error(self, what: str, key: str | None = None) -> FileError:
        """The error to raise about this folder."""
        return refusal(what, self.path, key)

    def require_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        for file in self.files:
            file.require_unchanged()

    @contextlib.contextmanager
    def read_ahead(self) -> Iterator[Callable[[], None]]:
        """As `Weights.read_ahead`, of all files."""
        with contextlib.ExitStack() as stack:
            waits = [stack.enter_context(file.read_ahead()) for file in self.files]
            yield lambda: [wait() for wait in waits] and None

    def close(self) -> None:
        """Give the files back; tensors already read stay valid."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def is_folder(path: str | PathLike[str]) -> bool:
    """Is this a directory with a model's components in it?"""
    with contextlib.suppress(OSError, ValueError):
        return any((Path(path) / name).exists() for name in ("model_index.json", "unet")) and Path(path).is_dir()
    return False


def open_folder(path: str | PathLike[str], variant: str | None = None) -> Folder:
    """Open the components of a diffusers folder that a model is made of; nothing in it is run, and .bin only opened for want of .safetensors.

    variant   which weights to take of components that have them in several variants, as in their file names: "fp16", "non_ema" (the raw
              weights), ...; components without it give what they have. None: the first of VARIANTS
    Raises FileError, also when no component has the variant.
    """
    folder = Folder(Path(path))
    if variant is not None and variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise folder.error(f"has no variant {variant!r} that this version knows; use one of {known}")
    try:
        listed, found = _listed(folder), set()
        for name, stems in COMPONENTS.items():
            there = (folder.path / name).is_dir()
            if listed.get(name) and not there:
                raise folder.error(
                    f"its model_index.json lists {name}, and there is no folder of that name; download it again"
                )
            if there and listed.get(name, True):
                found.add(add_component(folder, folder.path / name, stems, f"{name}/", variant))
        for name in ("unet", "vae"):
            if not any(key.startswith(f"{name}/") for key in folder):
                raise folder.error(
                    f"has no {name}/ with weights in it; name the folder of a whole model, which has a UNet and a VAE"
                )
        if variant is not None and variant not in found:
            raise folder.error(f"has no {variant or 'plain'} weights in any component; use another variant, or none")
        return folder
    except BaseException:
        folder.close()
        raise


def _listed(folder: Folder) -> dict[str, bool]:
    """Which components model_index.json, where it is there, says that there are."""
    path = folder.path / "model_index.json"
    if not path.exists():
        return {}
    listed = read_json(path)
    return {
        name: any(part is not None for part in parts)
        for name, parts in listed.items()
        if name in COMPONENTS and isinstance(parts, list)
    }


def add_component(folder: Folder, path: Path, stems: tuple[str, str], prefix: str, variant: str | None = None) -> str:
    """Take in the weights of one component and return their variant: averaged before raw, .safetensors before .bin, then as in VARIANTS."""
    averaged, raw = VARIANTS[:-1], VARIANTS[-1:]
    for group in (averaged, raw) if variant is None else ((variant,), averaged, raw):
        for kind, stem in zip(("safetensors", "bin"), stems, strict=True):
            for name in group:
                if _add_variant(folder, path, stem, f".{name}" if name else "", kind, prefix):
                    return name
    odd = sorted(
        file.name for file in path.glob("*") if file.name.startswith(stems) and file.suffix in (".safetensors", ".bin")
    )
    known = f"but {odd[0]}" if odd else f"{stems[0]}.safetensors or {stems[1]}.bin"
    raise folder.error(f"{path.name}/ has no weights that this version knows ({known}); download it again")


def _add_variant(folder: Folder, path: Path, stem: str, variant: str, kind: str, prefix: str) -> bool:
    """Take in the weights of one variant, in one file or in shards; false if there are none. `variant` has its dot."""
    single = path / f"{stem}{variant}.{kind}"
    if os.path.lexists(single):
        folder.add(open_file(single), prefix)
        return True
    for index in (path / f"{stem}.{kind}.index{variant}.json", path / f"{stem}{variant}.{kind}.index.json"):
        if os.path.lexists(index):
            _add_shards(folder, index, prefix)
            return True
    return False


def _add_shards(folder: Folder, index: Path, prefix: str) -> None:
    """Take in the files that an index names, which must be in its own folder and hold exactly what it says."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or any(not isinstance(name, str) for name in found.values()):
        raise refusal("has no weight_map of file names; download it again", index)
    shards = sorted(set(found.values()))
    for name in shards:
        if (
            not name
            or name in (".", "..")
            or any(c in name for c in "/\\\0:")
            or not name.isprintable()
            or len(name.encode()) > 255
        ):
            raise refusal(
                f"names the file {name[:20]!r}, which is not a plain name in its own folder; download it again", index
            )
    if len(shards) > MAX_SHARDS:
        raise refusal(f"names {len(shards)} files, the limit is {MAX_SHARDS}; download it again", index)
    gone = [name for name in shards if not os.path.lexists(index.parent / name)]
    if gone:
        raise refusal(f"names {gone[0]}, which is not there; download it too", index)
    for name in shards:
        file = open_file(index.parent / name)
        folder.add(file, prefix)
        listed = {key for key, shard in found.items() if shard == name}
        odd = sorted(listed ^ set(file))
        if odd:
            fault = "is not in it" if odd[0] in listed else "is in it unannounced"
            raise refusal(f"and {name[-26:]} disagree: {odd[0][-34:]} {fault}; download both again", index, odd[0])


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises FileError for anything else, also for NaN, doubled keys and deep nesting."""
    source = Source(path)
    try:
        if source.size > MAX_JSON:
            raise source.error(f"has {source.size} bytes, the limit for JSON is {MAX_JSON}; download it again")
        raw = source.read(0, source.size)
        if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
            raise source.error("is JSON of too many parts for an index or a config; download it again")
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise source.error("is not JSON as it should be (damaged, doubled keys or NaN); download it again") from None
    finally:
        source.close()
    if not isinstance(value, dict):
        raise source.error("is not a JSON object; download it again")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _refuse(name: str) -> None:
    raise ValueError(name)
