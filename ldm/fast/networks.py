"""The networks in fused operations on channels-last data: the same modules and parameters, another forward pass.

The readable one runs where somebody looks inside (a hook, another `Attend`, a gradient) or has changed a part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ldm.fast import plain
from ldm.networks import attention, unet, vae

MadeFor = tuple[str, torch.dtype] | None  # the kind of device and type that the operations are for; None: all
KeysValues = Sequence[tuple[Tensor, Tensor]]  # of the cross-attention layers of a network, in their order


class KeptContext(NamedTuple):
    """Keys and values, and the tensors that they were computed from, held so that no other takes a place in memory."""

    keys_values: KeysValues
    read: Sequence[Tensor]
    state: Sequence[tuple[object, ...]]  # of the tensors that were read


class Fast:
    """The attributes of fast networks besides the modules of the readable ones."""

    ops: ModuleType = plain
    made_for: MadeFor = None


class FastUNet(Fast, unet.UNet):
    """`UNet` in the operations of a backend.

    The keys and values of a context do not depend on x, and are kept until another context is given. The two halves of
    a guided batch are the same until the first cross-attention, and are computed once until then.
    """

    shares: bool = True  # look for equal halves: a comparison, for which a GPU would have to be waited for
    _kept: KeptContext | None = None

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """As `UNet.forward`."""
        if not runs(self, x, t, context, y):
            return super().forward(x, t, context, y)
        half = len(x) // 2
        if self.shares and y is None and len(x) % 2 == 0 and _equal_halves(x) and _equal_halves(t):
            x, t = x[:half], t[:half]
        return self.predict(x, t, self.keys_values(context), y)

    def keys_values(self, context: Tensor) -> KeysValues:
        """The keys and values of a context, computed when the context or the weights are not those of the last call."""
        layers = _cross_attentions(self)
        read = [context, *(to.weight for layer in layers for to in (layer.to_k, layer.to_v))]
        state = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), _version(tensor)) for tensor in read]
        kept = self._kept  # read once: another thread may put its own here
        if kept is None or kept.state != state or any(tensor.is_inference() for tensor in read):
            linear, context = self.ops.linear, context.contiguous()
            made = [(linear(context, layer.to_k.weight), linear(context, layer.to_v.weight)) for layer in layers]
            self._kept = kept = KeptContext(made, read, state)
        return kept.keys_values

    def predict(self, x: Tensor, t: Tensor, keys_values: KeysValues, y: Tensor | None = None) -> Tensor:
        """`forward` with keys and values in the place of the context.

        Their batch may be a multiple of x's, whose rows then repeat.
        """
        of_layer = dict(zip(_cross_attentions(self), keys_values, strict=True))
        batch = len(keys_values[0][0])
        emb = self.time_embed(unet.timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        emb = F.silu(emb)

        def run(block: unet.Block, x: Tensor, size: Sequence[int] = (0, 0)) -> Tensor:
            for layer in block:
                if isinstance(layer, unet.ResBlock):
                    x = _res_block(self.ops, layer, x, _repeated(emb, len(x)))
                elif isinstance(layer, attention.SpatialTransformer):
                    x = _transformer(self.ops, layer, x, of_layer)
                elif isinstance(layer, unet.Upsample):
                    x = self.ops.conv_up(x, layer.conv, size)
                else:
                    x = self.ops.conv(x, getattr(layer, "op", layer))
            return x

        x = _channels_last(x)
        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = torch.cat([_repeated(x, batch), _repeated(skips.pop(), batch)], dim=-1)
            x = run(block, x, size=skips[-1].shape[1:3] if skips else x.shape[1:3])
        norm, _, conv = self.out
        return _channels_first(self.ops.conv(self.ops.norm(x, norm, silu=True), conv))


class FastDecoder(Fast, vae.Decoder):
    """`Decoder` in the operations of a backend."""

    def forward(self, z: Tensor) -> Tensor:
        """As `Decoder.forward`."""
        if not runs(self, z):
            return super().forward(z)
        x = _middle(self.ops, self.mid, self.ops.conv(_channels_last(z), self.conv_in))
        for level in reversed(self.up):
            for block in level.block:
                x = _resnet_block(self.ops, block, x)
            if level.upsample is not None:
                x = self.ops.conv_up(x, level.upsample.conv, (2 * x.shape[1], 2 * x.shape[2]))
        return _channels_first(self.ops.conv(self.ops.norm(x, self.norm_out, silu=True), self.conv_out))


class FastEncoder(Fast, vae.Encoder):
    """`Encoder` in the operations of a backend."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Encoder.forward`."""
        if not runs(self, x):
            return super().forward(x)
        x = self.ops.conv(_channels_last(x), self.conv_in)
        for level in self.down:
            for block in level.block:
                x = _resnet_block(self.ops, block, x)
            if level.downsample is not None:
                x = self.ops.conv(F.pad(x, (0, 0, 0, 1, 0, 1)), level.downsample.conv)
        h = self.ops.norm(_middle(self.ops, self.mid, x), self.norm_out, silu=True)
        return _channels_first(self.ops.conv(h, self.conv_out))


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _res_block(ops: ModuleType, block: unet.ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    """The block for x [b, h, w, c] and emb [b, e] after its SiLU."""
    norm1, _, conv1 = block.in_layers
    norm2, _, _, conv2 = block.out_layers
    _, project = block.emb_layers
    h = ops.conv(ops.norm(x, norm1, silu=True), conv1, add=F.linear(emb, project.weight, project.bias))
    return ops.conv(ops.norm(h, norm2, silu=True), conv2, add=_shortcut(ops, block.skip_connection, x))


def _transformer(
    ops: ModuleType,
    layer: attention.SpatialTransformer,
    x: Tensor,
    of_layer: Mapping[attention.CrossAttention, tuple[Tensor, Tensor]],
) -> Tensor:
    tokens = ops.linear(ops.norm(x, layer.norm).flatten(1, 2), layer.proj_in.weight.flatten(1), layer.proj_in.bias)
    for block in layer.transformer_blocks:
        h = ops.layer_norm(tokens, block.norm1)
        if block.cross_only:
            tokens = _cross_attention(ops, block.attn1, h, of_layer[block.attn1], tokens)
        else:
            of = block.attn1
            q, k, v = (ops.linear(h, to.weight) for to in (of.to_q, of.to_k, of.to_v))
            tokens = ops.linear(ops.attend(q, k, v, of.heads), of.to_out[0].weight, of.to_out[0].bias, add=tokens)
        tokens = _cross_attention(ops, block.attn2, ops.layer_norm(tokens, block.norm2), of_layer[block.attn2], tokens)
        inner, _, outer = block.ff.net
        h = ops.geglu(ops.layer_norm(tokens, block.norm3), inner.proj.weight, inner.proj.bias)
        tokens = ops.linear(h, outer.weight, outer.bias, add=tokens)
    x = _repeated(x, len(tokens))
    y = ops.linear(tokens, layer.proj_out.weight.flatten(1), layer.proj_out.bias, add=x.flatten(1, 2))
    return y.view(x.shape)


def _cross_attention(
    ops: ModuleType, layer: attention.CrossAttention, h: Tensor, keys_values: tuple[Tensor, Tensor], tokens: Tensor
) -> Tensor:
    """tokens + attention of h to the context, from which on the rows of the batch differ."""
    keys, values = keys_values
    h = ops.attend(_repeated(ops.linear(h, layer.to_q.weight), len(keys)), keys, values, layer.heads)
    return ops.linear(h, layer.to_out[0].weight, layer.to_out[0].bias, add=_repeated(tokens, len(keys)))


def _equal_halves(x: Tensor) -> bool:
    return torch.equal(x[: len(x) // 2], x[len(x) // 2 :])


def _repeated(x: Tensor, batch: int) -> Tensor:
    """x repeated up to the size of a batch whose parts have the same rows."""
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))


def _resnet_block(ops: ModuleType, block: vae.ResnetBlock, x: Tensor) -> Tensor:  # x [b, h, w, c]
    h = ops.conv(ops.norm(x, block.norm1, silu=True), block.conv1)
    return ops.conv(ops.norm(h, block.norm2, silu=True), block.conv2, add=_shortcut(ops, block.nin_shortcut, x))


def _middle(ops: ModuleType, middle: vae.Middle, x: Tensor) -> Tensor:
    x = _resnet_block(ops, middle.block_1, x)
    of = middle.attn_1
    tokens = x.flatten(1, 2)
    h = ops.norm(tokens, of.norm)
    q, k, v = (ops.linear(h, to.weight.flatten(1), to.bias) for to in (of.q, of.k, of.v))
    x = ops.linear(ops.attend(q, k, v, 1), of.proj_out.weight.flatten(1), of.proj_out.bias, add=tokens).view(x.shape)
    return _resnet_block(ops, middle.block_2, x)


def _shortcut(ops: ModuleType, to: nn.Module, x: Tensor) -> Tensor:
    return ops.linear(x, to.weight.flatten(1), to.bias) if isinstance(to, nn.Conv2d) else x


OURS = [kind for file in (attention, unet, vae) for kind in vars(file).values() if isinstance(kind, type)]
PARTS = {
    nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Dropout, nn.Identity, nn.Embedding,
    nn.Sequential, nn.ModuleList, *(kind for kind in OURS if issubclass(kind, nn.Module)),
}  # fmt: skip


def runs(network: nn.Module, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the operations are for these inputs and do all that is asked: no gradient, trace, hook, changed part."""
    given = [tensor for tensor in (x, *others) if tensor is not None]
    if len(x) == 0 or any(len(tensor) != len(x) for tensor in given):
        return False
    if network.made_for not in (None, (x.device.type, x.dtype)) or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *network.parameters())):
        return False
    if any(type(tensor) is not Tensor or forward_ad.unpack_dual(tensor).tangent is not None for tensor in given):
        return False
    modules = [*network.modules()]
    shortcuts = {module._modules.get(name) for module in modules for name in ("skip_connection", "nin_shortcut")}
    return all(_readable(module) and (type(module) is not nn.Identity or module in shortcuts) for module in modules)


def _readable(module: nn.Module) -> bool:
    """Whether a module computes what its file says."""
    if isinstance(module, Fast):
        return True
    if type(module) not in PARTS or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if isinstance(module, nn.Conv2d):
        return module.padding_mode == "zeros"
    return not (isinstance(module, nn.Dropout) and module.p and module.training)


def _cross_attentions(network: unet.UNet) -> list[attention.CrossAttention]:
    """The layers that attend to the context."""
    blocks = [module for module in network.modules() if isinstance(module, attention.BasicTransformerBlock)]
    return [block.attn2 for block in blocks] + [block.attn1 for block in blocks if block.cross_only]


def _version(tensor: Tensor) -> int:
    """How often a tensor was written in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
