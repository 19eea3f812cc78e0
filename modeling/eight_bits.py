"""Keys and values in eight bits: of each token and head, every 32 channels have one scale (llama.cpp's q8_0).

Such scales cost a sixteenth of a byte or an eighth for each number, however many tokens a candidate has, and one large
channel makes only its neighbours coarse. One scale for a token, or for a channel over all tokens, was no more exact.
"""

from collections.abc import Mapping
from math import gcd

import torch

GROUP = 32
SCALES = ".scales"  # behind the name of what they are of


def to_eight_bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each (..., d) of floats as int8, with scales (..., d / 32) of its type beside it; others as they are."""
    coded = {}
    for name, tensor in tensors.items():
        coded[name] = tensor
        if tensor.is_floating_point():
            groups = tensor.unflatten(-1, (-1, gcd(GROUP, tensor.shape[-1]))).float()
            scales = (groups.abs().amax(-1) / 127).clamp(min=torch.finfo(tensor.dtype).tiny).to(tensor.dtype)
            codes = (groups / scales.unsqueeze(-1).float()).round().clamp(-127, 127)
            coded |= {name: codes.flatten(-2).to(torch.int8), name + SCALES: scales}
    return coded


def from_eight_bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`to_eight_bits`, up to half a scale; what has no scales is as it was."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALES)}
    for name in plain:
        if (scales := tensors.get(name + SCALES)) is not None:
            plain[name] = (plain[name].unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)
    return plain


def plain_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of what :func:`from_eight_bits` makes of these."""
    return sum(
        tensor.numel() * tensors.get(name + SCALES, tensor).itemsize
        for name, tensor in tensors.items()
        if not name.endswith(SCALES)
    )
