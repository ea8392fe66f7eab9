"""How the model that ships is trained: its tasks, from the renderer to a model that draws."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from benchmarks.models.seeded import normal
from ldm import blocks
from ldm.__main__ import main
from ldm.blocks import Scene, Solid
from ldm.train import shipped
from ldm.train.draws import Draws
from ldm.train.losses import vae_loss
from ldm.train.reading import load_recipe
from ldm.train.run import numbered


def test_both_stages_make_a_model_that_draws(tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole recipe in two updates each: files where they should be, weights that changed, the VAE left alone."""
    monkeypatch.chdir(tmp_path)
    few = ["--set", "run.steps=2", "--set", "run.batch=1", "--set", "run.micro=1", "--set", "run.dtype=float32"]
    assert main(["train", "blocks-vae", *few]) == 0
    assert (
        main(
            ["train", "blocks", "--set", "model.vae=runs/blocks-vae/model.safetensors", "--set", "data.scenes=3", *few]
        )
        == 0
    )
    assert "encoding 3 pictures" in capsys.readouterr().err
    model = "runs/blocks/model.safetensors"
    assert main(["txt2img", "a red cube", "--ckpt", model, "--steps", "1", "--seed", "1", "--out", "cube.png"]) == 0
    assert Image.open("cube.png").size == (128, 128)
    import weights

    trained, autoencoder = weights.load(model), weights.load("runs/blocks-vae/model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(trained.vae.parameters(), autoencoder.vae.parameters(), strict=True))
    assert trained.unet.out[2].weight.any(), "the last layer starts at zero; training must have moved it"


def test_training_the_unet_without_an_autoencoder_says_what_to_do_first(tmp_path: Path, capsys) -> None:
    assert main(["train", "blocks", "--out", str(tmp_path / "x")]) == 2
    assert "model.vae: is missing; run 'ldm train blocks-vae' first" in capsys.readouterr().err


def test_the_autoencoder_sees_crops_first_and_whole_pictures_later() -> None:
    recipe = load_recipe("blocks-vae", ["run.steps=10", "run.batch=1", "run.micro=1"])
    task = shipped.vae_trainee(recipe.run, recipe.optimizer.decay).task
    assert task.crops == 7
    micro = numbered(recipe.run.micro)
    early, late = micro(6), micro(7)
    with torch.no_grad():
        whole = torch.from_numpy(blocks.batch([7])[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        draws = Draws(0, late.index)
        wanted = vae_loss(task.vae, whole, draws.normal("posterior", (1, 4, 16, 16)).flatten(0, 1), shipped.KL_WEIGHT)
        assert torch.equal(task(late, draws).each, wanted)
    crops = task.views(blocks.batch([6])[0][0], 6, torch.Generator().manual_seed(0))
    assert crops.shape == (4, 64, 64, 3)
    assert task(early, Draws(0, early.index)).each.shape == (1,)


def test_latents_are_kept_for_the_autoencoder_that_made_them_alone(tmp_path: Path) -> None:
    cache, (one, other) = tmp_path / "latents.safetensors", (shipped.VAE(shipped.BLOCKS.vae) for _ in range(2))
    first = shipped.encode_scenes(one, 2, cache)
    seen: list[int] = []
    again = shipped.encode_scenes(one, 2, cache, on_batch=seen.append)
    assert seen == []
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(shipped.encode_scenes(other, 2, cache)[0], first[0])
    cache.write_bytes(cache.read_bytes()[:1000])  # cut short
    assert torch.equal(shipped.encode_scenes(one, 2, cache)[0], first[0])


def test_the_diffusion_loss_reads_captions_of_the_drawn_scenes() -> None:
    recipe = load_recipe("blocks", ["run.batch=4", "run.micro=2"])
    torch.manual_seed(0)
    model = shipped.LatentDiffusion(replace(shipped.BLOCKS))
    latents, ids = normal("latents", (5, 4, 16, 16)), torch.zeros(5, shipped.CAPTIONS, 32, dtype=torch.int32)
    ids[..., 0], ids[..., 1:] = 49406, 49407
    task = shipped.SceneDiffusion(model, latents, ids, recipe.run.batch)
    batch = numbered(recipe.run.micro)(1)
    loss = task(batch, Draws(0, batch.index))
    assert loss.each.shape == (2,)
    assert [t * 4 // 1000 for t in loss.t.tolist()] == [2, 3], "timesteps are spread over the update"
    loss.each.mean().backward()
    assert task.reader.layers[0].weight.grad.any()
    assert model.text[0].text_model.embeddings.token_embedding.weight.grad.any()


def test_the_facts_of_a_scene_do_not_depend_on_which_end_it_is_told_from() -> None:
    red, blue = Solid("cube", "red"), Solid("sphere", "blue")
    for relation, inverse in blocks.INVERSE.items():
        assert torch.equal(
            shipped.facts_of(Scene((red, blue), (relation,))), shipped.facts_of(Scene((blue, red), (inverse,)))
        )
    stacked = Scene((red, blue), ("on top of",))
    assert not torch.equal(shipped.facts_of(stacked), shipped.facts_of(Scene((blue, red), ("on top of",))))
    assert len({tuple(shipped.facts_of(blocks.sample(seed)).tolist()) for seed in range(50)}) > 45


def test_the_reader_learns_scenes_from_what_is_said_of_them() -> None:
    """Cross-entropy in nats, over what a colour can be (5) and how two can stand (7): no answer outside of these has
    any probability."""
    reader = shipped.SceneReader(8)
    facts = torch.stack([shipped.facts_of(blocks.sample(seed)) for seed in range(4)])
    nn.init.zeros_(reader.layers[2].weight)
    nn.init.zeros_(reader.layers[2].bias)
    told = normal("pooled", (4, 8))
    assert math.isclose(reader(told, facts).item(), 8 * math.log(5) + 64 * math.log(7), rel_tol=1e-5)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        reader(told, facts).backward()
        optimizer.step()
    assert reader(told, facts).item() < 1
