"""Low-rank layers while they learn: nothing changes until they do, they learn what the papers say, and they leave no
trace."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weights
from benchmarks.models.seeded import normal
from ldm import fast
from ldm.changes import lora_layers
from ldm.changes.lora import Changes, Decomposed, Full, LowRank, merge
from ldm.changes.lora_layers import Spec, attach, detach, load_into
from ldm.config import FAMILIES
from ldm.errors import ArgumentError, FileError, OutputError
from ldm.limits.offload import offload
from ldm.model import LatentDiffusion
from tests.made.families import build, tiny
from weights.adapters.kohya import kohya_names
from weights.adapters.read import read_lora
from weights.names import blank

GOLDEN = Path(__file__).parents[2] / "golden" / "lora"
ALL = Spec(4, 2.0, conv_rank=2, conv_alpha=3.0, text=True)
MATRIX, PROJECTION = "unet.middle_block.1.transformer_blocks.0.attn2.to_k", "unet.middle_block.1.proj_in"
CONV, STRIDED = "unet.middle_block.0.in_layers.2", "unet.input_blocks.2.0.op"
ONE_EACH = replace(
    ALL, text=False, targets="|".join(re.escape(name) + "$" for name in (MATRIX, PROJECTION, CONV, STRIDED))
)


@lru_cache(maxsize=4)
def first(family: str) -> LatentDiffusion:
    return build(tiny(family))


def model(family: str = "sd1") -> LatentDiffusion:
    return deepcopy(first(family))


def drawn(model: LatentDiffusion) -> Tensor:
    """What the UNet says to a fixed input under a fixed prompt."""
    cond = model.tell(["a red cube on a blue sphere", ""], (64, 64))
    return model.unet(
        normal("x", (2, model.config.unet.in_channels, 8, 8)).to(model.dtype),
        torch.tensor([3, 500]),
        cond.context,
        cond.y,
    )


def learn(factors: dict[str, nn.Parameter]) -> None:
    """Move every factor from where it started."""
    with torch.no_grad():
        for name, factor in factors.items():
            factor.add_(normal(name, factor.shape) * 0.05)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def same(a: LowRank | Decomposed, b: LowRank | Decomposed) -> bool:
    """Whether two changes have the same factors, bit by bit, laid out as a matrix or as a layer, and the same alpha."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Decomposed):
        return torch.equal(a.magnitude, b.magnitude) and same(a.inner, b.inner)
    return (
        torch.equal(a.down.flatten(1), b.down.flatten(1))
        and torch.equal(a.up.flatten(1), b.up.flatten(1))
        and a.alpha == b.alpha
    )


# --- before anything is learnt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [ALL, replace(ALL, dora=True)], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
def test_attaching_changes_no_bit_of_what_a_model_computes(family: str, spec: Spec, dtype: torch.dtype):
    network = model(family).to(dtype)
    before = drawn(network)
    factors = attach(network, spec)
    assert all(factor.dtype == torch.float32 and factor.requires_grad for factor in factors.values())
    assert torch.equal(drawn(network), before)
    learn(factors)
    assert not torch.equal(drawn(network), before)


def test_factors_are_parameters_of_the_model_and_no_part_of_its_state(tmp_path):
    """So that a wrapper for several GPUs finds them, `.to` moves them, and a checkpoint of the model is the same
    file."""
    network = model()
    names, state = [name for name, _ in network.named_parameters()], network.state_dict()
    plain = weights.save(network, tmp_path / "plain.safetensors").read_bytes()
    factors = attach(network, replace(ALL, dora=True))
    learn(factors)
    named = dict(network.named_parameters())
    assert {name for name in named if name not in names} == set(factors)
    assert [name for name in named if name not in factors] == names
    assert all(named[name] is factor for name, factor in factors.items())
    assert same_bits(network.state_dict(), state)
    network.load_state_dict(state)
    assert weights.save(network, tmp_path / "attached.safetensors").read_bytes() == plain
    assert network.to(torch.bfloat16).unet.middle_block[1].proj_in.lora.up.dtype == torch.bfloat16


def test_what_is_drawn_depends_on_seed_and_name_alone():
    a, b, c = (attach(model(), spec, seed) for spec, seed in ((ALL, 0), (ONE_EACH, 0), (ALL, 1)))
    assert set(b) < set(a)
    assert all(torch.equal(b[name], a[name]) for name in b)
    downs = [name for name in a if name.endswith(".down")]
    assert not any(torch.equal(a[name], c[name]) for name in downs)
    assert len({a[name].flatten()[0].item() for name in downs}) == len(downs)
    for name in (f"{CONV}.lora.down", f"{MATRIX}.lora.down"):
        bound = 1 / math.sqrt(a[name][0].numel())
        assert 0.95 * bound < a[name].abs().max() <= bound
    assert all(not a[name].any() for name in a if name.endswith(".up"))


