"""Methods by the names that a command line gives: with changed settings in brackets, or a user's module:function."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.methods import METHODS, PIE_BENCH, SOURCES, BlipDiffusion, Generation, Method, MethodFunction, Paste
from benchmarks.suite import Case
from p2p_subject import checks, inverting
from p2p_subject.blip_diffusion.presets import PAPER
from p2p_subject.edits import Blend, EditSpec
from p2p_subject.errors import ArgumentError, P2PSubjectError, did_you_mean

FLAGS = [f.name for f in fields(Method) if isinstance(f.default, bool)]
CASES_OWN = {"prompt", "swap", "subject"}
"""Fields of `EditSpec` that a case fills."""


def names_of(text: str) -> list[str]:
    """Split "ours,ours[steps=20,guidance_scale=4],package.module:function" at the commas outside brackets."""
    return [name.strip() for name in _split(text) if name.strip()]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    depth, parts = 0, [""]
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def method_of(name: str, *, steps: int | None = None, guidance_scale: float | None = None) -> MethodFunction:
    """Look a method up: a name of `METHODS`, one with changed settings in brackets, or "module:function".

    In brackets stand fields of `Method`, `EditSpec` or `Blend` with JSON values: "ours[cross_replace=0.4,threshold=0.5]".
    `steps` and `guidance_scale`, where given, hold for all but users' functions, `paste` and `blip-diffusion`, whose are its
    own. Raises `ArgumentError`.
    """
    base, _, changes = name.partition("[")
    if ":" in base:
        return _imported(name)
    if base not in METHODS:
        expected = f"one of {', '.join(METHODS)}, or module:function"
        raise ArgumentError(f"method {base!r};{did_you_mean(base, METHODS)} expected {expected}")
    method = METHODS[base]
    if isinstance(method, Paste | BlipDiffusion):
        if changes:
            raise ArgumentError(f"method {name!r}: {base!r} has no settings")
        return method
    if steps is not None:
        method = replace(method, steps=steps)
    if guidance_scale is not None:
        method = replace(method, guidance_scale=guidance_scale)
    for key, value in _settings(name, changes).items():
        method = _changed(method, key, value, name)
    if getattr(method, "inversion", None) == "null_text" and method.guidance_scale is not None:
        # It optimises for the scale that it edits with, whatever named that.
        method = replace(method, options={**method.options, "guidance_scale": method.guidance_scale})
    _require_settings(method, name)
    return method


def _require_settings(method: Method | Generation, name: str) -> None:
    """Refuse values that every case would fail with."""
    steps, scale = method.steps, method.guidance_scale
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"method {name!r}: steps={steps!r}; expected a whole number of 1 or more")
    if scale is not None and not checks.is_number(scale, 0):
        raise ArgumentError(f"method {name!r}: guidance_scale={scale!r}; expected a number of 0 or more, or null")
    if isinstance(method, Method):
        for flag in FLAGS:
            if not isinstance(value := getattr(method, flag), bool):
                raise ArgumentError(f"method {name!r}: {flag}={value!r}; expected true or false")
        if method.source not in SOURCES:
            raise ArgumentError(f"method {name!r}: source={method.source!r}; expected one of {', '.join(SOURCES)}")
        share = method.self_share
        if share is not None and not (checks.is_number(share, 0, 1) and share > 0):
            raise ArgumentError(f"method {name!r}: self_share={share!r}; expected a share above 0 up to 1, or null")
        if not checks.is_number(method.skip, 0, 1) or method.skip == 1:
            raise ArgumentError(f"method {name!r}: skip={method.skip!r}; expected a fraction from 0 to below 1")
        try:
            inverting.check(method.inversion, dict(method.options))
            _edits(method)
        except (P2PSubjectError, TypeError) as error:
            raise ArgumentError(f"method {name!r}: {error}") from error


def _settings(name: str, text: str) -> dict[str, Any]:
    if not text:
        return {}
    pairs = [part.split("=", 1) for part in _split(text.removesuffix("]"))]
    if not text.endswith("]") or any(len(pair) != 2 for pair in pairs):
        raise ArgumentError(f"method {name!r}; expected settings such as ours[steps=20,threshold=0.5]")
    return {key.strip(): _json(value.strip()) for key, value in pairs}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _changed(method: Method | Generation, key: str, value: Any, name: str) -> Method | Generation:
    own, of_edit, of_blend = _settable(method)
    if key not in own | of_edit | of_blend:
        known = sorted(own | of_edit | of_blend)
        expected = f"expected one of {', '.join(known)}"
        raise ArgumentError(f"method {name!r}: no setting {key!r};{did_you_mean(key, known)} {expected}")
    if key in own:
        return replace(method, **{key: value})
    if key in of_blend:
        return replace(method, blend={**method.blend, key: value})
    if key == "self_resolution":
        method = replace(method, self_share=None)
    narrower = {part: {**getattr(method, part), key: value} for part in ("by_words", "pie") if getattr(method, part)}
    return replace(method, edit={**method.edit, key: value}, **narrower)


def _settable(method: Method | Generation) -> tuple[set[str], set[str], set[str]]:
    """Names of the settings of a method, of its edits, and of how they are blended, that brackets may change."""
    own = {f.name for f in fields(method)} - {"edit", "by_words", "blend", "pie", "options", "paper", "mask_input"}
    if isinstance(method, Generation):
        return own, set(), set()
    of_blend = {f.name for f in fields(Blend)} - {"mask"}
    if method.mask_input:
        # The rest says how words make a mask.
        of_blend = {"start", "feather"}
    # What is erased follows from the case: a removal.
    of_edit = {f.name for f in fields(EditSpec)} - CASES_OWN - {"blend", "erase"}
    return own, of_edit, of_blend if method.blend is not None else set()


def _imported(name: str) -> MethodFunction:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"method {name!r} cannot be imported ({error}); expected module:function") from error
    if not callable(found):
        raise ArgumentError(f"method {name!r} is a {type(found).__name__}; expected a function of (editor, case)")
    return found


def applies(method: MethodFunction, case: Case) -> bool:
    """Whether a method is asked for a case; a user's function is for every one, unless it has an `applies` of its own."""
    return own(case) if (own := _attribute(method, "applies")) is not None else True


