"""Features of pictures and texts by published networks: CLIP and DINO from transformers, LPIPS from the package of its authors.

Networks are loaded by hub name or local folder, as safetensors, in single precision. Of a hub repository that has none,
transformers takes the conversion that is proposed there; without a connection, a folder will do that
`ViTModel.from_pretrained(NAME).save_pretrained(FOLDER)` has made elsewhere. Pictures are prepared with Pillow alone, in one
way everywhere: image processors of different releases resize differently, which moves scores by a point.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import Tensor

from p2p_subject.errors import ModelError, did_you_mean

CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETS = ("squeeze", "alex", "vgg")


def with_shorter_side(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Width and height that a picture of `size` has when its shorter side is `shorter`.

    Truncated, in torchvision's order of operations: a scale computed first makes 223 of 224 from some squares.
    """
    width, height = size
    return (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)


def prepared(image: Image.Image, shorter: int, side: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """A picture with its shorter side at `shorter` pixels (bicubic), cut to the middle `side` x `side`, normalised.

    (1, 3, side, side) float32. CLIP's own preparation with `shorter` = `side`; with 256 and 224 that of DINO's authors, which
    DreamBooth's figures are made with (google/dreambooth#3).
    """
    size = with_shorter_side(image.size, shorter)
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(mean)) / np.float32(deviation)).permute(2, 0, 1)[None].contiguous()


def _load(kind: type, name: str | Path, **options: Any) -> Any:
    """Load what transformers has under a name. `ModelError` where it cannot, and where a network would lack weights, which
    transformers draws at random and only warns of."""
    network = issubclass(kind, torch.nn.Module)
    expected = "expected a hub name or a folder with safetensors, or 'none' to leave out what needs it"
    try:
        loaded = kind.from_pretrained(name, **options, **({"output_loading_info": True} if network else {}))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = f"{kind.__name__} {str(name)!r} cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise ModelError(f"{said}; {expected}") from error
    if not network:
        return loaded
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        said = f"{str(name)!r} is not the weights of {kind.__name__}: {len(missing)} are missing, such as {missing[0]}"
        raise ModelError(f"{said}; {expected}")
    return model.float().eval()


def _pooled(output: Any) -> Tensor:
    # transformers 5 wraps what 4 returned.
    return output if isinstance(output, Tensor) else output.pooler_output


class Clip:
    """CLIP (Radford et al. 2021): features of pictures and of texts in one space."""

    def __init__(self, name: str | Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.name, self.device = str(name), torch.device(device)
        self.model = _load(CLIPModel, name, use_safetensors=True).to(self.device)
        self.tokenizer = _load(CLIPTokenizer, name)

    @torch.no_grad()
    def image(self, image: Image.Image) -> np.ndarray:
        """Features of a picture, (D,) float32."""
        side = self.model.config.vision_config.image_size
        pixels = prepared(image, side, side, CLIP_MEAN, CLIP_DEVIATION).to(self.device)
        return _pooled(self.model.get_image_features(pixel_values=pixels))[0].cpu().numpy()

    @torch.no_grad()
    def text(self, text: str) -> np.ndarray:
        """Features of a text, (D,) float32; one beyond the encoder's window is cut there, as in the published scores."""
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=window, return_tensors="pt").to(self.device)
        found = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _pooled(found)[0].cpu().numpy()


