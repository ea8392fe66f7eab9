"""The same result of a network where half precision overflows, or the GPU's memory ends."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import MemoryLimit, NonFinite
from ldm.model import LatentDiffusion
from ldm.networks.attention import CrossAttention
from ldm.networks.modules import M
from ldm.networks.unet import UNet
from ldm.swap import exchange

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, t, context and y, as `UNet.forward` takes them


@dataclass
class Recovery:
    """What the UNet calls of one run have taken so far, for the next ones."""

    unet: UNet | None = None  # a wider copy, once the model's own has overflowed
    most: int | None = None  # pictures at once, once there was no memory for more
    context: tuple[Tensor, int | None, Tensor] | None = None  # the last one as given, its version, and in the
    # network's type: fast networks keep what they compute from it for as long as it is the same tensor


def recovered(
    model: LatentDiffusion,
    inputs: Inputs,
    run: Callable[[UNet, slice], Tensor],
    out: Tensor | None,
    recovery: Recovery,
    where: str,
) -> Tensor:
    """The UNet's output where the plain call gave one with NaN or infinity (`out`), or none, for lack of memory.

    Not enough memory on the GPU: again in halves of the batch. Not finite in half precision: again with attention in
    float32, then in bfloat16 and in float32, each a copy of the UNet that is kept; the model stays as it is. One
    warning each. Raises NonFinite, which names the first module and the weights it comes from, and MemoryLimit.

    run    (UNet, part of the batch) -> its output in float32
    where  what a message says of this call, such as "at sigma 3"
    """
    x, _, context, y = inputs
    side = "x".join(str(cells * model.config.vae.factor) for cells in reversed(x.shape[2:]))

    def in_parts(unet: UNet) -> Tensor:
        while True:
            size = min(len(x), recovery.most or len(x))
            try:
                return torch.cat([run(unet, slice(i, i + size)) for i in range(0, len(x), size)])
            except torch.OutOfMemoryError:
                pass  # what the failed call holds is free only outside of this
            _lessen(recovery, size, side)

    unet = recovery.unet or model.unet
    if out is None:
        if recovery.most is None:
            _lessen(recovery, len(x), side)
        out = in_parts(unet)
    if is_finite(out):
        return out
    channels = model.config.vae.z_channels
    given = {"x": x[:, :channels], "the context": context, "y": y, "what is concatenated": x[:, channels:]}
    for what, tensor in given.items():
        if tensor is not None and not is_finite(tensor):
            raise NonFinite(
                f"UNet: {where}, {what} has NaN or infinity before the UNet has seen it; "
                "use bfloat16 or float32, or check the weights"
            )
    out, recovery.unet, fault, how = again(
        unet, in_parts, lambda how, module: f"UNet: NaN or infinity {where} {how}, {module}"
    )
    warnings.warn(f"{fault}; computed {how} from here on", stacklevel=6)
    return out


def _lessen(recovery: Recovery, size: int, side: str) -> None:
    """Fewer pictures at once than `size`, for which the memory did not suffice."""
    torch.cuda.empty_cache()
    if size == 1:
        raise MemoryLimit(
            f"UNet: the GPU's memory does not suffice for {side}, one picture and condition at a time; "
            "use a smaller size, or --offload"
        )
    if recovery.most is None:
        warnings.warn(
            f"UNet: the GPU's memory does not suffice for a batch of {size}: it is computed in parts from here on",
            stacklevel=7,
        )
    recovery.most = (size + 1) // 2


class AttendInFloat32(nn.Module):
    """Another attention, computed in float32 whatever comes in: the products of q and k are what overflows first."""

    def __init__(self, attend: nn.Module):
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q.float(), k.float(), v.float()).to(v.dtype)


def is_finite(x: Tensor) -> bool:
    """Whether x holds no NaN and no infinity."""
    return bool(torch.isfinite(x).all())


def dtype_of(network: nn.Module) -> torch.dtype:
    """The type of a network's weights."""
    return next(network.parameters()).dtype


def wider(network: M) -> Iterator[tuple[str, M]]:
    """The same network in ways that overflow later, the cheapest first: what is different, and a copy.

    float16: attention in float32 where there is any (the copy shares the weights), then all in bfloat16, then in
    float32. bfloat16: float32. `network` itself stays as it is.
    """
    dtype = dtype_of(network)
    if dtype == torch.float16:
        attends = [module.attend for module in network.modules() if isinstance(module, CrossAttention)]
        if not all(isinstance(attend, AttendInFloat32) for attend in attends):
            same = _copied(network, {id(t): t for t in (*network.parameters(), *network.buffers())})
            exchange(same, lambda path, attend: AttendInFloat32(attend), where="*.attn?.attend")
            yield "with attention in float32", same
        yield "in bfloat16", converted(network, torch.bfloat16)
    if dtype in (torch.float16, torch.bfloat16):
        yield "in float32", converted(network, torch.float32)


def converted(network: M, dtype: torch.dtype) -> M:
    """A copy with its weights in another type."""
    new: dict[int, Tensor] = {}
    for t in (*network.parameters(), *network.buffers()):
        data = t.detach().to(dtype) if t.is_floating_point() else t.detach()
        new[id(t)] = nn.Parameter(data, requires_grad=False) if isinstance(t, nn.Parameter) else data
    return _copied(network, new)


def _copied(network: M, tensors: Mapping[int, Tensor]) -> M:
    """A copy with these tensors in the place of its own, {id of the old: new}.

    Modules of attention are shared: one that was swapped in, to look at attention, still sees it.
    """
    shared = {id(module.attend): module.attend for module in network.modules() if isinstance(module, CrossAttention)}
    return copy.deepcopy(network, {**tensors, **shared})


class _Found(Exception):
    """Ends a run at the first module whose output is not finite."""


def first_not_finite(network: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first module inside `network` whose output has NaN or infinity; None: no module's has.

    run  calls the network once more
    """
    names = {module: name for name, module in network.named_modules() if name}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not is_finite(out):
            raise _Found(names[module])

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        run()
    except _Found as found:
        return str(found)
    finally:
        for hook in hooks:
            hook.remove()
    return None


def weights_not_finite(network: nn.Module) -> list[str]:
    """The names of the weights with NaN or infinity in them."""
    return [name for name, p in network.named_parameters() if not is_finite(p)]


def blame(network: nn.Module, run: Callable[[], object]) -> str:
    """Where a result that is not finite comes from: the first module, and weights that are not finite themselves."""
    module, weights = first_not_finite(network, run), weights_not_finite(network)
    where = f"first at {module}" if module else "after its last module"
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return f"{where}; weights not finite: {weights[0]}{more}" if weights else where


def again(network: M, run: Callable[[M], Tensor], message: Callable[[str, str], str]) -> tuple[Tensor, M, str, str]:
    """A finite output after one that was not: the output, the copy that gave it, the fault, and how the copy differs.

    run      calls the network, or a copy of it
    message  (in which type, where it begins) -> the fault in words
    Raises NonFinite where no copy gives one, or where the weights themselves are not finite.
    """
    fault = message(f"in {str(dtype_of(network)).removeprefix('torch.')}", blame(network, lambda: run(network)))
    wide = network
    if not weights_not_finite(network):
        for how, wide in wider(network):
            out = run(wide)
            if is_finite(out):
                return out, wide, fault, how
        if wide is not network:
            fault = message(f"even {how}", blame(wide, lambda: run(wide)))
    raise NonFinite(f"{fault}; use other weights")
