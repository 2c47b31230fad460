"""Command line: flags, then one call for each mode.

python -m medclip_jax.main --config FILE[:k=K,seed=S,...] --workdir DIR
                           [--mode train|evaluate|check|report] [--config.field=value ...]
python -m medclip_jax.main --mode predict --workdir TRAINED --input PATH ... --output DIR
                           [--part i/n] [--cam] [--boxes_of_passed] [--follow_links]
                           [--pseudonymise [--keep_burned_in]]
                           [--engine ray [--ray.address HOST:PORT] [--ray.workers N]]
python -m medclip_jax.main --mode export --workdir TRAINED --output FILE

Exit code 0 on success, 2 on a user's mistake (one sentence on stderr), 1 on our own,
130 on Ctrl-C, 143 on SIGTERM while training: the state is saved, the same command resumes.
"""

import errno
import io
import logging
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from medclip_jax import config, config_validation, errors, files
from medclip_jax.errors import TERMINATED, ConfigError, Preempted, UserError, one_line, printable

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
)

MODES = {
    "train": "train or resume, score, report",
    "evaluate": "score a trained workdir again",
    "check": "print one table of what is in the data and its problems; no --workdir",
    "predict": "score files, folders, globs, DICOM series and NIfTI volumes with a trained workdir",
    "export": "write a trained detector as one file that runs with jax and numpy alone",
    "report": "rebuild figures and report.html from the workdir's files",
}
MOST_CONFIG = 1 << 20  # bytes of a config file
OURS = Path(), Path("configs")  # folders whose names may stand for packaged configs
TRAINED_MODES = ("predict", "export")  # use a trained workdir and take no config
ONLY = {"output": TRAINED_MODES} | dict.fromkeys(  # flags that not every mode takes
    "input part engine cam boxes_of_passed follow_links pseudonymise keep_burned_in".split(),
    ("predict",),
)


