"""Regions without any weights: Felzenszwalb's segmentation, whose segments are merged into objects.

A substitute for SAM without a download. A graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) of a
small copy of the photo is merged pair by pair, most similar first, as in selective search (Uijlings et al., IJCV
2013); every node of each tree is a region. Three scales times three notions of similarity give several hundred
regions, of which doubles are dropped and the best kept.

Its two scores are substitutes and do NOT mean what they mean for SAM. `predicted_iou` rewards an outline that lies on
edges of the photo, little contact with the photo's border, and size; it is no IoU. `stability_score` is the mean, over
the nine trees, of the IoU with the most similar region of that tree.
"""

# h w pixels of the small copy, n segments, m nodes of a tree (2 n - 1 when all merge), N regions

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from refine_control.annotation.masks import keep_best
from refine_control.errors import MissingError
from refine_control.records import Proposal

SOURCE = "felzenszwalb (no weights)"
SIDE = 240
"""The longer side of the small copy, in pixels."""
SCALES = (50, 100, 200)
"""Felzenszwalb's scale: larger ones give larger segments."""
SIGMA, MIN_SEGMENT = 0.8, 40
"""Blur before the segmentation, and the fewest pixels of a segment."""
MIN_AREA, MAX_AREA = 0.02, 0.60
"""Shares of the photo outside of which nobody wants a region."""
MAX_DOUBLE = 0.8
"""Of two regions with a larger IoU the worse one is dropped."""
EDGE = 10.0
"""The colour step in Lab units that counts as half an edge."""
BINS = 16


class Similarity(NamedTuple):
    """How much each likeness of two neighbours counts when pairs are merged."""

    colour: float
    texture: float
    small: float
    """Small ones first, so that no segment eats its neighbours one by one."""
    fits: float
    """Pairs that fill their common box first."""
    edge: float
    """Pairs without a colour step between them first."""


SIMILARITIES = (Similarity(1, 1, 1, 1, 0), Similarity(0, 0, 1, 1, 1), Similarity(1, 1, 0, 0, 1))


class _Picture(NamedTuple):
    """The small copy."""

    rgb: np.ndarray
    """(h, w, 3) float 0 to 1."""
    lab: np.ndarray
    texture: np.ndarray
    """(h, w) int: the strength of the lightness gradient, in bins."""
    edge: np.ndarray
    """(h, w) 0 to 1: the colour step over a few pixels."""


@dataclass
class _Nodes:
    """The segments and what they were merged into; the first n rows are the segments, in order."""

    size: np.ndarray
    colour: np.ndarray
    """(m, 3 BINS) histogram of a node, sum 1."""
    texture: np.ndarray
    box: np.ndarray
    """(m, 4) y0, x0, y1, x1."""
    member: np.ndarray
    """(m, n) bool: of which segments a node is made."""
    neighbours: list[dict[int, tuple[float, float]]]
    """For each neighbour the length of the common outline and the sum of the colour steps along it."""


def propose_felzenszwalb(image: np.ndarray, max_proposals: int = 96) -> list[Proposal]:
    """(H, W, 3) uint8 -> regions in the photo's size, best first. The scores are stand-ins, see above.

    Raises MissingError without scikit-image."""
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError:
        raise MissingError(
            "regions without weights need scikit-image; install it with `pip install 'refine-control[data]'`"
        ) from None
    picture = _small(image)
    trees: list[np.ndarray] = []
    for scale in SCALES:
        labels = felzenszwalb(picture.rgb, scale=scale, sigma=SIGMA, min_size=MIN_SEGMENT, channel_axis=-1)
        trees += [_regions(labels, picture, similarity) for similarity in SIMILARITIES]
    masks, tree = np.concatenate(trees), np.repeat(np.arange(len(trees)), [len(each) for each in trees])
    if not len(masks):
        return []
    overlap = _overlaps(masks)
    stability = np.mean([overlap[:, tree == number].max(1, initial=0) for number in range(len(trees))], 0)
    worth = _worth(masks, picture.edge)
    keep = keep_best(overlap, worth * stability, MAX_DOUBLE)[:max_proposals]
    size = (image.shape[1], image.shape[0])
    return [Proposal(_enlarged(masks[i], size), float(worth[i]), float(stability[i]), SOURCE) for i in keep]


