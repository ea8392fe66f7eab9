"""LoRA: every kind against plain algebra, every spelling against the published names, and what a merge may not touch."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import weights
from benchmarks.models.seeded import normal
from ldm.changes.lora import (
    Change,
    Changes,
    Decomposed,
    Full,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    apply,
    delta,
    merge,
)
from ldm.config import FAMILIES, ModelConfig
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from tests.made.checkpoints import TINY, save_safetensors, save_zip
from weights.adapters import names as lora_names
from weights.adapters.read import load_lora
from weights.names.diffusers import diffusers_unet

GOLDEN = Path(__file__).parents[2] / "golden" / "lora"
FAMILY = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl-base", "ssd-1b": "ssd-1b"}  # manifest -> key of FAMILIES
SDXL_TINY = replace(TINY, name="sdxl-base", text=(TINY.text[0], replace(TINY.text[0], projection=48)))
WEIGHT, KERNEL = normal("w", (12, 8)), normal("k", (12, 8, 3, 3))


def close(ours: Tensor, exact: Tensor) -> bool:
    """Within what float32 loses: 64 roundings (no sum here is longer) of the largest number."""
    assert ours.dtype == torch.float32
    return (ours.double() - exact).abs().max().item() <= 64 * 2**-24 * exact.abs().max().item()


# --- the kinds, recomputed in float64 ---------------------------------------------------------------------------------


def test_lora_of_a_matrix_is_up_times_down_times_alpha_over_rank():
    down, up = normal("d", (4, 8)), normal("u", (12, 4))
    exact = sum(torch.outer(up.double()[:, i], down.double()[i]) for i in range(4))
    assert close(delta(LowRank(down, up, 2.0), WEIGHT), exact * 2 / 4)
    assert close(delta(LowRank(down, up), WEIGHT), exact)  # no alpha: alpha is the rank
    assert close(
        delta(LowRank(down[:, :, None, None], up[:, :, None, None]), WEIGHT), exact
    )  # stored as 1x1 convolutions
    assert torch.equal(delta(LowRank(down, up), WEIGHT[:, :, None, None])[:, :, 0, 0], delta(LowRank(down, up), WEIGHT))


@pytest.mark.parametrize("mid", [False, True])
def test_lora_of_a_convolution_does_what_its_layers_do_in_a_row(mid: bool):
    """The factors as the layers that they were trained as: a convolution down, perhaps one between, a 1x1 one up."""
    x = normal("x", (1, 8, 6, 6)).double()
    down, up, core = (
        normal("d", (4, 8, 1, 1) if mid else (4, 8, 3, 3)),
        normal("u", (12, 4, 1, 1)),
        normal("m", (4, 4, 3, 3)),
    )
    layers = (
        F.conv2d(F.conv2d(F.conv2d(x, down.double()), core.double()), up.double())
        if mid
        else F.conv2d(F.conv2d(x, down.double()), up.double())
    )
    made = delta(LowRank(down, up, 6.0, core if mid else None), KERNEL)
    assert made.shape == KERNEL.shape
    assert close(F.conv2d(x, made.double()).float(), layers * 6 / 4)


@pytest.mark.parametrize("weight", [WEIGHT, KERNEL], ids=["matrix", "kernel"])
def test_loha_is_the_elementwise_product_of_two(weight: Tensor):
    n = weight[0].numel()
    a, b, c, d = normal("1a", (12, 3)), normal("1b", (3, n)), normal("2a", (12, 3)), normal("2b", (3, n))
    exact = torch.from_numpy(
        np.matmul(a.double().numpy(), b.double().numpy()) * np.matmul(c.double().numpy(), d.double().numpy())
    ).reshape(weight.shape)
    assert close(delta(Hadamard(a, b, c, d, 1.5), weight), exact * 1.5 / 3)


def test_loha_of_a_convolution_may_be_two_tucker_products():
    a, b, c, d = normal("1a", (3, 12)), normal("1b", (3, 8)), normal("2a", (3, 12)), normal("2b", (3, 8))
    t1, t2 = normal("t1", (3, 3, 3, 3)), normal("t2", (3, 3, 3, 3))
    exact = torch.empty(12, 8, 3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            exact[:, :, i, j] = (a.double().T @ t1[:, :, i, j].double() @ b.double()) * (
                c.double().T @ t2[:, :, i, j].double() @ d.double()
            )
    assert close(delta(Hadamard(a, b, c, d, 2.0, t1, t2), KERNEL), exact * 2 / 3)


def blocks(one: Tensor, two: Tensor) -> Tensor:
    """The Kronecker product, block by block; `two` may be a kernel."""
    return torch.cat([torch.cat([one[i, j] * two for j in range(one.shape[1])], 1) for i in range(one.shape[0])], 0)


def test_lokr_is_a_kronecker_product_whose_alpha_counts_only_with_factors():
    w1, w2, kernel = normal("w1", (3, 2)), normal("w2", (4, 4)), normal("w2k", (4, 4, 3, 3))
    a1, b1, a2, b2, b2k = (
        normal("a1", (3, 2)),
        normal("b1", (2, 2)),
        normal("a2", (4, 2)),
        normal("b2", (2, 4)),
        normal("b2k", (2, 36)),
    )
    core, out, into = normal("t", (2, 2, 3, 3)), normal("to", (2, 4)), normal("ti", (2, 4))
    tucker = torch.stack(
        [
            torch.stack([out.double().T @ core[:, :, i, j].double() @ into.double() for j in range(3)], -1)
            for i in range(3)
        ],
        -2,
    )
    half = 0.5 / 2  # alpha / rank
    for change, weight, exact in (
        (Kronecker(w1, w2, 0.5), WEIGHT, blocks(w1.double(), w2.double())),
        (Kronecker(w1, kernel, 0.5), KERNEL, blocks(w1.double(), kernel.double())),
        (Kronecker((a1, b1), w2, 0.5), WEIGHT, blocks(a1.double() @ b1.double(), w2.double()) * half),
        (
            Kronecker((a1, b1), (a2, b2), 0.5),
            WEIGHT,
            blocks(a1.double() @ b1.double(), a2.double() @ b2.double()) * half,
        ),
        (
            Kronecker(w1, (a2, b2k), 0.5),
            KERNEL,
            blocks(w1.double(), (a2.double() @ b2k.double()).reshape(4, 4, 3, 3)) * half,
        ),
        (Kronecker(w1, (out, into), 0.5, core), KERNEL, blocks(w1.double(), tucker) * half),
    ):
        assert close(delta(change, weight), exact)


def test_glora_follows_the_weight():
    a1, a2, b1, b2 = normal("a1", (8, 2)), normal("a2", (2, 8)), normal("b1", (12, 2)), normal("b2", (2, 8))
    exact = WEIGHT.double() @ (a1.double() @ a2.double()) + b1.double() @ b2.double()
    assert close(delta(Generalised(a1, a2, b1, b2, 1.0), WEIGHT), exact / 2)
    kernel = normal("b2k", (2, 8, 3, 3))
    x = normal("x", (1, 8, 6, 6)).double()
    mixed = F.conv2d(
        x, (a1.double() @ a2.double())[:, :, None, None]
    )  # every pixel's channels, then the convolution itself
    layers = F.conv2d(mixed, KERNEL.double()) + F.conv2d(F.conv2d(x, kernel.double()), b1.double()[:, :, None, None])
    made = delta(Generalised(a1, a2, b1, kernel), KERNEL)
    assert close(F.conv2d(x, made.double()).float(), layers)


@pytest.mark.parametrize("weight", [WEIGHT, KERNEL], ids=["matrix", "kernel"])
@pytest.mark.parametrize("per", ["input", "output"])
def test_dora_gives_columns_their_trained_lengths(weight: Tensor, per: str):
    inner = LowRank(normal("d", (4, *weight.shape[1:])), normal("u", (12, 4)), 2.0)
    lengths = normal("m", (8 if per == "input" else 12,)).abs() + 0.5
    changed = (weight.double() + delta(inner, weight).double()).clone()
    for i, length in enumerate(lengths.double()):
        part = changed[:, i] if per == "input" else changed[i]
        part *= length / math.sqrt(sum(float(value) ** 2 for value in part.flatten()))
    made = delta(Decomposed(inner, lengths[None] if per == "input" else lengths[:, None]), weight)
    assert close(weight + made, changed)


def test_dora_leaves_a_column_of_zeros_at_zero():
    still = Full(torch.zeros(3, 2))
    assert torch.equal(delta(Decomposed(still, torch.ones(1, 2)), torch.zeros(3, 2)), torch.zeros(3, 2))


BAD: dict[str, tuple[Change, tuple[int, ...], str]] = {
    "another weight": (LowRank(torch.ones(4, 8), torch.ones(12, 4)), (12, 9), r"\[12, 8\], the model's is \[12, 9\]"),
    "another kernel": (
        LowRank(torch.ones(4, 8, 3, 3), torch.ones(12, 4)),
        (12, 8, 1, 1),
        r"\[12, 8, 3, 3\], the model's is \[12, 8, 1, 1\]",
    ),
    "ranks": (
        LowRank(torch.ones(4, 8), torch.ones(12, 3)),
        (12, 8),
        r"ranks of down and up do not fit: \[4, 8\], \[12, 3\]",
    ),
    "rank 0": (LowRank(torch.ones(0, 8), torch.ones(12, 0)), (12, 8), "rank is 0"),
    "vectors": (LowRank(torch.ones(8), torch.ones(12)), (12, 8), "down and up do not fit"),
    "mid": (
        LowRank(torch.ones(4, 8), torch.ones(12, 4), mid=torch.ones(3, 4, 3, 3)),
        (12, 8, 3, 3),
        "ranks of mid, up and down",
    ),
    "two products": (
        Hadamard(torch.ones(12, 2), torch.ones(2, 8), torch.ones(12, 2), torch.ones(2, 9)),
        (12, 8),
        "the two products",
    ),
    "loha ranks": (
        Hadamard(torch.ones(12, 2), torch.ones(2, 8), torch.ones(12, 3), torch.ones(3, 8)),
        (12, 8),
        "w1_b and w2_b",
    ),
    "tucker": (
        Kronecker(torch.ones(2, 2), (torch.ones(2, 6), torch.ones(2, 4)), t2=torch.ones(2, 3, 3, 3)),
        (12, 8, 3, 3),
        "Tucker core",
    ),
    "lokr": (Kronecker(torch.ones(2, 2, 2), torch.ones(6, 4)), (12, 8), "w1 and w2"),
    "lokr pair": (Kronecker((torch.ones(2, 3), torch.ones(2, 2)), torch.ones(6, 4)), (12, 8), "pair of factors"),
    "glora": (
        Generalised(torch.ones(9, 2), torch.ones(2, 9), torch.ones(12, 2), torch.ones(2, 8)),
        (12, 8),
        "a1, a2 and the weight",
    ),
    "glora ranks": (
        Generalised(torch.ones(8, 2), torch.ones(2, 8), torch.ones(12, 3), torch.ones(2, 8)),
        (12, 8),
        "the ranks of a1",
    ),
    "glora vectors": (
        Generalised(torch.ones(8), torch.ones(8), torch.ones(12), torch.ones(8)),
        (12, 8),
        "a1, a2, b1, b2 do not fit",
    ),
    "difference": (Full(torch.ones(8, 12)), (12, 8), r"\[8, 12\], the model's is \[12, 8\]"),
    "magnitudes": (Decomposed(Full(torch.ones(12, 8)), torch.ones(9, 1)), (12, 8), r"magnitudes are \[9, 1\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_factors_that_do_not_fit_are_refused_with_their_shapes(case: str):
    change, shape, what = BAD[case]
    with pytest.raises(ArgumentError, match=what):
        delta(change, torch.ones(shape))


# --- merging ----------------------------------------------------------------------------------------------------------


def model(config: ModelConfig = TINY) -> LatentDiffusion:
    torch.manual_seed(0)
    made = LatentDiffusion(config).requires_grad_(False).eval()
    made.load_state_dict(
        {name: normal(name, p.shape) * 0.1 for name, p in made.state_dict().items()}
    )  # the last layers start as zeros
    return made


def state(of: LatentDiffusion) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


Q = "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"  # [32, 32]


def changes(seed: str, name: str = "a", r: int = 4) -> Changes:
    return Changes({Q: LowRank(normal(f"{seed} d", (r, 32)), normal(f"{seed} u", (32, r)), 2.0)}, name)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x.view(torch.uint8), b[name].view(torch.uint8)) for name, x in a.items()
    )


def test_a_merge_changes_only_what_the_lora_names_and_reports_it():
    tiny = model()
    before = state(tiny)
    merged = merge(tiny, [(changes("one", "style.safetensors"), 0.8)])
    assert merged.parameters == (Q,)
    assert merged.lines == ("style.safetensors at 0.8: 1 of 1 modules",)
    after = state(tiny)
    assert close(after.pop(Q), before[Q].double() + 0.8 * delta(changes("one")[Q], before[Q]).double())
    before.pop(Q)
    assert same_bits(before, after)


def test_two_loras_add_up_in_any_order():
    a, b = changes("one"), changes("two", r=2)
    tiny, other, base = model(), model(), model().state_dict()[Q]
    merge(tiny, [(a, 0.8), (b, -0.5)])
    merge(other, [(b, -0.5), (a, 0.8)])
    assert close(
        tiny.state_dict()[Q], base.double() + 0.8 * delta(a[Q], base).double() - 0.5 * delta(b[Q], base).double()
    )
    assert same_bits(state(tiny), state(other))


@pytest.mark.parametrize(
    ("values", "result"),
    [
        (
            (2.0**-12,) * 3,
            1 + 2.0**-10,
        ),  # 1 + 2^-12 is 1: only a sum of three, made before rounding, reaches the next number
        ((2048.0, 0.5, -2048.0), 1.5),  # 2048.5 is 2048
    ],
)
def test_several_loras_are_summed_in_float32_before_one_rounding(values: tuple[float, ...], result: float):
    """In float16 these sums come out as 1."""
    tiny = model().half()
    tiny.get_parameter(Q).fill_(1)
    loras = [Changes({Q: Full(torch.full((32, 32), value, dtype=torch.float16))}) for value in values]
    merge(tiny, [(lora, 1) for lora in loras])
    assert tiny.dtype == torch.float16
    assert torch.equal(tiny.get_parameter(Q), torch.full((32, 32), result, dtype=torch.float16))


def test_factors_of_half_precision_are_multiplied_in_float32():
    down, up = (torch.full(shape, 1 + 2.0**-10, dtype=torch.float16) for shape in ((1, 32), (32, 1)))
    assert torch.equal(delta(LowRank(down, up), torch.zeros(32, 32)), torch.full((32, 32), (1 + 2.0**-10) ** 2))


def test_scale_zero_leaves_every_bit():
    tiny = model()
    tiny.get_parameter(Q).view(-1)[:2] = torch.tensor([-0.0, math.inf])
    before = state(tiny)
    assert merge(tiny, [(changes("one"), 0.0)]).parameters == ()
    assert same_bits(before, state(tiny))


def test_a_negative_scale_takes_back_what_a_positive_one_gave():
    tiny = model()
    base = tiny.get_parameter(Q).detach().clone()
    apply(tiny, changes("one"), 1.0)
    moved = tiny.get_parameter(Q).detach().clone()
    apply(tiny, changes("one"), -1.0)
    assert not torch.equal(moved, base)
    assert (tiny.get_parameter(Q) - base).abs().max() <= 2 * 2**-24 * moved.abs().max() + 2**-24 * base.abs().max()


def test_the_old_tensors_and_the_file_they_are_mapped_from_keep_their_values(tmp_path):
    path = tmp_path / "tiny.safetensors"
    weights.save(model(), path)
    data, tiny = path.read_bytes(), weights.load(path)
    old = tiny.get_parameter(Q)
    values = old.detach().clone()
    apply(tiny, changes("one"))
    assert path.read_bytes() == data
    assert torch.equal(old, values)
    assert tiny.get_parameter(Q) is not old
    assert not tiny.get_parameter(Q).requires_grad
    assert tiny.unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight is tiny.get_parameter(Q)


@pytest.mark.parametrize(
    ("lora", "scale", "what"),
    [
        (changes("one"), math.nan, "nan is no finite number"),
        (changes("one"), "1", "'1' is no finite number"),
        (
            Changes({Q: Full(torch.ones(32, 31))}),
            1.0,
            r"to_q.weight: it changes a weight of \[32, 31\], the model's is \[32, 32\]",
        ),
        (Changes({"unet.nothing.weight": Full(torch.ones(1))}), 1.0, "has no parameter unet.nothing.weight"),
    ],
)
def test_nothing_is_merged_when_one_of_two_does_not_fit(lora: Changes, scale: float, what: str):
    tiny = model()
    before = state(tiny)
    with pytest.raises(ArgumentError, match=what):
        merge(tiny, [(changes("two"), 1.0), (lora, scale)])
    assert same_bits(before, state(tiny))


# --- published names --------------------------------------------------------------------------------------------------


def targets(manifest: str) -> list[dict]:
    return json.loads(gzip.decompress((GOLDEN / f"{manifest}.json.gz").read_bytes()))["targets"]


def published(
    manifest: str, groups: tuple[str, ...] = ("lora",), *, unet: bool = True, text: bool = True, spelling: int = 0
) -> dict[str, Tensor]:
    """A LoRA of rank 1 with kohya's names for all of a family's targets, as zeros."""
    tensors: dict[str, Tensor] = {}
    for target in targets(manifest):
        names, shape = target["kohya"], target["shape"]
        if target["group"] not in groups or not (unet if names[0].startswith("lora_unet_") else text):
            continue
        name = names[min(spelling, len(names) - 1)]
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, *shape[1:], dtype=torch.float16)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(shape[0], 1, *(1 for _ in shape[2:]), dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("manifest", FAMILY)
def test_every_published_target_is_found_under_all_its_names(manifest: str):
    config = FAMILIES[FAMILY[manifest]]
    table, shapes = lora_names.spellings(config), lora_names.shapes(config)
    places = set()
    for target in targets(manifest):
        spelled = [*target["kohya"], target["peft"], *([target["diffusers_old"]] if "diffusers_old" in target else [])]
        found = {table.get(name) for name in spelled}
        assert len(found) == 1, (spelled, found)
        (module,) = found
        assert shapes[f"{module}.weight"] == tuple(target["shape"])
        kernel = target["key"].removeprefix("model.diffusion_model.").removesuffix(".weight")
        assert module == f"unet.{kernel}" or not target["key"].startswith("model.diffusion_model."), (module, kernel)
        places.add(module)
    assert len(places) == len(targets(manifest))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_stands_for_two_modules(family: str):
    config = FAMILIES[family]
    joined = [
        name.rpartition(".")[0].replace(".", "_") for name in diffusers_unet(config.unet) if name.endswith(".weight")
    ]
    theirs = [
        name.rpartition(".")[0].replace(".", "_")
        for name in diffusers_unet(config.unet).values()
        if name.endswith(".weight")
    ]
    assert len({*joined}) == len(joined)
    assert len({*theirs}) == len(theirs)
    both = {*joined} & {*theirs}
    table = lora_names.spellings(config)
    assert all(table[f"lora_unet_{name}"].replace(".", "_") == f"unet_{name}" for name in both)


@pytest.mark.parametrize(
    ("manifest", "families", "options", "count"),
    [
        ("sd1", ("sd1", "sd1-inpainting", "sd-image-variations"), {"text": False}, 192),
        ("sd1", ("sd1",), {}, 264),
        ("sd1", ("sd1",), {"groups": ("lora", "locon"), "text": False}, 278),
        ("sd2", ("sd2-base", "sd2-v", "sd2-inpainting", "sd2-depth"), {}, 192 + 138),
        ("sdxl", ("sdxl-base", "sdxl-inpainting"), {"spelling": 1}, 722 + 72 + 192),
        ("ssd-1b", ("ssd-1b",), {}, 360 + 264),
    ],
)
def test_a_published_lora_is_used_whole(manifest, families, options, count, tmp_path):
    path = save_safetensors(published(manifest, **options), tmp_path / "a.safetensors")
    for family in families:
        found = load_lora(path, FAMILIES[family])
        assert found.report() == f"{count} of {count} modules"
        assert found.modules == len(found) == count
        assert found.name == "a.safetensors"


@pytest.mark.parametrize(
    ("manifest", "family", "is_for"),
    [
        ("sd1", "sd2-v", "sd1"),
        ("sd2", "sd1", "sd2-base"),
        ("sdxl", "sd1", "sdxl-base"),
        ("sd1", "sdxl-base", "sd1"),
        ("sdxl", "ssd-1b", "sdxl-base"),
        ("ssd-1b", "sdxl-base", "ssd-1b"),
    ],
)
def test_a_lora_for_another_family_is_refused_with_both_families(manifest: str, family: str, is_for: str, tmp_path):
    """The last is the hard one: all of SSD-1B's modules exist in SDXL, with the same shapes."""
    path = save_safetensors(published(manifest, text=False), tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=f"a.safetensors: is a LoRA for {is_for}.* the model is {family}") as caught:
        load_lora(path, FAMILIES[family])
    assert caught.value.exit_code == 2
    assert not str(caught.value).endswith("...")


