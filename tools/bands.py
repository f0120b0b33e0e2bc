"""Runs shipped recipes with several seeds and writes their bands to `recipes/expected`.

    python tools/bands.py RECIPE [--seeds 3] [KEY=VALUE ...]

Of a recipe with several stages, each training has a band. Overrides belong to the band: use those
that keep a run short only if the recipe has them itself. `easyllm train RECIPE` and `easyllm run
RECIPE` are compared with the band at each evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from easyllm.core.atomic import write_json
from easyllm.core.manifest import MANIFEST_FILE
from easyllm.core.yaml_text import read_yaml
from easyllm.pipeline.recipe import find_recipe
from easyllm.reporting.expected import LOSS, band_file, make_band, portable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    stages = read_yaml(find_recipe(options.recipe)).get("stages", {})
    trained = [name for name, stage in stages.items() if stage["kind"] == "train"]
    runs: dict[str, list] = {}
    configs: dict[str, dict] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            logged = [f"stages.{name}.log_every=1" for name in trained] or ["log_every=1"]
            words = [f"output={out}", f"seed={seed}", *logged, *options.overrides]
            command = [sys.executable, "-m", "easyllm", "run" if trained else "train"]
            subprocess.run([*command, options.recipe, *words], check=True, stdout=sys.stderr)
            for name in trained or [""]:
                place, root = out / name, out if name else None
                found = [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]
                runs.setdefault(name, []).append([line for line in found if LOSS in line])
                config = json.loads((place / MANIFEST_FILE).read_text())["config"]
                configs.setdefault(name, portable(config, root))
    for name, lines in runs.items():
        config = {k: v for k, v in configs[name].items() if k not in ("output", "seed")}
        recipe = f"{options.recipe}/{name}" if name else options.recipe
        path = band_file(recipe)
        path.parent.mkdir(exist_ok=True)
        write_json(path, make_band(recipe, config, lines).as_dict())
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
