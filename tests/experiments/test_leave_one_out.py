"""Leave one modality out: K = 1, the default method as a rival, and maps that are shared."""

import json
import resource
from types import SimpleNamespace

import jax
import leave_one_out
import looks
import numpy as np
import pytest

from medclip_jax import config, train
from medclip_jax.data import phantom, splits
from medclip_jax.detectors import deviation, memory_bank
from medclip_jax.errors import UserError, WorkdirError
from medclip_jax.models import similarity
from medclip_jax.training import meta
from tests.support.checkpoints import tiny_checkpoint

TARGET, *OTHERS = SETS = ("oct_mx", "fundus_mx", "derm_ph2")
AFFINITY = 0.4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three sets of 64 pixels and a tiny CLIP; every config is of them."""
    base = tmp_path_factory.mktemp("modalities")
    clip, *_ = tiny_checkpoint(base / "clip")
    for seed, (name, look) in enumerate(zip(SETS, ("mri", "ultrasound", "xray"), strict=True)):
        phantom.write_folder(base / "data" / "sets" / name, look, seed, 64, 18, 9, 8)
    fields = {"cache": str(base / "cache"), "clip.checkpoint": str(clip), "steps": 2}
    fields |= {"synthesis.variants": 4, "score.affinity": AFFINITY}
    real = config.base

    def small(*arg, **data):
        c = real(*arg, **data)
        c.update_from_flattened_dict(fields)
        return c

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "base", small)
        patch.setattr(meta, "TASKS", 2)
        patch.setattr(
            leave_one_out.catalog, "with_role", lambda role: SETS if role == "development" else ()
        )
        yield SimpleNamespace(root=base / "data", out=base / "out")


@pytest.fixture(scope="module")
def data(world):
    return leave_one_out.Data(world.root)


@pytest.fixture(scope="module")
def done(world):
    """The command's lines at K = 1 and 4, and what it measured pixels of."""
    seen = SimpleNamespace(scored=[], patches=[])
    scores, pixel_auroc = leave_one_out.scores, leave_one_out.pixel_auroc

    def recorded(*args):
        seen.scored.append((args[3], scores(*args)))
        return seen.scored[-1][1]

    def measured(masks, patches):
        seen.patches.append(patches)
        return pixel_auroc(masks, patches)

    flags = f"--root {world.root} --out {world.out} --targets {TARGET} --k 1 4 --draws 1 --steps 2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["", *flags.split(), "--learners", "joint", "ours"])
        patch.setattr(leave_one_out, "scores", recorded)
        patch.setattr(leave_one_out, "pixel_auroc", measured)
        leave_one_out.main()
    seen.rows = [json.loads(x) for x in (world.out / "scores.jsonl").read_text().splitlines()]
    return seen


@pytest.mark.slow
def test_every_learner_and_rival_at_every_k(done, world, monkeypatch, capsys):
    names = ["memory", "zero-shot", "scratch", "joint", "ours"]
    assert [(x["k"], x["learner"]) for x in done.rows] == [(k, n) for k in (1, 4) for n in names]
    for row in done.rows:
        learns, maps = row["learner"] in ("scratch", "joint"), row["learner"] != "zero-shot"
        expected = {"0", *(("1", "5", "20", "100", "area") if learns else ())}
        expected |= {f"pixel {s}" for s in ("0", *("1" * learns))} if maps else set()
        assert expected == row.keys() - {"target", "k", "draw", "learner", "rate"}
        assert all(0 <= row[name] <= 1 for name in expected)
    monkeypatch.setattr("sys.argv", ["", "--out", str(world.out), "--table"])
    leave_one_out.main()
    lines = [x.split(" | ") for x in capsys.readouterr().out.splitlines()]
    assert [x[0].split()[:2] for x in lines] == [[str(k), n] for k in (1, 4) for n in names[::-1]]
    ours = next(x for x in done.rows if x["k"] == 1 and x["learner"] == "ours")
    assert lines[0][:2] == [f"1 ours {ours['0']:.3f}", f"pixel {ours['pixel 0']:.3f}"]


