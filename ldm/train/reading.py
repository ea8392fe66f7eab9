"""Recipes from TOML and back, every key and value checked."""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ldm.config import FAMILIES
from ldm.errors import ArgumentError, FileError, require_known, require_number, require_whole
from ldm.train.recipe import Data, Pattern, Range, Recipe, keys, marks, wrong_key

MAX_BYTES = 2**20  # of a recipe

READ = [  # keys (a regular expression), and what another key must be for anyone to read them
    (r"objective\.kl_weight", "method.kind", ("vae",)),
    (r"objective\.(?!kl_weight).*", "method.kind", ("full", "lora", "inversion", "distill")),
    (r"method\.(unet|text)", "method.kind", ("full", "lora")),
    (r"method\.targets", "method.kind", ("full", "lora", "vae", "distill")),
    (r"method\.(rank|alpha|conv_rank|conv_alpha|dora)", "method.kind", ("lora",)),
    (r"method\.(token|token_from|vectors)", "method.kind", ("inversion",)),
    (r"method\.(plan|teachers|output_weight|feature_weight)", "method.kind", ("distill",)),
    (r"model\.(?!vae).*|data\.(?!source|scenes).*", "method.kind", ("full", "lora", "inversion", "vae", "distill")),
    (r"data\.path", "data.source", ("folder", "shards")),
    (r"data\.scenes", "data.source", ("scenes",)),
    (r"data\.bucket_step", "data.buckets", (True,)),
    (r"optimizer\.decay", "optimizer.schedule", ("linear",)),
    (r"optimizer\.cycles", "optimizer.schedule", ("cosine-restarts",)),
]


def names() -> list[str]:
    """The recipes that ship."""
    files = (Path(file.name) for file in resources.files("ldm.recipes").iterdir())
    return sorted(file.stem for file in files if file.suffix == ".toml")


def load_recipe(name: str | os.PathLike[str], sets: Sequence[str] = ()) -> Recipe:
    """A recipe that ships, by name, or a .toml file.

    sets  changes of keys: "data.path=photos", "optimizer.lr=1e-4", "watch.prompts=['a', 'b']". Values are TOML; what is
          no TOML is a string, so that bare words need no quotes. Of two changes of a key the later one wins
    Raises FileError for a file that cannot be read or is no TOML, ArgumentError for what is wrong in it: the message
    names the key and what is allowed.
    """
    recipe = _table(Recipe, *_read(os.fspath(name)))
    for each in sets:
        recipe = _changed(recipe, each)
    _require_consistent(recipe)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """Every key of a recipe, also the defaults, which may change later. `load_recipe` reads it back equal."""
    parts = [(f.name, getattr(recipe, f.name)) for f in fields(recipe)]
    lines = [f"{name} = {_written(value)}" for name, value in parts if not is_dataclass(value)]
    for name, section in parts:
        if is_dataclass(section):
            lines += ["", f"[{name}]", *(f"{f.name} = {_written(getattr(section, f.name))}" for f in fields(section))]
    return "\n".join(lines) + "\n"


def _read(name: str) -> tuple[dict[str, Any], str]:
    """The tables of a recipe with its name, and the key of all of it: none."""
    if name in names():
        table = tomllib.loads(resources.files("ldm.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8"))
    elif name.endswith(".toml") or os.sep in name:
        table = _file(Path(name))
    else:
        near = difflib.get_close_matches(name, names(), n=1)
        remedy = f"{f'{near[0]}? ' if near else ''}'ldm train' lists those that ship, or give a .toml file"
        raise wrong_key("recipe", f"{name[:30]!r} is unknown; {remedy}")
    return {"name": Path(name).stem} | table, ""


def _file(path: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError("is no file; give a recipe, a .toml file", path=path)
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileError("does not exist; give a recipe, a .toml file", path=path) from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}; give a recipe, a .toml file", path=path) from None
    if len(raw) > MAX_BYTES:
        raise FileError(f"is over {MAX_BYTES} bytes; give a recipe, a .toml file", path=path)
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise FileError("is no text in UTF-8; save it as such", path=path) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"is no TOML: {str(error)[:80] or 'nested too deeply'}; correct it", path=path) from None


