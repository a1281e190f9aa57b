"""The clip table of a database: what is known about each clip, as an Arrow file that is mapped, not read.

Columns: ``#number`` (int64, the clip's number, rising), ``#record`` (all of it as JSON), and every field of the
record and of its metadata as text, to filter by.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from motionrag.errors import MotionRAGError

NUMBER, RECORD = "#number", "#record"
BATCH = 50_000  # clips written at a time


def table(clips: Iterable[tuple[int, dict[str, Any]]]) -> pa.Table:
    """Numbers and records of clips as a table in memory."""
    clips = list(clips)
    return pa.Table.from_batches([_batch(clips, schema(clip for _, clip in clips))])


def write(path: Path, clips: Iterable[tuple[int, dict[str, Any]]], columns: pa.Schema) -> None:
    """Write numbers and records of clips; columns: :func:`schema` of them."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, columns) as writer:
        pending = []
        for clip in clips:
            pending.append(clip)
            if len(pending) == BATCH:
                writer.write_batch(_batch(pending, columns))
                pending = []
        if pending:
            writer.write_batch(_batch(pending, columns))


def read(file: str | Path, name: Path | None = None) -> pa.Table:
    """Map a table. Raises :class:`MotionRAGError` (with ``name``, if given) if it is missing or damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowException) as error:
        path = name or Path(file)
        raise MotionRAGError(
            f"{path}: missing or damaged; run motionrag index db={path.parent} (motionrag index verify says more)"
        ) from error


def schema(clips: Iterable[dict[str, Any]]) -> pa.Schema:
    """Columns of a table of these records."""
    names: dict[str, None] = {"id": None, "source": None}
    for clip in clips:
        names.update(dict.fromkeys(_flat(clip)))
    texts = [(name, pa.string()) for name in names]
    return pa.schema([(NUMBER, pa.int64()), (RECORD, pa.string()), *texts])


def record(clips: pa.Table, row: int) -> dict[str, Any]:
    """All that is known about one clip. Raises :class:`MotionRAGError` if that is damaged."""
    try:
        return json.loads(clips[RECORD][row].as_py())
    except ValueError as error:
        raise MotionRAGError(
            f"the clip table is damaged at its row {row} ({error}); copy it again (motionrag index verify db=DB says more)"
        ) from error


def columns(clips: pa.Table) -> list[str]:
    """Names one can filter by."""
    return [name for name in clips.column_names if name not in (NUMBER, RECORD)]


def select(clips: pa.Table, where: str | Sequence[str]) -> np.ndarray:
    """Which clips (n,) bool meet all conditions, each ``column=value`` or ``column!=value``.

    A clip meets ``column=value`` if its value reads so, is that number, or is a list that holds it. Raises
    :class:`MotionRAGError` for a condition of another form or an unknown column.
    """
    chosen = np.ones(len(clips), bool)
    for condition in [where] if isinstance(where, str) else where:
        name, equals, value = str(condition).partition("=")
        unlike = name.endswith("!")
        name = name.removesuffix("!").strip()
        if not equals:
            raise MotionRAGError(f"where={condition}: expected column=value or column!=value")
        if name not in columns(clips):
            raise MotionRAGError(
                f"where={condition}: no column '{name}'; the clips have {', '.join(sorted(columns(clips)))}"
            )
        column = clips[name]
        among = pc.and_(pc.starts_with(column, "["), pc.match_substring(column, _text([value])[1:-1]))
        met = pc.or_(pc.is_in(column, pa.array([value, _number(value)])), among)
        chosen &= pc.fill_null(met, False).to_numpy() ^ unlike
    return chosen


def _batch(clips: list[tuple[int, dict[str, Any]]], columns: pa.Schema) -> pa.RecordBatch:
    flat = [_flat(clip) for _, clip in clips]
    arrays: Iterator[pa.Array] = (
        pa.array([number for number, _ in clips], pa.int64())
        if name == NUMBER
        else pa.array([_text(clip) for _, clip in clips], pa.string())
        if name == RECORD
        else pa.array([row.get(name) for row in flat], pa.string())
        for name in columns.names
    )
    return pa.RecordBatch.from_arrays(list(arrays), schema=columns)


def _flat(clip: dict[str, Any]) -> dict[str, str | None]:
    """Fields and metadata side by side, as text."""
    values = {**clip.get("metadata", {}), **{key: value for key, value in clip.items() if key != "metadata"}}
    return {key: None if value is None else _value(value) for key, value in values.items()}


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return _text(value)


def _number(text: str) -> str:
    """A number as :func:`_value` writes it, any other text as it is."""
    try:
        return _value(float(text))
    except (ValueError, OverflowError):
        return text


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
