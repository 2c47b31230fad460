"""The report, from a made-up workdir: every figure, every number, nothing from outside."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from medclip_jax import figures, gallery, report
from medclip_jax.errors import WorkdirError
from medclip_jax.explain import Box
from medclip_jax.report import text

NAMES = ("loss", "roc", "scores", "calibration", "risk_coverage", "gallery")
EVIL = "benign/<script>alert(1)</script> & $x_1$.png"


def image_with_lesion(rng, h, w, abnormal):
    """A grey speckle image, its mask and a map that marks the lesion."""
    y, x = np.mgrid[:h, :w]
    blob = np.exp(-(((y - h * 0.4) / (h * 0.12)) ** 2 + ((x - w * 0.6) / (w * 0.15)) ** 2))
    noise = rng.normal(0, 0.08, (h, w))
    image = np.clip(0.35 + 0.25 * np.sin(x / w * 3) + noise - 0.3 * blob * abnormal, 0, 1)
    map = np.clip(0.2 + 0.03 * rng.normal(size=(h, w)) + 0.6 * blob * abnormal, 0, 1)
    mask = (blob > 0.5) & bool(abnormal)
    return (image * 255).astype(np.uint8), map.astype(np.float16), mask.astype(np.uint8)


def small_copies(rng, label):
    """As thumbnails.pack leaves them, from images in memory."""
    from medclip_jax import thumbnails

    files = {name: [] for name in thumbnails.FILES}
    frames = []
    for i, y in enumerate(label):
        image, map, mask = image_with_lesion(rng, *((90, 120), (120, 80), (100, 100))[i % 3], y)
        frames.append(image.shape)
        files["thumb"].append(thumbnails._file(Image.fromarray(image), "JPEG"))
        lesion = thumbnails._file(Image.fromarray(mask * 255), "PNG") if y else b""
        files["thumb_mask"].append(lesion)
        grey = thumbnails._grey(map.astype(np.float32))
        files["thumb_map"].append(grey)
        files["thumb_cam"].append(grey if i % 2 else b"")
    joined = {}
    for name, parts in files.items():
        joined |= thumbnails._joined(name, parts)
    return {**joined, "frame": np.array(frames)}


def write_arrays(folder, rng, label, score, shown):
    n = len(label)
    k = 16
    calibration = rng.normal(0.4, 0.08, k)
    p_value = (1 + (calibration[None] >= score[:, None]).sum(1)) / (k + 1)
    ids = np.array([f"test/{i:04d}.png" for i in range(n)], dtype="U80")
    ids[0] = EVIL
    chosen = np.unique(np.linspace(0, n - 1, shown).astype(int))
    arrays = {"gallery_index": chosen, **small_copies(rng, label)}
    for row, i in enumerate(chosen):
        shape = ((90, 120), (120, 80), (100, 100))[row % 3]
        image, map, mask = image_with_lesion(rng, *shape, label[i])
        arrays |= {f"gallery_image_{row}": image, f"gallery_map_{row}": map}
        if row % 4 != 3:
            arrays[f"gallery_mask_{row}"] = mask
    np.savez(
        folder / "predictions.npz",
        id=ids,
        label=label,
        score=score.astype(np.float32),
        p_value=p_value.astype(np.float32),
        uncertainty=np.abs(0.1 - np.abs(score - 0.5) / 5) + rng.uniform(0, 0.02, n),
        maps=np.zeros((n, 4, 4), np.float16),
        **arrays,
    )
    return ids


def metrics_of(label, score):
    """Numbers as evaluate would write them; the report must print them, never recompute them."""
    both = len(set(label)) == 2
    image = {"auroc": roc_auc_score(label, score) if both else None, "auprc": 0.87654321}
    image |= {"accuracy": 0.8125, "precision": 0.9, "recall": 0.75, "f1": 0.81818, "mcc": None}
    image |= {"specificity": 0.875, "fpr": 0.125, "tpr": 0.75, "threshold": 0.5}
    pixel = {"auroc": 0.93217, "dice": 0.4321, "iou": 0.2756, "hausdorff": 31.25, "tp": 12345}
    pixel |= {"hausdorff95": None, "aupro": 0.70007}
    return {
        "dataset": "phantom",
        "k": 16,
        "seed": 3,
        "split": "clean",
        "method": "maml",
        "backbone": "compact",
        "image": image,
        "pixel": pixel,
        "intervals": {"image": {"recall": [0.61234, 0.85]}, "pixel": {"dice": [0.41, 0.4567]}},
        "calibration": {
            "alpha_requested": 0.05,
            "alpha_attained": 1 / 17,
            "k": 16,
            "false_alarm_rate": 0.0833,
            "message": "With K = 16 the smallest level is 0.059, not 0.050 <b>.",
        },
        "timing": {"encode": 12.5, "train": 61.25, "score_test": 3.0},
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    }


def make_workdir(folder, *, n=60, label=None, shown=5):
    """A workdir as train and evaluate leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    label = (np.arange(n) % 5 > 1).astype(np.int32) if label is None else label
    score = np.clip(rng.normal(0.42 + 0.2 * label, 0.1), 0.01, 0.99)
    ids = write_arrays(folder, rng, label, score, shown)
    rows = [
        {"step": s, "loss": 5 * np.exp(-s / 60) + 0.5, "focal": 1 / (1 + s), "dice": 0.9 - s / 500}
        for s in range(0, 200, 10)
    ]
    rows[7] |= {"dice": None, "nonfinite": ["dice"]}
    lines = [json.dumps({**row, "seconds": 0.1 * row["step"]}) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    support = [
        {"id": f"train/<i>{i}</i>.png", "sha256": f"{i:064x}", "label": 0} for i in range(16)
    ]
    test = [
        {"id": str(i), "sha256": "0" * 64, "label": int(y)} for i, y in zip(ids, label, strict=True)
    ]
    split = {"dataset": "phantom", "k": 16, "seed": 3, "kind": "clean", "support": support}
    (folder / "split.json").write_text(json.dumps({**split, "test": test}))
    (folder / "metrics.json").write_text(json.dumps(metrics_of(label, score)))
    config = {"data": {"name": "phantom", "k": 16}, "clip": {"levels": [3, 6]}, "note": "<script>"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def edit(folder, **changes):
    path = folder / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Page(HTMLParser):
    """Tags, image sources, alt texts, exact values in tables by name, and the plain text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.alts, self.values, self.words = [], [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.sources.append(attrs["src"])
            self.alts.append(attrs["alt"])
        if tag == "data":
            self.values.append(attrs["value"])

    def handle_data(self, data):
        if not self.tags or self.tags[-1] not in ("style", "script") or data.strip() == "":
            self.words.append(data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = make_workdir(tmp_path_factory.mktemp("run"))
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def html(workdir):
    return (workdir / "report.html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_figure_is_a_real_png(workdir, name):
    with Image.open(workdir / "figures" / f"{name}.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert np.asarray(image.convert("L")).std() > 5  # more than an empty sheet


def test_the_page_needs_nothing_from_outside(html):
    page = Page(html)
    assert "link" not in page.tags and "iframe" not in page.tags
    assert page.tags.count("script") == 2  # data, and our own code, which the policy knows by hash
    code = re.search(r"<script>(.*?)</script>", html, re.S)[1]
    known = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{known}" in html or f"script-src 'sha256-{known}'" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|url\(|@import""", html)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == len(page.alts) == 7  # five charts and two pages of the gallery
    assert all(len(alt) > 20 for alt in page.alts)
    for source in page.sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).verify()