def test_a_lora_of_some_blocks_is_no_other_family(tmp_path):
    some = {
        key: value for key, value in published("sdxl", text=False).items() if "mid_block" in key or "up_blocks_0" in key
    }
    found = load_lora(save_safetensors(some, tmp_path / "a.safetensors"), FAMILIES["sdxl-base"])
    assert found.modules == len(some) // 3


# --- files ------------------------------------------------------------------------------------------------------------

Spell = Callable[
    [str, str], tuple[str, str]
]  # (our module, diffusers' name of it with its component) -> start of the keys of down and up


def kohya(ours: str, theirs: str) -> tuple[str, str]:
    component, _, name = theirs.partition(".")
    start = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + name.replace(".", "_")
    return f"{start}.lora_down", f"{start}.lora_up"


def kohya_ldm(ours: str, theirs: str) -> tuple[str, str]:
    if ours.startswith("text."):
        return kohya(ours, theirs)
    start = "lora_unet_" + ours.removeprefix("unet.").replace(".", "_")
    return f"{start}.lora_down", f"{start}.lora_up"


def peft(ours: str, theirs: str) -> tuple[str, str]:
    return f"{theirs}.lora_A", f"{theirs}.lora_B"


def peft_wrapped(ours: str, theirs: str) -> tuple[str, str]:
    return f"base_model.model.{theirs}.lora_A.default", f"base_model.model.{theirs}.lora_B.default"


