"""The review page: its content, that only its own script runs, and how people use it."""

import base64
import csv
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paml.audit.page import MAX_THUMBNAIL_BYTES, THUMBNAIL_SIDE, map_grays, page_html, thumbnail
from paml.html import script_json
from paml.labels import POSITIVE, LabelTable, apply_verdicts, table_from_triples
from tests.helpers.browser import Browser

MALICIOUS = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'&\u2028'
KEYS = ["=cmd|' /C calc'!A0", "plain", "with,comma", MALICIOUS, "'=twice", "last"]


def _pixels(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _issues(count: int = 6) -> list[dict]:
    return [
        {
            "key": KEYS[n] if n < len(KEYS) else f"image-{n}",
            "mid": ["/m/a", "/m/b", "@c"][n % 3],
            "name": ["Apple", MALICIOUS, "Cat"][n % 3],
            "kind": "likely missing label" if n < count - 2 else "likely wrong label",
            "rank": n + 1 if n < count - 2 else n - count + 3,
            "score": 1.5 - n,
            "probability": 0.5,
            "state": "unobserved" if n < count - 2 else "positive",
            "evidence": "",
            "image": n,
        }
        for n in range(count)
    ]


def _page(count: int = 6) -> str:
    maps = [map_grays(np.random.default_rng(n).normal(size=(3, 4)).astype(np.float32)) for n in range(count)]
    return page_html(MALICIOUS, _issues(count), [thumbnail(_pixels(n)) for n in range(count)], maps)


def test_the_page_contains_the_issues_and_untrusted_text_cannot_end_its_block() -> None:
    page = _page()
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    assert [issue["key"] for issue in data["issues"]] == KEYS
    assert data["issues"][1]["name"] == MALICIOUS
    with Image.open(io.BytesIO(base64.b64decode(data["thumbnails"][2]))) as image:
        assert image.size == (60, 40)
    for n, issue in enumerate(data["issues"]):
        grays = np.frombuffer(base64.b64decode(issue["map"]), np.uint8).reshape(issue["map_size"])
        np.testing.assert_array_equal(grays, map_grays(np.random.default_rng(n).normal(size=(3, 4)).astype(np.float32)))
    assert "http" not in page.replace("http-equiv", "")  # no request to a server
    assert "onerror" not in page.replace(block[1], "")


def test_script_json_parses_to_the_same_value() -> None:
    assert json.loads(script_json({"a": MALICIOUS})) == {"a": MALICIOUS}
    assert not set(script_json(MALICIOUS)) & set("<>&")


def test_thumbnails_have_at_most_256_px_and_1000_fit_in_50_mb() -> None:
    large = thumbnail(_pixels(0, 700, 1000))  # noise, the worst case of JPEG
    with Image.open(io.BytesIO(large)) as image:
        assert image.size == (THUMBNAIL_SIDE, round(700 / 1000 * THUMBNAIL_SIDE))
    square = thumbnail(_pixels(0, 600, 600))
    assert max(len(large), len(square)) <= MAX_THUMBNAIL_BYTES
    maps = [np.zeros((28, 28), np.uint8)] * 1000
    issues = [_issues(1)[0] | {"image": n, "name": "n" * 60} for n in range(1000)]
    assert len(page_html("t", issues, [b"x" * MAX_THUMBNAIL_BYTES] * 1000, maps).encode()) <= 50_000_000


def test_maps_have_gray_0_for_negative_scores() -> None:
    scores = np.array([[-3.0, 0.0], [2.0, 4.0]], np.float32)
    assert map_grays(scores).tolist() == [[0, 0], [128, 255]]
    assert map_grays(-np.abs(scores)).tolist() == [[0, 0], [0, 0]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(_page(), encoding="utf-8")
    browser.problems.clear()
    browser.open(path)
    browser.run("localStorage.clear()")
    browser.open(path)
    return path


def _visible_keys(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('.issue')].map((card) => data.issues[card.dataset.number].key)")


def _select(browser: Browser, name: str, value: str) -> None:
    browser.run(f"byId({name!r}).value = {json.dumps(value)}; byId({name!r}).dispatchEvent(new Event('change')); 0")


def test_in_a_browser_untrusted_text_is_text_and_every_image_is_shown(browser: Browser, page: Path) -> None:
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelector('h1').textContent") == MALICIOUS
    assert browser.run("document.querySelectorAll('.name')[1].textContent") == MALICIOUS
    assert (
        browser.run("Promise.all([...document.images].map((one) => one.decode())).then(() => document.images.length)")
        == 6
    )
    assert browser.run("document.querySelector('.image img').naturalWidth") == 60
    drawn = browser.run("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 4, 3).data]")
    alpha = drawn[3::4]
    grays = map_grays(np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)).ravel()
    np.testing.assert_allclose(alpha, 0.65 * grays, atol=1)
    assert browser.problems == []


def test_in_a_browser_filters_select_issues(browser: Browser, page: Path) -> None:
    assert _visible_keys(browser) == KEYS
    _select(browser, "class", "/m/a")
    assert _visible_keys(browser) == [KEYS[0], KEYS[3]]
    _select(browser, "class", "")
    _select(browser, "kind", "likely wrong label")
    assert _visible_keys(browser) == KEYS[4:]
    _select(browser, "from", "2")
    assert _visible_keys(browser) == KEYS[5:]
    _select(browser, "kind", "")
    _select(browser, "to", "3")
    assert _visible_keys(browser) == [KEYS[1], KEYS[2], KEYS[5]]
    browser.press("y")
    _select(browser, "answered", "open")
    assert _visible_keys(browser) == [KEYS[2], KEYS[5]]
    _select(browser, "answered", "yes")
    assert _visible_keys(browser) == [KEYS[1]]


def test_in_a_browser_keys_answer_and_verdicts_reach_the_label_table(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    for key in "ynsyny":
        browser.press(key)
    browser.press("u")  # removes the last answer
    browser.press("k")
    browser.press("y")  # changes the one before
    assert browser.run("[...verdicts.entries()].sort()") == [
        [0, "yes"], [1, "no"], [2, "skip"], [3, "yes"], [4, "yes"],
    ]  # fmt: skip
    assert "3 yes, 1 no, 1 skip" in browser.run("byId('status').textContent")
    browser.press("m")
    assert browser.run("getComputedStyle(document.querySelector('canvas')).display") == "none"

    browser.open(page)  # answers are stored
    assert browser.run("verdicts.size") == 5
    browser.set_download_folder(tmp_path)
    browser.press("e")
    saved, limit = tmp_path / "annotations-human.csv", time.monotonic() + 30
    while not (saved.exists() and saved.stat().st_size):  # it is created before it is written
        assert time.monotonic() < limit, "nothing was exported"
        time.sleep(0.1)
    with open(saved, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ImageID", "Source", "LabelName", "Confidence"]
    assert [row[3] for row in rows[1:]] == ["1", "0", "1", "1"]
    assert all(not cell.startswith(tuple("=+-@")) for row in rows for cell in row)

    old = table_from_triples(
        KEYS, ["/m/a", "/m/b", "@c"], None, [4, 5], [1, 2], [POSITIVE, POSITIVE], str(tmp_path / "old.arrow")
    )
    report = apply_verdicts(old, [str(saved)], str(tmp_path / "new.arrow"))
    table = LabelTable.open(str(tmp_path / "new.arrow"))
    labels, keys = table.lookup(np.arange(table.num_images)), table.keys()
    states = {(keys[i], table.classes[k]): s for i, k, s in zip(*(column.tolist() for column in labels), strict=True)}
    assert states == {
        (KEYS[0], "/m/a"): 1, (KEYS[1], "/m/b"): 0, (KEYS[3], "/m/a"): 1, (KEYS[4], "/m/b"): 1, (KEYS[5], "@c"): 1,
    }  # fmt: skip
    assert (report.added, report.confirmed, sum(report.rejected.values())) == (3, 1, 0)

    browser.run("localStorage.clear()")  # another browser continues from the file
    browser.open(page)
    assert browser.run("verdicts.size") == 0
    browser.run(f"importVerdicts({json.dumps(saved.read_text(encoding='utf-8'))})")
    assert browser.run("[...verdicts.entries()].sort()") == [[0, "yes"], [1, "no"], [3, "yes"], [4, "yes"]]
    assert browser.problems == []


def test_in_a_browser_the_list_of_keys_opens_and_closes(browser: Browser, page: Path) -> None:
    browser.press("?")
    assert browser.run("byId('keys').open")
    browser.run("document.querySelector('dialog button').click()")
    assert not browser.run("byId('keys').open")
    browser.press("n")
    assert browser.run("verdicts.get(0)") == "no"
    assert browser.problems == []


def test_in_a_browser_a_thousand_issues_are_rendered_on_demand(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(_page(1000), encoding="utf-8")
    browser.open(path)
    assert browser.run("visible.length") == 1000
    assert len(_visible_keys(browser)) <= 240
    browser.run("goTo(700)")
    assert browser.run("document.querySelector('.current').dataset.number") == "700"
    assert len(_visible_keys(browser)) >= 701
