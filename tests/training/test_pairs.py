"""Training on whole tasks: packed prompts, and users and items that are computed once (``interaction="late"``)."""

import json
import math
import shutil
from collections import Counter

import devices
import pytest
import torch
from devices import DEVICE
from packed_rows import packed_recommender
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import draw_image

from mllm_msr.modeling.inputs import Candidate, User
from mllm_msr.modeling.lora import language_model_lora_targets
from mllm_msr.modeling.modeling_mllm_msr import MllmMsrForRecommendation
from mllm_msr.modeling.packing import pack_joint, pack_late
from mllm_msr.modeling.ranking import Recommender
from mllm_msr.processing.examples import user_of
from mllm_msr.processing.processing_mllm_msr import MllmMsrProcessor
from mllm_msr.records.recipe import backbone_path
from mllm_msr.records.schema import CUT_INTERACTIONS
from mllm_msr.training import pair_trainer, sft
from mllm_msr.training.collators import AnswerCollator
from mllm_msr.training.data import task_rows
from mllm_msr.training.pair_collators import (
    LateCollator,
    PackedCollator,
    PreparedItems,
    chosen_items,
    log_item_frequency,
    measured_limits,
)
from mllm_msr.training.pair_trainer import answer_loss, listwise_loss, pair_weights
from mllm_msr.training.saving import save_recommender

LIMITS = (96, 96)


@pytest.fixture(scope="module")
def examples(small_run):
    return small_run.table("sft", "train")


@pytest.fixture(scope="module")
def tasks(examples):
    """The examples, one row a task."""
    return list(task_rows(examples, examples["task_id"]))


@pytest.fixture(scope="module")
def prepared(small_run):
    return PreparedItems(small_run.processor, small_run.items)


def test_tasks_hold_their_rows(examples):
    tasks = task_rows(examples, examples["task_id"])
    assert len(tasks) == len(set(examples["task_id"]))
    shown = [(t["task_id"], item, label) for t in tasks for item, label in zip(t["item_id"], t["label"], strict=True)]
    assert sorted(shown) == sorted(zip(examples["task_id"], examples["item_id"], examples["label"], strict=True))


def test_packed_loss_and_gradients_are_those_of_rows(small_run, examples, tasks, prepared):
    processor = small_run.processor
    chosen = [row for task in examples["task_id"][:6:2] for row in examples if row["task_id"] == task]
    model = MllmMsrForRecommendation.from_backbone(backbone_path("demo"), processor=processor, dtype=torch.float32)
    model.train()
    rows = AnswerCollator(processor, small_run.items)(chosen)
    plain = model(**{name: value.to(DEVICE) for name, value in rows.items()}).loss
    plain.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    wanted = {row["task_id"] for row in chosen}
    batch = PackedCollator(processor, prepared)([task for task in tasks if task["task_id"] in wanted])
    items = [item for task in tasks if task["task_id"] in wanted for item in task["item_id"]]
    assert [item for item, _ in batch["images"]] == items
    model.use_block_attention()
    packed = pack_joint(model, batch["prompts"], batch["group_ids"])
    loss = answer_loss(model(**packed).logits[0], batch["labels"].to(DEVICE), model.config.answer_token_ids)
    loss.backward()
    assert len(batch["labels"]) == len(chosen)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, weight in model.named_parameters():
        if name in expected:
            assert torch.allclose(weight.grad, expected[name], atol=1e-5, rtol=1e-4), name


def test_late_pairs_everybody_with_everything_but_what_they_chose(small_run, examples, tasks, prepared):
    cut = CUT_INTERACTIONS.frame([(tasks[0]["user_id"], tasks[2]["item_id"][0])])
    chosen = chosen_items(examples, small_run.table("tasks", "train"), cut)
    assert tasks[2]["item_id"][0] in chosen[tasks[0]["user_id"]]
    frequency = log_item_frequency(examples)
    collator = LateCollator(small_run.processor, prepared, limits=LIMITS, chosen=chosen, log_frequency=frequency)
    rows = tasks[:8]
    batch = collator(rows)
    shown = list(dict.fromkeys(item for row in rows for item in row["item_id"]))
    assert len(batch["users"]["input_ids"]) == 8 and len(batch["items"]["input_ids"]) == len(shown)
    pairs = [(user, shown[item]) for user, item in batch["pairs"].T.tolist()]
    assert len(set(pairs)) == len(pairs) > 8 * 2
    for (user, item), label in zip(pairs, batch["labels"].tolist(), strict=True):
        own = dict(zip(rows[user]["item_id"], rows[user]["label"], strict=True))
        assert label == own.get(item, 0)
        assert item in own or item not in chosen[rows[user]["user_id"]]
    left_out = {(user, item) for user in range(8) for item in shown} - set(pairs)
    assert left_out and all(item in chosen[rows[user]["user_id"]] for user, item in left_out)
    shares = Counter(item for item, label in zip(examples["item_id"], examples["label"], strict=True) if label)
    common = pairs.index(next(pair for pair in pairs if shares[pair[1]] > 1))
    expected = math.log(shares[pairs[common][1]] / sum(shares.values()))
    assert batch["log_q"][common].item() == pytest.approx(expected)