def _table(kind: Any, given: Any, place: str) -> Any:
    """A dataclass from a table. `place` is its key, empty for the whole recipe."""
    if not isinstance(given, dict):
        raise ArgumentError(f"{place}: {given!r} is no table of keys; write [{place}] and its keys below", key=place)
    kinds, dot = get_type_hints(kind, include_extras=True), place and f"{place}."
    for name in given:
        require_known(f"[{place}]" if place else "recipe", name, kinds)
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in given:
            raise ArgumentError(f"{dot}{field.name}: is missing; give it", key=f"{dot}{field.name}")
    return kind(**{name: _value(kinds[name], value, f"{dot}{name}") for name, value in given.items()})


def _value(kind: Any, given: Any, key: str) -> Any:
    """The value of a key, checked against the type of its field. Raises ArgumentError that names the key."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        for mark in marks(kind):
            if isinstance(mark, Range) and args[0] is int:
                return require_whole(key, given, int(mark.low), int(mark.high))
            if isinstance(mark, Range):
                require_number(key, given, mark.low, mark.high)
                return float(given)
        value = _value(args[0], given, key)
        return _pattern(value, key) if Pattern() in marks(kind) else value
    if origin is Literal:
        require_known(key, given, [choice for choice in args if choice or not given])
    elif origin is tuple:
        return _tuple(args, given, key)
    elif is_dataclass(kind):
        return _table(kind, given, key)
    elif not isinstance(given, kind):
        wanted = "true or false" if kind is bool else "a string, in quotes"
        raise wrong_key(key, f"{str(given)[:40]!r}; give {wanted}")
    return given


def _tuple(kinds: tuple[Any, ...], given: Any, key: str) -> tuple[Any, ...]:
    endless = kinds[-1] is Ellipsis
    if not isinstance(given, list) or (not endless and len(given) != len(kinds)):
        wanted = f"give a list{'' if endless else f' of {len(kinds)}'}, in brackets and with commas"
        raise wrong_key(key, f"{str(given)[:40]!r}; {wanted}")
    return tuple(_value(kinds[0] if endless else kinds[i], each, f"{key}[{i}]") for i, each in enumerate(given))


def _pattern(given: str, key: str) -> str:
    try:
        re.compile(given)
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong_key(key, f"{given[:40]!r} is no regular expression ({str(error)[:60]}); correct it") from None
    return given


def _changed(recipe: Recipe, text: str) -> Recipe:
    """The recipe after "section.key=value"."""
    key, equals, given = (part.strip() for part in text.partition("="))
    known = keys()
    if key not in known:
        near = [each for each in known if each.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
        remedy = f"{near[0]}?" if near else "give SECTION.KEY=VALUE, such as run.steps=100"
        raise ArgumentError(f"--set {key[:40]}: is unknown; {remedy}", key=key)
    if not equals:
        raise ArgumentError(f"--set {key}: has no value; give {key}=VALUE", key=key)
    value = _value(known[key], _parsed(given, known[key]), key)
    section, _, name = key.rpartition(".")
    changed = replace(getattr(recipe, section), **{name: value}) if section else value
    return replace(recipe, **{section or name: changed})


def _parsed(text: str, kind: Any) -> Any:
    """A value from the command line: TOML, or the text itself where it is no TOML or the key is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    is_text = base is str or get_origin(base) is Literal
    return text if table.keys() != {"value"} or (is_text and not isinstance(table["value"], str)) else table["value"]


def _require_consistent(recipe: Recipe) -> None:
    """Raises ArgumentError for values that are allowed alone and not together, as far as the recipe alone shows it."""
    if not re.fullmatch(r"\w[\w .+-]{0,99}", recipe.name):
        remedy = "give letters, digits, spaces and . + - _, for a directory is named so"
        raise wrong_key("name", f"{recipe.name[:40]!r}; {remedy}")
    if recipe.model.family:
        require_known("model.family", recipe.model.family, [*FAMILIES, "blocks"])
    _require_read(recipe)
    for is_wrong, text in _conflicts(recipe):
        if is_wrong:
            raise ArgumentError(text, key=text.partition(":")[0])


