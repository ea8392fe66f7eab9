"""LoRA files rewritten: for other tools, of another rank, out of two checkpoints, into one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import weights
from benchmarks.models.seeded import normal
from ldm.changes.lora import delta, merge
from ldm.config import FAMILIES
from ldm.errors import AmbiguousCheckpoint, FileError
from tests.made.checkpoints import TINY, save_safetensors
from tests.made.families import build
from tests.made.families import tiny as shallow
from tests.made.loras import (
    CONV,
    FAMILY,
    HADA,
    HALF,
    KERNEL,
    KEYS,
    Q,
    product,
    published,
    same_bits,
    some_lora,
    spectrum,
    targets,
)
from weights.adapters import names as lora_names
from weights.adapters.extract import CONVOLUTION, attention
from weights.adapters.family import kinds
from weights.adapters.kohya import kohya_names
from weights.adapters.names import components
from weights.adapters.read import load_lora, read_lora

# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", FAMILY)
def test_a_lora_of_every_published_target_goes_to_every_dialect_and_back_bit_for_bit(manifest: str, tmp_path: Path):
    before, family = published(manifest), FAMILY[manifest]
    path = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d", "e.safetensors")]
    save_safetensors(before, path[0], {"ss_output_name": "engraving", "sshs_model_hash": "1234"})
    for i, to in enumerate(("diffusers", "kohya", "peft", "kohya")):
        made = weights.convert_lora(path[0 if to == "peft" else i], path[i + 1], to, family)
        assert made.modules == len(targets(manifest))
    names = {key.removesuffix(".lora_A.weight") for key in load_file(path[1]) if ".lora_A." in key}
    assert names == {target["peft"] for target in targets(manifest)}
    assert same_bits(before, load_file(path[2]))
    assert same_bits(before, load_file(path[4]))
    with weights.open_file(path[2]) as file:
        assert file.metadata["ss_output_name"] == "engraving"
        assert not {"sshs_model_hash", "lora_adapter_metadata"} & set(file.metadata)


@pytest.mark.parametrize("manifest", FAMILY)
def test_the_family_is_found_out_from_the_targets(manifest: str, tmp_path: Path):
    """All of SSD-1B's targets are SDXL's too: what tells them apart is which are missing."""
    attention = {key: value for key, value in published(manifest).items() if "lora_unet" in key and "attn2" in key}
    made = weights.convert_lora(
        save_safetensors(attention, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers"
    )
    assert made.family == FAMILY[manifest]


@pytest.mark.parametrize("manifest", FAMILY)
def test_what_is_taken_out_is_what_trainers_put_in(manifest: str):
    """The published targets: those of every LoRA, and those of LoCon beside them."""
    config = FAMILIES[FAMILY[manifest]]
    table = lora_names.spellings(config)
    for group, ours in (("lora", attention), ("locon", CONVOLUTION.fullmatch)):
        expected = {f"{table[target['peft']]}.weight" for target in targets(manifest) if target["group"] == group}
        assert {name for name in lora_names.shapes(config) if ours(name)} - expected <= {
            name for name in lora_names.shapes(config) if ".layers.23." in name
        }
        assert expected <= {name for name in lora_names.shapes(config) if ours(name)}


@pytest.mark.parametrize("family", kinds())
def test_every_name_that_is_written_is_read_as_the_same_module(family: str):
    config = FAMILIES[family]
    table = lora_names.spellings(config)
    assert all(table[name] == module for module, name in kohya_names(config).items())
    named = components(config)
    assert all(table[f"{network}.{name}"] == module for module, (network, name) in named.items())
    for network in {network for network, _ in named.values()}:  # or a pattern of peft's would be taken for two
        ends = [name.removeprefix("text_model.").split(".") for of, name in named.values() if of == network]
        ends = {tuple(name[i:]) for name in ends for i in range(1, len(name))} & {tuple(name) for name in ends}
        assert not ends


def test_alpha_keeps_its_value_whatever_the_type_of_the_factors(tmp_path: Path):
    """0.3 has no exact float16; a third has no exact float32, which is what JSON may say."""
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3).half(),
        "unet.conv_in.lora_B.weight": torch.ones(32, 2, 1, 1).half(),
    }
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 1 / 3})
    source = save_safetensors(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    weights.convert_lora(source, tmp_path / "b.safetensors", "kohya", TINY)
    alpha = load_file(tmp_path / "b.safetensors")["lora_unet_conv_in.alpha"]
    assert alpha.dtype == torch.float64
    assert alpha.item() == 1 / 3


def test_a_lora_without_alpha_is_written_with_its_rank(tmp_path: Path):
    tensors = {f"{KEYS[Q]}.lora_down.weight": torch.ones(3, 32), f"{KEYS[Q]}.lora_up.weight": torch.ones(32, 3)}
    weights.convert_lora(save_safetensors(tensors, tmp_path / "a.safetensors"), tmp_path / "b", "peft", TINY)
    settings = json.loads((tmp_path / "b/unet/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 3)
    assert read_lora(tmp_path / "b", TINY).changes[Q].alpha == 3


def test_matrices_of_a_1x1_convolution_are_written_as_its_layers(tmp_path: Path):
    tensors = {
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": normal("d", (2, 32)),
        "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": normal("u", (32, 2)),
    }
    weights.convert_lora(
        save_safetensors(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers", TINY
    )
    written = load_file(tmp_path / "b.safetensors")
    assert {key.rpartition(".proj_in.")[2]: list(value.shape) for key, value in written.items()} == {
        "lora_A.weight": [2, 32, 1, 1],
        "lora_B.weight": [32, 2, 1, 1],
    }


def test_every_kind_survives_in_kohyas_names(tmp_path: Path):
    """LoHa, LoKr, GLoRA, cores, DoRA and full differences, written again by us, are read as the same tensors."""
    a, b, core = normal("a", (32, 2)), normal("b", (2, 32)), normal("t", (2, 2, 3, 3))
    attn = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn"
    tensors = {
        **{f"{attn}1_to_q.hada_{part}": value for part,
            value in (("w1_a", a), ("w1_b", b), ("w2_a", a + 1), ("w2_b", b + 1))},
        **{f"{attn}1_to_k.lokr_{part}": value for part,
            value in (("w1", normal("w1", (4, 4))), ("w2_a", a[:8]), ("w2_b", b[:, :8].contiguous()))},
        **{f"{attn}1_to_v.{part}.weight": value for part, value in (("a1", a), ("a2", b), ("b1", a + 1), ("b2", b))},
        **{f"{attn}1_to_out_0.lora_{part}.weight": value for part, value in (("down", b), ("up", a))},
        f"{attn}1_to_out_0.dora_scale": normal("m", (1, 32)).abs(), f"{attn}1_to_out_0.diff_b": normal("bias", (32,)),
        **{f"{KEYS[CONV]}.lora_{part}.weight": value for part,
            value in (("down", b[..., None, None]), ("up", a[..., None, None]), ("mid", core))},
        "lora_unet_down_blocks_0_resnets_0_conv2.dora_scale": normal("m2", (32, 1, 1, 1)).abs(),
        "lora_unet_down_blocks_0_resnets_0_conv2.diff": normal("c", (32, 32, 3, 3)),
        "lora_unet_down_blocks_0_attentions_0_norm.w_norm": normal("n", (32,)),
        "lora_unet_down_blocks_0_attentions_0_norm.b_norm": normal("n2", (32,)),
    }  # fmt: skip
    tensors |= {
        f"{key.rpartition('.hada')[0] or key.partition('.lo')[0]}.alpha": torch.tensor(3.0)
        for key in tensors
        if key.endswith(("hada_w1_a", "w2_b", "mid.weight"))
    }
    tensors = {key: value.clone() for key, value in tensors.items()}
    source = save_safetensors(tensors, tmp_path / "a.safetensors")
    weights.convert_lora(source, tmp_path / "b.safetensors", "kohya", TINY)
    written = load_file(tmp_path / "b.safetensors")
    kept = {key: value for key, value in written.items() if key in tensors}
    assert same_bits(kept, tensors)
    assert all(key.endswith(".alpha") for key in written.keys() - tensors.keys())  # alphas that were left to the rank
    weight = build(TINY).state_dict()
    one, two = load_lora(source, TINY), load_lora(tmp_path / "b.safetensors", TINY)
    assert all(torch.equal(delta(change, weight[name]), delta(two[name], weight[name])) for name, change in one.items())


LOKR = {"lokr_w1": normal("w1", (4, 4)), "lokr_w2": normal("w2", (8, 8))}
MORE = {
    "LoHa": (HADA, "is a LoHa"),
    "LoKr": ({f"{KEYS[Q]}.{part}": value for part, value in LOKR.items()}, "is a LoKr"),
    "a core": ({f"{KEYS[CONV]}.{part}": value for part, value in KERNEL.items()}, "is a LoCon with a core"),
    "a full difference": ({f"{KEYS[Q]}.diff": normal("f", (32, 32))}, "is a full difference"),
}


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_a_dialect_cannot_hold_is_refused_by_name_or_re_expressed_on_purpose(kind: str, to: str, tmp_path: Path):
    tensors, what = MORE[kind]
    source = save_safetensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        FileError, match=rf"(to_q|in_layers.2) {what}, which {to} cannot hold; use --as-lora RANK"
    ) as caught:
        weights.convert_lora(source, tmp_path / "b", to, TINY)
    assert caught.value.key in (Q, CONV)
    assert not (tmp_path / "b").exists()
    made = weights.convert_lora(source, tmp_path / "b", to, TINY, as_lora=3)
    (name,) = (one.parameter for one in made.kept)
    shape = lora_names.shapes(TINY)[name]
    exact = delta(load_lora(source, TINY)[name], torch.zeros(shape)).double()
    values = spectrum(exact)
    left = (product(read_lora(tmp_path / "b", TINY).changes[name], shape) - exact).norm().item()
    assert left == pytest.approx(
        math.sqrt((values[3:] ** 2).sum()), abs=64 * HALF * exact.norm().item()
    )  # the tail, and 64 roundings
    assert made.kept[0].energy == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), abs=1e-6)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({f"{KEYS[Q]}.{part}.weight": normal(part, (32, 2) if part.endswith("1") else (2, 32))
                for part in ("a1", "a2", "b1", "b2")}, "to_q is a GLoRA.*; merge it instead"),
        ({f"{KEYS[Q].replace('to_q', 'to_out_0')}.diff_b": normal("b", (32,))},
            r"to_out.0.bias is a full difference.*; merge it instead"),
        ({f"{KEYS[Q]}.lora_down.weight": torch.ones(2, 32), f"{KEYS[Q]}.lora_up.weight": torch.ones(32, 2),
                f"{KEYS[Q]}.dora_scale": torch.ones(1, 32)}, "DoRA with a magnitude per input"),
        ({**HADA, f"{KEYS[Q]}.dora_scale": torch.ones(32, 1)}, "a DoRA of a LoHa"),
        (
            {
                f"{KEYS[Q]}.lora_down.weight": torch.ones(2, 32), f"{KEYS[Q]}.lora_up.weight": torch.ones(32, 2),
                f"{KEYS[Q]}.dora_scale": torch.ones(32, 1), f"{KEYS[CONV]}.lora_down.weight": torch.ones(2, 32, 3, 3),
                f"{KEYS[CONV]}.lora_up.weight": torch.ones(32, 2, 1, 1),
            },
            "to_q is a DoRA, others beside it are not: diffusers holds no mixture",
        ),
    ],
)  # fmt: skip
def test_what_no_product_can_say_is_refused_even_on_purpose(tensors: dict[str, Tensor], what: str, tmp_path: Path):
    source = save_safetensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=what) as caught:
        weights.convert_lora(source, tmp_path / "b.safetensors", "diffusers", TINY, as_lora=2)
    assert len(str(caught.value)) <= 200


def test_the_refiners_text_tower_has_no_settled_name(tmp_path: Path):
    config = shallow("sdxl-refiner")
    tensors = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 80),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(128, 2),
    }
    with pytest.raises(FileError, match="refiner's text tower"):
        weights.convert_lora(
            save_safetensors(tensors, tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers", config
        )


def test_families_that_have_the_same_targets_are_named(tmp_path: Path):
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 768), f"{name}.lora_up.weight": torch.ones(3072, 1)}
    path = save_safetensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(
        AmbiguousCheckpoint, match="targets that sd1, ssd-1b, sdxl-base have alike; say which with --family"
    ):
        weights.convert_lora(path, tmp_path / "b.safetensors", "diffusers")
    assert weights.convert_lora(path, tmp_path / "b.safetensors", "diffusers", "sdxl-base").family == "sdxl-base"


def test_a_file_that_is_no_lora_says_so_whatever_the_family(tmp_path: Path):
    with pytest.raises(FileError, match="is no LoRA: it begins with a"):
        weights.convert_lora(
            save_safetensors({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors"),
            tmp_path / "b.safetensors",
            "diffusers",
        )
    with pytest.raises(FileError, match="targets of no one family"):
        weights.convert_lora(some_lora(tmp_path / "c.safetensors"), tmp_path / "b.safetensors", "diffusers")
    with pytest.raises(FileError, match="is a directory without a LoRA"):
        weights.convert_lora(tmp_path, tmp_path / "b.safetensors", "diffusers")


# --- other programs ---------------------------------------------------------------------------------------------------


def peer_unet(model):
    """diffusers' UNet of TINY's sizes with a model's weights."""
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    names = {f"unet.{ours}": theirs for ours, theirs in weights.names.diffusers.diffusers_unet(TINY.unet).items()}
    state = model.state_dict()
    peer.load_state_dict({theirs: state[ours] for ours, theirs in names.items()})
    return peer.eval()


