"""Training data of the miniature: rendered scenes or small real photographs, with the same stages.

A world provides the initial pipeline, the images of every stage, and the evaluation of the result.
"""

# N photographs, B batch, H = W = 64 pixels, h = w = 8 latents

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from refine_control.conditions.condition import Shown
from refine_control.errors import InvalidInputError
from refine_control.miniature import scenes, vocabulary
from refine_control.miniature.check import CHECK_SAMPLER, check_bundle, decoded_psnr, painted_psnr
from refine_control.miniature.networks import new_pipeline, with_new_words
from refine_control.miniature.objectives import PictureBatches, SceneBatch, SceneBatches, encode_scenes
from refine_control.miniature.small_photos import SmallPhotos, category_words, read_small_photos, small_photos_mark
from refine_control.models.card import BUNDLE
from refine_control.models.loading import load_backbone, load_pipeline
from refine_control.pipeline.painting import paint
from refine_control.pixels import from_images
from refine_control.progress import Progress
from refine_control.randomness import derive_seed, permutation
from refine_control.training.loop import Batches, Draw
from refine_control.training.run import fast_precision


class SceneWorld:
    """Rendered scenes, for the shipped miniature."""

    mark = "scenes"
    """Identifies its images in fingerprints."""
    has_oracle = True
    """Whether its bundles have a classifier."""
    card: Mapping[str, Any] = MappingProxyType(
        {
            "name": "mini",
            "vocabulary": list(vocabulary.WORDS),
            "trained_on": "rendered scenes and rendered textures; no photograph was seen",
            "license": "Apache-2.0",
        }
    )
    """Its entry in the bundle's card."""
    pictures = PictureBatches()
    """Batches for the autoencoder."""
    batches = SceneBatches
    """Given the autoencoder, batches for base and teacher."""

    def pipeline(self, start: Path | None, work: Path, seed: int, stages: Collection[str]) -> Any:
        """The initial pipeline of a training of `stages`: that of `start`, or a new one."""
        del stages
        return load_pipeline(start) if start else new_pipeline(work, seed)

    def some(self, seed: int, count: int) -> torch.Tensor:
        """(count,3,64,64) in [-1, 1], used to normalise latents: scenes of a separate seed."""
        return from_images(scenes.render(derive_seed(seed, "normalise"), 0, count).images)

    def skill(self, bundle: Path, count: int) -> Mapping[str, Any]:
        """`mini check` on `count` scenes that were not used in training."""
        return check_bundle(count, bundle=bundle, precision=fast_precision(torch.device("cpu")))


