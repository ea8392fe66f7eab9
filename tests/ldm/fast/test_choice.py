"""Optimised models against the readable ones: the same function around the same parameters, and when which runs."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.golden import relative
from benchmarks.models.seeded import normal
from ldm.changes import lora
from ldm.conditioning.cond import Cond
from ldm.config import FAMILIES
from ldm.denoiser import guided
from ldm.errors import ArgumentError
from ldm.fast import cpu, optimize, plain
from ldm.fast.compiler import CannotCompile
from ldm.fast.networks import FastDecoder, FastEncoder, FastUNet
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.networks.attention import Attend, CrossAttention
from ldm.swap import swap
from samplers import cfg
from tests.made.families import build, tiny
from tests.made.inputs import STATED, inputs
from tests.made.kernels import compiled_only

SAME = 1e-11  # float64, where only the order of sums differs


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_what_the_readable_networks_give(family: str) -> None:
    model = build(tiny(family))
    fast = optimize(model)
    for given in (inputs(model), inputs(model, guided=True), inputs(model, size=(7, 5))):
        assert relative(fast.unet(*given), model.unet(*given)) < STATED
    latent, image = normal("latent", (2, model.config.vae.z_channels, 5, 8)), normal("image", (1, 3, 64, 32))
    assert relative(fast.vae.decode(latent), model.vae.decode(latent)) < STATED
    assert relative(fast.vae.moments(image), model.vae.moments(image)) < STATED


@pytest.mark.parametrize("family", ["sd1", "x4-upscaler", "sdxl-base"])
@torch.no_grad()
def test_in_float64_the_fast_networks_are_the_readable_ones(family: str) -> None:
    """By the plain operations, so that nothing but the order of sums can differ."""
    model = build(tiny(family)).double()
    fast = optimize(model)
    assert fast.unet.ops is plain
    for given in (inputs(model), inputs(model, guided=True), inputs(model, size=(7, 5))):
        given = [None if each is None else each.double() if each.is_floating_point() else each for each in given]
        assert relative(fast.unet(*given), model.unet(*given)) < SAME
    latent = normal("latent", (2, model.config.vae.z_channels, 5, 8)).double()
    assert relative(fast.vae.decode(latent), model.vae.decode(latent)) < SAME


def test_parameters_are_shared_and_the_model_stays_as_it_is(sd1: LatentDiffusion) -> None:
    before = {name: type(module) for name, module in sd1.named_modules()}
    fast = optimize(sd1)
    assert {name: type(module) for name, module in sd1.named_modules()} == before
    ours, theirs = dict(sd1.named_parameters()), dict(fast.named_parameters())
    assert list(ours) == list(theirs)
    assert all(theirs[name] is parameter for name, parameter in ours.items())
    assert isinstance(fast.unet, FastUNet)
    assert isinstance(fast.vae.decoder, FastDecoder)
    assert isinstance(fast.vae.encoder, FastEncoder)
    assert fast.config is sd1.config


@pytest.mark.parametrize("through", ["the model", "the fast one"])
@torch.no_grad()
def test_a_lora_merged_on_one_side_is_seen_on_both(through: str) -> None:
    model = build(tiny("sd1"))
    fast, given = optimize(model), inputs(model)
    before = fast.unet(*given)  # keeps the context's keys and values
    name = next(name for name, module in model.named_modules() if name.endswith("attn2.to_k"))
    weight = model.get_submodule(name).weight
    change = lora.LowRank(normal("down", (4, weight.shape[1])), normal("up", (weight.shape[0], 4)))
    lora.apply(model if through == "the model" else fast, lora.Changes({f"{name}.weight": change}))
    assert relative(fast.unet(*given), before) > 1e-3
    assert relative(fast.unet(*given), model.unet(*given)) < STATED


@compiled_only  # plain operations may round as the readable networks do
def test_who_looks_inside_or_changes_a_part_gets_the_readable_networks(sd1: LatentDiffusion) -> None:
    fast, given = optimize(sd1).unet, inputs(sd1)
    with torch.no_grad():
        readable = sd1.unet(*given)
        assert not torch.equal(
            fast(*given), readable
        )  # it is the fast one that runs, so that what follows says something

        seen: list[Tensor] = []
        hook = fast.middle_block[0].register_forward_hook(lambda module, args, out: seen.append(out))
        assert torch.equal(fast(*given), readable)
        assert len(seen) == 1
        hook.remove()
        assert not torch.equal(fast(*given), readable)

        class Looking(Attend):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                seen.append(q)
                return super().forward(q, k, v)

        layer = next(module for module in fast.modules() if isinstance(module, CrossAttention))
        with swap(fast, lambda path, module: Looking(), where=lambda path, module: module is layer.attend):
            assert torch.equal(fast(*given), readable)
            assert len(seen) == 2
        assert not torch.equal(fast(*given), readable)

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        layer.to_q, query = Doubled(layer.to_q.in_features, layer.to_q.out_features, bias=False), layer.to_q
        layer.to_q.weight = nn.Parameter(query.weight / 2, requires_grad=False)
        assert torch.equal(fast(*given), readable)
        layer.to_q = query

        fast.out[1].forward = lambda x: seen.append(x) or F.silu(x)
        assert torch.equal(fast(*given), readable)
        assert len(seen) == 3
        del fast.out[1].forward
        assert not torch.equal(fast(*given), readable)

        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(*given), sd1.unet(*given))
    x = given[0].clone().requires_grad_()
    fast(x, *given[1:]).sum().backward()
    assert x.grad is not None


def circular(model: LatentDiffusion) -> None:
    model.unet.middle_block[0].in_layers[2].padding_mode = model.vae.decoder.mid.block_1.conv1.padding_mode = "circular"


def another_activation(model: LatentDiffusion) -> None:
    model.unet.out[1] = nn.ReLU()


def no_activation(model: LatentDiffusion) -> None:
    model.unet.out[1] = nn.Identity()


def dropout(model: LatentDiffusion) -> None:
    layer = model.unet.middle_block[0].out_layers[2].train()
    layer.p = 1.0


@pytest.mark.parametrize("change", [circular, another_activation, no_activation, dropout])
@torch.no_grad()
def test_a_part_that_was_changed_does_what_it_was_changed_to(change: Callable[[LatentDiffusion], None]) -> None:
    model = build(tiny("sd1"))
    change(model)
    fast, given, latent = optimize(model), inputs(model), normal("latent", (1, 4, 4, 4))
    assert torch.equal(fast.unet(*given), model.unet(*given))
    assert relative(fast.unet(*given), build(tiny("sd1")).unet(*given)) > 1e-3
    assert relative(fast.vae.decode(latent), model.vae.decode(latent)) < STATED


@torch.no_grad()
def test_a_hook_on_all_modules_sees_them_all(sd1: LatentDiffusion) -> None:
    seen: list[nn.Module] = []
    fast = optimize(sd1)
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module)):
        fast.unet(*inputs(sd1))
    assert fast.unet.middle_block[0] in seen


@pytest.mark.parametrize("which", [0, 2])
def test_gradients_reach_every_input(sd1: LatentDiffusion, which: int) -> None:
    given = [*inputs(sd1)]
    given[which] = given[which].clone().requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(optimize(sd1).unet(*given).sum(), given[which])
        assert gradient.abs().max() > 0
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
    ):  # the only one that has such derivatives
        given[which] = forward_ad.make_dual(given[which].detach(), torch.ones_like(given[which]))
        assert forward_ad.unpack_dual(optimize(sd1).unet(*given)).tangent is not None


@torch.no_grad()
def test_a_trace_records_the_readable_network(sd1: LatentDiffusion) -> None:
    x, t, context, _ = inputs(sd1)
    traced = torch.jit.trace(optimize(sd1).unet, (x, t, context))
    assert relative(traced(x * 2, t, context), sd1.unet(x * 2, t, context)) < STATED


@torch.no_grad()
def test_rows_that_do_not_fit_are_what_the_readable_network_makes_of_them(sd1: LatentDiffusion) -> None:
    fast, (x, t, context, _) = optimize(sd1).unet, inputs(sd1)
    assert torch.equal(fast(x, t, context[:1]), sd1.unet(x, t, context[:1]))
    assert fast(x[:0], t[:0], context[:0]).shape == x[:0].shape
    for n in (3, 4):
        with pytest.raises(RuntimeError):
            fast(x, t, normal("context", (n, 5, 64)))


@torch.no_grad()
def test_tensors_may_lie_as_they_like(sd1: LatentDiffusion) -> None:
    x, t, context, _ = inputs(sd1)
    model = copy.deepcopy(sd1).to(memory_format=torch.channels_last)
    for ours in (context[:1].expand(2, -1, -1), normal("wide", (2, 9, 64))[:, :3], context.mT.contiguous().mT):
        assert relative(optimize(model).unet(x, t, ours), sd1.unet(x, t, ours)) < STATED


def test_a_model_with_hooks_in_it_is_refused_rather_than_robbed_of_them(sd1: LatentDiffusion) -> None:
    hook = sd1.unet.middle_block[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ArgumentError, match="this model has hooks in its networks"):
        optimize(sd1)
    hook.remove()
    hook = sd1.text[0].register_forward_hook(lambda *_: None)
    assert optimize(sd1).text is sd1.text
    hook.remove()


@torch.no_grad()
def test_an_optimised_model_can_be_optimised_again(sd1: LatentDiffusion) -> None:
    wide = optimize(copy.deepcopy(optimize(sd1)).double())
    assert (wide.unet.ops, wide.unet.made_for) == (plain, ("cpu", torch.float64))
    assert relative(optimize(optimize(sd1)).unet(*inputs(sd1)), sd1.unet(*inputs(sd1))) < STATED


@torch.no_grad()
def test_threads_that_share_a_model_get_their_own_contexts(sd1: LatentDiffusion) -> None:
    unet, contexts = optimize(sd1).unet, [normal(name, (1, 3, 64)) for name in "ab"]
    wanted = [unet.keys_values(context)[0][0].clone() for context in contexts]

    def wrong(which: int) -> int:
        return sum(not torch.equal(unet.keys_values(contexts[which])[0][0], wanted[which]) for _ in range(1500))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(wrong, (0, 1))) == 0
    finally:
        sys.setswitchinterval(before)


@torch.no_grad()
def test_after_a_move_to_another_type_the_readable_networks_run(sd1: LatentDiffusion) -> None:
    fast = copy.deepcopy(optimize(sd1)).double()
    x, t, context, _ = inputs(sd1)
    given = x.double(), t, context.double()
    assert torch.equal(fast.unet(*given), build(tiny("sd1")).double().unet(*given))
    latent = normal("latent", (1, 4, 4, 4)).double()
    assert torch.equal(fast.vae.decode(latent), build(tiny("sd1")).double().vae.decode(latent))


@torch.no_grad()
def test_where_half_precision_overflows_it_is_found_and_computed_again(sd1: LatentDiffusion) -> None:
    half = copy.deepcopy(sd1).half()
    half.unet.middle_block[0].in_layers[2].weight.mul_(3e5)
    fast = optimize(half)
    cond = Cond(normal("context", (1, 5, 64)))
    for model in (half, fast):
        with pytest.warns(UserWarning, match=r"first at middle_block\.0.*computed in bfloat16"):
            assert guided(model, [cond, cond], cfg(2.0))(normal("x", (1, 4, 8, 8)), 1.0).isfinite().all()


@torch.no_grad()
def test_large_pictures_decode_in_strips_by_the_readable_networks(sd1: LatentDiffusion) -> None:
    latent = normal("latent", (1, 4, 16, 16))
    ours, theirs = (precision.decode(model, latent, tile=64) for model in (optimize(sd1), sd1))
    assert relative(ours, theirs) < STATED


@torch.no_grad()
def test_without_a_compiler_the_plain_operations_run_and_a_warning_says_so(
    sd1: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def library() -> None:
        raise CannotCompile("no C++ compiler: g++, c++ not found, $CXX not set")

    monkeypatch.setattr(cpu, "library", library)
    with pytest.warns(
        UserWarning,
        match=r"^fast: no C\+\+ compiler.*plain PyTorch instead, which is slower; install g\+\+ or set CXX$",
    ):
        fast = optimize(sd1)
    assert fast.unet.ops is plain
    assert relative(fast.unet(*inputs(sd1)), sd1.unet(*inputs(sd1))) < STATED


@compiled_only
def test_with_one_nothing_is_said(sd1: LatentDiffusion) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize(sd1)