@pytest.mark.parametrize(
    ("manifest", "family", "unheard"),
    [("sd1", "sd1", 0), ("sd2", "sd2-base", 0), ("sdxl", "sdxl-base", 6), ("ssd-1b", "ssd-1b", 6)],
)
def test_the_usual_targets_are_those_of_published_loras(manifest: str, family: str, unheard: int):
    """But for the last layer of SDXL's first tower, whose output goes nowhere."""
    published = json.loads(gzip.decompress((GOLDEN / f"{manifest}.json.gz").read_bytes()))["targets"]
    network, spelled = blank.built(lambda: LatentDiffusion(FAMILIES[family])), kohya_names(FAMILIES[family])

    def hit(spec: Spec) -> set[str]:
        names = {spelled[name.rpartition(".lora.")[0]] for name in attach(network, spec)}
        detach(network)
        return names

    def wanted(group: str) -> list[set[str]]:
        return [
            set(target["kohya"])
            for target in published
            if target["group"] == group and (group == "lora" or target["kind"] != "linear")
        ]

    linear, both = hit(Spec(1, text=True)), hit(Spec(1, text=True, conv_rank=1))
    missing = [names for names in wanted("lora") if not names & linear]
    assert len(linear) == len(wanted("lora")) - unheard
    assert len(missing) == unheard
    assert all(re.search(r"lora_te1_text_model_encoder_layers_11_", min(names)) for names in missing)
    assert all(names & (both - linear) for names in wanted("locon"))
    assert len(both - linear) == len(wanted("locon"))


# --- what is learnt ---------------------------------------------------------------------------------------------------


def by_hand(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """The layer with the weight of the papers' formulas: W + alpha / r B A, and with DoRA m V / ||V||, the length no
    part of the gradient."""
    weight = layer.weight.detach() + scale * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    if magnitude is not None:
        length = weight.detach().flatten(1).square().sum(dim=1).sqrt()
        weight = weight * (magnitude.flatten() / length).reshape(-1, *(1 for _ in weight.shape[1:]))
    if weight.ndim == 4 and x.ndim == 4:
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    return F.linear(x, weight.flatten(1), layer.bias)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("name", "shape", "scale"),
    [
        (MATRIX, (2, 5, 64), 2 / 4),
        (PROJECTION, (2, 5, 64), 2 / 4),
        (CONV, (2, 64, 6, 6), 3 / 2),
        (STRIDED, (2, 32, 6, 6), 3 / 2),
    ],
    ids=["matrix", "projection", "conv", "strided conv"],
)
def test_output_and_gradient_are_those_of_the_formula(name: str, shape: tuple[int, ...], scale: float, dora: bool):
    """In float64, but for lengths, which are float32 always."""
    network = model()
    factors = attach(network, replace(ONE_EACH, dora=dora))
    learn(factors)
    layer = network.double().get_submodule(name)
    x = normal("x", shape).double().requires_grad_()
    held = [
        dict(network.named_parameters())[f"{name}.lora.{leaf}"]
        for leaf in ("down", "up", *(["magnitude"] if dora else []))
    ]
    ours, theirs = layer(x), by_hand(layer, x, held[0], held[1], scale, held[2] if dora else None)
    tolerance = 8 * 2**-24 if dora else 1e-12
    toward = normal("g", ours.shape).double()
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, [x, *held], toward)],
        [theirs, *torch.autograd.grad(theirs, [x, *held], toward)],
        strict=True,
    ):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_dora_gives_the_gradients_of_peft():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear

    assert peft
    network = model()
    learn(attach(network, replace(ONE_EACH, dora=True)))
    layer = network.get_submodule(MATRIX)
    plain = nn.Linear(64, 64, bias=False)
    plain.weight.data = layer.weight.data.clone()
    config = peft.LoraConfig(r=4, lora_alpha=2, use_dora=True)
    peer = Linear(plain, "default", config=config, r=4, lora_alpha=2)
    factors = [peer.lora_A.default.weight, peer.lora_B.default.weight, peer.lora_magnitude_vector.default.weight]
    for theirs, ours in zip(factors, (layer.lora.down, layer.lora.up, layer.lora.magnitude), strict=True):
        theirs.data = ours.detach().clone().reshape(theirs.shape)
    x, toward = normal("x", (2, 5, 64)), normal("g", (2, 5, 64))
    ours = torch.autograd.grad(layer(x), [layer.lora.down, layer.lora.up, layer.lora.magnitude], toward)
    theirs = torch.autograd.grad(peer(x), factors, toward)
    for a, b in zip(ours, theirs, strict=True):
        assert (
            a - b.reshape(a.shape)
        ).abs().max() <= 64 * 2**-24 * b.abs().max() * 8  # 64 roundings of sums, in a chain of 8


