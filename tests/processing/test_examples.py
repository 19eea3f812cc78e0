import polars as pl

from mllm_msr.processing.examples import task_contexts, training_examples


def frames():
    tasks = pl.DataFrame(
        {
            "task_id": ["t0", "t1", "t2"],
            "user_id": ["u", "u", "v"],
            "history": [["a", "b", "c", "d"], ["a", "b", "c"], ["e"]],
            "candidates": [["x", "y"], ["y", "z"], ["z", "x"]],
            "labels": [[1, 0], [0, 1], [1, 0]],
        }
    )
    preferences = pl.DataFrame({"user_id": ["u", "u"], "step": [1, 2], "preference": ["h1", "h2 has read too much"]})
    summaries = pl.DataFrame({"item_id": list("abcdexyz"), "summary": [f"sum {c}" for c in "abcdexyz"]})
    return tasks, preferences, summaries


def test_a_task_uses_the_last_preference_before_it_and_what_came_since():
    out = task_contexts(*frames(), block_size=3)
    assert out.select("task_id", "preference", "recent").rows() == [
        ("t0", "h1", ["sum d"]),
        ("t1", "h1", []),
        ("t2", "", ["sum e"]),
    ]


def test_examples_keep_candidates_and_labels_together_and_read_as_a_chat():
    image = {"bytes": b"...", "path": None}
    items = pl.DataFrame(
        {"item_id": list("xyz"), "title": ["X", "Y", "Z"], "text": ["", "why", ""], "image": [image, None, image]}
    )
    recent = "{% for one in recent %}{{ one.summary }}{% endfor %}"
    prompt = f"{{{{ preference }}}}|{recent}|{{{{ title }}}} {{{{ image }}}} {{{{ text }}}} {{{{ noun }}}}?"
    out = training_examples(task_contexts(*frames(), block_size=3), items, prompt, "mug")
    assert out.select("task_id", "item_id", "label", "title").rows() == [
        ("t0", "x", 1, "X"),
        ("t0", "y", 0, "Y"),
        ("t1", "y", 0, "Y"),
        ("t1", "z", 1, "Z"),
        ("t2", "z", 1, "Z"),
        ("t2", "x", 0, "X"),
    ]
    assert out["prompt"][0].to_list() == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "h1|sum d|X "},
                {"type": "image", "text": None},
                {"type": "text", "text": "  mug?"},
            ],
        }
    ]
    assert out["prompt"][1][0]["content"] == [{"type": "text", "text": "h1|sum d|Y  why mug?"}]
    assert [row[0]["content"][0]["text"] for row in out["completion"]] == ["Yes", "No", "No", "Yes", "Yes", "No"]


def test_the_chat_has_no_control_token_of_what_people_wrote():
    items = pl.DataFrame(
        {"item_id": list("xyz"), "title": ["<image> X", "<|im_end|>", "a < b"], "text": ["</s>", "[INST]", ""]}
    ).with_columns(image=pl.lit(None, pl.Struct({"bytes": pl.Binary, "path": pl.String})))
    out = training_examples(task_contexts(*frames(), block_size=3), items, "{{ title }} {{ text }}")
    words = {row["title"]: row["prompt"][0]["content"][0]["text"] for row in out.to_dicts()}
    assert words == {"<image> X": "< image> X < /s>", "<|im_end|>": "< |im_end|> [ INST]", "a < b": "a < b"}
