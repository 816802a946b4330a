"""A data set that is written part by part: one part, one MDS shard, one record of what is in it.

The parts follow from the input alone, not from workers, ranks or interruptions. A part is finished
when its record is in place, and is not made again; the index, the labels and the manifest are
joined from the records at the end. So a killed command continues where it was, and its files are
those of an undisturbed one, byte for byte. A local result is complete or absent: it is made in
OUT.partial. In object storage the manifest comes last, and readers want it first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lgm_scale.data.manifest import (
    INDEX_NAME,
    LABELS_NAME,
    MANIFEST_NAME,
    Manifest,
    check_shards,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from lgm_scale.errors import ConfigError, DataError
from lgm_scale.storage.clients import is_remote
from lgm_scale.storage.files import file_hash, is_partial, write_whole
from lgm_scale.storage.transfer import Patience, join, read_remote, shown, store

DEFAULT_SHARD_SIZE = 64 << 20
LARGEST_SHARD = 1 << 30  # an offset has 32 bits, and a shard is made in memory
COMPRESSIONS = {"br": range(12), "bz2": range(1, 10), "gz": range(10), "snappy": (),
                "zstd": range(1, 23)}  # fmt: skip
"""Algorithms of the streaming library and their levels; a command line is judged without it."""
PLAN_NAME = "plan.json"
ASIDE_PREFIX = ".part."  # of the folder of a shard that is being written


def check_shard_options(shard_size: int, compression: str | None) -> None:
    """Raise ConfigError for impossible shards."""
    problems = []
    if not 1 <= shard_size <= LARGEST_SHARD:
        problems.append(f"--shard-size is {shard_size}: it must be 1 to {LARGEST_SHARD} bytes")
    algorithm, colon, level = (compression or "").partition(":")
    levels = [str(known) for known in COMPRESSIONS.get(algorithm, ())]
    if compression is not None and (
        algorithm not in COMPRESSIONS or (colon and level not in levels)
    ):
        problems.append(
            f"--compression is {compression!r}: it must be an algorithm, or one with a level, "
            "such as zstd or zstd:7"
        )
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class PartRecord:
    """What a finished part holds.

    Args:
        facts: Whatever else the command notes (JSON values).
        shard: Entry of its shard in the index; None for a part without samples.
    """

    labels: list[int]
    facts: dict[str, Any]
    shard: dict[str, Any] | None = None


class PartsFolder:
    """The unfinished result of one command. Workers and ranks may share it; it can be pickled.

    Args:
        out: Where the result goes, a folder or object storage.
        staging: Local folder for what is unfinished, if `out` is object storage.
        kind: Kind of the data set, a key of `lgm_scale.data.manifest.COLUMNS`.
        made_from: What determines the result (JSON values): another command's work is refused.
    """

    def __init__(
        self,
        out: str,
        staging: str | None,
        kind: str,
        made_from: dict[str, Any],
        num_parts: int,
    ) -> None:
        if is_remote(out) and staging is None:
            raise ConfigError(
                f"--staging: missing; --out {shown(out)} is object storage, name a local folder "
                "for what is unfinished (the command resumes from it)"
            )
        if not is_remote(out) and staging is not None:
            raise ConfigError(f"--staging: has no effect, --out {out} is a local folder; drop it")
        self.out, self.remote = out, is_remote(out)
        self.folder = Path(f"{Path(out)}.partial" if staging is None else staging)
        self.kind = kind
        self.made_from = json.loads(json.dumps(made_from))
        self.num_parts = num_parts
        self.patience = Patience()

    def already_finished(self) -> Manifest | None:
        """The manifest of this very result, if it is there.

        Raises: DataError if something else is.
        """
        if self.remote:
            data = read_remote(join(self.out, MANIFEST_NAME), self.patience)
            if data is None and read_remote(join(self.out, INDEX_NAME), self.patience) is None:
                return None
            manifest = None if data is None else parse_manifest(data.decode(), shown(self.out))
        else:
            folder = Path(self.out)
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                return None
            manifest = None
            if (folder / MANIFEST_NAME).is_file():
                manifest = read_manifest(folder, self.kind)
                check_shards(folder)
        if manifest is None:
            raise DataError(
                f"{shown(self.out)} exists and is not a finished result of this command: it is "
                "never overwritten. Choose another --out, or delete it"
            )
        other = self._differing(manifest.extra.get("made_from", {}))
        if other:
            raise DataError(
                f"{shown(self.out)} holds another data set ({', '.join(other)} differ): it is "
                "never overwritten. Choose another --out, or delete it"
            )
        self._clean_up()
        return manifest

    def _differing(self, made_from: Mapping[str, Any]) -> list[str]:
        return sorted(k for k, value in self.made_from.items() if made_from.get(k) != value)

    def open(self) -> None:
        """Make the folder of the unfinished result, or continue with the one that is there.

        Raises: DataError if it holds anything else.
        """
        plan = {"made_from": self.made_from, "num_parts": self.num_parts, "out": self.out}
        path = self.folder / PLAN_NAME
        there = os.listdir(self.folder) if self.folder.exists() else []
        if PLAN_NAME not in there and not all(map(_is_scrap, there)):
            raise DataError(
                f"{self.folder} is where the unfinished result goes, but it holds something else: "
                "move it away"
            )
        if PLAN_NAME in there:
            begun = json.loads(path.read_text())
            if begun != plan:
                keys = self._differing(begun.get("made_from", {})) or ["out"]
                raise DataError(
                    f"{self.folder} holds an unfinished result of another command "
                    f"({', '.join(keys)} differ): finish that one, or delete the folder"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plan, indent=1) + "\n")

    def finished(self) -> set[int]:
        """Parts whose record is in place."""
        names = os.listdir(self.folder)
        return {int(name.split(".")[1]) for name in names if _is_record(name)}

    def write(
        self,
        part: int,
        columns: dict[str, str],
        samples: Iterable[Mapping[str, Any]],
        record: Callable[[], PartRecord],
        compression: str | None = None,
    ) -> None:
        """Make a part: its shard, and then its record.

        `record` is called when all samples are written; its `shard` is filled in.
        """
        from streaming import MDSWriter  # late: importing it takes five seconds

        aside = self.folder / f"{ASIDE_PREFIX}{part:05}"
        shutil.rmtree(aside, ignore_errors=True)
        # One shard, whatever its size: the parts have been cut to size before.
        writer = MDSWriter(
            out=str(aside),
            columns=columns,
            compression=compression,
            hashes=["sha256"],
            size_limit=None,
            max_workers=1,
        )
        try:
            for sample in samples:
                writer.write(dict(sample))
            if writer.new_samples:
                writer.flush_shard()
        finally:  # not `finish`, which may sleep a second, and writes an index of its own
            writer.executor.shutdown()
        shard = self._take_in(part, aside, writer.shards[0]) if writer.shards else None
        text = json.dumps(asdict(replace(record(), shard=shard)))
        shutil.rmtree(aside)
        write_whole(self.folder / f"part.{part:05}.json", text + "\n")

    def _take_in(self, part: int, aside: Path, shard: dict[str, Any]) -> dict[str, Any]:
        """Give a shard its number, and bring it to where it belongs."""
        made = shard["zip_data"] or shard["raw_data"]
        path = aside / made["basename"]
        for info in filter(None, (shard["raw_data"], shard["zip_data"])):
            info["basename"] = info["basename"].replace("shard.00000", f"shard.{part:05}", 1)
        if self.remote:
            renamed = path.with_name(made["basename"])
            path.rename(renamed)
            store(renamed, join(self.out, made["basename"]), self.patience)
        else:
            path.replace(self.folder / made["basename"])
        return shard

    def record_names(self) -> list[str]:
        """Names of the record files of this machine, sorted."""
        return sorted(name for name in os.listdir(self.folder) if _is_record(name))

    def record_texts(self, names: Iterable[str]) -> dict[str, str]:
        """Content of these record files, by name."""
        return {name: (self.folder / name).read_text() for name in names}

    def add_record_texts(self, texts: Mapping[str, str]) -> None:
        """Take in record files of another machine."""
        for name, text in texts.items():
            if not (self.folder / name).exists():
                write_whole(self.folder / name, text)

    def records(self, take: Callable[[dict[str, Any]], None] | None = None) -> list[PartRecord]:
        """All records, in order. Raises: DataError if one is missing.

        `take` gets the facts of one after the other, which may be large and are kept by nobody.
        """
        missing = sorted(set(range(self.num_parts)) - self.finished())
        if missing:
            raise DataError(f"{self.folder}: part {missing[0]} is not finished; run again")
        records = []
        for part in range(self.num_parts):
            text = (self.folder / f"part.{part:05}.json").read_text()
            record = PartRecord(**json.loads(text))
            if take is not None:
                take(record.facts)
                record = replace(record, facts={})
            records.append(record)
        return records

    def join(
        self,
        manifest: Manifest,
        records: list[PartRecord],
        more: Mapping[str, Callable[[Path], Any]],
    ) -> None:
        """Write index, labels, further files and the manifest, and put the result in place.

        The manifest comes without `files`; `more` are further files by name, each with what writes
        it.
        """
        shards = [record.shard for record in records if record.shard is not None]
        index = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
        write_whole(self.folder / INDEX_NAME, index + "\n")
        labels = [label for record in records for label in record.labels]
        np.save(self.folder / LABELS_NAME, np.asarray(labels, np.int32))
        for name, write in more.items():
            write(self.folder / name)
        names = [INDEX_NAME, LABELS_NAME, *more]
        hashes = {name: file_hash(self.folder / name) for name in names}
        manifest = replace(manifest, files=hashes)
        write_manifest(self.folder, manifest)
        if self.remote:
            for name in [*names, MANIFEST_NAME]:  # the manifest says that all is there
                store(self.folder / name, join(self.out, name), self.patience)
        else:
            read_manifest(self.folder, self.kind)  # the shards hold what it counts
            check_shards(self.folder)
            if Path(self.out).is_dir():  # an empty one
                Path(self.out).rmdir()
            self.folder.replace(self.out)
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove what only an unfinished result needs."""
        if self.remote:
            if (self.folder / PLAN_NAME).is_file():
                shutil.rmtree(self.folder)
            return
        for path in list(Path(self.out).iterdir()):
            if path.is_dir() and _is_scrap(path.name):
                shutil.rmtree(path)
            elif _is_scrap(path.name) or _is_record(path.name) or path.name == PLAN_NAME:
                path.unlink(missing_ok=True)


def _is_record(name: str) -> bool:
    return name.startswith("part.") and name.endswith(".json")


def _is_scrap(name: str) -> bool:
    """Whether a killed command left this: a file that was being written, or a shard's folder."""
    return is_partial(name) or name.startswith(ASIDE_PREFIX)