def test_only_factors_learn_and_every_one_does():
    """SDXL's as well, whose first tower is heard only to its last layer but one."""
    for family in ("sd1", "sd2-base", "sdxl-base"):
        network = model(family)
        factors = attach(network, ALL)
        learn(factors)
        drawn(network).square().mean().backward()
        assert {name for name, p in network.named_parameters() if p.grad is not None} == set(factors)
        assert all(factor.grad.any() for factor in factors.values())


def test_under_autocast_factors_learn_in_float32():
    for dora in (False, True):
        network = model()
        factors = attach(network, replace(ALL, dora=dora))
        exact = drawn(network)
        with torch.autocast("cpu", torch.bfloat16):
            out = drawn(network)
        out.float().square().mean().backward()
        assert (out - exact).abs().max() < 0.2 * exact.abs().max()
        assert all(
            factors[name].grad.dtype == torch.float32 and factors[name].grad.any()
            for name in factors
            if name.endswith(".up")
        )


def test_lengths_are_measured_in_float32_under_autocast():
    """The product of these factors is beyond float16; its direction is not."""
    network = model()
    factors = attach(network, replace(ONE_EACH, dora=True))
    for leaf in ("down", "up"):
        factors[f"{MATRIX}.lora.{leaf}"].data = 1000 * normal(leaf, factors[f"{MATRIX}.lora.{leaf}"].shape)
    layer, x = network.get_submodule(MATRIX), normal("x", (2, 5, 64))
    exact = layer(x)
    with torch.autocast("cpu", torch.float16):
        out = layer(x)
    assert out.dtype == torch.float16
    assert (out - exact).abs().max() <= 64 * 2**-11 * exact.abs().max()  # 64 roundings of a sum


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_layers_compile_as_one_graph(dora: bool):
    network = model()
    learn(attach(network, replace(ONE_EACH, dora=dora)))
    layer, x = network.get_submodule(CONV), normal("x", (1, 64, 6, 6))
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@torch.no_grad()
def test_fast_networks_hear_the_factors():
    network = model()
    learn(attach(network, ALL))
    assert torch.equal(drawn(fast.optimize(network)), drawn(network))


# --- what is made of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
@torch.no_grad()
def test_merging_computes_what_the_attached_model_did(family: str, dora: bool):
    """Within a thousandth of what the change does: float32 keeps far more."""
    network = model(family)
    before = drawn(network)
    learn(attach(network, replace(ALL, dora=dora)))
    attached, learnt = drawn(network), lora_layers.changes(network)
    detach(network)
    assert torch.equal(drawn(network), before)
    merge(network, [(learnt, 1.0)])
    assert (drawn(network) - attached).abs().max() < 1e-3 * (attached - before).abs().max()


def test_detaching_leaves_no_trace():
    network = model()
    before, state = drawn(network), {name: p.clone() for name, p in network.state_dict().items()}
    kinds, own = [type(m) for m in network.modules()], {name: id(p) for name, p in network.named_parameters()}
    inside = [set(vars(m)) | set(m._modules) for m in network.modules()]
    learn(attach(network, replace(ALL, dora=True)))
    detach(network)
    assert [type(m) for m in network.modules()] == kinds
    assert [set(vars(m)) | set(m._modules) for m in network.modules()] == inside
    assert {name: id(p) for name, p in network.named_parameters()} == own
    assert same_bits(network.state_dict(), state)
    assert torch.equal(drawn(network), before)


