"""The proof against leakage over a whole run."""

import polars as pl
import pytest
from tiny_runs import Shop

from mllm_msr.cli import main
from mllm_msr.data.leakage import LeakageError
from mllm_msr.proof import prove
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import INTERACTIONS, ITEM_SUMMARIES


def test_proof_of_a_run_sees_ids_and_stale_tasks(shop: Shop) -> None:
    main(["prepare", *shop.arguments, "--output", str(shop.run)])
    run = RunFolder.open(shop.run)
    prove(run)
    log = run.read(INTERACTIONS)
    texts = ["a red mug", "like user-00042"]
    run.write(ITEM_SUMMARIES, ITEM_SUMMARIES.frame([(str(n), text, "ok", "", "", "") for n, text in enumerate(texts)]))
    prove(run)
    run.write(INTERACTIONS, log.with_columns(pl.lit("user-00042").alias("user_id")))
    with pytest.raises(LeakageError):
        prove(run)
    run.write(INTERACTIONS, log.vstack(log.head(1).with_columns(user_id=pl.lit("user-00042"))))
    with pytest.raises(LeakageError, match="raw ids in a text"):
        prove(run)


def test_proof_of_a_run_reads_what_max_history_cut_off(shop: Shop) -> None:
    main(["prepare", *shop.arguments, "--set", "data.max_history=4", "--output", str(shop.run)])
    run = RunFolder.open(shop.run)
    prove(run)
    tasks, seen = (pl.read_parquet(run.path / f"data/{name}.parquet") for name in ("tasks", "seen"))
    assert seen.height == 24
    user, item = seen.row(0)
    one = (pl.col("user_id") == user) & (pl.col("split") == "test")
    target = tasks.filter(one).explode("candidates", "labels").filter(labels=1)["candidates"][0]
    pair = pl.lit(pl.Series([[item, target]]))
    spoilt = tasks.with_columns(
        pl.when(one).then(pair).otherwise("candidates").alias("candidates"),
        pl.when(one).then(pl.lit(pl.Series([[0, 1]]))).otherwise("labels").alias("labels"),
    )
    spoilt.write_parquet(run.path / "data/tasks.parquet")
    with pytest.raises(LeakageError, match="negatives that the user has met"):
        prove(run)


def test_proof_of_a_run_reads_the_finished_prompts(shop: Shop) -> None:
    run = shop.run
    main(["prepare", *shop.arguments, "--output", str(run)])
    main(["summarize", "items", str(run)])
    main(["summarize", "users", str(run)])
    opened, path = RunFolder.open(run), run / "sft/train.parquet"
    prove(opened)
    rows = pl.read_parquet(path)
    (message,) = rows["prompt"][0]
    message["content"][0]["text"] += " 7"  # an id too short to be told from a number
    changed = pl.Series("prompt", [[message], *rows["prompt"][1:]], dtype=rows.schema["prompt"])
    rows.with_columns(changed).write_parquet(path)
    with pytest.raises(LeakageError, match=r"(?s)prompts that are not made of.* 1 rows"):
        prove(opened)
