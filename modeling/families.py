"""The few facts in which families of backbones differ for the model; everything else is one code path for all.

What the processor needs to know of a family is in its own room: `TYPE_IDS` and `SAME_FOR_IMAGES`.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """What the model must know of a backbone's family, by its `model_type`.

    one_tensor: its decoder takes the features of all images in one tensor, and not one tensor for each.
    grid_positions: its images have rows and columns for positions, which its `get_rope_index` tells from a whole
        prompt only; else positions are the plain running count.
    """

    one_tensor: bool = False
    grid_positions: bool = False


FAMILIES = {
    "llava": Family(),
    "llava_next": Family(),
    "llava_onevision": Family(),
    "idefics3": Family(one_tensor=True),
    "smolvlm": Family(one_tensor=True),
    "qwen2_vl": Family(grid_positions=True),
    "qwen2_5_vl": Family(grid_positions=True),
    "qwen3_vl": Family(grid_positions=True),
    "gemma3": Family(one_tensor=True),
    "internvl": Family(one_tensor=True),
}
