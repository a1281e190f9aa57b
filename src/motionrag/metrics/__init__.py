"""One torchmetrics class per file; metrics work on features, networks are injected.

All have ``add(ClipBatch)``, ``compute()`` and ``statistic()`` (what ``bootstrap`` resamples); docs/metrics.md lists them.
Per-clip metrics keep one value per clip id (``per_clip()``) and average over clips; FVD and FID compare two sets as
wholes.
"""

from motionrag.metrics.action_score import ActionScore
from motionrag.metrics.batch import ClipBatch
from motionrag.metrics.clip_metric import ClipMetric
from motionrag.metrics.clip_text_score import ClipTextScore
from motionrag.metrics.clip_video_score import ClipVideoScore
from motionrag.metrics.dino_score import DinoScore
from motionrag.metrics.dynamic_degree import DynamicDegree
from motionrag.metrics.fid import FID
from motionrag.metrics.frechet_distance import FrechetDistance
from motionrag.metrics.fvd import FVD
from motionrag.metrics.motion_arrival import MotionArrival
from motionrag.metrics.motion_distance import MotionDistance
from motionrag.metrics.motion_smoothness import MotionSmoothness
from motionrag.metrics.per_clip import PerClipMetric
from motionrag.metrics.subject_consistency import SubjectConsistency
from motionrag.metrics.trajectory_error import TrajectoryError

__all__ = [
    "FID",
    "FVD",
    "ActionScore",
    "ClipBatch",
    "ClipMetric",
    "ClipTextScore",
    "ClipVideoScore",
    "DinoScore",
    "DynamicDegree",
    "FrechetDistance",
    "MotionArrival",
    "MotionDistance",
    "MotionSmoothness",
    "PerClipMetric",
    "SubjectConsistency",
    "TrajectoryError",
]
