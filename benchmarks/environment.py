"""What figures are of: versions of the packages, the machine, the model."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from p2p_subject.models import Model


def machine() -> dict[str, object]:
    """Versions and machine, for the record."""
    packages = ("torch", "diffusers", "transformers", "numpy")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def environment(model: str | None) -> dict[str, object]:
    """Versions, machine, fingerprint and guidance scale of the model, for the record."""
    loaded = Model.load(model)
    return machine() | {"fingerprint": loaded.fingerprint, "guidance_scale": loaded.guidance_scale}
