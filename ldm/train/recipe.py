"""A training run as data: every key of a recipe with its default, its range and its effect."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, get_args, get_type_hints

from ldm.errors import ArgumentError


@dataclass(frozen=True)
class Range:
    """The values that a number may have, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Pattern:
    """Marks a string that is a regular expression."""


@dataclass(frozen=True)
class Free:
    """Marks a key, or a section, that may change between the beginning of a run and its resumption."""


Whole = Annotated[int, Range(0, 10**9)]
Count = Annotated[int, Range(1, 10**9)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.999999)]  # of a moving average: 1 would never move
Weight = Annotated[float, Range(0, 10**6)]
Rate = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**64 - 1)]
Regex = Annotated[str, Pattern()]
FreePath = Annotated[str, Free()]  # the same files may lie elsewhere when a run goes on


@dataclass(frozen=True)
class Start:
    """[model]: the model that training starts from."""

    start: FreePath = ""  # checkpoint or diffusers folder; empty: the model that ships
    family: str = ""  # family that the start must be of (key of `FAMILIES`, or "blocks"); empty: any
    vae: FreePath = ""  # another autoencoder; empty: the start's own
    # inputs that conv_in gets room for, in the order of `ModelConfig.concat`
    widen: tuple[Literal["mask", "masked_image", "depth"], ...] = ()
    vision: FreePath = ""  # file with a CLIP vision tower that takes the text towers' place; empty: none does
    prediction: Literal["", "eps", "v"] = ""  # what the network is trained to predict; empty: what it predicts
    zero_snr: bool = False  # rescale the schedule to zero terminal signal (Lin et al. 2023, algorithm 1); v only


@dataclass(frozen=True)
class Data:
    """[data]: pictures and their captions."""

    source: Literal["folder", "shards", "scenes"] = "folder"  # files; webdataset tar files; rendered by `ldm.blocks`
    path: FreePath = ""  # directory, or pattern of tar files: "shards/{000..099}.tar", "shards/*.tar"
    caption: str = ""  # of every picture, instead of its own (DreamBooth's instance prompt)
    scenes: Count = 16_000  # how many, where they are rendered
    size: Annotated[int, Range(0, 16384)] = 0  # pixels along a side; 0: the model's
    buckets: bool = False  # batches of several aspect ratios, each of about size * size pixels, instead of squares
    bucket_step: Annotated[int, Range(8, 1024)] = 64  # pixels: sides of buckets are multiples of it
    crop: Literal["center", "random"] = "center"  # which part of the longer side is kept
    flip: bool = False  # mirror half of the pictures
    cache_latents: bool = False  # encode every picture once and keep its latent (centre crops only)
    cache_text: bool = False  # encode every caption once (text towers that are not trained only)
    held_out: Annotated[float, Range(0, 0.9)] = 0.0  # share of the pictures that only the validation loss sees
    bad_limit: Annotated[Share, Free()] = 0.01  # share of pictures that may be unreadable before the run stops
    prior: FreePath = ""  # DreamBooth: directory of pictures of the class; the model makes those that are missing
    prior_caption: str = ""  # their prompt, and their caption where there is no metadata.jsonl
    prior_pictures: Whole = 0  # how many are used; 0: no prior preservation
    prior_weight: Weight = 1.0  # weight of their loss


@dataclass(frozen=True)
class Objective:
    """[objective]: the loss."""

    # upper limit of the signal-to-noise ratio in the loss's weight (Hang et al. 2023, section 3.4); 0: no weights
    min_snr: Weight = 0.0
    least_snr: Weight = 0.0  # its lower limit, so that high noise levels keep some weight; 0: none
    noise_offset: Share = 0.0  # standard deviation of what every channel's noise is shifted by
    input_perturbation: Share = 0.0  # gamma of Ning et al. 2023, section 4: noise on the noise that the network sees
    caption_dropout: Share = 0.0  # share of examples without caption, for guidance (Ho & Salimans 2022, algorithm 1)
    whole_hole: Share = 0.25  # inpainting: share of masks that hide everything
    # each drawn alone; or one in each of `batch` equal parts (Kingma et al. 2021, I.1)
    timesteps: Literal["uniform", "spread"] = "uniform"
    kl_weight: Weight = 1e-6  # VAE: weight of the KL divergence per latent value


@dataclass(frozen=True)
class Method:
    """[method]: which parameters change."""

    kind: Literal["full", "lora", "inversion", "vae", "distill", "shipped-vae", "shipped"] = "full"
    unet: bool = True  # full, lora: the UNet learns
    text: bool = False  # full, lora: the text towers learn
    # trained are the parameters (full) or modules (lora) whose names contain it; empty: all, or lora's usual ones
    targets: Regex = ""
    rank: Annotated[int, Range(1, 4096)] = 16  # lora: of linear layers
    alpha: Weight = 0.0  # lora: the change is alpha / rank times the product; 0: the rank
    conv_rank: Annotated[int, Range(0, 4096)] = 0  # lora: of convolutions; 0: they stay
    conv_alpha: Weight = 0.0  # lora: 0: the rank
    dora: bool = False  # lora: magnitudes learn apart from directions (Liu et al. 2024)
    token: str = ""  # inversion: the new word
    token_from: str = ""  # inversion: the word that it starts as
    vectors: Annotated[int, Range(1, 75)] = 1  # inversion: tokens that the word stands for
    plan: str = ""  # distill: which blocks the student keeps: "ssd-1b", or "half"; see `ldm.changes.surgery.PLANS`
    # distill: checkpoints, each for an equal part of the run, in this order; empty: the start
    teachers: Annotated[tuple[str, ...], Free()] = ()
    output_weight: Weight = 1.0  # distill: weight of the difference to the teacher's prediction
    feature_weight: Weight = 1.0  # distill: weight of the differences after each level's blocks


