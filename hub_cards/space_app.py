"""The demo: a taste becomes words block by block, and words rank candidates.

This one file is the app of the Space, where ``space.json`` beside it names the model and the data set; and of
``mllm-msr demo --serve``, which hands it two folders. It needs the model's own code only, none of the package.
"""

import html
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from datasets import load_dataset
from PIL import Image
from transformers import pipeline

SHELF = 48  # items to click
N_CANDIDATES = 20
N_USERS = 200  # in the list
TILES: dict[str, Any] = {"columns": 5, "allow_preview": False, "show_label": False, "buttons": []}
CSS = """
.step { border-left: 4px solid #8b5cf6; padding: .2rem .8rem; margin: .6rem 0 }
.step small, .unwritten { opacity: .7 }
"""


class Demo:
    """A model and the data set it was trained on, as published.

    Args:
        model: repository or folder of the model.
        dataset: repository or folder of the data set.
        revision: release of both; None for folders.
        block_size: items of a history block.
    """

    def __init__(self, model: str, dataset: str, revision: str | None, block_size: int) -> None:
        self.block_size = block_size
        pinned: dict[str, Any] = {"revision": revision} if revision else {}
        self.folder = tempfile.TemporaryDirectory()  # else a folder would be taken for another of its name, once read
        cache = None if revision else self.folder.name
        task: Any = "sequential-recommendation"
        self.pipe: Any = pipeline(task, model=model, trust_remote_code=True, **pinned)

        def table(name: str, split: str = "train") -> Any:
            return load_dataset(dataset, name, split=split, cache_dir=cache, **pinned)

        items = table("items")
        self.place = {item: row for row, item in enumerate(items["item_id"])}
        self.items = items
        self.summary = {row["item_id"]: row["summary"] for row in table("item_summaries")}
        self.tasks = {row["user_id"]: row for row in table("tasks", "test")}
        self.steps: dict[str, list[str]] = {user: [] for user in self.tasks}
        for row in sorted(table("preferences"), key=lambda row: row["step"]):
            if row["user_id"] in self.steps:
                self.steps[row["user_id"]].append(row["preference"])
        self.users = [(f"user {number}", user) for number, user in enumerate(list(self.tasks)[:N_USERS], 1)]
        self.shelf = random.Random(0).sample(list(self.place), min(SHELF, len(self.place)))

    def item(self, name: str) -> dict[str, Any]:
        row = self.items[self.place[name]]
        return {"item_id": name, "title": row["title"], "text": row["text"], "image": row["image"]}

    def tiles(self, names: list[str]) -> list[tuple[Image.Image, str]]:
        """Images with titles; a grey one where the data set has none."""
        items = [self.item(name) for name in names]
        return [(item["image"] or Image.new("RGB", (96, 96), "#ddd"), item["title"]) for item in items]

    def written(self, user: str) -> tuple[list[str], list[str]]:
        """A user's history, and the preference after each whole history block of it."""
        history = self.tasks[user]["history"]
        blocks, _ = self.pipe.split_history(history, self.block_size)
        return history, self.steps[user][: len(blocks)]

    def write(self, history: list[str]) -> Iterator[list[str]]:
        """The preferences of a new history, one history block after the other, as they are being written."""
        steps: list[str] = []
        chosen = [{"title": self.item(name)["title"], "summary": self.summary.get(name, "")} for name in history]
        for text in self.pipe.preferences(chosen, block_size=self.block_size, max_new_tokens=64):
            steps.append(text)
            yield steps

    def evolution(self, history: list[str], steps: list[str]) -> str:
        """The preference after each history block, as HTML; texts come from models and catalogues: they are escaped."""
        if not steps:
            return '<p class="unwritten">No block is whole yet.</p>'
        blocks, _ = self.pipe.split_history([self.item(name)["title"] for name in history], self.block_size)
        return "".join(
            f'<div class="step"><small>{number}. after {html.escape(", ".join(titles))}</small><br>'
            f"{html.escape(text)}</div>"
            for number, (titles, text) in enumerate(zip(blocks, steps, strict=False), 1)
        )

    def candidates(self, user: str | None, history: list[str]) -> tuple[list[str], set[str]]:
        """A user's frozen candidates and what they chose; for a new history, unseen items and nothing."""
        if user:
            task = self.tasks[user]
            chosen = {name for name, label in zip(task["candidates"], task["labels"], strict=True) if label}
            return task["candidates"], chosen
        unseen = sorted(set(self.place) - set(history))
        return random.Random(1).sample(unseen, min(N_CANDIDATES, len(unseen))), set()

    def rank(
        self, user: str | None, history: list[str], steps: list[str], image: bool, text: bool
    ) -> list[tuple[Image.Image, str]]:
        """The candidates, best first, with score.

        Args:
            image, text: whether the model is given the candidates' images, and their titles and texts.
        """
        names, chosen = self.candidates(user, history)
        hidden = {**({} if image else {"image": None}), **({} if text else {"title": "", "text": ""})}
        _, recent = self.pipe.split_history(history, self.block_size)
        ranked = self.pipe(
            {
                "preference": steps[-1] if steps else "",
                "recent": [{"summary": self.summary.get(name, "")} for name in recent],
                "candidates": [{**self.item(name), **hidden} for name in names],
            }
        )
        tiles = self.tiles([candidate["item_id"] for candidate in ranked])
        return [
            (tile, f"{'★ ' if candidate['item_id'] in chosen else ''}{place}. {candidate['score']:.2f} {title}")
            for place, (candidate, (tile, title)) in enumerate(zip(ranked, tiles, strict=True), 1)
        ]


