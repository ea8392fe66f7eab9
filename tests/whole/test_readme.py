"""What the README files show is what happens.

Every block of code runs, every link resolves, every file that is named exists, every table is made from results.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import samplers
import weights
from ldm import blocks
from ldm.__main__ import main
from ldm.train.reading import names
from tests.made.checkpoints import TINY, Call, Name, checkpoint, ckpt_of, safetensors_of, save_zip, tensor
from tests.made.families import build, tiny
from tests.made.tables import MARK, TABLES, renewed
from weights import convert, open_file

ROOT = Path(__file__).parents[2]
FOUND = [path.relative_to(ROOT) for path in ROOT.glob("**/README.md")]
PAGES = sorted(path.as_posix() for path in FOUND if "golden" not in path.parts and path.parts[0][0] != ".")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, kind, code) for page in PAGES for kind, code in BLOCK.findall(TEXTS[page])]
ROOMS = ["", "samplers", "ldm", "ldm/train", "ldm/fast", "weights", "benchmarks", "tests"]


def blocks_of(page: str, kind: str) -> list[str]:
    """The blocks of code of one kind in a page."""
    return [code for where, what, code in BLOCKS if (where, what) == (page, kind)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- the pages --------------------------------------------------------------------------------------------------------


def test_every_room_has_its_page_and_the_first_is_short() -> None:
    assert {str(Path(room, "README.md")) for room in ROOMS} == set(PAGES)
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert len(TEXTS["README.md"].encode()) <= 12_000


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_resolves(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", TEXTS[page])):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    """Words with a directory or an extension of ours, in backticks: relative to the page, or to the top."""
    for words in re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXTS[page])):
        for word in words.split():
            if re.fullmatch(r"[\w./-]*/[\w./-]*|[\w-]+\.(py|cpp|json|toml)", word) and not re.match(
                r"\w+\.json(l)?$|log\.", word
            ):
                places = [(ROOT / page).parent / word, ROOT / word]
                assert word in MADE or any(place.exists() for place in places), word


MADE = {"lora.toml", "-m", "runs/photos", "outputs/00001.png"}  # files that a command makes, or that the page shows


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_figures_is_made_from_results(page: str) -> None:
    assert renewed(TEXTS[page]) == TEXTS[page], "python -m tests.made.tables makes them anew"


def test_every_table_stands_in_a_page() -> None:
    assert sorted(found for text in TEXTS.values() for found in MARK.findall(text)) == sorted(TABLES)


def test_every_block_of_code_has_a_test_here() -> None:
    kinds = {"python": PYTHON, "sh": SHELL, "console": {"weights/README.md": 1}, "toml": {"ldm/train/README.md": 1}}
    counted = {(page, kind): len(blocks_of(page, kind)) for page, kind, _ in BLOCKS if kind}
    assert counted == {
        (page, kind): n if isinstance(n, int) else len(n) for kind, pages in kinds.items() for page, n in pages.items()
    }
    assert [page for page, kind, _ in BLOCKS if not kind] == ["README.md"]  # the tree


# --- Python -----------------------------------------------------------------------------------------------------------

CONFIG = replace(TINY, text=(replace(TINY.text[0], vocab=49408),))


def shipped(path: str) -> None:
    """The model that ships, under another name."""
    shutil.copy(next((ROOT / "weights" / "embedded").glob("*.safetensors")), path)


def model(path: str, change: float = 0.0, **options) -> None:
    """A tiny model that says its own sizes; `change` moves the attention of its UNet by matrices of rank 2."""
    state = checkpoint(CONFIG, **options)
    for key, value in state.items():
        if change and ".attn" in key and key.startswith("model.diffusion_model.") and value.ndim == 2:
            torch.manual_seed(0)
            state[key] = value + change * torch.randn(len(value), 2) @ torch.randn(2, value.shape[1])
    save_zip({"state_dict": state}, Path("raw.ckpt"))
    convert("raw.ckpt", path, config=CONFIG)
    Path("raw.ckpt").unlink()


def base_and_tuned() -> None:
    """Two models, one made from the other by matrices of rank 2."""
    model("base.safetensors")
    model("tuned.safetensors", change=0.02)


def run(code: str, **changes: str) -> dict:
    """The names that a block leaves, run with some of its words exchanged, each of which must be there."""
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    scope: dict = {}
    exec(code, scope)
    return scope


def ten_lines(code: str) -> None:
    shipped("v1-5-pruned-emaonly.safetensors")
    run(code, **{"512, 512": "64, 64"})
    assert Image.open("lighthouse.png").size == (64, 64)


def exchanged(code: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        network = run(code)["model"].unet
    assert "attn1.attend (" in out.getvalue()
    assert not any(type(module).__name__ == "Noted" for module in network.modules())


def describes(code: str) -> None:
    weights.save(build(tiny("sdxl-base")), "sd_xl_base_1.0.safetensors")
    run(code)


def eulers(code: str) -> None:
    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x / (1 + sigma**2)

    x, sigmas = torch.ones(1, 4, 2, 2), samplers.karras(samplers.Schedule(), 5)
    torch.testing.assert_close(run(code)["euler"](denoise, x, sigmas), samplers.euler(denoise, x, sigmas))


def mine(code: str) -> None:
    try:
        run(code)
        line = "txt2img 'a red cube' --sampler mine --steps 4 --seed 7 --no-fast --dtype float32 --out cli.png"
        assert main(shlex.split(line)) == 0
    finally:
        del samplers.SAMPLERS["mine"]
    assert Image.open("mine.png").tobytes() == Image.open("cli.png").tobytes()


def tasks_draw(code: str) -> None:
    assert len(run(code, **{"steps=20": "steps=2"})["large"]) == 1


def directory(code: str) -> None:
    Path("models").mkdir()
    model("models/full.ckpt", ema="full")
    model("models/plain.ckpt")
    style = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(4, 8)}
    save_zip(style, Path("models/style.ckpt"))
    run(code)
    made = [f"{name}.{end}" for name in ("full", "plain") for end in ("ckpt", "json", "safetensors")]
    assert sorted(path.name for path in Path("models").iterdir()) == [*made, "style.ckpt"]
    with open_file("models/full.safetensors") as file, open_file("models/full.ckpt") as source:
        assert file["model.diffusion_model.out.2.weight"].equal(source["model_ema.diffusion_modelout2weight"].half())
        assert "alphas_cumprod" not in file


def learned(code: str) -> None:
    base_and_tuned()
    assert "a LoRA of rank about 2" in run(code)["found"].verdict.text
    with open_file("learned.safetensors") as file:
        assert {file.shape(key)[0] for key in file if key.endswith("lora_down.weight")} <= {1, 2}


def on_the_way(code: str) -> None:
    base_and_tuned()
    run(code, **{'["a lighthouse in a storm"]': '["x"]', "seeds=[7]": "seeds=[7], steps=1, width=64, height=64"})
    pictures = [Path(f"mix-{percent}.png").read_bytes() for percent in (0, 25, 50, 75, 100)]
    assert len(set(pictures)) == 5


PYTHON: dict[str, list[Callable[[str], object]]] = {  # what runs each block of a page, in order
    "README.md": [ten_lines, exchanged],
    "ldm/README.md": [describes, tasks_draw],
    "ldm/fast/README.md": [run],
    "samplers/README.md": [eulers, run, mine],
    "weights/README.md": [directory, learned, on_the_way],
}
CASES = [(page, i, test) for page, tests in PYTHON.items() for i, test in enumerate(tests)]


@pytest.mark.parametrize(
    ("page", "i", "test"),
    CASES,
    ids=[f"{page.split('/')[-2] if '/' in page else 'main'}-{test.__name__}" for page, _, test in CASES],
)
def test_a_block_of_python_does_what_it_shows(page: str, i: int, test: Callable[[str], object]) -> None:
    test(blocks_of(page, "python")[i])


# --- the shell --------------------------------------------------------------------------------------------------------

SHELL = {"README.md": 3, "ldm/train/README.md": 2, "tests/README.md": 1}  # blocks
QUICK = {"txt2img": ["--steps", "1", "--width", "64", "--height", "64"], "train": ["--show"]}
LINES = [line for page in SHELL for code in blocks_of(page, "sh") for line in code.splitlines()]


def test_the_installations_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page, text in TEXTS.items():
        for found in re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text):
            assert found in extras, page


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_runs(line: str, capsys: pytest.CaptureFixture) -> None:
    """`ldm` lines, drawn small; recipes are shown, not trained: the LoRA below and tests/ldm/train train."""
    shipped("v1-5-pruned-emaonly.safetensors")
    Path("runs/blocks").mkdir(parents=True)
    shipped("runs/blocks/model.safetensors")
    for part in line.split("#")[0].split("&&"):
        words = shlex.split(part)
        if words[0] == "ldm":
            arguments = words[1:] + QUICK.get(words[1], []) * (len(words) > 2)
            assert main(arguments) == 0, capsys.readouterr().err
        else:
            assert words[0] in ("pip", "pytest"), words


REFUSALS = re.findall(r"^\$ (ldm .+)\n(ldm: error: .+)$", blocks_of("weights/README.md", "console")[0], re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), REFUSALS, ids=[line.split(":")[2].strip() for _, line in REFUSALS])
def test_a_refusal_is_what_is_shown(command: str, line: str, capsys: pytest.CaptureFixture) -> None:
    whole = safetensors_of({"w": {"dtype": "F32", "shape": [300], "data_offsets": [0, 1200]}}, bytes(1200))
    Path("v1-5-pruned-emaonly.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:6ce0\nsize 4265146304\n"
    )
    Path("merged.ckpt").write_bytes(ckpt_of({"w": tensor(), "x": Call(Name("os", "system"), "touch canary")}))
    Path("model.safetensors").write_bytes(whole[:-500])
    Path("mix.safetensors").write_bytes(whole + b"\0")
    assert main(command.split()[1:]) == 2
    assert capsys.readouterr().err == f"{line}\n"
    assert not Path("canary").exists()


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page: str, capsys: pytest.CaptureFixture) -> None:
    for word in re.findall(r"\bldm ([a-z]\w+)", " ".join(re.findall(r"`([^`\n]+)`", TEXTS[page]))):
        assert main([word, "--help"]) == 0, capsys.readouterr().err
    for name in re.findall(r"ldm train ([\w-]+)(?![\w.-])", TEXTS[page]):
        assert name in names()


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_recipe_trains_a_lora_of_the_model_that_ships(capsys: pytest.CaptureFixture) -> None:
    (recipe,) = blocks_of("ldm/train/README.md", "toml")
    Path(re.match(r"# (\S+)\n", recipe)[1]).write_text(recipe)
    Path("photos").mkdir()
    images, captions = blocks.batch(range(3))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).save(f"photos/{i}.png")
        Path(f"photos/{i}.txt").write_text(caption)
    settings = [
        word for key in ("run.steps", "run.batch", "run.micro", "watch.steps") for word in ("--set", f"{key}=1")
    ]
    assert main(["train", "lora.toml", *settings]) == 0
    made = ("lora.safetensors", "lora-diffusers.safetensors", "report.png", "report.html")
    assert capsys.readouterr().out.splitlines() == [f"runs/lora/{name}" for name in made]
