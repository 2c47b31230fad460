"""Every file that a run leaves or reads, damaged; then a command over it.

`python -m tests.integration.fuzz_workdir --cases 2000 [--first 0] [--seed 0]`.

A case is one file, one damage and one command, all three drawn from (seed, case), so that any of
them can be repeated alone. A command may end in exit 2 with one sentence, or in exit 0 with the
right result: that of the whole files, where what was damaged is not itself an input. Prints a JSON
line of each case before and after it, and one with the counts at the end. In most cases nothing is
scored and no chart is drawn, which takes most of the time; what is read for them is compared.
"""

import argparse
import contextlib
import csv
import faulthandler
import hashlib
import io
import json
import os
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import nibabel
import numpy as np
import pydicom
from PIL import Image

from medclip_jax import main as program
from medclip_jax import train
from medclip_jax.clip import checkpoint
from medclip_jax.errors import UserError
from medclip_jax.features import cache
from medclip_jax.inference import export
from medclip_jax.models import text_adapter
from medclip_jax.report import figures
from tests.support import predicting
from tests.support.damaged import altered, broken
from tests.support.runs import World, make_world

HANG = 150  # seconds of one case
TABLE = "kind,name,synonyms\nfinding,bruise,haematoma|blue mark\nanatomy,elbow,\n"
SETTINGS = "from medclip_jax import config\n\ndef get_config(arg=''):\n    return config.base(arg, "
SETTINGS += "name='folder', conditions=('tumor',), anatomy='breast', modality='ultrasound')\n"
RUN = (*("train", "evaluate", "report", "predict", "export"), "resume", "restart")
GROUPS: dict[str, tuple[tuple[str, ...], int]] = {  # files -> commands over them, weight
    "run/*.json*": (RUN, 5),
    "run/*.npz": (("train", "evaluate", "report"), 2),
    "run/*.safetensors": (("train", "evaluate", "predict", "export"), 2),
    "run/checkpoints/**/*": (("resume", "restart", "evaluate"), 5),
    "run/figures/*": (("report", "train"), 1),
    "run/report.html": (("report", "train"), 1),
    "run/.lock": (("report", "train"), 1),
    "world/cache/**/*": (("train", "evaluate", "restart", "fresh"), 5),
    "world/clip/*": (("train", "evaluate", "predict", "fresh"), 3),
    "world/data/**/*.png": (("train", "evaluate", "check", "fresh"), 3),
    "more/settings.py": (("train", "check", "report"), 1),
    "more/table.csv": (("evaluate", "fresh"), 1),
    "more/language.safetensors": (("evaluate", "predict", "fresh"), 2),
    "scans/**/*": (("predict", "nameless"), 4),
    "out/*": (("predict",), 3),
    "out/.pseudonyms": (("nameless",), 1),
    "nameless/*": (("nameless",), 3),
    "nameless/.pseudonyms": (("nameless",), 1),
    "detector.zip": (("load",), 3),
}
LEARNED = "train", "evaluate", "resume", "restart", "fresh"
FULL = 0.05  # share of those that also score and measure
INPUTS = "world/data/", "world/clip/", "scans/", "more/"  # their change may change the result


class Scene(NamedTuple):
    """A folder in which everything lies, its copy, and the results of the whole files."""

    base: Path
    world: World
    whole: Path
    results: dict[str, Any]


def build(base: Path) -> Scene:
    """A run, its report, two predictions and an exported file, all tiny."""
    now, whole = base / "now", base / "whole"
    scene = Scene(now, World(now / "world", now / "world/data", now / "world/clip"), whole, {})
    if not whole.is_dir():
        make(scene)
    restore(scene)
    scene.results.update({name: outcome(scene, name, "") for name in ("run", "out", "nameless")})
    page = now / "run/report.html"
    drawn = page.read_bytes()
    call(scene, "report")
    scene.results["report"] = drawn, page.read_bytes()
    restore(scene)
    scene.results["load"] = scores(now / "detector.zip")
    prepare(scene, "resume")
    code, scene.results["learned"], said = call(scene, "resume")
    restore(scene)
    if code or not scene.results["learned"]:
        raise RuntimeError(said)
    return scene


