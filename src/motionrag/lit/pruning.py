"""Ending runs of a search early."""

import logging
from pathlib import Path

import lightning as L
from optuna.pruners import BasePruner
from optuna.trial import Trial, TrialState

from motionrag.errors import MotionRAGError
from motionrag.search import study

log = logging.getLogger(__name__)


class Pruning(L.Callback):
    """Tells the search's study each validation's result, and ends the run when the study has seen enough of it.

    Args:
        run_dir: of this run, below the folder of the search.
        monitor: the metric, as logged.
        pruner: Optuna's, which compares with the other runs at the same step.

    Raises MotionRAGError outside a search, and for a metric that is not logged.
    """

    def __init__(self, run_dir: str, monitor: str, pruner: BasePruner) -> None:
        self.run_dir, self.monitor, self.pruner = Path(run_dir), monitor, pruner

    def _trial(self) -> Trial:
        if not (self.run_dir.parent / "study.log").is_file():
            raise MotionRAGError(
                f"{self.run_dir} belongs to no search: leave out callbacks=pruning, or add sweeper=search -m"
            )
        found = study(self.run_dir.parent, pruner=self.pruner)
        running = found.get_trials(states=[TrialState.RUNNING])
        (number,) = [t.number for t in running if t.user_attrs.get("name") == self.run_dir.name]
        return Trial(found, found.get_trials()[number]._trial_id)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MotionRAGError(
                f"callbacks.pruning.monitor={self.monitor} is not logged; logged: "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )
        pruned = False
        if trainer.is_global_zero:
            trial = self._trial()
            trial.report(trainer.callback_metrics[self.monitor].item(), trainer.global_step)
            if pruned := trial.should_prune():
                trial.set_user_attr("pruned", True)
                line = f"pruned at step {trainer.global_step}: other points were better there"
                print(line, flush=True)
                log.info(line)
        trainer.should_stop = trainer.strategy.broadcast(pruned) or trainer.should_stop
