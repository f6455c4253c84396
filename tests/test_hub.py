# SPDX-License-Identifier: Apache-2.0
"""Models by owner/name, from a stand-in of the Hugging Face Hub on this machine."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.inference import hub, pretrained

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/model"


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does: the files of a revision, then each file."""

    files: dict
    asked: list

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        kind, data, headers = "application/json", None, {}
        if path.startswith(f"api/models/{REPO}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            record = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
            data = json.dumps(record).encode()
        elif path.startswith(f"api/models/{REPO}/tree/"):
            rows = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for name, content in self.files.items()
            ]
            data = json.dumps(rows).encode()
        elif path.startswith(f"{REPO}/resolve/"):
            name = path.split("/", 4)[4]
            data, kind = self.files.get(name), "application/octet-stream"
            etag = f'"{hashlib.sha1(data).hexdigest()}"' if data else ""
            headers = {"X-Repo-Commit": COMMIT, "ETag": etag}
        self.send_response(404 if data is None else 200)
        if data is None:
            data, headers = b"", {"X-Error-Code": "RepoNotFound"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _answer_at(address, monkeypatch):
    """Sets what the environment variable HF_ENDPOINT sets when the package is imported."""
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = pretrained.bundled()["grammar"]
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    handler = type("Own", (Handler,), {"files": files | {"x.py": b"1"}, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        _answer_at(address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield handler
        server.shutdown()


def test_a_model_is_loaded_by_owner_and_name(server):
    loaded, own = dlm_jax.load(REPO), dlm_jax.load("grammar")
    jax.tree.map(np.testing.assert_array_equal, loaded.ema, own.ema)
    assert any(path.endswith(pretrained.WEIGHTS) for path in server.asked)
    assert not any(path.endswith("x.py") for path in server.asked)


def test_a_model_that_was_loaded_needs_no_network(server, monkeypatch):
    dlm_jax.load(REPO)
    _answer_at("http://127.0.0.1:9", monkeypatch)
    asked = len(server.asked)
    assert dlm_jax.load(REPO).step
    assert len(server.asked) == asked


def test_a_model_that_is_not_there_is_one_line(server, tmp_path):
    with pytest.raises(
        UserError, match=r"^someone/other: no such folder, and no model"
    ):
        dlm_jax.load("someone/other")
    del server.files[pretrained.TOKENIZER]
    with pytest.raises(UserError, match=r"^someone/model: .* no tokenizer\.json$"):
        dlm_jax.load(REPO)
    (tmp_path / "runs").mkdir()
    asked = len(server.asked)
    with pytest.raises(UserError, match=r"no such folder, so no checkpoint"):
        dlm_jax.load("runs/missing")
    assert len(server.asked) == asked


def test_without_a_network_or_the_package_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    _answer_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"Hub cannot be reached: connect to it once"):
        dlm_jax.load(REPO)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'dlm_jax\[hub\]'$"):
        dlm_jax.load(REPO)


@pytest.mark.parametrize(
    "name", ["a", "/a/b", "a/b/c", "../a", "gs://a", "a/..", "a b/c"]
)
def test_paths_are_not_names_of_the_hub(name):
    assert not hub.is_name(name)
