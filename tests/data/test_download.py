from __future__ import annotations

import contextlib
import gzip
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from espalier.core.errors import DataError
from espalier.data import fashion_mnist, mnist
from espalier.data.download import fetch
from espalier.data.sources import SOURCES, Remote

BODY = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        if self.path == "/stall":
            time.sleep(1.5)
            return
        if self.path not in self.files:
            self.send_error(404)
            return
        body = self.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) if self.path == "/cut" else len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files() -> dict[str, bytes]:
    return {"/file": BODY, "/cut": BODY[:1000], "/long": BODY * 3, "/wrong": BODY[::-1]}


@pytest.fixture
def server(files, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Local", (Handler,), {"files": files})) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def remote(*urls: str, body: bytes = BODY) -> Remote:
    return Remote("file.gz", len(body), hashlib.sha256(body).hexdigest(), urls)


def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_file_arrives_whole_with_progress(tmp_path, server):
    heard = []
    path = fetch(remote(f"{server}/file"), tmp_path / "new" / "folder", progress=lambda *said: heard.append(said))
    assert path == tmp_path / "new" / "folder" / "file.gz"
    assert path.read_bytes() == BODY
    assert heard[-1] == ("download file.gz", len(BODY), len(BODY))
    assert [done for _, done, _ in heard] == sorted({done for _, done, _ in heard})
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/cut", "ended after 1,000 of"),
        ("/long", "more than the published"),
        ("/wrong", "SHA-256 is"),
        ("/absent", "HTTP 404"),
        ("/stall", "timed out"),
    ],
)
def test_a_file_that_is_not_the_published_one_never_appears(tmp_path, server, path, words):
    with pytest.raises(DataError, match=words) as caught:
        fetch(remote(server + path), tmp_path, timeout=0.4)
    assert server + path in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_next_mirror_is_tried(tmp_path, server):
    urls = (f"{nobody()}/file", f"{server}/absent", f"{server}/cut", f"{server}/file")
    assert fetch(remote(*urls), tmp_path).read_bytes() == BODY


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    urls = (f"{nobody()}/file", "http://nowhere.invalid/file")
    with pytest.raises(DataError) as caught:
        fetch(remote(*urls), tmp_path)
    for words in (*urls, "refused", "Check the network", str(tmp_path), hashlib.sha256(BODY).hexdigest()):
        assert words in str(caught.value)


def test_only_http_is_fetched(tmp_path):
    (tmp_path / "local").write_bytes(BODY)
    with pytest.raises(DataError, match="only http and https"):
        fetch(remote((tmp_path / "local").as_uri()), tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"could not be written to .*taken.*1,024,000 bytes"):
        fetch(remote(f"{server}/file"), tmp_path / "taken")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, server, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("espalier.data.download.os.fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        fetch(remote(f"{server}/file"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_passes_and_leaves_nothing(tmp_path, server):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(remote(f"{server}/file"), tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_fetched_read_and_not_fetched_again(tmp_path, server, files, monkeypatch, idx, contents):
    arrays = contents()
    served = {name + ".gz": gzip.compress(idx(values)) for name, values in arrays.items()}
    files.update({f"/{name}": body for name, body in served.items()})
    remotes = tuple(
        Remote(name, len(body), hashlib.sha256(body).hexdigest(), (f"{server}/{name}",))
        for name, body in served.items()
    )
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], files=remotes))
    train, _ = mnist(tmp_path, download=True)
    assert np.array_equal(train.labels.numpy(), arrays["train-labels-idx1-ubyte"])
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(served)

    (tmp_path / "mnist" / remotes[3].name).unlink()
    heard = []
    mnist(tmp_path, download=True, progress=lambda what, *_: heard.append(what))
    assert set(heard) == {f"download {remotes[3].name}"}
    files.clear()
    assert len(mnist(tmp_path, download=True)[0]) == 7


def test_download_without_a_folder_asks_for_one(monkeypatch):
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    with pytest.raises(DataError, match="none was named"):
        fashion_mnist(download=True)


def test_every_published_file_has_a_length_a_checksum_and_an_address():
    for source in SOURCES.values():
        for file in source.files:
            assert len(file.sha256) == 64
            assert file.size > 1000
            assert all(url.startswith("http") and url.endswith("/" + file.name) for url in file.urls)
