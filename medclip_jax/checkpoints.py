"""Training state on disk (orbax): the newest two checkpoints, each whole or absent."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from medclip_jax.errors import CheckpointError, WorkdirError
from medclip_jax.structs import TrainState


def open(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a workdir. Raises WorkdirError if the folder cannot be used."""
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file it touches
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    try:
        return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
    except OSError as error:
        raise WorkdirError(
            f"{workdir}/checkpoints cannot be written ({error.strerror}): give another workdir"
        ) from error


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Write the state of this step in the background."""
    manager.save(int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))


def restore(manager: ocp.CheckpointManager, like: TrainState) -> TrainState | None:
    """The newest whole state, placed as `like`; None if there is none.

    A damaged checkpoint is passed over for the one before it, with a warning. Raises
    CheckpointError if there are checkpoints and none can be read.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return manager.restore(step, args=args)["state"]
        except Exception as error:  # orbax and tensorstore raise many types on damaged files
            reason = str(error).splitlines()[0]
            logging.warning("checkpoint %d cannot be read and is passed over (%s)", step, reason)
    if steps:
        raise CheckpointError(
            f"{manager.directory}: none of the checkpoints {steps} can be read, or they are of "
            "another model; remove that folder to train anew"
        )
    return None
