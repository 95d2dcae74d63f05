"""Paths and URLs in the cells of untrusted tables."""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest

from irasim_diffusers.data import TableEpisodes, tables, write_video

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)


def table_of(path):
    """A table with one episode, whose video is at a path."""
    columns = {"video": [{"bytes": None, "path": path}], "actions": [[[0.0, 1.0]] * 2]}
    numbers = datasets.List(datasets.List(datasets.Value("float32")))
    features = datasets.Features(video=datasets.Video(decode=False), actions=numbers)
    return TableEpisodes(datasets.Dataset.from_dict(columns, features=features))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    write_video(folder / "clip.mp4", FRAMES, 5, lossless=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_videos_on_the_web_are_read(server):
    source = table_of(f"{server}/clip.mp4")
    np.testing.assert_array_equal(source[0].frames, FRAMES)
    np.testing.assert_array_equal(source.window(0, 1, 2).frames, FRAMES[1:])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{server}/none.mp4", r"cannot read 'http://.*/none.mp4': HTTP Error 404"),
        ("http://127.0.0.1:9/clip.mp4", r"cannot read 'http://127.0.0.1:9/clip.mp4': .*refused"),
        ("file:///dev/zero", "'file:///dev/zero' must be a local path, or an http, https or hf URL"),
        ("ssh://host/clip.mp4", "must be a local path, or an http"),
        ("s3://bucket/clip.mp4", "must be a local path, or an http"),
        ("memory://clip.mp4", "must be a local path, or an http"),
        ("zip://clip.mp4::{server}/clip.zip", "must be a local path, or an http"),
        ("reference://a::file:///spec.json", "must be a local path, or an http"),
        ("simplecache::{server}/clip.mp4", "must be a local path, or an http"),
        ("/dev/zero", "'/dev/zero' is not a file"),
        ("pipe", "pipe' is not a file"),
        ("nowhere.mp4", "'nowhere.mp4' is not a file"),
        ("a\0b.mp4", "is not a file"),
        ("", "neither content nor a path"),
    ],
)
def test_other_cells_raise_one_line(path, message, server, tmp_path):
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    source = table_of(path.format(server=server))
    for read in (source.__getitem__, source.vectors, lambda number: source.window(number, 0, 2)):
        with pytest.raises(ValueError, match=message) as caught:
            read(0)
        assert "\n" not in str(caught.value)
    same, other = table_of(path.format(server=server)), table_of("another.mp4")
    assert source.identity["content"] == same.identity["content"] != other.identity["content"]


def test_large_files_on_the_web_raise(server, monkeypatch):
    monkeypatch.setattr(tables, "MAX_DOWNLOAD", 100)
    tables._downloads.clear()
    with pytest.raises(ValueError, match=r"clip.mp4' must have at most 100 bytes"):
        table_of(f"{server}/clip.mp4")[0]


def test_downloads_in_memory_are_limited(server, monkeypatch):
    names = [f"{server}/clip.mp4", f"{server}/clip.mp4?second", f"{server}/clip.mp4?third"]
    tables._downloads.clear()
    size = len(tables._download(names[0]))
    monkeypatch.setattr(tables, "MAX_KEPT", 2 * size)
    tables._download(names[1])
    tables._download(names[0])  # uses the first file again, so that the second one is the least recently used
    tables._download(names[2])
    assert list(tables._downloads) == [names[0], names[2]]
    monkeypatch.setattr(tables, "MAX_KEPT", 1)
    assert len(tables._download(names[1])) == size
    assert list(tables._downloads) == [names[1]]
