"""Rendered scenes: coloured, shaded shapes on textured backgrounds, whose content is known exactly.

Scene `index` of a `seed` is a pure function of the two. Rendering is vectorised over scenes. A mask covers the disc
that could hold any shape of the target's size, so it shows where and how large the target is, but not its shape or
colour. The other objects are drawn independently of the target, except that an exact twin is never drawn.
"""

# N scenes, K waves of texture, O = 3 objects at most, H = W = 64 pixels

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from refine_control.miniature import vocabulary
from refine_control.miniature.vocabulary import BACKGROUNDS, COLOURS, SHAPES
from refine_control.pixels import from_images
from refine_control.randomness import derive_seed, uniforms

SIZE = 64
MAX_OBJECTS = 3
_WAVES = 24
_OBJECT_DRAWS = 10
_KINDS = ("any", "same_shape", "same_colour", "distinct", "overlapping")
_DISTINCT = ("distinct", "overlapping")
_OVERLAP = 0.55
"""Distance of overlapping objects' centres, in sums of their radii."""


class Objects(NamedTuple):
    """Objects of N scenes, each array (N, 3); the target's values are `[rows, target]`."""

    present: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    light: np.ndarray


class Scenes(NamedTuple):
    """N rendered scenes with prompts, masks and labels."""

    images: torch.Tensor
    """(N, 64, 64, 3) uint8."""
    masks: torch.Tensor
    """(N, 64, 64) bool, True = inpaint."""
    local_prompts: list[str]
    """The target alone."""
    global_prompts: list[str]
    """All objects and the background."""
    colour: np.ndarray
    """(N,) index into COLOURS of the target."""
    shape: np.ndarray
    """(N,) index into SHAPES of the target."""
    objects: Objects
    target: np.ndarray
    """(N,) number of the object that is the target."""

    @property
    def alike(self) -> np.ndarray:
        """(N,) whether another object has the target's shape or colour."""
        o, rows = self.objects, np.arange(len(self.target))[:, None]
        other = o.present & (np.arange(MAX_OBJECTS) != self.target[:, None])
        same = (o.shape == o.shape[rows, self.target[:, None]]) | (o.colour == o.colour[rows, self.target[:, None]])
        return (other & same).any(1)


