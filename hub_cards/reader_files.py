"""What lets other tools read a released model: `CrossEncoder` of sentence-transformers, and Inference Endpoints."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

CODE = ("cross_encoder.py", "handler.py")  # of modeling/
LOGIT_SCORE = "1_LogitScore"
SETTINGS: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "cross_encoder.RecommendationAnswers"},
        {
            "idx": 1,
            "name": "1",
            "path": LOGIT_SCORE,
            "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
        },
    ],
    "config_sentence_transformers.json": {
        "model_type": "CrossEncoder",
        "activation_fn": "torch.nn.modules.activation.Sigmoid",
        "prompts": {},
        "default_prompt_name": None,
    },
    # places in the two logits that cross_encoder.py returns
    f"{LOGIT_SCORE}/config.json": {"true_token_id": 1, "false_token_id": 0, "module_input_name": "causal_logits"},
}


def write_reader_files(folder: Path) -> None:
    """Put these files into the folder of a model."""
    for name in CODE:
        shutil.copyfile(str(files("mllm_msr.modeling") / name), folder / name)
    for name, content in SETTINGS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
