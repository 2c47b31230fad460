"""The door: flags, then one call.

python -m medclip_jax.main --config FILE[:k=K,seed=S,...] --workdir DIR
                           [--mode train|evaluate|check|report] [--config.field=value ...]

Exit code 0 on success, 2 on something the user can mend (one sentence on stderr), 1 on our fault,
130 on Ctrl-C, 143 on SIGTERM while training: the state is saved then, the same command goes on.
"""

import errno
import logging
import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from medclip_jax import config
from medclip_jax.errors import ConfigError, UserError, WorkdirError
from medclip_jax.preemption import EXIT_CODE, Preempted

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)  # of the disk

MODES = {
    "train": "train or resume, score, report",
    "evaluate": "score a trained workdir again",
    "check": "print one table of what is in the data and what is wrong with it; no --workdir",
    "report": "rebuild figures and report.html from the workdir's files",
}


def main(argv: list[str]) -> int:
    """Run the program; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(usage())
        return 0
    workdir, code = None, 2
    try:
        given = parse(argv)
        workdir = Path(given.workdir or ".").expanduser()
        run(given.mode, given.config, workdir)
    except UserError as error:
        said = str(error)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        said = f"{error.filename or workdir}: {error.strerror}; free space or mend it"
    except Preempted as stopped:
        said, code = f"{stopped}; the same command goes on from there", EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    else:
        return 0
    # out of the handlers: with the error gone, progress bars are closed and this is the last line
    print(f"error: {said}" if code == 2 else said, file=sys.stderr)
    return code


def usage() -> str:
    """What --help prints: the modes and every field with its default."""
    modes = "\n".join(f"  {mode:9} {what}" for mode, what in MODES.items())
    fields = "\n".join(f"  --config.{name}={value}" for name, value in config.flat(config.base()))
    return f"{__doc__}\nModes:\n{modes}\n\nFields (medclip_jax/config.py explains them):\n{fields}"


def parse(argv: list[str]) -> flags.FlagValues:
    """Read the flags: config, workdir and mode. Raises ConfigError for anything wrong in them."""
    given = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file, FILE[:k=16,...].", flag_values=given, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=given)
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=given)
    try:
        rest = given(argv)
    except (
        *(flags.Error, AttributeError, KeyError, TypeError, ValueError),
        *(OSError, ImportError, SyntaxError),  # of the config file
    ) as error:
        raise ConfigError(f"{plain(error)} (see --help)") from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag: see --help")
    if given.config is None or not (given.workdir or given.mode == "check"):
        raise ConfigError("--config and --workdir are needed: see --help")
    if not isinstance(given.config, ConfigDict):  # ml_collections keeps quiet until it is used
        name = given["config"].config_filename
        raise ConfigError(f"config file {name} cannot be read: give one that exists")
    return given


def plain(error: Exception) -> str:
    """The message of an error on one line."""
    said = str(error)
    if said.startswith("'"):  # a KeyError prints the repr of its message
        said = said.strip("'").replace("\\n", " ").replace("\\'", "")
    return " ".join(said.split())


def check(fields: ConfigDict) -> None:
    """Print the table of the data set; DataError if it cannot be used."""
    from medclip_jax.data import check as data_check

    c = config.resolve(fields)
    root = Path(c.data.root) if c.data.root else None
    data_check.run(
        *(c.data.name, root, Path(c.cache), c.k),
        seed=c.seed,
        pool_size=c.data.pool,
        kind=c.data.split,
        policy=(c.data.uncertain, c.data.blank),
    )


def run(mode: str, fields: ConfigDict, workdir: Path) -> None:
    """One call per mode. Imports are here so that --help is quick."""
    if mode == "check":
        return check(fields)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be made ({error.strerror}): give another --workdir"
        ) from None
    if not os.access(workdir, os.W_OK):
        raise WorkdirError(f"{workdir} is not writable: give another --workdir")
    from rich.console import Console

    from medclip_jax import report

    if mode != "report":
        from medclip_jax import processes, train

        with processes.together():
            join(fields)
            devices()
            result = train.run(fields, workdir, train=mode == "train")
        if result is None:
            return  # of several processes only the main one reports
        logging.info("%s", summary(result))
    with Console(stderr=True).status("report"):
        page = report.write(workdir)
    logging.info("report: %s", page)


def join(fields: ConfigDict) -> None:
    """Join the other processes of the run, if there are any; the first thing that touches JAX."""
    from medclip_jax import sharding

    cluster = fields.cluster
    sharding.start(
        fields.distributed,
        coordinator=cluster.coordinator or None,
        processes=cluster.processes or None,
        process=None if cluster.process < 0 else cluster.process,
        timeout=cluster.timeout,
        heartbeat=cluster.heartbeat,
    )


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
    code = main(sys.argv)
    if "jax" not in sys.modules:
        sys.exit(code)
    from medclip_jax import processes

    processes.leave(code)