def chooses(method: MethodFunction) -> bool:
    """Whether a method is a user's that says of each case whether it is for it."""
    return not isinstance(method, Method | Generation | Paste | BlipDiffusion) and _attribute(method, "applies") is not None


def takes_mask(method: MethodFunction) -> bool:
    """Whether a method is given the true mask."""
    return bool(_attribute(method, "mask_input"))


def _attribute(method: MethodFunction, name: str) -> Any:
    """An attribute of a method, or of the function that a `functools.partial` of one calls; None where neither has it."""
    while isinstance(method, partial) and not hasattr(method, name):
        method = method.func
    return getattr(method, name, None)


def described(method: MethodFunction) -> dict[str, Any]:
    """The settings of a method as JSON-able values; of a user's function, its name and a digest of the file it is in.

    With the edits that it makes, by words and with a subject, in full: what a method leaves to the library's defaults is a
    setting too, and rows of other defaults do not belong into one folder.
    """
    if isinstance(method, Method):
        return json.loads(json.dumps(asdict(method) | {"edits": _edits(method)}, default=list))
    if isinstance(method, BlipDiffusion):
        return asdict(method) | {"call": PAPER}
    if isinstance(method, Generation | Paste):
        return json.loads(json.dumps(asdict(method), default=list))
    return _defined(method) | {"mask_input": takes_mask(method)}


def _defined(method: MethodFunction) -> dict[str, Any]:
    """Name of a user's function and digest of the file that it is in, beneath decorators; of an object, those of its class; of
    a `functools.partial`, those of its function, and the arguments: numbers, texts, paths and what holds them, of others the
    type alone. Raises `ArgumentError` for arguments that are not named so."""
    # Their `__call__` is in files of others: torch.no_grad's wrapper in torch, whose digest says nothing of the method.
    method = inspect.unwrap(method)
    if isinstance(method, partial):
        try:
            given = json.loads(json.dumps([method.args, method.keywords], default=_argument))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"{method!r}: {error}; a partial method's arguments are kept as JSON, name them so") from error
        return _defined(method.func) | {"arguments": given}
    owner = method if hasattr(method, "__qualname__") else type(method)
    try:
        digest = hashlib.sha256(Path(inspect.getfile(owner)).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):  # built in, or made without a file
        digest = None
    return {"function": owner.__qualname__, "digest": digest}


def _argument(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, PurePath) else type(value).__qualname__


def _edits(method: Method) -> dict[str, dict[str, Any]]:
    """Every field of the edits that a method makes of a stand-in for a case, but for what is the case's own."""
    picture, mask = Image.new("RGB", (8, 8)), np.ones((8, 8), bool)
    words = {"source": picture, "source_words": ("cat",), "target_words": ("dog",), "mask": mask}
    case = Case("", "", "", 0, "a cat", "a dog", **words)
    asked = {"subject": replace(case, references=(picture,), category="dog")}
    if not method.subjects:
        asked |= {"words": case}
        asked["addition"] = replace(case, adds=True, source_words=())
        asked["removal"] = replace(case, removes=True, target_words=())
        asked |= {"pie": replace(case, suite=PIE_BENCH)} if method.pie else {}
    found = {}
    for kind, one in asked.items():
        spec = method.spec(one, takes_subjects=True)
        found[kind] = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in CASES_OWN}
        if spec.blend is not None:
            blend = {f.name: getattr(spec.blend, f.name) for f in fields(spec.blend) if f.name != "mask"}
            found[kind]["blend"] = blend | {"grow": spec.grow}
        found[kind]["weights"] = sorted(spec.weights.items())
    return found