def test_a_target_whose_lines_do_not_fit_on_the_disk_is_not_half_there(tmp_path, monkeypatch):
    """Half of a target would be taken for all of it, half of a line end the next start."""
    file, row = tmp_path / "scores.jsonl", {"target": "a", "k": 1, "draw": 0, "rate": 0, "0": 0.5}
    file.write_text(json.dumps(row) + "\n")
    before = file.read_bytes()
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path), "--targets", TARGET])
    monkeypatch.setattr(leave_one_out, "Data", lambda *_: None)
    monkeypatch.setattr(leave_one_out, "measure", lambda *_: [row | {"target": TARGET}] * 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(WorkdirError):
            leave_one_out.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    leave_one_out.main()
    assert [json.loads(x)["target"] for x in file.read_text().splitlines()] == ["a"] + [TARGET] * 9


@pytest.mark.parametrize("content", [None, ""])
def test_a_table_of_nothing_is_one_sentence(tmp_path, monkeypatch, content):
    out = tmp_path / "out"
    if content is not None:
        out.mkdir()
        (out / "scores.jsonl").write_text(content)
    monkeypatch.setattr("sys.argv", ["", "--out", str(out), "--table"])
    with pytest.raises(UserError, match=r"scores\.jsonl holds no finished target: run --targets"):
        leave_one_out.main()
    assert out.exists() == (content is not None)


def test_a_table_without_the_learners_that_others_are_compared_with(capsys):
    line = {"target": "a", "k": 1, "draw": 0, "rate": 0, "0": 0.75}
    leave_one_out.table([line | {"learner": "memory"}, line | {"learner": "ours", "0": 0.875}])
    assert "1 ours 0.875 | memory +0.125 (" in capsys.readouterr().out


def test_a_table_compares_what_both_learners_have(capsys):
    """`ours` on one of eight targets, .01 better there; equal learners are no evidence; an odd
    draw and a K without a learner leave the rest as it is."""
    base = {"k": 1, "rate": 0, "0": 0.75}
    joint = [
        base | {"learner": "joint", "target": t, "draw": d} for t in "abcdefgh" for d in (0, 1)
    ]
    lines = [x | {"0": 0.5 + 0.25 * (x["target"] == "b")} for x in joint]
    lines += [x | {"learner": "memory"} for x in lines]
    lines += [x | {"learner": "ours", "0": 0.76} for x in joint if x["target"] == "b"]
    lines += [lines[0] | {"learner": "ours", "target": "b", "draw": 9}, lines[0] | {"k": 4}]
    leave_one_out.table(lines)
    of = {
        x.split(" | ")[0].split()[1]: x.split(" | ")[1:]
        for x in capsys.readouterr().out.splitlines()[:3]
    }
    assert of["joint"] == ["memory +0.000 (+0.000 to +0.000) 0 of 8 p=1.00"]
    assert of["memory"] == ["joint +0.000 (+0.000 to +0.000) 0 of 8 p=1.00"]
    assert of["ours"][0] == "joint +0.010 (+0.010 to +0.010) 1 of 1 p=1.00"


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4])
def test_ours_is_the_packages_run_of_the_same_draw(done, world, tmp_path, k):
    """Of the same supports and test images: what the command line gives for them."""
    c = config.base(f"k={k}", name=TARGET, root=str(world.root), **leave_one_out.WORDS[TARGET])
    c.clip.dtype, c.explained = "float16", 0
    whole = train.run(c, tmp_path, report=False)
    (own,) = [x for x in done.rows if x["k"] == k and x["learner"] == "ours"]
    assert own["0"] == pytest.approx(whole["image"]["auroc"], abs=1e-9)


@pytest.mark.slow
def test_pixels_are_of_shared_maps(done):
    """Of memory and heads as of the default method, whose maps the package has shared."""
    for place, (test, scored) in zip((0, 6), done.scored, strict=True):
        patches = done.patches[place : place + 6]
        assert [x.shape[1] for x in patches] == [4, 4, 4, 4, 4, 32 * 32]
        share = np.asarray(similarity.affinity(jax.numpy.asarray(test.levels[1]), AFFINITY))
        raw = [scored["memory", 0][0], *(scored["scratch", 0.05][s] for s in (0, 1))]
        for found, scores in zip(patches[:3], raw, strict=True):
            expected = np.einsum("npq,nq->np", share, np.asarray(scores.patch))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert np.abs(found - scores.patch).max() > 1e-3


def test_a_single_support_is_compared_with_its_views(data):
    support = splits.split(data.records(TARGET), 2, 0).support
    one, two = data.support(support[:1]), data.support(support)
    assert len(one.healthy.pooled) == 11 and len(two.healthy.pooled) == 2
    np.testing.assert_array_equal(one.healthy.levels[0][0], two.healthy.levels[0][0])
    white = meta.whitening_of([data.source(name) for name in OTHERS])
    rows, memory = meta.target_rows(white, one, np.arange(11))
    healthy = np.asarray(rows.seen.patch[:11]).sum(-1)
    assert (rows.label[:11] == 0).all() and (rows.label[11:] == 1).all() and len(rows.label) > 11
    assert 0 < memory.image[0] < 1 and (memory.spread > 0).all()
    np.testing.assert_allclose(healthy.mean(), 0, atol=1e-3)
    # an anomaly is not compared with the image that it was made of, from which it took patches
    assert np.abs(rows.seen.patch[11:]).max() > 0 and (rows.seen.image[11:] > -2).all()


