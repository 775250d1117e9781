"""Training data of the miniature: rendered scenes or small real photographs, with the same stages.

A world provides the initial pipeline, the images of every stage, and the evaluation of the result.
"""

# N photographs, B batch, H = W = 64 pixels, h = w = 8 latents

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from refine_control.baselines.bounds import decoded
from refine_control.conditions.inpainting import mask_at_latents, masked_pixels
from refine_control.config import SamplerConfig
from refine_control.errors import InvalidInputError
from refine_control.metrics.image_pairs import psnr
from refine_control.miniature import scenes, vocabulary
from refine_control.miniature.check import CHECK_SAMPLER, check_bundle
from refine_control.miniature.networks import new_pipeline, with_new_words
from refine_control.miniature.obedience import Classifier, load_classifier
from refine_control.miniature.objectives import PictureBatches, SceneBatch, SceneBatches
from refine_control.miniature.small_photos import SmallPhotos, category_words, read_small_photos, small_photos_mark
from refine_control.models.backbone import encode_images
from refine_control.models.card import BUNDLE
from refine_control.models.loading import load_backbone, load_pipeline
from refine_control.pipeline.painting import inpaint
from refine_control.pixels import from_images
from refine_control.progress import Progress
from refine_control.randomness import derive_seed, permutation
from refine_control.training.loop import Batches, Draw
from refine_control.training.run import fast_precision


class World(Protocol):
    """What `bundle.train_bundle` needs."""

    card: dict[str, Any]
    """Its entry in the bundle's card."""
    mark: str
    """Identifies its images in fingerprints."""
    has_oracle: bool
    """Whether its bundles have a classifier."""

    def pipeline(self, start: Path | None, work: Path, seed: int, stages: Collection[str]) -> Any:
        """The initial pipeline of a training of `stages`: the networks of `start`, or new ones."""
        ...

    def pictures(self) -> Any:
        """Batches (B,3,64,64) in [-1, 1] for the autoencoder."""
        ...

    def batches(self, vae: Any) -> Any:
        """SceneBatch for base and teacher."""
        ...

    def some(self, seed: int, count: int) -> torch.Tensor:
        """(count,3,64,64) in [-1, 1], used to normalise latents."""
        ...

    def oracle(self, start: Path | None) -> Classifier | None:
        """The classifier of `start`; None if there is none."""
        ...

    def skill(self, bundle: Path, count: int) -> dict[str, Any]:
        """Measures a finished bundle on `count` images that were not used in training."""
        ...


class SceneWorld:
    """Rendered scenes, for the shipped miniature."""

    mark = "scenes"
    has_oracle = True
    card: dict[str, Any] = {  # noqa: RUF012
        "name": "mini",
        "vocabulary": list(vocabulary.WORDS),
        "trained_on": "rendered scenes and rendered textures; no photograph was seen",
        "license": "Apache-2.0",
    }

    def pipeline(self, start: Path | None, work: Path, seed: int, stages: Collection[str]) -> Any:
        """The pipeline of `start`, or a new one."""
        del stages
        return load_pipeline(start) if start else new_pipeline(work, seed)

    def pictures(self) -> PictureBatches:
        """Scenes, and images with the statistics of photographs."""
        return PictureBatches()

    def batches(self, vae: Any) -> SceneBatches:
        """Scenes rendered on demand."""
        return SceneBatches(vae)

    def some(self, seed: int, count: int) -> torch.Tensor:
        """Scenes of a separate seed."""
        rendered = scenes.render(derive_seed(seed, "normalise"), 0, count).images
        return from_images(rendered)

    def oracle(self, start: Path | None) -> Classifier | None:
        """The classifier of `start`, so that the numbers of all sittings can be compared."""
        return load_classifier(start) if start else None

    def skill(self, bundle: Path, count: int) -> dict[str, Any]:
        """`mini check`."""
        return check_bundle(count, bundle=bundle, precision=fast_precision(torch.device("cpu")))


class PhotoWorld:
    """Small photographs with categories; starts from the shipped miniature by default.

    The photographs' terms apply to its weights, which must not be published with the package."""

    has_oracle = False

    def __init__(self, folder: Path, progress: Progress | None = None):
        self.folder, self.mark = folder, small_photos_mark(folder)
        self.photos = read_small_photos(folder, "teacher", progress=progress)
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

    def pictures(self) -> PhotoPictures:
        """The teacher's photographs."""
        return PhotoPictures(self.photos)

    def batches(self, vae: Any) -> PhotoBatches:
        """The teacher's photographs, encoded once."""
        return PhotoBatches(vae, self.photos)

    def some(self, seed: int, count: int) -> torch.Tensor:
        """A random subset of the teacher's photographs."""
        rows = permutation(derive_seed(seed, "normalise"), len(self.photos.keys))[:count]
        return from_images(self.photos.images[rows])

    def oracle(self, start: Path | None) -> None:
        """Photo bundles have no classifier: categories are not recognisable at 64 px."""
        del start

    def skill(self, bundle: Path, count: int) -> dict[str, Any]:
        """PSNR in dB on test photographs of the autoencoder, and of the teacher with right, empty and wrong prompts."""
        return photo_skill(bundle, read_small_photos(self.folder, "test", limit=count), CHECK_SAMPLER)


