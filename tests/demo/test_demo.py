from mllm_msr.demo.main import recipe_of, shortcomings

GOOD = {"mllm_msr": 0.8, "popularity": 0.6, "no_sft": 0.55, "blank_images": 0.7, "text_only": 0.7, "oracle": 0.95}


def test_a_good_outcome_passes():
    assert shortcomings(GOOD) == []


def test_each_shortcoming_is_named():
    assert "does not beat popularity" in shortcomings({**GOOD, "popularity": 0.8})[0]
    assert "does not beat no_sft" in shortcomings({**GOOD, "no_sft": 0.81})[0]
    assert "blank images cost nothing" in shortcomings({**GOOD, "blank_images": 0.8})[0]
    assert len(shortcomings({**GOOD, "mllm_msr": float("nan")})) == 3


def test_the_late_demo_is_the_demo_but_for_how_user_and_candidate_meet() -> None:
    joint, late = recipe_of("joint"), recipe_of("late")
    assert late.training["interaction"] == "late" and joint.training["interaction"] == "joint"
    assert late.name != joint.name  # so that neither is made in the other's folder
    assert (late.source, late.data, late.summaries, late.head) == (
        joint.source,
        joint.data,
        joint.summaries,
        joint.head,
    )
    assert set(late.prompts) - set(joint.prompts) == {"late_user", "late_item", "late_answer"}