class PhotoWorld:
    """Small photographs with categories; starts from the shipped miniature by default.

    The photographs' terms apply to its weights, which must not be published with the package."""

    has_oracle = False
    """Categories are not recognisable at 64 px."""

    def __init__(self, folder: Path, progress: Progress | None = None):
        self.folder, self.mark = folder, small_photos_mark(folder)
        self.photos = read_small_photos(folder, "teacher", progress=progress)
        self.pictures, self.batches = PhotoPictures(self.photos), partial(PhotoBatches, photos=self.photos)
        self.card = {
            "name": "mini, photographs",
            "trained_on": f"{len(self.photos.keys)} small photographs with a category and a box each",
            "license": "the photographs' terms; not for publication",
        }

    def pipeline(self, start: Path | None, work: Path, seed: int, stages: Collection[str]) -> Any:
        """The pipeline of `start`, or the shipped one with new text encoders for the categories' words.

        Raises InvalidInputError if `start` does not know these words, or if no stage would train them."""
        words = category_words(self.folder)
        pipeline = load_pipeline(start or BUNDLE)
        if start:
            unknown = sorted(set(words) - {w.removesuffix("</w>") for w in pipeline.tokenizer.get_vocab()})
            if unknown:
                raise InvalidInputError(
                    f"{start} does not know {len(unknown)} words of {self.folder}, such as {unknown[0]!r}; omit "
                    "--from, so that the stage base trains them, or start from a bundle of these photographs"
                )
            return pipeline
        if "base" not in stages:
            raise InvalidInputError(
                f"the shipped model does not know the words of {self.folder}, and only the stage base trains words; "
                "add --stage base"
            )
        return with_new_words(pipeline, words, work, seed)

    def some(self, seed: int, count: int) -> torch.Tensor:
        """A random subset of the teacher's photographs."""
        rows = permutation(derive_seed(seed, "normalise"), len(self.photos.keys))[:count]
        return from_images(self.photos.images[rows])

    def skill(self, bundle: Path, count: int) -> Mapping[str, Any]:
        """Mean PSNR in dB on test photographs: the autoencoder, and the teacher with right, empty and wrong prompts."""
        photos = read_small_photos(self.folder, "test", limit=count)
        backbone, half = load_backbone(bundle, cpu_kernels=True), len(photos.keys) // 2
        prompts = {"category": photos.prompts, "empty": [""] * len(photos.keys)}
        prompts["wrong"] = [*photos.prompts[half:], *photos.prompts[:half]]
        images, masks = photos.images, photos.masks
        teacher = {}
        for name, texts in prompts.items():
            painted = paint(backbone, backbone.pipeline.controlnet, Shown(images, masks), texts, CHECK_SAMPLER)
            teacher[f"teacher_{name}"] = painted_psnr(images, painted, masks)
        return {"photographs": len(images), "autoencoder_psnr": decoded_psnr(backbone, images), **teacher}


World = SceneWorld | PhotoWorld
"""What `bundle.train_bundle` needs."""


@lru_cache(maxsize=256)
def _epoch(seed: int, stage: str, slot: int, epoch: int, count: int) -> np.ndarray:
    """The order in which a slot shows the photographs."""
    return permutation(derive_seed(seed, stage, slot, "photographs", epoch), count)


def photo_rows(draw: Draw, count: int) -> np.ndarray:
    """(B,) photographs of the slots: each slot shows all of them, shuffled anew in every epoch.

    A function of (seed, stage, slot, step), so it does not depend on processes or micro-batches."""
    epoch, position = divmod(draw.step, count)
    return np.array([_epoch(draw.seed, draw.stage, slot, epoch, count)[position] for slot in draw.slots])


class PhotoPictures(Batches):
    """Photographs for the autoencoder, half of them mirrored."""

    def __init__(self, photos: SmallPhotos):
        self.photos = photos

    def batch(self, draw: Draw) -> torch.Tensor:
        """(B,3,64,64) in [-1, 1]."""
        pixels = from_images(self.photos.images[photo_rows(draw, len(self.photos.keys))])
        mirrored = (draw.uniforms("mirror") < 0.5)[:, None, None, None]
        return torch.where(mirrored, pixels.flip(3), pixels)


class PhotoBatches(Batches):
    """Photographs and their mirror images, encoded by the frozen autoencoder when the first batch is requested."""

    def __init__(self, vae: Any, photos: SmallPhotos):
        self.vae, self.photos = vae, photos

    @cached_property
    def _encoded(self) -> SceneBatch:
        """2N rows: the photographs, then their mirror images."""
        images, masks, prompts = self.photos.images, self.photos.masks, self.photos.prompts
        both = [Shown(images, masks), Shown(images[:, :, ::-1], masks[:, :, ::-1])]
        shown = Shown.joined(both)  # each prompt is used as local and as global prompt
        return encode_scenes(self.vae, from_images(shown.pictures), shown, 2 * prompts, 2 * prompts)

    def batch(self, draw: Draw) -> SceneBatch:
        """One photograph for each slot."""
        count, mirrored = len(self.photos.keys), (draw.uniforms("mirror") < 0.5).numpy()
        return self._encoded.take(photo_rows(draw, count) + mirrored * count)