def peft_component(ours: str, theirs: str) -> tuple[str, str]:
    component, _, name = theirs.partition(".")
    return f"{component}.base_model.model.{name}.lora_A", f"{component}.base_model.model.{name}.lora_B"


def peft_transformers_5(ours: str, theirs: str) -> tuple[str, str]:
    return peft(ours, theirs.replace(".text_model.", "."))


def diffusers_lora(ours: str, theirs: str) -> tuple[str, str]:
    return (
        (f"{theirs}.lora.down", f"{theirs}.lora.up")
        if theirs.startswith("unet.")
        else (f"{theirs}.lora_linear_layer.down", f"{theirs}.lora_linear_layer.up")
    )


def diffusers_processors(ours: str, theirs: str) -> tuple[str, str]:
    if ".attn" in theirs:
        start = theirs.replace(".to_", ".processor.to_").removesuffix(".0") + "_lora"
    elif ".self_attn." in theirs:
        head, _, leaf = theirs.rpartition(".")
        start = f"{head}.to_{leaf.removesuffix('_proj')}_lora"
    else:
        return diffusers_lora(ours, theirs)
    return f"{start}.down", f"{start}.up"


SPELLS = (
    kohya,
    kohya_ldm,
    peft,
    peft_wrapped,
    peft_component,
    peft_transformers_5,
    diffusers_lora,
    diffusers_processors,
)