def main(argv: list[str]) -> int:
    """Run the program; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(errors.PrintableLines("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    code = 2
    try:
        if {"-h", "-help", "--help"} & set(argv[1:]):
            print(usage(), flush=True)
            return 0
        args = parse(argv)
        if args.mode in TRAINED_MODES:
            use(args)
        elif args.mode == "check":
            check(args.config)
        else:
            run(args.mode, args.config, args.workdir)
    except UserError as error:
        message = str(error)
    except UnicodeEncodeError as error:  # a path that this locale cannot name
        message = f"{error.object!a} has letters beyond {error.encoding}: set LC_ALL=C.UTF-8"
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        advice = "free space or change permissions"
        if isinstance(error, FileNotFoundError):
            advice = "it was removed meanwhile: run the same command again"
        elif error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
        message = f"{what}; {advice}"
    except Preempted as stop:
        message, code = f"{stop}. Re-run the same command to resume.", TERMINATED
    except KeyboardInterrupt:
        message, code = "Interrupted. Re-run the same command to resume.", 130
    else:
        return 0
    # outside the handlers: with the error gone, progress bars are closed and this is the last line
    message = printable(message)
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    return code


def usage() -> str:
    """What --help prints: the modes and every field with its default."""
    modes = "\n".join(f"  {mode:9} {what}" for mode, what in MODES.items())
    fields = "\n".join(f"  --config.{name}={value}" for name, value in config.flat(config.base()))
    return f"{__doc__}\nModes:\n{modes}\n\nFields (medclip_jax/config.py explains them):\n{fields}"


def parse(argv: list[str]) -> flags.FlagValues:
    """Read the flags. Raises ConfigError for anything wrong in them."""
    argv = with_packaged_config(argv)
    args = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "FILE[:k=16,...].", args, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=args)
    flags.DEFINE_enum("mode", "train", list(MODES), "What to do.", flag_values=args)
    flags.DEFINE_multi_string("input", [], "What to score; PATH ... .", flag_values=args)
    flags.DEFINE_string("output", None, "Where results go.", flag_values=args)
    flags.DEFINE_string("part", "", "i/n: the i-th of n shares.", flag_values=args)
    flags.DEFINE_enum("engine", "", ["", "ray"], "Score on Ray workers.", flag_values=args)
    flags.DEFINE_string("ray.address", "", "Cluster, as HOST:PORT.", flag_values=args)
    flags.DEFINE_integer("ray.workers", 0, "So many.", lower_bound=0, flag_values=args)
    flags.DEFINE_boolean("pseudonymise", False, "No name or id of a source.", flag_values=args)
    flags.DEFINE_boolean("keep_burned_in", False, "Pictures with text too.", flag_values=args)
    flags.DEFINE_boolean("follow_links", False, "Also out of named folders.", flag_values=args)
    flags.DEFINE_boolean("cam", False, "Also write the Grad-CAM of each item.", flag_values=args)
    flags.DEFINE_boolean("boxes_of_passed", False, "Boxes without an alarm.", flag_values=args)
    file = check_config_file(argv)
    try:
        rest = args(argv)
    except UserError:
        raise
    except Exception as error:  # a config file is a program and may raise anything
        raise ConfigError(f"{errors.of_config(error, file)} (see --help)") from error
    for name, modes in ONLY.items():
        if args[name].value and args.mode not in modes:
            raise ConfigError(f"--{name} goes with --mode {' or '.join(modes)}: see --help")
    if (args["ray.address"].value or args["ray.workers"].value) and not args.engine:
        raise ConfigError("--ray.* goes with --mode predict --engine ray: see --help")
    if args.mode == "predict":
        args["input"].value = [*args.input, *rest[1:]]  # --input A B C
    elif len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag: see --help")
    if args.mode in TRAINED_MODES:
        return complete(args)
    if not args["config"].present or not (args.workdir or args.mode == "check"):
        raise ConfigError("--config and --workdir are needed: see --help")
    if not isinstance(args.config, ConfigDict):  # ml_collections says nothing until it is used
        raise ConfigError("the config file gives no settings: see configs/folder.py")
    config.fields_of(args.config)
    return args


def check_config_file(argv: list[str]) -> str:
    """The file of --config; ConfigError if it is no regular file, or too large for settings."""
    from medclip_jax import stored

    file = ""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, inline = flag.partition("=")
        if flag not in ("--config", "-config"):
            continue
        file = (inline if equals else value).partition(":")[0]
        try:
            stored.check_file(Path(file), MOST_CONFIG)
        except OSError as error:
            raise ConfigError(f"config file {file} cannot be read: give one that exists") from error
        except ValueError as error:
            raise ConfigError(f"config file {file} cannot be used ({error})") from error
    return file


def with_packaged_config(argv: list[str]) -> list[str]:
    """The same flags, ~ written out, with a config that is not here taken from the package.

    `--config configs/busi.py:k=16`, `busi.py:k=16` and `busi:k=16` then mean the same.
    """
    argv = list(argv)
    package = Path(__file__).parent
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        place = i if equals else i + 1
        text = value if equals else "".join(argv[place : place + 1])
        name, colon, arguments = text.partition(":")
        file = Path(name)
        if name.startswith("~"):
            file = files.expanded(name)
        elif file.parent in OURS and file.suffix in ("", ".py") and not file.is_file():
            ours = (folder / "configs" / f"{file.stem}.py" for folder in (package, package.parent))
            file = next(filter(Path.is_file, ours), file)
        if file != Path(name):
            text = f"{file}{colon}{arguments}"
            argv[place] = f"{flag}={text}" if equals else text
    return argv


def complete(args: flags.FlagValues) -> flags.FlagValues:
    """The flags of predict and export, or a ConfigError naming what is missing."""
    needed = ("workdir", "input", "output") if args.mode == "predict" else ("workdir", "output")
    missing = [f"--{name}" for name in needed if not args[name].value]
    if missing:
        raise ConfigError(f"--mode {args.mode} needs {' and '.join(missing)}: see --help")
    if args.config is not None:
        raise ConfigError(f"--mode {args.mode} takes no --config: the settings are the workdir's")
    return args


# One function for each kind of mode. Imports are inside so that --help is quick.


def use(args: flags.FlagValues) -> None:
    """Predict with, or export, a trained workdir."""
    from medclip_jax import build_detector, object_store, workdir
    from medclip_jax.distributed import sharding

    folder, output = files.expanded(args.workdir), object_store.place(args.output)
    if args.engine != "ray":  # whose workers have the devices
        sharding.log_devices()
    if args.mode == "export":
        if output.name in workdir.FILES and output.parent.resolve() == folder.resolve():
            raise ConfigError(f"{output} is a file of the run: give another --output")
        from medclip_jax.inference import export

        with object_store.file(args.output) as output:
            size = export.save(build_detector.load_predictor(folder), output)
        return logging.info("%s: %.1f MB", output, size / 1e6)
    from medclip_jax.inference import inputs, predict

    items = inputs.find(args.input, args.follow_links, nameless=args.pseudonymise)
    start = partial(predict.in_process, cam=args.cam, boxes_of_passed=args.boxes_of_passed)
    load = build_detector.load_predictor
    with ExitStack() as stack:
        if not args.engine:
            score = start(load(folder))
        else:
            from medclip_jax.inference import ray_engine as ray

            stack.enter_context(ray.connected(args["ray.address"].value or ""))
            workers = args["ray.workers"].value or 0
            score = partial(ray.score, workdir=folder, load=load, start=start, workers=workers)
        output = stack.enter_context(object_store.folder(args.output))
        options = args.part, args.pseudonymise, args.keep_burned_in
        summary = predict.run(score, items, output, *options)
    logging.info("%d scored, %d finished before, %d unreadable, %d alarm(s): %s", *summary)


def check(fields: ConfigDict) -> None:
    """Print unused settings, a named CLIP and the table of the data set; UserError for a fault."""
    from medclip_jax import build
    from medclip_jax.data import catalog, check

    c = config.resolve(fields)
    said = (*config.unused_fields(fields, c), *catalog.cautions(c))
    for line in (*said, *build.describe_clip(c)):
        print(printable(line), flush=True)
    data, root = c.data, files.expanded(c.data.root) if c.data.root else None
    how = {"pool_size": data.pool, "kind": data.split, "uncertain": data.uncertain}
    how |= {"extra": c.calibration.extra, "alpha": c.calibration.alpha}
    check.run(data.name, root, Path(c.cache), c.k, seed=c.seed, window=data.window, **how)


def run(mode: str, fields: ConfigDict, name: str) -> None:
    """Train, evaluate or report in the workdir of this name, which no other run uses meanwhile."""
    from medclip_jax import object_store, train, workdir
    from medclip_jax.distributed import runtime, sharding
    from medclip_jax.evaluation.metrics import headline

    object_store.place(name)  # a scheme that is unknown is an error
    if object_store.is_url(cache := str(fields.cache)):
        fields.cache = str(object_store.place(cache))
    with runtime.exit_together(), ExitStack() as stack:
        address = config_validation.cluster(fields.distributed)
        if mode != "report" and address is not None:
            facts = train.must_agree(config.resolve(fields)) | {"mode": mode}
            runtime.start(**address, timeout=fields.join_timeout, facts=facts)
        main = runtime.is_main()
        folder = stack.enter_context(object_store.folder(name, main))
        stack.enter_context(workdir.locked(folder, mode == "train"))
        if mode == "report":
            train.write_report(folder)
            return
        sharding.log_devices()
        stack.enter_context(object_store.folder(cache or ".", main))
        metrics = train.run(fields, folder, train=mode == "train")
    if metrics is not None:  # of several processes only the main one reports
        logging.info("%s", headline(metrics))
        if not metrics["calibration"]["attainable"]:
            logging.warning("%s", metrics["calibration"]["message"])


def cli() -> None:
    """The console script: run, then end the process with the exit code."""
    code = main(sys.argv)
    if "jax" not in sys.modules:
        sys.exit(code)
    from medclip_jax.distributed import runtime

    runtime.leave(code)


if __name__ == "__main__":
    cli()
