"""Programs that XLA has compiled are kept between runs, so that the same job starts at once."""

from pathlib import Path
from typing import Any

import jax


def keep(cache: Path) -> None:
    """Keep compiled programs below `cache`, unless JAX was told of another folder (or of none).

    JAX names them by program, version and machine, so that a folder may serve all runs. Call it
    before anything is compiled.
    """
    told: Any = jax.config  # its fields are made when jax is imported: unknown to a type checker
    if told.jax_compilation_cache_dir or not told.jax_enable_compilation_cache:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    # small ones too: a job has some two hundred, and each is read faster than it is compiled
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
