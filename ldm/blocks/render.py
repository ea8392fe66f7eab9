"""The picture of a scene: where its solids stand on a floor, the light, and the rays of a camera."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy import ndarray

from ldm.blocks.scenes import COLORS, RGB, SIZES, Scene

# World: x to the right, y up, z away from the camera, the floor at y = 0; lengths in units of about the width of one
# large solid when a scene has two. Pictures are worked out for 128 pixels and scaled.

Values = ndarray | np.float32

_PITCH = np.deg2rad(25.0)  # the camera looks down this much
_DISTANCE = 9.0
_TARGET = np.array([0.0, 0.72, 0.0])  # the point in the middle of the picture
PIXELS_PER_UNIT = 42.0  # at the target, in a picture of 128 pixels
_RIGHT = np.array([1.0, 0.0, 0.0])
_UP = np.array([0.0, np.cos(_PITCH), np.sin(_PITCH)])
_FORWARD = np.array([0.0, -np.sin(_PITCH), np.cos(_PITCH)])
EYE = _TARGET - _DISTANCE * _FORWARD
_WALL_Z = 2.7

_HALF_WIDTH = {"cube": 0.58, "sphere": 0.53, "cylinder": 0.43, "cone": 0.55}
_RADIUS = {"cube": 0.43, "sphere": 0.53, "cylinder": 0.43, "cone": 0.55}  # of a cube: half its side
_HEIGHT = {"cube": 0.86, "sphere": 1.06, "cylinder": 1.04, "cone": 1.12}
_AMBIENT, _DIFFUSE, _SPECULAR, _SHADOW = 0.46, 0.62, 0.30, 0.58


def _focal(size: int) -> float:
    return PIXELS_PER_UNIT * _DISTANCE * size / 128


def _rays(size: int) -> ndarray:
    """Directions through the pixel centres [size, size, 3], float32."""
    step = (np.arange(size) + 0.5 - size / 2) / _focal(size)
    return (_FORWARD + step[None, :, None] * _RIGHT - step[:, None, None] * _UP).astype(np.float32)


@lru_cache(maxsize=8)
def _fine_rays(size: int) -> ndarray:
    return _rays(2 * size)


@lru_cache(maxsize=8)
def _backdrop(size: int) -> tuple[ndarray, ndarray, ndarray]:
    """Points on the floor [size, size, 3]; how much of a pixel is floor, and how bright it is, [size, size, 1]."""
    rays = _rays(size)
    points = (EYE + rays * (-EYE[1] / rays[..., 1:2])).astype(np.float32)
    fine = _fine_rays(size)
    floor = (EYE[2] + fine[..., 2] * (-EYE[1] / fine[..., 1]) < _WALL_Z).astype(np.float32)
    floor = floor.reshape(size, 2, size, 2).mean((1, 3))[..., None]
    bright = np.where(floor > 0, 0.98 - 0.035 * (points[..., 2:] + 1.5), 0.98).astype(np.float32)
    return points, floor, bright


def project(points: ndarray, size: int = 128) -> tuple[ndarray, ndarray]:
    """Rows and columns [n] of points [n, 3] in a picture of `size` pixels, from its top left corner."""
    ray = points - EYE
    depth = ray @ _FORWARD
    return size / 2 - ray @ _UP / depth * _focal(size), size / 2 + ray @ _RIGHT / depth * _focal(size)


def on_floor(row: float, col: float, size: int = 128) -> tuple[float, float]:
    """x and z in the world of the floor that a picture of `size` pixels shows at this row and column."""
    ray = _FORWARD + (col - size / 2) / _focal(size) * _RIGHT - (row - size / 2) / _focal(size) * _UP
    x, _, z = EYE - ray * EYE[1] / ray[1]
    return float(x), float(z)


def _window(corners: ndarray, size: int, margin: int) -> tuple[slice, slice]:
    """The rows and columns of a picture of `size` pixels that the points [n, 3] span."""
    row, col = project(corners, size)
    low = np.clip(np.floor((row.min(), col.min())).astype(int) - margin, 0, size)
    high = np.clip(np.ceil((row.max(), col.max())).astype(int) + margin, 0, size)
    return slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))


@dataclass(frozen=True)
class Placed:
    """A solid in its place in the world."""

    shape: str
    color: str
    base: ndarray  # middle of the bottom, [3]
    scale: float
    turn: float  # about the vertical, radians

    @property
    def radius(self) -> float:
        return _RADIUS[self.shape] * self.scale

    @property
    def height(self) -> float:
        return _HEIGHT[self.shape] * self.scale

    def corners(self) -> ndarray:
        """A box around the solid, [8, 3]."""
        half = _HALF_WIDTH[self.shape] * self.scale * (1.06 if self.shape == "cube" else 1.0)
        box = np.array([(x, y, z) for x in (-half, half) for y in (0.0, self.height) for z in (-half, half)])
        return self.base + box


def layout(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Where the solids of a scene stand: near the middle, with a little chance."""
    row = len(scene.solids) == 3 and scene.relations[0] != "on top of"
    unit = 0.76 if row else {1: 1.2, 2: 1.0, 3: 0.88}[len(scene.solids)]
    scales = [unit * SIZES[solid.size] for solid in scene.solids]
    half = [_HALF_WIDTH[solid.shape] * scale for solid, scale in zip(scene.solids, scales, strict=True)]
    base = np.zeros((len(scene.solids), 3))

    def beside(width: float, other: float) -> float:
        return width + other + unit * rng.uniform(0.12, 0.28)

    def depth_offset(front: float, hind: float) -> float:  # sideways, so that half of what stands behind is seen
        least = max(0.36 * unit, front - 0.2 * hind)
        return (least + unit * rng.uniform(0.0, 0.12)) * (1 if rng.random() < 0.5 else -1)

    if len(base) == 1:
        base[0] = rng.uniform(-0.3, 0.3), 0.0, 0.15 + rng.uniform(-0.25, 0.25)
    if len(base) > 1:
        relation = scene.relations[0]
        if relation == "on top of":
            base[0] = rng.uniform(-0.05, 0.05), _HEIGHT[scene.solids[1].shape] * scales[1], 0.0
        elif relation in ("to the left of", "to the right of"):
            base[0, 0] = beside(half[0], half[1]) * (-1 if relation == "to the left of" else 1)
        else:
            base[0, 0] = depth_offset(*(half[:2] if relation == "in front of" else half[1::-1]))
            base[0, 2] = unit * rng.uniform(1.4, 1.6) * (-1 if relation == "in front of" else 1)
    if len(base) > 2:
        left, right = (base[:2, 0] - half[:2]).min(), (base[:2, 0] + half[:2]).max()
        relation = scene.relations[1]
        if relation == "to the left of":
            base[2, 0] = left - beside(half[2], 0.0)
        elif relation == "to the right of":
            base[2, 0] = right + beside(half[2], 0.0)
        else:
            base[2, 0] = depth_offset(*((half[2], half[1]) if relation == "in front of" else (max(half[:2]), half[2])))
            base[2, 2] = unit * rng.uniform(1.4, 1.6) * (-1 if relation == "in front of" else 1)
    if len(base) > 1:  # the group in the middle
        base[:, 0] -= ((base[:, 0] - half).min() + (base[:, 0] + half).max()) / 2
        base[:, 2] -= (base[:, 2].min() + base[:, 2].max()) / 2
        base[:, 0] += rng.uniform(-0.1, 0.1)
        base[:, 2] += rng.uniform(-0.1, 0.1)
        ground = base[:, 1] == 0
        if scene.relations[0] == "on top of" and not {"in front of", "behind"} & set(scene.relations):
            base[:, 2] -= 0.35 * unit  # a tall pile stands nearer and so lower in the picture
        base[ground, 2] += rng.uniform(-0.07, 0.07, ground.sum())
    turns = np.deg2rad(rng.uniform(24.0, 48.0, len(base)))
    places = zip(scene.solids, base, scales, turns.tolist(), strict=True)
    return [Placed(solid.shape, solid.color, at, scale, turn) for solid, at, scale, turn in places]


