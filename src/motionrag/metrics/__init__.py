"""One torchmetrics class per file; every metric takes features, never a network.

``ActionScore``, ``DinoScore``, ``MotionDistance`` and ``TrajectoryError`` keep one value per clip id and
average over clips; ``FrechetDistance`` compares two sets as wholes (FVD or FID, by the features given).
"""

from motionrag.metrics.action_score import ActionScore
from motionrag.metrics.dino_score import DinoScore
from motionrag.metrics.frechet_distance import FrechetDistance
from motionrag.metrics.motion_distance import MotionDistance
from motionrag.metrics.per_clip import PerClipMetric
from motionrag.metrics.trajectory_error import TrajectoryError

__all__ = [
    "ActionScore",
    "DinoScore",
    "FrechetDistance",
    "MotionDistance",
    "PerClipMetric",
    "TrajectoryError",
]
