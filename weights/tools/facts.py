"""What there is to know about a file of weights, as values: a `Report` and its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from weights.names.instead import What

Container = Literal["safetensors", "torch zip", "torch stream"]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor by its header."""

    name: str
    dtype: str  # float32, float16, bfloat16, int64, ...
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FileFacts:
    """A file on the disk: all there is, or one of a folder's."""

    name: str  # of a folder's: its path in the folder
    container: Container
    bytes: int
    published: tuple[str, ...]  # published files with exactly these bytes; empty also where sha256 is None
    same_size: tuple[str, ...]  # published files of this length, any of which it may be
    a1111_old: str | None  # 8 digits; None in a folder
    a1111_new: str | None  # 10 digits; None: not hashed
    sha256: str | None  # 64 digits; None: not hashed


@dataclass(frozen=True)
class Component:
    """A network, or another group of tensors."""

    name: str  # unet, vae, text.0, text.1, vision, depth, ema, safety, schedule, leftovers, unknown, ...
    title: str  # for people
    tensors: int
    parameters: int  # numbers in them, position_ids not counted
    bytes: int
    dtypes: Mapping[str, int]  # type -> tensors of it


@dataclass(frozen=True)
class PredictionFacts:
    """What the UNet of a model predicts."""

    value: Literal["eps", "v"] | None  # None: undecided, or not asked for
    evidence: tuple[str, ...]  # who says what
    conflict: str | None  # what disagrees, or is in between; loading then asks the network, or asks for prediction=


@dataclass(frozen=True)
class AverageFacts:
    """The moving average of a model's weights beside the raw ones."""

    kind: Literal["none", "leftover", "partial", "full"]  # leftover: its bookkeeping; the average is in the weights
    tensors: int
    expected: int  # tensors of a full one; 0 where the model is unknown


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA changes, and how."""

    kinds: Mapping[str, int]  # LoRA, LoCon, LoHa, LoKr, GLoRA, DoRA, full difference -> weights changed so
    spellings: Mapping[str, int]  # kohya, diffusers, peft -> modules named so
    ranks: Mapping[int, int]  # rank -> weights
    alphas: Mapping[float, int]  # alpha -> weights; those without one are missing, their alpha is the rank
    families: tuple[str, ...]  # that it fits best: names in FAMILIES, each for its relatives too; empty: none
    fitting: int  # weights that have a place of their shape there
    weights: int  # in all
    modules: Mapping[str, int]  # network (unet, text.0, text.1) -> modules changed, in the first of `families`


@dataclass(frozen=True)
class EmbeddingFacts:
    """What a textual inversion teaches."""

    form: str  # whose spelling
    word: str | None  # what stands for it in prompts, where the file says so
    vectors: int
    towers: Mapping[str, int]  # text tower -> width of its vectors


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was published. Loading sees through all that is listed so; other tools may not."""

    key: str
    what: str


@dataclass(frozen=True)
class TrainingFacts:
    """How long was trained, as far as the file tells."""

    step: int | None
    epoch: int | None
    source: str  # who says so


@dataclass(frozen=True)
class Report:
    """What a file or folder is. `to_json` has the names below, tuples as lists, and null for what does not apply.

    path          as it was given
    kind          safetensors, torch zip, torch stream or diffusers folder
    sharded       true for a component in several files
    variant       fp16 for files such as model.fp16.safetensors; "" for ordinary ones
    files         FileFacts: name, container, bytes, published, same_size, a1111_old, a1111_new, sha256
    what          model, unet, vae, text tower, safety checker, lora, embedding, controlnet, transformer (SD 3, Flux,
                  ...) or other
    title         the same for people
    family        of a model or UNet: a name in ldm.config.FAMILIES or weights.names.family.REFUSED; of others null
    loadable      whether `weights.load`, or the function for a LoRA, VAE, ..., would take it, by names and shapes
    problem       why not, in a line; or what has to be said first
    evidence      how it was decided what this is
    prediction    PredictionFacts: value, evidence, conflict
    components    Component: name, title, tensors, parameters, bytes, dtypes
    missing       networks that a model of this family has and this file has not, by name
    missing_keys  tensors that are missing from networks that are there
    unknown_keys  tensors that nothing accounts for
    ema           AverageFacts: kind, tensors, expected
    lora          LoraFacts: kinds, spellings, ranks, alphas, families, fitting, weights, modules
    embedding     EmbeddingFacts: form, word, vectors, towers
    damage        Damage: key, what
    training      TrainingFacts: step, epoch, source
    metadata      text by name, as it is in the file
    tensors       TensorFacts: name, dtype, shape, in the file's order; in JSON only where asked for
    """

    path: str
    kind: Container | Literal["diffusers folder"]
    sharded: bool
    variant: str
    files: tuple[FileFacts, ...]
    what: What
    title: str
    family: str | None
    loadable: bool
    problem: str | None
    evidence: tuple[str, ...]
    prediction: PredictionFacts | None
    components: tuple[Component, ...]
    missing: tuple[str, ...]
    missing_keys: tuple[str, ...]
    unknown_keys: tuple[str, ...]
    ema: AverageFacts | None
    lora: LoraFacts | None
    embedding: EmbeddingFacts | None
    damage: tuple[Damage, ...]
    training: TrainingFacts | None
    metadata: Mapping[str, str]
    tensors: tuple[TensorFacts, ...]

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.bytes for file in self.files)

    def to_json(self, tensors: Iterable[TensorFacts] = ()) -> str:
        """One line of JSON in ASCII, with `bytes` and, of the tensors, those given. Names stay; new ones may come."""
        fields: dict[str, Any] = asdict(replace(self, tensors=tuple(tensors)))
        return json.dumps({"path": fields.pop("path"), "bytes": self.bytes, **fields}, allow_nan=False)
