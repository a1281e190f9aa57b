"""Networks written with torch and einops alone: Resampler, CAMA, motion adapter, diffusion formulas."""
