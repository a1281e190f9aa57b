"""Where the points of a search and its runs meet: Optuna's study in the sweep's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


def study(
    folder: Path,
    sampler: BaseSampler | None = None,
    direction: str | None = None,
    pruner: BasePruner | None = None,
) -> Study:
    """The study in `folder`, made if there is none; a file that many processes and nodes may append to.

    A trial's `name` (user attribute) is its run's folder below `folder`.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="search",
        load_if_exists=True,
        sampler=sampler,
        direction=direction,
        pruner=pruner,
    )