def test_strings_from_files_are_escaped(html):
    assert "<script>alert" not in html and "<i>" not in html and "<b>" not in html
    text = Page(html).text
    assert EVIL in text and "train/<i>3</i>.png" in text and "note <script>" in text


def test_the_numbers_are_those_of_metrics_json(workdir, html):
    metrics = json.loads((workdir / "metrics.json").read_text())
    page = Page(html)
    for part in ("image", "pixel", "timing"):
        for name, value in metrics[part].items():
            if value is not None:
                assert str(value) in page.values, (part, name)
                assert text(value) in page.text, (part, name)
    auroc = metrics["image"]["auroc"]
    assert f"image AUROC {auroc:.4f}" in page.text
    assert "flags 75.0% of the abnormal and 12.5% of the healthy images" in page.text
    assert "tested on 60 images of phantom: 24 healthy, 36 abnormal" in page.text
    assert "Matthews correlation undefined" in page.text
    assert "Hausdorff distance, 95th percentile undefined" in page.text
    assert "observed false-alarm rate is 0.0833" in page.text


def test_intervals_stand_beside_their_metrics(html):
    words = Page(html).text
    assert "recall 0.7500 0.6123 to 0.8500" in words and "Dice 0.4321 0.4100 to 0.4567" in words


def test_page_names_run_supports_versions_and_limits(html):
    words = Page(html).text
    for phrase in (
        "phantom, K = 16, seed 3",
        "method maml",
        "backbone compact",
        "clean split",
        "research use only, not a medical device",
        "jax 0.10.2",
        "data.name phantom",
        "clip.levels [3, 6]",
    ):
        assert phrase.lower() in words.lower()


def test_rebuilding_gives_the_same_bytes(workdir, html):
    before = {p.name: p.read_bytes() for p in (workdir / "figures").iterdir()}
    assert set(before) == {f"{name}.png" for name in NAMES}
    report.write(workdir)
    assert (workdir / "report.html").read_text() == html
    assert {p.name: p.read_bytes() for p in (workdir / "figures").iterdir()} == before


@pytest.mark.parametrize(
    "name, command",
    [
        ("config.json", "train"),
        ("metrics.jsonl", "train"),
        ("split.json", "train"),
        ("metrics.json", "evaluate"),
        ("predictions.npz", "evaluate"),
    ],
)
def test_a_missing_or_spoilt_file_is_named(tmp_path, name, command):
    folder = make_workdir(tmp_path, n=10, shown=1)
    (folder / name).write_bytes(b"\x00not what it should be\n")
    with pytest.raises(WorkdirError, match=f"{name}.*run `{command}`|Line 1 of .*{name}"):
        report.write(folder)
    (folder / name).unlink()
    with pytest.raises(WorkdirError, match=f"{name} is missing: run `{command}`"):
        report.write(folder)
    assert not (folder / "report.html").exists()


