"""`pipeline.json`: what the folder of an exported pipeline says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from refine_control.config import SamplerConfig, Section, StudentCard
from refine_control.errors import DamagedError, InvalidInputError
from refine_control.models.card import sampler_by_card
from refine_control.models.fit import Geometry
from refine_control.records import INPAINT
from refine_control.storage import read_manifest

DESCRIPTION = "pipeline.json"


class Description(Section, extra="ignore"):  # a newer writer may add entries
    """Files and constants of an exported pipeline, and how it is to be sampled."""

    version: Literal[1] = 1
    engine: Literal["onnx", "openvino"]
    precision: str = "fp32"
    condition: str = INPAINT
    parts: dict[str, str]
    """Graph files by part: denoiser, or controlnet and transformer; vae_encoder, vae_decoder, text_encoder (_2, _3)."""
    tokenizers: dict[str, str]
    """tokenizer.json files by text encoder, each with the padding and the truncation of its encoder."""
    vocabulary: list[str] | None = None
    max_sequence_length: int
    """Zero tokens that stand for T5 where there is none."""
    text_width: int = 0
    """Width of the prompt embeddings, which the CLIPs are widened to; 0: T5's, else that of the CLIPs together."""
    latent_channels: int = 16
    downscale: int
    """Pixels of a latent."""
    multiple: int
    largest: int
    side: int
    shift: float
    """The scheduler's."""
    layer_of_site: list[int] | None = None
    """Where ControlNet and transformer are apart: the layer that feeds each of the transformer's sites."""
    sampling: SamplerConfig = SamplerConfig()
    most_steps: int | None = None
    distilled_guidance: float = 1.0

    @property
    def geometry(self) -> Geometry:
        """The sizes that it paints."""
        return Geometry(self.multiple, self.largest, self.side)

    @property
    def card(self) -> StudentCard | None:
        """The card of a student for few steps; None for other ControlNets."""
        if self.most_steps is None:
            return None
        learnt = {"most_steps": self.most_steps, "distilled_guidance": self.distilled_guidance}
        return StudentCard(condition=self.condition, sampling=self.sampling, **learnt)


def read_description(folder: Path) -> Description:
    """The description of an exported pipeline whose files are all as its manifest says.

    Raises InvalidInputError for another folder, DamagedError for files that differ or a description that cannot be
    read."""
    try:
        files = read_manifest(folder)["files"]
        content = (folder / DESCRIPTION).read_bytes()
    except FileNotFoundError:
        raise InvalidInputError(
            f"{folder} is no exported pipeline; make one with `refine-control export STUDENT --to onnx --out FOLDER`"
        ) from None
    try:
        description = Description.model_validate_json(content)
        if unknown := {*description.parts.values(), *description.tokenizers.values()} - files.keys():
            raise ValueError(f"it names {', '.join(sorted(unknown))}, which is not in the manifest")
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"{folder / DESCRIPTION} cannot be read by this version: {reason}; export again") from None
    return description


def is_exported(folder: Path) -> bool:
    """Whether a folder is an exported pipeline."""
    return (folder / DESCRIPTION).is_file()


def exported_sampler(folder: Path, given: Mapping[str, Any]) -> SamplerConfig:
    """The sampler with the `given` fields (None: not given) and else the export's. Raises as `read_description`."""
    about = read_description(folder)
    return sampler_by_card(about.card, folder, given, about.sampling.model_dump())
