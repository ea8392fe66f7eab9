"""Accounts for every key of a file: loaded, ignored for a written reason, or an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ldm.errors import FileError
from weights.names import original as names
from weights.names.layout import WHAT, Layout, reason
from weights.names.places import Place, Shape

RAW = "the moving average was not asked for: ema=True loads it"
AVERAGED = "the moving average was asked for in place of these"

Refuse = Callable[[str, str | None], FileError]  # what is wrong, the tensor concerned -> the error to raise


@dataclass(frozen=True)
class Plan:
    """Where every key of a file goes."""

    sources: Mapping[str, Place]  # our parameter -> what of the file it is
    ignored: Mapping[str, str]  # key in the file -> reason


def plan(
    layout: Layout, wanted: Mapping[str, Shape], found: Mapping[str, Shape], error: Refuse, *, ema: bool = False
) -> Plan:
    """Account for every key of a file whose shapes are `found`: loaded, ignored for a reason, or an error.

    `wanted` are the parameters of the model. `error` makes the FileError: missing, unknown and misshapen tensors are counted,
    the first three are named.
    """
    sources, missing = _sources(layout, wanted, found, error)
    reasons: dict[str, str] = {}
    if layout.averaged is not None:
        averages = {
            ours: names.ema(place.key) for ours, place in sources.items() if place.key.startswith(layout.averaged)
        }
        reasons = dict.fromkeys(averages.values(), RAW)
        if ema:
            _require_ema(averages, found, error)
            reasons = dict.fromkeys((sources[ours].key for ours in averages), AVERAGED)
            sources |= {ours: Place(average) for ours, average in averages.items()}
    elif ema:
        raise error("has no moving average: this layout never holds one; load it with ema=False", None)

    misshapen = [
        (key, place.stored(wanted[ours]), found[key])
        for ours, place in sources.items()
        for key in place.keys
        if not place.fits(found[key], wanted[ours])
    ]
    used, ignored, unknown = {key for place in sources.values() for key in place.keys}, {}, []
    for key in found:
        if key in used:
            continue
        why = reasons.get(key) or reason(layout.ignored, key)
        if why is None:
            unknown.append(key)
        else:
            ignored[key] = why
    if missing or unknown or misshapen:
        raise _unaccounted(missing, unknown, misshapen, error)
    return Plan(sources, ignored)


def _sources(
    layout: Layout, wanted: Mapping[str, Shape], found: Mapping[str, Shape], error: Refuse
) -> tuple[dict[str, Place], list[str]]:
    """The place of every parameter that the file has, and the keys that it lacks. A network that is not there at all is an error."""
    sources: dict[str, Place] = {}
    missing: dict[str, list[str]] = {}  # keys, by the network they belong to
    for ours in wanted:
        places = layout.places(ours)
        there = [place for place in places if all(key in found for key in place.keys)]
        if len(there) > 1:
            raise error(
                f"has {short(there[0].key)} twice, also as {short(there[1].key)}; which is right cannot be known",
                there[1].key,
            )
        if there:
            sources[ours] = there[0]
        else:
            lacking = [key for key in places[0].keys if key not in found] if places else [ours]
            missing.setdefault(_network(ours), []).extend(lacking)
    for network in missing.keys() - {_network(ours) for ours in sources}:
        what = next((what for prefix, what in WHAT.items() if network.startswith(prefix)), network.strip("."))
        theirs = next((part.theirs for part in layout.parts if part.ours == network), None)
        raise error(
            f"has no {what}{f' (no {theirs}* of the names it should have)' if theirs else ''}; use a complete checkpoint",
            None,
        )
    return sources, [*dict.fromkeys(key for keys in missing.values() for key in keys)]


def _network(ours: str) -> str:
    """The prefix of the network that a parameter belongs to."""
    match = re.match(r"text\.\d+\.|\w+\.", ours)
    return match[0] if match else ours


def _require_ema(averages: Mapping[str, str], found: Mapping[str, Shape], error: Refuse) -> None:
    there = sum(average in found for average in averages.values())
    if there == 0:
        leftover = (
            "only its decay and num_updates: the average is already in the weights"
            if "model_ema.decay" in found
            else "no model_ema.* at all"
        )
        raise error(f"has no moving average ({leftover}); load it with ema=False", None)
    if there < len(averages):
        first = next(average for average in averages.values() if average not in found)
        raise error(
            f"has a moving average of {there} of {len(averages)} tensors, {short(first)} is missing; load it with ema=False",
            first,
        )


def _unaccounted(
    missing: list[str], unknown: list[str], misshapen: list[tuple[str, Shape, Shape]], error: Refuse
) -> FileError:
    parts, first = [], None
    if misshapen:
        misshapen = [*dict.fromkeys(misshapen)]
        first = misshapen[0][0]
        shown = ", ".join(f"{short(key)} {list(there)} instead of {list(want)}" for key, want, there in misshapen[:3])
        parts.append(f"{len(misshapen)} of another shape ({shown})")
    if missing:
        first = first or missing[0]
        parts.append(f"{len(missing)} missing ({', '.join(map(short, missing[:3]))})")
    if unknown:
        first = first or unknown[0]
        parts.append(f"{len(unknown)} unknown ({', '.join(map(short, unknown[:3]))})")
    return error(f"tensors {', '.join(parts)}", first)


def short(key: str, limit: int = 34) -> str:
    """The telling end of a long name."""
    return key if len(key) <= limit else "..." + key[3 - limit :]
