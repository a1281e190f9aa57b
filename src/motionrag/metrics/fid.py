"""FID, Frechet inception distance: are the generated frames distributed like the true ones? Lower is better."""

from __future__ import annotations

from motionrag.metrics.frechet_distance import FrechetDistance


class FID(FrechetDistance):
    """Frechet distance of image features (B, T, D), one sample for each frame.

    Source: Heusel et al. (arXiv 1706.08500): Inception's 2048 pooled features, over all frames of all clips as in
    MotionRAG's published code. Frames of a clip are no independent samples, so intervals resample whole clips.
    ``fid_tiny`` takes DINOv2's CLS tokens (cf. Stein et al., arXiv 2306.04675); such values compare only with one
    another.
    """
