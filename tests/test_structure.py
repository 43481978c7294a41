"""Rules of the whole tree: imports go one way, the public surface is what it says."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import p2p_subject
from p2p_subject import errors

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "inversion": {"p2p_subject", "benchmarks", "tests", "diffusers", "transformers"},
    "p2p_subject": {"benchmarks", "tests"},
}
EDGES = {"cli", "demo"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        wrong = {name for name in imported(path) if name.split(".")[0] in FORBIDDEN[package]}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_nothing_but_the_edges_imports_the_edges() -> None:
    for path in (ROOT / "p2p_subject").rglob("*.py"):
        if path.stem in EDGES or path.stem == "__main__":
            continue
        wrong = imported(path) & {f"p2p_subject.{edge}" for edge in EDGES}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_exported_names_exist_and_an_unknown_one_is_an_attribute_error() -> None:
    for name in p2p_subject.__all__:
        assert getattr(p2p_subject, name).__name__ == name
    with pytest.raises(AttributeError, match="Editr"):
        p2p_subject.Editr  # noqa: B018


def test_importing_the_library_is_light() -> None:
    code = "import sys, p2p_subject; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_error_has_the_one_base() -> None:
    for name in errors.__all__:
        value = getattr(errors, name)
        if isinstance(value, type):
            assert issubclass(value, errors.P2PSubjectError), name


def test_no_pickle_and_no_remote_code_anywhere() -> None:
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            for word in ("import pickle", "torch.load(", "trust_remote_code=True", "eval(", "exec("):
                found = [line for line in text.splitlines() if word in line and f".{word}" not in line]
                assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_the_oldest_set_is_the_lower_bounds() -> None:
    def releases(separator: str, text: str) -> set[tuple[str, str]]:
        found = re.findall(rf"^([\w-]+){separator}([\d.]+)", text, re.MULTILINE)
        # 1.2 and 1.2.0 are one release.
        return {(name, re.sub(r"(\.0)+$", "", release)) for name, release in found}

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    stated = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    bounds = {(name, release) for name, release in releases(">=", stated) if name != "torch"}
    assert len(bounds) > 5 and bounds <= releases("==", (ROOT / "tests" / "oldest.txt").read_text())
