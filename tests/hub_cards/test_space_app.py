"""`mllm-msr show page` as it is typed: its page asked for over HTTP, and driven in a real browser."""

import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from hub_run import fabricate, finish
from playwright.sync_api import Error, Page, expect, sync_playwright
from ports import free_port

from mllm_msr import MllmMsrForRecommendation, MllmMsrProcessor

BASE = str(files("mllm_msr") / "demo" / "base")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page of a small run that passes for a finished one."""
    run = fabricate(tmp_path_factory.mktemp("served") / "run")
    shutil.rmtree(run.model)
    processor = MllmMsrProcessor.from_backbone(BASE)
    model = MllmMsrForRecommendation.from_backbone(BASE, processor=processor, dtype=torch.float32)
    for part in (model, processor):
        part.save_pretrained(run.model)
    finish(run)
    port = str(free_port())
    environment = {
        **os.environ,
        "HF_HOME": str(run.path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [str(Path(sys.executable).with_name("mllm-msr")), "show", "page", str(run.path), "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http://" in line), None)
        assert line, "the app ended before it was served"
        assert line.split()[-1] == f"http://127.0.0.1:{port}"
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(url):
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium to drive: {error.message.splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1300, "height": 1250})
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        page.goto(url)
        page.wait_for_selector("#shelf img")
        yield page
        browser.close()


def test_the_page_answers(url):
    with urlopen(url) as reply:
        page = reply.read().decode()
    assert "MLLM-MSR" in page and "Choose a user" in page and "the model sees images" in page


def captions(page: Page) -> list[str]:
    return page.locator("#ranking .caption-label").all_inner_texts()


def test_choose_a_user_and_toggle_what_the_model_sees(page):
    page.click("#who input")
    page.get_by_role("option").nth(2).click()
    expect(page.locator("#words .step").first).to_contain_text("Likes")
    expect(page.locator("#ranking img")).to_have_count(10)
    whole = captions(page)
    assert [one.removeprefix("★ ").split(".")[0] for one in whole] == [str(place) for place in range(1, 11)]
    assert sum(one.startswith("★") for one in whole) == 1
    scores = [float(one.removeprefix("★ ").split()[1]) for one in whole]
    assert scores == sorted(scores, reverse=True)
    seen = [whole]
    for box in ("#image", "#text"):
        page.click(f"{box} input")
        deadline = time.monotonic() + 120
        while (shown := captions(page)) == seen[-1] or len(shown) < len(whole):
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)
        seen.append(shown)
        assert sorted(one.split()[-1] for one in seen[-1]) == sorted(one.split()[-1] for one in whole)
    assert seen[0] != seen[1] != seen[2]


def test_click_a_history_and_see_its_preference_written(page):
    for number in range(4):
        page.locator("#shelf .thumbnail-item").nth(number).click()
        expect(page.locator("#past img")).to_have_count(number + 1)
        expect(page.locator("#words .step")).to_have_count((number + 1) // 3)
        expect(page.locator("#ranking img").first).to_be_visible()
    expect(page.locator("#words .step small")).to_contain_text("1. after")
    assert page.locator("#words script").count() == 0  # a title of the run is HTML
    page.click("#clear")
    expect(page.locator("#past img")).to_have_count(0)
    expect(page.locator("#words")).to_contain_text("No block is whole yet")
