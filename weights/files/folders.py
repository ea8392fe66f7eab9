"""A diffusers folder as one collection of tensors, each under `component/` and its key in that component's files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import FileError
from weights.files.opened import Tensors, Weights, open_file, strict_json
from weights.files.source import Source

COMPONENTS = {  # folder -> the name of its weights, as .safetensors and as .bin
    **dict.fromkeys(("unet", "vae"), ("diffusion_pytorch_model", "diffusion_pytorch_model")),
    **dict.fromkeys(("text_encoder", "text_encoder_2", "image_encoder", "depth_estimator"), ("model", "pytorch_model")),
}
# Variants in the order in which they are taken where there are several: the numbers with the most digits first.
# `ema` and no name at all are the averaged weights; `non_ema`, the raw ones, are taken if asked for or alone.
VARIANTS = ("", "fp32", "ema", "fp16", "bf16", "non_ema")
MAX_JSON = 16 * 2**20  # bytes of an index or config
MAX_JSON_PARTS = 500_000  # commas and brackets in it: what its parsed form may cost
MAX_SHARDS = 1000


class Folder(Tensors):
    """The tensors of several files, each under a prefix and its key in its file."""

    def __init__(self, path: Path):
        super().__init__(path, {}, {}, [])
        self.files: list[Weights] = []  # all that was opened, in the order of COMPONENTS
        self._places: dict[str, tuple[Weights, str]] = {}

    def add(self, file: Weights, prefix: str) -> None:
        """Take in a file's tensors, their keys after `prefix`. The file is closed with the folder."""
        self.files.append(file)
        self.sources.append(file.source)
        for key, spec in file.specs.items():
            if prefix + key in self.specs:
                raise self.damaged(f"{prefix}{key} is in two of its files", prefix + key)
            self.specs[prefix + key], self._places[prefix + key] = spec, (file, key)

    def stored(self, key: str, mapped: bool, rows: slice | None = None) -> Tensor:
        """As `Tensors.stored`."""
        file, name = self._places[key]
        return file.stored(name, mapped, rows)

    @contextlib.contextmanager
    def read_ahead(self) -> Iterator[Callable[[], None]]:
        """As `Weights.read_ahead`, of all files."""
        with contextlib.ExitStack() as stack:
            waits = [stack.enter_context(file.read_ahead()) for file in self.files]

            def wait() -> None:
                for each in waits:
                    each()

            yield wait


def open_folder(path: str | PathLike[str], variant: str | None = None) -> Folder:
    """Open the components of a diffusers folder that a model is made of; a .bin only where there is no .safetensors.

    variant   which weights to take of a component that has several, as in their file names: "fp16", "non_ema" (the raw
              weights), ...; a component without it gives what it has. None: the first of VARIANTS
    Raises FileError, also when no component has the variant.
    """
    folder = Folder(Path(path))
    if variant is not None and variant not in VARIANTS:
        known = ", ".join(VARIANTS[1:])
        raise folder.error(f"has no variant {variant!r} that this version knows; use one of {known}")
    try:
        listed, found = _listed(folder), set()
        for name, stems in COMPONENTS.items():
            exists = (folder.path / name).is_dir()
            if listed.get(name) and not exists:
                raise folder.damaged(f"its model_index.json lists {name}, and there is no folder of that name")
            if exists and listed.get(name, True):
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
    """{component: does model_index.json say that the model has it}; empty where there is no model_index.json."""
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
    """Take in the weights of one component and return their variant.

    Averaged ones come before raw ones, then .safetensors before .bin, then the order is that of VARIANTS.
    """
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
    raise folder.damaged(f"{path.name}/ has no weights that this version knows ({known})")


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
        raise FileError("has no weight_map of file names; download it again", path=index)
    shards = sorted(set(found.values()))
    for name in shards:
        plain = name.isprintable() and not set(name) & set("/\\\0:") and len(name.encode()) <= 255
        if name in ("", ".", "..") or not plain:
            raise FileError(
                f"names the file {name[:20]!r}, which is not a plain name in its own folder; download it again",
                path=index,
            )
    if len(shards) > MAX_SHARDS:
        raise FileError(f"names {len(shards)} files, the limit is {MAX_SHARDS}; download it again", path=index)
    gone = [name for name in shards if not os.path.lexists(index.parent / name)]
    if gone:
        raise FileError(f"names {gone[0]}, which is not there; download it too", path=index)
    for name in shards:
        file = open_file(index.parent / name)
        folder.add(file, prefix)
        listed = {key for key, shard in found.items() if shard == name}
        odd = sorted(listed ^ set(file))
        if odd:
            fault = "is not in it" if odd[0] in listed else "is in it unannounced"
            raise FileError(
                f"and {name[-26:]} disagree: {odd[0][-34:]} {fault}; download both again", path=index, key=odd[0]
            )


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises FileError for anything else, also for NaN, doubled keys and deep nesting."""
    with contextlib.closing(Source(path)) as source:
        if source.size > MAX_JSON:
            raise source.damaged(f"has {source.size} bytes, the limit for JSON is {MAX_JSON}")
        raw = source.read(0, source.size)
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_PARTS:
        raise source.damaged("is JSON of too many parts for an index or a config")
    try:
        value = strict_json(raw)
    except (ValueError, RecursionError):
        raise source.damaged("is not JSON as it should be (damaged, doubled keys or NaN)") from None
    if not isinstance(value, dict):
        raise source.damaged("is not a JSON object")
    return value
