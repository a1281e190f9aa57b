"""FVD, Frechet video distance: are the generated clips distributed like the true ones? Lower is better."""

from __future__ import annotations

from motionrag.metrics.frechet_distance import FrechetDistance


class FVD(FrechetDistance):
    """Frechet distance of video features (B, D), one sample for each clip.

    Source: Unterthiner et al. (arXiv 1812.01717) with the I3D that is customary now: Kinetics-400 as torchscript, its
    400 values before the softmax, clips as uint8 with rescaling and resizing inside the script (StyleGAN-V, MotionRAG).
    StyleGAN-V divides covariances by n, MotionRAG and we by n - 1. ``fvd_tiny`` takes VideoMAE's features, mean over
    tokens; such values compare only with one another (Ge et al., arXiv 2404.12391, argue for them: they see motion
    where I3D sees single frames).
    """

    least_clips = 2