def make(scene: Scene) -> None:
    """Run every command once and copy what they left."""
    now, world = scene.base, scene.world
    (now / "more").mkdir(parents=True)
    make_world(now / "world")
    (now / "more/settings.py").write_text(SETTINGS)
    (now / "more/table.csv").write_text(TABLE)
    clip = checkpoint.load(str(world.clip))
    adapter = text_adapter.init(jax.random.key(0), clip.joint)
    text_adapter.save(now / "more/language.safetensors", adapter, clip.digest, {})
    for i in range(2):
        predicting.dicom(now / "scans/series" / f"{i}.dcm", i + 1)
    picture = next((world.data / "test/lesion").iterdir())
    shutil.copy(picture, now / "scans/picture.png")
    pixels = predicting.noise(1, (20, 24, 3))
    nibabel.Nifti1Image(pixels, np.eye(4)).to_filename(now / "scans/volume.nii.gz")
    commands = "train", "report", "predict", "nameless", "export", "evaluate", "check"
    for command in commands:
        code, _, said = call(scene, command, short=False)
        if code:
            raise RuntimeError(f"{command}: {said}")
    shutil.copytree(now, scene.whole, symlinks=True)


def scores(path: Path) -> list:
    images = np.random.default_rng(0).random((2, 40, 50), np.float32)
    return [np.asarray(part).tolist() for part in export.load(path)(images)]


class Reached(Exception):
    """Everything was read and learned: what a score is made from."""


def reached(prepared, encoded, fitted, workdir) -> None:
    """In place of train.score, which is the slow part and reads no more files."""
    records = [*prepared.split.support, *prepared.split.test]
    tokens = list(cache.load_images(encoded.feature_cache, records, 64))
    rows = [(r.id, r.sha256, r.label) for r in records]
    (pool,) = encoded.pools
    names = ["pooled", *(f"level{i}" for i in range(pool.levels))]
    pools = [tensor(name)[:] for tensor in (*pool.clean, *pool.anomalous) for name in names]
    pools += [tensor("mask")[:] for tensor in pool.anomalous]
    arrays = jax.tree.leaves((fitted.params, tokens, pools, prepared.clip.params))
    digest = [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in arrays]
    raise Reached([rows, digest, list(prepared.design.prompts.text)])


def charted(figure) -> bytes:
    """In place of figures.png: the numbers of a chart as a picture, without drawing it."""
    lines = [(*line.get_xydata().ravel(),) for axes in figure.axes for line in axes.lines]
    bars = [patch.get_path().vertices.tolist() for axes in figure.axes for patch in axes.patches]
    texts = [axes.get_title() + axes.get_xlabel() for axes in figure.axes]
    texts += [text.get_text() for part in (figure, *figure.axes) for text in part.texts]
    digest = hashlib.sha256(repr((lines, bars, texts)).encode()).digest()
    file = io.BytesIO()
    Image.frombytes("L", (8, 4), digest).save(file, "PNG")
    return file.getvalue()


def call(scene: Scene, command: str, short: bool = True) -> tuple[int, Any, str]:
    """Exit code, result of `load` or what is learned, and what was said."""
    base, world = scene.base, scene.world
    mode = {"resume": "train", "restart": "train", "fresh": "train", "nameless": "predict"}
    argv = [f"--mode={mode.get(command, command)}"]
    workdir = base / ("new" if command == "fresh" else "run")
    if command in ("predict", "nameless"):
        name = "out" if command == "predict" else "nameless"
        argv += [f"--workdir={workdir}", f"--input={base / 'scans'}", f"--output={base / name}"]
        argv += ["--pseudonymise"] * (command == "nameless")
    elif command == "export":
        argv += [f"--workdir={workdir}", f"--output={base / 'detector.zip'}"]
    else:
        more = {"steps": 2, "checkpoint_every": 1, "prompts.phrases": "ontology"}
        more |= {"prompts.ontology_file": base / "more/table.csv", "explained": 0}
        more |= {"model.language": base / "more/language.safetensors"}
        fields = world.fields(**more) | {"data.root": world.data, "k": 4}
        argv += [f"--config={base / 'more/settings.py'}", f"--workdir={workdir}"]
        argv += [f"--config.{field}={value}" for field, value in fields.items()]
    said, result = io.StringIO(), None
    with (
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        mock.patch.object(train, "score", reached if short else train.score),
        mock.patch.object(figures, "png", charted if short else figures.png),
    ):
        if short and command in LEARNED:
            try:
                code = program.main(["medclip_jax", *argv])
            except Reached as end:
                result, code = end.args[0], 0
        elif command == "load":
            try:
                result, code = scores(base / "detector.zip"), 0
            except UserError as error:
                print(f"error: {error}")
                code = 2
        else:
            code = program.main(["medclip_jax", *argv])
    return code, result, said.getvalue()