def layers(config: ModelConfig = TINY) -> dict[str, str]:
    """{our module: diffusers' name} of every layer of the tiny model that has a matrix or a kernel."""
    names = {f"unet.{ours}": f"unet.{theirs}" for ours, theirs in diffusers_unet(config.unet).items()}
    for i, _ in enumerate(config.text):
        component = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
        names |= {
            name: name.replace(f"text.{i}.", f"{component}.")
            for name in lora_names.shapes(config)
            if name.startswith(f"text.{i}.text_model.encoder.")
        }
    shapes = lora_names.shapes(config)
    return {
        ours.removesuffix(".weight"): theirs.removesuffix(".weight")
        for ours, theirs in names.items()
        if ours.endswith(".weight") and len(shapes[ours]) > 1
    }


def file_of(spell: Spell, path: Path, config: ModelConfig = TINY, rank: int = 2) -> Path:
    """A LoRA of every layer, its factors seeded by our names."""
    shapes, tensors = lora_names.shapes(config), {}
    for ours, theirs in layers(config).items():
        shape = shapes[f"{ours}.weight"]
        down, up = spell(ours, theirs)
        tensors[f"{down}.weight"] = normal(f"{ours} down", (rank, *shape[1:]))
        tensors[f"{up}.weight"] = normal(f"{ours} up", (shape[0], rank, *(1 for _ in shape[2:])))
    return save_safetensors(tensors, path)