def test_images_are_compared_as_if_one_by_one(data):
    """Forty images, which are no whole number of groups."""

    def forty(x):
        return jax.numpy.asarray(np.resize(x, (40, *x.shape[1:])), float)

    test, source = data.tokens(data.records(TARGET)), data.source(OTHERS[0])
    white = meta.whitening_of([source])
    test, healthy = (jax.tree.map(forty, x) for x in (test, source.healthy))
    memory = deviation.remember(white, healthy)
    own = tuple(x.reshape(-1, x.shape[-1]) for x in healthy.levels)
    near, seen = leave_one_out.compared(own, white, memory, test)
    expected = memory_bank.memory_distance(test.levels, own)
    np.testing.assert_allclose(near, expected, atol=1e-5)
    whole = deviation.deviation(white, memory, test, jax.numpy.full(40, -1))
    np.testing.assert_allclose(seen.patch, whole.patch, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen.image, whole.image, rtol=1e-3, atol=1e-3)


@pytest.fixture
def command(world, tmp_path, monkeypatch):
    """Runs the command; files of --freeze and --report lie in tmp_path."""
    roles = {"development": SETS[1:], "report": SETS[:1]}
    monkeypatch.setattr(leave_one_out.catalog, "with_role", roles.__getitem__)
    monkeypatch.setattr(leave_one_out, "FROZEN", tmp_path / "frozen.json")
    monkeypatch.setattr(looks, "LOOKS", tmp_path / "looks.csv")
    flags = f"--root {world.root} --out {tmp_path} --targets {TARGET} --k 4 --draws 1 --steps 2"

    def run(*more):
        monkeypatch.setattr("sys.argv", ["", *flags.split(), "--learners", "joint", *more])
        leave_one_out.main()

    return run


def test_report_sets_are_scored_as_frozen_and_the_look_is_a_line(command, tmp_path):
    with pytest.raises(UserError, match="add --report"):
        command()
    with pytest.raises(UserError, match="freeze the configuration first"):
        command("--report")
    with pytest.raises(SystemExit):
        command("--freeze")
    for flag, words in {
        "--steps=3": "settings: steps is 3, not 2",
        f"--sources={TARGET}": "nothing is learned",
        "--targets=fundus_mx": "give report sets",
    }.items():
        with pytest.raises(UserError, match=words):
            command("--report", flag)
    assert not (tmp_path / "looks.csv").exists() and not (tmp_path / "scores.jsonl").exists()
    command("--report")
    _, line = (tmp_path / "looks.csv").read_text().splitlines()
    assert line.endswith(f"{json.loads((tmp_path / 'frozen.json').read_text())['hash']},{TARGET}")
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_tokens_of_either_encoder(world):
    """Sources, supports, their synthetic anomalies and test images have the same ones."""
    one, both = (leave_one_out.Data(world.root, name) for name in ("memory", "both"))
    records = splits.split(one.records(TARGET), 2, 0).support
    widths = [x.shape[-1] for x in both.selected(both.tokens(records)).levels]
    assert len(widths) > 2
    for data, expected in ((one, widths[3:]), (both, widths)):
        support, views = data.support(records), data.support(records[:1])
        parts = [support.healthy, support.altered, views.healthy, data.source(OTHERS[0]).abnormal]
        for features in parts:
            assert [x.shape[-1] for x in features.levels] == expected


@pytest.mark.parametrize(
    "flag, words",
    [("--targets=nosuch", "nosuch"), ("--supports=0", "divide")]
    + [(f"--{name}=0", "1 or more") for name in ("k", "draws", "steps", "tasks")],
)
def test_flags_that_cannot_be_are_one_sentence(command, capsys, flag, words):
    with pytest.raises(SystemExit) as ended:
        command(flag)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_targets_and_sources_to_learn_from_are_needed(command, tmp_path, monkeypatch, capsys):
    """Without the first nothing was done, and nothing said; without the second, a traceback."""
    with pytest.raises(UserError, match="--sources: all have fundus_mx's modality"):
        command("--targets=fundus_mx", "--sources=fundus_mx")
    monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        leave_one_out.main()
    assert ended.value.code == 2 and "--targets: give one or more" in capsys.readouterr().err
