"""What every request passes first: a body has to come in time."""

import asyncio

import pytest
from fastapi import HTTPException

from mllm_msr.serving.door import Door, Limits


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    door = Door(None, None, None, Limits(), None)

    async def never() -> dict:
        await asyncio.sleep(60)
        return {}

    async def read() -> None:
        await door._limited(never, asyncio.get_running_loop().time() + 0.1, lambda: None)()

    with pytest.raises(HTTPException) as refused:
        asyncio.run(read())
    assert refused.value.status_code == 408
