"""The corpus of the readers, made by code: files and folders that must be refused, and files that are odd but sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.made.checkpoints import Name, ckpt_of, tensor
from tests.made.corpus_files import FOREIGN, HEADERS, STREAMS, ZIPS
from tests.made.corpus_pickles import BOMBS, CODE, DAMAGE, FORBIDDEN, LIVE, raw
from tests.made.corpus_places import FOLDERS, PLACES


@dataclass(frozen=True)
class Refusal:
    """A file, or what `make` builds in a directory; the words of its refusal and the tensor or entry that the refusal
    is about."""

    make: bytes | Callable[[Path], Any]
    words: str
    key: str | None = None
    name: str = "x.ckpt"  # what is opened, in that directory

    def build(self, directory: Path) -> Path:
        """Make it; what is to be opened, as a name inside the directory."""
        if isinstance(self.make, bytes):
            (directory / self.name).write_bytes(self.make)
        else:
            self.make(directory)
        return Path(self.name)


def _inside(payload: bytes) -> bytes:
    """The payload where trainers keep the state of their optimisers, beside honest weights."""
    return ckpt_of(
        b"\x80\x04}("
        + raw("state_dict")
        + raw({"w": tensor()})
        + raw("optimizer_states")
        + payload[2:].removesuffix(b".")
        + b"u."
    )


REASONS = {
    "in protocol 0": "protocol 2 to 5",
    "extension registry": "operation 0x82",
    "extension registry of 4 bytes": "operation 0x84",
}  # all others: CODE

REFUSALS: dict[str, Refusal] = {
    **{f"payload: {name}": Refusal(ckpt_of(data), REASONS.get(name, CODE)) for name, data in LIVE.items()},
    **{
        f"payload among the optimisers: {name}": Refusal(_inside(data), REASONS.get(name, CODE))
        for name, data in LIVE.items()
        if not name.startswith(("then", "in protocol 0"))
    },
    **{f"name: {'.'.join(pair)}": Refusal(ckpt_of({"a": Name(*pair), "w": tensor()}), CODE) for pair in FORBIDDEN},
    **{f"pickle: {name}": Refusal(ckpt_of(data), *rest) for name, (data, *rest) in DAMAGE.items()},
    **{
        f"bomb: {name}": Refusal(
            ckpt_of(data), "nested more than 200 deep" if name == "marks" else "more than 1000000 operations"
        )
        for name, data in BOMBS.items()
    },
    **{f"format: {kind}": Refusal(data, words, None, name) for kind, (name, data, words) in FOREIGN.items()},
    **{f"zip: {name}": Refusal(*case) for name, case in ZIPS.items()},
    **{f"stream: {name}": Refusal(*case) for name, case in STREAMS.items()},
    **{f"header: {kind}": Refusal(*case, name="x.safetensors") for kind, case in HEADERS.items()},
    **{f"place: {kind}": Refusal(make, words, None, name) for kind, (make, words, name) in PLACES.items()},
    **{f"folder: {name}": Refusal(*case, name=".") for name, case in FOLDERS.items()},
}
