"""Whole runs from the command line on the model that ships: every kind of training learns, changes what it should and
nothing else."""

from __future__ import annotations

import json
import signal
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import weights
from benchmarks.models.golden import tiny_vision
from benchmarks.models.seeded import weight
from ldm import blocks
from ldm.__main__ import main
from ldm.changes.lora import merge
from ldm.train.ranks import ranks
from ldm.train.recipe import Recipe
from ldm.train.run import identity
from ldm.train.state import latest_state
from ldm.train.watch.log import Log
from tests.made.checkpoints import save_safetensors
from tests.made.forked import succeed, together

TINY = [
    "data.path=pictures",
    "data.size=64",
    "data.held_out=0.25",
    "run.steps=6",
    "run.batch=4",
    "run.micro=4",
    "run.save_every=3",
    "run.save_dtype=float32",
    "watch.timesteps=2",
]


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight captioned scenes of a quarter of the size that the model knows, so that there is something to learn."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, captions = blocks.batch(range(8))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).resize((64, 64), Image.Resampling.BOX).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def train(*sets: str, recipe: str = "[optimizer]\nlr = 1e-3\n", out: str = "run", code: int = 0) -> list[dict]:
    """Train; the lines of the log."""
    Path("recipe.toml").write_text(recipe)
    assert (
        main(["train", "recipe.toml", "--out", out, *(part for each in (*TINY, *sets) for part in ("--set", each))])
        == code
    )
    log = Path(out) / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def vision_tower() -> str:
    """A folder with a small CLIP vision tower whose embedding is as wide as the text that the model that ships is
    told."""
    tower = tiny_vision()
    state = tower.state_dict() | {"visual_projection.weight": weight("projection", (64, tower.config.width))}
    sizes = {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_act": "quick_gelu",
    }
    Path("vision").mkdir()
    save_safetensors(state, Path("vision/model.safetensors"))
    Path("vision/config.json").write_text(
        json.dumps({"architectures": ["CLIPVisionModelWithProjection"], "projection_dim": 64, **sizes})
    )
    return "vision"


def fell(records: list[dict]) -> bool:
    """Whether the loss of the held-out pictures did, under the same noise."""
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    return len(losses) > 1 and losses[-1] < losses[0]


def changed(path: str) -> set[str]:
    """The parameters of a trained model that are not those of the model that ships."""
    before, after = (dict(weights.load(file).named_parameters()) for file in (None, path))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_full_fine_tuning_changes_the_unet_and_nothing_else(capsys) -> None:
    assert fell(train("watch.every=6", "run.ema=0.5"))
    names = changed("run/model.safetensors")
    assert len(names) > 150
    assert all(name.startswith("unet.") for name in names)
    assert capsys.readouterr().out.splitlines() == ["run/model.safetensors", "run/report.png", "run/report.html"]


def test_text_towers_learn_where_they_are_asked_to_and_targets_narrow_both() -> None:
    assert fell(train("watch.every=6", "method.text=true", r"method.targets=attn2\.to_v|\.layers\.3\."))
    names = changed("run/model.safetensors")
    assert {name.split(".")[0] for name in names} == {"unet", "text"}
    assert all(".attn2.to_v." in name or ".layers.3." in name for name in names)


@pytest.mark.parametrize("more", [(), ("method.dora=true",), ("method.conv_rank=2", "method.text=true")])
def test_a_lora_learns_beside_the_weights_and_is_written_in_both_spellings(more: tuple[str, ...]) -> None:
    assert fell(train("watch.every=6", "method.kind=lora", "method.rank=4", *more))
    model = weights.load()
    spelled = [weights.load_lora(f"run/{file}.safetensors", model.config) for file in ("lora", "lora-diffusers")]
    assert spelled[0].keys() == spelled[1].keys()
    assert not spelled[0].unmatched
    assert any(name.startswith("text.") for name in spelled[0]) == ("method.text=true" in more)
    merged = []
    for changes in spelled:
        model = weights.load()
        merge(model, [(changes, 1.0)])
        merged.append(model.unet.middle_block[1].transformer_blocks[0].attn1.to_q.weight)
    assert torch.allclose(*merged, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged[0], weights.load().unet.middle_block[1].transformer_blocks[0].attn1.to_q.weight)


def test_a_new_word_learns_and_no_weight_does() -> None:
    caption = ["data.caption=a picture of sks"]
    assert fell(
        train(
            "watch.every=6",
            "method.kind=inversion",
            "method.token=sks",
            "method.token_from=cube",
            "method.vectors=2",
            *caption,
            recipe="[optimizer]\nlr = 0.05\nweight_decay = 0.0\n",
        )
    )
    word = weights.load_embedding("run/embedding.safetensors")
    assert word.n == 2
    assert not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("caption", ["", "a sksophone", "a red cube" + " and a red cube" * 10 + " like sks"])
