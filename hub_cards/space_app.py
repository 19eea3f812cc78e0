"""The demo: a taste becomes words block by block, and a whole catalogue is ranked for it, with the reasons.

With ``space_view.py`` it is the app of the Space, where ``space.json`` names the model and the data set; and of
``mllm-msr demo --serve``, which hands it two folders. It needs the model's own code only, none of the package. What it
ranks by is that code's ``recommend``, as is what ``mllm-msr serve`` answers. Where the package ``mcp`` is installed, it
is an MCP server as well; on ZeroGPU it takes the card for as long as it computes.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import spaces  # of ZeroGPU; before torch

    on_gpu: Callable[[Any], Any] = spaces.GPU
except ImportError:

    def on_gpu(function: Any) -> Any:
        return function


import gradio as gr
from datasets import load_dataset
from huggingface_hub import HfApi
from PIL import Image
from transformers import pipeline

from mllm_msr.hub_cards.space_view import CSS, SHOWN, View

SHELF = 48  # items to click
N_USERS = 200  # in the list
RERANKED = 100  # of the heads' best, which the answer scores
ANSWERED = 2000  # items that the answer alone is asked of
TILES: dict[str, Any] = {"columns": 6, "allow_preview": False, "show_label": False, "buttons": []}


class Shown(Mapping[str, Any]):
    """The catalogue as the answer is shown it."""

    def __init__(self, demo: "Demo", image: bool, text: bool) -> None:
        self.demo = demo
        self.hidden = {**({} if image else {"image": None}), **({} if text else {"title": "", "text": ""})}

    def __getitem__(self, item: str) -> dict[str, Any]:
        return {**self.demo.prepared(item), **self.hidden}

    def __iter__(self) -> Iterator[str]:
        return iter(self.demo.place)

    def __len__(self) -> int:
        return len(self.demo.place)


def commit(name: str, kind: str, revision: str | None) -> dict[str, Any]:
    """Where all files of a repository are of one commit; nothing for a folder."""
    found = None if os.path.isdir(name) else HfApi().repo_info(name, repo_type=kind, revision=revision).sha
    return {"revision": found} if found else {}


class Demo:
    """A model and the data set it was trained on, as published.

    Args:
        model: repository or folder of the model.
        dataset: repository or folder of the data set.
        revision: release of both; None for folders.
        noun: what an item is called.
        block_size: items of a history block.
    """

    def __init__(self, model: str, dataset: str, revision: str | None, noun: str, block_size: int) -> None:
        self.noun, self.block_size = noun, block_size
        of_model, of_data = commit(model, "model", revision), commit(dataset, "dataset", revision)
        self.folder = tempfile.TemporaryDirectory()  # else a folder would be taken for another of its name, once read
        cached = self.folder.name if os.path.isdir(dataset) else None
        task: Any = "sequential-recommendation"
        pipe: Any = pipeline(task, model=model, trust_remote_code=True, **of_model)
        self.split_history, self.ranker = pipe.split_history, pipe.model.item_ranker

        def table(name: str, split: str = "train") -> Any:
            return load_dataset(dataset, name, split=split, cache_dir=cached, **of_data)

        items = table("items")
        self.titles = dict(zip(items["item_id"], items["title"], strict=True))
        self.place = {item: row for row, item in enumerate(self.titles)}
        self.summary = {row["item_id"]: row["summary"] for row in table("item_summaries")}
        self.words = {item: f"{title} {self.summary.get(item, '')}".lower() for item, title in self.titles.items()}
        self.tasks = {row["user_id"]: row for row in table("tasks", "test")}
        self.steps: dict[str, list[str]] = {user: [] for user in self.tasks}
        for row in sorted(table("preferences"), key=lambda row: row["step"]):
            if row["user_id"] in self.steps:
                self.steps[row["user_id"]].append(row["preference"])
        self.users = [(f"user {number}", user) for number, user in enumerate(list(self.tasks)[:N_USERS], 1)]
        whole = (user for _, user in self.users if len(self.tasks[user]["history"]) > block_size)
        self.example = next(whole, self.users[0][1] if self.users else None)

        def item(name: str) -> dict[str, Any]:
            row = items[self.place[name]]
            return {"item_id": name, "title": row["title"], "text": row["text"], "image": row["image"]}

        @lru_cache(1000)
        def prepared(name: str) -> dict[str, Any]:
            found = item(name)  # what is computed of an image is kept, if it comes prepared
            return found | {"image": found["image"] and pipe.processor.prepare_images([found["image"]])[0]}

        def recommend(history: list[str], user: dict[str, Any], shown: tuple[bool, bool], wanted: dict) -> list[Any]:
            return pipe.recommend(history, Shown(self, *shown), user, **wanted)

        def preferences(history: list[dict[str, str]]) -> Iterator[str]:
            yield from pipe.preferences(history, block_size=block_size, max_new_tokens=64)

        self.item, self.prepared = item, prepared
        self.recommend, self.preferences = on_gpu(recommend), on_gpu(preferences)

    def find(self, words: str) -> tuple[list[str], str]:
        """Items to click, and which of all items they are."""
        wanted, everything = words.lower().split(), list(self.place)
        if not wanted:
            drawn = random.Random(0).sample(everything, min(SHELF, len(everything)))
            return drawn, f"{len(drawn)} of {len(everything)} {self.noun}s, drawn at random; name others to find them"
        found = [item for item in everything if all(word in self.words[item] for word in wanted)]
        first = "" if len(found) <= SHELF else f"the first {SHELF} of "
        return found[:SHELF], f"{first}{len(found)} {self.noun}s whose title or summary has “{words.strip()}”"

    def tiles(self, names: Sequence[str]) -> list[tuple[Image.Image, str]]:
        """Images with titles; a grey one where the data set has none."""
        items = [self.item(name) for name in names]
        return [(item["image"] or Image.new("RGB", (96, 96), "#ddd"), item["title"]) for item in items]

    def written(self, user: str) -> tuple[list[str], list[str]]:
        """A user's history, and the preference after each whole history block of it."""
        history = self.tasks[user]["history"]
        blocks, _ = self.split_history(history, self.block_size)
        return history, self.steps[user][: len(blocks)]

    def write(self, history: list[str]) -> Iterator[list[str]]:
        """The preferences of a new history, one history block after the other, as they are being written."""
        steps: list[str] = []
        for text in self.preferences([self.in_words(item) for item in history]):
            steps.append(text)
            yield steps

    def in_words(self, item: str) -> dict[str, str]:
        return {"title": self.titles[item], "summary": self.summary.get(item, "")}

    def rank(
        self, history: list[str], steps: list[str], image: bool, text: bool, heads: bool, shown: int = SHOWN
    ) -> tuple[list[Any], list[str]]:
        """All items that are not in a history, best first, and what is to be said of that.

        Args:
            image, text: whether the answer is given the items' images, and their titles and texts.
            heads: whether the heads rank as well.
            shown: how many of the best come with their reasons.
        """
        heads, asked = heads and self.ranker is not None, image or text
        left = len(self.place) - len(set(history))
        hidden = [name for name, shown in (("images", image), ("titles and texts", text)) if not shown]
        said = [f"Ranked are all {left} {self.noun}s that are not in the history."]
        if not (heads or asked):
            return [], ["Nothing is left to rank by: show the answer images or texts, or let the heads rank."]
        if not heads and left > ANSWERED:
            return [], [f"{left} {self.noun}s are too many for the answer alone: let the heads rank as well."]
        if not asked:
            said.append("The answer is shown neither images nor texts, so it is left out: the heads rank alone.")
        elif hidden:
            said.append(f"The answer sees no {hidden[0]}" + ("; the heads' vectors do." if heads else "."))
        if heads and asked and left > RERANKED:
            said.append(f"The answer is asked of the heads' best {RERANKED}; the others follow in the heads' order.")
        if heads and (lost := [item for item in self.place if item not in self.ranker]):
            said.append(f"{len(lost)} {self.noun}s have no vector, so the heads cannot rank them.")
        _, recent = self.split_history(history, self.block_size)
        user = {"preference": steps[-1] if steps else "", "recent": [self.recent(item) for item in recent]}
        rerank = left if not heads else RERANKED if asked else 0
        wanted = {"n": left, "by": "fused" if heads else "answer", "rerank": rerank, "explain": shown if heads else 0}
        return self.recommend(history, user, (image, text), wanted), said

    def recent(self, item: str) -> dict[str, str]:
        """An item that no preference has read, as the answer was trained to read it."""
        return {"summary": self.summary[item]} if self.summary.get(item) else {"title": self.titles[item]}

    def chosen_next(self, user: str | None) -> str | None:
        """What a user of the data set really chose after the history."""
        task = self.tasks[user] if user else {"candidates": [], "labels": []}
        return next((item for item, label in zip(task["candidates"], task["labels"], strict=True) if label), None)


