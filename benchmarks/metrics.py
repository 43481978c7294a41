"""Measures of pictures, masks and features. Pure functions: uint8 pictures (H, W, 3), bool masks (H, W), float vectors.

MSE, PSNR and SSIM are scikit-image's, the published SSIM is torchmetrics'. A region is a mask whose pixels count;
errors are averaged over them, so `mse` and `psnr` do not depend on its area (`ssim` does a little: windows at its edge see the
same black in both pictures). The `published_` ones of PIE-Bench (Ju et al. 2024) do: they black out the region of the edit in
both pictures and average over the whole frame.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import distance_transform_edt

from p2p_subject.errors import ModelError

CEILING = 100.0
"""dB that equal pictures count as in means, which no infinity may enter; 8 bits at 64x64 show 89 dB at most."""

CHANGED = 25
"""Levels of 255 from which a channel is taken to have changed: a tenth of the range, above what an autoencoder loses."""


def _require(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> None:
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8 or a.ndim != 3:
        raise ValueError(f"pictures {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected uint8 of one shape (H, W, 3)")
    if mask is not None and (mask.shape != a.shape[:2] or mask.dtype != bool or not mask.any()):
        raise ValueError(f"mask {mask.dtype} {mask.shape}; expected bool {a.shape[:2]} with a pixel or more")


def _require_masks(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.dtype != bool or b.dtype != bool or a.ndim != 2:
        raise ValueError(f"masks {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected bool of one shape (H, W)")


def _values(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The channels of two pictures in [0, 1], float64, of the pixels of `mask` alone."""
    _require(a, b, mask)
    return tuple((picture if mask is None else picture[mask]).astype(np.float64) / 255 for picture in (a, b))