def test_a_word_that_is_not_read_in_a_caption_is_refused(caption: str, capsys) -> None:
    """Where it is missing, a part of another word, or after the last token that is read."""
    train("method.kind=inversion", "method.token=sks", "method.token_from=cube", f"data.caption={caption}", code=2)
    assert (
        "method.token: 'sks' is not in what is read of the caption of 0.png; say it in data.caption, or early in every "
        "caption" in capsys.readouterr().err
    )


def test_the_autoencoder_learns_and_nothing_else() -> None:
    assert fell(train("watch.every=6", "method.kind=vae"))
    assert all(name.startswith("vae.") for name in changed("run/model.safetensors"))


def test_a_student_of_half_the_blocks_learns_from_the_whole() -> None:
    records = train("watch.every=6", "method.kind=distill", "method.plan=half")
    assert fell(records)
    assert [t for t, _ in records[0]["validation_levels"]] == [250, 750]
    student, teacher = weights.load("run/model.safetensors"), weights.load()
    parameters = [sum(p.numel() for p in model.unet.parameters()) for model in (student, teacher)]
    assert parameters[0] < 0.6 * parameters[1]
    assert all(torch.equal(a, b) for a, b in zip(student.text.parameters(), teacher.text.parameters(), strict=True))


def test_teachers_teach_one_after_another() -> None:
    train(out="other")
    assert fell(
        train(
            "watch.every=6",
            "method.kind=distill",
            "method.plan=half",
            'method.teachers=["other/model.safetensors", "other/model.safetensors"]',
        )
    )


def test_a_widened_model_learns_to_paint_holes_and_knows_itself_when_loaded() -> None:
    assert fell(train("watch.every=6", 'model.widen=["mask", "masked_image"]', "objective.whole_hole=0.5"))
    model = weights.load("run/model.safetensors")
    assert model.config.concat == ("mask", "masked_image")
    assert model.unet.input_blocks[0][0].weight[:, 4:].any()


def test_a_model_learns_to_predict_v_with_zero_terminal_snr() -> None:
    assert fell(train("watch.every=6", "model.prediction=v", "model.zero_snr=true", "objective.min_snr=5"))
    model = weights.load("run/model.safetensors")
    assert (model.config.prediction, model.schedule.zero_snr) == ("v", True)


def test_dreambooth_makes_the_missing_pictures_of_the_class_itself() -> None:
    prior = [
        "data.caption=a sks cube",
        "data.prior=class",
        "data.prior_caption=a cube",
        "data.prior_pictures=2",
        "run.micro=2",
        "run.steps=2",
    ]
    train(*prior)
    made = sorted(Path("class").glob("*.png"))
    assert len(made) == 2
    before = [path.stat().st_mtime_ns for path in made]
    train(*prior, "run.steps=3", out="again")
    assert [path.stat().st_mtime_ns for path in made] == before, "what is there is not made again"


def test_what_is_made_beside_pictures_with_captions_of_their_own_is_learnt_from_too(capsys) -> None:
    Path("class").mkdir()
    Path("pictures/0.png").rename("class/mine.png")
    Path("class/metadata.jsonl").write_text('{"file_name": "mine.png", "text": "a blue cone"}')
    train("data.prior=class", "data.prior_caption=a cube", "data.prior_pictures=2", "run.micro=2", "run.steps=1")
    assert Path("class/prior-00000.txt").read_text() == "a cube"
    assert "left out" not in capsys.readouterr().err


def test_the_pictures_of_the_class_are_of_the_model_as_it_was(capsys) -> None:
    train(
        "data.prior=class",
        "data.prior_caption=a cube",
        "data.prior_pictures=1",
        "run.micro=2",
        "run.steps=1",
        'model.widen=["mask", "masked_image"]',
    )
    assert len(list(Path("class").glob("*.png"))) == 1


def test_a_vision_tower_takes_the_place_of_the_text() -> None:
    assert fell(train("watch.every=6", "watch.steps=2", f"model.vision={vision_tower()}"))
    assert weights.load("run/model.safetensors").config.text == ()


@cache
def plain() -> dict[str, torch.Tensor]:
    """The state after two updates without any of these options."""
    train("run.steps=2", out="plain")
    return {name: value.clone() for name, value in latest_state(Path("plain/states")).open().items()}


