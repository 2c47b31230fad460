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

from medclip_jax.errors import WorkdirError
from medclip_jax.report import html as report_html
from medclip_jax.report import load
from medclip_jax.report.html import text
from tests.support.workdirs import EVIL, edit, keep_pictures, make_workdir, seal

NAMES = ("loss", "roc", "scores", "calibration", "risk_coverage", "deletion", "gallery")


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
    report_html.write(folder)
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
    assert len(page.sources) == len(page.alts) == 9  # six charts and three pages of the gallery
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


def test_lesions_and_froc_are_listed(workdir):
    files = load.read(workdir)
    froc = {"0.1": {"sensitivity": [0.125] * 6 + [0.75], "mean": 0.25}}
    rates = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    lesions = {"count": 40, "small_count": 3, "recall": 0.5, "small_recall": None}
    lesions |= {"boxes_per_healthy_image": 0.1, "false_positives": rates, "froc": froc}
    charts = dict.fromkeys(NAMES, b"")
    files = files._replace(metrics=files.metrics | {"lesions": lesions})
    words = Page(report_html.page(files, charts, [], [])).text
    assert "lesions 40" in words and "recall of small lesions undefined" in words
    assert "IoU 0.125 0.25 0.5 1 2 4 8 mean 0.1" in words and "0.12 0.75 0.25" in words


def test_intervals_stand_beside_their_metrics(html):
    words = Page(html).text
    assert "recall 0.7500 0.6123 to 0.8500" in words and "Dice 0.4321 0.4100 to 0.4567" in words


def test_checks_of_explanations_are_a_table(html):
    words = Page(html).text
    for row in (
        "(pointing game) 0.7125 0.5625 0.1234 by chance, 36 images with a mask; 2 Grad-CAM empty",
        "Mean score in deletion, less is better 0.4667 0.5000 0.5667 random",
        "Rank correlation of Grad-CAM and map – 0.8123",
        "itself, all blocks of the encoder randomised 0.0321 undefined near 1",
    ):
        assert row in words, row


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
        "clip.layers [3, 6]",
    ):
        assert phrase.lower() in words.lower()


def test_units_of_distances_and_the_name_of_the_explanation(tmp_path):
    folder = make_workdir(tmp_path / "run", n=10)
    metrics = json.loads((folder / "metrics.json").read_text())
    edit(folder, pixel={**metrics["pixel"], "distance_unit": "px", "boundary_tolerance": 2})
    config = json.loads((folder / "config.json").read_text())
    config["explanation"] = {"method": "grad_cam_pp", "layer": 1}
    (folder / "config.json").write_text(json.dumps(config))
    html = report_html.write(folder).read_text()
    words = Page(html).text
    assert "unit of distances and tolerance px" in words
    assert "tolerance of boundary F1 2" in words and "px are pixels of the square" in words
    assert "Rank correlation of Grad-CAM++, layer 1 and map" in words
    assert '"cam":"Grad-CAM++, layer 1"' in html
    assert "over MC-dropout, 0 to 0.0625" in words


def test_rebuilding_gives_the_same_bytes(workdir, html):
    before = {p.name: p.read_bytes() for p in (workdir / "figures").iterdir()}
    assert set(before) == {f"{name}.png" for name in NAMES}
    report_html.write(workdir)
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
def test_a_missing_or_corrupt_file_is_named(tmp_path, name, command):
    folder = make_workdir(tmp_path, n=10)
    (folder / name).write_bytes(b"\x00not what it should be\n")
    with pytest.raises(WorkdirError, match=f"{name}.*run --mode {command}|Line 1 of .*{name}"):
        report_html.write(folder)
    (folder / name).unlink()
    with pytest.raises(WorkdirError, match=f"{name} is missing: run --mode {command}"):
        report_html.write(folder)
    assert not (folder / "report.html").exists()


def test_a_key_that_metrics_json_lacks_is_named(tmp_path):
    folder = make_workdir(tmp_path, n=10)
    (folder / "metrics.json").write_text('{"dataset": "x"}')
    with pytest.raises(WorkdirError, match="'k' is not in it"):
        report_html.write(folder)


