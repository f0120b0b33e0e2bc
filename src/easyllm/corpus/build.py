"""Builds a corpus: runs the stages in order, in parallel over splits, and resumes killed builds.

Layout of the output folder:

out/recipe.yaml        the resolved recipe
out/work/              intermediate files between the stages, removed at the end
out/excluded/          every rejected document with its rule and metric value, one file per stage
out/clusters.jsonl.zst the representative document of each removed duplicate
out/tokenizer/         the tokenizer that produced the token ids
out/shards/            the token shards (corpus/shards); out/shards/validation/ is the held-out set
out/sources.json       size, modification time and hash of every file that was read
out/report.md          human-readable summary of what was kept and what was removed
out/manifest.json      inputs, versions, statistics; written last, so its presence means that the
                       corpus is complete
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from easyllm.core.atomic import atomic_directory, write_atomic
from easyllm.core.errors import ConfigError, DataError, EasyllmError
from easyllm.core.json_types import JsonObject
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file, hash_path
from easyllm.core.progress import Progress, console
from easyllm.core.run_folder import RECIPE_FILE, check_run_folder, claim_run_folder
from easyllm.corpus.config import CorpusConfig
from easyllm.corpus.decontaminate import Decontaminator
from easyllm.corpus.dedup.clusters import Clusters
from easyllm.corpus.dedup.config import DedupStep
from easyllm.corpus.dedup.steps import decide
from easyllm.corpus.document import Document
from easyllm.corpus.executor import Executor, build_executor
from easyllm.corpus.finished import check_finished, write_sources
from easyllm.corpus.items import (
    CleanArguments,
    CleanItem,
    DedupArguments,
    DedupCounts,
    DedupItem,
    FileStamp,
    KeyArguments,
    KeyItem,
    TokenCounts,
    TokenizeArguments,
    TokenizeItem,
    WorkItem,
)
from easyllm.corpus.pack import Packed, pack
from easyllm.corpus.report import (
    SourceCounts,
    StageCounts,
    counts_by_source,
    reasons,
    removals,
    report,
    total,
)
from easyllm.corpus.sources import SourceConfig, Split, list_splits, read_split, source_files
from easyllm.corpus.stage_files import SUFFIX, concatenate, line_writer
from easyllm.corpus.warnings import explain_empty_corpus, warnings
from easyllm.corpus.work import (
    CLEAN,
    DEDUP_APPLY,
    DEDUP_KEYS,
    TOKENIZE,
    RecordedWork,
    documents_file,
    record_file,
    rejected_file,
)
from easyllm.tokenizer.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
HOW = ("engine", "workers", "keep_work")
"""Keys that affect how a corpus is built but not its content; they may change on resume."""
Item = TypeVar("Item", bound=WorkItem)
Counts = TypeVar("Counts")


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
            OutputError: the folder contains another corpus, or other files; or it contains this
                corpus, but files of it are missing, or its sources have changed since.
            DataError: a row is invalid and its source is set to stop on such rows, or no documents
                remain after a stage.
            ConfigError: no documents remain from a source that has a weight in the mixture.
        """
        check_run_folder(self.output, self.config, ignore=HOW)
        if (self.output / MANIFEST_FILE).is_file():
            check_finished(self.output, self._files(), self.tokenizer)
            self._sweep()
            console().print(f"{self.output} already contains this corpus", soft_wrap=True)
            return Manifest.read(self.output / MANIFEST_FILE).results
        runs = self._evaluation_runs()
        with (
            build_executor(self.config.engine, self.config.workers) as executor,
            # Claimed only after the checks above, so that a configuration error creates no folder
            claim_run_folder(self.output, self.config, ignore=HOW),
        ):
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
        counts = StageCounts(clean=self._stage(executor, "clean", CLEAN, items, sizes))
        stems = [item.stem for item in items]
        self._check_documents_remain(counts)
        for number, step in enumerate(self.config.dedup.steps if self.config.dedup else ()):
            stage = f"dedup-{number}-{step.kind}"
            stems, counts.dedup[stage] = self._dedup(executor, stage, step, stems)
            self._check_documents_remain(counts)
        tokens = self._tokenize(executor, stems)
        packed = self._pack()
        self._keep_exclusions(counts)
        return self._finish(counts, tokens, packed)

    # ---- stages

    def _stage(
        self,
        executor: Executor,
        name: str,
        work: RecordedWork[Item, Counts],
        items: Sequence[Item],
        sizes: Sequence[int],
    ) -> list[Counts]:
        """Runs the work items of a stage, skipping finished ones, and returns their counts."""
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        found = [work.finished(item) for item in items]
        left = [i for i, counts in enumerate(found) if counts is None]
        done = sum(size for size, counts in zip(sizes, found, strict=True) if counts is not None)
        with Progress(name, total=sum(sizes) / 1e6, unit="MB") as progress:
            progress.skip(done / 1e6)
            for i, counts in zip(left, executor.map(work, [items[i] for i in left]), strict=True):
                found[i] = counts
                progress.advance(sizes[i] / 1e6)
        return [counts for counts in found if counts is not None]

    def _clean_items(self, evaluation: Path | None) -> list[CleanItem]:
        forbidden = None if evaluation is None else hash_path(evaluation)
        sources = {
            name: SourceConfig.model_validate(source.model_dump(exclude={"clean"}))
            for name, source in self.config.sources.items()
        }
        items = []
        for number, split in enumerate(self.splits):
            arguments = CleanArguments(
                split=split,
                source=sources[split.source],
                rules=self.config.rules_of(split.source),
                privacy=self.config.privacy,
                evaluation=evaluation,
            )
            stem, inputs = self._stem("clean", number), (_stamps(split), forbidden)
            items.append(CleanItem(stem=stem, arguments=arguments, inputs=inputs))
        return items

    def _dedup(
        self, executor: Executor, stage: str, step: DedupStep, stems: list[Path]
    ) -> tuple[list[Path], list[DedupCounts]]:
        """Runs one deduplication step: hash each split, decide globally, filter each split."""
        documents = [documents_file(stem) for stem in stems]
        sizes = [file.stat().st_size for file in documents]
        keys = [
            KeyItem(
                stem=self._stem(f"{stage}-keys", number),
                arguments=KeyArguments(documents=file, step=step),
                inputs=hash_file(record_file(stem)),
            )
            for number, (stem, file) in enumerate(zip(stems, documents, strict=True))
        ]
        self._stage(executor, f"{stage}-keys", DEDUP_KEYS, keys, sizes)
        folders = [item.stem for item in keys]
        verdicts, clusters = decide(folders, step)
        decisions = []
        for folder, verdict in zip(folders, verdicts, strict=True):
            file = folder.with_name(f"{folder.name}.verdict.npz")
            np.savez(file, allow_pickle=False, **verdict)
            decisions.append(file)
        if clusters is not None:
            self._write_clusters(stage, folders, clusters)
        items = [
            DedupItem(
                stem=self._stem(stage, number),
                arguments=DedupArguments(documents=file, decision=decision, step=step),
                inputs=hash_file(decision),
            )
            for number, (file, decision) in enumerate(zip(documents, decisions, strict=True))
        ]
        done = self._stage(executor, stage, DEDUP_APPLY, items, sizes)
        return [item.stem for item in items], done

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

    def _tokenize(self, executor: Executor, stems: list[Path]) -> list[TokenCounts]:
        folder = self.output / "tokenizer"
        if not folder.exists():
            with atomic_directory(folder) as work:
                self.tokenizer.save(work)
        items = [
            TokenizeItem(
                stem=self._stem("tokens", number),
                arguments=TokenizeArguments(
                    documents=documents_file(stem), tokenizer=folder, end_id=self.end_id
                ),
                inputs=(hash_file(record_file(stem)), self.tokenizer.fingerprint),
            )
            for number, stem in enumerate(stems)
        ]
        sizes = [documents_file(stem).stat().st_size for stem in stems]
        return self._stage(executor, "tokens", TOKENIZE, items, sizes)

    def _pack(self) -> Packed:
        """Writes the shards, and returns what they contain of each source."""
        stems = {
            name: [
                self._stem("tokens", i)
                for i, split in enumerate(self.splits)
                if split.source == name
            ]
            for name in self.config.sources
        }
        return pack(self.config, self.tokenizer, stems, self.output / "shards", end_id=self.end_id)

    def _keep_exclusions(self, counts: StageCounts) -> None:
        for stage in ("clean", *counts.dedup):
            parts = [rejected_file(self._stem(stage, i)) for i in range(len(self.splits))]
            concatenate(parts, self.output / "excluded" / f"{stage}{SUFFIX}")
        clusters = sorted(self.work.glob(f"*.clusters{SUFFIX}"))
        concatenate(clusters, self.output / f"clusters{SUFFIX}")

    def _finish(
        self, counts: StageCounts, tokens: Sequence[TokenCounts], packed: Packed
    ) -> JsonObject:
        """Writes the report and the manifest, and removes the intermediate files."""
        text_bytes = sum(split.bytes for split in tokens)
        left, held_out = self._fates(counts), packed.held_out
        composition = packed.composition
        summary: JsonObject = {
            "documents_read": counts.documents_read,
            "documents_kept": sum(split.documents for split in tokens),
            "held_out": sum(held_out.values()),
            "warnings": warnings(left),
            "documents": sum(part.documents for part in composition.values()),
            "tokens": sum(part.tokens for part in composition.values()),
            "bytes_per_token": text_bytes / max(1, sum(split.tokens for split in tokens)),
            "sources": {
                name: asdict(fate) | {"held_out": held_out[name]} for name, fate in left.items()
            },
            "removed": [asdict(removal) for removal in removals(counts)],
            "bad_rows": dict(sorted(total(split.bad_rows for split in counts.clean).items())),
            "bad_rows_shown": counts.bad_rows_shown,
            "private": dict(sorted(total(split.private for split in counts.clean).items())),
            "composition": {name: part.as_dict() for name, part in composition.items()},
        }
        write_atomic(self.output / "report.md", report(self.config.name, summary))
        manifest = Manifest.create(
            "corpus",
            config=self.config.model_dump(mode="json"),
            inputs=write_sources(self.output, self._files()),
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
        """Removes the files this build created; the output folder is removed with its lock."""
        for folder in (self.work, self.output / "tokenizer"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.output / RECIPE_FILE).unlink(missing_ok=True)

    # ---- parts

    def _stem(self, stage: str, number: int) -> Path:
        """Returns the path stem of the output files of a split in a stage."""
        return self.work / stage / f"{number:05d}"

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

    def _files(self) -> set[str]:
        """Returns the files of all sources, and of the evaluation sets."""
        config = self.config.decontaminate
        sets = () if config is None else config.sets.values()
        evaluation = {file.path for source in sets for file in source_files(source)}
        return evaluation | {part.path for split in self.splits for part in split.parts}

    def _fates(self, counts: StageCounts) -> dict[str, SourceCounts]:
        return counts_by_source(counts, [split.source for split in self.splits])

    def _check_documents_remain(self, counts: StageCounts) -> None:
        """Fails if no documents remain, or none from a source that has a weight in the mixture.

        Only a different recipe or different files can fix this, so the build is discarded.
        """
        left = self._fates(counts)
        if not any(fate.kept for fate in left.values()):
            self._discard()
            reason = explain_empty_corpus(left, counts.bad_rows_shown)
            raise DataError(f"no documents remain {reason}")
        for name, share in self.config.mixture.shares.items():
            if share.weight is not None and not left[name].kept:
                self._discard()
                why = reasons(left[name].removed)
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


def _stamps(split: Split) -> tuple[FileStamp, ...]:
    """Returns size and modification time of a split's files, so that changed files are redone."""
    stats = {part.path: Path(part.path).stat() for part in split.parts}
    return tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in sorted(stats.items()))
