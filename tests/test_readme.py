"""The README's commands exist and mean something: targets, verbs, keys, files."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from motionrag import cli
from motionrag.cli.words import overrides_from_words

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Words of every command line in the README's bash blocks, continued lines joined, comments gone."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_two_commands_are_there():
    assert ["make", "demo"] in commands() and ["make", "test"] in commands()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words):
    program, *rest = words
    if program == "make":
        subprocess.run(["make", "--dry-run", *rest], cwd=ROOT, check=True, capture_output=True)
        return
    assert program == "motionrag", f"README tells to run {program}: teach this test what that is"
    verb, *typed = rest
    overrides = [word for word in overrides_from_words(verb, typed) if not word.startswith("-")]
    if "-m" in typed:  # a sweep: its first point
        overrides = [re.sub(r",[^\[\]]*$", "", word) for word in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose(verb, overrides=overrides)
    assert not cli.missing_keys(cfg), "the command leaves required keys unset"


def test_every_verb_is_in_the_table():
    table = re.findall(r"^\| `(\w+)` \|", README, flags=re.M)
    assert table == list(cli.VERBS)


def test_named_paths_exist():
    for path in re.findall(r"`((?!\S*NAME)(?:src|tests|conf|experiments|data)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for file in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / file).is_file(), file


def test_make_prints_its_targets():
    text = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for target in ("demo", "test", "lint", "weights", "venv"):
        assert f"make {target} " in text