@dataclass(frozen=True)
class Group:
    """[[optimizer.groups]]: parameters with a learning rate of their own."""

    match: Regex  # regular expression that their names contain
    lr: Rate  # in place of optimizer.lr


@dataclass(frozen=True)
class Optimizer:
    """[optimizer]: AdamW (Loshchilov & Hutter 2019) and its learning rate."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"  # the second from bitsandbytes, where it is installed
    lr: Rate = 1e-5  # at its highest
    lr_from: str = ""  # directory of a run whose last learning rate takes the place of lr
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Range(1e-16, 1)] = 1e-8
    weight_decay: Weight = 0.01
    clip: Weight = 1.0  # largest norm of the gradient; 0: any
    schedule: Literal["constant", "linear", "cosine", "cosine-restarts"] = "constant"  # after the warm-up
    warmup: Whole = 0  # updates over which the rate rises from 0
    decay: Annotated[float, Range(1e-9, 1)] = 1.0  # linear: share of the updates, at the end, over which it falls to 0
    cycles: Count = 1  # cosine-restarts: how often it falls
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Run:
    """[run]: how long, how much at once, where."""

    steps: Annotated[Count, Free()] = 1000  # updates
    batch: Count = 1  # examples per update, over all ranks
    micro: Count = 1  # examples at once on one rank; batch is a multiple of micro times ranks, the rest is accumulated
    seed: Seed = 0  # of everything that is drawn
    out: FreePath = ""  # directory of the run; empty: runs/NAME
    device: Annotated[Literal["auto", "cpu", "cuda"], Free()] = "auto"
    # of the arithmetic (autocast; float16 with a loss scaler); weights are float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    checkpointing: Annotated[bool, Free()] = False  # compute activations again instead of keeping them
    compile: Annotated[bool, Free()] = False  # torch.compile of the network that learns
    # with several ranks (torchrun): a copy of the model on each, or a share of it
    parallel: Annotated[Literal["ddp", "fsdp"], Free()] = "ddp"
    ema: Decay = 0.0  # decay of the averaged weights, which are saved in place of the last ones; 0: no averages
    save_every: Annotated[Count, Free()] = 500  # updates between two states: what a crash costs at most
    keep: Annotated[Count, Free()] = 2  # states that are kept
    # how the result is saved; empty: original, or for a LoRA kohya and diffusers
    formats: Annotated[tuple[Literal["original", "diffusers", "kohya"], ...], Free()] = ()
    save_dtype: Annotated[Literal["float32", "float16", "bfloat16"], Free()] = "float16"  # of the numbers in the result


@dataclass(frozen=True)
class Watch:
    """[watch]: what is logged, measured and drawn on the way."""

    log_every: Count = 10  # updates between two lines of log.jsonl and log.csv
    tensorboard: bool = False
    wandb: bool = False
    every: Whole = 0  # updates between two validations; 0: at the end only
    prompts: tuple[str, ...] = ()  # of the validation pictures; empty: none are drawn
    negative: str = ""
    steps: Annotated[int, Range(1, 1000)] = 25  # of DPM++ 2M
    cfg: Annotated[float, Range(-100, 100)] = 5.0  # guidance
    seed: Seed = 0  # of the first picture; the next has one more
    timesteps: Annotated[int, Range(1, 1000)] = 8  # noise levels of the validation loss, spread evenly
    pictures: Whole = 16  # at most, that the validation loss sees


@dataclass(frozen=True)
class Card:
    """[card]: facts from the model card that a recipe follows, for its "Training" section."""

    model: str = ""
    hardware: str = ""
    gpus: Whole = 0
    hours: Annotated[float, Range(0, 10**12)] = 0.0  # GPU-hours in all; 0: the card does not say
    watts: Annotated[float, Range(0, 10**5)] = 0.0  # what one GPU draws; 0: the card does not say which it was
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    name: str
    about: str = ""  # one sentence
    model: Start = field(default_factory=Start)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    method: Method = field(default_factory=Method)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    watch: Annotated[Watch, Free()] = field(default_factory=Watch)
    card: Annotated[Card, Free()] = field(default_factory=Card)

    def flat(self) -> dict[str, Any]:
        """{"run.batch": 8, ...} for every key of every section."""
        return {key: attrgetter(key)(self) for key in keys() if "." in key}

    def fixed(self) -> dict[str, Any]:
        """`flat` without the keys that are `Free`: the values that a run must find unchanged to go on."""
        return {key: value for key, value in self.flat().items() if Free() not in marks(keys()[key])}


@cache
def keys() -> dict[str, Any]:
    """Every key of a recipe, "data.path" where it belongs to a section, with its type and marks."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(Recipe, include_extras=True).items():
        section = get_args(kind)[0] if marks(kind) else kind
        if is_dataclass(section) and isinstance(section, type):
            for key, each in get_type_hints(section, include_extras=True).items():
                found[f"{name}.{key}"] = Annotated[(each, *marks(kind))] if marks(kind) else each
        else:
            found[name] = kind
    return found


def marks(kind: Any) -> tuple[Any, ...]:
    """`Range`, `Pattern` and `Free` of a type."""
    return getattr(kind, "__metadata__", ())


def wrong_key(key: str, what: str) -> ArgumentError:
    """The error of a key: `what` says what is wrong, and what to do."""
    return ArgumentError(f"{key}: {what}", key=key)
