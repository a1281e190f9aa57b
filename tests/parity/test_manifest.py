"""The parity suite covers the manifest."""

from pathlib import Path


def test_every_case_has_a_test(cases):
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    without = [name for name in cases if f'"{name}"' not in sources and f"def test_{name}(" not in sources]
    assert not without
