"""Networks that rest in one memory and run in another: the same results, and never two of them there.

Without a GPU the other memory is a copy: a network is there when its tensors are not where they rested.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weights
from benchmarks.models.golden import DEPTH_TINY, VISION_TINY
from benchmarks.models.seeded import normal
from ldm.config import DepthConfig, VisionConfig
from ldm.denoiser import guided
from ldm.errors import ArgumentError
from ldm.limits import offload as offloading
from ldm.limits import precision
from ldm.limits.offload import offload
from ldm.model import LatentDiffusion
from ldm.networks.dpt import DPT
from ldm.networks.vision import CLIPVision
from samplers import cfg

CPU = torch.device("cpu")


@pytest.fixture
def model() -> LatentDiffusion:
    return weights.load()


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The copies that stand for tensors on a GPU, in the order of their making."""
    copies: list[Tensor] = []

    def carry(value: Tensor, device: torch.device) -> Tensor:
        copies.append(value.clone())
        return copies[-1]

    monkeypatch.setattr(offloading, "_carried", carry)
    return copies


def picture(model: LatentDiffusion) -> Tensor:
    """All of a small task: text, one step of guidance, decoding in strips, encoding."""
    conds = [model.condition([prompt], (64, 64)) for prompt in ("", "a red cube")]
    x0 = guided(model, conds, cfg(3.0))(5 * normal("x", model.latent_shape(1, 64, 64)), 5.0)
    return precision.encode(model, precision.decode(model, x0, tile=32))


def networks(model: LatentDiffusion) -> dict[str, nn.Module]:
    return {**{f"text.{i}": tower for i, tower in enumerate(model.text)}, "unet": model.unet, "vae": model.vae}


def watched(model: LatentDiffusion) -> list[tuple[str, list[str]]]:
    """Which network ran, and which were not where they rested, at every call of a convolution or matrix."""
    seen: list[tuple[str, list[str]]] = []
    resting = {name: {p: p.data_ptr() for p in network.parameters()} for name, network in networks(model).items()}

    def away(name: str) -> bool:
        moved = {p.data_ptr() != place for p, place in resting[name].items()}
        assert len(moved) == 1, "half a network is away"
        return moved.pop()

    for name, network in networks(model).items():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(
                    lambda module, args, out, name=name: seen.append((name, [each for each in resting if away(each)]))
                )
    return seen


def test_the_result_is_bit_for_bit_the_same_and_one_network_at_a_time_is_there(
    model: LatentDiffusion, carried: list[Tensor]
) -> None:
    plain = picture(model)
    undo = offload(model, CPU)
    seen = watched(model)
    assert torch.equal(picture(model), plain)
    assert {name for name, _ in seen} == set(networks(model))
    assert all(away == [name] for name, away in seen)
    order = [name for i, (name, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != name]
    assert order == ["text.0", "unet", "vae"]
    assert len(carried) == sum(1 for _ in model.state_dict())
    undo()


def test_undone_nothing_is_left_of_it(model: LatentDiffusion, carried: list[Tensor]) -> None:
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    undo = offload(model, CPU)
    model.condition(["a red cube"], (64, 64))
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} != places
    undo()
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == places
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.runs_on is None
    count = len(carried)
    picture(model)
    assert len(carried) == count


def test_several_models_share_the_place(model: LatentDiffusion, carried: list[Tensor]) -> None:
    other = weights.load()
    offload([model, other], CPU)
    resting = {id(each): each.unet.out[2].weight.data_ptr() for each in (model, other)}
    cond, x = model.condition([""], (64, 64)), normal("x", model.latent_shape(1, 64, 64))
    for each, rest in ((model, other), (other, model), (model, other)):
        guided(each, [cond, cond], cfg(0.0))(x, 1.0)
        assert each.unet.out[2].weight.data_ptr() != resting[id(each)]
        assert rest.unet.out[2].weight.data_ptr() == resting[id(rest)]


def test_what_is_not_offloaded_moves_to_the_device_at_once(model: LatentDiffusion) -> None:
    undo = offload(model, torch.device("meta"), networks=["text"])
    assert model.device == torch.device("meta")
    assert {p.device.type for p in (*model.unet.parameters(), *model.vae.parameters())} == {"meta"}
    assert {p.device.type for p in model.text.parameters()} == {"cpu"}
    undo()


