"""Building a corpus: the stages in order, each spread over workers, nothing finished ever done again.

out/recipe.yaml        the recipe, resolved
out/work/              files between the stages, removed at the end
out/excluded/          every rejected document with its rule and figure, a file a stage
out/clusters.jsonl.zst which document stood for each removed duplicate
out/tokenizer/         the tokenizer that made the ids
out/shards/            the tokens (data/shards), out/shards/validation/ the documents kept apart
out/report.md          what was kept and what was not, for people
out/manifest.json      inputs, versions, figures: written last, so its presence means the corpus is whole
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easyllm.core.atomic import atomic_directory, write_atomic
from easyllm.core.config import Config
from easyllm.core.errors import ConfigError, DataError, EasyllmError
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_file, hash_path, hash_value
from easyllm.core.progress import Progress, console
from easyllm.core.run_folder import RECIPE_FILE, check_free, claim
from easyllm.data.corpus import CorpusConfig
from easyllm.data.corpus_report import Counts, fates, reasons, removals, report
from easyllm.data.corpus_warnings import warnings, why_nothing_is_left
from easyllm.data.corpus_work import documents_file, finished, rejected_file, run_item
from easyllm.data.decontaminate import Decontaminator
from easyllm.data.dedup.clusters import Clusters
from easyllm.data.dedup.steps import decide
from easyllm.data.document_files import SUFFIX, concatenate, line_writer
from easyllm.data.documents import Document
from easyllm.data.executor import Executor, build_executor
from easyllm.data.mixture import Composition, choose_documents, plan_tokens
from easyllm.data.shards import ShardWriter
from easyllm.data.sources import Split, list_splits, read_split
from easyllm.data.token_pool import TokenPool
from easyllm.tokenizer.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
HOW = ("engine", "workers", "keep_work")
"""Keys that say how a corpus is built and not what it is: a build may go on with others."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build will read and do: of each source its files, bytes and items of work."""

    sources: dict[str, dict[str, int]]
    stages: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CorpusBuild:
    """One corpus from its recipe.

    Args:
        config: the recipe.
        tokenizer: the one the recipe names.

    Raises:
        SourceError, DataError: a source has no files, or a file cannot hold documents (found before any work).
        ConfigError: the end token is not in the vocabulary.
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
                raise DataError(f"source {name!r} has no files with anything in them; name others")
            self.splits += found

    def plan(self) -> Plan:
        """What will be done."""
        sources = {}
        for name in self.config.sources:
            mine = [split for split in self.splits if split.source == name]
            files = {part.path for split in mine for part in split.parts}
            size = sum(split.num_bytes for split in mine)
            sources[name] = {"files": len(files), "bytes": size, "splits": len(mine)}
        return Plan(sources, self._stages())

    def _stages(self) -> list[str]:
        """What will be done to every document, in order."""
        config = self.config
        stages = ["clean" if any(map(config.rules_of, config.sources)) else "read"]
        if config.privacy is not None:
            act = "hide" if config.privacy.mode == "replace" else "count"
            stages.append(f"{act} private data")
        stages += ["decontaminate"] if config.decontaminate else []
        stages += [f"dedup {step.kind}" for step in (config.dedup.steps if config.dedup else ())]
        return [*stages, "tokenize", "mix and pack"]

    def run(self) -> dict[str, Any]:
        """Builds the corpus, or goes on with a killed build; a finished one is not touched.

        Returns:
            The figures of the manifest.

        Raises:
            OutputError: the folder holds another corpus, or other files.
            DataError: a row is bad and its source stops there, or no document is left.
            ConfigError: a source that the mixture weighs has no document left.
        """
        check_free(self.output, self.config, ignore=HOW)
        if (self.output / MANIFEST_FILE).is_file():
            self._sweep()
            console().print(f"{self.output} holds this corpus, built before", soft_wrap=True)
            return Manifest.read(self.output / MANIFEST_FILE).results
        runs = self._evaluation_runs()
        with build_executor(self.config.engine, self.config.workers) as executor:
            claim(self.output, self.config, ignore=HOW)  # only now: a mistake leaves no folder
            try:
                return self._build(executor, runs)
            except EasyllmError:
                if not any(
                    self.work.glob("*/[0-9]*.json")
                ):  # nothing is done that could be gone on with
                    self._discard()
                raise

    def _build(self, executor: Executor, runs: Decontaminator | None) -> dict[str, Any]:
        evaluation = None if runs is None else self.work / "evaluation"
        if runs is not None and evaluation is not None:
            runs.save(evaluation)
        items = self._clean_items(evaluation)
        sizes = [split.num_bytes for split in self.splits]
        counts: Counts = [("clean", self._stage(executor, "clean", items, sizes))]
        stems = [Path(item["stem"]) for item in items]
        self._check_what_is_left(counts)
        for number, step in enumerate(self.config.dedup.steps if self.config.dedup else ()):
            stage = f"dedup-{number}-{step.kind}"
            stems, done = self._dedup(executor, stage, step, stems)
            counts.append((stage, done))
            self._check_what_is_left(counts)
        tokens = self._tokenize(executor, stems)
        composition, held_out = self._pack()
        self._keep_exclusions(counts)
        return self._finish(counts, tokens, composition, held_out)

    # ---- stages

    def _stage(
        self,
        executor: Executor,
        name: str,
        items: list[dict[str, Any]],
        sizes: Sequence[int],
    ) -> list[dict[str, Any]]:
        """The counts of every item; those that are done are skipped."""
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        found: list[dict[str, Any] | None] = [
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

    def _clean_items(self, evaluation: Path | None) -> list[dict[str, Any]]:
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
    ) -> tuple[list[Path], list[dict[str, Any]]]:
        """Keys of every split, one decision, every split cut by it."""
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

    def _tokenize(self, executor: Executor, stems: list[Path]) -> list[dict[str, Any]]:
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
        """Chooses documents of every source and writes the shards.

        Returns:
            What the mixture took of each source, and how many documents of it are kept apart.
        """
        pools = {
            name: TokenPool(self._tokens_of(name), self.tokenizer) for name in self.config.sources
        }
        generator = np.random.default_rng([self.config.seed, self.config.mixture.seed])
        share, tail = self.config.pack.holdout, self.config.pack.holdout_tail
        held = {
            n: pool.hold_out_tail(share) if tail else pool.hold_out(share, generator)
            for n, pool in pools.items()
        }
        wanted = plan_tokens(self.config.mixture, {n: pool.tokens for n, pool in pools.items()})
        chosen = {
            n: pool.numbers[choose_documents(pool.lengths[pool.numbers], wanted[n], generator)]
            for n, pool in pools.items()
        }
        composition = {
            n: Composition(
                wanted=wanted[n],
                tokens=int(pools[n].lengths[numbers].sum()),
                available=pools[n].tokens,
                documents=len(numbers),
            ).as_dict()
            for n, numbers in chosen.items()
        }
        with atomic_directory(self.output / "shards", replace=True) as work:
            self._write_shards(work, pools, chosen, composition, generator)
            if any(len(numbers) for numbers in held.values()):
                self._write_shards(work / "validation", pools, held, {}, generator)
        return composition, {n: len(numbers) for n, numbers in held.items()}

    def _tokens_of(self, source: str) -> list[Path]:
        """Where the ids of a source's splits lie."""
        numbers = [i for i, split in enumerate(self.splits) if split.source == source]
        return [self.work / "tokens" / f"{i:05d}" for i in numbers]

    def _write_shards(
        self,
        folder: Path,
        pools: dict[str, TokenPool],
        chosen: dict[str, NDArray[np.int64]],
        composition: dict[str, dict[str, float]],
        generator: np.random.Generator,
    ) -> None:
        """All chosen documents, of all sources, in one shuffled order."""
        names = list(chosen)
        sources = np.repeat(np.arange(len(names)), [len(chosen[name]) for name in names])
        numbers = np.concatenate([chosen[name] for name in names])
        writer = ShardWriter(
            folder, vocab_size=self.tokenizer.vocab_size, shard_tokens=self.config.pack.shard_tokens
        )
        size = 0
        with Progress("packing", total=len(numbers), unit="document") as progress:
            for i in generator.permutation(len(numbers)):
                pool = pools[names[sources[i]]]
                writer.add(pool.document(int(numbers[i])))
                size += int(pool.bytes[numbers[i]])
                progress.advance()
        writer.finish(
            self.tokenizer, end_id=self.end_id, bytes_of_text=size, composition=composition
        )

    def _keep_exclusions(self, counts: Counts) -> None:
        for stage, done in counts:
            parts = [rejected_file(self.work / stage / f"{i:05d}") for i in range(len(done))]
            concatenate(parts, self.output / "excluded" / f"{stage}{SUFFIX}")
        clusters = sorted(self.work.glob(f"*.clusters{SUFFIX}"))
        concatenate(clusters, self.output / f"clusters{SUFFIX}")

    def _finish(
        self,
        counts: Counts,
        tokens: list[dict[str, Any]],
        composition: dict[str, dict[str, float]],
        held_out: dict[str, int],
    ) -> dict[str, Any]:
        """Writes the report and the manifest, and removes what lay between the stages."""
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
        """Removes what a finished build, or one that was killed, has no more use for."""
        if not self.config.keep_work:
            shutil.rmtree(self.work, ignore_errors=True)
        for half in self.output.glob(".*.partial"):
            shutil.rmtree(half) if half.is_dir() else half.unlink()

    def _discard(self) -> None:
        """Removes what this build put into its folder, and the folder where it holds nothing else."""
        for folder in (self.work, self.output / "tokenizer"):
            shutil.rmtree(folder, ignore_errors=True)
        (self.output / RECIPE_FILE).unlink(missing_ok=True)
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()

    # ---- parts

    def _item(
        self, work: str, stage: str, number: int, arguments: dict[str, Any], *, inputs: Any
    ) -> dict[str, Any]:
        """An item of work; `inputs` says what its input was, so that another input is other work."""
        stem = str(self.work / stage / f"{number:05d}")
        return {"work": work, "stem": stem, "arguments": arguments, "inputs": inputs}

    def _evaluation_runs(self) -> Decontaminator | None:
        """The runs of words that no document may hold."""
        config = self.config.decontaminate
        if config is None:
            return None
        texts = {}
        for name, source in config.sets.items():
            rows = [row for split in list_splits(name, source) for row in read_split(split, source)]
            texts[name] = [row.text for row in rows if isinstance(row, Document)]
            if not texts[name]:
                raise DataError(f"decontaminate.sets.{name} holds no text; check its text_key")
        return Decontaminator.from_texts(texts, config)

    def _fates(self, counts: Counts) -> dict[str, dict[str, Any]]:
        return fates(counts, [split.source for split in self.splits])

    def _check_what_is_left(self, counts: Counts) -> None:
        """Refuses to go on without documents, or without those of a source the mixture weighs.

        Only another recipe or other files can mend that, so nothing of this build is kept.
        """
        left = self._fates(counts)
        if not any(fate["kept"] for fate in left.values()):
            self._discard()
            shown = [row for done in counts[0][1] for row in done["bad_rows_shown"]]
            raise DataError(f"no document is left {why_nothing_is_left(left, shown)}")
        for name, share in self.config.mixture.shares.items():
            if share.weight is not None and not left[name]["kept"]:
                self._discard()
                why = reasons(left[name]["removed"])
                raise ConfigError(
                    f"mixture gives weight {share.weight:g} to source {name!r}, of which no document is left"
                    f"{f' ({why})' if why else ''}; drop the weight, or give the source other rules "
                    f"(sources.{name}.clean)"
                )


def _end_id(config: CorpusConfig, tokenizer: Tokenizer) -> int | None:
    wanted = config.pack.end_token
    if wanted is None:
        found = tokenizer.id_of(END_OF_TEXT)
        return tokenizer.eos_id if found is None else found
    end = tokenizer.id_of(wanted)
    if end is None:
        raise DataError(
            f"pack.end_token={wanted!r} is not in the tokenizer's vocabulary; name one of its special tokens"
        )
    return end


def _stamps(split: Split) -> list[list[Any]]:
    """Size and time of a split's files: a changed file is other work."""
    stats = {part.path: Path(part.path).stat() for part in split.parts}
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())]


def _record_key(stem: Path) -> str:
    return hash_file(stem.with_name(stem.name + ".json"))


def _summed(counts: list[dict[str, Any]], name: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for done in counts:
        for key, value in done[name].items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))
