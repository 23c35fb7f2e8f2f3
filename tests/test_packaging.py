"""The wheel holds every package, the plans, the templates and the schema; constraints pin what the
project needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "benchsuite").rglob("*.py")
    }
    beside = {"benchsuite.plans", "benchsuite.workloads", "benchsuite.results.schema"}
    assert found | beside == set(PROJECT["tool"]["setuptools"]["packages"])


def test_constraints_pin_every_requirement_to_one_public_version() -> None:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    pins = {}
    for line in lines:
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line).groups()  # type: ignore[union-attr]
        pins[normal(name)] = version
    assert pins["torch"] == "2.13.0" and "benchsuite" not in pins
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(each for extra in extras.values() for each in extra),
    ]
    names = {normal(re.split(r"[\[><=!~]", requirement)[0]) for requirement in wanted}
    assert names - {"benchsuite"} <= pins.keys()


def test_no_machine_or_registry_is_named_in_the_set_up() -> None:
    """The one address is that of torch's CPU builds, a variable of the Makefile."""
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        ".ci/run",
        ".github/workflows/ci.yml",
        "asv.conf.json",
    ):
        text = (ROOT / name).read_text().replace("https://download.pytorch.org/whl/cpu", "")
        assert "https://download" not in text, name
        assert not re.search(r"index-url|find-links|file://|/opt/|/home/", text), name


@pytest.mark.slow
def test_the_wheel_holds_plans_templates_and_schema(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git clone")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    plans = {f"benchsuite/plans/{path.name}" for path in (ROOT / "reports").glob("*.toml")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "benchsuite").rglob("*.py")}
    code |= {f"benchsuite/workloads/{path.name}" for path in (ROOT / "workloads").glob("*.py")}
    templates = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "benchsuite" / "report" / "templates").iterdir()
        if path.is_file()
    }
    assert (
        plans
        and plans
        | code
        | templates
        | {"benchsuite/results/schema/run.schema.json", "benchsuite/py.typed"}
        <= names
    )
    strays = {name for name in names if not name.startswith(("benchsuite/", "benchsuite-"))}
    assert not strays, strays


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
