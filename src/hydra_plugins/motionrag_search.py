"""Sweepers that choose the points themselves: Optuna's search, and the same search handed to W&B.

What is left open on the command line or in `hydra.sweeper.params` is the search space, in Hydra's own words:
`lr=interval(1e-5,1e-2)`, `lr=tag(log,interval(1e-5,1e-2))`, `k=int(interval(1,9))`, `k=1,3,9`, `k=range(1,10)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from hydra_plugins.motionrag_sweeper import PointSweeper
from motionrag.errors import MotionRAGError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial


class OpenSweeper(PointSweeper):
    """A sweeper whose overrides leave a space open."""

    def split(self, arguments: list[str]) -> tuple[list[str], dict[str, Override]]:
        """What is fixed, as overrides, and what is open, by key. Raises MotionRAGError when nothing is open."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        space = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
        if not space:
            raise MotionRAGError(
                "a search needs something to choose: key=interval(LOW,HIGH), key=tag(log,interval(LOW,HIGH)) or "
                "key=A,B,C, on the command line or in hydra.sweeper.params"
            )
        fixed = [
            f"{o.get_key_element()}={o.get_value_element_as_str()}"
            for o in overrides
            if not o.is_sweep_override()
        ]
        return fixed, space


class SearchSweeper(OpenSweeper):
    """Optuna chooses each point by the results of those before it; runs with `callbacks=pruning` may end early.

    The study lies in the sweep's folder, so that a search goes on where it stopped, and a longer one adds to it.

    Args:
        trials: points in all.
        at_once: points started together; more than one makes sense with launcher=joblib and launcher=slurm.
        monitor: the metric, as runs log it.
        direction: "minimize" or "maximize".
        sampler: of Optuna.
        params: the search space, beside that of the command line.

    Raises MotionRAGError for a search without space, a metric that no run has, and at the end when points failed.
    """

    def __init__(
        self,
        trials: int,
        at_once: int,
        monitor: str,
        direction: str,
        sampler: BaseSampler,
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.trials, self.at_once = trials, at_once
        self.monitor, self.direction, self.sampler = monitor, direction, sampler

    def run(self, arguments: list[str]) -> None:
        """Ask, launch, tell."""
        import optuna

        from motionrag.search import study

        fixed, open_ = self.split(arguments)
        space = {key: distribution(override) for key, override in open_.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.check([[*fixed, f"{key}={value}"] for key, one in space.items() for value in _some(one)])
        self.folder.mkdir(parents=True, exist_ok=True)
        found = study(self.folder, self.sampler, self.direction)
        if found.trials:
            self.sampler.reseed_rng()  # or it would draw the first points again
        done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        self._repeat(found)
        failed = 0
        while (left := self.trials - len(found.get_trials(states=done)) - failed) > 0:
            trials = [found.ask(space) for _ in range(min(left, self.at_once))]
            self._launch(found, trials, fixed, list(space))
            for trial in trials:
                if not self._tell(found, trial.number):
                    found.tell(trial, state=optuna.trial.TrialState.FAIL)
                    failed += 1
        if failed:
            raise RuntimeError("points failed")  # PointSweeper.sweep says which
        print(
            f"best of {len(found.get_trials(states=done))}: {self.monitor} {found.best_value:.4g} with "
            f"{' '.join(f'{key}={value}' for key, value in found.best_params.items())} "
            f"({len(found.get_trials(states=done[1:]))} pruned)"
        )

    def _repeat(self, found: Study) -> None:
        """Settle what an earlier start left running, and put in front what it did not finish."""
        from optuna.trial import TrialState

        for trial in found.get_trials(states=[TrialState.RUNNING]):
            if not self._tell(found, trial.number):
                found.tell(trial.number, state=TrialState.FAIL)
        others = found.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
        there = [trial.params for trial in others]
        for trial in found.get_trials(states=[TrialState.FAIL]):
            if trial.params not in there:
                there.append(trial.params)
                found.enqueue_trial(trial.params)

    def _launch(self, found: Study, trials: list[Trial], fixed: list[str], keys: list[str]) -> None:
        from motionrag import sweeps

        points = [[*fixed, *(f"{key}={trial.params[key]}" for key in keys)] for trial in trials]
        for trial in trials:
            trial.set_user_attr("name", sweeps.name_of({key: str(trial.params[key]) for key in keys}))
        todo = self.plan(points, keys)
        if todo:  # Optuna may choose a point again
            self.launcher.launch(todo, initial_job_idx=trials[0].number)

    def _tell(self, found: Study, number: int) -> bool:
        """Hand the trial's result to the study; False when there is none."""
        from optuna.trial import TrialState

        from motionrag import sweeps

        attributes = found.get_trials()[number].user_attrs  # the run has written there, too
        name = attributes.get("name")
        row = next((row for row in sweeps.wait(self.folder, {name}) if row["name"] == name), None)
        if row is None or row["state"] not in sweeps.DONE:
            return False
        if row["state"] == "pruned" or attributes.get("pruned"):
            sweeps.mark_pruned(self.folder / name)
            found.tell(number, state=TrialState.PRUNED)
            return True
        if self.monitor not in row["metrics"]:
            raise MotionRAGError(
                f"{name} has no metric {self.monitor}, only {', '.join(sorted(row['metrics']))}: choose another "
                "hydra.sweeper.monitor"
            )
        found.tell(number, row["metrics"][self.monitor])
        return True


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws from, for one open override.

    Raises MotionRAGError for a choice that is neither number, text, boolean nor null.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(float(value.start), float(value.end), log=log)
    if isinstance(value, ChoiceSweep | RangeSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    raise MotionRAGError(f"{override.input_line}: expected interval(LOW,HIGH), A,B,C or range(FIRST,LAST)")


def _some(one: BaseDistribution) -> Sequence[Any]:
    """Values of a distribution: all choices, or a number."""
    return one.choices if hasattr(one, "choices") else [one.low]


class WandbSweeper(OpenSweeper):
    """The same search as a sweep of W&B, whose agents call `motionrag` once for each run, wherever they are started.

    Nothing is run here: the sweep's description goes to `wandb_sweep.yaml` in the sweep's folder.

    Args:
        method: "bayes", "random" or "grid".
        monitor, direction: metric, and "minimize" or "maximize".
        project: of W&B.
        create: also make the sweep on the server; needs a login.
        params: the search space, beside that of the command line.
    """

    def __init__(
        self,
        method: str,
        monitor: str,
        direction: str,
        project: str,
        create: bool = False,
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.method, self.monitor, self.direction = method, monitor, direction
        self.project, self.create = project, create

    def run(self, arguments: list[str]) -> None:
        """Write the description, or make the sweep."""
        import yaml

        from motionrag.io import write_text

        fixed, open_ = self.split(arguments)
        verb = self.config.hydra.job.config_name
        described = {
            "method": self.method,
            "metric": {"name": self.monitor, "goal": self.direction},
            "parameters": {key: parameter(override) for key, override in open_.items()},
            "command": ["motionrag", verb, *fixed, "${args_no_hyphens}"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "wandb_sweep.yaml"
        write_text(path, yaml.safe_dump({"project": self.project, **described}, sort_keys=False))
        if not self.create:
            print(f"wrote {path}; start it with: wandb sweep {path}")
            return
        import wandb

        print(f"start agents with: wandb agent {wandb.sweep(described, project=self.project)}")


def parameter(override: Override) -> dict[str, Any]:
    """What W&B draws from, for one open override."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind = "log_uniform_values" if "log" in value.tags else "int_uniform" if whole else "uniform"
        return {"distribution": kind, "min": value.start, "max": value.end}
    return {"values": list(override.sweep_string_iterator())}
