"""Prompts to the tokens and the pooled embedding of the text towers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.config import TextConfig
from ldm.errors import ArgumentError
from ldm.tokenizer import tokenize


def encode_text(towers: nn.ModuleList, prompts: Sequence[str], clip_skip: int = 1) -> tuple[Tensor, Tensor]:
    """Prompts -> tokens [b, n, sum of widths] of all towers side by side, and the last tower's pooled embedding [b, d].

    clip_skip  1: the layer each tower was trained to give; n: n - 1 layers earlier, through the same norm
    Raises ArgumentError if a tower has not that many layers.
    """
    tokens, pooled = [], None
    for tower in towers:
        config: TextConfig = tower.config
        skip = config.skip + clip_skip - 1
        if not 1 <= clip_skip <= config.layers - config.skip:
            raise ArgumentError(f"clip skip is {clip_skip}: this text tower gives layers 1 to {config.layers - config.skip} from the end")
        ids = tokenize(prompts, config.length, config.pad).to(tower.text_model.final_layer_norm.weight.device)
        out, pooled = tower(ids, skip, config.norm)
        tokens.append(out)
    return torch.cat(tokens, dim=-1), pooled