def _small(image: np.ndarray) -> _Picture:
    from skimage.color import rgb2lab

    height, width = image.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    size = (max(2, round(width * factor)), max(2, round(height * factor)))
    rgb = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), np.float32) / 255
    lab = rgb2lab(rgb)
    lightness = np.hypot(*np.gradient(lab[..., 0]))
    texture = (lightness / 20 * BINS).astype(int).clip(0, BINS - 1)
    smooth = ndimage.gaussian_filter(lab, (1.5, 1.5, 0))
    step = np.zeros(lab.shape[:2])
    for axis in (0, 1):
        ahead, behind = (ndimage.shift(smooth, np.eye(3)[axis] * s, order=0, mode="nearest") for s in (-2, 2))
        step += ((ahead - behind) ** 2).sum(-1)
    step = np.sqrt(step)
    return _Picture(rgb, lab, texture, step / (step + EDGE))


def _regions(labels: np.ndarray, picture: _Picture, similarity: Similarity) -> np.ndarray:
    """(N, h, w) bool: the nodes of one tree that have a size worth proposing."""
    nodes = _merge(_leaves(labels, picture), similarity, labels.size)
    share = nodes.size / labels.size
    return nodes.member[(share >= MIN_AREA) & (share <= MAX_AREA)][:, labels]


def _leaves(labels: np.ndarray, picture: _Picture) -> _Nodes:
    """The segments of a (h, w) map 0..n-1, with room for what they will be merged into."""
    n, flat = int(labels.max()) + 1, labels.ravel()
    size = np.bincount(flat, minlength=n).astype(float)

    def histogram(values: np.ndarray) -> np.ndarray:
        return np.bincount(flat * BINS + values.ravel(), minlength=n * BINS).reshape(n, BINS) / size[:, None]

    low, high = np.array([0, -60, -60]), np.array([100, 60, 60])
    bins = ((picture.lab - low) / (high - low) * BINS).astype(int).clip(0, BINS - 1)
    colour = np.concatenate([histogram(bins[..., channel]) for channel in range(3)], 1) / 3
    slices = ndimage.find_objects(labels + 1)
    box = np.array([[y.start, x.start, y.stop, x.stop] for y, x in slices], float)
    neighbours: list[dict[int, tuple[float, float]]] = [{} for _ in range(2 * n - 1)]
    for (a, b), length, steps in _contacts(labels, picture.lab):
        neighbours[a][b] = neighbours[b][a] = (length, steps)

    def roomy(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.zeros((n - 1, *values.shape[1:]), values.dtype)])

    texture, member = histogram(picture.texture), np.eye(n, dtype=bool)
    return _Nodes(roomy(size), roomy(colour), roomy(texture), roomy(box), roomy(member), neighbours)


def _contacts(labels: np.ndarray, lab: np.ndarray) -> list[tuple[tuple[int, int], float, float]]:
    """Each pair of neighbouring segments, the number of pixel sides between them, the sum of the colour steps there."""
    n = int(labels.max()) + 1
    pairs = [(labels[:, :-1], labels[:, 1:], lab[:, :-1] - lab[:, 1:]), (labels[:-1], labels[1:], lab[:-1] - lab[1:])]
    first, second = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    steps = np.concatenate([np.sqrt((pair[2] ** 2).sum(-1)).ravel() for pair in pairs])
    differ = first != second
    codes = np.minimum(first, second)[differ] * n + np.maximum(first, second)[differ]
    unique, inverse = np.unique(codes, return_inverse=True)
    lengths, sums = np.bincount(inverse), np.bincount(inverse, steps[differ])
    return [(divmod(int(c), n), float(k), float(s)) for c, k, s in zip(unique, lengths, sums, strict=True)]


