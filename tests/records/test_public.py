"""What of a recipe others may see: nothing secret, nothing of this machine, and still all that decides a result."""

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import yaml

from mllm_msr.records.public import hide_secrets, public_recipe, public_text
from mllm_msr.records.recipe import Recipe, parse_recipe

RECIPE = {
    "name": "shop",
    "license": "https://creativecommons.org/licenses/by/4.0/",
    "source": {
        "type": "tables",
        "folder": "/home/someone/shop",
        "interactions": "https://me:pass@inner.example/log.csv?key=abc",
        "items": "goods.csv",
        "images": "/mnt/images",
        "columns": {"user_id": "customer"},
    },
    "summaries": {
        "engine": "openai",
        "model": "/home/someone/models/writer",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "base_url": "http://10.0.0.7:8000/tenant-4711/v1",
        "cache": "/home/someone/cache",
        "user_model": "clients/acme/writer",
        "quantization_config": {"endpoint": "inner", "bits": 4, "note": "sk-proj-0123456789"},
        "max_new_tokens": {"preference": 40},
    },
    "prompts": {"preference": "Look at https://example.com, then write."},
    "vectors": {"file": "/home/someone/vectors.npz"},
    "training": {
        "resume_from_checkpoint": "clients/acme/checkpoint-1",
        "model_name_or_path": "../clients/acme/llava",
        "model_revision": "89abcdef0123456789abcdef0123456789abcdef",
        "hub_token": "not-a-real-token",
        "push_to_hub_token": "abc",
        "hub_model_id": "acme/secret-project",
        "output_dir": "/home/someone/out",
        "logging_dir": r"C:\Users\someone\logs",
        "deepspeed": "~/ds.json",
        "report_to": ["wandb", "https://me@hooks.example/T000/B000"],
        "run_name": "hf_abcdefghijkl",
        "eos_token": None,
        "max_length": 512,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 4,
    },
}
SECRETS = (
    r"someone|pass|inner|10\.0|tenant|acme/llava|clients|not-a-real|hooks|hf_abc|sk-proj|log\.csv|goods|/mnt|ds\.json\.",
    r"C:|B000",
)


def test_no_secret_and_no_place_is_left():
    text = yaml.safe_dump(public_recipe(parse_recipe(RECIPE)))
    assert re.findall("|".join(SECRETS), text.replace("ds.json", "")) == []
    assert text.count("'***'") == 6


def test_what_decides_a_result_is_left_as_it_is():
    content = public_recipe(parse_recipe(RECIPE))
    assert content["source"] == {"type": "tables", "columns": {"user_id": "customer"}}
    assert content["summaries"]["model"] == "writer" and content["training"]["model_name_or_path"] == "llava"
    assert content["summaries"]["revision"] == RECIPE["summaries"]["revision"]
    assert content["summaries"]["max_new_tokens"] == {"preference": 40}
    assert content["summaries"]["quantization_config"]["bits"] == 4
    assert content["training"]["model_revision"] == RECIPE["training"]["model_revision"]
    assert (content["training"]["max_length"], content["training"]["learning_rate"]) == (512, 2e-5)
    assert content["training"]["hub_model_id"] == "acme/secret-project"
    assert (content["prompts"], content["license"]) == (RECIPE["prompts"], RECIPE["license"])
    assert parse_recipe({name: content[name] for name in ("name", "source", "summaries", "data")})


@pytest.mark.parametrize("section", [each.name for each in fields(Recipe)])
def test_every_section_is_looked_at(section):
    """A section that is new is hidden like the others."""
    plain = parse_recipe({"name": "shop", "source": {"type": "demo"}})
    value = getattr(plain, section)
    if section in ("name", "item_noun"):
        secret: Any = "/home/someone/hf_abcdefghijkl"
    elif section == "license":
        return
    elif section == "source":
        secret = replace(value, options={"column": "hf_abcdefghijkl", "other": "/home/someone/x"})
    elif section in ("prompts", "training"):
        secret = {"one": "hf_abcdefghijkl"}
    else:  # a text in place of its first value, whatever its type
        secret = replace(value)
        object.__setattr__(secret, fields(value)[0].name, "/home/someone/hf_abcdefghijkl")
    assert not re.search("hf_abc|someone", yaml.safe_dump(public_recipe(replace(plain, **{section: secret}))))


@pytest.mark.parametrize(
    "secret",
    [
        "https://user:pw@host/p?q=1",
        "http://localhost:8000/v1",
        "inner.example:8000/tenant/v1",
        "user:pw@inner.example/v1",
        "s3://bucket/key",
        "hf_abcdefgh",
        "sk-proj-abc123",
        "Bearer abc.def-123",
        "api_key=abc",
        "TOKEN: abc",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln",
        "5d41402abc4b2a765d41402abc4b2a76",
        "550e8400-e29b-41d4-a716-446655440000",
        "Zm9vYmFyYmF6MTIzQUJDREVGR0g",
        "gsk_abcdefghijkl",
        "nvapi-abcdefghijkl",
        "npm_abcdefghijklmnopqrstuvwxyz0123456789",
        "dapi0123456789abcdef0123456789abcdef",
        "ASIAIOSFODNN7EXAMPLE",
        "xapp-1-A1-123-abc",
        "SG.abcdefghijk.lmnopqrstuv",
        "x-api-key: abcdef12",
        "pwd=hunter2",
        "sig=abc%2Bdef",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        "[::1]:8000/v1",
    ],
)
def test_what_looks_like_a_secret_is_masked_within_a_text(secret):
    assert hide_secrets(f"before {secret} after") == "before *** after"


@pytest.mark.parametrize(
    "place",
    ["/home/someone/data/log.csv", "~/data/log.csv", r"C:\Users\someone\log.csv", r"\\server\share\log.csv"],
)
def test_folders_of_a_machine_are_masked_for_others(place):
    assert public_text(f"before {place} after") == "before *** after" and hide_secrets(place) == place


@pytest.mark.parametrize(
    "text",
    [
        "Qwen/Qwen2.5-VL-7B-Instruct-GPTQ-Int4",
        "hf://datasets/McAuley-Lab/Amazon-Reviews-2023",
        "row 3: item x9, at 10:30",
        "users >= 5 and items >= 5 interactions, to a fixed point",
        "per_device_train_batch_size 32",
        "org/data@v0.1.0, text/image and/or words",
    ],
)
def test_plain_words_are_left(text):
    assert public_text(text) == text
