"""Where pictures go."""

from __future__ import annotations

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm.errors import ArgumentError, NonFinite, OutputError
from ldm.images import to_pil
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.pictures import write
from samplers import OnStep, Step


@dataclass
class Place:
    """A directory whose files are numbered, or the name of a .png."""

    path: Path
    is_file: bool
    overwrite: bool
    saved: int = 0  # pictures so far, without previews and sheets
    preview: Path | None = None  # the file of this run's previews, once there is one

    @staticmethod
    def checked(out: str | None, *, mkdir: bool, overwrite: bool, pixels: int) -> Place:
        """The place that `out` names; None: outputs/, which is made. Raises ArgumentError or OutputError.

        pixels  how many will be written: there must be room for them
        """
        path = Path(out if out is not None else "outputs")
        is_file = path.suffix.lower() == ".png" and not os.path.isdir(path)
        folder = path.parent if is_file else path
        if not is_file and path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
            raise ArgumentError(f"--out: {path.name[-60:]}: pictures are written as PNG; name a .png or a directory")
        if overwrite and not is_file:
            why = "in a directory every picture gets a number of its own"
            raise ArgumentError(f"--overwrite: only with a --out that names a .png; {why}")
        if overwrite and os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
            raise ArgumentError(f"--out: {path.name[-60:]} is there and is not a regular file")
        if not os.path.isdir(folder):
            if os.path.lexists(folder):
                raise ArgumentError(f"--out: {str(folder)[-80:]} is not a directory; name a .png or a directory")
            if not mkdir and out is not None:
                raise ArgumentError(f"--out: directory {str(folder)[-80:]}/ does not exist; make it, or add --mkdir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".ldm-{os.getpid()}.tmp"
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.unlink(probe)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise OutputError(f"--out: cannot write into {str(folder)[-80:]}: {error.strerror}") from None
        needed = int(1.1 * pixels * 3) + 2**16
        if needed > free:
            room = f"about {needed / 1e6:.3g} MB needed in {str(folder)[-80:]}, {free / 1e6:.3g} MB free"
            raise OutputError(f"--out: {room}; make room or choose another place")
        return Place(path, is_file, overwrite)

    def save(self, picture: Image.Image, facts: dict[str, str], suffix: str = "") -> Path:
        """Write under the next name that is free, or the one to overwrite."""
        if not suffix:
            self.saved += 1
        if not self.is_file:
            return write.save(picture, write.numbered(self.path, suffix), facts)
        names = write.spare(self.path.with_name(f"{self.path.stem}{suffix}{self.path.suffix}"))
        if self.overwrite:
            return write.save(
                picture, next(itertools.islice(names, 0 if suffix else self.saved - 1, None)), facts, overwrite=True
            )
        return write.save(picture, names, facts)

    def previewing(self, model: LatentDiffusion, every: int | None, watch: OnStep) -> OnStep:
        """`watch`, and after every few steps the current x0 of the batch in a file, the same all through the run."""
        if every is None:
            return watch

        def on_step(step: Step) -> None:
            watch(step)
            before, after = (calls * step.steps // step.total for calls in (step.index, step.index + 1))  # whole
            if after > before and after % every == 0:
                try:
                    pictures = to_pil(precision.decode(model, step.x0))
                except (
                    NonFinite
                ):  # an early estimate may be too wild for half precision; the picture itself is still checked
                    return
                if len(pictures) > 1:
                    from ldm.pictures.sheets import sheet

                    pictures = [sheet(pictures)]
                if self.preview is None:
                    self.preview = self.save(pictures[0], {}, "-preview")
                else:
                    write.save(pictures[0], self.preview, overwrite=True)

        return on_step