def mse(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean squared error of two pictures scaled to [0, 1], over the pixels of `mask`; 0 (equal) to 1, lower is closer.

    Per pixel and channel (Wang and Bovik 2009).

    Raises `ValueError` for pictures or masks that do not fit, and for a mask without pixels.
    """
    from skimage.metrics import mean_squared_error

    return float(mean_squared_error(*_values(a, b, mask)))


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio of two pictures, 0 dB up, over the pixels of `mask`; higher is closer, infinite when equal.

    10 log10 of one over `mse` (Wang and Bovik 2009). Raises `ValueError` as `mse` does.
    """
    from skimage.metrics import peak_signal_noise_ratio

    pair = _values(a, b, mask)
    return math.inf if np.array_equal(*pair) else float(peak_signal_noise_ratio(*pair, data_range=1))


def capped(decibels: float) -> float:
    """A ratio in dB with `CEILING` in the place of more, infinity included."""
    return min(decibels, CEILING)


def ssim(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity of two pictures (Wang et al. 2004), -1 to 1; higher is closer, 1 when equal.

    The map of Gaussian windows (sigma 1.5, 11 pixels wide) is averaged over the pixels of `mask`. What lies outside of it is
    black in both pictures, so that windows across its edge do not see it. Raises `ValueError` as `mse` does.
    """
    from skimage.metrics import structural_similarity

    _require(a, b, mask)
    if mask is not None:
        a, b = (np.where(mask[..., None], picture, 0).astype(np.uint8) for picture in (a, b))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}
    values = structural_similarity(a, b, full=True, **options)[1].mean(-1)
    return float((values if mask is None else values[mask]).mean())


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks (Jaccard 1912), 0 to 1; higher is closer, 1 when both are empty.

    Raises `ValueError` for masks that do not fit.
    """
    _require_masks(a, b)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def boundary_f(a: np.ndarray, b: np.ndarray, tolerance: float | None = None) -> float:
    """F-measure of two masks' outlines (Perazzi et al. 2016, section 4.1), 0 to 1; higher is closer, 1 for equal masks.

    The harmonic mean of the shares of each outline that lies within `tolerance` pixels of the other; None is 0.8 % of the
    picture's diagonal, as published, rounded up. Raises `ValueError` for masks that do not fit.
    """
    from skimage.segmentation import find_boundaries

    _require_masks(a, b)
    reach = math.ceil(0.008 * math.hypot(*a.shape)) if tolerance is None else tolerance
    edges = [find_boundaries(mask, mode="inner") for mask in (a, b)]
    # All and nothing have no outline either, and are no match.
    return outline_f(*edges, reach) if any(edge.any() for edge in edges) else float(np.array_equal(a, b))


def outline_f(a: np.ndarray, b: np.ndarray, reach: float) -> float:
    """F-measure of two outlines (H, W) bool, 0 to 1; higher is closer, 1 when neither has a pixel.

    The harmonic mean of the shares of each that lies within `reach` pixels of the other. Raises `ValueError` for outlines that
    do not fit.
    """
    _require_masks(a, b)
    edges = (a, b)
    if not all(edge.any() for edge in edges):
        return 0.0 if any(edge.any() for edge in edges) else 1.0
    shares = [float((distance_transform_edt(~other)[edge] <= reach).mean()) for edge, other in (edges, edges[::-1])]
    return 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0


def changed(a: np.ndarray, b: np.ndarray, levels: int = CHANGED) -> np.ndarray:
    """Where two pictures differ by more than `levels` of 255 in a channel, (H, W) bool; a mask, to be compared by `iou`.

    Raises `ValueError` for pictures that do not fit.
    """
    _require(a, b)
    return (np.abs(a.astype(np.int16) - b.astype(np.int16)) > levels).any(-1)


def exactness(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    """Share of the pixels of `mask` that are the same bit for bit in two pictures, 0 to 1; higher is better.

    Raises `ValueError` as `mse` does.
    """
    _require(a, b, mask)
    return float((a == b).all(-1)[mask].mean())


def remaining(picture: np.ndarray, wanted: np.ndarray, before: np.ndarray, mask: np.ndarray) -> float:
    """Squared error to `wanted` as a share of that of `before`, over the pixels of `mask`; 0 (reached) up, 1 as before.

    Infinite where `before` is `wanted` and the picture is not; 0 where all three are alike. Raises `ValueError` as `mse` does.
    """
    left, first = mse(picture, wanted, mask), mse(before, wanted, mask)
    return left / first if first else math.inf if left else 0.0


def without(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with the pixels of `mask` black, as PIE-Bench compares backgrounds."""
    return np.where(mask[..., None], 0, picture).astype(np.uint8)


def published_psnr(a: np.ndarray, b: np.ndarray, edited: np.ndarray) -> float:
    """PIE-Bench's background PSNR in dB: the region `edited` is black in both and counts as no error (Ju et al. 2024).

    Higher is closer; it rises with the area of `edited`. Infinite when equal.
    """
    return psnr(without(a, edited), without(b, edited))


def published_mse(a: np.ndarray, b: np.ndarray, edited: np.ndarray) -> float:
    """PIE-Bench's background MSE of pictures in [0, 1], 0 to 1; lower is closer, and it falls with the area of `edited`."""
    return mse(without(a, edited), without(b, edited))


def require_torchmetrics() -> None:
    """Raise `ModelError` where `published_ssim` cannot be computed, before anything is edited for it."""
    try:
        import torchmetrics.functional.image  # noqa: F401
    except ImportError as error:
        raise ModelError("PIE-Bench's SSIM needs torchmetrics; install the extra p2p_subject[benchmarks]") from error


def published_ssim(a: np.ndarray, b: np.ndarray, edited: np.ndarray) -> float:
    """PIE-Bench's background SSIM, by torchmetrics over the whole frame; -1 to 1, higher is closer.

    It rises with the area of `edited`. Raises `ModuleNotFoundError` without torchmetrics.
    """
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    _require(a, b)
    pair = [torch.from_numpy(without(p, edited)).permute(2, 0, 1)[None].float() / 255 for p in (a, b)]
    return float(structural_similarity_index_measure(*pair, data_range=1.0))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two feature vectors (D,), -1 to 1; higher is closer.

    Of two pictures' CLIP or DINO features it is DreamBooth's CLIP-I or DINO (Ruiz et al. 2023, section 4.1), of a picture's and
    a text's CLIP-T. Raises `ValueError` for a vector of zeros.
    """
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    if a.shape != b.shape or not lengths > 0:
        raise ValueError(f"vectors {a.shape} and {b.shape}, product of lengths {lengths}; expected two of one shape, not 0")
    return float(np.clip(a @ b / lengths, -1, 1))


def clip_score(image: np.ndarray, text: np.ndarray) -> float:
    """CLIP score of the features of a picture and of a text (D,): 100 times their cosine, at least 0 (Hessel et al. 2021).

    0 to 100, higher is better. With torchmetrics' factor of 100, as PIE-Bench reports it; the paper's own is 2.5.
    """
    return 100 * max(cosine(image, text), 0.0)


def self_similarity(keys: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of keys (T, D) of a picture's tokens: its structure, (T, T) in [-1, 1] (Tumanyan et al. 2022)."""
    unit = np.asarray(keys, np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True).clip(1e-12)
    return unit @ unit.T


def structure_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of the self-similarities of two pictures' keys (T, D) in DINO; 0 (equal) to 4, lower is closer.

    Tumanyan et al. 2022, section 3.1; keys of the last layer, heads side by side, the class token included.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"keys of shapes {a.shape} and {b.shape}; expected two of one shape (T, D)")
    return float(((self_similarity(a) - self_similarity(b)) ** 2).mean())
