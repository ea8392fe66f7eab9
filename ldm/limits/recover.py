"""Where NaN and infinity come from in a network, and the same network in types of numbers that overflow later."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import NonFinite
from ldm.networks.attention import CrossAttention


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


def wider(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The same network in ways that overflow later, the cheapest first: what is different, and a copy; `network` itself stays as it is.

    float16 -> attention in float32 where there is any (shares the weights), then all in bfloat16, then in float32; bfloat16 -> float32.
    """
    dtype = dtype_of(network)
    if dtype == torch.float16:
        if any(
            isinstance(module, CrossAttention) and not isinstance(module.attend, AttendInFloat32)
            for module in network.modules()
        ):
            yield "with attention in float32", _attending_in_float32(network)
        yield "in bfloat16", converted(network, torch.bfloat16)
    if dtype in (torch.float16, torch.bfloat16):
        yield "in float32", converted(network, torch.float32)


def converted(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its weights in another type."""
    tensors = [*network.parameters(), *network.buffers()]
    return _copied(
        network, {id(t): _like(t, t.detach().to(dtype) if t.is_floating_point() else t.detach()) for t in tensors}
    )


def _like(old: Tensor, data: Tensor) -> Tensor:
    return nn.Parameter(data, requires_grad=False) if isinstance(old, nn.Parameter) else data


def _attending_in_float32(network: nn.Module) -> nn.Module:
    same = _copied(network, {id(t): t for t in (*network.parameters(), *network.buffers())})
    for module in [*same.modules()]:
        if isinstance(module, CrossAttention):
            module.attend = AttendInFloat32(module.attend)
    return same


def _copied(network: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy with these tensors in the place of its own, {id of the old: new}. Attention is shared: who has swapped it in to look at it still does."""
    shared = {id(module.attend): module.attend for module in network.modules() if isinstance(module, CrossAttention)}
    return copy.deepcopy(network, {**tensors, **shared})


# --- who did it -----------------------------------------------------------------------------------------------------


class _Found(Exception):
    """Ends a run at the first module whose output is not finite."""


def first_not_finite(network: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first module inside `network` whose output has NaN or infinity when `run`, which calls it, is run again; None: none has."""
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
    """Where a result that is not finite comes from, in words: the first module, and any weights that were not finite to begin with."""
    module, weights = first_not_finite(network, run), weights_not_finite(network)
    where = f"first at {module}" if module else "after its last module"
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return f"{where}; weights not finite: {weights[0]}{more}" if weights else where


# --- again, wider -----------------------------------------------------------------------------------------------------


def again(
    network: nn.Module, run: Callable[[nn.Module], Tensor], wrong: Callable[[str, str], str]
) -> tuple[Tensor, nn.Module, str, str]:
    """A finite output after one that was not: the output, the wider copy that gave it, what had gone wrong, and how the copy differs.

    run    calls the network, or a copy of it
    wrong  (in which type, where it begins) -> the words of a person who is told
    Raises NonFinite where no copy gives one, or where the weights themselves are not finite.
    """
    said, wide = (
        wrong(f"in {str(dtype_of(network)).removeprefix('torch.')}", blame(network, lambda: run(network))),
        network,
    )
    if not weights_not_finite(network):
        for how, wide in wider(network):
            out = run(wide)
            if is_finite(out):
                return out, wide, said, how
        if wide is not network:
            said = wrong(f"even {how}", blame(wide, lambda: run(wide)))
    raise NonFinite(f"{said}; use other weights")