def _draw_objects(draws: np.ndarray, kind: str, orders: Sequence[np.ndarray] = ()) -> tuple[Objects, np.ndarray]:
    """Uniforms (N, 2 + 3 * 10) -> objects and the target's number; slots are the quarters of the image.

    `orders` are colours and shapes as `_orders` gives them, for the kinds of `_DISTINCT`."""
    n = len(draws)
    rows = np.arange(n)
    fewest = 1 if kind in ("any", "distinct") else 2
    count = fewest + (draws[:, 0] * (MAX_OBJECTS + 1 - fewest)).astype(np.int64)
    target = (draws[:, 1] * count).astype(np.int64)
    u = draws[:, 2:].reshape(n, MAX_OBJECTS, _OBJECT_DRAWS)
    colour = (u[..., 0] * len(COLOURS)).astype(np.int64)
    shape = (u[..., 1] * len(SHAPES)).astype(np.int64)
    other = (target + 1) % count
    if kind in ("same_shape", "same_colour"):
        kept, moved, size = (shape, colour, len(COLOURS)) if kind == "same_shape" else (colour, shape, len(SHAPES))
        kept[rows, other] = kept[rows, target]
        step = 1 + (u[rows, other, 2] * (size - 1)).astype(np.int64)
        moved[rows, other] = (moved[rows, target] + step) % size
    twin = (colour == colour[rows, target][:, None]) & (shape == shape[rows, target][:, None])
    twin[rows, target] = False
    colour = np.where(twin, (colour + 1 + (u[..., 2] * (len(COLOURS) - 1)).astype(np.int64)) % len(COLOURS), colour)
    if kind in _DISTINCT:  # the first ones of a shuffled list
        colour, shape = (order[:, :MAX_OBJECTS] for order in orders)
    slot = np.argsort(np.concatenate([u[..., 3], u[:, :1, 9]], 1), axis=1)[:, :MAX_OBJECTS]
    objects = Objects(
        present=np.arange(MAX_OBJECTS) < count[:, None],
        colour=colour,
        shape=shape,
        x=17 + 30 * (slot % 2) + 10 * (u[..., 4] - 0.5),
        y=17 + 30 * (slot // 2) + 10 * (u[..., 5] - 0.5),
        radius=9.5 + 4.0 * u[..., 6],
        angle=0.6 * (u[..., 7] - 0.5),
        light=2 * np.pi * u[..., 8],
    )
    if kind == "overlapping":
        _move_onto(objects, rows, other, target)
    return objects, target


def _move_onto(objects: Objects, rows: np.ndarray, other: np.ndarray, target: np.ndarray) -> None:
    """Moves the objects `other`, in place, so that the targets overlap them: towards the centre of the image."""
    x, y = objects.x[rows, target], objects.y[rows, target]
    away = np.hypot(SIZE / 2 - x, SIZE / 2 - y)
    apart = _OVERLAP * (objects.radius[rows, target] + objects.radius[rows, other]) / away
    objects.x[rows, other] = x + apart * (SIZE / 2 - x)
    objects.y[rows, other] = y + apart * (SIZE / 2 - y)


def _texture(draws: torch.Tensor) -> torch.Tensor:
    """Uniforms (N, K, 3) -> (N, 64, 64) fields of unit variance whose amplitude falls as 1/f.

    cos(ax + by + p) is a sum of two products of one-dimensional waves: one matrix product a scene."""
    frequency = 0.5 * torch.exp(draws[..., 0] * np.log(24.0))
    direction, phase = np.pi * draws[..., 1], 2 * np.pi * draws[..., 2]
    amplitude = 1 / frequency
    amplitude = amplitude * (2 / amplitude.square().sum(-1, keepdim=True)).sqrt()
    positions = torch.arange(SIZE) * (2 * np.pi / SIZE)
    across = (frequency * direction.cos())[..., None] * positions
    down = (frequency * direction.sin())[..., None] * positions + phase[..., None]
    left = torch.cat([down.cos(), -down.sin()], 1) * amplitude.repeat(1, 2)[..., None]
    return left.transpose(1, 2) @ torch.cat([across.cos(), across.sin()], 1)


def _background(draws: torch.Tensor, tone: torch.Tensor) -> torch.Tensor:
    """Uniforms (N, 9 + 3K) and tones (N, 3) in 0..255 -> (N, 3, 64, 64): gradient, 1/f clouds or hard patches."""
    texture = _texture(draws[:, 9:].reshape(len(draws), _WAVES, 3))
    kind = (draws[:, 0] * 3).long()[:, None, None]
    patches = torch.where(texture > 0.3, 1.0, torch.where(texture < -0.5, -1.0, 0.0))
    texture = torch.where(kind == 2, patches, texture)
    strength = (torch.tensor([4.0, 14.0, 16.0])[kind[:, 0, 0]] * (0.6 + 0.8 * draws[:, 1]))[:, None, None]
    ramp = torch.linspace(-1, 1, SIZE)
    slope = 36 * (draws[:, 2:4] - 0.5)
    field = texture * strength + slope[:, :1, None] * ramp + slope[:, 1:, None] * ramp[:, None]
    tint = 0.7 + 0.6 * draws[:, 4:7]
    base = tone * (0.88 + 0.24 * draws[:, 7:8])
    return base[:, :, None, None] + tint[:, :, None, None] * field[:, None]


def _distance(shape: int, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance (in units of the radius, negative inside) of one shape that fits the unit disc."""
    name = SHAPES[shape]
    if name == "circle":
        return (u * u + v * v).sqrt_() - 0.88
    if name == "ring":
        return (((u * u + v * v).sqrt_() - 0.68).abs_()) - 0.22
    u = u.abs()
    if name == "square":
        return torch.maximum(u, v.abs()) - 0.70
    if name == "triangle":
        return torch.maximum(v - 0.5, 0.8660254 * u - 0.5 * v - 0.5)
    if name == "cross":
        v = v.abs()
        return torch.maximum(torch.maximum(u, v) - 0.95, torch.minimum(u, v) - 0.30)
    # the five-pointed star: fold into one half of one arm, then the side's line
    v = -v
    cos, sin = 0.8090170, 0.5877853
    fold = 2 * (cos * u - sin * v).clamp_(min=0)
    u, v = u - cos * fold, v + sin * fold
    fold = 2 * (-cos * u - sin * v).clamp_(min=0)
    u, v = (u + cos * fold).abs_(), v + sin * fold - 1
    side_u, side_v = 0.45 * sin, 0.45 * cos - 1
    return (u * -side_v + v * side_u) / float(np.hypot(side_u, side_v))


class Cover(NamedTuple):
    """How single objects cover their images, sorted by shape."""

    rows: np.ndarray
    """(n,) image of each."""
    column: np.ndarray
    """(n,) its number in the image."""
    alpha: torch.Tensor
    """(n, 1, 64, 64) in [0, 1]."""
    shade: torch.Tensor
    """(n, 64, 64) brightness of its colour."""


def cover(rows: np.ndarray, column: np.ndarray, objects: Objects) -> Cover:
    """Which pixels object `column[i]` of image `rows[i]` covers; (n,) indices, at least one."""
    shapes = objects.shape[rows, column]
    order = np.argsort(shapes, kind="stable")
    rows, column, shapes = rows[order], column[order], shapes[order]
    take = {f: torch.from_numpy(getattr(objects, f)[rows, column]).float()[:, None, None] for f in Objects._fields[3:]}
    centres = torch.arange(SIZE) + 0.5
    dx = (centres - take["x"]) / take["radius"]
    dy = (centres[:, None] - take["y"]) / take["radius"]
    cos, sin = take["angle"].cos(), take["angle"].sin()
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    bounds = np.searchsorted(shapes, np.arange(len(SHAPES) + 1))
    distance = torch.cat([_distance(s, u[a:b], v[a:b]) for s, (a, b) in enumerate(pairwise(bounds)) if b > a])
    # the soft edge of a sharp corner extends far beyond it; cut it at the disc, which every mask covers
    distance = torch.maximum(distance, (dx.square() + dy.square()).sqrt_() - 1)
    alpha = (0.5 - distance * take["radius"]).clamp_(0, 1)[:, None]
    shade = (dx * take["light"].cos() + dy * take["light"].sin()).mul_(0.14).add_(0.96)
    return Cover(rows, column, alpha, shade)


def _paint(canvas: torch.Tensor, rows: np.ndarray, column: np.ndarray, objects: Objects) -> None:
    """Draws object `column[i]` on `canvas[rows[i]]` in place: canvas (N, 3, 64, 64) in 0..255."""
    if not len(rows):
        return
    rows, column, alpha, shade = cover(rows, column, objects)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    paint = palette[objects.colour[rows, column]][:, :, None, None] * shade[:, None]
    index = torch.from_numpy(rows)
    canvas[index] = torch.lerp(canvas[index], paint, alpha)


def _masks(draws: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Uniforms (N, 14) and the target's disc -> (N, 64, 64) bool: half boxes, half brush strokes, covering the disc."""
    centres = torch.arange(SIZE) + 0.5
    dx, dy = centres - x[:, None], centres - y[:, None]
    margin = radius[:, None] + 1 + 4 * draws[:, 1:5]
    box_x = (dx > -margin[:, :1]) & (dx < margin[:, 1:2])
    box_y = (dy > -margin[:, 2:3]) & (dy < margin[:, 3:4])
    box = box_x[:, None, :] & box_y[:, :, None]
    brush = dx.square()[:, None, :] + dy.square()[:, :, None] < (1.08 * radius[:, None, None]).square()
    for blob in range(3):
        turn, reach, size = (draws[:, 5 + 3 * blob + k, None] for k in range(3))
        away = radius[:, None] * (0.5 + 0.4 * reach)
        bx, by = dx - away * (2 * np.pi * turn).cos(), dy - away * (2 * np.pi * turn).sin()
        wide = radius[:, None] * (0.45 + 0.35 * size)
        brush |= bx.square()[:, None, :] + by.square()[:, :, None] < wide.square()[:, :, None]
    return torch.where((draws[:, 0] < 0.5)[:, None, None], box, brush)


def _orders(seed: int, indices: np.ndarray) -> list[np.ndarray]:
    """(N, 8) colours and (N, 6) shapes, each in a random order."""
    draws = uniforms(derive_seed(seed, "distinct"), indices, len(COLOURS) + len(SHAPES))
    return [np.argsort(part, axis=1) for part in (draws[:, : len(COLOURS)], draws[:, len(COLOURS) :])]


def _render(seed: int, indices: np.ndarray, kind: str, recoloured: bool = False) -> Scenes:
    per_object = 2 + MAX_OBJECTS * _OBJECT_DRAWS
    draws = uniforms(seed, indices, per_object + 14 + 10 + 3 * _WAVES)
    orders = _orders(seed, indices) if kind in _DISTINCT else []
    objects, target = _draw_objects(draws[:, :per_object], kind, orders)
    if recoloured:
        objects.colour[np.arange(len(indices)), target] = orders[0][:, MAX_OBJECTS]
    rest = torch.from_numpy(draws[:, per_object:])
    tone = (rest[:, 14] * len(BACKGROUNDS)).long()
    canvas = _background(rest[:, 15:], torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[tone])
    rows = np.arange(len(indices))
    for column in range(MAX_OBJECTS):
        drawn = rows[objects.present[:, column] & (target != column)]
        _paint(canvas, drawn, np.full(len(drawn), column), objects)
    _paint(canvas, rows, target, objects)
    x, y, radius = (torch.from_numpy(getattr(objects, f)[rows, target]).float() for f in ("x", "y", "radius"))
    colour, shape, counts = objects.colour, objects.shape, objects.present.sum(1)
    pairs = [
        list(zip(c[:k].tolist(), s[:k].tolist(), strict=True)) for c, s, k in zip(colour, shape, counts, strict=True)
    ]
    return Scenes(
        images=canvas.clamp_(0, 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous(),
        masks=_masks(rest[:, :14], x, y, radius),
        local_prompts=[vocabulary.local_prompt(*p[t]) for p, t in zip(pairs, target.tolist(), strict=True)],
        global_prompts=[vocabulary.global_prompt(p, b) for p, b in zip(pairs, tone.tolist(), strict=True)],
        colour=colour[rows, target],
        shape=shape[rows, target],
        objects=objects,
        target=target,
    )


def render(seed: int, start: int, count: int, kind: str = "any", recoloured: bool = False) -> Scenes:
    """Scenes `start .. start + count - 1` of `seed`.

    `kind` is `any`; `same_shape` or `same_colour`: at least one other object shares it with the target (Figure 2);
    `distinct`: colours and shapes differ; `overlapping`: they differ, and the target covers a part of another object.
    With `recoloured` the target of a scene of distinct colours has a colour of no object.
    Raises ValueError for another kind or a negative count."""
    if kind not in _KINDS or count < 0:
        raise ValueError(f"kind is one of {_KINDS} and count >= 0, not {kind!r}, {count}")
    world = derive_seed(seed, "scenes", kind)
    return _render(world, np.arange(start, start + count), kind, recoloured)


def photo_mixture(seed: int, start: int, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) in [-1, 1] for the autoencoder: even numbers are scenes, odd ones resemble photographs.

    Image `start + i` is a function of (seed, start + i). The odd ones are dead leaves (Lee, Mumford, Huang 2001) over
    1/f fields with strong luminance and weaker chroma, so that the autoencoder can encode photographs it never saw."""
    numbers = np.arange(start, start + count)
    odd = numbers % 2 == 1
    half = int(odd.sum())
    plain = _render(derive_seed(seed, "scenes", "any"), numbers[~odd], "any").images
    draws = torch.from_numpy(uniforms(derive_seed(seed, "leaves"), numbers[odd], 520))
    waves = 3 * _WAVES
    fields = torch.stack(
        [_texture(draws[:, k * waves : (k + 1) * waves].reshape(half, _WAVES, 3)) for k in range(3)], 1
    )
    luminance = (0.1 + 0.35 * draws[:, 220])[:, None, None]
    chroma = (0.25 * draws[:, 221])[:, None, None, None]
    tone = 1.6 * (draws[:, 222:225] - 0.5)
    picture = tone[:, :, None, None] + luminance[:, None] * fields[:, :1] + chroma * (fields - fields[:, :1])
    centres = torch.arange(SIZE) + 0.5
    leaves = (draws[:, 225] * 14).long()
    for leaf in range(13):
        u = draws[:, 230 + 20 * leaf : 250 + 20 * leaf, None]
        dx, dy = centres - SIZE * u[:, 0], centres - SIZE * u[:, 1]
        turn = 2 * np.pi * u[:, 2]
        across = dx[:, None, :] * turn.cos()[..., None] + dy[:, :, None] * turn.sin()[..., None]
        along = dy[:, :, None] * turn.cos()[..., None] - dx[:, None, :] * turn.sin()[..., None]
        wide, tall = 2.5 * torch.exp(2.0 * u[:, 3, :, None]), 2.5 * torch.exp(2.3 * u[:, 4, :, None])
        box = torch.maximum(across.abs() - wide, along.abs() - tall)
        disc = ((across / wide).square() + (along / tall).square()).sqrt() - 1
        distance = torch.where(u[:, 5, :, None] < 0.5, box, disc * torch.minimum(wide, tall))
        alpha = ((0.5 - distance).clamp(0, 1) * (leaf < leaves)[:, None, None])[:, None]
        leaf_tone = 1.8 * (u[:, 6:9, 0] - 0.5)
        paint = 0.5 * tone[:, :, None, None] + leaf_tone[:, :, None, None]
        shade = (0.3 * u[:, 9, 0])[:, None, None, None] * fields.roll((leaf * 7 + 5, leaf * 3), (2, 3))[:, :1]
        picture = torch.lerp(picture, paint + shade, alpha)
    out = torch.empty(count, 3, SIZE, SIZE)
    out[torch.from_numpy(~odd)] = from_images(plain)
    out[torch.from_numpy(odd)] = picture.clamp(-1, 1)
    return out
