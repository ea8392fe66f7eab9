"""Diffusers' networks on our tensors."""

from __future__ import annotations

import pytest
import torch

from benchmarks import parity, speed
from benchmarks.models import peers
from ldm.config import FAMILIES
from ldm.model import LatentDiffusion
from tests.made.checkpoints import TINY


def test_without_diffusers_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for command, arguments in ((parity.main, ["--full"]), (speed.main, ["--tiny"])):
        with pytest.raises(SystemExit) as left:
            command(arguments)
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.endswith("pip install '.[bench]'\n")
        assert said.count("\n") == 1


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
