"""What a package index gets: complete sources, and a wheel of the package alone."""

from __future__ import annotations

import email
import re
import tomllib
import zipfile
from pathlib import Path

from tests.helpers.distributions import FOLDERS, ROOT


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "ckptvcs").rglob("*.py")}
    others = {name for name in names - code if ".dist-info/" not in name}
    assert {name.partition(".data/")[2] or name for name in others} == {
        "ckptvcs/py.typed",
        "data/share/man/man1/ckpt.1",
    }
    assert code <= names


def test_the_sources_are_complete(sources: Path, sdist: Path) -> None:
    def files(top: Path) -> set[Path]:
        return {
            path.relative_to(top)
            for name in FOLDERS
            for path in (top / name).rglob("*")
            if path.is_file()
        }

    assert files(sources) == files(sdist)
    names = {path.name for path in sources.iterdir() if path.is_file()}
    assert names >= {"LICENSE", "README.md", "mkdocs.yml", "pyproject.toml"}
    for name in names:
        assert (sdist / name).read_bytes() == (sources / name).read_bytes()
    assert (sdist / "scripts" / "test").stat().st_mode & 0o111


def test_the_metadata_says_what_an_index_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(archive.read(name))
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found["Keywords"]
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    urls = [url.partition(", ") for url in found.get_all("Project-URL", [])]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= {label for label, _, _ in urls}
    required = [name for name in found.get_all("Requires-Dist", []) if "extra ==" not in name]
    assert not [name for name in required if re.match("torch|numba|safetensors", name)]


def test_the_extras_of_trainers_include_torch() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for trainer in ("accelerate", "lightning", "transformers", "dev"):
        assert any(re.match(r"ckptvcs\[(.*,)?torch(,.*)?\]", name) for name in extras[trainer])
