"""The losses and the training loop: what is minimised, and that an interrupted run ends where it would have."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm import blocks, shipped
from ldm.blocks import Scene, Solid
from ldm.errors import FileError, NonFinite
from ldm.train import Settings, diffusion_loss, draws, fit, vae_loss
from samplers import Schedule
from tests.networks import tiny_vae
from tests.seeded import normal

SETTINGS = Settings(steps=12, batch=4, lr=1e-2, warmup=3, decay=0.5, save_every=4)


def line(parameters: dict[str, nn.Parameter]):
    def loss(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(SETTINGS.batch, 3, generator=generator)
        return (x @ parameters["w"] - x.sum(1)).square().mean()

    return loss


def run(out: Path, settings: Settings = SETTINGS, seed: int = 0):
    parameters = {"w": nn.Parameter(normal(f"w{seed}", (3,)))}
    averaged = fit(parameters, line(parameters), settings, out, dtype=torch.float32)
    return parameters["w"].detach(), averaged["w"]


def test_the_loop_minimises_the_loss(tmp_path: Path) -> None:
    w, _ = run(tmp_path, replace(SETTINGS, steps=400, lr=3e-2))
    assert torch.allclose(w, torch.ones(3), atol=0.05)


def test_an_interrupted_run_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight")

    class Killed(Exception):
        pass

    parameters = {"w": nn.Parameter(normal("w0", (3,)))}
    loss = line(parameters)

    def dies(step: int, generator: torch.Generator) -> Tensor:
        if step == 10:
            raise Killed
        return loss(step, generator)

    with pytest.raises(Killed):
        fit(parameters, dies, SETTINGS, tmp_path / "killed", dtype=torch.float32)
    resumed = run(tmp_path / "killed", seed=1)  # other initial weights: all must come from the checkpoint
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, run(tmp_path), strict=True))


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(FileError, match=r"another lr \(0.01, not 0.02\)"):
        run(tmp_path, replace(SETTINGS, lr=2e-2))
    with pytest.raises(FileError, match="another network"):
        fit({"other": nn.Parameter(torch.zeros(3))}, lambda step, g: torch.tensor(0.0), SETTINGS, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    with pytest.raises(NonFinite, match="the loss is nan at step 0"):
        fit(parameters, lambda step, g: parameters["w"].sum() * float("nan"), SETTINGS, tmp_path)


def test_the_log_has_a_line_with_the_loss_and_the_rate(tmp_path: Path) -> None:
    run(tmp_path)
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert record["step"] == 12
    assert record["lr"] == SETTINGS.rate(11)
    assert record["examples_per_second"] > 0


def test_the_learning_rate_rises_stays_and_falls() -> None:
    settings = Settings(steps=100, batch=1, lr=1.0, warmup=10, decay=0.2)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9:81] == [1.0] * 72
    assert rates[-1] == pytest.approx(0.05)


def test_the_average_follows_quickly_at_first() -> None:
    assert SETTINGS.ema_decay(0) == 0.1
    assert SETTINGS.ema_decay(10**6) == SETTINGS.ema


def test_randomness_is_a_function_of_seed_and_step() -> None:
    assert torch.equal(torch.randn(3, generator=draws(1, 2)), torch.randn(3, generator=draws(1, 2)))
    assert not torch.equal(torch.randn(3, generator=draws(1, 2)), torch.randn(3, generator=draws(1, 3)))


def diffusion(prediction: str, snr_limits: tuple[float, float] | None, t: int, error: float) -> float:
    """The loss of a network that is wrong by `error` everywhere."""
    alphas = torch.tensor(Schedule().alphas_cumprod)
    x0, noise = normal("x0", (2, 4, 8, 8)).double(), normal("noise", (2, 4, 8, 8)).double()
    a = alphas[t]
    target = noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x0
    return diffusion_loss(lambda x, t: target + error, x0, torch.tensor([t, t]), noise, alphas, prediction=prediction, snr_limits=snr_limits).item()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_diffusion_loss_is_the_mean_squared_error_of_the_prediction(prediction: str) -> None:
    assert diffusion(prediction, None, 500, 0.0) == pytest.approx(0, abs=1e-12)
    assert diffusion(prediction, None, 500, 0.1) == pytest.approx(0.01, rel=1e-5)


def test_the_error_of_x0_weighs_as_much_as_the_limited_snr_says() -> None:
    a = Schedule().alphas_cumprod
    for t in (10, 400, 900):
        snr = a[t] / (1 - a[t])
        weight = min(max(snr, 0.2), 5)
        assert diffusion("eps", (0.2, 5.0), t, 0.1) == pytest.approx(0.01 * weight / snr, rel=1e-4)
        assert diffusion("v", (0.2, 5.0), t, 0.1) == pytest.approx(0.01 * weight / (snr + 1), rel=1e-4)


def test_the_network_sees_the_latent_noised_to_its_timestep() -> None:
    alphas = torch.tensor(Schedule().alphas_cumprod)
    x0, noise = normal("x0", (1, 4, 8, 8)), normal("noise", (1, 4, 8, 8))
    seen = []
    diffusion_loss(lambda x, t: seen.append(x) or x, x0, torch.tensor([300]), noise, alphas)
    a = alphas[300]
    assert torch.allclose(seen[0], a.sqrt() * x0 + (1 - a).sqrt() * noise)


def test_the_autoencoder_loss_is_the_error_plus_the_weighted_divergence() -> None:
    vae, image = tiny_vae("vae-f8-tiny"), normal("image", (1, 3, 16, 16)).clamp(-1, 1)
    noise = normal("z", (1, 4, 2, 2))
    plain = (vae.decode(vae.encode(image, noise)) - image).abs().mean()
    mean, logvar = vae.moments(image).chunk(2, dim=1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)).mean()
    assert torch.allclose(vae_loss(vae, image, noise, 0.0), plain)
    assert torch.allclose(vae_loss(vae, image, noise, 0.5), plain + 0.5 * kl)


def test_the_shipped_model_trains_from_the_renderer_to_a_model(tmp_path: Path) -> None:
    """The whole recipe in two steps each: files where they should be, weights that changed, the VAE left alone."""
    few = Settings(steps=2, batch=1, lr=1e-3, warmup=1, decay=0.5)
    shipped.train_vae(tmp_path / "vae", few, on_log=lambda record: None)
    before = shipped.load_vae(tmp_path / "vae").state_dict()
    model = shipped.train_diffusion(tmp_path / "vae", tmp_path / "unet", few, scenes=3, on_log=lambda record: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.vae.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.unet.out[2].weight.any(), "the last layer starts at zero; training must have moved it"
    image = torch.zeros(1, 3, 128, 128)
    assert model.vae.encode(image).shape == model.latent_shape(1, 128, 128)


def test_training_without_an_autoencoder_says_what_to_do_first(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="run 'ldm train vae' first"):
        shipped.load_vae(tmp_path)


def test_the_facts_of_a_scene_do_not_depend_on_which_end_it_is_told_from() -> None:
    red, blue = Solid("cube", "red"), Solid("sphere", "blue")
    for relation, inverse in blocks.INVERSE.items():
        assert torch.equal(shipped.facts_of(Scene((red, blue), (relation,))), shipped.facts_of(Scene((blue, red), (inverse,))))
    stacked = Scene((red, blue), ("on top of",))
    assert not torch.equal(shipped.facts_of(stacked), shipped.facts_of(Scene((blue, red), ("on top of",))))
    assert len({tuple(shipped.facts_of(blocks.sample(seed)).tolist()) for seed in range(50)}) > 45


def test_the_reader_learns_scenes_from_what_is_said_of_them(tmp_path: Path) -> None:
    """Cross-entropy in nats, over what a colour can be (5) and how two can stand (7): no answer outside of these has any probability."""
    reader = shipped.Reader(8)
    facts = torch.stack([shipped.facts_of(blocks.sample(seed)) for seed in range(4)])
    nn.init.zeros_(reader.layers[2].weight)
    nn.init.zeros_(reader.layers[2].bias)
    told = normal("pooled", (4, 8))
    assert reader(told, facts).item() == pytest.approx(8 * math.log(5) + 64 * math.log(7), rel=1e-5)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        reader(told, facts).backward()
        optimizer.step()
    assert reader(told, facts).item() < 1
