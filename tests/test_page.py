# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: sample, scrub, lock, control, score, and what goes wrong.

Needs Chromium (Debian's package `chromium`). DLM_BROWSER=1 makes its absence a failure.
"""

import os
import shutil
import socket
import subprocess
import sys
import urllib.request

import pytest
from conftest import wait_until

pytestmark = pytest.mark.slow
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module", params=["e2e", "e2e_mr"])
def served(request, tmp_path_factory):
    """The address of a server in a process of its own."""
    port = _free_port()
    command = [sys.executable, "-m", "dlm_jax.main", "--mode", "serve"]
    command += ["--model", request.param, "--port", str(port)]
    folder = tmp_path_factory.mktemp("serve")
    process = subprocess.Popen(command, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(f"{url}/v1/model"), "the server", 120)
        yield request.param, url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None and not os.environ.get("DLM_BROWSER"):
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=path, args=SWITCHES)


@pytest.fixture
def page(browser, served):
    """The page, loaded; a message of the browser's console is a failure."""
    _, url = served
    page, faults = browser.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    # the browser also calls a stream aborted that the page has read to its end
    page.on(
        "requestfailed",
        lambda request: (
            request.failure == "net::ERR_ABORTED"
            or faults.append(f"{request.url} {request.failure}")
        ),
    )
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector("#run:enabled")
    yield page
    page.close()
    assert faults == []


def _scrub(page, step):
    page.locator("#scrub").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", step
    )


def _sample(page, steps=8):
    page.locator("#num_steps").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", steps
    )
    page.click("#run")
    page.wait_for_selector(f"#step:text('step {steps} of {steps}')")
    page.wait_for_selector("#run:enabled")


def _lines(page):
    return [" ".join(line.split()) for line in page.locator(".text").all_inner_texts()]


def test_sample_scrub_and_play(page):
    _sample(page)
    last = _lines(page)
    assert len(last) == 4
    assert all(last)
    _scrub(page, 1)
    assert page.inner_text("#step") == "step 1 of 8"
    first = _lines(page)
    assert first != last
    assert page.locator(".s0, .s1").count() > page.locator(".s4").count()
    page.click("#play")
    page.wait_for_selector("#step:text('step 8 of 8')")
    assert _lines(page) == last
    assert page.locator(".settled").count() > 0


def test_the_same_seed_is_the_same_text_and_the_next_is_another(page):
    _sample(page)
    first = _lines(page)
    _sample(page)
    assert _lines(page) == first
    page.click("#again")
    page.wait_for_selector("#run:disabled")
    page.wait_for_selector("#run:enabled")
    assert _lines(page) != first


def test_locked_words_stay(page):
    _sample(page)
    words = page.locator(".text").first.locator(".token")
    kept = [words.nth(i).inner_text() for i in (0, 1)]
    words.nth(0).click()
    words.nth(1).click()
    assert page.locator(".text").first.locator(".locked").count() == 2
    assert page.input_value("#template").startswith(f"{kept[0]} {kept[1]} ___")
    page.fill("#seed", "3")
    _sample(page)
    assert all(line.startswith(" ".join(kept)) for line in _lines(page))
    assert page.is_visible("#unlock")
    page.click("#unlock")
    assert page.input_value("#template") == ""


def test_control(page, served):
    page.fill("#contains", "riverside")
    page.fill("#length", "12")
    if served[0] == "e2e":
        page.fill("#semantic", "food: Italian")
    else:
        page.fill("#source", "name : Cotto | food : Italian | area : riverside")
    _sample(page, 32)
    lines = _lines(page)
    assert sum("riverside" in line for line in lines) >= 3
    assert sum("Italian" in line for line in lines) >= 2
    if served[0] == "e2e":
        assert {len(line.split()) for line in lines} == {12}


def test_likelihood_by_token(page):
    page.fill("#text", "The Eagle is a pub pub pub .")
    page.click("#score button")
    page.wait_for_selector(".scored")
    assert page.locator(".scored figure").count() >= 7
    assert "nats in all" in page.inner_text("#scores")


def test_a_mistake_is_told_and_mended(page):
    page.fill("#template", "The zzzz ___")
    page.click("#run")
    page.wait_for_selector("#error:has-text('zzzz')")
    page.fill("#template", "")
    _sample(page)
    assert page.inner_text("#error") == ""


def test_a_server_that_is_gone_is_told(page):
    page.route("**/v1/stream", lambda route: route.fulfill(status=503, body="busy"))
    page.click("#run")
    page.wait_for_selector("#error:has-text('busy')")
    page.wait_for_selector("#run:enabled")


def test_the_api_has_its_page(page, served):
    page.goto(f"{served[1]}/docs")
    page.wait_for_selector("h2:has-text('POST /v1/stream')")
    assert "num_steps" in page.inner_text("#operations")
