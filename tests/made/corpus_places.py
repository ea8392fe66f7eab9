"""Places that must be refused: what is no regular file, and diffusers folders that lie or lack something."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.made.checkpoints import ckpt_of, safetensors_of, save_safetensors
from tests.made.corpus_files import ENTRY, SAFE
from tests.made.corpus_pickles import LIVE

Build = Callable[[Path], Any]
UNET, VAE = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"


def fifo(directory: Path) -> None:
    os.mkfifo(directory / "x.ckpt")


def listening(directory: Path) -> None:
    before = Path.cwd()
    os.chdir(directory)  # the path of a socket may be no longer than 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x.ckpt")
    finally:
        os.chdir(before)


def loop(directory: Path) -> None:
    (directory / "x.ckpt").symlink_to("y.ckpt")
    (directory / "y.ckpt").symlink_to("x.ckpt")


def neighbours(directory: Path) -> None:
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned-emaonly.ckpt", "v1-4.ckpt", "notes.txt"):
        (directory / name).touch()


PLACES: dict[str, tuple[Any, ...]] = {  # what builds it, words of the message, name of what is opened
    "directory": (lambda d: (d / "x").mkdir(), "is a directory; name the .safetensors or .ckpt file in it", "x"),
    "FIFO": (fifo, "is a FIFO, not a file of weights; name a", "x.ckpt"),
    "socket": (listening, "is a socket, not a file of weights; name a", "x.ckpt"),
    "device": (lambda d: (d / "x.ckpt").symlink_to(os.devnull), "is a device, not a file of weights; name a", "x.ckpt"),
    "device that never ends": (lambda d: (d / "x.ckpt").symlink_to("/dev/zero"), "is a device", "x.ckpt"),
    "loop of links": (loop, "is a loop of links; link it to the real file", "x.ckpt"),
    "dangling link": (lambda d: (d / "x.ckpt").symlink_to("../blobs/4f"),
        "is a link to ../blobs/4f, which does not exist; download", "x.ckpt"),
    "missing, with neighbours": (neighbours, "does not exist; near it: v1-5-pruned.ckpt, v1-5-pruned-emaonly.ckpt",
        "v1-5-prunde.ckpt"),
    "missing, alone": (lambda d: None, "does not exist; check the path", "x.ckpt"),
    "missing with its directory": (lambda d: None, "does not exist; check the path", "nowhere/x.ckpt"),
    "inside a file": (lambda d: (d / "x").touch(), "does not exist; check the path", "x/y.ckpt"),
    "a name with NUL": (lambda d: None, "has a NUL character in it; check the name", "a\0.ckpt"),
    "a name too long": (lambda d: None, "cannot be opened: File name too long; check the path", "x" * 300),
    "a name with control characters": (lambda d: (d / "a\x1b[2J\n.ckpt").write_bytes(b""),
        "a\\u001b[2J\\u000a.ckpt: is empty", "a\x1b[2J\n.ckpt"),
}  # fmt: skip


# -- diffusers folders -------------------------------------------------------------------------------------------------


def folder(directory: Path) -> Path:
    """A folder with a tensor in each of its two components: all that is opened, if nothing is built."""
    for name in ("unet", "vae"):
        (directory / name).mkdir()
        save_safetensors(
            {"w": torch.zeros(2, 3), "v": torch.zeros(3)}, directory / name / "diffusion_pytorch_model.safetensors"
        )
    (directory / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "A"], "vae": ["diffusers", "B"]}))
    return directory


def with_file(name: str, data: bytes | str) -> Build:
    """The folder with one file more, or another one."""
    return lambda d: (folder(d) / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def without(name: str) -> Build:
    """The folder without a file or component."""
    return lambda d: (folder(d) / name).rename(d / "elsewhere")


def indexed(weight_map: Any, *, raw: bytes | None = None) -> Build:
    """The folder with the UNet's tensors in two shards and this index."""

    def build(directory: Path) -> None:
        (folder(directory) / f"{UNET}.safetensors").unlink()
        save_safetensors({"w": torch.zeros(2, 3)}, directory / "unet" / "a.safetensors")
        save_safetensors({"v": torch.zeros(3)}, directory / "unet" / "b.safetensors")
        (directory / f"{UNET}.safetensors.index.json").write_bytes(
            json.dumps({"weight_map": weight_map}).encode() if raw is None else raw
        )

    return build


def index_that_is(make: Build) -> Build:
    """The folder with something else in the place of the index."""

    def build(directory: Path) -> None:
        indexed({})(directory)
        (directory / f"{UNET}.safetensors.index.json").unlink()
        make(directory / f"{UNET}.safetensors.index.json")

    return build


def replaced(name: str, make: Build) -> Build:
    """The folder with something else in the place of a file."""

    def build(directory: Path) -> None:
        (folder(directory) / name).unlink()
        make(directory / name)

    return build


SHARDS = {"w": "a.safetensors", "v": "b.safetensors"}
PLAIN = "not a plain name in its own folder; download"
NOT_JSON = "is not JSON as it should be"
BIN = f"{UNET}.bin"