def test_late_pairs_can_be_limited_and_own_ones_stay(small_run, tasks, prepared):
    processor, rows = small_run.processor, tasks[:6]
    own = [(number, label) for number, row in enumerate(rows) for label in row["label"]]
    limited = LateCollator(processor, prepared, limits=LIMITS, pairs_per_user=3)(rows)
    assert Counter(limited["pairs"][0].tolist()) == {user: 3 for user in range(6)}
    alone = LateCollator(processor, prepared, limits=LIMITS, in_batch=False)(rows)
    assert list(zip(alone["pairs"][0].tolist(), alone["labels"].tolist(), strict=True)) == own
    assert limited["labels"].sum() == alone["labels"].sum() == 6


def test_limits_are_a_little_more_than_the_longest_blocks(small_run, examples):
    processor, items = small_run.processor, small_run.items
    user_limit, item_limit = measured_limits(processor, examples, items)
    users = processor.late_users([user_of(row["preference"], row["recent"]) for row in examples])
    for batch, limit in ((users, user_limit), (processor.late_items(list(items.values())), item_limit)):
        longest = int(batch["attention_mask"].sum(1).max())
        assert longest <= limit <= 1.125 * longest + 16 and limit % 16 == 0


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # tokens: Yes, No, another
    answers = {"yes": [0], "no": [1]}
    yes, no = 2 - math.log(math.e**2 + 2), 1 - math.log(math.e + 2)
    assert answer_loss(logits, torch.tensor([1, 0]), answers).item() == pytest.approx(-(yes + no) / 2)
    weights = pair_weights(torch.tensor([1, 0, 0, 0]), "balanced")
    assert weights.tolist() == [3, 1, 1, 1]
    weighted = answer_loss(logits, torch.tensor([1, 0]), answers, torch.tensor([3.0, 1.0]))
    assert weighted.item() == pytest.approx(-(3 * yes + no) / 4)
    differences, users = torch.tensor([1.0, 0.0, 5.0, 2.0]), torch.tensor([0, 0, 1, 1])
    loss = listwise_loss(differences, torch.tensor([1, 0, 0, 1]), users)
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_several_positives_of_a_user_do_not_compete():
    differences = torch.tensor([3.0, 1.0, 0.0])
    together = listwise_loss(differences, torch.tensor([1, 1, 0]), torch.zeros(3, dtype=torch.long))
    expected = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-1))) / 2
    assert together.item() == pytest.approx(expected, rel=1e-5)


def flags(run, output, **more):
    prompts = {**run.run.recipe.prompts, "late_user": "{{ preference }}", "late_item": "{{ title }} {{ image }}"}
    options = {
        "prompts": json.dumps(prompts),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 3,
        "max_eval_samples": 4,
        "logging_steps": 1,
    }
    return run.flags(output, **options | more)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("memory", [0, 2])