def _merge(nodes: _Nodes, similarity: Similarity, area: int) -> _Nodes:
    """Merges the most similar pair of neighbours until there is none; rows that are never reached keep size 0."""
    n = nodes.member.shape[1]
    heap = [
        (-value, i, j)
        for i in range(n)
        for j, value in _likeness(nodes, i, [j for j in nodes.neighbours[i] if j > i], similarity, area)
    ]
    heapq.heapify(heap)
    alive, new = set(range(n)), n
    while heap:
        _, i, j = heapq.heappop(heap)
        if i not in alive or j not in alive:
            continue
        _join(nodes, i, j, new, alive)
        for k, value in _likeness(nodes, new, list(nodes.neighbours[new]), similarity, area):
            heapq.heappush(heap, (-value, new, k))
        new += 1
    return nodes


def _join(nodes: _Nodes, i: int, j: int, new: int, alive: set[int]) -> None:
    """Row `new` becomes i and j together, and takes their neighbours."""
    nodes.size[new] = nodes.size[i] + nodes.size[j]
    share = nodes.size[i] / nodes.size[new]
    for values in (nodes.colour, nodes.texture):
        values[new] = share * values[i] + (1 - share) * values[j]
    nodes.box[new, :2] = np.minimum(nodes.box[i, :2], nodes.box[j, :2])
    nodes.box[new, 2:] = np.maximum(nodes.box[i, 2:], nodes.box[j, 2:])
    nodes.member[new] = nodes.member[i] | nodes.member[j]
    alive -= {i, j}
    for old in (i, j):
        for k, (length, steps) in nodes.neighbours[old].items():
            if k in alive:
                before = nodes.neighbours[new].get(k, (0.0, 0.0))
                nodes.neighbours[new][k] = nodes.neighbours[k][new] = (before[0] + length, before[1] + steps)
    alive.add(new)


def _likeness(nodes: _Nodes, i: int, others: list[int], similarity: Similarity, area: int) -> list[tuple[int, float]]:
    """How much node i is like each of the others."""
    if not others:
        return []
    both = nodes.size[i] + nodes.size[others]
    low = np.minimum(nodes.box[i, :2], nodes.box[others, :2])
    high = np.maximum(nodes.box[i, 2:], nodes.box[others, 2:])
    contact = np.array([nodes.neighbours[i][j] for j in others])
    value = similarity.colour * np.minimum(nodes.colour[i], nodes.colour[others]).sum(1)
    value += similarity.texture * np.minimum(nodes.texture[i], nodes.texture[others]).sum(1)
    value += similarity.small * (1 - both / area)
    value += similarity.fits * (1 - ((high - low).prod(1) - both) / area)
    value += similarity.edge * np.exp(-contact[:, 1] / contact[:, 0] / EDGE)
    return list(zip(others, value.tolist(), strict=True))


def _overlaps(masks: np.ndarray) -> np.ndarray:
    """(N, N) IoU, measured on every second pixel of the small copy."""
    half = masks[:, ::2, ::2].reshape(len(masks), -1).astype(np.float32)
    both, sizes = half @ half.T, half.sum(1)
    return both / np.maximum(1, sizes[:, None] + sizes - both)


def _worth(masks: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """(N,) 0 to 1: (edge along the outline x share of the photo's frame left free) ** 2 x area ** 1/4."""
    outline = np.zeros_like(masks)
    outline[:, :, :-1] = masks[:, :, :-1] != masks[:, :, 1:]
    outline[:, :-1] |= masks[:, :-1] != masks[:, 1:]
    flat = outline.reshape(len(masks), -1).astype(np.float32)
    strength = flat @ edge.ravel().astype(np.float32) / np.maximum(1, flat.sum(1))
    frame = np.ones(edge.shape, bool)
    frame[1:-1, 1:-1] = False
    free = (~masks[:, frame]).mean(1)
    return (strength * free) ** 2 * masks.mean((1, 2)) ** 0.25


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) bool -> (H, W) bool with smooth outlines."""
    return np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)) > 127
