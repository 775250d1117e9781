"""Segment Anything, versions 1 to 3, as a proposer of regions: a grid of points, three masks a point, no duplicates.

The processors and the mask generation of transformers need torchvision, which this project does not use. So
preprocessing, the grid and the suppression of duplicates are here; the networks are those of transformers. Scores and
boxes are computed on the masks of the decoder, which have a quarter of the input's resolution, and only the masks that
are kept are resized to the photo: outlines move by less than one pixel of the decoder, and memory stays small.
"""

# B photos, H W pixels of a photo, S side of the model's input, h w of the decoder's masks (S/4), P points, N masks

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from refine_control.annotation.masks import keep_best
from refine_control.errors import InvalidInputError, MissingError
from refine_control.models.components import load_pretrained, read_json
from refine_control.models.devices import best_device
from refine_control.models.hub import folder_of, revision
from refine_control.records import Proposal

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_GENERATIONS = {"sam": 1, "sam2": 2, "sam2_video": 2, "sam3_tracker": 3, "sam3_video": 3}
"""By `model_type`. A video checkpoint holds the network for single pictures, and that is what is loaded."""
_PREDICTED_IOU = {1: 0.88, 2: 0.80, 3: 0.80}
"""The thresholds of the originals; for SAM 3, which names none, that of SAM 2."""
_PIXELS_AT_ONCE = 2**26
"""Masks are brought to the photo's size so many pixels at a time: 256 MiB of logits."""


@dataclass(frozen=True)
class Settings:
    """Where points are set, and which of the masks they give are proposals."""

    points_per_side: int = 32
    """Points along each side of the photo; each stands in the middle of its cell."""
    points_per_batch: int = 64
    """Points that go through the decoder at once."""
    predicted_iou: float | None = None
    """Masks for which the model predicts no more are dropped; None: 0.88 for SAM 1, 0.80 for the later ones."""
    stability_score: float = 0.95
    """Masks with no more are dropped, see `stability_scores`."""
    stability_offset: float = 1.0
    """By how much the threshold on the logits is moved for the stability score."""
    overlap: float = 0.7
    """Of two masks whose boxes have a larger IoU, the one with the lower predicted IoU is dropped."""
    min_area: float = 0.01
    """Masks that cover less of the photo are not brought to its size."""


class Preparation(NamedTuple):
    """How a photo becomes the input of the model."""

    side: int
    """S."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keeps_shape: bool
    """SAM 1: the longer side becomes S and the rest is zeros; the later ones stretch the photo to S x S."""

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a photo within the model's input."""
        if not self.keeps_shape:
            return self.side, self.side
        scale = self.side / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> (3, S, S) float32, bilinear with antialiasing, normalised, then padded."""
        height, width = self.fitted(*image.shape[:2])
        small = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(small).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]
        return F.pad(pixels, (0, self.side - width, 0, self.side - height))

    def points(self, height: int, width: int, per_side: int) -> torch.Tensor:
        """(per_side ** 2, 2) x and y in pixels of the model's input: the middles of the cells of a photo's grid.

        A whole number is the middle of a pixel, as the models have it: they add the half."""
        tall, wide = self.fitted(height, width)
        middles = (torch.arange(per_side) + 0.5) / per_side
        y, x = torch.meshgrid(middles * tall - 0.5, middles * wide - 0.5, indexing="ij")
        return torch.stack([x, y], -1).reshape(-1, 2)


class _Candidates(NamedTuple):
    """What the decoder gave and the thresholds let pass."""

    logits: torch.Tensor
    """(N, h, w), the padding of SAM 1 included."""
    predicted_iou: torch.Tensor
    stability: torch.Tensor
    boxes: torch.Tensor
    """(N, 4), on the decoder's masks."""