FOLDERS: dict[str, tuple[Any, ...]] = {  # what builds it, words of the message, key
    "shard above the folder": (indexed(SHARDS | {"w": "../a.safetensors"}), PLAIN),
    "shard by an absolute name": (indexed(SHARDS | {"w": "/etc/passwd"}), PLAIN),
    "shard that is the folder": (indexed(SHARDS | {"w": "."}), PLAIN),
    "shard without a name": (indexed(SHARDS | {"w": ""}), PLAIN),
    "shard below": (indexed(SHARDS | {"w": "a/b"}), PLAIN),
    "shard on a drive": (indexed(SHARDS | {"w": "C:a"}), PLAIN),
    "shard with backslashes": (indexed(SHARDS | {"w": "..\\a"}), PLAIN),
    "shard with NUL": (indexed(SHARDS | {"w": "a\0"}), PLAIN),
    "shard that is missing": (indexed(SHARDS | {"w": "c.safetensors"}),
        "names c.safetensors, which is not there; download it too"),
    "shard of a name too long": (indexed(SHARDS | {"w": "c" * 250}), "ccc...; download it too"),
    "shard of a name longer than a system allows": (indexed(SHARDS | {"w": "c" * 300}), PLAIN),
    "shard of half a pair of surrogates": (indexed(SHARDS | {"w": "\ud800"}), PLAIN),
    "1001 shards": (indexed({str(i): f"{i}.safetensors" for i in range(1001)}),
        "names 1001 files, the limit is 1000; download"),
    "key that is in no shard": (indexed(SHARDS | {"u": "a.safetensors"}),
        "disagree: u is not in it; download both again", "u"),
    "key that the index leaves out": (indexed({"v": "b.safetensors", "x": "a.safetensors"}),
        "disagree: w is in it unannounced", "w"),
    "keys in each other's shards": (indexed({"w": "b.safetensors", "v": "a.safetensors"}), "disagree: v is ", "v"),
    "index without a map": (indexed({}), "has no weight_map of file names; download it again"),
    "index with a list": (indexed([]), "has no weight_map"),
    "index of numbers": (indexed({"w": 1}), "has no weight_map"),
    "index that is a list": (indexed(None, raw=b"[]"), "is not a JSON object; download it again"),
    "index that is empty": (indexed(None, raw=b""), NOT_JSON),
    "index cut off": (indexed(None, raw=b'{"weight_map": {"w": "a'), NOT_JSON),
    "index with NaN": (indexed(None, raw=b'{"weight_map": {"w": NaN}}'), NOT_JSON),
    "index with a key twice": (indexed(None, raw=b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}'),
        NOT_JSON),
    "index nested 100000 deep": (indexed(None, raw=b'{"a":' + b"[" * 100_000), NOT_JSON),
    "index of a number of 5000 digits": (indexed(None, raw=b'{"a":' + b"9" * 5000 + b"}"), NOT_JSON),
    "index in Latin-1": (indexed(None, raw=b'{"\xe4": 1}'), NOT_JSON),
    "index of a million parts": (indexed(None, raw=b'{"a":[' + b"[]," * 400_000 + b"0]}"),
        "too many parts for an index or a config"),
    "index of 17 MB": (indexed(None, raw=b'{"a":"' + b" " * 17 * 2**20 + b'"}'),
        "the limit for JSON is 16777216; download"),
    "index that is a web page": (indexed(None, raw=b"<!doctype html><p>Sign in"), NOT_JSON),
    "index that is a directory": (index_that_is(lambda path: path.mkdir()), "is a directory"),
    "index that is a FIFO": (index_that_is(os.mkfifo), "is a FIFO"),
    "index that is a loop": (index_that_is(lambda path: path.symlink_to(path)), "is a loop of links"),
    "component that is listed and missing": (without("vae"),
        "lists vae, and there is no folder of that name; download"),
    "no vae, and no list": (lambda d: (without("vae")(d), (d / "model_index.json").unlink()),
        "has no vae/ with weights in it; name the folder of a whole model"),
    "component without weights": (without(f"{UNET}.safetensors"),
        "unet/ has no weights that this version knows (diffusion_pytorch_model.safetensors"),
    "component of an unknown variant": (replaced(f"{UNET}.safetensors",
            lambda p: p.with_name("diffusion_pytorch_model.int8.safetensors").write_bytes(SAFE)),
            "(but diffusion_pytorch_model.int8.safetensors)"),
    "component with a python file only": (replaced(f"{UNET}.safetensors",
            lambda p: p.with_name("unet.py").write_text("raise SystemExit")), "unet/ has no weights"),
    "component whose weights are a directory": (replaced(f"{UNET}.safetensors", lambda p: p.mkdir()), "is a directory"),
    "component whose weights are a FIFO": (replaced(f"{UNET}.safetensors", os.mkfifo), "is a FIFO"),
    "component whose weights are a dangling link": (replaced(f"{UNET}.safetensors",
            lambda p: p.symlink_to("../../blobs/1")), "is a link to ../../blobs/1, which does not exist"),
    "component that is an LFS pointer": (with_file(f"{UNET}.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "component that is a web page": (with_file(f"{VAE}.safetensors", b"<!doctype html>"), "is a web page"),
    "component that is a torch file": (with_file(f"{UNET}.safetensors", ckpt_of(LIVE["popen"])),
        "not safetensors as its name says"),
    "component with a stray byte": (with_file(f"{VAE}.safetensors", safetensors_of({"w": ENTRY}, bytes(25))),
        "1 extra bytes after the last tensor; run 'ldm repair"),
    "payload in a .bin": (lambda d: (without(f"{UNET}.safetensors")(d), (d / BIN).write_bytes(ckpt_of(LIVE["popen"]))),
        "refers to os.popen, which is code"),
    "model_index.json that is a list": (with_file("model_index.json", "[]"), "is not a JSON object"),
    "model_index.json with NaN": (with_file("model_index.json", '{"a": NaN}'), NOT_JSON),
    "model_index.json that is a web page": (with_file("model_index.json", "<html>"), NOT_JSON),
    "model_index.json that is cut off": (with_file("model_index.json", '{"unet": ["diff'), NOT_JSON),
}  # fmt: skip