@pytest.mark.parametrize("spell", SPELLS[1:], ids=lambda spell: spell.__name__)
def test_every_way_of_spelling_gives_the_same_model_bit_for_bit(spell: Spell, tmp_path):
    tiny, other = model(), model()
    one, two = (load_lora(file_of(way, tmp_path / f"{way.__name__}.safetensors"), TINY) for way in (kohya, spell))
    assert one.report() == two.report() == f"{len(layers())} of {len(layers())} modules"
    apply(tiny, one, 0.7)
    apply(other, two, 0.7)
    assert same_bits(state(tiny), state(other))
    assert not torch.equal(tiny.get_parameter(Q), model().get_parameter(Q))


def test_the_two_towers_of_sdxl_are_told_apart(tmp_path):
    name = "text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"lora_te{n}_{name}.lora_down.weight": torch.full((1, 64), float(n)) for n in (1, 2)}
    tensors |= {f"lora_te{n}_{name}.lora_up.weight": torch.ones(256, 1) for n in (1, 2)}
    tensors["text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_A.weight"] = torch.full((1, 64), 3.0)
    tensors["text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_B.weight"] = torch.ones(256, 1)
    found = load_lora(save_safetensors(tensors, tmp_path / "a.safetensors"), SDXL_TINY)
    values = {name: change.down[0, 0].item() for name, change in found.items()}
    assert values == {
        f"text.{i}.text_model.encoder.layers.{j}.mlp.fc1.weight": n
        for i, j, n in ((0, 0, 1.0), (1, 0, 2.0), (1, 1, 3.0))
    }
    bare = parts(f"lora_te_{name}", lora_down__weight=torch.ones(1, 64), lora_up__weight=torch.ones(256, 1))
    with pytest.raises(FileError, match="1 of 1 modules are not in a model of family sdxl-base"):
        load_lora(save_safetensors(bare, tmp_path / "b.safetensors"), SDXL_TINY)