def build_app(demo: Demo, name: str) -> gr.Blocks:
    """The page, and the two functions that it has for programs."""
    view, noun = View(demo), demo.noun
    private: dict[str, Any] = {"api_visibility": "private"}
    in_turn = {**private, "concurrency_id": "page"}  # or what was asked for first might be shown last

    def find(words: str) -> list[dict[str, str]]:
        """Find items of the catalogue, whose ids are what a history consists of.

        Args:
            words: that an item's title or summary must have; empty for some items at random.
        """
        return [{"item_id": item, **demo.in_words(item)} for item in demo.find(words)[0]]

    def recommend(
        history: list[str], n: int = 10, image: bool = True, text: bool = True, heads: bool = True
    ) -> dict[str, Any]:
        """Recommend items of the catalogue after a history, and say why.

        Args:
            history: ids of items that were chosen, oldest first, as `find` gives them.
            n: how many to return.
            image: whether the answer of the language model sees the items' images.
            text: whether it reads their titles and texts.
            heads: whether the heads over item vectors rank as well.
        """
        if unknown := [item for item in history if item not in demo.place]:
            raise gr.Error(f"{unknown[0]!r} is no item of the catalogue: take ids from `find`")
        if not history:
            raise gr.Error("the history is empty: give the ids of one item or more")
        steps = list(demo.preferences([demo.in_words(item) for item in history]))
        found, said = demo.rank(history, steps, image, text, heads, n)
        results = [
            {"item_id": each.item_id, **demo.in_words(each.item_id), "score": each.score, "shares": each.shares}
            | {"nearest": [near.item_id for near in each.nearest]}
            for each in found[:n]
        ]
        return {"preference": steps[-1] if steps else "", "said": said, "results": results}

    with gr.Blocks(title="MLLM-MSR") as app:
        user, history, steps = gr.State(None), gr.State([]), gr.State([])
        shelf, shown = gr.State(demo.find("")[0]), gr.State(SHOWN)
        gr.Markdown(
            f"# From a history to a ranking\n{name}: {len(demo.place)} {noun}s. Every {demo.block_size} chosen ones "
            "become words, a preference. Heads over item vectors rank all the others by the history, and the language "
            "model answers for the best of these whether someone of this preference would choose them."
        )
        with gr.Row():
            with gr.Column():
                of = f"the first {len(demo.users)} of {len(demo.tasks)}" if len(demo.users) < len(demo.tasks) else "all"
                who = gr.Dropdown(demo.users, value=None, label=f"Choose a user ({of})", elem_id="who")
                words = gr.Textbox(
                    label=f"or click {noun}s to make a history of your own; find them by", elem_id="find"
                )
                which = gr.Markdown(demo.find("")[1], elem_id="which")
                tiles = gr.Gallery(demo.tiles(demo.find("")[0]), elem_id="shelf", height=420, **TILES)
                clear = gr.Button("Start again", elem_id="clear")
            with gr.Column():
                gr.Markdown("### The history, oldest first, and its preferences")
                past = gr.HTML(view.story([], []), elem_id="past")
        gr.Markdown(f"### All other {noun}s, best first")
        with gr.Row(elem_id="ways"):
            image = gr.Checkbox(True, label="the answer sees images", elem_id="image")
            text = gr.Checkbox(True, label="the answer reads titles and texts", elem_id="text")
            heads = gr.Checkbox(True, label="the heads rank", elem_id="heads", visible=demo.ranker is not None)
        ranking = gr.HTML(elem_id="ranking")
        more = gr.Button(f"Show {SHOWN} more", elem_id="more", visible=False)

        toggles, everything = [image, text, heads], [user, history, steps, shown, who, past, ranking, more]

        def page(user: str | None, history: list[str], steps: list[str], shown: int, *ways: bool) -> tuple:
            image, text, heads = ways
            ranked, more_left = view.ranking(user, history, steps, image, text, heads, shown)
            story = view.story(history, steps)
            return user, history, steps, shown, user, story, ranked, gr.update(visible=more_left)

        def choose(user: str | None, *ways: bool) -> tuple:
            return page(user, *(demo.written(user) if user else ([], [])), SHOWN, *ways)

        def begin() -> tuple:
            """Everything as it is without a history, the boxes ticked."""
            return *choose(None, True, True, True), True, True, True

        def add(
            user: str | None,
            history: list[str],
            shelf: list[str],
            image: bool,
            text: bool,
            heads: bool,
            clicked: gr.SelectData,
        ) -> Iterator[tuple]:
            history = [*([] if user else history), shelf[clicked.index]]
            steps: list[str] = []
            yield None, history, steps, SHOWN, None, view.story(history, steps), gr.skip(), gr.skip()
            for steps in demo.write(history):
                yield None, history, steps, SHOWN, None, view.story(history, steps), gr.skip(), gr.skip()
            yield page(None, history, steps, SHOWN, image, text, heads)

        def search(words: str) -> tuple:
            found, said = demo.find(words)
            return found, said, demo.tiles(found)

        app.load(lambda *ways: choose(demo.example, *ways), toggles, everything, **in_turn)
        who.input(choose, [who, *toggles], everything, **in_turn)
        words.change(search, words, [shelf, which, tiles], trigger_mode="always_last", **private)
        # a click while the one before is still being written waits for its turn; by default it would be lost
        tiles.select(add, [user, history, shelf, *toggles], everything, trigger_mode="multiple", **in_turn)
        clear.click(begin, None, [*everything, *toggles], **in_turn)
        for box in toggles:
            box.input(page, [user, history, steps, shown, *toggles], everything, trigger_mode="always_last", **in_turn)
        more.click(
            lambda user, history, steps, shown, *ways: page(user, history, steps, shown + SHOWN, *ways),
            [user, history, steps, shown, *toggles],
            everything,
            **in_turn,
        )
        gr.api(find, api_name="find")
        gr.api(recommend, api_name="recommend")
    return app


def serve(model: str, dataset: str, revision: str | None, noun: str, block_size: int, **launch: Any) -> None:
    """Load everything and serve the page until interrupted."""
    demo = Demo(model, dataset, revision, noun, block_size)
    name = f"{model} at {revision}" if revision else Path(model).resolve().parent.parent.name
    build_app(demo, name).launch(css=CSS, mcp_server=find_spec("mcp") is not None, **launch)


if __name__ == "__main__":
    settings = json.loads((Path(__file__).parent / "space.json").read_text(encoding="utf-8"))
    serve(**settings, server_name=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"))
