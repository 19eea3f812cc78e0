"""The demo page: what it ranks by and says, `mllm-msr show RUN page` as it is typed, its tools, and a real browser."""

import asyncio
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from hub_run import fabricate, finish
from playwright.sync_api import Error, Page, expect, sync_playwright
from ports import free_port
from tiny_rankers import fusion, make

from mllm_msr import Candidate, MllmMsrForRecommendation, MllmMsrProcessor, User
from mllm_msr.hub_cards import space_app
from mllm_msr.hub_cards.space_view import SHOWN, View
from mllm_msr.modeling.item_ranking import ItemRanker
from mllm_msr.modeling.recommending import fused_scores
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import ITEMS

BASE = str(files("mllm_msr") / "demo" / "base")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ALL = (True, True, True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run that passes for a finished one, with the demo's base model and random heads."""
    run = fabricate(tmp_path_factory.mktemp("served") / "run")
    shutil.rmtree(run.model)
    processor = MllmMsrProcessor.from_backbone(BASE)
    model = MllmMsrForRecommendation.from_backbone(BASE, processor=processor, dtype=torch.float32)
    for part in (model, processor):
        part.save_pretrained(run.model)
    random = make()
    ranker = ItemRanker.of(run.read(ITEMS)["item_id"].to_list(), dict(random.members), random.fusion)
    ranker.answer_fusion = fusion("mllm_msr", "others")
    ranker.save_pretrained(run.head)
    finish(run)
    run.stage("vectors", lambda key: None, writes=[run.config])
    run.stage("head", lambda key: None, writes=[run.head])
    return run


@pytest.fixture(scope="module")
def url(run: RunFolder) -> Iterator[str]:
    port = str(free_port())
    environment = {
        **os.environ,
        "HF_HOME": str(run.path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    command = [str(Path(sys.executable).with_name("mllm-msr")), "show", str(run.path), "page", "--port", port]
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


def in_another_process(function: Any) -> Any:
    """As ZeroGPU runs a function: what goes in and comes out is pickled."""

    def each(*given: Any) -> Iterator[Any]:
        for result in function(*pickle.loads(pickle.dumps(given))):
            yield pickle.loads(pickle.dumps(result))

    def whole(*given: Any) -> Any:
        return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(given)))))

    return each if inspect.isgeneratorfunction(function) else whole


