"""Whether a network predicts eps or v, asked of the network itself: it is run once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm.config import ModelConfig
from ldm.errors import FileError
from ldm.networks.unet import UNet
from weights.names.prediction import Finding, clash, predicting

EPS_OUTPUT, V_OUTPUT = -0.5, -1.0  # of `response`: above the first eps, below the second v


def settle_by_output(finding: Finding, unet: UNet, refuse: Callable[[str], FileError]) -> ModelConfig:
    """The config; of a finding in doubt, once the network itself has been asked.

    Raises AmbiguousCheckpoint when its answer is no clear one either.
    """
    if finding.doubt is None:
        return finding.config
    answer = response(unet)
    if answer < V_OUTPUT:
        return predicting(finding.config, "v")
    if answer > EPS_OUTPUT:
        return predicting(finding.config, "eps")
    raise clash(
        f"may predict eps or v (norm1.bias std {finding.doubt:.3f}, test output {answer:.2f}: both in between)", refuse
    )


@torch.no_grad()
def response(unet: UNet) -> float:
    """Mean of what the network adds to a constant 0.5 at the last timestep.

    About 0 if it predicts eps, which is nearly x there; below -1 if v.
    """
    like = unet.time_embed[0].weight
    x = torch.full((1, unet.config.in_channels, 8, 8), 0.5, dtype=like.dtype, device=like.device)
    context = torch.full((1, 2, unet.config.context_dim), 0.5, dtype=like.dtype, device=like.device)
    out = unet(x, torch.full((1,), 999.0, device=like.device), context)
    return (out.float() - x.float()).mean().item()
