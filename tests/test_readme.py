"""The README does what it says: its Python runs, its links lead somewhere, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    written = {
        "edited.png",
        "mask.png",
        "heatmap.png",
        "tuned_dog",
        "styled.png",
        *(f"edit_{number}.png" for number in range(7)),
    }
    assert {path.name for path in tmp_path.iterdir()} == written
    assert "dog" in capsys.readouterr().out


def test_links_and_pictures_of_the_readme_exist() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert targets and all((ROOT / target).exists() for target in targets)


def test_make_targets_and_modules_of_the_readme_exist() -> None:
    commands = "\n".join(blocks("sh"))
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make (\w+)", commands, re.MULTILINE))
    for module in re.findall(r"python -m ([\w.]+)", TEXT):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
