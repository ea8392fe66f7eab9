"""What a file or folder of weights is, found out from its header: `inspect`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from ldm.config import ModelConfig
from ldm.errors import FileError
from weights.files.folders import COMPONENTS, Folder, add_component, open_folder
from weights.files.hashes import Hashed, a1111_new, a1111_old, of_size, published, sha256
from weights.files.opened import Weights, is_folder, open_file
from weights.models import embedded
from weights.names.family import require_family
from weights.tools.evidence import damages, training, typed
from weights.tools.facts import Container, FileFacts, Report, TensorFacts
from weights.tools.findings import describe_contents

CONTAINERS: dict[str, Container] = {"safetensors": "safetensors", "zip": "torch zip", "stream": "torch stream"}


def inspect(
    path: str | PathLike[str] | None = None, *, hash: bool = False, config: ModelConfig | str | None = None,
    on_hash: Callable[[Hashed], None] | None = None,
) -> Report:  # fmt: skip
    """What a file or folder of weights is, how that shows, and what is amiss. Reads headers, and a few small tensors.

    path     .safetensors, .ckpt, .pt, .bin, a diffusers folder or the folder of one component; None: the model that
             ships with the package
    hash     read everything for the SHA-256 too, which tells whether these are the bytes of a published file
    on_hash  is called with the progress of that
    config   a ModelConfig or a family's name that overrules what the file shows, as in `weights.load`
    Raises FileError for what cannot be read; what can be read and not loaded is a report, with `problem`.
    """
    if isinstance(config, str):
        require_family(config)
    path = Path(embedded() if path is None else path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open(path))
        found = describe_contents(file, config, stack)
        opened = file.files if isinstance(file, Folder) else [file]
        metadata = dict(file.metadata) or (
            {} if isinstance(file, Weights) else next((dict(each.metadata) for each in opened if each.metadata), {})
        )
        variants = {_variant(each.path.name) for each in opened if isinstance(file, Folder)} - {""}
        report = Report(
            path=str(path),
            kind=CONTAINERS[file.kind] if isinstance(file, Weights) else "diffusers folder",
            sharded=any(re.search(r"-\d+-of-\d+\.", each.path.name) for each in opened),
            variant=", ".join(sorted(variants)),
            files=tuple(_file(each, path, hash, on_hash) for each in opened),
            what=found.what,
            title=found.title,
            family=found.family,
            loadable=found.problem is None,
            problem=found.problem,
            evidence=found.evidence,
            prediction=found.prediction,
            components=found.components,
            missing=found.missing,
            missing_keys=found.missing_keys,
            unknown_keys=found.unknown_keys,
            ema=found.ema,
            lora=found.lora,
            embedding=found.embedding,
            damage=damages(file),
            training=training(file, metadata),
            metadata={str(key): str(value) for key, value in metadata.items()},
            tensors=tuple(TensorFacts(key, typed(spec.dtype), tuple(spec.shape)) for key, spec in file.specs.items()),
        )
        file.require_unchanged()
        return report


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Weights | Folder]:
    """The file, the folder of a model, or that of one component."""
    if not path.is_dir():
        opened: Weights | Folder = open_file(path)
    elif is_folder(path):
        opened = open_folder(path)
    else:
        known = (stems for stems in COMPONENTS.values() if any(any(path.glob(f"{stem}*")) for stem in stems))
        if (stems := next(known, None)) is None:
            what = "is a directory without weights of a known name; name a file in it, or a diffusers folder"
            raise FileError(what, path=path)
        opened = Folder(path)
        try:
            add_component(opened, path, stems, "")
        except BaseException:
            opened.close()
            raise
    with opened:
        yield opened


def _variant(name: str) -> str:
    """model.fp16-00001-of-00002.safetensors -> fp16."""
    return ".".join(re.sub(r"-\d+-of-\d+", "", name).split(".")[1:-1])


def _file(file: Weights, path: Path, hashed: bool, on_hash: Callable[[Hashed], None] | None) -> FileFacts:
    digest = sha256(file.source, on_hash) if hashed else None
    alone, size = file.path == path, file.source.size
    return FileFacts(
        name=file.path.name if alone else file.path.relative_to(path).as_posix(),
        container=CONTAINERS[file.kind],
        bytes=size,
        published=() if digest is None else published(digest, size),
        same_size=of_size(size),
        a1111_old=a1111_old(file.source) if alone else None,
        a1111_new=None if digest is None else a1111_new(digest),
        sha256=digest,
    )
