"""Few-shot medical anomaly detection from healthy images: frozen CLIP, learned prompts, JAX."""

__version__ = "0.1.0"
