"""Runs a shipped recipe with several seeds and writes its band to `recipes/expected`.

    python tools/bands.py RECIPE [--seeds 3] [KEY=VALUE ...]

Overrides belong to the band: use those that keep a run short only if the recipe has them itself.
`easyllm train RECIPE` is compared with the band at each evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.reporting.expected import band_file, make_band


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs, config = [], {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            words = [f"output={out}", f"seed={seed}", "log_every=1", *options.overrides]
            command = [sys.executable, "-m", "easyllm", "train", options.recipe, *words]
            subprocess.run(command, check=True, stdout=sys.stderr)
            lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
            runs.append([line for line in lines if "train/loss_nats" in line])
            if not seed:
                config = json.loads((out / MANIFEST_FILE).read_text())["config"]
    config = {key: value for key, value in config.items() if key not in ("output", "seed")}
    path = band_file(options.recipe)
    path.parent.mkdir(exist_ok=True)
    write_json(path, make_band(options.recipe, config, runs).as_dict())
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
