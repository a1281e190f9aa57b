"""Frozen image-to-video diffusion models behind one protocol."""
