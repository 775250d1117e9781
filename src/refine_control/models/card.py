"""The card of a model bundle of this project: where the shipped one lies, and its recommended sampling."""

from __future__ import annotations

from pathlib import Path

BUNDLE = Path(__file__).parent / "mini_bundle"
"""The shipped pipeline folder in diffusers layout."""
CARD = "refine_control.json"
"""The file in which a bundle describes itself, beside the files that diffusers reads."""
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0, "conditioning_scale": 1.0}
"""What a bundle paints well with; a trial of guidance is in docs/trials.md."""


def own_sampling(model: str) -> dict[str, float]:
    """Fields of SamplerConfig for a model, where nobody says; none for SD3, whose are the defaults."""
    return dict(SAMPLING) if model == "mini" or (Path(model) / CARD).is_file() else {}