def photo_skill(bundle: Path, photos: SmallPhotos, sampler: SamplerConfig) -> dict[str, Any]:
    """Mean PSNR in dB of the autoencoder, and of the teacher in the region and on the whole picture."""
    backbone = load_backbone(bundle, cpu_kernels=True)
    controlnet, count = backbone.pipeline.controlnet, len(photos.keys)
    reconstruction = float(psnr(photos.images, decoded(backbone, photos.images)).mean())
    out: dict[str, Any] = {"photographs": count, "autoencoder_psnr": reconstruction}
    wrong = [*photos.prompts[count // 2 :], *photos.prompts[: count // 2]]
    for name, prompts in (("category", photos.prompts), ("empty", [""] * count), ("wrong", wrong)):
        painted = inpaint(backbone, controlnet, photos.images, photos.masks, prompts, sampler)
        region, whole = psnr(photos.images, painted, photos.masks), psnr(photos.images, painted)
        out[f"teacher_{name}"] = {"psnr_region": float(region.mean()), "psnr": float(whole.mean())}
    return out


class _Order:
    """Assigns photographs to slots: each slot iterates over all of them, shuffled anew in every epoch.

    A function of (seed, stage, slot, step), so it does not depend on processes or micro-batches."""

    def __init__(self, count: int):
        self.count = count
        self.orders: dict[tuple[int, str, int], tuple[int, np.ndarray]] = {}

    def rows(self, draw: Draw) -> np.ndarray:
        """(B,) indices."""
        epoch, position = divmod(draw.step, self.count)
        out = []
        for slot in draw.slots:
            key = (draw.seed, draw.stage, slot)
            if self.orders.get(key, (-1,))[0] != epoch:
                self.orders[key] = (epoch, permutation(derive_seed(*key, "photographs", epoch), self.count))
            out.append(self.orders[key][1][position])
        return np.array(out)


class PhotoPictures(Batches):
    """Photographs for the autoencoder, half of them mirrored."""

    def __init__(self, photos: SmallPhotos):
        self.photos, self.order = photos, _Order(len(photos.keys))

    def batch(self, draw: Draw) -> torch.Tensor:
        """(B,3,64,64) in [-1, 1]."""
        pixels = from_images(self.photos.images[self.order.rows(draw)])
        mirrored = (draw.uniforms("mirror") < 0.5)[:, None, None, None]
        return torch.where(mirrored, pixels.flip(3), pixels)


class _Encoded(NamedTuple):
    latents: torch.Tensor
    masked_latents: torch.Tensor
    mask: torch.Tensor


class PhotoBatches(Batches):
    """Photographs and their mirror images, encoded by the frozen autoencoder when the first batch is requested."""

    def __init__(self, vae: Any, photos: SmallPhotos):
        self.vae, self.photos, self.order = vae, photos, _Order(len(photos.keys))
        self.encoded: _Encoded | None = None

    @torch.no_grad()
    def _encode(self) -> _Encoded:
        """2N rows: the photographs, then their mirror images."""
        parts = []
        for flipped in (False, True):
            pixels = from_images(self.photos.images)
            masks = torch.from_numpy(self.photos.masks)[:, None].float()
            for image, mask in zip(pixels.split(64), masks.split(64), strict=True):
                both = (image.flip(3), mask.flip(3)) if flipped else (image, mask)
                image, mask = (part.to(self.vae.device) for part in both)
                latents = encode_images(self.vae, image)
                masked = encode_images(self.vae, masked_pixels(image, mask))
                parts.append(_Encoded(latents, masked, mask_at_latents(mask, latents)))
        return _Encoded(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def batch(self, draw: Draw) -> SceneBatch:
        """One photograph for each slot; its prompt is used as local and as global prompt."""
        if self.encoded is None:
            self.encoded = self._encode()
        rows = self.order.rows(draw)
        mirrored = (draw.uniforms("mirror") < 0.5).numpy()
        index = torch.from_numpy(rows + mirrored * len(self.photos.keys)).to(self.encoded.latents.device)
        prompts = [self.photos.prompts[row] for row in rows]
        latents, masked_latents, mask = (part[index] for part in self.encoded)
        return SceneBatch(latents, masked_latents, mask, prompts, prompts)