def prepare(scene: Scene, command: str) -> None:
    """What makes a command work on the files instead of finding all done."""
    run, steps = scene.base / "run", scene.base / "run/checkpoints"
    if command in ("resume", "restart"):
        (run / "metrics.json").unlink(missing_ok=True)
    if command == "restart":  # stopped after the first of two steps
        shutil.rmtree(steps / "2", ignore_errors=True)


def outcome(scene: Scene, folder: str, ignored: str) -> Any:
    """What can be compared of a run or a prediction; without the rows that name `ignored`."""
    place = scene.base / folder
    if folder in ("run", "new"):
        metrics = json.loads((place / "metrics.json").read_text())
        for name in ("timing", "finished", "digest", "versions"):
            metrics.pop(name)
        with np.load(place / "predictions.npz") as arrays:
            arrays = {name: arrays[name].tobytes() for name in arrays.files}
        scorer = json.loads((place / "scorer.json").read_text())
        return metrics, arrays, (place / "scorer.safetensors").read_bytes(), scorer["calibration"]
    with (place / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if not ignored or ignored not in row["source"]]
    for row in rows:
        page = json.loads((place / row["result"]).read_text())
        for what, name in page["files"].items():
            dicom = name.endswith(".dcm") and pydicom.dcmread(place / name)
            row[what] = dicom.PixelData if dicom else (place / name).read_bytes()
    return sorted(rows, key=repr)


