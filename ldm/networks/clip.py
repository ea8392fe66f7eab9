"""The CLIP and OpenCLIP text tower, whose blocks the vision tower shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import TextConfig, VisionConfig
from ldm.networks.modules import Modules

END_OF_TEXT = 49407

# token embeddings that replace those of the ids: rows [k] and places [k] in a batch of ids, and vectors [k, width]
Given = tuple[Tensor, Tensor, Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): what OpenAI's towers were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Multi-head attention; causal: a token sees only those before it and itself."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # [b, n, width]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (rearrange(to(x), "b n (h d) -> b h n d", h=self.heads) for to in projections)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TextConfig | VisionConfig, causal: bool):
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads, causal)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp, config.activation)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEmbeddings(nn.Module):
    """Tokens and their places."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)

    def forward(self, ids: Tensor, given: Given | None = None) -> Tensor:
        x = self.token_embedding(ids)
        if given is not None:
            x = x.index_put(given[:2], given[2].to(x))
        return x + self.position_embedding.weight[: ids.shape[1]]


class CLIPEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: TextConfig | VisionConfig, causal: bool):
        super().__init__()
        self.layers = Modules(Layer(config, causal) for _ in range(config.layers))


class TextModel(nn.Module):
    """What the checkpoints call `text_model`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = CLIPEncoder(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.width)


class CLIPText(nn.Module):
    """CLIP's text tower (Radford et al. 2021, section 2.4), with Hugging Face's parameter names for every tower."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(
        self, ids: Tensor, skip: int = 0, norm: bool = True, given: Given | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids [b, n] -> tokens [b, n, width] and pooled [b, projection or width].

        tokens  after all but the last `skip` blocks, through the final LayerNorm if `norm`
        pooled  after all blocks: final LayerNorm at the first end-of-text, projected where the tower has a projection
        given   token embeddings in place of those of the ids in some places (Gal et al. 2022: textual inversion)

        Original: SD 1 FrozenCLIPEmbedder, SD 2 FrozenOpenCLIPEmbedder, SDXL FrozenOpenCLIPEmbedder2.
        """
        model = self.text_model
        x = model.embeddings(ids, given)
        tokens = x
        for i, layer in enumerate(model.encoder.layers, start=1):
            x = layer(x)
            if i == len(model.encoder.layers) - skip:
                tokens = x
        end = (ids == END_OF_TEXT).int().argmax(dim=1)
        pooled = model.final_layer_norm(x[torch.arange(len(ids), device=ids.device), end])
        if self.config.projection is not None:
            pooled = self.text_projection(pooled)
        return (model.final_layer_norm(tokens) if norm else tokens), pooled
