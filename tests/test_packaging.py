"""What is built and installed is complete, and says so where it is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vtprune_fx

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("vtprune_fx", "passes", "export")
BUILD_FILES = ("pyproject.toml", "README.md", "LICENSE")
NOT_PACKED = (".gitignore",)

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="compares with what git lists, so it needs a git checkout",
)


def listed(patterns: Sequence[str]) -> list[str]:
    """Files that git tracks, or would if they were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(
        [*command, *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = done.stdout.split("\0")
    links = ("vtprune_fx/passes", "vtprune_fx/export")
    return [name for name in names if name not in links and (ROOT / name).is_file()]


def installed_name(name: str) -> str:
    """Where a file of the repository belongs in the wheel."""
    return name if name.startswith("vtprune_fx/") else f"vtprune_fx/{name}"


def copied(names: Iterable[str], target: Path) -> Path:
    """A copy of files of the checkout, so that no build folder is left in it."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copied([*listed(PATTERNS), *BUILD_FILES], source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)], check=True
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_what_git_lists(wheel: zipfile.ZipFile) -> None:
    expected = {installed_name(name) for name in listed(PATTERNS)}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_wheel_names_its_entry_points(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    info = f"vtprune_fx-{version}.dist-info"
    text = wheel.read(f"{info}/entry_points.txt").decode()
    assert "vtprune = vtprune_fx.cli:main" in text
    assert (
        "[torch_dynamo_backends]\nvtprune = vtprune_fx.backend:vtprune_backend" in text
    )
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_sdist_holds_what_tests_need(tmp_path: Path) -> None:
    tracked = [name for name in listed(["."]) if name not in NOT_PACKED]
    source = copied(tracked, tmp_path / "source")
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    command = [*build, "-o", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert set(tracked) <= names


@pytest.mark.parametrize("lost", ["missing", "a file"])
def test_a_checkout_without_links_says_what_to_do(tmp_path: Path, lost: str) -> None:
    copied(listed(["vtprune_fx"]), tmp_path)
    if lost == "a file":  # what git writes where it may not write links
        (tmp_path / "vtprune_fx" / "passes").write_text("../passes")
    # No installed package stands in for what is lost.
    script = (
        "import sys\n"
        "finders = [f for f in sys.meta_path if '_Editable' not in str(f)]\n"
        "sys.meta_path[:] = finders\n"
        "import vtprune_fx"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "expected `passes` in it, a link to `../passes`" in done.stderr
    assert "git config core.symlinks true" in done.stderr
    assert "pip install -e ." in done.stderr


def test_the_version_stands_once() -> None:
    fields = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert vtprune_fx.__version__ == fields["project"]["version"]
    for name in listed(PATTERNS):
        if name.endswith(".py"):
            assert f'"{vtprune_fx.__version__}"' not in (ROOT / name).read_text()