def test_changes_are_a_copy_and_may_be_of_averages():
    network = model()
    factors = attach(network, ONE_EACH)
    copied = lora_layers.changes(network)
    learn(factors)
    assert not copied[f"{MATRIX}.weight"].up.any()
    averaged = lora_layers.changes(
        network, {name: normal(f"ema {name}", factor.shape) for name, factor in factors.items()}
    )
    assert torch.equal(averaged[f"{MATRIX}.weight"].up, normal(f"ema {MATRIX}.lora.up", (64, 4)))
    assert not averaged[f"{MATRIX}.weight"].up.requires_grad
    assert (averaged[f"{MATRIX}.weight"].alpha, averaged[f"{CONV}.weight"].alpha) == (2.0, 3.0)
    with pytest.raises(ArgumentError, match=r"^ema: it has no .*lora.down; give all that attach returned$"):
        lora_layers.changes(network, {f"{MATRIX}.lora.up": factors[f"{MATRIX}.lora.up"]})


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_training_goes_on_from_what_was_learnt(dora: bool):
    one, other = model(), model()
    learn(attach(one, replace(ALL, dora=dora)))
    learnt = lora_layers.changes(one)
    factors = load_into(other, learnt)
    assert torch.equal(drawn(other), drawn(one))
    assert all(same(change, learnt[name]) for name, change in lora_layers.changes(other).items())
    learn(factors)
    assert all(
        same(change, learnt[name]) for name, change in lora_layers.changes(one).items()
    )  # which shares nothing with them


@pytest.mark.parametrize(
    ("start", "kind", "to"),
    [
        ("shipped", "lora", "kohya"),
        ("shipped", "lora", "diffusers"),
        ("sdxl-base", "dora", "kohya"),
        ("sdxl-base", "dora", "diffusers"),
        ("sdxl-base", "lora", "peft"),
    ],
)
def test_a_saved_lora_is_read_again_bit_by_bit(start: str, kind: str, to: str, tmp_path: Path):
    network = weights.load() if start == "shipped" else model(start)
    learn(attach(network, replace(ALL, dora=kind == "dora")))
    learnt = lora_layers.changes(network)
    detach(network)
    path = weights.save_lora(
        learnt, tmp_path / ("folder" if to == "peft" else "a.safetensors"), network.config, to, metadata={"by": "us"}
    )
    source = read_lora(path, network.config)
    assert source.dialect == to
    assert source.metadata["by"] == "us"
    assert source.metadata["ss_network_dim"] == "Dynamic"
    assert source.changes.keys() == learnt.keys()
    assert all(same(source.changes[name], change) for name, change in learnt.items())
    if to != "peft":
        again = weights.load_lora(path, network.config)
        assert all(same(again[name], change) for name, change in learnt.items())
        state = network.state_dict()
        merge(network, [(again, 1.0)])
        merged = network.state_dict()
        network.load_state_dict(state, assign=True)
        merge(network, [(learnt, 1.0)])
        assert same_bits(network.state_dict(), merged)


def test_rank_and_alpha_are_noted_as_kohya_does(tmp_path: Path):
    for spec in (Spec(4, 2.0), Spec(4, 2.0, dora=True)):
        network = model()
        attach(network, spec)
        path = weights.save_lora(
            lora_layers.changes(network),
            tmp_path / "a.safetensors",
            network.config,
            dtype=torch.float16,
            overwrite=True,
        )
        with weights.open_file(path) as file:
            assert (file.metadata["ss_network_dim"], file.metadata["ss_network_alpha"]) == ("4", "2.0")
            assert {spec.dtype for spec in file.specs.values()} == {torch.float16}


# --- what cannot be done ----------------------------------------------------------------------------------------------


def attached() -> LatentDiffusion:
    network = model()
    attach(network, ONE_EACH)
    return network


def offloaded() -> LatentDiffusion:
    network = model()
    offload(network, torch.device("cpu"))
    return network


def low(r: int, out: int, n: int, mid: Tensor | None = None) -> LowRank:
    return LowRank(torch.ones(r, n), torch.ones(out, r), mid=mid)


