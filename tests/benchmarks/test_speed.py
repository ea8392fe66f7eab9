"""The benchmarks' commands on tiny networks: what they print and write, and that they can say no."""

from __future__ import annotations

import json
import platform
from itertools import product

import pytest
import torch
from PIL import Image, ImageColor

from benchmarks import load, machine, parity, speed
from benchmarks.models import peers
from benchmarks.models.seeded import golden
from benchmarks.sides import all as sides
from benchmarks.sides import cells, process
from benchmarks.timing import floors, plot, rounds, rows, turns
from ldm.config import FAMILIES
from ldm.model import LatentDiffusion
from tests.made.checkpoints import TINY

INPUTS = {"x_T", "cond", "uncond", "ids_pad_eot", "ids_pad0", "sdxl/sizes", "ssd-1b-tiny/time_ids"}


@pytest.fixture
def no_diffusers(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)


def test_parity_has_a_row_for_every_golden_output(tmp_path, capsys):
    assert parity.main(["--out", str(tmp_path / "parity.json")]) == 0
    found = json.loads((tmp_path / "parity.json").read_text())
    rows = found["rows"]
    assert all(row["ok"] for row in rows)
    samplers = {row["name"] for row in rows if row["kind"] in ("sampler", "grid")}
    assert samplers == set(golden("samplers")) - INPUTS
    assert len(rows) - len(samplers) == 1 + sum(
        len(set(golden(file)) - INPUTS) for file in ("unet", "vae", "text", "vision", "dpt")
    )  # 1: the tokens
    assert sum(row["exact"].endswith("timesteps") for row in rows) > 10
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in rows)
    assert f"{len(rows)} outputs, 0 beyond the limit" in printed


def test_parity_says_no_to_what_is_too_far_or_not_equal(monkeypatch, capsys):
    ones = torch.ones(2, 3)
    nudged = ones.clone()
    nudged[0, 0] += 2e-5
    assert parity.compared("unet", "same", ones, ones).ok
    assert not parity.compared("unet", "one element off", nudged, ones).ok
    assert parity.compared("sampler", "one element off, the rest not", nudged, ones, elementwise=False).ok
    assert not parity.compared("unet", "NaN", ones * torch.nan, ones).ok
    assert parity.compared("sampler", "equal", ones, ones, parity.equal([1, 2], [1, 2], "timesteps")).ok
    assert not parity.compared("sampler", "another", ones, ones, parity.equal([1, 3], [1, 2], "timesteps")).ok
    assert not parity.compared("sampler", "one more", ones, ones, parity.equal([1, 2, 3], [1, 2], "timesteps")).ok
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        parity.compared("unet", "another shape", ones[:1], ones)
    monkeypatch.setattr(parity, "golden_rows", lambda: iter([parity.compared("unet", "one element off", nudged, ones)]))
    assert parity.main([]) == 1
    assert "FAR" in capsys.readouterr().out


def test_without_diffusers_one_line_says_what_to_install(no_diffusers, monkeypatch, capsys):
    for command, arguments in ((parity.main, ["--full"]), (speed.main, ["--tiny"])):
        monkeypatch.setattr(
            parity, "require", lambda extra, *modules: peers.require(extra, *modules) if extra == "bench" else None
        )
        with pytest.raises(SystemExit) as left:
            command(arguments)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.endswith("pip install '.[bench]'\n")
        assert said.count("\n") == 1


@pytest.mark.parametrize("config", [TINY, cells.config_of("sd1", tiny=True)], ids=["two levels", "four levels"])
def test_the_networks_agree_with_diffusers_and_transformers(config):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    rows = list(parity.peer_rows(config, cells=8))
    assert len(rows) == 4
    for row in rows:
        assert row.ok, row


def test_peers_share_the_weights():
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    model = peers.seeded_model(TINY)
    theirs = peers.peer(model)
    addresses = {p.data_ptr() for p in model.parameters()}
    for network in (theirs.unet, theirs.vae, theirs.text):
        assert {p.data_ptr() for p in network.parameters()} <= addresses