def test_a_key_that_metrics_json_lacks_is_named(tmp_path):
    folder = make_workdir(tmp_path, n=10, shown=1)
    (folder / "metrics.json").write_text('{"dataset": "x"}')
    with pytest.raises(WorkdirError, match="'k' is not in it"):
        report.write(folder)


def test_a_gallery_of_two_frames_is_refused(tmp_path):
    folder = make_workdir(tmp_path, n=10, shown=1)
    with np.load(folder / "predictions.npz") as held:
        arrays = {**held, "gallery_map_0": np.zeros((8, 8), np.float16)}
    np.savez(folder / "predictions.npz", **arrays)
    with pytest.raises(WorkdirError, match="row 0 are not of one shape"):
        report.write(folder)


def test_without_masks_pixel_metrics_are_undefined(tmp_path):
    folder = make_workdir(tmp_path, n=12, shown=0)
    edit(folder, pixel=None, calibration=None)
    text = Page(report.write(folder).read_text()).text
    assert "Pixel metrics: undefined" in text and "no lesion masks" in text
    assert "Calibration: undefined" in text
    assert "Over pixels" not in text


@pytest.mark.parametrize("only", [0, 1])
def test_one_class_is_said_not_hidden(tmp_path, only):
    folder = make_workdir(tmp_path, label=np.full(9, only, np.int32), shown=1)
    html = report.write(folder).read_text()
    assert "image AUROC is undefined, as all test images are of one class" in Page(html).text
    assert "AUROC undefined" in Page(html).text
    assert all((folder / "figures" / f"{name}.png").exists() for name in NAMES)


def test_fewer_predictions_than_the_split_is_said(tmp_path):
    folder = make_workdir(tmp_path, n=10, shown=1)
    split = json.loads((folder / "split.json").read_text())
    split["test"] += [{"id": "another", "sha256": "", "label": 0}]
    (folder / "split.json").write_text(json.dumps(split))
    assert "1 of the test images in split.json" in Page(report.write(folder).read_text()).text


def test_no_jax_and_no_pyplot(workdir):
    code = (
        "import sys; from medclip_jax import report; report.write(sys.argv[1]); "
        "bad = {'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules); print(sorted(bad))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_gallery_keeps_scale_frame_and_pixels():
    """Two rows with other image contents: the colour of a map value is the same in both."""
    image = np.zeros((50, 50), np.uint8)
    low, high = np.full((50, 50), 0.25, np.float32), np.full((50, 50), 0.25, np.float32)
    high[10:20, 10:20] = 1.0
    panels = [gallery.Panel("a", image, m, None, ()) for m in (low, high)]
    sheet = np.asarray(Image.open(io.BytesIO(gallery.pages(panels)[0])).convert("RGB"))
    dpi, left, wide, gap, top = figures.DPI, 1.15, 2.2, 0.08, 0.35
    x = int((left + wide + gap + 0.9 * wide) * dpi)
    rows = [int((top + 0.9 * wide + i * (wide + gap)) * dpi) for i in range(2)]
    assert (sheet[rows[0], x] == sheet[rows[1], x]).all()
    bright = int((left + wide + gap + 0.3 * wide) * dpi), int((top + wide * 1.3 + gap) * dpi)
    assert sheet[bright[1], bright[0]].sum() > 2 * sheet[rows[1], x].sum()


def test_gallery_draws_boxes_where_they_are():
    image = np.zeros((100, 100), np.uint8)
    box = Box(20, 40, 60, 80, 0.9, 1600)
    panels = [gallery.Panel("a", image, np.zeros((100, 100), np.float32), None, (box,))]
    sheet = np.asarray(Image.open(io.BytesIO(gallery.pages(panels)[0])).convert("RGB")).astype(int)
    left, top, size = 1.15 + 2 * 2.28, 0.35, 2.2
    panel = sheet[
        int(top * figures.DPI) : int((top + size) * figures.DPI),
        int(left * figures.DPI) : int((left + size) * figures.DPI),
    ]
    orange = np.abs(panel - np.array([230, 159, 0])[None, None]).sum(2) < 30
    rows, columns = np.nonzero(orange)
    edges = np.array([rows.min(), rows.max(), columns.min(), columns.max()]) / panel.shape[0]
    np.testing.assert_allclose(edges, (0.2, 0.6, 0.4, 0.8), atol=0.012)


@pytest.mark.parametrize(
    "value, shown",
    [
        (None, "undefined"),
        (float("nan"), "undefined"),
        (0.91236, "0.9124"),
        (0.0, "0.0000"),
        (2e-5, "2e-05"),
        (31.25, "31.2500"),
        (7, "7"),
        (True, "yes"),
    ],
)
def test_values_as_printed(value, shown):
    assert text(value) == shown