KEY, MODULE = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
)
CONV, CONV_KEY = "unet.input_blocks.1.0.in_layers.2.weight", "lora_unet_down_blocks_0_resnets_0_conv1"  # [32, 32, 3, 3]


def loaded(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None, **options) -> Changes:
    return load_lora(save_safetensors(tensors, path / "a.safetensors", metadata), TINY, **options)


def parts(key: str, **tensors: Tensor) -> dict[str, Tensor]:
    return {f"{key}.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}


def test_each_kind_is_read_as_what_it_is(tmp_path):
    """Every case in its own layer of one file: the matrices are [32, 32], the kernels [32, 32, 3, 3]."""
    a, b, n = normal("a", (32, 2)), normal("b", (2, 32)), normal("n", (2, 32 * 9))
    core, alpha, w1, w2 = normal("t", (2, 2, 3, 3)), torch.tensor(3.0), normal("w1", (4, 4)), normal("w2", (8, 8))
    wide = n.reshape(2, 32, 3, 3)
    matrices: list[tuple[dict[str, Tensor], Change]] = [
        ({"lora_down__weight": b, "lora_up__weight": a, "alpha": alpha}, LowRank(b, a, 3.0)),
        ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b + 1, "alpha": alpha}, Hadamard(a, b, a + 1, b + 1, 3.0)),
        ({"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, Kronecker(w1, w2, 3.0)),
        ({"lokr_w1_a": a[:4], "lokr_w1_b": b[:, :4], "lokr_w2_a": a[:8], "lokr_w2_b": b[:, :8], "alpha": alpha}, Kronecker((a[:4], b[:, :4]), (a[:8], b[:, :8]), 3.0)),
        ({"a1__weight": a, "a2__weight": b, "b1__weight": a + 1, "b2__weight": b, "alpha": alpha}, Generalised(a, b, a + 1, b, 3.0)),
        ({"a1__weight": b, "a2__weight": a, "b1__weight": b, "b2__weight": a + 1, "alpha": alpha}, Generalised(a, b, a + 1, b, 3.0)),  # the older order
        ({"lora_down__weight": b, "lora_up__weight": a, "dora_scale": b[:1]}, Decomposed(LowRank(b, a), b[:1])),
        ({"lora_down__weight": b, "lora_up__weight": a, "dora_scale": a[:, :1]}, Decomposed(LowRank(b, a), a[:, :1])),
        ({"lora_A__weight": b, "lora_B__weight": a, "lora_magnitude_vector": a[:, 0]}, Decomposed(LowRank(b, a), a[:, :1])),
    ]  # fmt: skip
    kernels: list[tuple[dict[str, Tensor], Change]] = [
        ({"lora_down__weight": b[:, :, None, None], "lora_up__weight": a[:, :, None, None], "lora_mid__weight": core}, LowRank(b, a, None, core)),
        ({"hada_w1_a": a, "hada_w1_b": n, "hada_w2_a": a, "hada_w2_b": n + 1, "dora_scale": b[:1, :, None, None]}, Decomposed(Hadamard(a, n, a, n + 1), b[:1])),
        ({"hada_w1_a": b, "hada_w1_b": b, "hada_w2_a": b, "hada_w2_b": b + 1, "hada_t1": core, "hada_t2": core + 1, "dora_scale": a[:, :1, None, None]},
         Decomposed(Hadamard(b, b, b, b + 1, None, core, core + 1), a[:, :1])),
        ({"lokr_w1": w1, "lokr_w2_a": b[:, :8], "lokr_w2_b": b[:, :8], "lokr_t2": core}, Kronecker(w1, (b[:, :8], b[:, :8]), None, core)),
        ({"lora_A__weight": wide, "lora_B__weight": a[:, :, None, None], "lora_magnitude_vector__weight": a[:, 0].reshape(1, -1, 1, 1)}, Decomposed(LowRank(wide, a), a[:, :1])),
    ]  # fmt: skip
    shapes, tiny, tensors, expected = lora_names.shapes(TINY), model(), {}, {}
    for shape, cases in (((32, 32), matrices), ((32, 32, 3, 3), kernels)):
        places = [(ours, theirs) for ours, theirs in layers().items() if shapes[f"{ours}.weight"] == shape][
            : len(cases)
        ]
        for (ours, theirs), (stored, change) in zip(places, cases, strict=True):
            start = theirs if "lora_A__weight" in stored else kohya(ours, theirs)[0].removesuffix(".lora_down")
            tensors |= {
                name: tensor.clone(memory_format=torch.contiguous_format)
                for name, tensor in parts(start, **stored).items()
            }
            expected[f"{ours}.weight"] = change
    found = loaded(tensors, tmp_path)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert type(found[name]) is type(change)
        assert torch.equal(delta(found[name], tiny.get_parameter(name)), delta(change, tiny.get_parameter(name))), (
            change
        )


def test_differences_of_biases_and_norms_are_changes_too(tmp_path):
    norm = "lora_unet_down_blocks_0_attentions_0_norm"
    tensors = parts(norm, w_norm=normal("w", (32,)), b_norm=normal("b", (32,))) | parts(
        CONV_KEY, diff_b=normal("c", (32,)), diff=normal("d", (32, 32, 3, 3))
    )
    found, tiny, base = loaded(tensors, tmp_path), model(), model()
    assert found.report() == "2 of 2 modules"
    apply(tiny, found, 2.0)
    for name, key in (("unet.input_blocks.1.1.norm.weight", f"{norm}.w_norm"), ("unet.input_blocks.1.1.norm.bias", f"{norm}.b_norm"),
                      (CONV, f"{CONV_KEY}.diff"), (CONV.replace("weight", "bias"), f"{CONV_KEY}.diff_b")):  # fmt: skip
        assert torch.equal(tiny.get_parameter(name), base.get_parameter(name) + 2 * tensors[key])


def test_a_pickled_lora_is_read_too(tmp_path):
    tensors = parts(
        KEY,
        lora_down__weight=normal("d", (2, 32)).bfloat16(),
        lora_up__weight=normal("u", (32, 2)).bfloat16(),
        alpha=torch.tensor(1.0).bfloat16(),
    )
    one = load_lora(save_zip(tensors, tmp_path / "a.pt"), TINY)
    two = loaded(tensors, tmp_path)
    assert torch.equal(delta(one[Q], torch.zeros(32, 32)), delta(two[Q], torch.zeros(32, 32)))


def one_peft() -> dict[str, Tensor]:
    return {f"{MODULE}.lora_A.weight": normal("d", (4, 32)), f"{MODULE}.lora_B.weight": normal("u", (32, 4))}


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 4}, 8.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 16.0),  # alpha / sqrt(4), as alpha / 4
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 3, "to_k": 5}}, 3.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"tn1.to_q": 3}}, 8.0),  # the end of a name, not of a word
        ({"text_encoder.lora_alpha": 8}, None),
        ({"lora_alpha": 6}, 6.0),
    ],
)
def test_alpha_comes_from_the_metadata_of_peft(settings: dict, alpha: float | None, tmp_path):
    found = loaded(one_peft(), tmp_path, {"lora_adapter_metadata": json.dumps(settings)})
    assert found[Q].alpha == alpha
    tensor = loaded(
        one_peft() | {f"{MODULE}.alpha": torch.tensor(5.0)}, tmp_path, {"lora_adapter_metadata": json.dumps(settings)}
    )
    assert tensor[Q].alpha == 5.0


