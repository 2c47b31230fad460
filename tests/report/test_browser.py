"""The report in a real browser: nothing on the console, sliders that count right, sorting."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medclip_jax.explain.boxes import MOST, SMALLEST
from medclip_jax.report import html, load
from tests.support.workdirs import EMPTY, EVIL, keep_pictures, make_workdir

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    not (BINARY and DRIVER),
    reason="no headless browser here: apt-get install chromium chromium-driver",
)
CONTROL = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'));"
PIXELS = """
const c = document.getElementById(arguments[0]);
return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data);
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = make_workdir(tmp_path_factory.mktemp("page"))
    html.write(folder)
    return folder


@pytest.fixture(scope="module")
def browser(workdir):
    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get((workdir / "report.html").as_uri())
        yield driver
        said = [e for e in driver.get_log("browser") if e["level"] != "INFO"]
        # the tests read canvases, and the browser has advice on that
        assert [e for e in said if "readback" not in e["message"]] == []
    finally:
        driver.quit()


@pytest.fixture
def scores(workdir):
    with np.load(workdir / "predictions.npz") as stored:
        return stored["score"].astype(float), stored["label"]


def by(browser, name):
    return browser.find_element("id", name)


def order(browser):
    script = "return [...document.querySelectorAll('#images tbody tr')].filter(r => !r.hidden)"
    return browser.execute_script(f"{script}.map(r => Number(r.dataset.i))")


def test_sliders_recompute_sensitivity_and_specificity(browser, scores):
    score, label = scores
    for t in (0.5, 0.35, 0.62, 0, 1, 0.5):
        browser.execute_script(CONTROL, by(browser, "threshold"), str(t))
        sensitivity = 100 * (score[label == 1] >= t).mean()
        specificity = 100 * (score[label == 0] < t).mean()
        assert by(browser, "sensitivity").text == f"{sensitivity:.1f}%"
        assert by(browser, "specificity").text == f"{specificity:.1f}%"
        missed = int((score[label == 1] < t).sum())
        assert f"{missed} missed" in by(browser, "counts").text


def test_headings_sort_both_ways(browser, scores):
    score, _ = scores
    headings = browser.find_elements("css selector", "#images th")
    assert [h.text for h in headings][:3] == ["Image", "Label", "Score"]
    for up in (True, False):
        headings[2].find_element("tag name", "button").send_keys("\n")  # by keyboard
        way = headings[2].get_attribute("aria-sort")
        assert way == ("ascending" if up else "descending")
        shown = score[order(browser)]
        assert (np.diff(shown) >= 0).all() if up else (np.diff(shown) <= 0).all()
    headings[0].find_element("tag name", "button").click()
    names = browser.execute_script(
        "return [...document.querySelectorAll('#images td.id')].map(c => c.textContent)"
    )
    assert sorted(names) == sorted([EVIL, *(n for n in names if n != EVIL)])
    assert names[1:] == sorted(names[1:]) and len(names) == len(score)


def test_filters_keep_what_they_name(browser, scores):
    score, label = scores
    wanted = {"alarm": (label == 0) & (score >= 0.5), "miss": (label == 1) & (score < 0.5)}
    for name, keep in wanted.items():
        browser.execute_script(CONTROL, by(browser, "show"), name)
        assert sorted(order(browser)) == np.flatnonzero(keep).tolist()
    browser.execute_script(CONTROL, by(browser, "show"), "all")
    browser.execute_script(CONTROL, by(browser, "find"), "TEST/0012")
    assert order(browser) == [12]
    assert by(browser, "matching").text == f"1 of {len(score)} images"
    browser.execute_script(CONTROL, by(browser, "find"), "")


def shown(browser, i):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(
        lambda b: by(b, "viewer").get_attribute("data-shown") == str(i)
    )


