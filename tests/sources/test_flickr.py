"""Photos at their original addresses: checked, politely asked for, and never silently missing."""

import base64
import hashlib
import pickle
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest

from paml.errors import DataError, SettingsError
from paml.sources.flickr import FlickrSettings, flickr_parts
from paml.sources.parts import read_parts
from paml.sources.web import Unreachable
from paml.storage import StorageError
from tests.sources.server import Server

HEADER = (
    "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5,"
    "Thumbnail300KURL\n"
)
FAST = {"first_wait_seconds": 0.01, "tries": 4, "timeout_seconds": 2.0}


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


def test_photos_come_in_the_order_of_the_list_and_the_parts_travel(web: Server, tmp_path: Path) -> None:
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


def test_only_wanted_photos_are_asked_for_and_those_not_in_the_list_are_named(web: Server, tmp_path: Path) -> None:
    path = served(web, tmp_path, 10)
    wanted = [key(7), key(99), key(3), key(7)]
    found = dict(read_parts(flickr_parts(path, wanted, FlickrSettings(**FAST, user_agent="me@here"))))
    assert list(found) == [key(3), key(7), key(99)]
    assert found[key(3)] == body(3)
    assert isinstance(found[key(99)], FileNotFoundError)
    assert f"{key(99)} is not in the image list" in str(found[key(99)])
    assert web.asked == {"/3.jpg": 1, "/7.jpg": 1}
    assert {headers["User-Agent"] for _, _, headers in web.seen} == {"me@here"}


@pytest.mark.parametrize("status", [403, 404, 410, 451])
def test_what_is_gone_is_rejected_and_not_asked_for_again(web: Server, tmp_path: Path, status: int) -> None:
    path = image_list(tmp_path, row(1, web.put("/1.jpg", body(1), *[status] * 9)))
    ((_, payload),) = read_parts(flickr_parts(path, settings=FlickrSettings(**FAST)))
    assert isinstance(payload, FileNotFoundError)
    assert f"/1.jpg answered {status}: the photo is gone" in str(payload)
    assert web.asked["/1.jpg"] == 1


def test_the_page_for_removed_photos_is_no_photo(web: Server, tmp_path: Path) -> None:
    web.put("/images/photo_unavailable.png", b"grey")
    moved = {"Location": f"{web.url}/images/photo_unavailable.png"}
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"", (302, moved), (302, moved))))
    for accept in (False, True):
        settings = FlickrSettings(**FAST, accept_changed=accept)
        ((_, payload),) = read_parts(flickr_parts(path, settings=settings))
        assert isinstance(payload, FileNotFoundError)
        assert "photo_unavailable.png: the photo is gone" in str(payload)


def test_a_photo_that_moved_is_followed(web: Server, tmp_path: Path) -> None:
    web.put("/new.jpg", body(1))
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"", (301, {"Location": f"{web.url}/new.jpg"}))))
    assert list(read_parts(flickr_parts(path))) == [(key(1), body(1))]


@pytest.mark.parametrize(
    ("served_body", "said"),
    [
        (body(4)[:-1], "has changed: 159 bytes, the release says 160"),
        (body(4) + b"x", "has changed: more than 160 bytes, the release says 160"),
        (body(4)[:-1] + b"x", "has changed: its MD5 is "),
    ],
)
def test_changed_photos_are_rejected_unless_accepted(web: Server, tmp_path: Path, served_body: bytes, said: str):
    path = image_list(tmp_path, row(4, web.put("/4.jpg", served_body)))
    ((_, payload),) = read_parts(flickr_parts(path, settings=FlickrSettings(**FAST)))
    assert isinstance(payload, DataError)
    assert said in str(payload)
    assert web.asked["/4.jpg"] == 1
    accepting = FlickrSettings(**FAST, accept_changed=True)
    assert list(read_parts(flickr_parts(path, settings=accepting))) == [(key(4), served_body)]


def test_a_list_without_sizes_or_sums_is_taken_as_it_comes(web: Server, tmp_path: Path) -> None:
    path = image_list(tmp_path, row(1, web.put("/1.jpg", b"anything"), size="", md5=""))
    (part,) = flickr_parts(path)
    assert part.bytes == 0
    assert list(part) == [(key(1), b"anything")]


def test_passing_faults_are_outlasted(web: Server, tmp_path: Path) -> None:
    faults = [500, 503, 429, "reset", ("cut", 10), ("cut", 0), 408]
    path = image_list(tmp_path, *(row(n, web.put(f"/{n}.jpg", body(n), fault)) for n, fault in enumerate(faults)))
    found = list(read_parts(flickr_parts(path, settings=FlickrSettings(**FAST))))
    assert found == [(key(n), body(n)) for n in range(len(faults))]
    assert web.asked == {f"/{n}.jpg": 2 for n in range(len(faults))}