def test_a_late_recommender_is_trained_saved_resumed_and_ranks(small_run, tmp_path, memory):
    options = {"interaction": "late", "negatives_per_positive": 2, "eval_strategy": "steps", "eval_steps": 2}
    options["item_memory"] = memory
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path / "whole", **options)))
    save_recommender(trainer, tmp_path / "model")
    pairs = [entry["pairs"] for entry in trainer.state.log_history if "pairs" in entry]
    assert min(pairs) > 3 * 3  # more than the tasks' own
    assert all(0 <= entry["eval_auc"] <= 1 for entry in trainer.state.log_history if "eval_auc" in entry)

    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    again = sft.train(*sft.parse([], **flags(small_run, tmp_path / "cut", **options)))
    assert losses(again)[-2:] == pytest.approx(losses(trainer)[-2:], abs=1e-6)
    save_recommender(again, tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    model = MllmMsrForRecommendation.from_pretrained(tmp_path / "model")
    processor = MllmMsrProcessor.from_pretrained(tmp_path / "model")
    assert model.config.interaction == "late" and 16 <= model.config.user_limit <= 96
    assert model.config.item_memory == memory
    if memory:
        start = MllmMsrForRecommendation.from_backbone(backbone_path("demo"), processor=processor)
        start.config.interaction = "late"
        start.set_item_memory(memory)
        assert (model.item_memory.weight - start.item_memory.weight).abs().min() > 1e-6  # all of it was trained
    candidates = list(small_run.items.values())[:5]
    (ranked,) = Recommender(model, processor).rank([{"preference": "Likes red"}], candidates)
    assert len({one.logit for one in ranked}) == 5


@pytest.mark.parametrize(("given", "only"), [({}, [0, 0, 0, 1, 1, 1]), ({"item_memory_from": 0.0}, [1] * 6)])
def test_pairs_see_memory_alone_from_some_step_on_and_always_when_they_are_evaluated(
    small_run, tmp_path, monkeypatch, given, only
):
    seen, pack = [], pair_trainer.pack_late

    def noted(model, memory_only, **batch):
        seen.append((model.training, memory_only))
        return pack(model, memory_only=memory_only, **batch)

    monkeypatch.setattr(pair_trainer, "pack_late", noted)
    options = {"interaction": "late", "item_memory": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
    trainer = sft.train(*sft.parse([], **flags(small_run, tmp_path, **options, **given)))
    assert [memory_only for training, memory_only in seen if training] == only
    evaluated = [memory_only for training, memory_only in seen if not training]
    assert evaluated and all(evaluated)
    assert trainer.model.item_memory.weight.abs().min() > 0  # trained from the first step


@pytest.mark.parametrize("checkpointed", [False, True])
def test_late_training_computes_no_more_than_it_needs(backbone, checkpointed):
    """Each image once and outside the graph of gradients, the head of the language model for the answers only."""
    model, processor = packed_recommender(backbone("llava"), "late", (160, 240))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=language_model_lora_targets(model))).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    seen, heads = [], []
    model.base_model.vision_tower.register_forward_hook(
        lambda module, _, output: seen.append((len(output.last_hidden_state), output.last_hidden_state.requires_grad))
    )
    model.get_output_embeddings().register_forward_pre_hook(lambda module, given: heads.append(given[0].shape[:2]))
    items = [Candidate(str(number), "The Sea", image=draw_image(number)) for number in range(5)]
    blocks = processor.late_blocks([User("ships"), User("red"), User("blue films")], items, (160, 240))
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(5)).T
    logits = peft(**pack_late(model, **blocks, pairs=pairs)).logits[0]
    answer_loss(logits, pairs[1].to(DEVICE) % 2, processor.answer_token_ids).backward()
    assert seen == [(5, False)] and heads == [(1, 15)]
    assert all(weight.grad is not None for name, weight in peft.named_parameters() if "lora_" in name)


def test_packed_training_is_training_on_rows(small_run, tmp_path):
    """With everything in one batch, whatever the order."""
    count = len(set(small_run.table("sft", "train")["task_id"]))
    options = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no"}
    rows = flags(small_run, tmp_path / "rows", **options) | {"per_device_train_batch_size": 2 * count}
    packed = flags(small_run, tmp_path / "packed", **options, packed=True) | {"per_device_train_batch_size": count}
    plain, ours = (sft.train(*sft.parse([], **some)) for some in (rows, packed))
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-4)


def test_cached_image_features_and_a_listwise_loss(small_run, tmp_path):
    options = {"interaction": "late", "pair_loss": "listwise", "save_strategy": "no", "eval_strategy": "no"}
    options.update(user_limit=LIMITS[0], item_limit=LIMITS[1])
    options["log_q_correction"] = True
    plain, cached = (
        sft.train(*sft.parse([], **flags(small_run, tmp_path / str(cache), **options, cache_image_features=cache)))
        for cache in (False, True)
    )
    assert losses(cached) == pytest.approx(losses(plain), abs=1e-5)
    assert plain.image_features is None and len(cached.image_features) > 5
    with pytest.raises(ValueError, match="before the decoder to be frozen"):
        more = {"cache_image_features": True, "use_peft": False}
        sft.train(*sft.parse([], **flags(small_run, tmp_path / "full", **options, **more)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interaction": "early"}, "interaction='early': must be one of 'joint', 'late'"),
        ({"pair_loss": "listwise"}, "--pair_loss listwise needs all candidates of a task: add --packed"),
        ({"packed": True, "log_q_correction": True}, "--log_q_correction needs --interaction late"),
        ({"cache_image_features": True}, "--cache_image_features needs --packed or --interaction late"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(small_run, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        sft.parse([], **flags(small_run, tmp_path, **wrong))


@pytest.mark.parametrize("more", [{}, {"packed": True}, {"interaction": "late"}], ids=["rows", "packed", "late"])
@pytest.mark.parametrize("use_peft", [True, False])
def test_mixed_precision_over_float32_weights_trains_and_ranks(small_run, tmp_path, more, use_peft):
    """TRL's own defaults on a GPU, gradient checkpointing among them; here on the CPU."""
    options = {"bf16": True, "use_cpu": True, "gradient_checkpointing": True, "use_peft": use_peft, "max_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "max_eval_samples": 21}
    with devices.on_the_cpu():
        mixed, plain = (
            sft.train(*sft.parse([], **flags(small_run, tmp_path / str(bf16), **options, **more) | {"bf16": bf16}))
            for bf16 in (True, False)
        )
    assert losses(mixed) == pytest.approx(losses(plain), rel=0.1)
    assert all(weight.dtype == torch.float32 for weight in mixed.model.parameters())
    aucs = [entry["eval_auc"] for entry in mixed.state.log_history if "eval_auc" in entry]
    assert len(aucs) == 1 and 0 <= aucs[0] <= 1
