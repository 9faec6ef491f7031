"""The wheel holds every file of the package, under the right name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("vtprune_fx", "passes", "export")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="compares with what git lists, so it needs a git checkout",
)


def listed() -> list[str]:
    """Files that git tracks, or would if they were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(
        [*command, *PATTERNS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = done.stdout.split("\0")
    links = ("vtprune_fx/passes", "vtprune_fx/export")
    return [name for name in names if name not in links and (ROOT / name).is_file()]


def installed_name(name: str) -> str:
    """Where a file of the repository belongs in the wheel."""
    return name if name.startswith("vtprune_fx/") else f"vtprune_fx/{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that no build folder is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in [*listed(), *BUILD_FILES]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)], check=True
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_what_git_lists(wheel: zipfile.ZipFile) -> None:
    expected = {installed_name(name) for name in listed()}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_names_its_entry_points(wheel: zipfile.ZipFile) -> None:
    info = "vtprune_fx-0.1.0.dist-info"
    text = wheel.read(f"{info}/entry_points.txt").decode()
    assert "vtprune = vtprune_fx.cli:main" in text
    assert (
        "[torch_dynamo_backends]\nvtprune = vtprune_fx.backend:vtprune_backend" in text
    )
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
