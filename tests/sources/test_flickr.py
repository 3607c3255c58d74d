"""Images at their original addresses: verified, requested politely, and reported if missing."""

import base64
import hashlib
import pickle
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest

from paml.errors import DataError, SettingsError
from paml.sources import flickr
from paml.sources.flickr import FlickrSettings, flickr_parts
from paml.sources.parts import read_parts
from paml.sources.web import Unreachable
from paml.storage import StorageError
from tests.sources.server import Server

HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL\n"
)
FAST = {"tries": 4}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flickr, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(flickr, "_TIMEOUT_SECONDS", 2.0)


def key(number: int) -> str:
    return f"{number:016x}"


def body(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (number % 5 + 1)


def row(number: int, url: str, data: bytes | None = None, size: str | None = None, md5: str | None = None) -> str:
    data = body(number) if data is None else data
    size = str(len(data)) if size is None else size
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode() if md5 is None else md5
    return f'{key(number)},train,{url},http://x,by,http://x,"Ann ""A"" B","two\nlines, one title",{size},{md5},\n'


def image_list(folder: Path, *rows: str) -> str:
    path = folder / "images.csv"
    path.write_text(HEADER + "".join(rows))
    return str(path)


def served(web: Server, folder: Path, count: int) -> str:
    return image_list(folder, *(row(n, web.put(f"/{n}.jpg", body(n))) for n in range(count)))


def test_order_of_the_list_and_picklable_parts(web: Server, tmp_path: Path) -> None:
    path = served(web, tmp_path, 23)
    parts = flickr_parts(path, settings=FlickrSettings(**FAST), per_part=10)
    assert [part.images for part in parts] == [10, 10, 3]
    assert sum(part.bytes or 0 for part in parts) == sum(len(body(n)) for n in range(23))
    assert len({part.name for part in parts}) == 3
    expected = [(key(n), body(n)) for n in range(23)]
    assert list(read_parts(pickle.loads(pickle.dumps(parts)))) == expected
    assert list(read_parts(parts)) == expected
    assert [part.name for part in flickr_parts(path, per_part=10)] == [part.name for part in parts]
    assert all("paml" in headers["User-Agent"] for _, _, headers in web.seen)


def test_only_wanted_images_are_requested(web: Server, tmp_path: Path) -> None:
    path = served(web, tmp_path, 10)
    wanted = [key(7), key(99), key(3), key(7)]
    found = dict(read_parts(flickr_parts(path, wanted, FlickrSettings(**FAST, user_agent="me@here"))))
    assert list(found) == [key(3), key(7), key(99)]
    assert found[key(3)] == body(3)
    assert isinstance(found[key(99)], FileNotFoundError)
    assert key(99) in str(found[key(99)])
    assert web.asked == {"/3.jpg": 1, "/7.jpg": 1}
    assert {headers["User-Agent"] for _, _, headers in web.seen} == {"me@here"}


@pytest.mark.parametrize("status", [403, 404, 410, 451])
def test_removed_images_are_requested_once(web: Server, tmp_path: Path, status: int) -> None:
    path = image_list(tmp_path, row(1, web.put("/1.jpg", body(1), *[status] * 9)))
    ((_, payload),) = read_parts(flickr_parts(path, settings=FlickrSettings(**FAST)))
    assert isinstance(payload, FileNotFoundError)
    assert f"/1.jpg answered {status}" in str(payload)
    assert web.asked["/1.jpg"] == 1


def test_placeholder_for_removed_images(web: Server, tmp_path: Path) -> None:
    web.put("/images/photo_unavailable.png", b"gray")
    moved = {"Location": f"{web.url}/images/photo_unavailable.png"}
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"", (302, moved), (302, moved))))
    ((_, payload),) = read_parts(flickr_parts(path, settings=FlickrSettings(**FAST)))
    assert isinstance(payload, FileNotFoundError)
    assert "photo_unavailable.png" in str(payload)


def test_redirect(web: Server, tmp_path: Path) -> None:
    web.put("/new.jpg", body(1))
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"", (301, {"Location": f"{web.url}/new.jpg"}))))
    assert list(read_parts(flickr_parts(path))) == [(key(1), body(1))]


@pytest.mark.parametrize(
    ("served_body", "message"),
    [
        (body(4)[:-1], "159 bytes, the release has 160"),
        (body(4) + b"x", "more than 160 bytes, the release has 160"),
        (body(4)[:-1] + b"x", "MD5"),
    ],
)
def test_changed_images(web: Server, tmp_path: Path, served_body: bytes, message: str):
    path = image_list(tmp_path, row(4, web.put("/4.jpg", served_body)))
    ((_, payload),) = read_parts(flickr_parts(path, settings=FlickrSettings(**FAST)))
    assert isinstance(payload, DataError)
    assert message in str(payload)
    assert web.asked["/4.jpg"] == 1


def test_list_without_sizes_and_checksums(web: Server, tmp_path: Path) -> None:
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"anything"), size="", md5=""))
    (part,) = flickr_parts(path)
    assert part.bytes == 0
    assert list(part) == [(key(1), b"anything")]