def build_app(demo: Demo, noun: str, name: str) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="MLLM-MSR") as app:
        user, history, steps = gr.State(None), gr.State([]), gr.State([])
        gr.Markdown(f"# From a history to a ranking\n{name}")
        with gr.Row():
            with gr.Column():
                who = gr.Dropdown(demo.users, value=None, label="Choose a user", elem_id="who")
                gr.Markdown(f"or click {noun}s, one after the other, to make a history of your own")
                shelf = gr.Gallery(demo.tiles(demo.shelf), elem_id="shelf", height=340, **TILES)
                clear = gr.Button("Start again", elem_id="clear")
            with gr.Column():
                gr.Markdown("### The history, oldest first")
                past = gr.Gallery(elem_id="past", height=230, **TILES)
                gr.Markdown(f"### The preference, after every {demo.block_size} {noun}s")
                words = gr.HTML(demo.evolution([], []), elem_id="words")
        gr.Markdown("### Candidates, best first, with score (★: what this user really chose)")
        with gr.Row():
            image = gr.Checkbox(True, label="the model sees images", elem_id="image")
            text = gr.Checkbox(True, label="the model reads titles and texts", elem_id="text")
        ranking = gr.Gallery(elem_id="ranking", height=560, **{**TILES, "columns": 7})

        def page(user: str | None, history: list[str], steps: list[str], image: bool, text: bool) -> tuple:
            ranked = demo.rank(user, history, steps, image, text) if history else []
            return user, history, steps, demo.tiles(history), demo.evolution(history, steps), ranked

        def choose(user: str | None, image: bool, text: bool) -> tuple:
            return page(user, *(demo.written(user) if user else ([], [])), image, text)

        def add(
            user: str | None, history: list[str], image: bool, text: bool, clicked: gr.SelectData
        ) -> Iterator[tuple]:
            history = [*([] if user else history), demo.shelf[clicked.index]]
            steps: list[str] = []
            for steps in demo.write(history):
                yield None, history, steps, demo.tiles(history), demo.evolution(history, steps), gr.skip()
            yield page(None, history, steps, image, text)

        everything = [user, history, steps, past, words, ranking]
        who.input(choose, [who, image, text], everything)
        # a click while the one before is still being written waits for its turn; by default it would be lost
        added = shelf.select(add, [user, history, image, text], everything, trigger_mode="multiple")
        added.then(lambda: None, None, who)
        clear.click(lambda image, text: page(None, [], [], image, text), [image, text], everything).then(
            lambda: None, None, who
        )
        for box in (image, text):
            box.change(page, [user, history, steps, image, text], everything, trigger_mode="always_last")
    return app


def serve(model: str, dataset: str, revision: str | None, noun: str, block_size: int, **launch: Any) -> None:
    """Load everything and serve the page until interrupted."""
    demo = Demo(model, dataset, revision, block_size)
    name = f"{model} at {revision}" if revision else Path(model).resolve().parent.parent.name
    build_app(demo, noun, name).launch(css=CSS, **launch)


if __name__ == "__main__":
    settings = json.loads((Path(__file__).parent / "space.json").read_text(encoding="utf-8"))
    serve(**settings, server_name=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"))
