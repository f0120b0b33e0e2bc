"""Runs a function in forked processes that are the ranks of a run: PyTorch is imported once."""

import os
import signal
import socket
import traceback

import torch
import torch._dynamo  # FSDP2 imports it; here before the ranks are forked


def fork_ranks(size, function, *, fail_together=True):
    """Returns the exit codes of `size` ranks that call `function`; negative for a signal.

    Args:
        size: number of ranks.
        function: called without arguments in each.
        fail_together: whether a failure ends the other ranks; if not, they must end by themselves.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.set_num_threads(1)  # no thread of a pool may exist when a process is forked
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = {}
    for rank in range(size):
        if pid := os.fork():
            ranks[pid] = rank
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [0] * size
    while ranks:
        pid, status = os.wait()
        codes[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
        if status and fail_together:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return codes