def test_transient_errors_are_retried(web: Server, tmp_path: Path) -> None:
    faults = [500, 503, 429, "reset", ("cut", 10), ("cut", 0), 408]
    path = image_list(tmp_path, *(row(n, web.put(f"/{n}.jpg", body(n), fault)) for n, fault in enumerate(faults)))
    found = list(read_parts(flickr_parts(path, settings=FlickrSettings(**FAST))))
    assert found == [(key(n), body(n)) for n in range(len(faults))]
    assert web.asked == {f"/{n}.jpg": 2 for n in range(len(faults))}


def test_image_without_response_is_rejected_after_its_tries(web: Server, tmp_path: Path) -> None:
    rows = [row(1, web.put("/1.jpg", body(1), *[503] * 99)), row(2, web.put("/2.jpg", body(2)))]
    found = dict(read_parts(flickr_parts(image_list(tmp_path, *rows), settings=FlickrSettings(**FAST))))
    assert isinstance(found[key(1)], Unreachable)
    assert "4 requests" in str(found[key(1)])
    assert "/1.jpg answered 503" in str(found[key(1)])
    assert found[key(2)] == body(2)
    assert web.asked["/1.jpg"] == 4


def test_part_fails_if_the_server_is_down(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flickr, "_GIVE_UP_AFTER", 6)
    rows = [row(n, web.put(f"/{n}.jpg", body(n), *[503] * (4 if n >= 5 else 0))) for n in range(30)]
    (part,) = flickr_parts(image_list(tmp_path, *rows), settings=FlickrSettings(**FAST))
    images = iter(part)
    assert [next(images) for _ in range(5)] == [(key(n), body(n)) for n in range(5)]
    with pytest.raises(StorageError, match=r"6 consecutive images .*answered 503"):
        list(images)
    for file in web.files.values():
        file.script.clear()
    assert list(part) == [(key(n), body(n)) for n in range(30)]


def test_slow_server_times_out(web: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flickr, "_TIMEOUT_SECONDS", 0.3)
    path = image_list(tmp_path, row(4, web.put("/4.jpg", body(4), *[("slow", 0.02)] * 2)))
    settings = FlickrSettings(tries=2)
    start = time.monotonic()
    ((_, payload),) = read_parts(flickr_parts(path, settings=settings))
    assert time.monotonic() - start < 2.5
    assert "0.3 s" in str(payload)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_delays_all_requests(web: Server, tmp_path: Path, form: str) -> None:
    after = "1" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
    rows = [row(0, web.put("/0.jpg", body(0), (429, {"Retry-After": after})))]
    rows += [row(n, web.put(f"/{n}.jpg", body(n))) for n in range(1, 6)]
    settings = FlickrSettings(**FAST, connections_per_host=1)
    found = list(read_parts(flickr_parts(image_list(tmp_path, *rows), settings=settings)))
    assert found == [(key(n), body(n)) for n in range(6)]
    times = [at for at, _, _ in web.seen]
    assert web.seen[0][1] == "/0.jpg"
    assert times[1] - times[0] >= 0.95


def test_long_retry_after_fails_the_part(web: Server, tmp_path: Path) -> None:
    path = image_list(tmp_path, row(0, web.put("/0.jpg", body(0), (429, {"Retry-After": "86400"}))))
    (part,) = flickr_parts(path, settings=FlickrSettings(**FAST))
    with pytest.raises(StorageError, match=r"86,400 s, more than flickr_requests.longest_wait_seconds"):
        list(part)
    assert web.asked["/0.jpg"] == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_connections_per_host(web: Server, tmp_path: Path, limit: int) -> None:
    web.delay_seconds = 0.01
    path = served(web, tmp_path, 30)
    list(read_parts(flickr_parts(path, settings=FlickrSettings(**FAST, connections_per_host=limit))))
    assert web.busiest == limit


def test_invalid_addresses(tmp_path: Path) -> None:
    urls = ["file:///etc/hostname", "ftp://x/y", "words", "http://[::1", "https://"]
    path = image_list(tmp_path, *(row(number, url) for number, url in enumerate(urls)))
    reasons = [str(payload) for _, payload in read_parts(flickr_parts(path))]
    assert reasons == [f"{url!r} is not a web address" for url in urls]


def test_other_files_and_settings(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("ImageID,Url\n1,http://x\n")
    with pytest.raises(DataError, match=r"columns ImageID, OriginalURL, OriginalSize, OriginalMD5"):
        flickr_parts(str(tmp_path / "images.csv"))
    with pytest.raises(SettingsError, match=r"flickr_requests.tries is 0"):
        FlickrSettings(tries=0)


def test_part_names_depend_on_the_rows(web: Server, tmp_path: Path) -> None:
    first = flickr_parts(served(web, tmp_path, 20), per_part=10)
    other = flickr_parts(image_list(tmp_path, *(row(n, f"{web.url}/{n}") for n in range(5, 25))), per_part=10)
    assert not {part.name for part in first} & {part.name for part in other}
    assert Counter(part.images for part in first) == {10: 2}
