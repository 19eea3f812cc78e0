"""Attention in which several heads share keys and values, as block attention needs it, by each way that torch has:

    python benchmarks/grouped_heads.py [--dtype bfloat16] [--repeats 5]

``enable_gqa``: the kernels' own; ``expanded``: keys and values repeated for each head; ``in place``: products by group,
as short suffixes are computed; ``flex``: FlexAttention, compiled. `performance.py --sizes gpu` prints it as well. Which
way `modeling/block_attention.py` takes is decided in its `_sdpa` and by `SHORT` of `packing.py`.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

HEADS = {"cpu": (8, 2, 32), "cuda": (28, 4, 128)}  # of queries, of keys, their size; on a GPU those of Qwen2.5-VL-7B
SHAPES = {  # (rows, queries, keys, whether there is a mask)
    "prefixes, causal, 16 x 300": (16, 300, 300, False),
    "prefixes with images, 16 x 300": (16, 300, 300, True),
    "prefixes with images, 8 x 900": (8, 900, 900, True),
    "suffixes of 100 tokens, 32, 400 keys": (32, 100, 400, True),
    "suffixes of 8 tokens, 100, 400 keys": (100, 8, 400, True),
}


def milliseconds(work: Callable[[], torch.Tensor], repeats: int, device: str) -> float:
    """The best of some times, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


def ways(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each way, all of one result; ``mask``: (1, 1, L, K), None where that is what precedes."""
    groups, causal = query.shape[1] // key.shape[1], mask is None

    def own() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)

    def expanded() -> torch.Tensor:
        keys, values = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        return scaled_dot_product_attention(query, keys, values, mask, is_causal=causal)

    def in_place() -> torch.Tensor:
        seen = (
            torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril() if causal else mask
        )
        scores = query.unflatten(1, (-1, groups)) @ key[:, :, None].transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
        return (weights @ value[:, :, None]).flatten(1, 2)

    blocks = create_block_mask(
        (lambda _, __, q, k: q >= k) if causal else (lambda _, __, q, k: mask[0, 0, q, k]),
        None, None, query.shape[2], key.shape[2], device=query.device.type,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> torch.Tensor:
        return compiled(query, key, value, block_mask=blocks, enable_gqa=True)

    return {"enable_gqa": own, "expanded": expanded, "in place": in_place, "flex": flex}


@torch.inference_mode()
def compare(dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float | str]]:
    """Milliseconds of each way for each shape, printed as they come; in place of a figure, why there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, shared, size = HEADS[device]
    result: dict[str, dict[str, float | str]] = {}
    for name, (rows, queries, keys, masked) in SHAPES.items():
        torch.manual_seed(0)
        query = torch.randn(rows, heads, queries, size, device=device, dtype=dtype)
        key, value = (torch.randn(rows, shared, keys, size, device=device, dtype=dtype) for _ in range(2))
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        seen[:, : keys // 4] = True  # an image
        result[name] = {}
        expected = None
        for way, work in ways(query, key, value, seen[None, None] if masked else None).items():
            try:
                output = work().float()
                expected = output if expected is None else expected
                torch.testing.assert_close(output, expected, atol=0.03, rtol=0.03)
                result[name][way] = round(milliseconds(work, repeats, device), 3)
            except Exception as error:  # a kernel that a device lacks: the others are worth having
                result[name][way] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        print(f"  {name:<40} " + ", ".join(f"{way} {ms}" for way, ms in result[name].items()), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    compare(getattr(torch, options.dtype), options.repeats)


if __name__ == "__main__":
    main()
