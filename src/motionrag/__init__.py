"""MotionRAG: retrieved motion for frozen image-to-video diffusion backbones."""

__version__ = "0.1.0"
