"""The door: flags, then one call.

python -m medclip_jax.main --config FILE[:k=K,seed=S,...] --workdir DIR
                           [--mode train|evaluate|report] [--config.field=value ...]

Exit code 0 on success, 2 on something the user can mend (one sentence on stderr), 1 on our fault,
130 on Ctrl-C, 143 on SIGTERM while training: the state is saved then, the same command goes on.
"""

import errno
import logging
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from medclip_jax.errors import ConfigError, UserError, WorkdirError
from medclip_jax.preemption import EXIT_CODE, Preempted

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)  # of the disk

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file with its arguments, FILE[:k=16,seed=0].", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder that receives everything the run leaves.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate", "report"],
    "train: train or resume, score, report; evaluate: score a trained workdir again; "
    "report: rebuild figures and report.html from the workdir's files.",
)


def main(argv: list[str]) -> int:
    """Run the program; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        parse(argv)
        run(MODE.value, Path(WORKDIR.value).expanduser())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        where = error.filename or WORKDIR.value
        print(f"error: {where}: {error.strerror}; free space or mend it", file=sys.stderr)
        return 2
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> None:
    """Read the flags. Raises ConfigError with one sentence for anything wrong in them."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ConfigError(f"{rest[1]!r} is not a flag: see --help")
        if CONFIG.value is None or WORKDIR.value is None:
            raise ConfigError("--config and --workdir are needed: see --help")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sentence = " ".join(str(error).split())
        raise ConfigError(f"{sentence} (see --help and medclip_jax/config.py)") from error


def run(mode: str, workdir: Path) -> None:
    """One call per mode. Imports are here so that --help is quick."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be made ({error.strerror}): give another --workdir"
        ) from None
    if not os.access(workdir, os.W_OK):
        raise WorkdirError(f"{workdir} is not writable: give another --workdir")
    from medclip_jax import report

    if mode != "report":
        from medclip_jax import train

        devices()
        result = train.run(CONFIG.value, workdir, train=mode == "train")
        logging.info("%s", summary(result))
    page = report.write(workdir)
    logging.info("report: %s", page)


def devices() -> None:
    """Say what the run computes on."""
    import jax

    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # not of absent TPUs
    kinds = sorted({d.device_kind for d in jax.devices()})
    logging.info("%d device(s): %s", jax.device_count(), ", ".join(kinds))


def summary(result: dict) -> str:
    """One line of the headline numbers."""
    pixel = result["pixel"] or {}
    parts = {"image AUROC": result["image"]["auroc"], "pixel AUROC": pixel.get("auroc")}
    parts |= {"AUPRO": pixel.get("aupro"), "Dice": pixel.get("dice")}
    shown = ", ".join(f"{name} {value:.3f}" for name, value in parts.items() if value is not None)
    return f"{result['dataset']} K={result['k']} {result['method']}: {shown}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
