"""Builds a corpus: runs the stages in order, in parallel over splits, and resumes killed builds.

Layout of the output folder:

out/recipe.yaml        the resolved recipe
out/work/              intermediate files between the stages, removed at the end
out/excluded/          every rejected document with its rule and metric value, one file per stage
out/clusters.jsonl.zst the representative document of each removed duplicate
out/tokenizer/         the tokenizer that produced the token ids
out/shards/            the token shards (corpus/shards); out/shards/validation/ is the held-out set
out/report.md          human-readable summary of what was kept and what was removed
out/manifest.json      inputs, versions, statistics; written last, so its presence means that the
                       corpus is complete
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from easyllm.core.atomic import atomic_directory, write_atomic
from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError, EasyllmError
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file, hash_path, hash_value
from easyllm.core.progress import Progress, console
from easyllm.core.run_folder import RECIPE_FILE, check_run_folder, claim_run_folder
from easyllm.corpus.config import CorpusConfig
from easyllm.corpus.decontaminate import Decontaminator
from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.steps import decide
from easyllm.corpus.document import Document
from easyllm.corpus.executor import Executor, build_executor
from easyllm.corpus.pack import pack
from easyllm.corpus.report import Counts, counts_by_source, reasons, removals, report
from easyllm.corpus.sources import Split, list_splits, read_split
from easyllm.corpus.stage_files import SUFFIX, concatenate, line_writer
from easyllm.corpus.warnings import explain_empty_corpus, warnings
from easyllm.corpus.work import documents_file, finished, rejected_file, run_item
from easyllm.tokenizer.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
HOW = ("engine", "workers", "keep_work")
"""Keys that affect how a corpus is built but not its content; they may change on resume."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will read and do.

    Attributes:
        sources: source name -> its number of files, bytes and splits (work items).
        stages: the stages in order, as short descriptions.
    """

    sources: dict[str, dict[str, int]]
    stages: list[str]

    def as_dict(self) -> JsonObject:
        """Returns the plan as a JSON-serializable dict."""
        return asdict(self)


class CorpusBuild:
    """The build of one corpus from its recipe.

    Args:
        config: the recipe.
        tokenizer: the tokenizer that the recipe names.

    Raises:
        SourceError: a source cannot be read.
        DataError: a source has no files, a file cannot contain documents, or the end token is not
            in the vocabulary. All of this is checked before any work starts.
    """

    def __init__(self, config: CorpusConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.output = Path(config.output)
        self.work = self.output / "work"
        self.end_id = _end_id(config, tokenizer)
        self.splits: list[Split] = []
        for name, source in config.sources.items():
            found = list_splits(name, source, split_bytes=config.split_bytes)
            if not found:
                raise DataError(f"source {name!r} has no non-empty files; name other files")
            self.splits += found

    def plan(self) -> Plan:
        """Returns what the build will read and do, without doing any work."""
        sources = {}
        for name in self.config.sources:
            mine = [split for split in self.splits if split.source == name]
            files = {part.path for split in mine for part in split.parts}
            size = sum(split.num_bytes for split in mine)
            sources[name] = {"files": len(files), "bytes": size, "splits": len(mine)}
        return Plan(sources, self._stages())

    def _stages(self) -> list[str]:
        """Returns what will be done to every document, in order."""
        config = self.config
        stages = ["clean" if any(map(config.rules_of, config.sources)) else "read"]
        if config.privacy is not None:
            act = "redact" if config.privacy.mode == "replace" else "count"
            stages.append(f"{act} private data")
        stages += ["decontaminate"] if config.decontaminate else []
        stages += [f"dedup {step.kind}" for step in (config.dedup.steps if config.dedup else ())]
        return [*stages, "tokenize", "mix and pack"]

    def run(self) -> JsonObject:
        """Builds the corpus, or resumes a killed build; a finished corpus is not modified.

        Returns:
            The statistics recorded in the manifest.

        Raises:
            OutputError: the folder contains another corpus, or other files.
            DataError: a row is invalid and its source is set to stop on such rows, or no documents
                remain after a stage.
            ConfigError: no documents remain from a source that has a weight in the mixture.
        """
        check_run_folder(self.output, self.config, ignore=HOW)
        if (self.output / MANIFEST_FILE).is_file():
            self._sweep()
            console().print(f"{self.output} already contains this corpus", soft_wrap=True)
            return Manifest.read(self.output / MANIFEST_FILE).results
        runs = self._evaluation_runs()
        with build_executor(self.config.engine, self.config.workers) as executor:
            # Claimed only after the checks above, so that a configuration error creates no folder
            claim_run_folder(self.output, self.config, ignore=HOW)
            try:
                return self._build(executor, runs)
            except EasyllmError:
                # No work item has finished, so there is nothing to resume from
                if not any(self.work.glob("*/[0-9]*.json")):
                    self._discard()
                raise

    def _build(self, executor: Executor, runs: Decontaminator | None) -> JsonObject:
        evaluation = None if runs is None else self.work / "evaluation"
        if runs is not None and evaluation is not None:
            runs.save(evaluation)
        items = self._clean_items(evaluation)
        sizes = [split.num_bytes for split in self.splits]
        counts: Counts = [("clean", self._stage(executor, "clean", items, sizes))]
        stems = [Path(item["stem"]) for item in items]
        self._check_documents_remain(counts)
        for number, step in enumerate(self.config.dedup.steps if self.config.dedup else ()):
            stage = f"dedup-{number}-{step.kind}"
            stems, done = self._dedup(executor, stage, step, stems)
            counts.append((stage, done))
            self._check_documents_remain(counts)
        tokens = self._tokenize(executor, stems)
        composition, held_out = self._pack()
        self._keep_exclusions(counts)
        return self._finish(counts, tokens, composition, held_out)

    # ---- stages

    def _stage(
        self,
        executor: Executor,
        name: str,
        items: list[JsonObject],
        sizes: Sequence[int],
    ) -> list[JsonObject]:
        """Runs the work items of a stage, skipping finished ones, and returns their counts."""
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        found: list[JsonObject | None] = [
            finished(Path(item["stem"] + ".json"), hash_value(item)) for item in items
        ]
        left = [i for i, counts in enumerate(found) if counts is None]
        with Progress(name, total=sum(sizes) / 1e6, unit="MB") as progress:
            progress.skip(sum(sizes[i] for i in range(len(items)) if i not in set(left)) / 1e6)
            for i, counts in zip(
                left, executor.map(run_item, [items[i] for i in left]), strict=True
            ):
                found[i] = counts
                progress.advance(sizes[i] / 1e6)
        return [counts for counts in found if counts is not None]

    def _clean_items(self, evaluation: Path | None) -> list[JsonObject]:
        privacy = self.config.privacy
        forbidden = None if evaluation is None else hash_path(evaluation)
        items = []
        for number, split in enumerate(self.splits):
            rules = self.config.rules_of(split.source)
            source = self.config.sources[split.source]
            arguments = {
                "split": split.as_dict(),
                "source": source.model_dump(mode="json", exclude={"clean"}),
                "rules": None if rules is None else rules.model_dump(mode="json"),
                "privacy": None if privacy is None else privacy.model_dump(mode="json"),
                "evaluation": None if evaluation is None else str(evaluation),
            }
            inputs = [_stamps(split), forbidden]
            items.append(self._item("clean", "clean", number, arguments, inputs=inputs))
        return items

    def _dedup(
        self, executor: Executor, stage: str, step: Config, stems: list[Path]
    ) -> tuple[list[Path], list[JsonObject]]:
        """Runs one deduplication step: hash each split, decide globally, filter each split."""
        described = step.model_dump(mode="json")
        sizes = [documents_file(stem).stat().st_size for stem in stems]
        items = [
            self._item(
                "dedup_keys",
                f"{stage}-keys",
                number,
                {"documents": str(documents_file(stem)), "step": described},
                inputs=_record_key(stem),
            )
            for number, stem in enumerate(stems)
        ]
        self._stage(executor, f"{stage}-keys", items, sizes)
        folders = [Path(item["stem"]) for item in items]
        verdicts, clusters = decide(folders, step)  # type: ignore[arg-type]
        files = []
        for folder, verdict in zip(folders, verdicts, strict=True):
            file = folder.with_name(f"{folder.name}.verdict.npz")
            np.savez(file, allow_pickle=False, **verdict)
            files.append(file)
        if clusters is not None:
            self._write_clusters(stage, folders, clusters)
        items = [
            self._item(
                "dedup_apply",
                stage,
                number,
                {
                    "documents": str(documents_file(stem)),
                    "decision": str(file),
                    "step": described,
                },
                inputs=hash_file(file),
            )
            for number, (stem, file) in enumerate(zip(stems, files, strict=True))
        ]
        done = self._stage(executor, stage, items, sizes)
        return [Path(item["stem"]) for item in items], done

    def _write_clusters(self, stage: str, folders: list[Path], clusters: Clusters) -> None:
        ids = np.concatenate([np.load(f / "ids.npy", allow_pickle=False) for f in folders])
        with line_writer(self.work / f"{stage}.clusters{SUFFIX}") as writer:
            for document, kept, similarity in clusters.removed():
                writer.write(
                    {
                        "step": stage.rsplit("-", 1)[1],
                        "removed": str(ids[document]),
                        "kept": str(ids[kept]),
                        "jaccard": round(similarity, 6),
                    }
                )

    def _tokenize(self, executor: Executor, stems: list[Path]) -> list[JsonObject]:
        folder = self.output / "tokenizer"
        if not folder.exists():
            with atomic_directory(folder) as work:
                self.tokenizer.save(work)
        items = [
            self._item(
                "tokenize",
                "tokens",
                number,
                {
                    "documents": str(documents_file(stem)),
                    "tokenizer": str(folder),
                    "end_id": self.end_id,
                },
                inputs=[_record_key(stem), self.tokenizer.fingerprint],
            )
            for number, stem in enumerate(stems)
        ]
        sizes = [documents_file(stem).stat().st_size for stem in stems]
        return self._stage(executor, "tokens", items, sizes)

    def _pack(self) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
        """Writes the shards; returns each source's composition and number of held-out documents."""
        stems = {
            name: [
                self.work / "tokens" / f"{i:05d}"
                for i, split in enumerate(self.splits)
                if split.source == name
            ]
            for name in self.config.sources
        }
        return pack(self.config, self.tokenizer, stems, self.output / "shards", end_id=self.end_id)

    def _keep_exclusions(self, counts: Counts) -> None:
        for stage, done in counts:
            parts = [rejected_file(self.work / stage / f"{i:05d}") for i in range(len(done))]
            concatenate(parts, self.output / "excluded" / f"{stage}{SUFFIX}")
        clusters = sorted(self.work.glob(f"*.clusters{SUFFIX}"))
        concatenate(clusters, self.output / f"clusters{SUFFIX}")

    def _finish(
        self,
        counts: Counts,
        tokens: list[JsonObject],
        composition: dict[str, dict[str, float]],
        held_out: dict[str, int],
    ) -> JsonObject:
        """Writes the report and the manifest, and removes the intermediate files."""
        packed = int(sum(c["tokens"] for c in composition.values()))
        text_bytes = sum(done["bytes"] for done in tokens)
        read = sum(done["documents"] for done in counts[0][1])
        left = self._fates(counts)
        summary = {
            "documents_read": read,
            "documents_kept": sum(done["documents"] for done in tokens),
            "held_out": sum(held_out.values()),
            "warnings": warnings(left),
            "documents": int(sum(c["documents"] for c in composition.values())),
            "tokens": packed,
            "bytes_per_token": text_bytes / max(1, sum(done["tokens"] for done in tokens)),
            "sources": {name: fate | {"held_out": held_out[name]} for name, fate in left.items()},
            "removed": removals(counts, read),
            "bad_rows": _summed(counts[0][1], "bad_rows"),
            "bad_rows_shown": [row for done in counts[0][1] for row in done["bad_rows_shown"]],
            "private": _summed(counts[0][1], "private"),
            "composition": composition,
        }
        write_atomic(self.output / "report.md", report(self.config.name, summary))
        paths = {part.path for split in self.splits for part in split.parts}
        manifest = Manifest.create(
            "corpus",
            config=self.config.model_dump(mode="json"),
            inputs={path: hash_file(Path(path)) for path in sorted(paths)},
            results=summary,
        )
        write_atomic(self.output / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        self._sweep()
        return summary

    def _sweep(self) -> None:
        """Removes intermediate files of a finished build and partial files of a killed one."""
        if not self.config.keep_work:
            shutil.rmtree(self.work, ignore_errors=True)
        for half in self.output.glob(".*.partial"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()

    def _discard(self) -> None:
        """Removes the files this build created, and the output folder if it is then empty."""
        for folder in (self.work, self.output / "tokenizer"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.output / RECIPE_FILE).unlink(missing_ok=True)
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()

    # ---- parts

    def _item(
        self, work: str, stage: str, number: int, arguments: JsonObject, *, inputs: object
    ) -> JsonObject:
        """Returns a work item; `inputs` identifies its input, so that changed input is new work."""
        stem = str(self.work / stage / f"{number:05d}")
        return {"work": work, "stem": stem, "arguments": arguments, "inputs": inputs}

    def _evaluation_runs(self) -> Decontaminator | None:
        """Returns the index of the evaluation n-grams that no document may contain, or None."""
        config = self.config.decontaminate
        if config is None:
            return None
        texts = {}
        for name, source in config.sets.items():
            rows = [row for split in list_splits(name, source) for row in read_split(split, source)]
            texts[name] = [row.text for row in rows if isinstance(row, Document)]
            if not texts[name]:
                raise DataError(f"decontaminate.sets.{name} contains no text; check its text_key")
        return Decontaminator.from_texts(texts, config)

    def _fates(self, counts: Counts) -> dict[str, JsonObject]:
        return counts_by_source(counts, [split.source for split in self.splits])

    def _check_documents_remain(self, counts: Counts) -> None:
        """Fails if no documents remain, or none from a source that has a weight in the mixture.

        Only a different recipe or different files can fix this, so the build is discarded.
        """
        left = self._fates(counts)
        if not any(fate["kept"] for fate in left.values()):
            self._discard()
            shown = [row for done in counts[0][1] for row in done["bad_rows_shown"]]
            raise DataError(f"no documents remain {explain_empty_corpus(left, shown)}")
        for name, share in self.config.mixture.shares.items():
            if share.weight is not None and not left[name]["kept"]:
                self._discard()
                why = reasons(left[name]["removed"])
                raise ConfigError(
                    f"mixture gives weight {share.weight:g} to source {name!r}, but no documents "
                    f"remain from it{f' ({why})' if why else ''}; drop the weight, or give the "
                    f"source other rules (sources.{name}.clean)"
                )


def _end_id(config: CorpusConfig, tokenizer: Tokenizer) -> int | None:
    wanted = config.pack.end_token
    if wanted is None:
        found = tokenizer.id_of(END_OF_TEXT)
        return tokenizer.eos_id if found is None else found
    end = tokenizer.id_of(wanted)
    if end is None:
        raise DataError(
            f"pack.end_token={wanted!r} is not in the tokenizer's vocabulary; "
            "name one of its special tokens"
        )
    return end


def _stamps(split: Split) -> list[list[Json]]:
    """Returns size and modification time of a split's files, so that changed files are redone."""
    stats = {part.path: Path(part.path).stat() for part in split.parts}
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())]


def _record_key(stem: Path) -> str:
    return hash_file(stem.with_name(stem.name + ".json"))


def _summed(counts: list[JsonObject], name: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for done in counts:
        for key, value in done[name].items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))
