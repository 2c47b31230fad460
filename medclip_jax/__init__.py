"""Few-shot medical anomaly detection from healthy images: frozen CLIP, learned prompts, JAX."""

__version__ = "0.2.0"
__all__ = ["Prediction", "Scorer", "UserError", "__version__", "load"]


def __getattr__(name: str):
    """The names of a notebook, imported when they are first asked for: they bring JAX along."""
    if name in ("Prediction", "Scorer", "load"):
        from medclip_jax import api

        return getattr(api, name)
    if name == "UserError":
        from medclip_jax.errors import UserError

        return UserError
    raise AttributeError(f"module 'medclip_jax' has no attribute {name!r}")
