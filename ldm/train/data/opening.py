"""The sources of pictures that section [data] of a recipe names."""

from __future__ import annotations

from pathlib import Path

from ldm.train.data.folder import PictureFolder, pictures_in, require_directory
from ldm.train.data.scenes import Scenes
from ldm.train.data.shards import Shards
from ldm.train.data.source import PictureSource
from ldm.train.recipe import Data, wrong_key


def open_source(data: Data, size: int, cache: Path | None = None) -> PictureSource:
    """The pictures to learn from.

    size   of rendered pictures, pixels
    cache  directory for facts about the files
    Raises FileError for files that do not exist, ArgumentError without a path.
    """
    require_path(data)
    if data.source == "scenes":
        return Scenes(data.scenes, size, data.caption)
    listing = cache and cache / "pictures.json"
    if data.source == "shards":
        return Shards(data.path, data.caption, listing)
    return PictureFolder(data.path, data.caption, listing)


def require_path(data: Data) -> None:
    """Raises ArgumentError where pictures are to be read and no path is given, FileError for a missing directory."""
    if data.source != "scenes" and not data.path:
        raise wrong_key("data.path", "is not given; name the pictures to learn from: --set data.path=DIRECTORY")
    if data.source == "folder":
        require_directory(Path(data.path))


def missing_prior(data: Data) -> int:
    """How many of `data.prior_pictures` the directory `data.prior` lacks; 0 without prior preservation.

    Prior preservation is DreamBooth's (Ruiz et al. 2023, section 3.3). Raises ArgumentError for a directory inside
    `data.path`: its pictures would be learnt from as the particular thing.
    """
    if not data.prior_pictures:
        return 0
    if data.source == "folder" and Path(data.prior).resolve().is_relative_to(Path(data.path).resolve()):
        what = "lies in data.path, whose pictures are of one particular thing; give a directory outside"
        raise wrong_key("data.prior", what)
    found = len(pictures_in(Path(data.prior))) if Path(data.prior).is_dir() else 0
    return max(0, data.prior_pictures - found)


def open_prior(data: Data, cache: Path | None = None) -> PictureSource | None:
    """The pictures that keep the class as it is; None without prior preservation.

    Captions of their own, in metadata.jsonl, take the place of `data.prior_caption`. Raises ArgumentError while some
    pictures are missing.
    """
    if missing := missing_prior(data):
        what = f"{data.prior[-60:]} lacks {missing} of {data.prior_pictures} pictures; make them first"
        raise wrong_key("data.prior", what)
    if not data.prior_pictures:
        return None
    caption = "" if (Path(data.prior) / "metadata.jsonl").is_file() else data.prior_caption
    return PictureFolder(data.prior, caption, cache and cache / "prior.json")
