# SPDX-License-Identifier: Apache-2.0
"""The web API: Python's answers under Python's names, and one line for every mistake."""

import json
import re
import threading

import anyio
import httpx
import pytest
from conftest import wait_until
from starlette.testclient import TestClient

import dlm_jax
from dlm_jax.inference import streaming
from dlm_jax.serving import app as serving
from dlm_jax.serving import schema, worker


@pytest.fixture(scope="module")
def grammar():
    return dlm_jax.load("grammar")


@pytest.fixture(scope="module")
def client(grammar):
    return TestClient(
        serving.make_app(grammar, "grammar"), raise_server_exceptions=False
    )


@pytest.fixture(scope="module")
def pairs():
    return dlm_jax.load("e2e_mr")


@pytest.fixture(scope="module")
def pair_client(pairs):
    return TestClient(serving.make_app(pairs, "e2e_mr"), raise_server_exceptions=False)


def _events(answer):
    blocks = answer.text.strip().split("\n\n")
    return [
        (head.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for head, data in (block.split("\n") for block in blocks)
    ]


def test_sample_is_pythons(client, grammar):
    body = {"n": 2, "seed": 4, "num_steps": 4, "template": "The ___ is a [...]"}
    answer = client.post("/v1/sample", json=body)
    assert answer.status_code == 200
    n = body.pop("n")
    assert answer.json() == {"texts": grammar.control(n, **body)}


def test_stream_shows_every_step(client, grammar):
    answer = client.post("/v1/stream", json={"n": 2, "seed": 4, "num_steps": 4})
    *frames, (last, done) = _events(answer)
    assert [name for name, _ in frames] == ["frame"] * 4
    assert last == "done"
    assert done["texts"] == grammar.sample(2, seed=4, num_steps=4)
    for text, whole in zip(frames[-1][1]["texts"], done["texts"], strict=True):
        assert " ".join(text["tokens"]) == whole
        assert len(text["confidence"]) == len(text["tokens"])
        assert set(text["confidence"]) <= set(range(101))


def test_translate_selects_as_python_does(pair_client, pairs):
    source = {"name": "Aromi", "Type": "pub", "food": "English"}
    body = {"sources": [source, "name : Cotto"], "n": 2, "mbr": 3, "num_steps": 3}
    answer = pair_client.post("/v1/translate", json=body | {"seed": 1})
    sources = body.pop("sources")
    assert answer.json()["texts"] == pairs.translate(sources, seed=1, **body)


def test_a_pairs_frames_show_names_not_placeholders(pair_client):
    body = {"sources": [{"name": "Aromi", "food": "English"}], "num_steps": 8, "n": 4}
    *frames, _ = _events(pair_client.post("/v1/stream", json=body))
    shown = {token for text in frames[-1][1]["texts"] for token in text["tokens"]}
    assert "Aromi" in shown
    assert not any(token.startswith("X-name") for token in shown)


def test_scores_are_pythons(client, grammar):
    texts = ["The Eagle is a pub .", "There is a cheap pub ."]
    answer = client.post("/v1/nll", json={"texts": texts}).json()["texts"]
    bound = grammar.nll(grammar.encode(texts), draws=worker.DRAWS)
    for i, text in enumerate(answer):
        assert " ".join(text["tokens"]) == f"{texts[i]} END"
        assert text["total"] == pytest.approx(float(bound.total()[i]), abs=1e-2)
        whole = sum(text["nats"]) + text["length"]
        assert whole == pytest.approx(text["total"], abs=2e-2)


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        ("sample", {"n": 0}, "n: 0 is less than the minimum"),
        ("sample", {"n": 10**9}, "n: 1000000000 is greater than the maximum"),
        ("sample", {"num_steps": 10**6}, "num_steps: 1000000 is greater"),
        ("sample", {"steps": 4}, "'steps' was unexpected"),
        ("sample", [1], r"request: \[1\] is not of type 'object'"),
        ("sample", {"solver": "euler"}, "solver: 'euler' is not one of"),
        ("sample", {"template": "The zzz ___"}, "zzz"),
        ("sample", {"template": "no blank"}, "has no blank"),
        ("sample", {"semantic": {"colour": "red"}}, "semantic 'colour'"),
        ("sample", {"pos": ["DET"]}, "pos: needs a classifier"),
        ("stream", {"sources": ["a : b"]}, "was not trained on pairs"),
        ("translate", {}, "'sources' is a required property"),
        ("nll", {"texts": []}, "texts"),
        ("nll", {"texts": ["a" * 5000]}, "is too long"),
        (
            "sample",
            {"template": "../../etc/passwd ___"},
            "is not in the model's vocabulary",
        ),
    ],
)
def test_mistakes_are_one_line(client, path, body, line):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert "\n" not in error
    assert re.search(line, error), error


