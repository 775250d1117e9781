"""Stability, boxes and the dropping of doubles for many masks at once; pure functions of tensors."""

# N masks, h w their pixels

from __future__ import annotations

import numpy as np
import torch


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


def keep_best(boxes: torch.Tensor, scores: torch.Tensor, overlap: float) -> torch.Tensor:
    """Non-maximum suppression: the indices of the boxes to keep, best first.

    A box goes when its IoU with a better one that stays is above `overlap`. Equal scores: the first one is better."""
    order = torch.argsort(scores, descending=True, stable=True)
    boxes = boxes[order]
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    doubles = (both / (areas[:, None] + areas - both).clamp(min=1e-9) > overlap).cpu().numpy()
    stays = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if stays[i]:
            stays[i + 1 :] &= ~doubles[i, i + 1 :]
    return order[torch.from_numpy(stays).to(order.device)]
