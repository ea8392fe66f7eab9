"""The checksums of a torch file, compared on several threads while something else is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from weights.files.source import CHUNK, Record, Source, Spec

Verify = Callable[[str, Record, Callable[[], int]], None]  # compare a record's checksum; the key is for the error


@contextmanager
def checking(source: Source, specs: Mapping[str, Spec], verify: Verify) -> Iterator[Callable[[], None]]:
    """Compare all checksums not compared yet. Gives what waits for that, and raises FileError where one is wrong."""
    records = {
        id(spec.record): (spec.record, key)
        for key, spec in specs.items()
        if spec.record.crc is not None and not spec.record.verified
    }
    in_order = sorted(records.values(), key=lambda found: found[0].start)
    turns = iter(in_order)

    def check() -> None:
        room = bytearray(CHUNK)
        for record, key in turns:  # each thread takes the next that none has taken
            verify(key, record, partial(source.crc32, record.start, record.size, room))

    helpers = min(4, os.cpu_count() or 1) - 1 if in_order else 0
    with ThreadPoolExecutor(max(helpers, 1)) as pool:
        checks = [pool.submit(check) for _ in range(helpers)]

        def wait() -> None:
            check()
            for helped in checks:
                helped.result()

        try:
            yield wait
        finally:
            in_order.clear()  # ends every turn