def test_what_is_not_json(client):
    for content in (
        "{",
        "[" * 50_000,
        '{"n": NaN}',
        "\ud800".encode("utf-8", "surrogatepass"),
    ):
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/sample", content=content, headers=headers)
        assert answer.status_code == 400, answer.text
    assert client.post("/v1/sample", data={"n": "1"}).status_code == 415
    large = client.post("/v1/sample", json={"template": "a" * 2**17})
    assert large.status_code == 413


def test_only_the_pages_files_are_served(client):
    for path in serving.PAGES:
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    for path in (
        "/../setup.cfg",
        "/%2e%2e/setup.cfg",
        "/page.html",
        "//etc/passwd",
        "/v1",
    ):
        assert client.get(path).status_code == 404


def test_names_of_other_hosts_are_refused(grammar):
    app = serving.make_app(grammar, "grammar", hosts=["localhost"])
    local = TestClient(app, base_url="http://localhost")
    assert local.get("/v1/model").status_code == 200
    assert TestClient(app, base_url="http://evil.example").get("/").status_code == 400


def test_the_documents_agree(client):
    document = client.get("/v1/openapi.json").json()
    assert set(document["paths"]) == {"/v1/model"} | {
        f"/v1/{n}" for n in schema.REQUESTS
    }
    body = document["paths"]["/v1/sample"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["properties"]["n"]["maximum"]
    about = client.get("/v1/model").json()
    assert about["name"] == "grammar"
    assert about["pairs"] is False


def test_a_full_queue_is_told(grammar, monkeypatch):
    app = serving.make_app(grammar, "grammar")
    monkeypatch.setattr(worker, "MAX_WAITING", 0)
    answer = TestClient(app).post("/v1/sample", json={"num_steps": 2})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def _job(lm, seed, **options):
    items = []
    asked = streaming.ask(lm, 2, seed=seed, **options)
    return worker.Job(asked, items.append), items


def test_requests_of_a_kind_run_together_and_others_wait(grammar, monkeypatch):
    sizes, whole = [], streaming.stream
    gate = threading.Event()

    def counted(lm, requests):
        gate.wait(60)
        sizes.append(len(requests))
        return whole(lm, requests)

    monkeypatch.setattr(streaming, "stream", counted)
    busy = worker.Worker(grammar)
    jobs = [_job(grammar, seed, num_steps=2) for seed in range(4)]
    jobs.append(_job(grammar, 9, num_steps=3))
    for job, _ in jobs:
        busy.submit(job)
    gate.set()
    for _, items in jobs:
        wait_until(lambda items=items: items and items[-1] is None, "a job's end")
    assert sorted(sizes) == [1, 1, 3] or sorted(sizes) == [1, 4]
    for seed, (_, items) in enumerate(jobs[:4]):
        texts = streaming.texts(grammar, items[-2].ids, None)
        assert texts == grammar.sample(2, seed=seed, num_steps=2)


def test_a_client_who_leaves_ends_the_work(grammar):
    busy = worker.Worker(grammar)
    job, items = _job(grammar, 0, num_steps=256)
    busy.submit(job)
    wait_until(lambda: items, "the first frame")
    job.cancelled = True
    end, then = _job(grammar, 1, num_steps=2)
    busy.submit(end)
    wait_until(lambda: then and then[-1] is None, "the next job's end")
    assert len(items) < 256


def test_a_failure_of_the_model_is_told_and_the_next_request_runs(grammar, monkeypatch):
    client = TestClient(
        serving.make_app(grammar, "grammar"), raise_server_exceptions=False
    )
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "stream", lambda *_: 1 / 0)
        answer = client.post("/v1/sample", json={"num_steps": 2})
        assert answer.status_code == 500
        assert answer.json() == {"error": "the model failed"}
        ((name, _),) = _events(client.post("/v1/stream", json={"num_steps": 2}))
        assert name == "error"
    assert client.post("/v1/sample", json={"num_steps": 2}).status_code == 200


@pytest.mark.slow
def test_many_clients_lose_nothing(grammar):
    """50 at once, each its own seed: every answer is 200 with its texts, or 503."""
    app = serving.make_app(grammar, "grammar")

    async def ask(client, seed):
        body = {"n": 2, "seed": seed, "num_steps": 8}
        for _ in range(200):
            answer = await client.post("/v1/sample", json=body)
            if answer.status_code != 503:
                return answer
            await anyio.sleep(0.05)
        raise AssertionError("always busy")

    async def run():
        answers = [None] * 150
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=120
        ) as client:

            async def one(i):
                answers[i] = await ask(client, i)

            async with anyio.create_task_group() as group:
                for i in range(len(answers)):
                    group.start_soon(one, i)
        return answers

    for seed, answer in enumerate(anyio.run(run)):
        assert answer.status_code == 200
        if seed % 25 == 0:
            texts = grammar.sample(2, seed=seed, num_steps=8)
            assert answer.json()["texts"] == texts