def test_peers_of_full_size_have_the_same_names_and_shapes():
    """Without memory for them: what `parity --full` and `speed` will build."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    with torch.device("meta"):
        theirs = peers.peer(LatentDiffusion(FAMILIES["sd1"]))
    assert sum(p.numel() for p in theirs.unet.parameters()) == 859_520_964


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of `speed --tiny --quick` without the sides that need minutes: what it returned, wrote and drew."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    folder = tmp_path_factory.mktemp("speed")
    chosen, files = ["ldm", "diffusers", "sdcpp"], [f"--out={folder / 'speed.json'}", f"--plot={folder / 'speed.png'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "peak", lambda *_: {"rates": {"float32": {"assumed": 1e11}}, "best": 1e11})
        patch.setitem(sides.NEEDS, "sdcpp", ("stable_diffusion_cpp_that_nobody_has", "stable-diffusion-cpp-python"))
        status = speed.main(
            ["--tiny", "--quick", "--side", *chosen, "--threads=1", f"--cache={folder / 'cache'}", *files]
        )
    return status, json.loads((folder / "speed.json").read_text()), Image.open(folder / "speed.png")


def test_speed_has_a_row_for_every_cell_and_side(measured):
    status, found, _ = measured
    assert status == 0
    assert [(row["stage"], row["side"]) for row in found["rows"]] == list(
        product(["picture", "step", "text", "decode"], ["ldm", "diffusers", "sdcpp"])
    )
    timed = [row for row in found["rows"] if row["side"] != "sdcpp"]
    for row in timed:
        assert row["status"] == "same", row
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["repeats"] == 2
        assert row["turns"] == "in turn"
        assert row["of_floor"] == row["seconds"]["median"] / row["floor"] > 0
        assert row["floor"] == row["flops"] / found["peak"]["best"]
    for ours, theirs in zip(timed[::2], timed[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(theirs["seconds"]["median"] / ours["seconds"]["median"])
        assert theirs["ratio"] == 1
    assert all((row["cold"] is not None) == (row["stage"] == "picture") for row in timed)
    assert [side["side"] for side in found["sides"]] == ["ldm", "diffusers"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["settings"]["threads"] == found["machine"]["threads"] == 1


def test_a_peer_that_is_not_installed_has_rows_that_say_so(measured):
    absent = [row for row in measured[1]["rows"] if row["side"] == "sdcpp"]
    assert {(row["status"], row["why"]) for row in absent} == {
        ("absent", "stable_diffusion_cpp_that_nobody_has is not installed: pip install stable-diffusion-cpp-python")
    }
    assert all(row["seconds"] is None and row["ratio"] is None for row in absent)


def test_openvino_has_no_rows_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sides.importlib.util, "find_spec", lambda name: object())
    assert sides.missing("openvino", "cuda") == "OpenVINO does not run on cuda"
    assert sides.missing("openvino", "cpu") is None


def test_ratios_are_drawn(measured):
    _, found, picture = measured
    cells = len({row["cell"] for row in found["rows"]})
    assert picture.size == (
        plot.WIDTH,
        plot.HEAD + 2 * plot.MARGIN + cells * (2 * (plot.BAR + plot.GAP) + plot.CELL_GAP),
    )
    row = {"model": "sd1", "dtype": "float32", "cell": "step", "side": "fast", "seconds": {"median": 1.0}}
    drawn = plot.draw([{**row, "ratio": 2.0}, {**row, "ratio": 0.5}, {**row, "ratio": None}], "title", "caption")
    bars = [
        sum(
            drawn.getpixel((x, plot.HEAD + plot.MARGIN + 2 + i * (plot.BAR + plot.GAP)))
            == ImageColor.getrgb(plot.COLOURS["fast"])
            for x in range(plot.WIDTH)
        )
        for i in range(2)
    ]
    assert bars[0] == pytest.approx(
        4 * bars[1], abs=8
    )  # pixels: ends are rounded, and the line at 1 crosses the longer bar
    assert bars[1] > 100


@pytest.mark.parametrize("family", cells.MODELS)
def test_every_family_is_the_same_on_all_sides(family, tmp_path):
    """Both pictures of every family, from one folder of weights: samplers, scheduler, sizes, both text towers."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    config = cells.config_of(family, tiny=True)
    peers.write_folder(config, tmp_path / "folder", torch.float32)
    outputs = {}
    for side in ("ldm", "diffusers"):
        make = sides.SIDES[side](cells.Job(side, family, True, str(tmp_path / "folder"), "", "float32", "cpu", None))
        with torch.no_grad():
            outputs[side] = [
                make(cells.Cell("picture", 2, 64, *sampler))()
                for sampler in (("ddim", 3), ("dpmpp_2m", 3), ("dpmpp_2m", 16))
            ]
    for ours, theirs in zip(*outputs.values(), strict=True):
        assert ours.shape == (2, 64, 64, 3)
        assert not torch.equal(ours[0], ours[1])
        assert rows.check({"diffusers": theirs}, ours, "float32")["diffusers"]["status"] == "same"