def test_alpha_comes_from_the_settings_beside_an_adapter_of_peft(tmp_path):
    tensors = {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in one_peft().items()}
    path = save_safetensors(tensors, tmp_path / "adapter_model.safetensors")
    assert load_lora(path, TINY)[Q].alpha is None
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    assert load_lora(path, TINY)[Q].alpha == 16.0
    for text, what in (
        ("[", "not a JSON object"),
        ('{"lora_alpha": NaN}', "no finite number"),
        ("{}", "no finite number"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+": 1}}', "alpha_pattern"),
        (" " * 1_000_001, "more than 1000000 bytes"),
    ):
        beside.write_text(text)
        with pytest.raises(FileError, match=f"adapter_config.json: .*{what}"):
            load_lora(path, TINY)


GOOD = parts(KEY, lora_down__weight=torch.ones(2, 32), lora_up__weight=torch.ones(32, 2))
ELSEWHERE = parts("lora_unet_nowhere", lora_down__weight=torch.ones(2, 32), lora_up__weight=torch.ones(32, 2))


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({f"{KEY}.lora_down.weight": torch.ones(2, 32)}, "attn1_to_q has no up beside its down"),
        (parts(KEY, alpha=torch.tensor(1.0)), "has no down beside its alpha"),
        (parts(KEY, hada_w1_a=torch.ones(32, 2)), "has no hada_w1_b"),
        (parts(KEY, lokr_w1=torch.ones(4, 4), lokr_w2_a=torch.ones(8, 2)), "has no lokr_w2_b"),
        (GOOD | parts(KEY, diff=torch.ones(32, 32)), "parts of two kinds of LoRA"),
        (GOOD | parts(KEY, alpha=torch.ones(2)), r"alpha is no finite number but \[2\]"),
        (GOOD | parts(KEY, alpha=torch.tensor(math.inf)), "alpha is no finite number"),
        (
            parts(KEY, lora_down__weight=torch.ones(2, 32, dtype=torch.int8), lora_up__weight=torch.ones(32, 2)),
            "holds torch.int8 numbers",
        ),
        (
            parts(KEY, lora_down__weight=torch.ones(2, 31), lora_up__weight=torch.ones(32, 2)),
            r"attn1_to_q: it changes a weight of \[32, 31\], the model's is \[32, 32\]",
        ),
        (
            parts(KEY, lora_down__weight=torch.ones(2, 32), lora_up__weight=torch.ones(32, 3)),
            r"attn1_to_q: the ranks of down and up do not fit: \[2, 32\], \[32, 3\]",
        ),
        (GOOD | {f"{KEY}.lora.down.weight": torch.ones(2, 32)}, "down under two names"),
        (
            GOOD | parts("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", diff=torch.ones(32, 32)),
            f"changes {Q} twice",
        ),
        (ELSEWHERE, r"1 of 1 modules are not in a model of family sd1 \(lora_unet_nowhere\); use a LoRA for it"),
        (
            GOOD | ELSEWHERE,
            r"1 of 2 modules are not in a model of family sd1 \(lora_unet_nowhere\); allow_unmatched leaves them out",
        ),
        (GOOD | {"bundle_emb.cat": torch.ones(1)}, r"1 of 2 modules .* \(bundle_emb.cat\)"),
        (
            GOOD | parts(KEY, diff_b=torch.ones(32)),
            "1 of 2 modules are not in a model of family sd1",
        ),  # to_q has no bias
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1), "b": torch.ones(1)},
            "is no LoRA but a model",
        ),
        ({"emb_params": torch.ones(1, 64)}, "is no LoRA but a textual-inversion embedding"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, "is no LoRA: it begins with a"),
    ],
)
def test_what_cannot_be_used_is_refused(tensors: dict[str, Tensor], what: str, tmp_path):
    with pytest.raises(FileError, match=what) as caught:
        loaded(tensors, tmp_path)
    assert str(caught.value.path).endswith("a.safetensors")
    assert caught.value.key is not None


