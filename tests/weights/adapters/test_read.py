"""LoRA files: every kind and every spelling, against the published names, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.seeded import normal
from ldm.changes.lora import (
    Change,
    Changes,
    Decomposed,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    apply,
    delta,
    merge,
)
from ldm.config import FAMILIES, ModelConfig
from ldm.errors import FileError
from tests.made.checkpoints import TINY, save_safetensors, save_zip
from tests.made.loras import CONV, FAMILY, Q, blank_lora, close, model, same_bits, state, targets
from weights.adapters import names as lora_names
from weights.adapters.read import load_lora
from weights.names.diffusers import diffusers_unet

SDXL_TINY = replace(TINY, name="sdxl-base", text=(TINY.text[0], replace(TINY.text[0], projection=48)))


# --- published names --------------------------------------------------------------------------------------------------


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
    path = save_safetensors(blank_lora(manifest, **options), tmp_path / "a.safetensors")
    for family in families:
        found = load_lora(path, FAMILIES[family])
        assert found.report() == f"{count} of {count} modules"
        assert found.modules == len(found) == count
        assert found.name == "a.safetensors"


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
CONV_KEY = "lora_unet_down_blocks_0_resnets_0_conv1"


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
        ({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a + 1, "hada_w2_b": b + 1, "alpha": alpha},
            Hadamard(a, b, a + 1, b + 1, 3.0)),
        ({"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, Kronecker(w1, w2, 3.0)),
        ({"lokr_w1_a": a[:4], "lokr_w1_b": b[:, :4], "lokr_w2_a": a[:8], "lokr_w2_b": b[:, :8], "alpha": alpha},
            Kronecker((a[:4], b[:, :4]), (a[:8], b[:, :8]), 3.0)),
        ({"a1__weight": a, "a2__weight": b, "b1__weight": a + 1, "b2__weight": b, "alpha": alpha},
            Generalised(a, b, a + 1, b, 3.0)),
        # the older order
        ({"a1__weight": b, "a2__weight": a, "b1__weight": b, "b2__weight": a + 1, "alpha": alpha},
            Generalised(a, b, a + 1, b, 3.0)),
        ({"lora_down__weight": b, "lora_up__weight": a, "dora_scale": b[:1]}, Decomposed(LowRank(b, a), b[:1])),
        ({"lora_down__weight": b, "lora_up__weight": a, "dora_scale": a[:, :1]}, Decomposed(LowRank(b, a), a[:, :1])),
        ({"lora_A__weight": b, "lora_B__weight": a, "lora_magnitude_vector": a[:, 0]},
            Decomposed(LowRank(b, a), a[:, :1])),
    ]  # fmt: skip
    kernels: list[tuple[dict[str, Tensor], Change]] = [
        ({"lora_down__weight": b[:, :, None, None], "lora_up__weight": a[:, :, None, None], "lora_mid__weight": core},
            LowRank(b, a, None, core)),
        ({"hada_w1_a": a, "hada_w1_b": n, "hada_w2_a": a, "hada_w2_b": n + 1, "dora_scale": b[:1, :, None, None]},
            Decomposed(Hadamard(a, n, a, n + 1), b[:1])),
        ({"hada_w1_a": b, "hada_w1_b": b, "hada_w2_a": b, "hada_w2_b": b + 1, "hada_t1": core, "hada_t2": core + 1,
                "dora_scale": a[:, :1, None, None]},
         Decomposed(Hadamard(b, b, b, b + 1, None, core, core + 1), a[:, :1])),
        ({"lokr_w1": w1, "lokr_w2_a": b[:, :8], "lokr_w2_b": b[:, :8], "lokr_t2": core},
            Kronecker(w1, (b[:, :8], b[:, :8]), None, core)),
        ({"lora_A__weight": wide, "lora_B__weight": a[:, :, None, None],
                "lora_magnitude_vector__weight": a[:, 0].reshape(1, -1, 1, 1)}, Decomposed(LowRank(wide, a), a[:, :1])),
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
    places = {
        "unet.input_blocks.1.1.norm.weight": f"{norm}.w_norm",
        "unet.input_blocks.1.1.norm.bias": f"{norm}.b_norm",
        CONV: f"{CONV_KEY}.diff",
        CONV.replace("weight", "bias"): f"{CONV_KEY}.diff_b",
    }
    for name, key in places.items():
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