def peer_text(model):
    """transformers' text tower of TINY's sizes with a model's weights, under the names of its version."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        hidden_act="quick_gelu",
    )
    peer = transformers.CLIPTextModel(config)
    state = {
        name.removeprefix("text.0."): value for name, value in model.state_dict().items() if name.startswith("text.0.")
    }
    bare = not any(key.startswith("text_model.") for key in peer.state_dict())
    peer.load_state_dict(
        {key.removeprefix("text_model.") if bare else key: value for key, value in state.items()}, strict=False
    )
    return peer.eval()


def whole_lora(path: Path, **extra: Tensor) -> Path:
    """A LoRA in kohya's names of every layer of TINY that has one, ranks 2 and 3, alphas 1, 2.5 and the rank, strong
    enough to show."""
    tensors = dict(extra)
    names = kohya_names(TINY)
    for i, (name, shape) in enumerate(lora_names.shapes(TINY).items()):
        if len(shape) < 2 or "embedding" in name:
            continue
        key, r = names[name.removesuffix(".weight")], 2 + i % 2
        tensors[f"{key}.lora_down.weight"] = normal(f"{name} down", (r, *shape[1:])) * 0.2
        tensors[f"{key}.lora_up.weight"] = normal(f"{name} up", (shape[0], r, *(1 for _ in shape[2:]))) * 0.2
        if i % 3:
            tensors[f"{key}.alpha"] = torch.tensor(1.0 if i % 3 == 1 else 2.5)
    return save_safetensors(tensors, path)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return normal("x", (1, 4, 8, 8)), torch.tensor([500.0]), normal("context", (1, 5, 64))


def require_same(ours: Tensor, theirs: Tensor, before: Tensor) -> None:
    """Equal to 1e-5 of the largest number, which the LoRA moves by far more."""
    size = ours.abs().max().item()
    assert (ours - theirs).abs().max().item() <= 1e-5 * size
    assert (ours - before).abs().max().item() > 1e-2 * size


@pytest.fixture
def merged(tmp_path: Path):
    """(model as it was, the same with a LoRA merged, the LoRA's file)"""
    path = whole_lora(tmp_path / "a.safetensors")
    model, before = build(TINY), build(TINY)
    merge(model, [(load_lora(path, TINY), 1)])
    return before, model, path


@torch.no_grad()
def test_diffusers_draws_the_same_with_what_is_written_for_it(merged, tmp_path: Path):
    """Through `load_lora_weights` of a pipeline, which gives each network its part of the file and of the metadata."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    before, model, source = merged
    path = tmp_path / "b.safetensors"
    weights.convert_lora(source, path, "diffusers", TINY)
    unet, text = peer_unet(before), peer_text(before)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4), text_encoder=text, tokenizer=None,
        unet=unet, scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    x, t, context = inputs()
    require_same(model.unet(x, t, context), pipe.unet(x, t, context).sample, before.unet(x, t, context))
    ids = torch.arange(10, 87)[None]
    require_same(tower(model, ids), pipe.text_encoder(ids).last_hidden_state, tower(before, ids))


def tower(model, ids: Tensor) -> Tensor:
    """The last hidden state of the text tower, after its final norm."""
    encoder = model.text[0]
    return encoder(ids)[0]


@torch.no_grad()
def test_peft_draws_the_same_with_what_is_written_for_it(merged, tmp_path: Path):
    peft = pytest.importorskip("peft")
    before, model, source = merged
    weights.convert_lora(source, tmp_path / "b", "peft", TINY)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["text_encoder", "unet"]
    x, t, context = inputs()
    unet = peft.PeftModel.from_pretrained(peer_unet(before), tmp_path / "b/unet")
    require_same(model.unet(x, t, context), unet(x, t, context).sample, before.unet(x, t, context))
    ids = torch.arange(10, 87)[None]
    text = peft.PeftModel.from_pretrained(peer_text(before), tmp_path / "b/text_encoder")
    require_same(tower(model, ids), text(ids).last_hidden_state, tower(before, ids))


@torch.no_grad()
def test_a_dora_of_peft_goes_to_kohyas_names_and_back_to_diffusers(tmp_path: Path):
    peft = pytest.importorskip("peft")
    before = build(TINY)
    peer = peer_unet(before)
    peer.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1", "proj_in"], use_dora=True))
    for name, p in peer.named_parameters():
        if "lora_" in name:
            p.data = normal(name, p.shape) * 0.2 + ("magnitude" in name)
    peer.save_lora_adapter(tmp_path)
    weights.convert_lora(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors", "kohya", TINY)
    with weights.open_file(tmp_path / "kohya.safetensors") as file:
        assert (file.metadata["ss_network_dim"], file.metadata["ss_network_alpha"]) == ("4", "6.0")
    weights.convert_lora(tmp_path / "kohya.safetensors", tmp_path / "again.safetensors", "diffusers", TINY)
    again = peer_unet(before)
    again.load_lora_adapter(tmp_path, weight_name="again.safetensors", prefix="unet")
    x, t, context = inputs()
    require_same(peer(x, t, context).sample, again(x, t, context).sample, before.unet(x, t, context))


def test_what_peft_saves_of_each_network_is_read(tmp_path: Path):
    """SDXL's two towers have the same names in peft's files: the folders tell them apart."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, name="sdxl-base", text=(TINY.text[0], replace(TINY.text[0], projection=48)))
    for name, kind in (
        ("text_encoder", transformers.CLIPTextModel),
        ("text_encoder_2", transformers.CLIPTextModelWithProjection),
    ):
        text = kind(transformers.CLIPTextConfig(
            vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            projection_dim=48, bos_token_id=0, eos_token_id=1
        ))  # fmt: skip
        adapted = peft.get_peft_model(text, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc1"]))
        for p in adapted.parameters():
            p.data.fill_(len(name))
        adapted.save_pretrained(tmp_path / "a" / name)
    found = read_lora(tmp_path / "a", config).changes
    assert {name: (change.up[0, 0].item(), change.alpha) for name, change in found.items()} == {
        f"text.{i}.text_model.encoder.layers.{n}.mlp.fc1.weight": (length, 5.0)
        for i, length in ((0, 12.0), (1, 14.0))
        for n in range(3)
    }
    weights.convert_lora(tmp_path / "a", tmp_path / "b.safetensors", "kohya", config)
    assert {key[:7] for key in load_file(tmp_path / "b.safetensors")} == {"lora_te"}
    weights.convert_lora(tmp_path / "b.safetensors", tmp_path / "c", "peft", config)
    again = read_lora(tmp_path / "c", config).changes
    assert all(torch.equal(again[name].up, change.up) for name, change in found.items())
    with pytest.raises(FileError, match="is for text tower 2, a model of family sd1 has 1"):
        read_lora(tmp_path / "c", TINY)
