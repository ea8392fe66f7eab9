"""Activations that are computed again: the same gradients, less that is kept, and no trace afterwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.models.golden import tiny_clip_l, tiny_unet, tiny_vae
from benchmarks.models.seeded import normal
from ldm.errors import ArgumentError
from ldm.networks.attention import BasicTransformerBlock
from ldm.train.checkpointing import BLOCKS, checkpoint_blocks


def unet_loss(unet: nn.Module) -> Tensor:
    context = normal("context", (2, 7, 64)).requires_grad_()
    return unet(normal("x", (2, 4, 16, 16)), torch.tensor([10, 900]), context).square().mean()


def vae_loss(vae: nn.Module) -> Tensor:
    return vae.decode(vae.encode(normal("image", (1, 3, 32, 32)))).square().mean()


def text_loss(text: nn.Module) -> Tensor:
    tokens, pooled = text(torch.tensor([[49406, 320, 1125, 49407]]))
    return tokens.square().mean() + pooled.square().mean()


CASES = {
    "unet": (lambda: tiny_unet("sd2-tiny"), unet_loss),
    "vae": (lambda: tiny_vae("vae-f8-tiny"), vae_loss),
    "text": (tiny_clip_l, text_loss),
}


def gradients(network: nn.Module, loss) -> tuple[dict[str, Tensor], int]:
    """The gradient of every parameter, and how many bytes were kept for it outside the blocks that are computed
    again."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    network.requires_grad_(True).zero_grad(set_to_none=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(network)
    value.backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_bit_equal_and_less_is_kept(case):
    build, loss = CASES[case]
    network = build()
    plain, much = gradients(network, loss)
    with checkpoint_blocks(network):
        again, little = gradients(network, loss)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert little < much / 2


def test_every_block_is_computed_twice_with_gradients_and_once_without():
    unet = tiny_unet("sd2-tiny").requires_grad_(True)
    calls = []
    for block in unet.modules():
        if isinstance(block, BLOCKS):
            block.register_forward_hook(lambda *_: calls.append("hook"))  # hooks are outside of what is computed again
    norms = [block.norm1 for block in unet.modules() if isinstance(block, BasicTransformerBlock)]
    for norm in norms:
        norm.register_forward_hook(lambda *_: calls.append("norm"))
    with checkpoint_blocks(unet):
        unet_loss(unet).backward()
        assert calls.count("norm") == 2 * len(norms)
        assert calls.count("hook") == sum(isinstance(block, BLOCKS) for block in unet.modules())
        calls.clear()
        with torch.no_grad():
            unet_loss(unet)
        assert calls.count("norm") == len(norms)


def test_names_and_classes_stay_and_nothing_is_left_even_after_an_error():
    unet = tiny_unet("sd2-tiny")
    before = {name: (type(module), set(vars(module))) for name, module in unet.named_modules()}
    state = list(unet.state_dict())
    with checkpoint_blocks(unet):
        assert list(unet.state_dict()) == state
        assert {name: type(module) for name, module in unet.named_modules()} == {
            name: kind for name, (kind, _) in before.items()
        }
    assert {name: (type(module), set(vars(module))) for name, module in unet.named_modules()} == before
    with pytest.raises(ZeroDivisionError), checkpoint_blocks(unet):
        raise ZeroDivisionError
    assert {name: (type(module), set(vars(module))) for name, module in unet.named_modules()} == before


def test_the_precision_of_autocast_holds_in_what_is_computed_again():
    text = tiny_clip_l()

    def loss(network: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return text_loss(network)

    plain, _ = gradients(text, loss)
    with checkpoint_blocks(text):
        again, _ = gradients(text, loss)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_network_without_blocks_is_refused():
    with (
        pytest.raises(ArgumentError, match="Linear has no block to compute again; train without it"),
        checkpoint_blocks(nn.Linear(2, 2)),
    ):
        pass
