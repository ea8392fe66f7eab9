"""Recipes from TOML and the command line: what is accepted, and what is refused by name."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from ldm.errors import ArgumentError, FileError, LdmError
from ldm.train.reading import load_recipe, to_toml
from ldm.train.recipe import Data, Group, Objective, Optimizer, Recipe, Watch


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text("")
    return path


def refused(error: LdmError, *parts: str) -> None:
    """The message says all of this, on one short line."""
    text = str(error)
    assert len(text) <= 200
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_an_empty_file_is_a_recipe_of_defaults_named_after_it(empty: Path) -> None:
    assert load_recipe(empty) == Recipe(name="mine")


def test_every_number_of_a_recipe_has_a_range() -> None:
    sections = [kind for kind in get_type_hints(Recipe).values() if is_dataclass(kind)]
    assert len(sections) >= 8
    for section in (*sections, Group):
        for name, kind in get_type_hints(section, include_extras=True).items():
            assert not {int, float} & {kind, *get_args(kind) * (get_origin(kind) is tuple)}, (
                f"{section.__name__}.{name}"
            )


def test_the_keys_that_may_change_when_a_run_goes_on_are_marked() -> None:
    """Written down when they were an expression of names: a state of a run begun before goes on."""
    recipe = Recipe("a")
    fixed = recipe.fixed()
    free = {key for key in recipe.flat() if key not in fixed and not key.startswith(("watch.", "card."))}
    run = "steps out device compile parallel checkpointing save_every keep formats save_dtype"
    assert free == {
        "model.start", "model.vae", "model.vision", "data.path", "data.prior", "data.bad_limit", "method.teachers",
        *(f"run.{key}" for key in run.split()),
    }  # fmt: skip
    assert set(fixed) < set(recipe.flat())
    assert not any(key.startswith(("watch.", "card.")) for key in fixed)


def test_what_a_file_says_reaches_its_section_and_whole_numbers_do_for_fractions(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        'name = "b"\n[data]\nflip = true\nbad_limit = 1\n[optimizer]\nbetas = [0.8, 0.9]\ngroups = [{match = '
        '"^text", lr = 1e-3}]\n'
    )
    recipe = load_recipe(path)
    assert recipe == Recipe(
        "b",
        data=Data(flip=True, bad_limit=1.0),
        optimizer=Optimizer(betas=(0.8, 0.9), groups=(Group("^text", 1e-3),)),
    )
    assert isinstance(recipe.data.bad_limit, float)


def test_a_recipe_comes_back_from_its_own_toml(tmp_path: Path) -> None:
    odd = 'a "b" \\ \t\n\r\x00\x1b\x7f é 猫 🦊 \u2028 #='
    recipe = Recipe(
        "odd one", odd, data=Data(path=odd, caption="'''"), objective=Objective(min_snr=1 / 3, noise_offset=5e-324),
        optimizer=Optimizer(lr=1e-7, groups=(Group(r"to_\w+\.", 0.25), Group("x", 0.0))),
        watch=Watch(prompts=(odd, ""), seed=2**64 - 1),
    )  # fmt: skip
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert load_recipe(path, ["name=other"]) == replace(recipe, name="other")


def test_the_toml_of_a_recipe_names_every_key() -> None:
    text = to_toml(Recipe("a"))
    for section in (Data, Objective, Optimizer, Watch):
        for field in fields(section):
            assert f"\n{field.name} = " in text


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("data.path=photos", "data", "path", "photos"),
        ("data.path = my photos/2024", "data", "path", "my photos/2024"),
        ("data.path=2024", "data", "path", "2024"),
        ("data.path='a b'", "data", "path", "a b"),
        ("data.path=", "data", "path", ""),
        ("data.path=a=b", "data", "path", "a=b"),
        ("data.path=[[[", "data", "path", "[[["),
        ("data.path='a'\nflip = 1", "data", "path", "'a'\nflip = 1"),
        ("data.flip=true", "data", "flip", True),
        ("data.source=shards", "data", "source", "shards"),
        ("method.targets=[0-9]", "method", "targets", "[0-9]"),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.betas=[0.5, 0.75]", "optimizer", "betas", (0.5, 0.75)),
        ("optimizer.groups=[{match='a', lr=1}]", "optimizer", "groups", (Group("a", 1.0),)),
        ("watch.prompts=['a red cube', 'b']", "watch", "prompts", ("a red cube", "b")),
        ("run.steps=1_000", "run", "steps", 1000),
        ("model.prediction=", "model", "prediction", ""),
        ("model.widen=['depth']", "model", "widen", ("depth",)),
    ],
)
def test_a_key_is_changed_from_the_command_line(text: str, section: str, key: str, value: object, empty: Path) -> None:
    assert getattr(getattr(load_recipe(empty, [text]), section), key) == value


def test_of_two_changes_of_a_key_the_later_wins(empty: Path) -> None:
    assert load_recipe(empty, ["run.steps=5", "about=a b", "run.steps=7"]) == replace(
        load_recipe(empty, ["run.steps=7"]), about="a b"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("path=photos", ["--set path", "data.path?"]),
        ("lr=1", ["optimizer.lr?"]),
        ("data.pth=photos", ["data.path?"]),
        ("data=3", ["--set data: is unknown"]),
        ("zzzzzz=1", ["run.steps=100"]),
        ("run.steps", ["--set run.steps: has no value", "run.steps=VALUE"]),
        ("run.steps=0", ["run.steps: 0", "from 1 to"]),
        ("run.steps=2.5", ["run.steps: 2.5", "whole number"]),
        ("run.steps=many", ["run.steps: 'many'"]),
        ("run.steps=true", ["run.steps: True"]),
        ("run.steps=99999999999", ["run.steps", "at most"]),
        ("run.seed=-1", ["run.seed: -1"]),
        ("optimizer.lr=2", ["optimizer.lr: 2", "from 0 to 1"]),
        ("optimizer.lr=nan", ["optimizer.lr: nan"]),
        ("optimizer.lr=inf", ["optimizer.lr: inf"]),
        ("optimizer.lr=-1e-5", ["optimizer.lr"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "a list of 2"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas[1]: 1"]),
        ("optimizer.groups=[{match='('}]", ["optimizer.groups[0].lr: is missing"]),
        ("optimizer.groups=[{match='(', lr=1}]", ["optimizer.groups[0].match", "no regular expression"]),
        ("optimizer.groups=[1]", ["optimizer.groups[0]: 1 is no table"]),
        ("optimizer.groups=[{mach='a', lr=1}]", ["'mach'", "match?"]),
        ("objective.caption_dropout=10", ["objective.caption_dropout", "from 0 to 1"]),
        ("run.dtype=bf16", ["run.dtype: 'bf16' is unknown", "bfloat16?"]),
        ("method.kind=lroa", ["lora?"]),
        ("model.prediction=x", ["model.prediction", "eps v"]),
        ("model.widen=['masc']", ["model.widen[0]", "mask?"]),
        ("model.widen=mask", ["model.widen: 'mask'", "a list"]),
        ("model.family=sd3", ["model.family", "sd1?"]),
        ("data.flip=1", ["data.flip: '1'", "true or false"]),
        ("watch.prompts=a", ["watch.prompts: 'a'", "a list"]),
        ("watch.prompts=[1]", ["watch.prompts[0]: '1'", "a string"]),
        ("method.targets=a(", ["method.targets: 'a('", "no regular expression"]),
        ("name=../../x", ["name: '../../x'", "a directory is named so"]),
        ("name=", ["name: ''"]),
    ],
)
def test_a_wrong_change_is_refused_by_the_name_of_its_key(text: str, parts: list[str], empty: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        load_recipe(empty, [text])
    refused(caught.value, *parts)


@pytest.mark.parametrize(
    ("text", "kind", "parts"),
    [
        ("[dat]", ArgumentError, ["'dat'", "data?"]),
        ("[data]\npth = 'a'", ArgumentError, ["[data]", "'pth'", "path?"]),
        ("data = 3", ArgumentError, ["data: 3 is no table", "[data]"]),
        ("[data]\npath = 3", ArgumentError, ["data.path: '3'", "a string"]),
        ("[run]\nsteps = 2.0", ArgumentError, ["run.steps: 2.0"]),
        ("[run]\nsteps = 1\nsteps = 2", FileError, ["is no TOML", "Cannot overwrite a value"]),
        ("[run]\n[run]\n", FileError, ["is no TOML"]),
        ("steps 1", FileError, ["is no TOML", "line 1"]),
        ("a = " + "[" * 5000, FileError, ["is no TOML"]),
    ],
)
def test_a_wrong_file_is_refused(text: str, kind: type[LdmError], parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(kind) as caught:
        load_recipe(path)
    refused(caught.value, *parts)


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["run.batch=3", "run.micro=2"], ["run.batch: 3 is no multiple of run.micro, 2"]),
        (["data.cache_latents=true", "data.crop=random"], ["data.cache_latents"]),
        (["data.cache_latents=true", "method.kind=vae"], ["data.cache_latents"]),
        (["data.cache_text=true", "method.text=true"], ["data.cache_text"]),
        (
            ["data.cache_text=true", "method.kind=inversion", "method.token=sks", "method.token_from=dog"],
            ["data.cache_text"],
        ),
        (["model.zero_snr=true", "model.prediction=eps"], ["model.zero_snr", "model.prediction"]),
        (["method.unet=false"], ["method.unet"]),
        (["method.kind=shipped"], ["data.source: the model that ships is trained on rendered scenes"]),
        (
            [
                "method.kind=inversion",
                "method.token=a",
                "method.token_from=b",
                "data.prior=c",
                "data.prior_caption=d",
                "data.prior_pictures=2",
                "run.batch=2",
            ],
            ["data.prior_pictures: what is not called by the new word teaches it nothing"],
        ),
        (["method.kind=inversion", "method.token_from=dog"], ["method.token: is missing"]),
        (["method.kind=inversion", "method.token=sks"], ["method.token_from: is missing"]),
        (["method.kind=distill"], ["method.plan: is missing"]),
        (["data.prior=class"], ["data.prior_pictures: is 0"]),
        (["data.prior_pictures=9", "data.prior_caption=a dog"], ["data.prior: is missing"]),
        (["data.prior_pictures=9", "data.prior=class"], ["data.prior_caption: is missing"]),
        (
            ["data.prior_caption=a dog"],
            ["data.prior_caption: is read where data.prior_pictures is above 0; leave it out"],
        ),
        (["data.prior_weight=2"], ["data.prior_weight: is read where data.prior_pictures is above 0; leave it out"]),
        (["run.formats=['kohya']"], ["run.formats: kohya", "original or diffusers"]),
        (["run.formats=['original']", "method.kind=lora"], ["run.formats: original", "kohya or diffusers"]),
        (["run.formats=['kohya']", "method.kind=inversion", "method.token=a", "method.token_from=b"], ["run.formats"]),
    ],
)
def test_keys_that_contradict_each_other_are_refused(sets: list[str], parts: list[str], empty: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        load_recipe(empty, sets)
    refused(caught.value, *parts)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["method.unet=false", "method.kind=distill", "method.plan=half"],
            'method.unet: is read where method.kind is "full" or "lora", not "distill"; leave it out',
        ),
        (
            ["method.text=true", "method.kind=vae"],
            'method.text: is read where method.kind is "full" or "lora", not "vae"; leave it out',
        ),
        (
            ["method.teachers=['a.safetensors']"],
            'method.teachers: is read where method.kind is "distill", not "full"; leave it out',
        ),
        (["method.rank=4"], 'method.rank: is read where method.kind is "lora", not "full"; leave it out'),
        (
            ["method.vectors=2", "method.kind=lora"],
            'method.vectors: is read where method.kind is "inversion", not "lora"; leave it out',
        ),
        (
            ["method.targets=x", "method.kind=shipped", "data.source=scenes"],
            "method.targets: is read where method.kind is",
        ),
        (["objective.min_snr=5", "method.kind=vae"], "objective.min_snr: is read where method.kind is"),
        (
            ["objective.kl_weight=0"],
            'objective.kl_weight: is read where method.kind is "vae", not "full"; leave it out',
        ),
        (
            ["objective.kl_weight=0", "method.kind=shipped-vae", "data.source=scenes"],
            "objective.kl_weight: is read where",
        ),
        (
            ["model.widen=['mask']", "method.kind=shipped", "data.source=scenes"],
            "model.widen: is read where method.kind is",
        ),
        (["data.flip=true", "method.kind=shipped", "data.source=scenes"], "data.flip: is read where method.kind is"),
        (["data.scenes=5"], 'data.scenes: is read where data.source is "scenes", not "folder"; leave it out'),
        (
            ["data.path=photos", "data.source=scenes"],
            'data.path: is read where data.source is "folder" or "shards", not "scenes"; leave it out',
        ),
        (["data.bucket_step=32"], "data.bucket_step: is read where data.buckets is true, not false; leave it out"),
        (
            ["optimizer.decay=0.5"],
            'optimizer.decay: is read where optimizer.schedule is "linear", not "constant"; leave it out',
        ),
        (
            ["optimizer.cycles=3", "optimizer.schedule=cosine"],
            'optimizer.cycles: is read where optimizer.schedule is "cosine-restarts", not "cosine"; leave it out',
        ),
    ],
)
def test_keys_that_nobody_reads_in_such_a_run_are_refused(sets: list[str], message: str, empty: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        load_recipe(empty, sets)
    refused(caught.value, message)


def test_keys_that_only_seem_to_contradict_each_other_are_not_refused(empty: Path) -> None:
    sets = [
        "data.cache_text=true",
        "method.kind=distill",
        "method.plan=half",
        "data.cache_latents=true",
        "data.flip=true",
        "model.zero_snr=true",
    ]
    assert load_recipe(empty, sets).data.cache_text


def test_a_name_that_does_not_ship_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArgumentError) as caught:
        load_recipe("sygill")
    refused(caught.value, "'sygill' is unknown; sygil?", "'ldm train'", "a .toml file")
    with pytest.raises(ArgumentError, match=r"'zzz' is unknown; 'ldm train'"):
        load_recipe("zzz")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "large", "binary"])
def test_what_is_no_file_of_text_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b"#" * (2**20 + 1))
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe")
    message = {
        "missing": "does not exist",
        "directory": "is no file",
        "fifo": "is no file",
        "large": "is over 1048576 bytes",
        "binary": "UTF-8",
    }[kind]
    with pytest.raises(FileError) as caught:
        load_recipe(path)
    refused(caught.value, message)
    assert caught.value.path == path