def test_without_masks_pixel_metrics_are_undefined(tmp_path):
    folder = make_workdir(tmp_path, n=12)
    edit(folder, pixel=None, calibration=None, explanations=None)
    text = Page(report_html.write(folder).read_text()).text
    assert "Pixel metrics: undefined" in text and "no lesion masks" in text
    assert "Calibration: undefined" in text
    assert "Nothing was checked" in text
    assert "Over pixels" not in text


def test_one_class_and_missing_pictures_and_predictions_are_reported(tmp_path):
    folder = make_workdir(tmp_path, label=np.zeros(10, np.int32))
    keep_pictures(folder, [2, 7])
    split = json.loads((folder / "split.json").read_text())
    split["test"] += [{"id": "another", "sha256": "", "label": 0}]
    (folder / "split.json").write_text(json.dumps(split))
    seal(folder)
    html = report_html.write(folder).read_text()
    text = Page(html).text
    assert "image AUROC is undefined, as all test images are of one class" in text
    assert "AUROC undefined" in text and "1 of the test images in split.json" in text
    assert "shows 2 images, sampled by seed" in text
    images = json.loads(re.search(r'id="viewer-data">(.*?)</script>', html)[1])["images"]
    assert [i for i, row in enumerate(images) if row] == [2, 7]
    assert html.count('<td data-v="-1">–</td>') == 8 and "test/0009.png" in html


@pytest.mark.parametrize(
    "label, shares",
    [
        ([0] * 10, "it flags 12.5% of the healthy images"),
        ([1] * 10, "it flags 75.0% of the abnormal images"),
        ([0, 1] * 5, "it flags 75.0% of the abnormal and 12.5% of the healthy images"),
    ],
)
@pytest.mark.parametrize("k", [0, 16])
def test_what_is_flagged_and_where_the_threshold_is_from(tmp_path, label, shares, k):
    folder = make_workdir(tmp_path, label=np.array(label, np.int32))
    edit(folder, k=k, calibration={"k": k, "message": "-"})
    text = Page(report_html.write(folder).read_text()).text
    origin = "set from healthy images alone" if k else "where the prompts give probability 0.5"
    assert f"At the threshold {origin} {shares}." in text
    assert f"The threshold of 0.5 is {origin};" in text and f"is the threshold {origin}." in text
    assert f"Images are flagged from 0.5 on, the threshold {origin}." in text
    assert ("healthy images alone" in text) == bool(k) and "calibrated threshold" not in text


@pytest.mark.parametrize("k, calibrating", [(0, 0), (1, 1), (16, 16), (16, 200)])
def test_limits_are_those_of_what_calibrated(tmp_path, k, calibrating):
    """Of config.calibration.extra where there is one; fewer than two images keep no rate."""
    files = load.read(make_workdir(tmp_path, n=10))
    metrics = files.metrics | {"k": k, "calibration": {"k": calibrating, "message": "-"}}
    files = files._replace(metrics=metrics)
    words = Page(report_html.page(files, dict.fromkeys(NAMES, b""), [], [])).text
    assert ("false-alarm rate that can be kept" in words) == (calibrating > 1)
    assert f"can be kept is 1/{calibrating + 1}. The" in words or calibrating < 2
    assert f"what {calibrating} healthy images allow by chance" in words
    assert ("This is one sample of" in words) == bool(k)


def test_no_jax_and_no_pyplot(workdir):
    code = (
        "import sys; from medclip_jax.report import html; html.write(sys.argv[1]); "
        "bad = {'jax', 'flax', 'matplotlib.pyplot'} & set(sys.modules); print(sorted(bad))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


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


def test_nothing_of_a_setting_is_a_control_character(tmp_path):
    """Escape codes, a turned writing direction and bytes that are no text, wherever they are."""
    folder = make_workdir(tmp_path / "run")
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | {"note": "a\x1b[31mb\u202ec\udcffd"}
    path.write_text(json.dumps(settings))
    seal(folder)
    page = report_html.write(folder).read_text()
    assert all(c.isprintable() or c == "\n" for c in page)
    assert r"a\x1b[31mb\u202ec\udcffd" in page
