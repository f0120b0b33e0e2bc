"""Runs findings and prints a line each: `python findings/run.py [NAME ...]`.

A script ends with 0 if it sees what it states, 1 if that has changed, 2 if its packages could not
be installed.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORDS = {0: "seen", 1: "CHANGED", 2: "NOT RUN"}


def main() -> int:
    """0 if everything is still as stated, 1 if not, 2 if a name is not known."""
    scripts = {path.stem: path for path in sorted(HERE.glob("*.sh"))}
    unknown = [name for name in sys.argv[1:] if name not in scripts]
    if unknown:
        print(
            f"no finding is called {unknown[0]!r}; there are {', '.join(scripts)}", file=sys.stderr
        )
        return 2
    worst = 0
    for name in sys.argv[1:] or scripts:
        done = subprocess.run([scripts[name]], capture_output=True, text=True, check=False)
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
        print(f"{WORDS.get(done.returncode, 'FAILED'):8} {name}: {''.join(last)}", flush=True)
        worst |= done.returncode != 0
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
