"""What the bytes of a build depend on, besides its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from refine_control.errors import InvalidInputError
from refine_control.photos.buckets import Size, nearest, sizes_for
from refine_control.photos.shards import IMAGE_FORMATS


@dataclass(frozen=True)
class Parameters:
    """Everything the bytes of a build depend on, besides the source."""

    size: int = 64
    """Side of a sample in pixels, a multiple of 8, 8 to 4096; of 16 with buckets."""
    test_fraction: float = 0.2
    """Share of the photographs that go to `test`, 0 to 1."""
    unlabeled_fraction: float = 0.5
    """Share of the other photographs that go to `unlabeled`, 0 to 1."""
    seed: int = 0
    image_format: str = "webp"
    """webp (lossless), png, or jpg."""
    limit: int | None = None
    """Only the first so many entries."""
    samples_per_shard: int = 1000
    enlarge: bool = False
    """Whether photos smaller than `size` are enlarged rather than refused."""
    buckets: bool = False
    """Whether samples have the sizes of `buckets.sizes_for(size)`, each the nearest to its photo's shape."""

    def __post_init__(self) -> None:
        for name in ("test_fraction", "unlabeled_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.size % 8 or not 8 <= self.size <= 4096:
            raise InvalidInputError(f"size is {self.size}; it must be a multiple of 8 between 8 and 4096")
        if self.image_format not in IMAGE_FORMATS:
            raise InvalidInputError(f"image_format is {self.image_format!r}; choose {', '.join(IMAGE_FORMATS)}")
        if self.samples_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise InvalidInputError("samples_per_shard and limit must be at least 1")
        if self.buckets:
            sizes_for(self.size)  # raises for a size that is no multiple of 16

    @property
    def sizes(self) -> int | list[Size]:
        """What `photos.load` takes."""
        return sizes_for(self.size) if self.buckets else self.size

    def fits(self, width: int, height: int) -> bool:
        """Whether a photo is large enough for its sample."""
        h, w = nearest(width, height, sizes_for(self.size)) if self.buckets else (self.size, self.size)
        return self.enlarge or (width >= w and height >= h)

    def as_dict(self) -> dict[str, Any]:
        """For manifests: `buckets` only where there are some, so that builds of squares stay what they were."""
        return {name: value for name, value in asdict(self).items() if name != "buckets" or value}