def _conflicts(recipe: Recipe) -> list[tuple[object, str]]:
    """Everything that does not go together: whether this recipe has it, and the key with what to do about it."""
    model, data, objective, method, run = recipe.model, recipe.data, recipe.objective, recipe.method, recipe.run
    kind, prior = method.kind, data.prior_pictures
    word, tunes = kind == "inversion", kind in ("full", "lora")
    possible: dict[str, tuple[str, ...]] = {"lora": ("kohya", "diffusers"), "inversion": ()}
    formats = possible.get(kind, ("original", "diffusers"))
    wrong = next((each for each in run.formats if each not in formats), "")
    micros = f"run.micro, {run.micro}; give one"
    limits = f"{objective.least_snr:g} is above objective.min_snr, {objective.min_snr:g}, which is the upper limit"
    return [
        (run.batch % run.micro,
         f"run.batch: {run.batch} is no multiple of {micros}, what does not fit at once is accumulated"),
        (data.cache_latents and data.crop == "random",
         'data.cache_latents: random crops differ every time; set data.crop to "center" or this to false'),
        (data.cache_latents and kind in ("vae", "shipped-vae"),
         "data.cache_latents: the latents of a VAE that learns change; set it to false"),
        (data.cache_text and (word or (method.text and tunes)),
         "data.cache_text: what captions are to a text tower that learns changes; set it to false"),
        (model.zero_snr and model.prediction == "eps",
         'model.zero_snr: without signal eps says nothing of the picture; set model.prediction to "v"'),
        (tunes and not (method.unet or method.text),
         "method.unet: neither the UNet nor the text towers learn; set method.unet or method.text to true"),
        (kind.startswith("shipped") and data.source != "scenes",
         "data.source: the model that ships is trained on rendered scenes; set it to scenes"),
        (word and not method.token, "method.token: is missing; give the new word"),
        (word and not method.token_from, "method.token_from: is missing; give the word that the new one starts as"),
        (word and objective.caption_dropout,
         "objective.caption_dropout: what has no caption teaches the new word nothing; set it to 0"),
        (word and prior, "data.prior_pictures: what is not called by the new word teaches it nothing; set it to 0"),
        (kind == "distill" and not method.plan,
         "method.plan: is missing; give the blocks that the student keeps, such as ssd-1b or half"),
        (0 < objective.min_snr < objective.least_snr, f"objective.least_snr: {limits}; give less"),
        (word and run.parallel == "fsdp", "run.parallel: a new word is not shared among ranks; set it to ddp"),
        (kind == "distill" and run.compile,
         "run.compile: what a compiled student sees inside cannot be compared with its teacher's; set it to false"),
        (data.prior and not prior, "data.prior_pictures: is 0 though data.prior is given; give how many, such as 100"),
        (prior and not data.prior,
         "data.prior: is missing; give the directory of the class's pictures, which may be empty"),
        (prior and not data.prior_caption,
         'data.prior_caption: is missing; give what is said of the class, such as "a photo of a dog"'),
        (data.prior_caption and not prior,
         "data.prior_caption: is read where data.prior_pictures is above 0; leave it out"),
        (data.prior_weight != Data.prior_weight and not prior,
         "data.prior_weight: is read where data.prior_pictures is above 0; leave it out"),
        (prior and run.batch // run.micro % 2,
         f"run.batch: {run.batch} is no even multiple of {micros}: every other micro-batch is of the prior's pictures"),
        (wrong, f"run.formats: {wrong} is no format of a result of {kind}; give {' or '.join(formats) or 'none'}"),
    ]  # fmt: skip


def _require_read(recipe: Recipe) -> None:
    """Raises ArgumentError for a key that was changed although nobody reads it in such a run."""
    values, defaults = recipe.flat(), Recipe(recipe.name).flat()
    for key in (key for key, value in values.items() if value != defaults[key]):
        for pattern, chooser, choices in READ:
            if re.fullmatch(pattern, key) and values[chooser] not in choices:
                readers = " or ".join(_written(choice) for choice in choices)
                what = f"is read where {chooser} is {readers}, not {_written(values[chooser])}; leave it out"
                raise wrong_key(key, what)


def _written(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, tuple):
        return f"[{', '.join(_written(each) for each in value)}]"
    if is_dataclass(value):
        return f"{{{', '.join(f'{f.name} = {_written(getattr(value, f.name))}' for f in fields(value))}}}"
    return repr(value)
