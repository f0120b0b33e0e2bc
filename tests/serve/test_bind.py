"""The listening socket."""

import asyncio
import socket

import pytest

from easyllm.core.errors import ConfigError
from easyllm.serve.run import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accepted_connections_send_small_writes_at_once(host):
    """Without TCP_NODELAY, each response waits for the acknowledgement of its head (40 ms)."""

    async def accepted():
        seen = asyncio.get_running_loop().create_future()

        async def serve(_, writer):
            option = writer.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY
            )
            seen.set_result(option)
            writer.close()

        try:
            listener = bind(host, 0)
        except ConfigError:
            pytest.skip(f"this machine has no {host}")
        server = await asyncio.start_server(serve, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(host, listener.getsockname()[1])
            option = await asyncio.wait_for(seen, 10)
            writer.close()
        return option

    assert asyncio.run(accepted())