def test_settings_that_are_not_settings_are_refused(tmp_path):
    for text in ("[]", "{", '{"unet.lora_alpha": "8"}'):
        with pytest.raises(FileError, match="lora_adapter_metadata"):
            loaded(one_peft(), tmp_path, {"lora_adapter_metadata": text})


def test_what_has_no_place_can_be_left_out_and_is_reported(tmp_path):
    found = loaded(GOOD | ELSEWHERE | {"bundle_emb.cat": torch.ones(1)}, tmp_path, allow_unmatched=True)
    assert list(found) == [Q]
    assert found.unmatched == ("bundle_emb.cat", "lora_unet_nowhere")
    assert found.report() == "1 of 3 modules; not used: bundle_emb.cat, lora_unet_nowhere"
    assert merge(model(), [(found, 1)]).lines == (
        "a.safetensors at 1: 1 of 3 modules; not used: bundle_emb.cat, lora_unet_nowhere",
    )
    with pytest.raises(FileError, match="1 of 1 modules are not"):  # nothing left is an error even so
        loaded(ELSEWHERE, tmp_path, allow_unmatched=True)


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_k": 9}}],
    ids=lambda kind: next(iter(kind), "lora"),
)
def test_diffusers_and_peft_merge_their_own_files_to_the_same_weights(kind: dict, tmp_path):
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig

    peer = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    tiny = model()
    names = diffusers_unet(TINY.unet)
    peer.load_state_dict({theirs: tiny.unet.state_dict()[ours] for ours, theirs in names.items()})
    peer.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "proj_in", "conv1", "ff.net.0.proj"], **kind)
    )
    for name, p in peer.named_parameters():
        if "lora_" in name:
            p.data = normal(name, p.shape) * 0.1 + ("magnitude" in name)
    peer.save_lora_adapter(tmp_path)
    peer.fuse_lora()
    fused = {
        name.replace(".base_layer", ""): tensor for name, tensor in peer.state_dict().items() if "lora_" not in name
    }
    found = load_lora(tmp_path / "pytorch_lora_weights.safetensors", TINY)
    assert len(found) >= 20
    apply(tiny, found)
    before = model().unet.state_dict()
    for ours, theirs in names.items():
        changed = f"unet.{ours}" in found
        assert (
            close(tiny.unet.state_dict()[ours], fused[theirs].double())
            if changed
            else torch.equal(tiny.unet.state_dict()[ours], fused[theirs])
        )
        assert changed == (not torch.equal(fused[theirs], before[ours]))