def test_one_photo_that_no_server_answers_for_is_rejected_after_its_tries(web: Server, tmp_path: Path) -> None:
    rows = [row(1, web.put("/1.jpg", body(1), *[503] * 99)), row(2, web.put("/2.jpg", body(2)))]
    found = dict(read_parts(flickr_parts(image_list(tmp_path, *rows), settings=FlickrSettings(**FAST))))
    assert isinstance(found[key(1)], Unreachable)
    assert "given up after 4 requests: " in str(found[key(1)])
    assert "/1.jpg answered 503" in str(found[key(1)])
    assert found[key(2)] == body(2)
    assert web.asked["/1.jpg"] == 4


def test_a_server_that_is_down_ends_the_part_so_that_it_is_read_again(web: Server, tmp_path: Path) -> None:
    rows = [row(n, web.put(f"/{n}.jpg", body(n), *[503] * (4 if n >= 5 else 0))) for n in range(30)]
    (part,) = flickr_parts(image_list(tmp_path, *rows), settings=FlickrSettings(**FAST, give_up_after=6))
    images = iter(part)
    assert [next(images) for _ in range(5)] == [(key(n), body(n)) for n in range(5)]
    with pytest.raises(StorageError, match=r"6 images one after the other could not be fetched.*answered 503"):
        list(images)
    for file in web.files.values():
        file.script.clear()
    assert list(part) == [(key(n), body(n)) for n in range(30)]


def test_a_server_that_drips_is_not_waited_for(web: Server, tmp_path: Path) -> None:
    path = image_list(tmp_path, row(4, web.put("/4.jpg", body(4), *[("slow", 0.02)] * 2)))
    settings = FlickrSettings(first_wait_seconds=0.01, tries=2, timeout_seconds=0.3)
    start = time.monotonic()
    ((_, payload),) = read_parts(flickr_parts(path, settings=settings))
    assert time.monotonic() - start < 2.5
    assert "took more than 0.3 s" in str(payload)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_all_requests_wait_as_long_as_the_server_asks(web: Server, tmp_path: Path, form: str) -> None:
    after = "1" if form == "seconds" else formatdate(time.time() + 2, usegmt=True)
    rows = [row(0, web.put("/0.jpg", body(0), (429, {"Retry-After": after})))]
    rows += [row(n, web.put(f"/{n}.jpg", body(n))) for n in range(1, 6)]
    settings = FlickrSettings(**FAST, connections_per_host=1)
    found = list(read_parts(flickr_parts(image_list(tmp_path, *rows), settings=settings)))
    assert found == [(key(n), body(n)) for n in range(6)]
    times = [at for at, _, _ in web.seen]
    assert web.seen[0][1] == "/0.jpg"
    assert times[1] - times[0] >= 0.95


def test_a_server_that_asks_for_a_long_wait_ends_the_part(web: Server, tmp_path: Path) -> None:
    path = image_list(tmp_path, row(0, web.put("/0.jpg", body(0), (429, {"Retry-After": "86400"}))))
    (part,) = flickr_parts(path, settings=FlickrSettings(**FAST))
    with pytest.raises(StorageError, match=r"asks to come back in 86,400 s, more than flickr.longest_wait_seconds"):
        list(part)
    assert web.asked["/0.jpg"] == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_one_server_gets_few_requests_at_a_time(web: Server, tmp_path: Path, limit: int) -> None:
    web.delay_seconds = 0.01
    path = served(web, tmp_path, 30)
    list(read_parts(flickr_parts(path, settings=FlickrSettings(**FAST, connections_per_host=limit, threads=8))))
    assert web.busiest == limit


def test_what_is_no_web_address_is_rejected(tmp_path: Path) -> None:
    urls = ["file:///etc/hostname", "ftp://x/y", "words", "http://[::1", "https://"]
    path = image_list(tmp_path, *(row(number, url) for number, url in enumerate(urls)))
    reasons = [str(payload) for _, payload in read_parts(flickr_parts(path))]
    assert reasons == [f"{url!r} is no web address" for url in urls]


def test_a_list_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text("ImageID,Url\n1,http://x\n")
    with pytest.raises(DataError, match=r"needs the columns ImageID, OriginalURL, OriginalSize, OriginalMD5"):
        flickr_parts(str(tmp_path / "images.csv"))
    with pytest.raises(SettingsError, match=r"flickr.tries is 0: set it to 1 or more"):
        FlickrSettings(tries=0)


def test_names_change_with_what_is_to_be_read(web: Server, tmp_path: Path) -> None:
    first = flickr_parts(served(web, tmp_path, 20), per_part=10)
    other = flickr_parts(image_list(tmp_path, *(row(n, f"{web.url}/{n}") for n in range(5, 25))), per_part=10)
    assert not {part.name for part in first} & {part.name for part in other}
    assert Counter(part.images for part in first) == {10: 2}