Build = Callable[[Scene, np.random.Generator], list[Placed]]


def _local(v: ndarray, turn: float) -> tuple[ndarray, ndarray, ndarray]:
    """x, y and z of vectors [..., 3] in the frame of a solid that is turned by `turn`."""
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return cos * v[..., 0] - sin * v[..., 2], v[..., 1], sin * v[..., 0] + cos * v[..., 2]


def _roots(a: Values, b: Values, c: Values) -> tuple[ndarray, ndarray]:
    """Solutions of a t^2 + 2 b t + c = 0 in ascending order for a > 0; NaN where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = np.sqrt(b * b - a * c)
        return (-b - root) / a, (-b + root) / a


def cast(solid: Placed, origin: ndarray, rays: ndarray) -> tuple[ndarray, tuple[ndarray, ndarray, ndarray]]:
    """Where rays from one point outside and above first meet the solid.

    rays [h, w, 3] -> distance [h, w] in units of the ray (inf: a miss), and the three parts of the normal in the
    solid's own frame. Bottoms are never seen.
    """
    turn = solid.turn if solid.shape == "cube" else 0.0
    ox, oy, oz = (np.float32(v) for v in _local(origin - solid.base, turn))
    dx, dy, dz = _local(rays, turn)
    r, h = np.float32(solid.radius), np.float32(solid.height)
    zero = np.float32(0)
    if solid.shape == "sphere":
        oy = oy - r
        t, _ = _roots(dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - r * r)
        normal = ((ox + t * dx) / r, (oy + t * dy) / r, (oz + t * dz) / r)
        return np.where(np.isnan(t), np.inf, t), normal
    if solid.shape == "cube":
        sx, sz = np.sign(ox), np.sign(oz)
        with np.errstate(divide="ignore"):
            enter = np.stack(((sx * r - ox) / dx, (h - oy) / dy, (sz * r - oz) / dz))
            leave = np.stack(((-sx * r - ox) / dx, -oy / dy, (-sz * r - oz) / dz))
        enter, leave = np.minimum(enter, leave), np.maximum(enter, leave)
        t = enter.max(0)
        normal = (
            np.where(t == enter[0], sx, zero),
            np.where(t == enter[1], np.float32(1), zero),
            np.where(t == enter[2], sz, zero),
        )
        return np.where(t <= leave.min(0), t, np.inf), normal
    if solid.shape == "cylinder":
        t, _ = _roots(dx * dx + dz * dz, ox * dx + oz * dz, ox * ox + oz * oz - r * r)
        y = oy + t * dy
        side = (y >= 0) & (y <= h)
        top = (h - oy) / dy
        capped = (ox + top * dx) ** 2 + (oz + top * dz) ** 2 <= r * r
        normal = (
            np.where(capped, zero, (ox + t * dx) / r),
            np.where(capped, np.float32(1), zero),
            np.where(capped, zero, (oz + t * dz) / r),
        )
        return np.where(capped, top, np.where(side, t, np.inf)), normal
    k = (r / h) ** 2  # cone: x^2 + z^2 = k (h - y)^2
    g = h - oy
    a, b, c = dx * dx + dz * dz - k * dy * dy, ox * dx + oz * dz + k * g * dy, ox * ox + oz * oz - k * g * g
    t, _ = _roots(a, b, c)
    y = oy + t * dy
    slant = np.float32(1 / np.sqrt(1 + k))
    away = slant / (np.sqrt(k) * np.maximum(h - y, np.float32(1e-6)))
    normal = ((ox + t * dx) * away, np.full_like(t, np.sqrt(k) * slant), (oz + t * dz) * away)
    return np.where((y >= 0) & (y <= h), t, np.inf), normal


def _shaded(solid: Placed, points: ndarray, light: ndarray) -> ndarray:
    """Whether the solid keeps the light, of direction `light`, from points [h, w, 3]; float32 [h, w] of 0 and 1."""
    turn = solid.turn if solid.shape == "cube" else 0.0
    px, py, pz = _local(points - solid.base.astype(np.float32), turn)
    lx, ly, lz = (np.float32(v) for v in _local(light, turn))
    r, h = np.float32(solid.radius), np.float32(solid.height)
    if solid.shape == "sphere":
        py = py - r
        along = px * lx + py * ly + pz * lz
        return ((px * px + py * py + pz * pz - along * along <= r * r) & (along < 0)).astype(np.float32)
    low, high = -py / ly, (h - py) / ly
    if solid.shape == "cube":
        for p, d in ((px, lx), (pz, lz)):
            near, far = (-r - p) / d, (r - p) / d
            low, high = np.maximum(low, np.minimum(near, far)), np.minimum(high, np.maximum(near, far))
        return ((low <= high) & (high > 0)).astype(np.float32)
    if solid.shape == "cylinder":
        near, far = _roots(lx * lx + lz * lz, px * lx + pz * lz, px * px + pz * pz - r * r)
        return ((np.maximum(low, near) <= np.minimum(high, far)) & (high > 0)).astype(np.float32)
    # cone: through its base, or in and out through its side
    base = (px + low * lx) ** 2 + (pz + low * lz) ** 2 <= r * r
    k = (r / h) ** 2
    g = h - py
    near, far = _roots(lx * lx + lz * lz - k * ly * ly, px * lx + pz * lz + k * g * ly, px * px + pz * pz - k * g * g)
    meets = [(py + t * ly >= 0) & (py + t * ly <= h) & (t > 0) for t in (near, far)]
    return ((base & (high > 0)) | meets[0] | meets[1]).astype(np.float32)


def _blur(x: ndarray) -> ndarray:
    """A small binomial blur of x [h, w], which softens the edge of a shadow."""
    x = np.pad(x, 1, mode="edge")
    x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
    return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


def light_from(azimuth: float = -135.0) -> ndarray:
    """The direction towards the light [3]; azimuth in degrees from the x axis, -135: the front left."""
    light = np.array([0.62 * np.cos(np.deg2rad(azimuth)), 0.785, 0.62 * np.sin(np.deg2rad(azimuth))])
    return light / np.linalg.norm(light)


def paint(placed: Sequence[Placed], light: ndarray, size: int = 128, colors: Mapping[str, RGB] = COLORS) -> ndarray:
    """The solids alone, float32 [size, size, 4]: colour in [0, 1] times coverage; coverage, by four rays a pixel."""
    halfway = light - _FORWARD
    halfway /= np.linalg.norm(halfway)
    rays = _fine_rays(size)
    depth = np.full((2 * size, 2 * size), np.inf, np.float32)
    front = np.zeros((2 * size, 2 * size, 4), np.float32)
    for solid in placed:
        window = _window(solid.corners(), 2 * size, 1)
        t, normal = cast(solid, EYE, rays[window])
        seen = t < depth[window]
        turn = solid.turn if solid.shape == "cube" else 0.0
        with np.errstate(invalid="ignore"):
            toward = sum(n * np.float32(v) for n, v in zip(normal, _local(light, turn), strict=True))
            shine = sum(n * np.float32(v) for n, v in zip(normal, _local(halfway, turn), strict=True))
        value = np.ones((*t.shape, 4), np.float32)
        color = np.array(colors[solid.color], np.float32)
        value[..., :3] = (_AMBIENT + _DIFFUSE * np.maximum(toward, 0))[..., None] * color
        if solid.shape != "cube":
            shine = np.clip(shine, 0, 1) ** 2
            shine = shine * shine
            shine = shine * shine
            value[..., :3] += (np.float32(_SPECULAR) * shine * shine * shine)[..., None]
        np.copyto(front[window], value, where=seen[..., None])
        np.copyto(depth[window], t, where=seen)
    np.minimum(front, 1, out=front)
    front = front[0::2] + front[1::2]
    return (front[:, 0::2] + front[:, 1::2]) / 4


def render(scene: Scene, size: int = 128, colors: Mapping[str, RGB] = COLORS, build: Build = layout) -> ndarray:
    """The picture of a scene, uint8 [size, size, 3], with smooth edges. The same on every call.

    colors  RGB of every colour in the scene
    build   what stands where; for things that are made of several solids
    """
    rng = np.random.default_rng([scene.seed, 3])
    placed = build(scene, rng)
    light = light_from(-135 + rng.uniform(-8, 8))
    points, floor, bright = _backdrop(size)
    tint = np.array([1.0, 0.985, 0.96]) + rng.uniform(-0.015, 0.015, 3)
    floor_color = (0.74 + rng.uniform(-0.02, 0.02)) * tint
    wall_color = (0.87 + rng.uniform(-0.02, 0.02)) * (2 - tint)
    picture = bright * (floor * floor_color.astype(np.float32) + (1 - floor) * wall_color.astype(np.float32))

    shadow = np.zeros((size, size), np.float32)
    for solid in placed:
        corners = solid.corners()
        fallen = corners - corners[:, 1:2] / light[1] * light
        rows, cols = _window(np.concatenate((fallen, corners * (1, 0, 1))), size, 2)
        np.maximum(shadow[rows, cols], _shaded(solid, points[rows, cols], light), out=shadow[rows, cols])
    picture *= 1 - (1 - _SHADOW) * _blur(shadow)[..., None] * floor

    front = paint(placed, light, size, colors)
    picture = picture * (1 - front[..., 3:]) + front[..., :3]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
