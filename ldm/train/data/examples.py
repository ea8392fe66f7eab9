"""The micro-batches of a run: which pictures, framed how, said how, each a function of its number."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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
from ldm.train.data.plan import fraction, part
from ldm.train.data.source import Bad, digest, reason
from ldm.train.recipe import Data, Run

AHEAD = 3  # micro-batches that are made before they are asked for

Unread = Sequence[tuple[int, int, FileError]]  # part and item, and why


@dataclass(frozen=True)
class Example:
    """One row of a batch; fields as there, without the first dimension."""

    index: int
    caption: str
    sizes: Sizes
    image: Tensor | None = None
    moments: Tensor | None = None
    context: Tensor | None = None
    pooled: Tensor | None = None
    depth: Tensor | None = None


class Examples:
    """What a run learns from. `micro(number)` is the same in every process, whatever was asked for before.

    With prior preservation even micro-batches are of the pictures to learn from, odd ones of the prior's, each in a plan of its own.
    """

    def __init__(self, data: Data, run: Run, model: LatentDiffusion, *, cache: Path | None = None):
        """
        cache  directory of what need not be done again when the run goes on: reading unchanged files, and the latents and texts that
               `data` asks to keep, which `encode` makes. None: everything is done again
        Raises FileError for data that cannot be used, with the first picture that cannot; ArgumentError for keys that do not go together.
        """
        self.data, self.run = data, run
        config = model.config
        size, factor = data.size or config.size, config.vae.factor
        if size % factor or (data.buckets and data.bucket_step % factor):
            raise ArgumentError(
                f"data.size {size}, data.bucket_step {data.bucket_step}: both must be multiples of {factor}, this model's pixels per latent cell",
                key="data.size",
            )
        sizes = framing.buckets(size, data.bucket_step) if data.buckets else [(size, size)]
        if not sizes:
            raise ArgumentError(
                f"data.bucket_step: {data.bucket_step} leaves no bucket of {size}x{size} pixels; give a smaller one",
                key="data.bucket_step",
            )
        if (data.cache_latents or data.cache_text) and cache is None:
            raise ArgumentError(
                "cache: no directory for what data.cache_latents or data.cache_text keeps; give one", key="cache"
            )
        if data.cache_latents and data.crop != "center":
            raise ArgumentError(
                "data.cache_latents: goes with centre crops only; set data.crop to center, or do not keep latents",
                key="data.cache_latents",
            )
        if data.cache_text and not config.text:
            raise ArgumentError(
                f"data.cache_text: a model of family {config.name} is told no text; leave it out", key="data.cache_text"
            )

        self._parts = [part(open_source(data, size, cache), sizes, run, held_out=data.held_out)]
        if (prior := open_prior(data, cache)) is not None:
            self._parts.append(part(prior, sizes, run, weight=data.prior_weight))
        self.bad = [
            bad for some in self._parts for bad in some.bad
        ]  # what is left out, in the order in which it was found
        self._listed = sum(len(some.source.items) + len(some.source.bad) for some in self._parts)
        self._unreadable: set[tuple[int, int]] = set()  # part and item, known since they were asked for
        self._note(())
        self._depth = "depth" in config.concat and all(some.source.has_depth for some in self._parts)
        self._pixels = (
            "masked_image" in config.concat
            or config.vision is not None
            or ("depth" in config.concat and not self._depth)
        )
        self._latents = Latents(model.vae, cache) if data.cache_latents else None
        self._texts = Texts(model.text, cache) if data.cache_text else None
        self._pool = ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1), "pictures")
        self._coming: dict[int, Future[tuple[Batch, Unread]]] = {}
        self._last: int | None = None

    def __len__(self) -> int:
        """Examples in one pass over the data, those included that fill up a bucket's last micro-batch."""
        return sum(some.plan.micros for some in self._parts) * self.run.micro

    @property
    def facts(self) -> dict:
        """What a run must find unchanged when it goes on, for JSON."""
        told = []
        for some in self._parts:
            for item, bucket in zip(some.source.items, some.buckets, strict=True):
                told += [item.id, *item.captions, item.fingerprint, f"{bucket}"]
        counts = Counter(f"{h}x{w}" for some in self._parts for h, w in some.buckets)
        return {
            "hash": digest(*told),
            "pictures": len(self._parts[0].source.items),
            "prior": sum(len(some.source.items) for some in self._parts[1:]),
            "held_out": len(self._parts[0].held),
            "buckets": dict(sorted(counts.items())),
        }

    def without(self, says: Callable[[str], bool]) -> str | None:
        """The first picture to learn from that has a caption of which `says` is false; None: there is none."""
        return next((item.id for item in self._parts[0].source.items if not all(map(says, item.captions))), None)

    def micro(self, number: int) -> Batch:
        """Micro-batch `number` of the run, counted from 0. An unreadable picture's place is taken by the next of its bucket.

        Raises FileError once more pictures are unreadable than `data.bad_limit` allows.
        """
        step = number - self._last if self._last is not None and number > self._last else 1
        self._last = number
        self._coming = {
            n: self._coming.get(n) or self._pool.submit(self._made, n)
            for n in range(number, number + (AHEAD + 1) * step, step)
        }
        batch, unreadable = self._coming.pop(number).result()
        self._note(unreadable)
        return batch

    def held_out(self, most: int) -> list[Batch]:
        """The first `most` pictures that are held out, in micro-batches: cut in the middle, not mirrored, with their first captions.

        They are numbered -1, -2, ..., so that nothing is drawn for them that an example of the run draws. Unreadable ones are left out.
        """
        learnt, rows, unreadable = self._parts[0], {}, []
        for k, i in enumerate(learnt.held[:most]):
            try:
                rows.setdefault(learnt.buckets[i], []).append(self._example(0, i, -1 - k))
            except FileError as error:
                unreadable.append((0, i, error))
        self._note(unreadable)
        micro = self.run.micro
        return [
            self._batch(0, size, rows[size][n : n + micro])
            for size in sorted(rows)
            for n in range(0, len(rows[size]), micro)
        ]

    def encode(self, rank: int = 0, world: int = 1, on_progress: Progress = lambda what, done, total: None) -> None:
        """Fill the cache that `data` asks for with what it lacks; delete what belongs to another model, picture or frame.

        With several ranks all call this, each does its share, and none asks for a micro-batch before all are done. A pass that is cut off
        keeps what it has written. Nothing to keep: nothing happens. Raises OutputError; FileError for too many unreadable pictures.
        """
        if self._texts is not None:
            captions = list(
                dict.fromkeys(
                    caption for some in self._parts for item in some.source.items for caption in item.captions
                )
            )
            if rank == 0:
                self._texts.cache.keep([name for caption in captions for name in self._texts.names(caption)])
            self._texts.add(
                [
                    caption
                    for caption in captions[rank::world]
                    if self._texts.names(caption)[0] not in self._texts.cache
                ],
                on_progress,
            )
        if self._latents is not None:
            wanted = self._wanted()
            if rank == 0:
                self._latents.cache.keep(wanted)
            missing = [name for name in list(wanted)[rank::world] if name not in self._latents.cache]
            unread: list[tuple[int, int, FileError]] = []
            self._latents.add(
                self._pictures({name: wanted[name] for name in missing}, unread), len(missing), on_progress
            )
            self._note(unread)

    def _wanted(self) -> dict[str, tuple[int, int, Frame]]:
        """{name of a latent: part, item, frame} of every latent that is kept."""
        wanted = {}
        for kind, some in enumerate(self._parts):
            learnt = {i for group in some.groups.values() for i in group}
            for i in sorted(learnt.union(some.held)):
                for mirrored in (False, True) if self.data.flip and i in learnt else (False,):
                    item = some.source.items[i]
                    how = framing.frame(item.size, some.buckets[i], None, mirrored)
                    wanted[self._latents.name(item, how)] = kind, i, how
        return wanted

    def _pictures(
        self, wanted: Mapping[str, tuple[int, int, Frame]], unread: list[tuple[int, int, FileError]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Pictures [3, H, W] in turn, decoded in threads a few ahead; what cannot be read is told in `unread`."""
        coming = (
            (name, kind, i, self._pool.submit(self._seen, kind, i, how)) for name, (kind, i, how) in wanted.items()
        )
        while some := list(islice(coming, 4 * AHEAD)):
            for name, kind, i, image in some:
                try:
                    yield name, image.result()
                except FileError as error:
                    unread.append((kind, i, error))

    def _note(self, unreadable: Unread) -> None:
        """List what could not be read. Raises FileError for too many."""
        for kind, i, error in unreadable:
            if (kind, i) not in self._unreadable:
                self._unreadable.add((kind, i))
                name = self._parts[kind].source.items[i].id
                self.bad.append(Bad(name, reason(error)))
        if len(self.bad) > self.data.bad_limit * self._listed:
            first = self.bad[0]
            raise FileError(
                f"data: {len(self.bad)} of {self._listed} pictures cannot be used, more than data.bad_limit allows: {first.id[-40:]} {first.why[:80]}"
            )

    # --- one example ------------------------------------------------------------------------------------------------

    def _made(self, number: int) -> tuple[Batch, Unread]:
        """A micro-batch, and what could not be read on the way to it. Runs in a thread."""
        kind, place = number % len(self._parts), number // len(self._parts)
        some, rows, unreadable = self._parts[kind], [], []
        items = some.plan.items(place)
        size = some.buckets[items[0]]
        group = some.groups[size]
        for j, item in enumerate(items):
            for i in _from(group, item):
                try:
                    rows.append(self._example(kind, i, number * self.run.micro + j))
                    break
                except FileError as error:
                    unreadable.append((kind, i, error))
            else:
                raise FileError(
                    f"data: none of the {len(group)} pictures of {size[1]}x{size[0]} pixels can be read any more; put them back"
                )
        return self._batch(kind, size, rows), unreadable

    def _example(self, kind: int, i: int, index: int) -> Example:
        """Item i as example `index`, whose draws it gets; none are made below 0. Raises FileError."""
        some, data, seed = self._parts[kind], self.data, self.run.seed
        item, drawn = some.source.items[i], index >= 0
        if (kind, i) in self._unreadable:
            raise FileError("could not be read before", path=item.id)
        place = (
            (fraction(seed, index, "top"), fraction(seed, index, "left")) if drawn and data.crop == "random" else None
        )
        mirrored = drawn and data.flip and fraction(seed, index, "mirror") < 0.5
        how = framing.frame(item.size, some.buckets[i], place, mirrored)
        caption = item.captions[int(fraction(seed, index, "caption of several") * len(item.captions)) if drawn else 0]
        moments = None if self._latents is None else self._moments(kind, i, how)
        context, pooled = (None, None) if self._texts is None else self._texts.get(caption)
        return Example(
            index, caption, framing.sizes(item.size, how),
            image=self._seen(kind, i, how) if moments is None or self._pixels else None,
            moments=moments, context=context, pooled=pooled,
            depth=from_pil(framing.framed(some.source.depth(i), how)).mean(dim=1) if self._depth else None,
        )  # fmt: skip

    def _seen(self, kind: int, i: int, how: Frame) -> Tensor:
        """Item i in its frame, [3, H, W] float32 in [-1, 1]. Raises FileError."""
        source = self._parts[kind].source
        image = source.picture(i)
        if image.size != source.items[i].size[::-1]:
            raise FileError(
                f"is {image.width}x{image.height} pixels and was {source.items[i].size[1]}x{source.items[i].size[0]} when it was listed",
                path=source.items[i].id,
            )
        return from_pil(framing.framed(image, how))[0]

    def _moments(self, kind: int, i: int, how: Frame) -> Tensor:
        """The kept latent. Raises FileError where there is none because the picture cannot be read."""
        item = self._parts[kind].source.items[i]
        try:
            return self._latents.get(item, how)
        except KeyError:
            self._seen(kind, i, how)
            raise ArgumentError(
                f"picture {item.id[-60:]} is not in the cache; call encode before the first micro-batch"
            ) from None

    def _batch(self, kind: int, size: Size, rows: Sequence[Example]) -> Batch:
        def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
            return None if tensors[0] is None else torch.stack(tensors)

        return Batch(
            index=tuple(row.index for row in rows),
            captions=tuple(row.caption for row in rows),
            size=size,
            sizes=tuple(row.sizes for row in rows),
            weight=torch.full((len(rows),), float(self._parts[kind].weight)),
            image=stacked([row.image for row in rows]),
            moments=stacked([row.moments for row in rows]),
            context=stacked([row.context for row in rows]),
            pooled=stacked([row.pooled for row in rows]),
            depth=stacked([row.depth for row in rows]),
        )


def _from(group: Sequence[int], item: int) -> Iterator[int]:
    """The item, then those after it, round to it again."""
    yield item
    first = group.index(item)
    yield from group[first + 1 :]
    yield from group[:first]
