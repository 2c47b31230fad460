"""Few-shot medical anomaly detection from healthy images alone: frozen CLIP, learnable prompts, JAX."""

__version__ = "0.1.0"
