"""Makes features.npz: what the reference implementations answer with fixed random weights on fixed random pictures.

Run by hand, never by a test, when the fixed weights or pictures change:

    pip download --no-deps --dest wheels torch-fidelity==0.4.0 lpips==0.1.4 torchvision==0.29.2
    for wheel in wheels/*.whl; do python -m zipfile --extract $wheel reference; done
    python tests/evaluation/golden/make.py reference

Nothing of them is installed. torchvision does not import beside a CPU torch, so the modules that are needed are
imported alone, past the `__init__` of their packages; what those modules import and do not use here is a stand-in.
"""

import sys
import zlib
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch

GOLDEN = Path(__file__).with_name("features.npz")


def answers():
    """By name, as they were made."""
    return np.load(GOLDEN)


def fixed_tensors(shapes):
    """By name: weights in the size that keeps activations alive, statistics of normalisation near 0 and 1."""
    return {name: torch.from_numpy(fixed_array(name, shape)) for name, shape in shapes.items()}


def fixed_array(name, shape):
    values = np.random.default_rng([20250922, zlib.crc32(name.encode())]).random(shape, dtype=np.float32)
    if name.startswith("lin"):
        return values
    if name.endswith(("running_var", "bn.weight")):
        return 0.5 + values
    if len(shape) > 1:
        return (2 * values - 1) * np.float32(np.sqrt(6 / np.prod(shape[1:])))
    return 0.4 * values - 0.2


def fixed_images(seed, count, height, width):
    """Blocks of colour with noise: edges at every scale, no two pictures alike."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 200, (count, height // 8 + 1, width // 8 + 1, 3))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, :height, :width]
    return (fine + random.integers(0, 56, fine.shape)).astype(np.uint8)


SMALL, LARGE = (1, 1, 40, 56), (2, 1, 330, 310)  # resized up, and down
PAIR = (3, 2, 64, 48), (4, 2, 64, 48)


def fixed_features(seed, count=60, width=12):
    """With correlations, a mean of its own, and more or fewer pictures than features."""
    random = np.random.default_rng(seed)
    return random.random((count, width)) @ random.random((width, width)) + random.random(width)


def stand_in(name, folder=None):
    sys.modules[name] = MagicMock() if folder is None else ModuleType(name)
    if folder is not None:
        sys.modules[name].__path__ = [str(folder)]


def prepare(reference):
    sys.path.insert(0, str(reference))
    stand_in("torch_fidelity", reference / "torch_fidelity")
    stand_in("torch_fidelity.utils")
    stand_in("torchvision", reference / "torchvision")
    stand_in("torchvision.models", reference / "torchvision" / "models")
    for name in ("transforms", "transforms._presets", "utils", "models._api", "models._utils"):
        stand_in(f"torchvision.{name}")
    sys.modules["torchvision.models._api"].WeightsEnum = object
    stand_in("lpips.trainer")
    sys.modules["lpips.trainer"].__all__ = []


def inception(out):
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Network(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            shapes = {k: tuple(v.shape) for k, v in self.state_dict().items() if not k.endswith("num_batches_tracked")}
            out["inception_names"] = np.array(sorted(f"{k} {v}" for k, v in shapes.items()))
            return super().load_state_dict(fixed_tensors(shapes), strict=False)

    theirs.load_state_dict_from_url = lambda *args, **kwargs: None
    network = Network("inception", ["2048"])
    for name, picture in (("small", SMALL), ("large", LARGE)):
        (features,) = network(torch.from_numpy(fixed_images(*picture)).permute(0, 3, 1, 2))
        out[f"inception_{name}"] = features.numpy()


def perceptual(out):
    from torchvision.models.alexnet import AlexNet

    trunk = AlexNet()
    shapes = {k: tuple(v.shape) for k, v in trunk.state_dict().items()}
    out["alexnet_names"] = np.array(sorted(f"{k} {v}" for k, v in shapes.items()))
    used = fixed_tensors({k: v for k, v in shapes.items() if k.startswith("features.")})
    trunk.load_state_dict(used, strict=False)
    sys.modules["torchvision.models"].alexnet = lambda pretrained: trunk

    import lpips

    network = lpips.LPIPS(net="alex", pretrained=False, verbose=False)
    heads = {k: tuple(v.shape) for k, v in network.state_dict().items() if k.startswith("lin") and k[3].isdigit()}
    out["heads_names"] = np.array(sorted(f"{k} {v}" for k, v in heads.items()))
    network.load_state_dict(fixed_tensors(heads), strict=False)
    pixels = [torch.from_numpy(fixed_images(*p)).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in PAIR]
    out["lpips"] = network(*pixels).flatten().detach().numpy()


def distances(out):
    from torch_fidelity import metric_fid, metric_kid

    a, b = fixed_features(5), fixed_features(6)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    out["frechet"] = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    out["kid"] = metric_kid.kernel_mmd(a, b, kid_kernel_poly_coef0=1, **kernel)


def main(reference):
    prepare(reference)
    out = {}
    with torch.no_grad():
        inception(out)
        perceptual(out)
        distances(out)
    np.savez_compressed(GOLDEN, **out)
    print({k: v.shape if np.ndim(v) else float(v) for k, v in out.items()}, GOLDEN.stat().st_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
