"""Networks that compute features of images: Inception for FID and KID, AlexNet for LPIPS, CLIP for CMMD.

Each is the published network with the published weights, checked by sha256, or no number at all.
"""

from refine_control.metrics.features.alexnet import Lpips, load_lpips, lpips
from refine_control.metrics.features.clip import ClipText, clip_features, load_clip, load_clip_text, text_features
from refine_control.metrics.features.inception import Inception, inception_features, load_inception
from refine_control.metrics.features.weights import FOLDER_VARIABLE

__all__ = [
    "FOLDER_VARIABLE",
    "ClipText",
    "Inception",
    "Lpips",
    "clip_features",
    "inception_features",
    "load_clip",
    "load_clip_text",
    "load_inception",
    "load_lpips",
    "lpips",
    "text_features",
]
