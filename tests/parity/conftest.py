"""Numbers computed with the reference code, read from a folder outside the repository."""

import json
import os
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("MOTIONRAG_PARITY_DIR", ROOT / ".." / "shared" / "parity"))


class Case:
    """One parity case: constructor arguments, inputs, weights, and outputs with their tolerances."""

    def __init__(self, entry: dict, report: list[tuple[str, object]] | None = None) -> None:
        self.entry, self.report = entry, [] if report is None else report
        self.name = entry["case"]
        self.constructor = entry["constructor"]
        self.checked: set[str] = set()

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the case; shards are merged."""
        return {k: v for f in self.entry["files"] for k, v in load_file(FOLDER / f).items()}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def weights(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """State dict below `w.<prefix>`, of this case or of the one that it names."""
        if source := self.entry.get("weights", {}).get("from_case"):
            return Case(manifest_cases()[source]).weights(prefix)
        start = f"w.{prefix}"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    def check(self, **outputs: torch.Tensor) -> None:
        """Compare `out.<name>` tensors; reports the error as a share of the tolerance."""
        tolerance = self.entry["tolerance"]
        for name, actual in outputs.items():
            key = f"out.{name}"
            expected = self.tensors[key]
            assert actual.shape == expected.shape, f"{self.name} {key}: {actual.shape} != {expected.shape}"
            self.checked.add(key)
            if not expected.is_floating_point():
                assert torch.equal(actual, expected), f"{self.name} {key} differs"
                share = 0.0
            else:
                error = (actual.double() - expected.double()).abs()
                allowed = tolerance["atol"][key] + tolerance["rtol"] * expected.double().abs()
                share = (error / allowed).max().item()
            self.report.append(("parity", [self.name, share, key]))
            assert share <= 1, f"{self.name} {key}: error is {share:.2f} x tolerance"


def manifest_cases() -> dict[str, dict]:
    """Case name -> manifest entry; empty when the folder is absent."""
    path = FOLDER / "manifest.json"
    return {entry["case"]: entry for entry in json.loads(path.read_text())["cases"]} if path.exists() else {}


@pytest.fixture(scope="session")
def cases() -> dict[str, dict]:
    """Case name -> manifest entry."""
    if not (found := manifest_cases()):
        pytest.skip(f"no parity folder at {FOLDER}: set MOTIONRAG_PARITY_DIR")
    return found


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: dict[str, dict]) -> Case:
    """The case named like the test (or by its parameter); all of its outputs must be checked."""
    name = getattr(request, "param", request.node.originalname.removeprefix("test_"))
    assert name in cases, f"{FOLDER / 'manifest.json'} has no case {name}"
    case = Case(cases[name], request.node.user_properties)
    yield case
    left = {k for k in case.tensors if k.startswith("out.")} - case.checked
    assert request.node.stash.get(FAILED, False) or not left, (
        f"{name}: outputs never compared: {sorted(left)}"
    )


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" and not report.passed:
        item.stash[FAILED] = True
    return report
