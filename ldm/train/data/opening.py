"""The sources that a recipe's [data] names."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import ArgumentError
from ldm.train.data.folder import Folder, pictures_in, require_directory
from ldm.train.data.scenes import Scenes
from ldm.train.data.shards import Shards
from ldm.train.data.source import Source
from ldm.train.recipe import Data


def open_source(data: Data, size: int, cache: Path | None = None) -> Source:
    """The pictures to learn from; `size` in pixels is that of rendered ones; `cache` a directory for what is found out about files. Raises FileError for what is not there, ArgumentError without a path."""
    require_path(data)
    if data.source == "scenes":
        return Scenes(data.scenes, size, data.caption)
    kind = Shards if data.source == "shards" else Folder
    return kind(data.path, data.caption, cache and cache / "pictures.json")


def require_path(data: Data) -> None:
    """Raises ArgumentError where pictures are to be read and no path says from where, FileError for a directory that is not there."""
    if data.source != "scenes" and not data.path:
        raise ArgumentError(
            "data.path: is not given; name the pictures to learn from: --set data.path=DIRECTORY", key="data.path"
        )
    if data.source == "folder":
        require_directory(Path(data.path))


def missing_prior(data: Data) -> int:
    """How many of `data.prior_pictures` the directory `data.prior` lacks (DreamBooth, Ruiz et al. 2023, section 3.3); 0 without prior preservation.

    Pictures made from `data.prior_caption` go into that directory, under any names. Raises ArgumentError where they would be learnt from.
    """
    if not data.prior_pictures:
        return 0
    if data.source == "folder" and Path(data.prior).resolve().is_relative_to(Path(data.path).resolve()):
        raise ArgumentError(
            "data.prior: lies in data.path, whose pictures are of one particular thing; give a directory outside",
            key="data.prior",
        )
    there = len(pictures_in(Path(data.prior))) if Path(data.prior).is_dir() else 0
    return max(0, data.prior_pictures - there)


def open_prior(data: Data, cache: Path | None = None) -> Source | None:
    """The pictures that keep the class as it is; None without prior preservation. Raises ArgumentError while some are missing.

    Captions of their own, in metadata.jsonl, take the place of `data.prior_caption`.
    """
    if missing := missing_prior(data):
        raise ArgumentError(
            f"data.prior: {data.prior[-60:]} lacks {missing} of {data.prior_pictures} pictures; make them first",
            key="data.prior",
        )
    if not data.prior_pictures:
        return None
    caption = "" if (Path(data.prior) / "metadata.jsonl").is_file() else data.prior_caption
    return Folder(data.prior, caption, cache and cache / "prior.json")