@pytest.fixture(scope="module")
def demo(run: RunFolder, url: str) -> Iterator[space_app.Demo]:
    """What the page is made of, from the folders that the command has built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_app, "on_gpu", in_another_process)
        folders = [str(run.hub / part) for part in ("model", "dataset")]
        yield space_app.Demo(*folders, None, "thing", 3)


# ---- what it ranks by, and what it says ------------------------------------------------------------------------------


def test_it_ranks_the_whole_catalogue_as_the_heads_and_the_answer_do(run: RunFolder, demo: space_app.Demo) -> None:
    history, steps = demo.written("u1")
    found, said = demo.rank(history, steps, *ALL)
    others = [item for item in demo.place if item not in history]
    model = MllmMsrForRecommendation.from_pretrained(run.model, dtype=torch.float32)
    _, recent = demo.split_history(history, 3)
    words = User.of({"preference": steps[-1], "recent": [demo.recent(item) for item in recent]})
    processor, shown = MllmMsrProcessor.from_pretrained(run.model), [demo.item(item) for item in others]
    logits = [model.score(**processor([words], [Candidate.of(item)])).logits for item in shown]
    ranker = ItemRanker.from_pretrained(run.head)
    expected = dict(zip(others, fused_scores(ranker, history, others, torch.cat(logits).numpy()), strict=True))
    assert {each.item_id: each.score for each in found} == pytest.approx(expected, abs=1e-4)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert said == [f"Ranked are all {len(others)} things that are not in the history."]
    for each in found[:SHOWN]:
        assert sum(each.shares.values()) == pytest.approx(each.score, abs=1e-4) and "answer" in each.shares
        assert [near.item_id for near in each.nearest] == [
            near.item_id for near in ranker.nearest(each.item_id, history, 3)
        ]


def test_each_toggle_takes_something_away_and_says_so(demo: space_app.Demo) -> None:
    history, steps = demo.written("u1")

    def order(*ways: bool) -> tuple[list[str], str]:
        found, said = demo.rank(history, steps, *ways)
        return [each.item_id for each in found], " ".join(said)

    whole, alone = order(*ALL)[0], order(True, True, False)[0]
    assert sorted(whole) == sorted(alone) and whole != alone
    assert "sees no images; the heads' vectors do" in order(False, True, True)[1]
    assert order(False, True, True)[0] != whole != order(True, False, True)[0]
    heads, said = order(False, False, True)
    scores = dict(zip(demo.ranker.item_ids, demo.ranker.score([history])[0].tolist(), strict=True))
    assert heads == sorted(heads, key=lambda item: -scores[item]) and "the heads rank alone" in said
    assert order(False, False, False) == (
        [],
        "Nothing is left to rank by: show the answer images or texts, or let the heads rank.",
    )


def test_what_cannot_be_ranked_or_shown_is_told(demo: space_app.Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    view, (history, steps) = View(demo), demo.written("u1")
    page, more = view.ranking("u1", history, steps, *ALL, 5)
    left = len(demo.place) - len(history)
    assert f"Shown are the first 5 of {left}." in page and page.count('<li class="card') == 5 and more
    assert view.ranking("u1", history, steps, *ALL, left)[1] is view.ranking(None, [], [], *ALL, 5)[1] is False
    assert f"{demo.titles[demo.chosen_next('u1')]}, is at place " in page
    monkeypatch.setattr(space_app, "ANSWERED", 5)
    assert (
        f"{left} things are too many for the answer alone"
        in view.ranking("u1", history, steps, True, True, False, 5)[0]
    )
    monkeypatch.setattr(space_app, "RERANKED", 4)
    monkeypatch.setattr(demo, "place", {**demo.place, "new": 99})
    found, said = demo.rank(history, steps, *ALL)
    assert "the heads' best 4" in said[1] and said[2] == "1 things have no vector, so the heads cannot rank them."
    assert [each.logit is None for each in found] == [False] * 4 + [True] * (left - 4)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)


def test_things_are_found_by_words_of_their_titles_and_summaries(demo: space_app.Demo) -> None:
    word = demo.summary["i0003"].split()[0]
    found, said = demo.find(word.upper())
    assert "i0003" in found and all(word in demo.words[item] for item in found) and word.upper() in said
    assert demo.find("no such thing") == ([], "0 things whose title or summary has “no such thing”")
    assert len(demo.find("")[0]) == 30 and "drawn at random" in demo.find("")[1]


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def test_the_page_answers(url: str) -> None:
    with urlopen(url) as reply:
        page = reply.read().decode()
    assert "MLLM-MSR" in page and "Choose a user" in page and "the answer sees images" in page


def test_programs_call_it_by_the_model_context_protocol(url: str, demo: space_app.Demo) -> None:
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk() -> tuple[set[str], Any]:
        tools = streamablehttp_client(f"{url}/gradio_api/mcp/")
        async with tools as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            call = {"history": ["i0001", "i0002", "i0003"], "n": 3}
            return names, await session.call_tool("recommend", call)

    tools, reply = asyncio.run(talk())
    assert tools == {"find", "recommend"} and not reply.isError
    steps = list(demo.preferences([demo.in_words(item) for item in ("i0001", "i0002", "i0003")]))
    best = demo.rank(["i0001", "i0002", "i0003"], steps, *ALL)[0][0].item_id
    assert best in reply.content[0].text and "nearest" in reply.content[0].text


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as play:
        try:
            yield play.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium to drive: {error.message.splitlines()[0]}")


def opened(browser: Any, url: str, width: int) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 1250})
    page.set_default_timeout(120_000)
    expect.set_options(timeout=120_000)
    page.goto(url)
    page.wait_for_selector("#ranking .card")
    return page


def titles(page: Page) -> list[str]:
    return page.locator("#ranking .title").all_inner_texts()


def test_it_opens_on_a_worked_example_whose_toggles_work(browser: Any, url: str) -> None:
    page = opened(browser, url, 1280)
    expect(page.locator("#past .step").first).to_contain_text("Likes")
    page.focus("#who input")
    expect(page.locator("#who [role=listbox]")).to_be_visible()
    while page.evaluate("document.activeElement.closest('#find')") is None:
        page.keyboard.press("Tab")
        page.wait_for_timeout(100)
    expect(page.locator("#who [role=listbox]")).to_be_hidden()
    whole = titles(page)
    assert [title.removeprefix("★ ").split(".")[0] for title in whole] == [str(place) for place in range(1, SHOWN + 1)]
    assert page.locator("#ranking details[open] .shares").count() == 3
    assert page.locator("#past script, #ranking script").count() == 0  # a title of the run is HTML
    seen = [whole]
    for box in ("#image", "#heads"):
        page.click(f"{box} input")
        deadline = time.monotonic() + 120
        while (shown := titles(page)) == seen[-1] or len(shown) < len(whole):
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)
        seen.append(shown)
    assert seen[0] != seen[1] != seen[2]
    left = int(re.search(r"all (\d+) things", page.locator("#ranking .said").inner_text())[1])
    for shown in [*range(2 * SHOWN, left, SHOWN), left]:
        page.click("#more")
        expect(page.locator("#ranking .card")).to_have_count(shown)
    expect(page.locator("#more")).to_be_hidden()
    page.close()


def test_click_a_history_on_a_phone_and_see_its_preference_written(browser: Any, url: str) -> None:
    page = opened(browser, url, 390)
    page.fill("#find input, #find textarea", "likes nothing")
    expect(page.locator("#shelf .thumbnail-item")).to_have_count(0)
    page.fill("#find input, #find textarea", "")
    expect(page.locator("#shelf .thumbnail-item")).to_have_count(30)
    for number in range(4):
        page.locator("#shelf .thumbnail-item").nth(number).click()
        expect(page.locator("#past img")).to_have_count(number + 1)
        expect(page.locator("#past .step")).to_have_count((number + 1) // 3)
        expect(page.locator("#ranking .said")).to_contain_text(f"all {29 - number} things")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#text input")
    page.click("#clear")
    expect(page.locator("#past img")).to_have_count(0)
    expect(page.locator("#ranking")).to_contain_text("Nothing is ranked without a history")
    page.mouse.move(0, 0)
    borders = page.locator("#shelf .thumbnail-item").evaluate_all(
        "all => all.map(e => getComputedStyle(e).borderColor)"
    )
    assert len(set(borders)) == 1  # also of the tile that was clicked last
    expect(page.locator("#text input")).to_be_checked()
    expect(page.locator("#more")).to_be_hidden()
    page.close()
