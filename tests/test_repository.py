"""Workflows, environments, contributor commands and versions agree with each other."""

import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github/workflows").glob("*.yml")}
RUN = re.compile(r"tox -e (\w+)")


def tox():
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def environments():
    return {section.removeprefix("testenv:") for section in tox().sections() if section.startswith("testenv:")}


def test_every_environment_that_a_workflow_runs_exists():
    assert {name for text in WORKFLOWS.values() for name in RUN.findall(text)} <= environments()


@pytest.mark.parametrize("name", ["lint", "types", "tests", "docs", "lowest"])
def test_ci_has_a_job_of_the_same_name_for_every_check(name):
    (job,) = re.findall(rf"^  {name}:\n((?:    .*\n|\n)+)", WORKFLOWS["ci.yml"], re.MULTILINE)
    assert RUN.findall(job) == [name]


def test_contributing_names_every_environment():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(RUN.findall(text)) == environments()


def test_the_tested_pythons_are_those_that_the_package_declares():
    (matrix,) = re.findall(r"python-version: \[(.*)\]", WORKFLOWS["ci.yml"])
    prefix = "Programming Language :: Python :: "
    declared = [name.removeprefix(prefix) for name in PROJECT["classifiers"] if name.startswith(prefix)]
    assert [f'"{version}"' for version in declared if version[-1].isdigit()] == matrix.split(", ")


@pytest.mark.parametrize(("environment", "extra"), [("lint", "lint"), ("site", "docs")], ids=lambda value: value)
def test_environments_without_the_package_install_the_ranges_of_the_extra(environment, extra):
    deps = tox()[f"testenv:{environment}"]["deps"].strip().splitlines()
    assert deps == PROJECT["optional-dependencies"][extra]


def test_pre_commit_takes_the_range_of_the_extra():
    (ruff,) = PROJECT["optional-dependencies"]["lint"]
    ranges = re.findall(r"additional_dependencies: \[\"(.*)\"\]", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert ranges == [ruff, ruff]


def test_citation_and_changelog_have_the_version_of_the_package():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    newest = f"{headings[0][1]} {headings[0][0]}"
    assert version.removesuffix(".dev0") in newest


def test_a_tag_of_another_version_is_no_release():
    answer = subprocess.run(
        [sys.executable, ROOT / "tools/release_notes.py", "v99.0.0"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert f"Expected the tag v{PROJECT['version']}" in answer.stderr
