"""Less memory for more arithmetic: the backward pass computes a block's activations again (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import ArgumentError
from ldm.networks import clip, vae
from ldm.networks.attention import BasicTransformerBlock
from ldm.networks.unet import ResBlock

# Not SpatialTransformer: computing ten of SDXL's transformer blocks again at once would need the memory of all ten.
BLOCKS = (ResBlock, BasicTransformerBlock, clip.Layer, vae.ResnetBlock, vae.AttnBlock)


@contextmanager
def checkpoint_blocks(model: nn.Module) -> Iterator[None]:
    """While this is open, every block inside `model` keeps its inputs only; its gradients stay bit-equal on the CPU.

    The blocks are those of `BLOCKS`: residual and transformer blocks of UNet, text towers and VAE. They get a `forward`
    of their own, so that classes, parameters and names do not change; it is taken away at the end. Without gradients
    nothing changes. Call it before FSDP's `fully_shard` and DDP. Raises ArgumentError for a model without such a block.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        what = f"{type(model).__name__} has no block to compute again; train without it"
        raise ArgumentError(f"checkpointing: {what}", key="checkpointing")
    for block in blocks:  # nothing random is drawn inside a block
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        vars(block)["forward"] = again
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]  # the class's own is called again
