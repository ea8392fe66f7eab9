"""The renderer: everything is in the picture, at every size, in its own hue."""

from __future__ import annotations

import numpy as np

from ldm import blocks
from ldm.blocks import COLORS


def test_a_smaller_picture_shows_the_same():
    scene = blocks.sample(11)
    large = blocks.render(scene, 128).astype(float).reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(large - blocks.render(scene, 64)).mean() < 1.5


def test_every_solid_lies_inside_the_picture_and_can_be_seen():
    cut, hidden = 0, 0
    for seed in range(300):
        placed = blocks.layout(scene := blocks.sample(seed), np.random.default_rng([scene.seed, 3]))
        together = blocks.paint(placed, blocks.light_from())
        edge = np.concatenate([together[0, :, 3], together[-1, :, 3], together[:, 0, 3], together[:, -1, 3]])
        cut += bool(edge.any())
        for k in range(len(placed)):
            alone = blocks.paint(placed[k : k + 1], blocks.light_from())
            visible = (np.abs(alone - together).max(-1) < 1e-6) & (alone[..., 3] > 0)
            hidden += bool(visible.sum() < 0.35 * (alone[..., 3] > 0).sum())
    assert cut <= 3  # a row of three wide solids may touch the edge
    assert hidden <= 3


def test_a_solid_keeps_its_hue_in_light_and_shade():
    """Shading multiplies the colour: the hue of every cube's pixels is the colour's own."""
    for color, rgb in COLORS.items():
        solid = blocks.Placed("cube", color, np.zeros(3), 1.0, 0.6)
        seen = blocks.paint([solid], blocks.light_from())
        inside = seen[seen[..., 3] == 1][:, :3]
        dark = inside[inside.max(-1) < 0.97]  # brighter ones are clipped
        assert np.abs(dark / dark.max(-1, keepdims=True) - np.array(rgb) / max(rgb)).max() < 1e-4
