"""`read(path)` under the name that other tools import; the readers themselves are in `io`."""

from medclip_jax.io.read import read

__all__ = ["read"]