def damage(scene: Scene, rng: np.random.Generator, path: Path) -> str:
    """Damage one file; returns how."""
    ways = ["bytes"] * 6 + ["bit", "zeros", "end", "empty", "half", "gone", "folder", "link"]
    ways += ["dangling", "pipe", "other", "odd"]
    ways += ["json"] * 8 * path.name.endswith((".json", ".jsonl", "_METADATA", "_sharding"))
    way = str(rng.choice(ways))
    raw = bytearray(path.read_bytes())
    at = int(rng.integers(len(raw) or 1))
    if way == "bytes":
        path.write_bytes(broken(rng, bytes(raw)) if raw else b"x")
    elif way == "bit" and raw:
        raw[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
    elif way == "zeros":
        raw[at : at + 512] = bytes(len(raw[at : at + 512]))
        path.write_bytes(raw)
    elif way == "end":
        path.write_bytes(raw + rng.bytes(int(rng.integers(1, 600))))
    elif way in ("empty", "half"):
        path.write_bytes(raw[: len(raw) // 2 if way == "half" else 0])
    elif way == "odd":
        odd = [b"[" * 100_000, b'{"a":' * 5000, b"null", b"NaN", b"\xff\xfe", b"PK\3\4", b"{}\n"]
        path.write_bytes(odd[int(rng.integers(len(odd)))])
    elif way == "json":
        path.write_bytes(altered_text(rng, bytes(raw)))
    elif way == "other":  # of the same kind, but of something else
        others = [p for p in scene.whole.rglob(f"*{path.suffix}") if p.is_file()]
        path.write_bytes(others[int(rng.integers(len(others)))].read_bytes())
    else:
        path.unlink()
        if way == "folder":
            path.mkdir()
        elif way == "link":
            path.symlink_to(scene.whole / path.relative_to(scene.base))
        elif way == "dangling":
            path.symlink_to("/no/such/file")
        elif way == "pipe":
            os.mkfifo(path)
    return way


def altered_text(rng: np.random.Generator, raw: bytes) -> bytes:
    """A JSON file, or one line of several, with one value that does not belong there."""
    lines = raw.splitlines() if raw.count(b"\n{") else [raw]
    at = int(rng.integers(len(lines)))
    try:
        value = json.loads(lines[at])
        altered(value, rng)
    except (ValueError, TypeError, IndexError):
        value = {}
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


def restore(scene: Scene) -> None:
    """Everything as it was; only what differs is copied."""
    for place in (*scene.base.rglob("*"), scene.base / "new"):
        twin = scene.whole / place.relative_to(scene.base)
        same = twin.is_dir() if place.is_dir() and not place.is_symlink() else twin.is_file()
        if not same or (place.is_symlink() or place.is_fifo()):
            remove(place)
    for twin in scene.whole.rglob("*"):
        place = scene.base / twin.relative_to(scene.whole)
        if twin.is_dir():
            place.mkdir(exist_ok=True)
        elif not place.exists() or place.stat().st_mtime_ns != twin.stat().st_mtime_ns:
            remove(place)
            shutil.copy2(twin, place)


def remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def case(scene: Scene, number: int, seed: int) -> tuple[str, dict]:
    """The verdict on one case, and what it was."""
    rng = np.random.default_rng([seed, number])
    names, weights = list(GROUPS), np.array([weight for _, weight in GROUPS.values()], float)
    group = str(rng.choice(names, p=weights / weights.sum()))
    candidates = sorted(p for p in scene.base.glob(group) if p.is_file())
    if not group.endswith(".pseudonyms"):
        candidates = [p for p in candidates if p.name != ".pseudonyms"]
    if not candidates:
        return "nothing", {}
    path = candidates[int(rng.integers(len(candidates)))]
    command = str(rng.choice(GROUPS[group][0]))
    name = str(path.relative_to(scene.base))
    prepare(scene, command)
    if not path.exists():
        return "nothing", {}
    about = {"case": number, "file": name, "command": command, "way": damage(scene, rng, path)}
    print(json.dumps(about), flush=True)
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        code, result, said = call(scene, command, short=rng.random() > FULL)
    except BaseException as error:
        about |= {"error": repr(error)[:300], "at": traceback.format_exc().splitlines()[-7:]}
        return "traceback", about
    finally:
        faulthandler.cancel_dump_traceback_later()
    about |= {"code": code, "said": said.strip()[-400:]}
    if code:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        fine = code == 2 and len(errors) == 1 and said.rstrip().endswith(errors[0])
        return "refused" if fine and len(errors[0]) > 40 else "unclear", about
    return judge(scene, command, name, result), about


def judge(scene: Scene, command: str, name: str, result: Any) -> str:
    """Whether a command that ended well left the right result."""
    if command == "nameless" and name.startswith("scans/"):
        return "read"
    try:
        if is_same(scene, command, name, result):
            return "right"
    except Exception as error:
        return f"silent: {type(error).__name__}: {error}"[:200]
    return "read" if name.startswith(INPUTS) else "silent"


def is_same(scene: Scene, command: str, name: str, result: Any) -> bool:
    """Whether it is what the whole files give."""
    results = scene.results
    if command in ("predict", "nameless"):
        folder = "out" if command == "predict" else "nameless"
        ignored = Path(name).parts[1] if name.startswith("scans/") else ""
        wanted = [r for r in results[folder] if not ignored or ignored not in r["source"]]
        return outcome(scene, folder, ignored) == wanted
    if command == "report":
        return (scene.base / "run/report.html").read_bytes() in results["report"]
    if command == "export":
        return scores(scene.base / "detector.zip") == results["load"]
    if command == "load":
        return result == results["load"]
    if command in LEARNED and result is not None:
        return result == results["learned"]
    folder = "new" if command == "fresh" else "run"
    return command not in LEARNED or outcome(scene, folder, "") == results["run"]


def run(base: Path, first: int, cases: int, seed: int) -> dict[str, Any]:
    """Counts of verdicts; raises nothing, prints each case that is not as it may be."""
    scene, counts, bad = build(base), Counter[str](), []
    for number in range(first, first + cases):
        restore(scene)
        verdict, about = case(scene, number, seed)
        counts[verdict.partition(":")[0]] += 1
        if verdict in ("right", "refused", "read", "nothing"):
            about = {"case": number}
        else:
            bad.append(about)
        print(json.dumps({"verdict": verdict} | about), flush=True)
    return {"cases": cases, "counts": dict(counts), "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="where the run lies; used again if it is there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        done = run(given.base or Path(folder), given.first, given.cases, given.seed)
    print(json.dumps({**done, "bad": len(done["bad"])}))


if __name__ == "__main__":
    main()