class Dino:
    """DINO (Caron et al. 2021): the class token of a picture, and the keys of its last layer."""

    def __init__(self, name: str | Path, device: str = "cpu") -> None:
        from transformers import ViTModel

        self.name, self.device = str(name), torch.device(device)
        self.model = _load(ViTModel, name, use_safetensors=True, add_pooling_layer=False).to(self.device)
        # "attention.key" in transformers 4, "k_proj" in 5.
        keys = [module for path, module in self.model.named_modules() if path.rsplit(".", 1)[-1] in ("key", "k_proj")]
        if not keys:
            raise ModelError(f"{self.name!r} has no attention layers known here; expected a ViT such as facebook/dino-vits16")
        self._last_keys = keys[-1]

    @property
    def side(self) -> int:
        """Pixels a side of the pictures that the network was trained on."""
        return self.model.config.image_size

    @torch.no_grad()
    def image(self, image: Image.Image) -> np.ndarray:
        """The class token of a picture, (D,) float32, as DreamBooth compares subjects (Ruiz et al. 2023)."""
        pixels = prepared(image, round(self.side * 256 / 224), self.side, IMAGENET_MEAN, IMAGENET_DEVIATION)
        return self.model(pixels.to(self.device)).last_hidden_state[0, 0].cpu().numpy()

    def keys(self, image: Image.Image) -> np.ndarray:
        """Keys of the last layer for the structure distance, (1 + patches, D) float32; the picture is squeezed to a square."""
        resized = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized, np.float32) / 255).permute(2, 0, 1)[None]
        return self._keys(pixels)

    def published_keys(self, image: Image.Image) -> np.ndarray:
        """The same as PIE-Bench's code prepares pictures: values up to 255 are normalised as if they were up to 1, and resized
        without smoothing. Its published structure distances are made of these. For square pictures, which PIE-Bench's are."""
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1)[None]
        size = (self.side, self.side)
        return self._keys(torch.nn.functional.interpolate(pixels, size, mode="bilinear", align_corners=False))

    @torch.no_grad()
    def _keys(self, pixels: Tensor) -> np.ndarray:
        mean, deviation = (torch.tensor(values)[None, :, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        taken: list[Tensor] = []
        handle = self._last_keys.register_forward_hook(lambda module, given, output: taken.append(output))
        try:
            self.model(((pixels - mean) / deviation).to(self.device))
        finally:
            handle.remove()
        return taken[0][0].cpu().numpy()


class Lpips:
    """LPIPS (Zhang et al. 2018), version 0.1: perceptual distance of two pictures, 0 (equal) to about 1, lower is closer.

    `name` is one of `NETS`, whose weights are those of the package and of torchvision's download; or a folder with all of them
    in one file, such as `squeeze.safetensors`, made by `safetensors.torch.save_model(lpips.LPIPS(net="squeeze"), PATH)`. Raises
    `ModelError` for other names, folders without such a file, and where one of the two packages is not installed.
    """

    def __init__(self, name: str = "squeeze", device: str = "cpu") -> None:
        files = {net: Path(name) / f"{net}.safetensors" for net in NETS}
        held = [net for net, file in files.items() if file.is_file()]
        if name not in NETS and len(held) != 1:
            wanted = f"one of {', '.join(NETS)}, a folder with one of {', '.join(f.name for f in files.values())}, or 'none'"
            raise ModelError(f"lpips={name!r};{did_you_mean(name, NETS)} expected {wanted}")
        try:
            from lpips import LPIPS
        except ModuleNotFoundError as error:
            raise ModelError(
                f"LPIPS needs the package {error.name!r}: install lpips, and the torchvision that belongs to your torch, or "
                "pass lpips='none' to leave its metrics out"
            ) from error
        self.name, self.device = name, torch.device(device)
        if name in NETS:
            try:
                model = LPIPS(net=name, spatial=True, verbose=False)
            except OSError as error:
                said = f"the weights of lpips={name!r} cannot be had ({error})"
                raise ModelError(f"{said}; expected a connection to torchvision's, a folder, or 'none'") from error
        else:
            model = LPIPS(net=held[0], pretrained=False, pnet_rand=True, spatial=True, verbose=False)
            try:
                load_model(model, files[held[0]])
            except (RuntimeError, SafetensorError) as error:
                said = f"{files[held[0]]} is not the weights of LPIPS ({str(error).splitlines()[0]})"
                raise ModelError(f"{said}; benchmarks.features.Lpips says how they are saved") from error
        self.model = model.to(self.device).eval()

    @torch.no_grad()
    def map(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distance at every pixel of two uint8 pictures (H, W, 3), (H, W) float32; its mean is near the published scalar."""
        pair = [torch.from_numpy(p).permute(2, 0, 1)[None].float().to(self.device) / 127.5 - 1 for p in (a, b)]
        return self.model(*pair)[0, 0].cpu().numpy()

    @torch.no_grad()
    def distance(self, a: np.ndarray, b: np.ndarray) -> float:
        """Distance of two uint8 pictures (H, W, 3): each layer's mean, summed, as published."""
        pair = [torch.from_numpy(p).permute(2, 0, 1)[None].float().to(self.device) / 127.5 - 1 for p in (a, b)]
        self.model.spatial = False
        try:
            return float(self.model(*pair))
        finally:
            self.model.spatial = True


class Networks:
    """The feature networks of a suite, each loaded when it is first needed; None for one that is left out ("none")."""

    def __init__(self, clip: str | None, dino: str | None, lpips: str | None, device: str) -> None:
        self.names = {"clip": clip, "dino": dino, "lpips": lpips}
        self.device = device

    def record(self) -> dict[str, str | None]:
        """Names, and of networks in local folders a short hash of their weights."""
        folders = {kind: Path(name) for kind, name in self.names.items() if name is not None and Path(name).is_dir()}
        return self.names | {f"{kind}_weights": weights_digest(folder) for kind, folder in folders.items()}

    def load(self) -> None:
        """Load all of them; `ModelError` for one that is not there."""
        _ = self.clip, self.dino, self.lpips

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Short hashes of the weights by network, the same wherever they came from; loads what is not loaded yet."""
        return {kind: _fingerprint(network) for kind in self.names if (network := getattr(self, kind)) is not None}

    def _made(self, kind: type, name: str | None) -> Any:
        return None if name in (None, "none") else kind(name, self.device)

    @cached_property
    def clip(self) -> Clip | None:
        """CLIP."""
        return self._made(Clip, self.names["clip"])

    @cached_property
    def dino(self) -> Dino | None:
        """DINO."""
        return self._made(Dino, self.names["dino"])

    @cached_property
    def lpips(self) -> Lpips | None:
        """LPIPS."""
        return self._made(Lpips, self.names["lpips"])


def _fingerprint(network: Clip | Dino | Lpips) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(network.model.state_dict().items()):
        digest.update(name.encode() + values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(source: Path) -> str:
    """Short hash of a file of weights, or of all the safetensors in a folder and the folders within."""
    digest = hashlib.sha256()
    for path in [source] if source.is_file() else sorted(source.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str | None]:
    """Versions of the packages that features depend on; None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in ("transformers", "torch", "torchmetrics", "lpips", "torchvision", "pillow", "scikit-image", "scipy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
