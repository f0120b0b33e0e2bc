"""The peak memory of a process is its own."""

import subprocess
import sys

from easyllm.core.device import peak_rss_bytes

PRINT = "from easyllm.core.device import peak_rss_bytes; print(peak_rss_bytes())"


def test_the_memory_of_the_process_that_started_it_does_not_count():
    held = bytearray(300_000_000)
    held[::4096] = b"1" * len(held[::4096])
    own = peak_rss_bytes()
    done = subprocess.run([sys.executable, "-c", PRINT], capture_output=True, text=True, check=True)
    assert own > 300_000_000 > 3 * int(done.stdout)