@pytest.mark.slow  # tracing and compiling take half a minute
@pytest.mark.parametrize("family", ["sd1", "sdxl-base"])
def test_openvino_computes_the_same(family, tmp_path):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    pytest.importorskip("openvino", reason="the comparison needs the extra 'bench'")
    out = tmp_path / "speed.json"
    assert (
        speed.main(
            [
                "--tiny",
                "--model",
                family,
                "--side",
                "ldm",
                "openvino",
                "--batch",
                "1",
                "2",
                "--sampler",
                "ddim:2",
                "--repeats=1",
                f"--out={out}",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * 2 * 4
    assert {row["status"] for row in found["rows"]} == {"same"}
    assert {each["what"] for each in found["growth"]} == {"batch"}


def test_a_side_that_computes_something_else_is_void():
    out, other = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.0001])

    def status(found, reference, dtype="float32"):
        return {side: each["status"] for side, each in rows.check(found, reference, dtype).items()}

    assert status({"fast": out, "diffusers": out}, out) == {"fast": "same", "diffusers": "same"}
    assert status({"fast": other, "diffusers": out}, out) == {"fast": "void", "diffusers": "same"}
    assert status({"fast": out, "diffusers": other}, out) == {"fast": "same", "diffusers": "void"}
    assert status({"fast": out * torch.inf}, out) == {"fast": "void"}
    assert status({"fast": out}, None) == {"fast": "not compared"}
    half = {"diffusers": (out * 0.99).bfloat16()}
    assert status({**half, "fast": (out * 1.01).bfloat16()}, out, "bfloat16") == {"fast": "same", "diffusers": "same"}
    assert status({**half, "fast": (out * 1.05).bfloat16()}, out, "bfloat16") == {"fast": "void", "diffusers": "same"}
    assert status({"fast": out.bfloat16()}, out, "bfloat16") == {"fast": "not compared"}
    picture = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    rounded = picture.clone()
    rounded[0, 0, 0, 0] += 1
    assert status({"fast": rounded}, picture) == {"fast": "same"}
    assert status({"fast": picture + 1}, picture) == {"fast": "void"}


def test_a_void_row_has_times_but_no_ratio():
    job = cells.Job("ldm", "sd1", True, "", "", "float32", "cpu", None)
    entry = {"first": 3.0, "cold": None, "peak": 1, "device_peak": None}
    found = {
        side: {**entry, "seconds": [seconds] * 3, "output": torch.ones(4)}
        for side, seconds in (("ldm", 1.0), ("fast", 0.5), ("diffusers", 2.0))
    }
    cell = cells.Cell("step", 1, 64)

    def ratios():
        return {
            row["side"]: (row["status"], row["ratio"]) for row in rows.finished(job, cell, found, None, 1e9, "in turn")
        }

    assert ratios() == {"ldm": ("same", 2.0), "fast": ("same", 4.0), "diffusers": ("same", 1.0)}
    found["fast"]["output"] = torch.full((4,), 1.1)
    assert ratios() == {"ldm": ("same", 2.0), "fast": ("void", None), "diffusers": ("same", 1.0)}
    found["diffusers"]["output"] = torch.full((4,), 1.1)
    assert ratios() == {"ldm": ("same", None), "fast": ("void", None), "diffusers": ("void", None)}
    found["openvino"] = {"failed": "no memory"}
    assert ratios()["openvino"] == ("failed", None)


def test_a_void_or_failed_row_is_an_exit_status(monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    row = {
        "model": "sd1",
        "cell": "step, 1 at 64",
        "side": "fast",
        "seconds": None,
        "why": "it fell over",
        "cold": None,
    }
    monkeypatch.setattr(speed, "write_folder", lambda *_: None)
    monkeypatch.setattr(speed, "peak", lambda *_: {"rates": {}, "best": 1e9})
    for status, code in (("failed", 1), ("void", 1), ("absent", 0)):
        monkeypatch.setattr(speed, "rows_of", lambda *_, status=status: iter([{**row, "status": status}]))
        assert speed.main(["--tiny"]) == code
        assert f"{status}: it fell over" in capsys.readouterr().out


def test_growth_is_shown_beside_that_of_the_flops():
    row = {
        "model": "sdxl-base",
        "dtype": "float32",
        "side": "fast",
        "stage": "step",
        "sampler": "",
        "steps": 0,
        "batch": 1,
        "size": 512,
        "status": "same",
    }
    found = rows.growth([
        {**row, "seconds": {"median": 2.0}, "flops": 10}, {**row, "seconds": {"median": 5.0}, "flops": 30, "size": 1024},
        {**row, "seconds": {"median": 3.0}, "flops": 20, "batch": 2}, {**row, "seconds": {"median": 1.0}, "flops": 5, "model": "ssd-1b"},
        {**row, "seconds": {"median": 9.0}, "flops": 99, "size": 2048, "status": "void"},
    ])  # fmt: skip
    assert [(each["what"], each["from"], each["to"], each["times"], each["flops"]) for each in found] == [
        ("size", 512, 1024, 2.5, 3.0), ("batch", 1, 2, 1.5, 2.0), ("model", "ssd-1b", "sdxl-base", 2.0, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "size", "step", "decode"),
    [
        ("sd1", 512, 1.607, 2.515),
        ("sd2-v", 768, 4.298, 5.754),
        ("sdxl-base", 1024, 13.523, 10.470),
        ("ssd-1b", 1024, 8.416, 10.470),
    ],
)
def test_flops_are_those_of_the_published_networks(family, size, step, decode):
    """TFLOP of a guided step and of decoding, counted with diffusers' networks of the published configs on the meta device."""
    config = cells.config_of(family)
    for stage, tera in (("step", step), ("decode", decode)):
        assert floors.flops(config, cells.Cell(stage, 1, size)) == pytest.approx(tera * 1e12, abs=1e9)
    whole = floors.flops(config, cells.Cell("picture", 1, size, "ddim", 20))
    assert whole == sum(
        n * floors.flops(config, cells.Cell(stage, 1, size)) for stage, n in (("step", 20), ("text", 1), ("decode", 1))
    )


def test_the_rate_of_a_machine_is_its_best(monkeypatch):
    sizes = []

    def operations(device, dtype, cells):
        sizes.append((dtype, cells))
        return [(name, name, cells * count) for name, count in (("product", 3), ("convolution", 5))]

    monkeypatch.setattr(floors, "_operations", operations)
    monkeypatch.setattr(floors, "_best", lambda call, device: 0.125 if sizes[-1][0] == torch.float32 else 1.0)
    found = floors.peak("cpu", torch.bfloat16)
    assert found == {
        "rates": {
            "float32": {"product": 64 * 3 * 8, "convolution": 64 * 5 * 8},
            "bfloat16": {"product": 8 * 3, "convolution": 8 * 5},
        },
        "best": 64 * 5 * 8,
    }
    assert len(sizes) == 4 + 1  # what is slow already is not made larger


def test_the_operations_whose_rate_is_measured_have_the_flops_that_are_said():
    for _, call, count in floors._operations("meta", torch.float32, 8):
        assert floors._counted(call) == count


def test_sides_take_turns():
    order = []
    found = turns.in_turn({side: lambda side=side: order.append(side) or 1.0 for side in "ab"}, 3)
    assert "".join(order) == "ababab"
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_side_that_fails_says_why(tmp_path):
    job = cells.Job("ldm", "sd1", True, str(tmp_path / "nothing"), "", "float32", "cpu", 1)
    with pytest.raises(process.SideFailed, match="nothing") as failed:
        turns.Turns(job)
    assert str(tmp_path) not in str(failed.value)  # it goes into a file that others read


def test_where_files_lie_is_not_told():
    said = "FileError: /some/where/x.bin: see https://a.org/b/c, 'k/v' and (/else/where/y.py:3) 1/2"
    assert machine.without_folders(said) == "FileError: x.bin: see https://a.org/b/c, 'k/v' and (y.py:3) 1/2"


def test_where_no_side_can_be_measured_every_row_says_so_once(monkeypatch):
    job, cell = cells.Job("ldm", "sd1", True, "", "", "float32", "cpu", 1), cells.Cell("step", 1, 64)
    monkeypatch.setattr(rounds, "missing", lambda side, device: "not here")
    found = [*rounds.rows_of(job, ["openvino", "sdcpp"], [cell], 1, 1e11, [])]
    assert [(row["side"], row["status"], row["why"]) for row in found] == [
        ("openvino", "absent", "not here"),
        ("sdcpp", "absent", "not here"),
    ]


def test_without_a_reference_half_precision_is_not_compared(monkeypatch):
    def failing(job):
        return process.SideFailed("no memory")

    monkeypatch.setattr(rounds, "attempted", failing)
    job = cells.Job("fast", "sd1", True, "", "", "bfloat16", "cpu", 1)
    assert rounds.references(job, [cells.Cell("step", 1, 64)]) == {}


def test_a_diffusers_that_gives_nan_voids_itself_alone():
    good = torch.ones(1, 4, 8, 8)
    found = rows.check({"diffusers": good * float("nan"), "fast": good}, good, "bfloat16")
    assert [found[side]["status"] for side in ("diffusers", "fast")] == ["void", "not compared"]
    assert found["diffusers"]["error"] is None


def test_sides_that_do_not_fit_into_memory_are_measured_one_after_the_other(monkeypatch):
    job, cell = cells.Job("ldm", "sdxl-base", False, "", "", "float32", "cpu", None), cells.Cell("step", 1, 1024)
    for gigabytes, together, large in ((100, True, set()), (36, False, set()), (24, True, {"openvino"})):
        monkeypatch.setattr(machine, "available", lambda gigabytes=gigabytes: gigabytes * 1e9)
        found = rounds.fitting(job, ["ldm", "openvino"], [cell])
        assert (found[0], set(found[1])) == (together, large)
    assert found[1]["openvino"] == "needs about 33.0 GB where 24.0 are free"


def test_sides_one_after_the_other_have_the_same_rows(measured, monkeypatch, tmp_path):
    """The folder of weights is a fresh one, in a passing cache; nothing fits beside anything."""
    monkeypatch.setattr(rounds, "fitting", lambda job, sides, cells: (False, {}))
    monkeypatch.setattr(speed, "peak", lambda *_: {"rates": {}, "best": 1e11})
    out = tmp_path / "speed.json"
    assert (
        speed.main(
            [
                "--tiny",
                "--side",
                "diffusers",
                "ldm",
                "--stage",
                "text",
                "step",
                "--size",
                "64",
                "128",
                "--repeats=1",
                "--threads=1",
                f"--out={out}",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert [(row["stage"], row["size"], row["side"]) for row in found["rows"]] == [
        (*cell, side) for cell in (("step", 64), ("step", 128), ("text", 64)) for side in ("diffusers", "ldm")
    ]
    assert all(
        row["status"] == "same" and row["ratio"] and row["turns"].startswith("one side after the other")
        for row in found["rows"]
    )
    assert {(each["what"], each["side"]) for each in found["growth"]} == {("size", "diffusers"), ("size", "ldm")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size=100"],
        ["--size=32"],
        ["--repeats=0"],
        ["--sampler=ddim:1000"],
        ["--sampler=plms:5"],
        ["--batch=0"],
        ["--threads=0"],
        ["--dtype=int8"],
        ["--device=mps"],
        ["--stage=text", "--quick"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        speed.main(arguments)
    assert left.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err


def test_a_machine_is_described_but_not_named():
    found = machine.machine(packages=("einops", "no-such-package"))
    assert found["cpu"]
    assert found["torch"] == torch.__version__
    assert found["einops"]
    assert found["no-such-package"] is None
    assert platform.node() not in [str(value) for value in found.values()]


def test_loading_is_timed_beside_others_with_every_tensor_read(tmp_path, capsys):
    assert (
        load.main(["--tiny", "--repeats", "1", "--row", "single", "--cold", "--out", str(tmp_path / "load.json")]) == 0
    )
    rows = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert [(row["side"], row["cold"]) for row in rows] == [("raw", True), ("ldm", True)]
    assert all(0 < row["returned"] <= row["read"] and row["peak"] > row["bytes"] > 1e6 for row in rows)
    assert "of raw (" in capsys.readouterr().out


def test_every_form_can_be_loaded_and_converted_by_the_benchmark(tmp_path):
    forms = load.prepare(tmp_path, "sd1", torch.float16, tiny=True)
    sizes = {
        row: load.one("ldm", row, forms[row.split(" ")[0]], forms["folder"], cold=False)["bytes"]
        for row in (*load.LOADS, *load.CONVERSIONS)
    }
    assert len({sizes[row] for row in load.LOADS}) == 1
    assert all(size >= sizes["single"] for size in sizes.values())


def test_a_ratio_says_whether_it_is_what_it_should_be():
    row = {"row": "single", "read": 1.0}
    assert load._against(row, "raw", 0.95) == "1.05 of raw (<= 1.1)"
    assert load._against(row, "diffusers", 1.9) == "0.53 of diffusers (not <= 0.5)"
