"""The micro-batches of a run: pictures, their frames and captions, each a function of its number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.cond import Sizes
from ldm.errors import ArgumentError, FileError
from ldm.images import from_pil
from ldm.model import LatentDiffusion
from ldm.train.data import frame as framing
from ldm.train.data.batch import Batch
from ldm.train.data.encoded import Latents, Progress, Texts
from ldm.train.data.frame import Frame, Size
from ldm.train.data.opening import open_prior, open_source
from ldm.train.data.plan import fraction, subset
from ldm.train.data.source import Bad, digest
from ldm.train.recipe import Data, Run, wrong_key

AHEAD = 3  # micro-batches that are made before they are asked for

Unread = list[tuple[int, int, FileError]]  # part and item, and why it could not be read


@dataclass(frozen=True)
class Example:
    """One row of a batch."""

    index: int
    caption: str
    sizes: Sizes
    tensors: Mapping[str, Tensor]  # by the names of `Batch`, without the first dimension


class Examples:
    """The examples of a run. `micro(number)` is the same in every process, whatever was asked for before.

    With prior preservation even micro-batches are of the pictures to learn from, odd ones of the prior's, each kind in
    a plan of its own.
    """

    def __init__(self, data: Data, run: Run, model: LatentDiffusion, *, cache: Path | None = None):
        """
        cache  directory for what need not be done again when the run goes on: reading unchanged files, and the latents
               and texts that `data` asks to keep, which `encode` makes. None: everything is done again
        Raises FileError for data that cannot be used, naming the first such picture; ArgumentError for keys that do not
        go together.
        """
        self.data, self.run = data, run
        config = model.config
        size = data.size or config.size
        sizes = _sizes(data, size, config.vae.factor)
        if data.cache_latents and data.crop != "center":
            what = "goes with centre crops only; set data.crop to center, or do not keep latents"
            raise wrong_key("data.cache_latents", what)
        if data.cache_text and not config.text:
            raise wrong_key("data.cache_text", f"a model of family {config.name} takes no text; leave it out")
        if cache is None and (data.cache_latents or data.cache_text):
            raise wrong_key("cache", "no directory for what data.cache_latents or data.cache_text keeps; give one")

        self._parts = [subset(open_source(data, size, cache), sizes, run, held_out=data.held_out)]
        if (prior := open_prior(data, cache)) is not None:
            self._parts.append(subset(prior, sizes, run, weight=data.prior_weight))
        self.bad = [bad for part in self._parts for bad in part.bad]  # pictures left out, in the order they were found
        self._listed = sum(len(part.source.items) + len(part.source.bad) for part in self._parts)
        self._unreadable: set[tuple[int, int]] = set()  # part and item, known since they were asked for
        self._note([])
        takes_depth = "depth" in config.concat
        self._depth = takes_depth and all(part.source.has_depth for part in self._parts)
        self._pixels = "masked_image" in config.concat or config.vision is not None or (takes_depth and not self._depth)
        self._latents = Latents(model.vae, cache) if data.cache_latents and cache else None
        self._texts = Texts(model.text, cache) if data.cache_text and cache else None
        self._pool = ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1), "pictures")
        self._coming: dict[int, Future[tuple[Batch, Unread]]] = {}
        self._last: int | None = None

    def __len__(self) -> int:
        """Examples in one pass over the data, those included that fill up a bucket's last micro-batch."""
        return sum(part.plan.micros for part in self._parts) * self.run.micro

    @property
    def facts(self) -> dict[str, Any]:
        """What a run must find unchanged when it goes on, for JSON."""
        rows: list[str] = []
        for part in self._parts:
            for item, bucket in zip(part.source.items, part.buckets, strict=True):
                rows += [item.id, *item.captions, item.fingerprint, f"{bucket}"]
        counts = Counter(f"{h}x{w}" for part in self._parts for h, w in part.buckets)
        return {
            "hash": digest(*rows),
            "pictures": len(self._parts[0].source.items),
            "prior": sum(len(part.source.items) for part in self._parts[1:]),
            "held_out": len(self._parts[0].held),
            "buckets": dict(sorted(counts.items())),
        }

    def without(self, is_good: Callable[[str], bool]) -> str | None:
        """The first picture to learn from that has a caption of which `is_good` is false; None: there is none."""
        return next((item.id for item in self._parts[0].source.items if not all(map(is_good, item.captions))), None)

    def micro(self, number: int) -> Batch:
        """Micro-batch `number` of the run, counted from 0. The next picture of its bucket replaces an unreadable one.

        Raises FileError once more pictures are unreadable than `data.bad_limit` allows.
        """
        step = number - self._last if self._last is not None and number > self._last else 1
        self._last, coming = number, range(number, number + (AHEAD + 1) * step, step)
        self._coming = {n: self._coming.get(n) or self._pool.submit(self._made, n) for n in coming}
        batch, unreadable = self._coming.pop(number).result()
        self._note(unreadable)
        return batch

    def held_out(self, most: int) -> list[Batch]:
        """The first `most` held-out pictures in micro-batches: cut in the middle, not mirrored, with first captions.

        They are numbered -1, -2, ..., so that their draws are not those of any example of the run. Unreadable ones are
        left out.
        """
        learnt, micro = self._parts[0], self.run.micro
        rows: dict[Size, list[Example]] = {}
        unreadable: Unread = []
        for k, i in enumerate(learnt.held[:most]):
            try:
                rows.setdefault(learnt.buckets[i], []).append(self._example(0, i, -1 - k))
            except FileError as error:
                unreadable.append((0, i, error))
        self._note(unreadable)
        pieces = ((size, rows[size][n : n + micro]) for size in sorted(rows) for n in range(0, len(rows[size]), micro))
        return [self._batch(0, size, piece) for size, piece in pieces]

    def encode(self, rank: int = 0, world: int = 1, on_progress: Progress = lambda what, done, total: None) -> None:
        """Fill the cache that `data` asks for; delete what belongs to another model, picture or frame.

        With several ranks all call this, each does its share, and none asks for a micro-batch before all are done. A
        pass that is cut off keeps what it has written. Nothing happens where nothing is to be kept. Raises OutputError;
        FileError for too many unreadable pictures.
        """
        if (texts := self._texts) is not None:
            items = [item for part in self._parts for item in part.source.items]
            captions = list(dict.fromkeys(caption for item in items for caption in item.captions))
            if rank == 0:
                texts.cache.keep([name for caption in captions for name in texts.names(caption)])
            missing = [caption for caption in captions[rank::world] if texts.names(caption)[0] not in texts.cache]
            texts.add(missing, on_progress)
        if (latents := self._latents) is not None:
            wanted = self._wanted(latents)
            if rank == 0:
                latents.cache.keep(wanted)
            missing = [name for name in list(wanted)[rank::world] if name not in latents.cache]
            unread: Unread = []
            latents.add(self._pictures({name: wanted[name] for name in missing}, unread), len(missing), on_progress)
            self._note(unread)

    def _wanted(self, latents: Latents) -> dict[str, tuple[int, int, Frame]]:
        """{name of a latent: part, item, frame} of every latent that is kept."""
        wanted = {}
        for kind, part in enumerate(self._parts):
            learnt = {i for group in part.groups.values() for i in group}
            for i in sorted(learnt.union(part.held)):
                for mirrored in (False, True) if self.data.flip and i in learnt else (False,):
                    item = part.source.items[i]
                    how = framing.frame(item.size, part.buckets[i], None, mirrored)
                    wanted[latents.name(item, how)] = kind, i, how
        return wanted

    def _pictures(self, wanted: Mapping[str, tuple[int, int, Frame]], unread: Unread) -> Iterator[tuple[str, Tensor]]:
        """Pictures [3, H, W] in turn, decoded in threads a few ahead; unreadable ones are added to `unread`."""
        submit, rows = self._pool.submit, iter(wanted.items())
        while ahead := [(name, submit(self._framed, *where), where) for name, where in islice(rows, 4 * AHEAD)]:
            for name, image, (kind, i, _) in ahead:
                try:
                    yield name, image.result()
                except FileError as error:
                    unread.append((kind, i, error))

    def _note(self, unreadable: Unread) -> None:
        """List pictures that could not be read. Raises FileError for too many."""
        for kind, i, error in unreadable:
            if (kind, i) not in self._unreadable:
                self._unreadable.add((kind, i))
                self.bad.append(Bad(self._parts[kind].source.items[i].id, error.what))
        if len(self.bad) > self.data.bad_limit * self._listed:
            first, what = self.bad[0], f"{len(self.bad)} of {self._listed} pictures cannot be used"
            raise FileError(f"data: {what}, more than data.bad_limit allows: {first.id[-40:]} {first.why[:80]}")

    def _made(self, number: int) -> tuple[Batch, Unread]:
        """A micro-batch, and the pictures that could not be read on the way to it. Runs in a thread."""
        kind, place = number % len(self._parts), number // len(self._parts)
        rows: list[Example] = []
        unreadable: Unread = []
        part = self._parts[kind]
        items = part.plan.items(place)
        size = part.buckets[items[0]]
        group = part.groups[size]
        for j, item in enumerate(items):
            for i in _from(group, item):
                try:
                    rows.append(self._example(kind, i, number * self.run.micro + j))
                    break
                except FileError as error:
                    unreadable.append((kind, i, error))
            else:
                what = f"none of the {len(group)} pictures of {size[1]}x{size[0]} pixels can be read any more"
                raise FileError(f"data: {what}; put them back")
        return self._batch(kind, size, rows), unreadable

    def _example(self, kind: int, i: int, index: int) -> Example:
        """Item i as example `index`, with its draws; below 0 nothing is drawn. Raises FileError."""
        part, data, seed = self._parts[kind], self.data, self.run.seed
        item, drawn = part.source.items[i], index >= 0
        if (kind, i) in self._unreadable:
            raise FileError("could not be read before", path=item.id)
        at_random = drawn and data.crop == "random"
        place = (fraction(seed, index, "top"), fraction(seed, index, "left")) if at_random else None
        mirrored = drawn and data.flip and fraction(seed, index, "mirror") < 0.5
        how = framing.frame(item.size, part.buckets[i], place, mirrored)
        caption = item.captions[int(fraction(seed, index, "caption of several") * len(item.captions)) if drawn else 0]
        tensors: dict[str, Tensor] = {}
        if self._latents is not None:
            tensors["moments"] = self._moments(self._latents, kind, i, how)
        if self._latents is None or self._pixels:
            tensors["image"] = self._framed(kind, i, how)
        if self._texts is not None:
            tensors["context"], tensors["pooled"] = self._texts.get(caption)
        if self._depth:
            tensors["depth"] = from_pil(framing.framed(part.source.depth(i), how)).mean(dim=1)
        return Example(index, caption, framing.sizes(item.size, how), tensors)

    def _framed(self, kind: int, i: int, how: Frame) -> Tensor:
        """Item i in its frame, [3, H, W] float32 in [-1, 1]. Raises FileError."""
        source = self._parts[kind].source
        image, item = source.picture(i), source.items[i]
        if image.size != item.size[::-1]:
            before = f"{item.size[1]}x{item.size[0]} when it was listed"
            raise FileError(f"is {image.width}x{image.height} pixels and was {before}", path=item.id)
        return from_pil(framing.framed(image, how))[0]

    def _moments(self, latents: Latents, kind: int, i: int, how: Frame) -> Tensor:
        """The kept latent. Raises FileError where there is none because the picture cannot be read."""
        item = self._parts[kind].source.items[i]
        try:
            return latents.get(item, how)
        except KeyError:
            self._framed(kind, i, how)
            what = f"picture {item.id[-60:]} is not in the cache; call encode before the first micro-batch"
            raise ArgumentError(what) from None

    def _batch(self, kind: int, size: Size, rows: Sequence[Example]) -> Batch:
        return Batch(
            index=tuple(row.index for row in rows),
            captions=tuple(row.caption for row in rows),
            size=size,
            sizes=tuple(row.sizes for row in rows),
            weight=torch.full((len(rows),), float(self._parts[kind].weight)),
            **{name: torch.stack([row.tensors[name] for row in rows]) for name in rows[0].tensors},
        )


def _sizes(data: Data, size: int, factor: int) -> list[Size]:
    """The sizes of batches in pixels. Raises ArgumentError for sides that are no multiples of `factor`."""
    if size % factor or (data.buckets and data.bucket_step % factor):
        what = f"both must be multiples of {factor}, this model's pixels per latent cell"
        raise ArgumentError(f"data.size {size}, data.bucket_step {data.bucket_step}: {what}", key="data.size")
    sizes = framing.buckets(size, data.bucket_step) if data.buckets else [(size, size)]
    if not sizes:
        what = f"{data.bucket_step} leaves no bucket of {size}x{size} pixels; give a smaller one"
        raise wrong_key("data.bucket_step", what)
    return sizes


def _from(group: Sequence[int], item: int) -> Iterator[int]:
    """The item, then those after it, round to it again."""
    yield item
    first = group.index(item)
    yield from group[first + 1 :]
    yield from group[:first]
