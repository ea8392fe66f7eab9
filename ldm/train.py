"""The losses, and the loop that trains a latent diffusion model from scratch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import FileError, NonFinite


@dataclass(frozen=True)
class Settings:
    """How a run trains. A run with the same settings gives the same weights, interrupted or not."""

    steps: int  # optimiser updates in all
    batch: int  # examples per update
    lr: float  # learning rate of AdamW at its highest
    warmup: int = 100  # updates over which the rate rises from 0
    decay: float = 0.25  # share of the updates, at the end, over which it falls to 0
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.998  # how much of the averaged weights an update keeps, once warmed up
    seed: int = 0  # of weights, examples, timesteps and noise
    save_every: int = 250  # updates between two checkpoints: what a crash costs at most

    def rate(self, step: int) -> float:
        """Learning rate of update `step`, counted from 0."""
        fall = max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / fall)

    def ema_decay(self, step: int) -> float:
        """EMA decay with the warm-up of the original code (CompVis ldm/modules/ema.py): the first updates count more."""
        return min(self.ema, (1 + step) / (10 + step))


def draws(seed: int, step: int) -> torch.Generator:
    """The randomness of one update: a function of seed and step, so that a resumed run sees what it would have seen."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


# --- losses ---------------------------------------------------------------------------------------------------------


def vae_loss(vae: nn.Module, image: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """Mean |error| of the picture plus `kl_weight` times the mean KL divergence per latent value (Rombach et al. 2022, appendix G).

    image [b, 3, H, W] in [-1, 1]; noise N(0, 1) of the latent's shape.
    """
    mean, logvar = vae.moments(image).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean + torch.exp(0.5 * logvar) * noise
    restored = vae.decode(z * vae.config.scale)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
    return F.l1_loss(restored.float(), image) + kl_weight * kl.mean()


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor, *,
    prediction: str = "eps", snr_limits: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """Mean squared error of the prediction (Ho et al. 2020, eq. 14), or the error of x0 that it implies, weighted.

    predict     (noisy latent [b, c, h, w], t [b]) -> eps or v
    x0          scaled latents [b, c, h, w]
    t           [b] integer timesteps
    snr_limits  weigh the error of x0 by the signal-to-noise ratio kept within these limits: an upper one is min-SNR
                (Hang et al. 2023, section 3.4), a lower one keeps the levels in the game where a picture's layout is decided
    """
    alpha = alphas_cumprod.to(x0)[t][:, None, None, None]
    out = predict(alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, t).float()
    target = noise if prediction == "eps" else alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
    loss = (out - target).square().mean(dim=(1, 2, 3))
    if snr_limits is not None:
        snr = (alpha / (1 - alpha)).flatten()
        loss = loss * snr.clamp(*snr_limits) / (snr if prediction == "eps" else snr + 1)
    return loss.mean()


# --- the loop -------------------------------------------------------------------------------------------------------


def fit(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[int, torch.Generator], Tensor],
    settings: Settings,
    out: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    on_log: Callable[[dict[str, float]], None] = lambda record: None,
) -> dict[str, Tensor]:
    """Minimise `loss` over `parameters` with AdamW; return the averaged weights (EMA).

    parameters  by name; updated in place, so that at the end they are the raw weights
    loss        (step, its randomness) -> scalar; runs under autocast to `dtype` (float32: no autocast)
    out         directory of the checkpoint `state.safetensors` and of `log.jsonl`; a checkpoint found there is resumed

    Raises NonFinite when the loss is not finite, FileError when the checkpoint is of another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    averaged = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    first = _resume(out / "state.safetensors", parameters, averaged, optimizer, settings)
    since, seen, total = time.perf_counter(), 0, 0.0
    for step in range(first, settings.steps):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss(step, draws(settings.seed, step))
        if not torch.isfinite(value):
            raise NonFinite(f"training: the loss is {value.item()} at step {step}; lower the learning rate ({settings.lr:g})")
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        optimizer.step()
        torch._foreach_lerp_([*averaged.values()], [p.detach() for p in parameters.values()], 1 - settings.ema_decay(step))

        seen, total = seen + 1, total + value.item()
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            rate = seen * settings.batch / (time.perf_counter() - since)
            record = {"step": step + 1, "loss": total / seen, "lr": settings.rate(step), "examples_per_second": rate}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            on_log(record)
            since, seen, total = time.perf_counter(), 0, 0.0
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save(out / "state.safetensors", step + 1, parameters, averaged, optimizer, settings)
    return averaged


def _save(path: Path, step: int, parameters: dict, averaged: dict, optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Write the whole state beside `path` and rename it, so that a crash leaves the last checkpoint whole."""
    state = {f"raw/{name}": p.detach() for name, p in parameters.items()} | {f"ema/{name}": a for name, a in averaged.items()}
    for name, p in parameters.items():
        state |= {f"{key}/{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary, metadata={"step": str(step), "settings": json.dumps(asdict(settings))})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _resume(path: Path, parameters: dict, averaged: dict, optimizer: torch.optim.AdamW, settings: Settings) -> int:
    """Put the checkpoint at `path` back, if there is one; return the number of updates done."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as state:
        meta = state.metadata()
        then, now = json.loads(meta["settings"]), json.loads(json.dumps(asdict(settings)))
        changed = [k for k in now if k not in ("steps", "save_every", "decay") and then.get(k) != now[k]]
        if changed:
            raise FileError(f"is a run with another {changed[0]} ({then.get(changed[0])}, not {now[changed[0]]}); use another directory", path=path)
        if {k.split("/", 1)[1] for k in state.keys()} != set(parameters):  # noqa: SIM118 (a safetensors file is not a dict)
            raise FileError("is a run of another network; use another directory", path=path)
        step = int(meta["step"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state.get_tensor(f"raw/{name}"))
                averaged[name].copy_(state.get_tensor(f"ema/{name}"))
                optimizer.state[p] = {"step": torch.tensor(float(step))} | {
                    key: state.get_tensor(f"{key}/{name}").to(p.device) for key in ("exp_avg", "exp_avg_sq")
                }
    return step
