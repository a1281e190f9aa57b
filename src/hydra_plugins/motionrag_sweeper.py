"""Hydra's basic sweeper, with a table: named run folders, finished points kept, no empty sweep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from motionrag.cli import gpus
from motionrag.errors import MotionRAGError


@dataclass
class PointSweeperConf:
    _target_: str = "hydra_plugins.motionrag_sweeper.PointSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="points", node=PointSweeperConf, provider="motionrag"
)


class PointSweeper(BasicSweeper):
    """Runs the points of a grid that are not finished yet, each in a folder named by what was varied.

    Raises MotionRAGError for a sweep without points, and at the end when points failed.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir).resolve())
        self.folder = Path(config.hydra.sweep.dir)
        self.todo: set[str] = set()
        launcher, trainer = config.hydra.launcher, config.get("trainer")
        if "tasks_per_node" in launcher and trainer is not None:  # Slurm, by submitit
            if not str(trainer.devices).isdecimal():
                raise MotionRAGError(
                    f"launcher=slurm needs a number of devices, got trainer.devices={trainer.devices}"
                )
            if launcher.gpus_per_node is None and trainer.accelerator in ("gpu", "cuda"):
                launcher.gpus_per_node = trainer.devices
        if "n_jobs" in launcher:  # joblib
            launcher.n_jobs = gpus.points_at_once(launcher.n_jobs, config)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Batches of points that are still to run."""
        varied = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
        (points,) = BasicSweeper.split_arguments(overrides, None)
        if not points:
            empty = [o.input_line or key for key, o in varied.items() if not list(o.sweep_string_iterator())]
            raise MotionRAGError(
                f"the sweep has no points, {', '.join(empty)} matches nothing: check the pattern and, for "
                "configs outside conf/, hydra.searchpath"
            )
        self.check(points)
        batch = self.plan(points, varied)
        size = max_batch_size or max(1, len(batch))
        return [batch[i : i + size] for i in range(0, len(batch), size)]

    def check(self, points: list[list[str]]) -> None:
        """Compose every point, before anything is written: a mistake in any of them leaves nothing behind."""
        super().validate_batch_is_legal(points)

    def validate_batch_is_legal(self, batch: list[list[str]]) -> None:
        """Nothing: what Hydra would compose here was checked before it was planned."""

    def plan(self, points: list[list[str]], varied: list[str]) -> list[list[str]]:
        """Enter points into the table; the overrides of those that are still to run, with their folders."""
        from motionrag import sweeps

        launch = [
            *self.config.hydra.overrides.task,
            *(
                o
                for o in self.config.hydra.overrides.hydra
                if not o.startswith(("hydra.sweep.dir=", "hydra.mode="))
            ),
        ]
        todo = sweeps.plan(self.folder, self.config.hydra.job.config_name, launch, points, list(varied))
        if len(todo) < len(points):
            print(f"{len(points) - len(todo)} of {len(points)} points are finished or being worked on")
        todo = list({point["name"]: point for point in todo}.values())
        self.todo |= {point["name"] for point in todo}
        return [[*point["overrides"], f"hydra.sweep.subdir='{point['name']}'"] for point in todo]

    def run(self, arguments: list[str]) -> Any:
        """Run the points."""
        return super().sweep(arguments)

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is to run and leave the table in the sweep's folder."""
        from motionrag import sweeps

        try:
            done = self.run(arguments)
            if (self.folder / "sweep.json").is_file():  # W&B's sweeps have none
                sweeps.write_table(
                    self.folder
                )  # the last points of several machines may have written at once
            return done
        except Exception as error:
            rows = sweeps.wait(self.folder, self.todo) if self.todo else []
            broken = [r for r in rows if r["name"] in self.todo and r["state"] in ("failed", "stopped")]
            if (
                not broken
                and "tasks_per_node" in self.config.hydra.launcher
                and isinstance(error, RuntimeError)
            ):
                said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
                raise MotionRAGError(
                    f"launcher=slurm could not run the points ({said}): check sinfo and launcher.partition=NAME, or leave "
                    "out launcher=slurm to run them here"
                ) from error
            if not broken:  # nothing was started: the sweep itself is wrong
                raise
            first = (
                f"{broken[0]['name']}: {broken[0]['error'] or 'ended from outside'} (log: {broken[0]['log']})"
            )
            raise MotionRAGError(
                f"{len(broken)} of {len(rows)} points failed, the first {first}; the others are kept, "
                f"to run these again: motionrag sweep retry {self.folder}"
            ) from error