def given(name: str, change: object) -> Callable[[], object]:
    return lambda: load_into(model(), Changes({name: change}, "a.safetensors"))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: Spec(0), "rank: 0; give a whole number from 1"),
        (lambda: Spec(1.5), "rank: 1.5; give a whole number from 1"),
        (lambda: Spec(True), "rank: True; give a whole number from 1"),
        (lambda: Spec(conv_rank=-1), "conv_rank: -1; give a whole number from 0"),
        (lambda: Spec(alpha=0.0), "alpha: 0.0; give a positive number, or None for the rank"),
        (lambda: Spec(conv_alpha=math.nan), "conv_alpha: nan; give a positive number, or None for the rank"),
        (lambda: Spec(targets="to_(q"),
            "targets: 'to_(q' is no regular expression: missing ), unterminated subpattern at position 3"),
        (lambda: Spec(unet=False), "neither the UNet nor the text towers are to learn: set unet or text"),
        (lambda: attach(model(), Spec(targets="attn3")),
            "targets: 'attn3' is in the name of no layer of unet; try attn2 or attn1"),
        (lambda: attach(model(), Spec(targets="atn1.to_q")),
            "targets: 'atn1.to_q' is in the name of no layer of unet; try attn1.to_q or attn2.to_q"),
        (lambda: attach(model(), Spec(targets="out_layers.3")),
            "targets: 'out_layers.3' is in the name of convolutions alone; set conv_rank"),
        (lambda: attach(model(), Spec(targets="attn2", text=True)),
            "targets: 'attn2' is in the name of no layer of text; try self_attn or text"),
        (lambda: attach(model("sd2-base"), Spec(targets="layers.2.mlp", unet=False, text=True)),
            "targets: 'layers.2.mlp' is in the name of no layer of text; try layers.1.mlp or layers.0.mlp"),
        (lambda: attach(model("sd-image-variations"), Spec(text=True)),
            "text: a model of family sd-image-variations has no text towers; set text to false"),
        (lambda: attach(attached(), ALL), f"this model has low-rank factors already ({STRIDED}); detach(model) first"),
        (lambda: attach(offloaded(), ALL),
            "this model is offloaded, and its layers cannot be changed meanwhile: undo that first"),
        (lambda: detach(model()), "this model has no low-rank factors; attach(model, spec) makes them"),
        (lambda: lora_layers.changes(model()), "this model has no low-rank factors; attach(model, spec) makes them"),
        (given("unet.out.0.weight", Full(torch.ones(32))),
            "a.safetensors: unet.out.0.weight is no weight of a linear layer or convolution here; it can be merged, "
            "not trained"),
        (given(f"{PROJECTION}.bias", Full(torch.ones(64))),
            f"a.safetensors: {PROJECTION}.bias is no weight of a linear layer or convolution here; it can be merged, "
            "not trained"),
        (given("vae.post_quant_conv.weight", low(1, 4, 4)),
            "a.safetensors: vae.post_quant_conv.weight is no weight of a linear layer or convolution here; it can be "
            "merged, not trained"),
        (given(f"{PROJECTION}.weight", low(1, 32, 64)),
            f"a.safetensors: {PROJECTION}.weight: it changes a weight of [32, 64], the model's is [64, 64, 1, 1]"),
        (given(f"{PROJECTION}.weight", Full(torch.ones(64, 64))),
            f"a.safetensors: {PROJECTION}.weight: only plain low-rank factors and DoRA's can be trained; merge it "
            "instead"),
        (given(f"{PROJECTION}.weight", Decomposed(low(1, 64, 64), torch.ones(1, 64))),
            f"a.safetensors: {PROJECTION}.weight: it is a DoRA with a magnitude per input, and only one per output can "
            "be trained; merge it instead"),
    ],
)  # fmt: skip
def test_what_cannot_learn_is_refused_with_the_reason(attempt: Callable[[], object], message: str):
    with pytest.raises(ArgumentError) as caught:
        attempt()
    assert str(caught.value) == message


def test_a_refused_lora_leaves_the_model_as_it_was():
    network = model()
    with pytest.raises(ArgumentError):
        load_into(network, Changes({f"{MATRIX}.weight": low(1, 64, 64), f"{PROJECTION}.weight": low(1, 32, 64)}))
    assert not any(".lora" in name for name, _ in network.named_modules())
    attach(network, ALL)


def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path: Path):
    config, path = tiny("sd1"), tmp_path / "a.safetensors"
    good = Changes({f"{PROJECTION}.weight": low(1, 64, 64)})
    for changes, to, error, message in (
        (Changes({}), "kohya", ArgumentError, "there is no change to save"),
        (good, "ours", ArgumentError, "to 'ours': there are kohya, diffusers, peft"),
        (
            Changes({"unet.x.weight": low(1, 64, 64)}),
            "kohya",
            ArgumentError,
            "a model of family sd1 has no parameter unet.x.weight; give the config that was trained",
        ),
        (
            Changes({f"{PROJECTION}.weight": low(1, 32, 64)}),
            "kohya",
            ArgumentError,
            r"it changes a weight of \[32, 64\], the model's is",
        ),
        (
            Changes({f"{PROJECTION}.weight": Full(torch.ones(64, 64, 1, 1))}),
            "diffusers",
            FileError,
            "is a full difference, which diffusers cannot hold",
        ),
    ):
        with pytest.raises(error, match=message):
            weights.save_lora(changes, path, config, to)
    with pytest.raises(ArgumentError, match="cannot hold weights"):
        weights.save_lora(good, path, config, dtype=torch.int8)
    assert not path.exists()
    weights.save_lora(good, path, config)
    with pytest.raises(OutputError, match="exists"):
        weights.save_lora(good, path, config)
