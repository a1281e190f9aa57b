"""Every switch that the pages name is one that the verbs take."""

import re

import pytest
from hydra import compose, initialize_config_dir

from motionrag.cli import conf_dir

FULL = {"CogVideoX": "cogvideox", "SVD": "svd", "DynamiCrafter": "dynamicrafter"}
NEEDED = {"train": [], "generate": ["image=x", "prompt=y"], "evaluate": []}
TRAINING = ("module.", "data.", "clips.", "motion_adapter=", "stage=", "trainer.", "optimizer=")


def switches(text):
    """`key=value` (several in one span too) in a part of a page; those that leave a NAME open are no switches."""
    spans = re.findall(r"`([a-z_0-9.]+=[^`]+)`", text)
    return [word for span in spans for word in span.split() if not re.search("=.*[A-Z]{2}", word)]


def take(verb, backbone, words):
    """Raises unless the verb's config has each key and takes the value."""
    words = [word for word in words if verb == "train" or not word.startswith(TRAINING)]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        compose(verb, overrides=[f"backbone={backbone}", *NEEDED[verb], *words])


@pytest.mark.parametrize("verb", NEEDED)
def test_switches_of_the_reference_page(root, verb):
    parts = re.split(r"^## (.*)$", (root / "docs/reference.md").read_text(), flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sections.keys() == {"All backbones", *FULL}
    for title, text in sections.items():
        words = switches("\n".join(re.findall(r"^\|.*\|.*\|(.*)\|$", text, flags=re.M)))
        assert words, title
        take(verb, FULL.get(title, "cogvideox"), words)


@pytest.mark.parametrize("verb", NEEDED)
def test_switches_of_precision_and_memory(root, verb):
    table = (root / "docs/backbones.md").read_text().split("Memory and precision")[1].split("## ")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) == 8
    for name, backbone in FULL.items():
        words = []
        for row in rows:  # in brackets: backbones or verbs that have it, if not all
            only = re.findall(r"\((.*)\)", row)
            if not only or name in only[0] or verb in only[0]:
                words += switches(row.replace("=N`", "=4`"))
        take(verb, backbone, words)
