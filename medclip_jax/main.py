"""The door: flags, then one call.

python -m medclip_jax.main --config FILE[:k=K,seed=S,...] --workdir DIR
                           [--mode train|evaluate|check|report] [--config.field=value ...]
python -m medclip_jax.main --mode predict --workdir TRAINED --input PATH ... --output DIR
                           [--part i/n] [--pseudonymise]
python -m medclip_jax.main --mode export --workdir TRAINED --output FILE

Exit code 0 on success, 2 on something the user can mend (one sentence on stderr), 1 on our fault,
130 on Ctrl-C, 143 on SIGTERM while training: the state is saved then, the same command goes on.
"""

import errno
import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from medclip_jax import config, lock
from medclip_jax.distributed.runtime import EXIT_CODE, Preempted
from medclip_jax.errors import ConfigError, UserError, WorkdirError

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)  # of the disk

MODES = {
    "train": "train or resume, score, report",
    "evaluate": "score a trained workdir again",
    "check": "print one table of what is in the data and what is wrong with it; no --workdir",
    "predict": "score files, folders, globs, DICOM series and NIfTI volumes with a trained workdir",
    "export": "write a trained scorer as one file that runs with jax and numpy alone",
    "report": "rebuild figures and report.html from the workdir's files",
}
APART = ("predict", "export")  # modes that use a trained workdir and take no config


def main(argv: list[str]) -> int:
    """Run the program; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    workdir, code = None, 2
    try:
        if {"-h", "-help", "--help"} & set(argv[1:]):
            print(usage(), flush=True)
            return 0
        given = parse(argv)
        workdir = Path(given.workdir or ".").expanduser()
        if given.mode in APART:
            use(given, workdir)
        else:
            run(given.mode, given.config, workdir)
    except UserError as error:
        said = str(error)
    except BrokenPipeError:  # the reader of what is printed, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        said = f"{error.filename or workdir}: {error.strerror}; free space or mend it"
    except Preempted as stopped:
        said, code = f"{stopped}; the same command goes on from there", EXIT_CODE
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
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
    argv = packaged(argv)
    given = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Config file, FILE[:k=16,...].", flag_values=given, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=given)
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=given)
    flags.DEFINE_multi_string("input", [], "What to score; PATH ... .", flag_values=given)
    flags.DEFINE_string("output", None, "Where results go.", flag_values=given)
    flags.DEFINE_string("part", "", "i/n: the i-th of n shares.", flag_values=given)
    flags.DEFINE_boolean("pseudonymise", False, "No name or id of a source.", flag_values=given)
    try:
        rest = given(argv)
    except (
        *(flags.Error, AttributeError, KeyError, TypeError, ValueError),
        *(OSError, ImportError, SyntaxError),  # of the config file
    ) as error:
        check_config_file(argv)
        raise ConfigError(f"{plain(error)} (see --help)") from error
    if given.mode in APART:
        given["input"].value = [*given.input, *rest[1:]]  # --input A B C
        return complete(given)
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag: see --help")
    if given.config is None or not (given.workdir or given.mode == "check"):
        raise ConfigError("--config and --workdir are needed: see --help")
    if not isinstance(given.config, ConfigDict):  # ml_collections keeps quiet until it is used
        check_config_file(argv)
        raise ConfigError("the config file gives no settings: see configs/folder.py")
    return given


def check_config_file(argv: list[str]) -> None:
    """Raise ConfigError if --config names a file that is not there."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, given = flag.partition("=")
        name = (given if equals else value).partition(":")[0]
        if flag in ("--config", "-config") and not Path(name).is_file():
            raise ConfigError(f"config file {name} cannot be read: give one that exists")


def packaged(argv: list[str]) -> list[str]:
    """The same flags, with a config that is not a file here taken from the installed package.

    `--config configs/busi.py:k=16`, `busi.py:k=16` and `busi:k=16` then mean the same.
    """
    argv = list(argv)
    here = Path(__file__).parent
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        place = i if equals else i + 1
        given = value if equals else "".join(argv[place : place + 1])
        name, colon, arguments = given.partition(":")
        for folder in (here / "configs", here.parent / "configs"):
            file = folder / f"{Path(name).stem}.py"
            ours = Path(name).parent.name in ("", "configs") and not Path(name).is_absolute()
            if name and ours and not Path(name).is_file() and file.is_file():
                argv[place] = (
                    f"{flag}={file}{colon}{arguments}" if equals else (f"{file}{colon}{arguments}")
                )
                break
    return argv


def complete(given: flags.FlagValues) -> flags.FlagValues:
    """The flags of predict and export, or a ConfigError naming what they lack."""
    needed = ("workdir", "input", "output") if given.mode == "predict" else ("workdir", "output")
    lacking = [f"--{name}" for name in needed if not given[name].value]
    if lacking:
        raise ConfigError(f"--mode {given.mode} needs {' and '.join(lacking)}: see --help")
    if given.config is not None:
        raise ConfigError(
            f"--mode {given.mode} takes no --config: the settings are those of the workdir"
        )
    return given


def use(given: flags.FlagValues, workdir: Path) -> None:
    """Predict with, or export, a trained workdir."""
    devices()
    output = Path(given.output).expanduser()
    if given.mode == "export":
        from medclip_jax.inference import export

        size = export.save(workdir, output)
        logging.info("%s: %.1f MB", output, size / 1e6)
        return
    from medclip_jax.inference import predict

    done = predict.run(workdir, given.input, output, given.part, given.pseudonymise)
    logging.info(
        "%d scored, %d finished before, %d unreadable, %d alarm(s): %s",
        *done,
    )


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
    # processes of one run share their workdir on purpose
    with nullcontext() if fields.distributed else lock.hold(workdir):
        work(mode, fields, workdir)


def work(mode: str, fields: ConfigDict, workdir: Path) -> None:
    """Train, evaluate or report in a workdir that is ours."""
    from rich.console import Console

    from medclip_jax.report import html

    if mode != "report":
        from medclip_jax import train
        from medclip_jax.distributed import multihost

        with multihost.exit_together():
            join(fields)
            devices()
            result = train.run(fields, workdir, train=mode == "train")
        if result is None:
            return  # of several processes only the main one reports
        logging.info("%s", summary(result))
        if not result["calibration"]["attainable"]:
            logging.warning("%s", result["calibration"]["message"])
    with Console(stderr=True).status("report"):
        page = html.write(workdir)
    logging.info("report: %s", page)


def join(fields: ConfigDict) -> None:
    """Join the other processes of the run, if there are any; the first thing that touches JAX."""
    from medclip_jax.distributed import multihost

    cluster = fields.cluster
    address = (
        cluster.coordinator or None,
        cluster.processes or None,
        None if cluster.process < 0 else cluster.process,
    )
    if fields.distributed:
        multihost.start(*address, timeout=cluster.timeout, heartbeat=cluster.heartbeat)
    elif address != (None, None, None):
        raise ConfigError("config.cluster needs config.distributed=True: set it")


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


def cli() -> None:
    """The console script: run, then end the process with the exit code."""
    code = main(sys.argv)
    if "jax" not in sys.modules:
        sys.exit(code)
    from medclip_jax.distributed import multihost

    multihost.leave(code)


if __name__ == "__main__":
    cli()
