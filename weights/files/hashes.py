"""Hashes of files: those by which published models are known, and the two by which A1111's web UI names a model."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weights.files.opened import Tensors, Weights
from weights.files.source import CHUNK, Source

OLD_START, OLD_SIZE = 0x100000, 0x10000  # what A1111's old hash looks at


@dataclass(frozen=True)
class Hashed:
    """How far a hash has come, in bytes."""

    done: int
    total: int


@dataclass(frozen=True)
class Published:
    """A file as its makers published it."""

    name: str
    bytes: int | None  # None: the page that states the hash rounds it
    sha256: str  # all 64 digits, or those that are known


# As the pages state them from which the files are downloaded; two versions of one model have a line each.
_TABLE = """
sd-v1-4.ckpt                         4265380512 fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556
sd-v1-4-full-ema.ckpt                         ? 14749efc0ae8e
v1-5-pruned-emaonly.ckpt             4265380512 cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516
v1-5-pruned-emaonly.safetensors      4265146304 6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa
v1-5-pruned.ckpt                     7703807346 e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053
v1-5-pruned.safetensors              7703324286 1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6
sd-v1-5-inpainting.ckpt              4265437280 c6bbc15e3224e6973459ba78de4998b80b50112b0ae5b5c67113d56b4e366b19
512-base-ema.ckpt                    5214864007 d635794c1fedfdfa261e065370bea59c651fc9bfa65dc6d67ad29e11869a1824
v2-1_512-ema-pruned.safetensors      5214604494 df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2
v2-1_768-ema-pruned.safetensors      5214604494 dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac
512-inpainting-ema.safetensors       5214662094 b29e2ed9a8fe58e76f7e801bda091d23738bd74c1da3f339bcbe2d40922fcb60
512-depth-ema.safetensors                     ? 59cb052d4409654936139693b57e4632d119bdd38df9a3cdf30d4a63799a4853
512-depth-ema.ckpt                            ? ece79d931a1f3c27fb98a0c0bc6aa7d61168879cd52b4ad7b26e3106f9748ef1
x4-upscaler-ema.safetensors          3531269371 35c01d6160bdfe6644b0aee52ac2667da2f40a33a5d1ef12bbd011d059057bc6
sd_xl_base_1.0.safetensors           6938078334 31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b
sd_xl_base_1.0_0.9vae.safetensors    6938078334 e6bb9ea85bbf7bf6478a7c6d18b71246f22e95d41bcdd80ed40aa212c33cfeff
sd_xl_refiner_1.0.safetensors        6075981930 7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f
sd_xl_refiner_1.0_0.9vae.safetensors 6075981930 8d0ce6c016004cbdacd50f937dad381d8c396628d621a7f97191470532780164
SSD-1B-A1111.safetensors             4465671322 1895a00bfc769a00b0c0c43a95e433e79e9db8a85402b45a33e8448785bde94d
SSD-1B.safetensors                   4465671506 0bf1ce6b065a6b969ab02dc8e8fa21eb20ee189b10935c49ce68c77a7e432c1c
sd_turbo.safetensors                 5214561328 3f067a1b943cf162f2b8f8588f6cf5824bd5b4c7d1d88d87164b9ca123616549
"""
PUBLISHED = tuple(
    Published(name, None if size == "?" else int(size), sha256)
    for name, size, sha256 in (line.split() for line in _TABLE.strip().splitlines())
)


def published(sha256: str, size: int) -> tuple[str, ...]:
    """The names of the published files that have these bytes: this length, and this hash as far as it is known."""
    digest = sha256.lower()
    return tuple(file.name for file in PUBLISHED if digest.startswith(file.sha256) and file.bytes in (None, size))


def of_size(size: int) -> tuple[str, ...]:
    """The names of the published files that are exactly this long: those that a file may be, before it is hashed."""
    return tuple(file.name for file in PUBLISHED if file.bytes == size)


def sha256(source: Source, on_hash: Callable[[Hashed], None] | None = None) -> str:
    """The SHA-256 of a whole file in hexadecimal. Raises FileError when the file changes meanwhile."""
    digest = hashlib.sha256()
    for start in range(0, source.size, CHUNK):
        block = source.read(start, min(CHUNK, source.size - start))
        digest.update(block)
        if on_hash is not None:
            on_hash(Hashed(start + len(block), source.size))
    source.require_unchanged()
    return digest.hexdigest()


def sha256_of(file: Tensors | Path) -> str:
    """The SHA-256 of a file, open or not; for a folder that of its files' digits, in the order of their paths."""
    if isinstance(file, Path):
        with contextlib.closing(Source(file)) as source:
            return sha256(source)
    digits = [sha256(source) for source in sorted(file.sources, key=lambda source: source.path)]
    return digits[0] if isinstance(file, Weights) else hashlib.sha256("".join(digits).encode()).hexdigest()


def a1111_old(source: Source) -> str:
    """The hash by which A1111's web UI named models at first (its `model_hash`): 8 digits of the SHA-256 of 64 KiB.

    They begin at 1 MiB; of a shorter file the rest is hashed, as the web UI did. Different models can share this hash.
    """
    start = min(OLD_START, source.size)
    return hashlib.sha256(source.read(start, min(OLD_SIZE, source.size - start))).hexdigest()[:8]


def a1111_new(sha256: str) -> str:
    """The hash by which A1111's web UI names models now: the first 10 digits of the SHA-256 of the file."""
    return sha256[:10]
