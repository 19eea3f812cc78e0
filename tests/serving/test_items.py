"""New items: the models that describe them."""

import threading

from mllm_msr.records.run import RunFolder
from mllm_msr.serving.items import ItemMaker, NewItem


def test_models_are_loaded_once_and_while_nothing_else_computes(run: RunFolder) -> None:
    loads = []

    def alone(function):
        loads.append(function)
        return function()

    maker = ItemMaker(run.recipe, threading.Lock(), alone)
    for _ in range(2):
        (summary,) = maker.summaries([NewItem("new", title="Blue mug")])
        vectors = maker.vectors([NewItem("new", title="Blue mug")], [summary])
    assert vectors.shape[0] == 1 and len(loads) == 2  # the engine, and what makes the vectors