def test_the_model_says_where_it_runs_and_what_it_is_given_comes_with_it(
    model: LatentDiffusion, carried: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, asked = torch.device("meta"), []
    monkeypatch.setattr(offloading, "_moved", lambda given, device: asked.append((given, device)) or given)
    undo = offload(model, meta)
    assert model.device == meta
    ids, given = (
        torch.zeros(1, model.config.text[0].length, dtype=torch.long),
        (torch.tensor([0]), torch.tensor([1]), torch.zeros(1, model.config.text[0].width)),
    )
    model.text[0](ids, given=given)
    (((args, keywords), device),) = asked
    assert device == meta
    assert args[0] is ids
    assert keywords["given"] is given
    undo()
    assert model.device == CPU


def test_tensors_are_moved_wherever_they_are() -> None:
    x = torch.zeros(2)
    (a, (b, three)), keywords = offloading._moved(((x, (x, 3)), {"given": (x, None)}), torch.device("meta"))
    assert {each.device.type for each in (a, b, keywords["given"][0])} == {"meta"}
    assert (three, keywords["given"][1]) == (3, None)


@pytest.mark.parametrize(("kind", "config"), [(CLIPVision, VISION_TINY), (DPT, DEPTH_TINY)])
@torch.no_grad()
def test_vision_and_depth_come_too(
    model: LatentDiffusion, carried: list[Tensor], kind: type[nn.Module], config: VisionConfig | DepthConfig
) -> None:
    network = kind(config).eval()
    setattr(model, {CLIPVision: "vision", DPT: "depth"}[kind], network)
    image = normal("image", (1, 3, config.image, config.image))
    plain = network(image)
    undo = offload(model, CPU)
    resting = [p.data_ptr() for p in network.parameters()]
    assert torch.equal(network(image), plain)
    assert all(p.data_ptr() != place for p, place in zip(network.parameters(), resting, strict=True))
    undo()


def test_a_network_that_does_not_fit_leaves_nothing_there(
    model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    count = 0

    def carry(value: Tensor, device: torch.device) -> Tensor:
        nonlocal count
        count += 1
        if count == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value.clone()

    monkeypatch.setattr(offloading, "_carried", carry)
    offload(model, CPU)
    with pytest.raises(torch.OutOfMemoryError):
        model.condition(["a red cube"], (64, 64))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    picture(model)  # the next attempt brings all of it


def test_overflow_is_done_again_in_an_offloaded_network(model: LatentDiffusion, carried: list[Tensor]) -> None:
    model.half()
    with torch.no_grad():
        model.unet.input_blocks[0][0].weight.mul_(8e4)
    offload(model, CPU)
    cond, x = model.condition([""], (64, 64)), normal("x", model.latent_shape(1, 64, 64))
    denoise = guided(model, [cond, cond], cfg(0.0))
    with pytest.warns(UserWarning, match="in bfloat16 from here on"):
        assert torch.isfinite(denoise(x, 3.0)).all()
    precision.decode(model, x)
    assert torch.isfinite(denoise(x, 2.0)).all()


def test_what_cannot_be_offloaded_is_refused(model: LatentDiffusion, carried: list[Tensor]) -> None:
    with pytest.raises(ArgumentError, match=r"networks: \['clip'\] unknown; all: text vision depth unet vae"):
        offload(model, CPU, ["clip", "unet"])
    offload(model, CPU)
    with pytest.raises(ArgumentError, match="offloaded already"):
        offload(model, CPU)


@pytest.mark.gpu
def test_on_a_gpu_only_the_running_network_takes_memory(model: LatentDiffusion) -> None:
    device = torch.device("cuda")
    plain = picture(weights.load(device=device))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    undo = offload(model, device)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(picture(model), plain)
    held = torch.cuda.memory_allocated() - before
    size = sum(p.numel() * p.element_size() for p in model.vae.parameters())  # the last to run
    assert size <= held < size + 2**22  # blocks of 512 bytes, and what cuDNN keeps
    undo()
    assert {p.device.type for p in model.parameters()} == {"cpu"}
