"""What shapes cannot show of a network's training, eps or v and zero terminal SNR, from what file and weights say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError

Prediction = Literal["eps", "v"]

METADATA = "modelspec.prediction_type"
SCHEDULER, ZERO_SNR = "scheduler_config.json", "rescale_betas_zero_snr"  # so a folder's metadata quote its scheduler
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # keys of a single file
SPELLINGS: dict[str, Prediction] = {
    "eps": "eps", "epsilon": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "v_pred": "v",
}  # fmt: skip

# The parameter whose standard deviation tells SD 2's two kinds apart.
STATISTIC = "unet.output_blocks.11.1.transformer_blocks.0.norm1.bias"
THRESHOLD, CLOSE = 0.09, (0.07, 0.11)  # above it: v; inside the band no word is taken for it

_EDM = {
    **dict.fromkeys(("edm_mean", "edm_std"), "a Playground 2.5 model"),
    **dict.fromkeys(("edm_vpred.sigma_max", "edm_vpred.sigma_min"), "a CosXL model"),
}


@dataclass(frozen=True)
class Finding:
    """A config, and the standard deviation that leaves its prediction open until the network is run; None: settled."""

    config: ModelConfig
    doubt: float | None = None


def require_prediction(prediction: str | None) -> None:
    """Refuse what is no prediction."""
    if prediction not in (None, "eps", "v"):
        raise ArgumentError(f"prediction is {str(prediction)[:40]!r}; give 'eps', 'v' or None", key="prediction")


def settle(
    config: ModelConfig, keys: Mapping[str, object], metadata: Mapping[str, str], statistic: Callable[[],
    Tensor | None], refuse: Callable[[str], FileError],
    *, prediction: Prediction | None = None, explicit: bool = False,
) -> Finding:  # fmt: skip
    """The config with what its network predicts, and whether the last level of its schedule is pure noise.

    The option `prediction` settles it; so does a config that somebody gave (`explicit`). Otherwise metadata and marker
    keys are believed unless they contradict each other or, in SD 2 text models, the `statistic`: the tensor STATISTIC,
    None where it is not in the file. A mark of zero terminal SNR is believed whatever `config` says of it, and settles
    weights that are in between: only v can be trained so. Raises FileError for schedules that this version does not
    have, and for such a mark on a model that predicts eps; AmbiguousCheckpoint for a clash.
    """
    for key, what in _EDM.items():
        if key in keys:
            odd = f"is {what} ({key} is in it), trained with EDM's preconditioning, which this version does not know"
            raise refuse(f"{odd}; use another model")
    mark = next((mark for mark in (ZERO_SNR_MARK, ZERO_SNR) if mark in keys or mark in metadata), None)
    if config.schedule.zero_snr:
        mark = mark or "zero_snr in its config"
        config = _with_zero_snr(config, False)  # until it is known that the network predicts v
    finding = _predicting(config, keys, metadata, statistic, refuse, prediction, explicit)
    if mark is None:
        return finding
    found = finding.config if finding.doubt is None else predicting(finding.config, "v")
    if found.prediction == "eps":
        raise refuse(
            f"has {mark} (zero terminal SNR) and predicts eps, which cannot be; pass prediction='v' or drop the mark"
        )
    return Finding(_with_zero_snr(found, True))


def _with_zero_snr(config: ModelConfig, zero_snr: bool) -> ModelConfig:
    return replace(config, schedule=replace(config.schedule, zero_snr=zero_snr))


def _predicting(
    config: ModelConfig, keys: Mapping[str, object], metadata: Mapping[str, str], statistic: Callable[[],
    Tensor | None], refuse: Callable[[str], FileError],
    prediction: Prediction | None, explicit: bool,
) -> Finding:  # fmt: skip
    """The config with what its network predicts, as `settle` says."""
    if prediction is not None:
        return Finding(predicting(config, prediction, named=not explicit))
    if explicit:
        return Finding(config)
    claims = claims_of(keys, metadata, refuse)
    claimed = set(claims.values())
    if len(claimed) > 1:
        raise clash(f"says both eps and v ({', '.join(f'{who}: {what}' for who, what in claims.items())})", refuse)
    deviation = deviation_of(config, statistic)
    if deviation is None:
        return Finding(predicting(config, claimed.pop()) if claimed else config)
    seen: Prediction | None = None if CLOSE[0] <= deviation <= CLOSE[1] else "v" if deviation > THRESHOLD else "eps"
    if claimed and seen is not None and seen not in claimed:
        who, what = next(iter(claims.items()))
        raise clash(f"{who} says {what}, its weights {seen} (norm1.bias std {deviation:.3f}, v > {THRESHOLD})", refuse)
    settled = claimed.pop() if claimed else seen
    return Finding(config, deviation) if settled is None else Finding(predicting(config, settled))


def predicting(config: ModelConfig, prediction: Prediction, *, named: bool = True) -> ModelConfig:
    """The config with this prediction; `named`: with the name of the twin that predicts so, if there is one (SD 2)."""
    twin = config.twin(prediction) if named else None
    if twin is not None:
        return replace(config, name=twin.name, prediction=prediction, size=twin.size)
    return replace(config, prediction=prediction)


def claims_of(
    keys: Mapping[str, object], metadata: Mapping[str, str], refuse: Callable[[str], FileError]
) -> dict[str, Prediction]:
    """Who says what."""
    claims: dict[str, Prediction] = {}
    for who in (METADATA, SCHEDULER):
        if who in metadata:
            spelling = metadata[who].strip().lower()
            if spelling not in SPELLINGS:
                what = f"its {who} says that it predicts '{spelling[:40]}'; this version knows eps and v"
                raise refuse(f"{what}: pass prediction= if it is one of them")
            claims[who] = SPELLINGS[spelling]
    if V_MARK in keys:
        claims[f"key {V_MARK}"] = "v"
    return claims


def marks(config: ModelConfig) -> tuple[str, ...]:
    """The keys, of empty tensors, that mark a model of zero terminal SNR: other programs read one beside the other."""
    return (V_MARK, ZERO_SNR_MARK) if config.schedule.zero_snr else ()


def deviation_of(config: ModelConfig, statistic: Callable[[], Tensor | None]) -> float | None:
    """The statistic of SD 2's text models; None where it means nothing."""
    if config.kin != "sd2-base":
        return None
    tensor = statistic()
    return None if tensor is None else tensor.double().std(correction=0).item()


def clash(what: str, refuse: Callable[[str], FileError]) -> AmbiguousCheckpoint:
    """The error of a model that may predict eps or v."""
    fault = refuse(what)
    return AmbiguousCheckpoint(f"{what}: pass prediction='eps' or 'v'", path=fault.path, key="prediction")