def test_an_image_opens_with_its_map_boxes_mask_and_grad_cam(browser, workdir):
    row = browser.find_element("css selector", "tr[data-i='13'] td.id button")
    row.send_keys("\n")
    shown(browser, 13)
    assert by(browser, "viewer-name").text == "test/0013.png"
    assert "abnormal" in by(browser, "viewer-facts").text
    assert "p-value" in by(browser, "viewer-facts").text
    assert by(browser, "cam-caption").text == "Grad-CAM"
    assert by(browser, "view-deviation").is_displayed()
    image, heat, boxes = (
        np.array(browser.execute_script(PIXELS, f"view-{n}")).reshape(-1, 4)
        for n in ("image", "map", "boxes")
    )
    assert image.std() > 5 and (image != heat).any()
    for colour in ([230, 159, 0], [86, 180, 233]):  # the box and the outline of the mask
        assert (np.abs(boxes[:, :3] - colour) <= 2).all(1).any()
    browser.execute_script(CONTROL, by(browser, "opacity"), "0")
    plain = np.array(browser.execute_script(PIXELS, "view-map")).reshape(-1, 4)
    np.testing.assert_array_equal(plain, image)
    browser.execute_script(CONTROL, by(browser, "opacity"), "55")
    with np.load(workdir / "predictions.npz") as stored:
        grey = np.asarray(Image.open(io.BytesIO(load.unpack(stored, "thumb_map")[13])))
        count = len(load.pictures(stored, len(stored["id"]))[13].boxes)
    specks = 0
    for t in (0.2, 0.3, 0.5, 0.6, 1.0, 0.5):  # contour and boxes follow
        browser.execute_script(CONTROL, by(browser, "pixel-threshold"), str(t))
        labels, _ = ndimage.label(grey >= np.ceil(256 * t), np.ones((3, 3)))
        areas = np.bincount(labels.ravel())[1:]
        speck = areas < grey.size // SMALLEST
        wanted = min(MOST, int((~speck).sum()))
        specks += speck.any() and wanted < MOST
        drawn = int(by(browser, "view-boxes").get_attribute("data-boxes"))
        assert drawn == (count if t == 0.5 else wanted)
        line = np.array(browser.execute_script(PIXELS, "view-boxes")).reshape(-1, 4)[:, :3]
        assert (np.abs(line - [240, 228, 66]) <= 2).all(1).any() == (drawn > 0)
    assert specks  # they have no boxes, as in the run
    by(browser, "after").click()
    at = order(browser)
    following = at[(at.index(13) + 1) % len(at)]
    shown(browser, following)
    by(browser, "close").click()
    assert not by(browser, "viewer").is_displayed()


def test_the_viewer_says_that_a_grad_cam_is_empty(browser):
    for i, words in ((EMPTY, "Grad-CAM is empty"), (EMPTY + 1, "this method has none")):
        browser.find_element("css selector", f"tr[data-i='{i}'] td.id button").send_keys("\n")
        shown(browser, i)
        assert words in by(browser, "cam-caption").text
        by(browser, "close").click()


def test_without_a_picture_the_viewer_says_so(browser, workdir, tmp_path):
    folder = shutil.copytree(workdir, tmp_path / "some")
    keep_pictures(folder, [3, 12])
    browser.get(html.write(folder).as_uri())
    for i, remaining in ((13, False), (12, True)):
        browser.find_element("css selector", f"tr[data-i='{i}'] td.id button").send_keys("\n")
        assert by(browser, "viewer-none").is_displayed() != remaining
        assert by(browser, "views").is_displayed() == remaining
        by(browser, "close").click()
    browser.get((workdir / "report.html").as_uri())


def test_the_viewer_obeys_the_keyboard(browser):
    """Arrows step through the rows in sight, Escape closes and gives the focus back."""
    from selenium.webdriver.common.keys import Keys

    at = order(browser)
    button = browser.find_element("css selector", f"tr[data-i='{at[3]}'] td.id button")
    button.send_keys("\n")
    for key, place in ((Keys.ARROW_RIGHT, 4), (Keys.ARROW_LEFT, 3), (Keys.ARROW_LEFT, 2)):
        browser.switch_to.active_element.send_keys(key)
        shown(browser, at[place])
    before = by(browser, "opacity-value").text
    by(browser, "opacity").send_keys(Keys.ARROW_LEFT)  # moves the slider, not the row
    assert by(browser, "opacity-value").text != before
    assert by(browser, "viewer").get_attribute("data-shown") == str(at[2])
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not by(browser, "viewer").is_displayed()
    assert browser.switch_to.active_element == button
    by(browser, "threshold").send_keys(Keys.ARROW_RIGHT)
    assert by(browser, "threshold-value").text == "0.501"
    browser.execute_script(CONTROL, by(browser, "threshold"), "0.5")


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_no_wider_than_the_window(browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width