@pytest.mark.parametrize(
    "options",
    [
        ("data.cache_latents=true", "data.cache_text=true"),
        ("run.checkpointing=true",),
        ("run.micro=1",),
        ("run.micro=2", "run.checkpointing=true"),
    ],
)
def test_caches_checkpointing_and_accumulation_change_nothing_but_rounding(options: tuple[str, ...]) -> None:
    train("run.steps=2", *options, out="other")
    a, b = plain(), latest_state(Path("other/states")).open()
    moments = [name for name in a if name.startswith("adam/exp_avg/")]
    assert len(moments) > 150
    largest = max(a[name].abs().max() for name in moments)
    assert all((a[name] - b[name]).abs().max() <= 1e-3 * largest for name in moments), "the sum of two gradients"


def test_a_run_goes_on_where_it_was_stopped_and_ends_as_it_would_have(capsys) -> None:
    train(out="straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "tick", lambda log, step: signal.raise_signal(signal.SIGINT) if step == 2 else None)
        train(out="stopped", code=130)
    told = capsys.readouterr().err
    assert "saving the state after this update" in told
    assert "saved after 3 of 6 updates; the same command goes on" in told
    train(out="stopped")
    a, b = (dict(latest_state(Path(out) / "states").open()) for out in ("straight", "stopped"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_other_data_is_not_taken_for_the_same(capsys) -> None:
    train("run.steps=2")
    Path("pictures/0.txt").write_text("something else")
    train(code=2)
    error = capsys.readouterr().err
    assert (
        "holds a run whose pictures or captions were others; use another run.out, or go on with --allow-data-change"
        in error
    )
    assert (
        main(
            [
                "train",
                "recipe.toml",
                "--out",
                "run",
                "--allow-data-change",
                *(part for each in TINY for part in ("--set", each)),
            ]
        )
        == 0
    )
    train()  # what was allowed once is what the state remembers


def test_another_start_or_recipe_is_not_taken_for_the_same(capsys) -> None:
    train("run.steps=2")
    kept = Path("run/recipe.toml").read_text()
    train("objective.noise_offset=0.1", code=2)
    assert Path("run/recipe.toml").read_text() == kept
    assert "holds a run with another objective.noise_offset (0.0, not 0.1)" in capsys.readouterr().err
    weights.save(weights.load(), "copy.safetensors", dtype=torch.float32)
    train("model.start=copy.safetensors", code=2)
    assert "holds a run with another start" in capsys.readouterr().err


def test_the_last_learning_rate_of_a_run_begins_the_next() -> None:
    train("run.steps=2", "optimizer.schedule=linear", "watch.log_every=1")
    records = train("run.steps=1", "optimizer.lr_from=run", out="next")
    assert [record["lr"] for record in records if "lr" in record] == [pytest.approx(5e-4)]
    assert "lr = 0.0005" in Path("next/recipe.toml").read_text()


def test_a_result_can_be_a_diffusers_folder() -> None:
    train("run.steps=1", 'run.formats=["original", "diffusers"]')
    single, folder = weights.load("run/model.safetensors"), weights.load("run/diffusers")
    assert all(torch.equal(a, b) for a, b in zip(single.unet.parameters(), folder.unet.parameters(), strict=True))


def test_pictures_on_the_way_are_drawn_with_what_was_learnt_so_far() -> None:
    train(
        "watch.every=3",
        "watch.prompts=['a red cube']",
        "watch.steps=2",
        "run.ema=0.5",
        recipe="[optimizer]\nlr = 1e-2\n",
    )
    pictures = [np.asarray(Image.open(f"run/validation/step-{step:06d}/00.png"), dtype=int) for step in (0, 3, 6)]
    assert pictures[0].shape == (64, 64, 3)
    assert all((a != b).any() for a, b in pairwise(pictures))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["model.family=sd1"], "model.start: is of family blocks, and the recipe recipe trains sd1; give such a model"),
        (
            ["model.start=nowhere.safetensors"],
            "model.start: nowhere.safetensors does not exist; give a file of weights or a diffusers folder",
        ),
        (
            ["method.kind=distill", "method.plan=half", "method.teachers=['nowhere']"],
            "method.teachers: nowhere does not exist",
        ),
        (["data.path=''"], "data.path: is not given; name the pictures to learn from"),
        (["optimizer.kind=adamw8bit"], "pip install bitsandbytes"),
        (
            ["model.zero_snr=true"],
            "model.zero_snr: this model predicts eps, which says nothing where there is no signal; set "
            'model.prediction to "v"',
        ),
        (["method.kind=lora", "method.targets=nothing"], "nothing"),
        (
            ["method.targets=nothing"],
            "method.targets: 'nothing' is found in no parameter's name; leave it out for all of them",
        ),
        (["run.micro=3"], "run.batch"),
        (
            ["method.kind=inversion", "method.token=sks", "method.token_from=cube", "objective.caption_dropout=0.1"],
            "teaches the new word nothing; set it to 0",
        ),
        (
            ["data.prior=a", "data.prior_caption=a cube", "data.prior_pictures=2"],
            "every other micro-batch is of the prior's pictures",
        ),
        (["objective.min_snr=1", "objective.least_snr=2"], "objective.least_snr: 2 is above objective.min_snr, 1"),
        (
            ["method.kind=inversion", "method.token=sks", "method.token_from=cube", "run.parallel=fsdp"],
            "a new word is not shared among ranks; set it to ddp",
        ),
        (
            ["method.kind=distill", "method.plan=half", "run.compile=true"],
            "run.compile: what a compiled student sees inside cannot be compared",
        ),
        (["model.widen=['depth', 'mask']"], "depth"),
        (
            ["objective.whole_hole=0.5"],
            "objective.whole_hole: family blocks takes no mask; leave it out, or widen the model",
        ),
        (
            ["model.widen=['mask', 'masked_image']", "data.held_out=0", "watch.prompts=['a cube']"],
            "needs a picture; set data.held_out above 0",
        ),
        (["method.kind=distill", "method.plan=third"], "third"),
        (["optimizer.lr_from=nowhere"], "nowhere"),
        (["watch.tensorboard=true"], "pip install tensorboard"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(sets: list[str], message: str, capsys) -> None:
    train(*sets, code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1, error
    assert not Path("run/model.safetensors").exists()


def test_bad_pictures_are_left_out_counted_and_listed(pictures: Path, capsys) -> None:
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    (pictures / "broken.txt").write_text("a cube")
    train("run.steps=1", code=2)
    assert "more than data.bad_limit allows" in capsys.readouterr().err
    train("run.steps=1", "data.bad_limit=0.2")
    error = capsys.readouterr().err
    assert "pictures that were left out: 1" in error
    assert "broken.png" in error


@pytest.mark.parametrize(
    ("kind", "networks"), [("full", ["UNet"]), ("lora", ["UNet"]), ("vae", ["Encoder", "Decoder"])]
)
def test_the_network_that_learns_is_compiled_where_it_is_asked_for(
    kind: str, networks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(type(module).__name__))
    train("run.steps=1", "run.batch=1", "run.micro=1", f"method.kind={kind}", "run.compile=true")
    assert seen == networks


@pytest.mark.slow
def test_a_compiled_network_learns_the_same() -> None:
    train("run.steps=2", out="plain")
    with pytest.MonkeyPatch.context() as patch:
        plain = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda module: plain(module, backend="eager"))
        train("run.steps=2", "run.compile=true", out="compiled")
    a, b = (dict(latest_state(Path(out) / "states").open()) for out in ("plain", "compiled"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def test_the_recipes_that_ship_are_listed_and_shown(capsys) -> None:
    assert main(["train"]) == 0
    listed = capsys.readouterr().out
    assert "sygil " in listed
    assert "blocks-vae" in listed
    assert main(["train", "sygil", "--show", "--set", "run.steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "steps = 7" in shown
    assert "## Training" in shown


def test_only_one_run_trains_in_a_directory(capsys) -> None:
    from ldm.train.state import only_run

    with only_run(Path("run")):
        train(code=2)
    assert "run" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["vae", "vision"])
def test_captions_that_nobody_reads_need_not_be_written(kind: str, pictures: Path) -> None:
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    train(
        "run.steps=1",
        "run.batch=1",
        "run.micro=1",
        *(["method.kind=vae"] if kind == "vae" else ["watch.steps=2", f"model.vision={vision_tower()}"]),
    )


def two_ranks_identify() -> None:
    read: list[Path] = []
    files = SimpleNamespace(embedded=lambda: Path("ours"), digest=lambda path: read.append(path) or f"{path}'s digest")
    with ranks("cpu") as place:
        assert identity(Recipe("a"), files, None, place)["start"] == ["ours's digest"]
        assert read == [Path("ours")] * (place.local == 0)


def test_one_rank_of_a_machine_reads_the_weights_that_a_run_starts_from(tmp_path: Path) -> None:
    with together(two_ranks_identify, world=2, said=tmp_path / "said") as processes:
        succeed(processes, tmp_path / "said")
