"""Poses: key points drawn as marks. The picture is given, or the pose of one person is estimated by transformers'
VitPose (`data build --preparer`) and drawn as OpenPose draws it, which published pose ControlNets are trained on."""

# H W pixels

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from refine_control.conditions.condition import Condition
from refine_control.conditions.networks import load_preparer
from refine_control.errors import InvalidInputError

LEAST_SCORE = 0.3
"""Key points below it are not drawn."""
COCO_POINTS = 17
_OPENPOSE = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""Of OpenPose's 18 points the one of COCO's 17; -1: the neck, in the middle of COCO's shoulders, 5 and 6."""
_LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0))
_LIMBS += ((0, 14), (14, 16), (0, 15), (15, 17))
_COLOURS = tuple(tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / 18, 1, 1)) for i in range(18))
"""Of points and limbs, by their order."""
_LIMB_SHADE = 0.6


def draw_pose(points: np.ndarray, scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """COCO's 17 key points, (17,2) x and y in pixels with scores (17,), -> (H,W,3) uint8 on black.

    Lines are 8 pixels wide where the shorter side has 512. Points with a score below LEAST_SCORE, and limbs that end
    in them, are left out."""
    chosen = np.array([*points, (points[5] + points[6]) / 2])[list(_OPENPOSE)]
    seen = np.array([*scores, min(scores[5], scores[6])])[list(_OPENPOSE)] >= LEAST_SCORE
    image = Image.new("RGB", (width, height))
    draw, unit = ImageDraw.Draw(image), min(height, width) / 512
    for colour, (start, end) in zip(_COLOURS, _LIMBS, strict=False):
        if seen[start] and seen[end]:
            shade = tuple(round(_LIMB_SHADE * c) for c in colour)
            draw.line([*chosen[start], *chosen[end]], shade, max(1, round(8 * unit)))
    radius = max(1, 4 * unit)
    for colour, (x, y), drawn in zip(_COLOURS, chosen, seen, strict=True):
        if drawn:
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)
    return np.asarray(image)


@cache
def pose_network(model: str) -> Callable[[np.ndarray], np.ndarray]:
    """A VitPose by hub id or folder, on the GPU if there is one: (H,W,3) uint8 -> pose picture (H,W,3) uint8.

    The whole photograph is the person's box: of several people one is drawn. Raises what `load_preparer` raises, and
    InvalidInputError for key points other than COCO's 17."""
    import torch
    from transformers import VitPoseForPoseEstimation
    from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil

    network = load_preparer(model, VitPoseForPoseEstimation, "VitPose", "usyd-community/vitpose-base-simple")
    if (count := network.config.num_labels) != COCO_POINTS:
        raise InvalidInputError(f"{model} finds {count} key points, not the {COCO_POINTS} of COCO; name another model")
    backbone = network.config.backbone_config
    height, width = backbone.image_size
    processor: Any = VitPoseImageProcessorPil(size={"height": height, "width": width})
    experts = {"dataset_index": torch.zeros(1, dtype=torch.long)} if backbone.num_experts > 1 else {}  # 0 is COCO

    @torch.inference_mode()
    def prepare(image: np.ndarray) -> np.ndarray:
        boxes = [[[0.0, 0.0, image.shape[1], image.shape[0]]]]
        pixels = processor(Image.fromarray(image), boxes=boxes, return_tensors="pt")["pixel_values"]
        given = {name: each.to(network.device) for name, each in {"pixel_values": pixels, **experts}.items()}
        ((person,),) = processor.post_process_pose_estimation(network(**given), boxes=boxes)
        return draw_pose(person["keypoints"].numpy(), person["scores"].flatten().numpy(), *image.shape[:2])

    return prepare


CONDITION = Condition("pose", "key points drawn as marks", network=pose_network)