class Segmenter:
    """A Segment Anything model with the settings of its grid. Made by `load_segmenter`."""

    def __init__(
        self, model: Any, name: str, preparation: Preparation, settings: Settings, dtype: torch.dtype, generation: int
    ) -> None:
        self.model, self.name, self.preparation, self.settings = model, name, preparation, settings
        self.dtype = dtype
        chosen = settings.predicted_iou
        self.predicted_iou = _PREDICTED_IOU[generation] if chosen is None else chosen

    @torch.inference_mode()
    def propose(self, image: np.ndarray) -> list[Proposal]:
        """(H, W, 3) uint8 -> the regions found in it, best first."""
        pixels = self.preparation.pixels(image)[None].to(self.model.device)
        # The decoder stays in float32: half precision would move the points by pixels.
        with torch.autocast(pixels.device.type, self.dtype, enabled=self.dtype != torch.float32):
            encoded = self.model.get_image_embeddings(pixels)
        levels = encoded.float() if isinstance(encoded, torch.Tensor) else [level.float() for level in encoded]
        height, width = image.shape[:2]
        points = self.preparation.points(height, width, self.settings.points_per_side).to(self.model.device)
        batches = points.split(self.settings.points_per_batch)
        parts = [self._candidates(levels, points, height, width) for points in batches]
        candidates = _Candidates(*(torch.cat(values) for values in zip(*parts, strict=True)))
        overlaps, scores = box_overlaps(candidates.boxes).cpu().numpy(), candidates.predicted_iou.cpu().numpy()
        kept = torch.tensor(keep_best(overlaps, scores, self.settings.overlap), dtype=torch.long)
        candidates = _Candidates(*(values[kept.to(self.model.device)] for values in candidates))
        at_once = max(1, _PIXELS_AT_ONCE // (height * width))
        masks = (mask for part in candidates.logits.split(at_once) for mask in self._full_size(part, height, width))
        scores = zip(candidates.predicted_iou.tolist(), candidates.stability.tolist(), strict=True)
        return [
            Proposal(mask, min(1.0, iou), stability, self.name)  # SAM 1 may promise more than 1
            for mask, (iou, stability) in zip(masks, scores, strict=True)
        ]

    def _candidates(
        self, encoded: torch.Tensor | list[torch.Tensor], points: torch.Tensor, height: int, width: int
    ) -> _Candidates:
        """(P, 2) points of one photo -> the three masks of each, as far as they pass the thresholds."""
        labels = torch.ones(1, len(points), 1, dtype=torch.int, device=points.device)
        out = self.model(image_embeddings=encoded, input_points=points[None, :, None], input_labels=labels)
        logits, predicted_iou = out.pred_masks[0].flatten(0, 1), out.iou_scores[0].flatten()
        tall, wide = self.preparation.fitted(height, width)
        per_pixel = logits.shape[-1] / self.preparation.side
        shown = logits[:, : max(1, round(tall * per_pixel)), : max(1, round(wide * per_pixel))]  # no padding
        stability = stability_scores(shown, self.settings.stability_offset)
        masks = shown > 0
        keep = (predicted_iou > self.predicted_iou) & (stability > self.settings.stability_score)
        keep &= masks.float().mean((-2, -1)) >= self.settings.min_area
        keep &= masks.any(-1).any(-1)
        return _Candidates(logits[keep], predicted_iou[keep], stability[keep], boxes_of(masks[keep]))

    def _full_size(self, logits: torch.Tensor, height: int, width: int) -> np.ndarray:
        """(N, h, w) -> (N, H, W) bool, bilinear."""
        logits = logits[:, None]
        if self.preparation.keeps_shape:
            tall, wide = self.preparation.fitted(height, width)
            logits = F.interpolate(logits, (self.preparation.side,) * 2, mode="bilinear")[..., :tall, :wide]
        return (F.interpolate(logits, (height, width), mode="bilinear")[:, 0] > 0).cpu().numpy()


def stability_scores(logits: torch.Tensor, offset: float) -> torch.Tensor:
    """(N, h, w) logits -> (N,): area above +offset over area above -offset, the IoU of the two; 0 for an empty mask."""
    inner, outer = ((logits > bound).sum((-2, -1)) for bound in (offset, -offset))
    return inner / outer.clamp(min=1)


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """(N, h, w) bool -> (N, 4) float x0, y0, x1, y1, the last two one past the mask; zeros for an empty mask."""
    sides = []
    for line in (masks.any(-2), masks.any(-1)):  # occupied columns, occupied rows
        count, whole = line.shape[-1], line.int()
        first, last = whole.argmax(-1), count - whole.flip(-1).argmax(-1)
        sides.append(torch.stack([first, last], -1) * line.any(-1, keepdim=True))
    return torch.stack([sides[0], sides[1]], -1).flatten(-2).float()


def box_overlaps(boxes: torch.Tensor) -> torch.Tensor:
    """(N, 4) boxes as of `boxes_of` -> (N, N) IoU."""
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return both / (areas[:, None] + areas - both).clamp(min=1e-9)


def load_segmenter(
    name: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None, **settings: Any
) -> Segmenter:
    """A SAM 1, 2 or 3 by hub id or folder; `settings` are those of `Settings`.

    `dtype` is the precision of the encoder: by default bfloat16 on a GPU, float32 elsewhere. Raises MissingError for
    weights that are not there, InvalidInputError for a model of another kind or with weights that do not fit."""
    from transformers import AutoModelForMaskGeneration

    chosen = Settings(**settings)
    device = device or best_device().type
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise MissingError(f"device is {device} and torch sees no GPU here; use device cpu or a machine with a GPU")
    example = "a hub id such as facebook/sam2.1-hiera-large, or the folder that `hf download` of it prints"
    folder = folder_of(name, ["*.json", "*.safetensors"], example)
    config = read_json(folder / "config.json", "fetch a SAM 2 with `hf download facebook/sam2.1-hiera-large`")
    kind = config.get("model_type")
    if kind not in _GENERATIONS:
        raise InvalidInputError(
            f"{folder} holds a model of type {kind!r}, which finds no regions from points; name a SAM model, one of "
            f"the types {', '.join(_GENERATIONS)}"
        )
    model = load_pretrained(AutoModelForMaskGeneration, folder)
    half = torch.bfloat16 if device.startswith("cuda") else torch.float32
    preparation = _preparation(folder, model.config, _GENERATIONS[kind])
    model = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    return Segmenter(
        model, f"{Path(name).name}@{revision(folder)}", preparation, chosen, dtype or half, _GENERATIONS[kind]
    )


def _preparation(folder: Path, config: Any, generation: int) -> Preparation:
    """Side from the model, which works at no other; colour statistics from the checkpoint's processor, if there."""
    config = getattr(config, "tracker_config", None) or config
    side = config.vision_config.image_size if generation == 1 else config.prompt_encoder_config.image_size
    processor = _optional(folder / "preprocessor_config.json")
    if processor is None:
        processor = (_optional(folder / "processor_config.json") or {}).get("image_processor", {})
    mean, std = _HALVES if generation == 3 else _IMAGENET
    mean, std = processor.get("image_mean") or mean, processor.get("image_std") or std
    return Preparation(side, tuple(mean), tuple(std), keeps_shape=generation == 1)


def _optional(path: Path) -> Mapping[str, Any] | None:
    return read_json(path, "download the model again") if path.is_file() else None
