"""What a network predicts: from what the file says, from its weights, and from the network itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.models.published import narrowed, tiny
from ldm.config import FAMILIES, ScheduleConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from ldm.networks.unet import UNet
from tests.made.checkpoints import save_safetensors
from weights import load, save
from weights.names.prediction import METADATA, SCHEDULER, STATISTIC, Finding, settle
from weights.names.probe import response, settle_by_output

P = "model.diffusion_model."


# -- eps or v ----------------------------------------------------------------------------------------------------------
def refuse(what: str) -> FileError:
    return FileError(what, path="x.ckpt")


def spread(deviation: float) -> Tensor:
    """A tensor with this population standard deviation."""
    return torch.tensor([1.0, -1.0] * 160) * deviation + 3.0


def settled(
    name: str = "sd2-base",
    deviation: float | None = None,
    keys: tuple[str, ...] = (),
    metadata: dict[str, str] | None = None,
    **options,
) -> Finding:
    return settle(
        FAMILIES[name],
        dict.fromkeys(keys),
        metadata or {},
        lambda: None if deviation is None else spread(deviation),
        refuse,
        **options,
    )


@pytest.mark.parametrize(
    ("deviation", "expected"), [(0.0, "sd2-base"), (0.069, "sd2-base"), (0.111, "sd2-v"), (0.3, "sd2-v")]
)
def test_the_statistic_tells_the_two_kinds_of_sd2_apart(deviation: float, expected: str) -> None:
    assert settled(deviation=deviation) == Finding(FAMILIES[expected])


@pytest.mark.parametrize("deviation", [0.071, 0.09, 0.109])
def test_a_close_call_is_left_to_the_network(deviation: float) -> None:
    finding = settled(deviation=deviation)
    assert finding.config == FAMILIES["sd2-base"]
    assert finding.doubt == pytest.approx(deviation, rel=1e-5)  # the test's tensor is float32


@pytest.mark.parametrize("said", ["v", "V", "v_prediction", "epsilon", "eps"])
@pytest.mark.parametrize("deviation", [None, 0.09])
def test_metadata_settle_what_is_close_or_unknown(said: str, deviation: float | None) -> None:
    expected = FAMILIES["sd2-v" if said.lower().startswith("v") else "sd2-base"]
    assert settled(deviation=deviation, metadata={METADATA: said}) == Finding(expected)


def test_a_marker_or_metadata_make_a_v_model_of_any_family() -> None:
    for name in ("sd1", "sdxl-base"):
        assert settled(name, keys=("v_pred",)).config == replace(FAMILIES[name], prediction="v")
        assert settled(name, metadata={METADATA: "v"}).config == replace(FAMILIES[name], prediction="v")
        assert settled(name, 0.5).config == FAMILIES[name]  # the statistic means nothing outside SD 2
    assert settled("sd2-inpainting", 0.5).config == FAMILIES["sd2-inpainting"]


CLASHES = {
    "weights against metadata": (
        {"deviation": 0.2, "metadata": {METADATA: "epsilon"}},
        r"prediction_type says eps, its weights v .*0\.200",
    ),
    "weights against marker": (
        {"deviation": 0.01, "keys": ("v_pred",)},
        r"key v_pred says v, its weights eps .*0\.010",
    ),
    "marker against metadata": (
        {"name": "sdxl-base", "keys": ("v_pred",), "metadata": {METADATA: "epsilon"}},
        r"says both eps and v .*prediction_type: eps, key v_pred: v",
    ),
}


@pytest.mark.parametrize("what", CLASHES)
def test_a_clash_shows_the_evidence_and_what_settles_it(what: str) -> None:
    arguments, message = CLASHES[what]
    with pytest.raises(AmbiguousCheckpoint, match=message + r".*: pass prediction='eps' or 'v'") as caught:
        settled(**arguments)
    assert len(str(caught.value)) - len("x.ckpt") <= 200 - 80  # so much of a long path is shown
    assert str(caught.value.path) == "x.ckpt"
    for asked in ("eps", "v"):
        assert settled(**arguments, prediction=asked).config.prediction == asked
    assert settled(**arguments, explicit=True).config == FAMILIES[arguments.get("name", "sd2-base")]


@pytest.mark.parametrize(
    ("key", "what"),
    [("edm_mean", "a Playground 2.5 model"), ("edm_std", "a Playground 2.5"), ("edm_vpred.sigma_max", "a CosXL model")],
)
def test_schedules_that_are_not_known_are_refused_by_name(key: str, what: str) -> None:
    with pytest.raises(FileError, match=what):
        settled("sdxl-base", keys=(key, "v_pred"))
    with pytest.raises(FileError, match=what):
        settled("sdxl-base", keys=(key,), prediction="v")


PURE_NOISE = ScheduleConfig(zero_snr=True)


def test_a_mark_of_zero_terminal_snr_sets_the_schedule_of_a_v_model() -> None:
    wanted = Finding(replace(FAMILIES["sdxl-base"], prediction="v", schedule=PURE_NOISE))
    assert settled("sdxl-base", keys=("ztsnr", "v_pred")) == wanted
    assert settled("sdxl-base", keys=("ztsnr",), prediction="v") == wanted
    assert settled("sdxl-base", metadata={"rescale_betas_zero_snr": "true", SCHEDULER: "v_prediction"}) == wanted
    assert settled(deviation=0.2, keys=("ztsnr",)) == Finding(replace(FAMILIES["sd2-v"], schedule=PURE_NOISE))
    assert settled(deviation=0.09, keys=("ztsnr",)) == Finding(
        replace(FAMILIES["sd2-v"], schedule=PURE_NOISE)
    )  # in between: eps cannot be
    described = replace(FAMILIES["sd1"], prediction="v")
    for config, keys in ((described, ("ztsnr",)), (replace(described, schedule=PURE_NOISE), ())):
        assert settle(config, dict.fromkeys(keys), {}, lambda: None, refuse, explicit=True) == Finding(
            replace(described, schedule=PURE_NOISE)
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "sdxl-base"},
        {"name": "sdxl-base", "explicit": True},
        {"keys": ("v_pred",), "prediction": "eps"},
        {"deviation": 0.01},
        {"metadata": {METADATA: "eps"}},
    ],
)
@pytest.mark.parametrize("mark", ["ztsnr", "rescale_betas_zero_snr"])
def test_zero_terminal_snr_and_eps_are_refused_with_both_ways_out(arguments: dict, mark: str) -> None:
    arguments = {**arguments, "metadata": {**arguments.get("metadata", {}), mark: "true"}}
    with pytest.raises(
        FileError,
        match=rf"has {mark} \(zero terminal SNR\) and predicts eps, which cannot be; pass prediction='v' or drop the "
        "mark",
    ) as caught:
        settled(**arguments)
    assert len(str(caught.value)) - len("x.ckpt") <= 200 - 80
    made = replace(FAMILIES["sdxl-base"], prediction="v", schedule=PURE_NOISE)
    with pytest.raises(FileError, match=r"has zero_snr in its config \(zero terminal SNR\) and predicts eps"):
        settle(made, {}, {}, lambda: None, refuse, prediction="eps", explicit=True)


def test_an_unknown_word_for_the_prediction_is_refused() -> None:
    with pytest.raises(FileError, match="says that it predicts 'sample'; this version knows eps and v"):
        settled(metadata={METADATA: "sample"})


def answering(slope: float, shift: float = 0.0) -> UNet:
    """A network whose output is the constant `slope` * 0.5 + `shift`: what an eps or a v model does with a constant
    picture."""
    unet = UNet(tiny("sd2-base").unet).eval()
    torch.nn.init.zeros_(unet.out[2].weight)
    torch.nn.init.constant_(unet.out[2].bias, slope * 0.5 + shift)
    return unet


def test_the_network_itself_settles_a_close_call_or_nothing_does() -> None:
    doubt = Finding(FAMILIES["sd2-base"], 0.09)
    assert response(answering(1.0)) == pytest.approx(0)
    assert settle_by_output(doubt, answering(1.0), refuse) == FAMILIES["sd2-base"]
    assert settle_by_output(doubt, answering(-1.0, -0.1), refuse) == FAMILIES["sd2-v"]
    with pytest.raises(
        AmbiguousCheckpoint, match=r"std 0\.090, test output -0\.75.*pass prediction='eps' or 'v'"
    ) as caught:
        settle_by_output(doubt, answering(0.0, -0.25), refuse)
    assert len(str(caught.value)) - len("x.ckpt") <= 200 - 80
    with pytest.raises(AmbiguousCheckpoint, match="test output nan"):
        settle_by_output(doubt, answering(float("nan")), refuse)
    assert settle_by_output(Finding(FAMILIES["sd1"]), answering(-3.0), refuse) == FAMILIES["sd1"]


def test_load_asks_the_file_then_its_weights_then_the_network(tmp_path, monkeypatch) -> None:
    for name, config in {name: replace(tiny(name), size=FAMILIES[name].size) for name in ("sd2-base", "sd2-v")}.items():
        monkeypatch.setitem(FAMILIES, name, config)
    state = narrowed("sd2-base")
    key = P + STATISTIC.removeprefix("unet.")

    def loaded(deviation: float, metadata: dict[str, str] | None = None, out: float = 0.5, **options):
        state[key] = spread(deviation)[: len(state[key])].clone()
        state[f"{P}out.2.weight"] = torch.zeros_like(state[f"{P}out.2.weight"])
        state[f"{P}out.2.bias"] = torch.full((4,), out)
        return load(save_safetensors(state, tmp_path / "x.safetensors", metadata), **options).config

    assert loaded(0.02) == FAMILIES["sd2-base"]
    assert loaded(0.2) == FAMILIES["sd2-v"]
    assert loaded(0.2).size == 768
    assert loaded(0.09) == FAMILIES["sd2-base"]
    assert loaded(0.09, out=-1.0) == FAMILIES["sd2-v"]
    assert loaded(0.09, {METADATA: "v"}) == FAMILIES["sd2-v"]
    assert loaded(0.2, prediction="eps") == FAMILIES["sd2-base"]
    assert loaded(0.2, config="sd2-base") == FAMILIES["sd2-base"]
    assert loaded(0.2, config="sd2-base", prediction="v").prediction == "v"
    for options in ({"deviation": 0.2, "metadata": {METADATA: "epsilon"}}, {"deviation": 0.09, "out": -0.25}):
        with pytest.raises(AmbiguousCheckpoint, match="pass prediction='eps' or 'v'"):
            loaded(**options)
    with pytest.raises(ArgumentError, match="prediction is 'x'; give 'eps', 'v' or None"):
        loaded(0.2, prediction="x")


def test_a_v_model_that_was_saved_here_stays_one_whatever_its_weights_look_like(tmp_path) -> None:
    model = load(save_safetensors(narrowed("sd2-v"), tmp_path / "x.safetensors"), tiny("sd2-v"))
    assert load(save(model, tmp_path / "y.safetensors")).config == tiny("sd2-v")
