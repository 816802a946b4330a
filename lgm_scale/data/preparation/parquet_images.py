"""Images in Parquet files, as the hubs distribute them: a column of bytes, a column of labels.

The image column holds bytes, or a struct with a field `bytes`. Labels are names, or numbers whose
names stand in the file's `huggingface` metadata or come from the command line. Needs pyarrow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lgm_scale.data.preparation.image_folder import ImageFile, ImageListing
from lgm_scale.errors import ConfigError, DataError


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet files need pyarrow, which is not installed: pip install 'lgm-scale[parquet]'"
        ) from error
    return pyarrow.parquet


def list_parquet(
    paths: Sequence[Path], classes: tuple[str, ...] | None, image_column: str, label_column: str
) -> ImageListing:
    """List the rows of Parquet files, in the order of the files and of their rows.

    Without `classes` the names are those of the metadata, or the labels' own.

    Raises: DataError for missing columns and for labels outside the classes.
    """
    parquet = _pyarrow()
    columns: list[list[Any]] = []
    sizes = []
    for path in paths:
        try:
            file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error
        names = file.schema_arrow.names
        for option, column in (("image", image_column), ("label", label_column)):
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r} but {', '.join(names)}: name the right one "
                    f"with --{option}-column"
                )
        classes = classes or _names_in_metadata(file.schema_arrow.metadata, label_column)
        columns.append(file.read(columns=[label_column]).column(0).to_pylist())
        sizes.append(_bytes_per_row(file, image_column))
    values = {value for column in columns for value in column}
    known = classes or _own_names(values)
    files = []
    for path, column, size in zip(paths, columns, sizes, strict=True):
        for row, value in enumerate(column):
            label = _label(value, known, f"row {row} of {path}")
            files.append(ImageFile(path, f"{path.name}:{row}", label, size, row))
    if not files:
        raise DataError(f"{paths[0]} holds no row")
    return ImageListing(known, tuple(files), 0)


def _names_in_metadata(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _own_names(values: set[Any]) -> tuple[str, ...]:
    """Names from the labels: the texts, sorted; numbers from 0 to the largest."""
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(values))
    numbers = [value for value in values if isinstance(value, int)]
    return tuple(str(number) for number in range(max(numbers, default=-1) + 1))


def _label(value: Any, classes: tuple[str, ...], where: str) -> int:
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    if isinstance(value, int) and 0 <= value < len(classes):
        return value
    raise DataError(
        f"{where} has label {value!r}, outside of the {len(classes)} classes: an unlabelled row "
        "(-1 marks those of test sets) has no place here; choose other files, or other --classes"
    )


def _bytes_per_row(file: Any, column: str) -> int:
    """Mean size of an image, from the file's own account of its columns."""
    meta = file.metadata
    total = 0
    for group in range(meta.num_row_groups):
        chunks = [meta.row_group(group).column(i) for i in range(meta.num_columns)]
        total += sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] == column
        )
    return total // max(meta.num_rows, 1)


def read_rows(path: Path, rows: Sequence[int], image_column: str) -> Iterator[bytes | None]:
    """Read the images of ascending rows: their bytes, or None where a row holds none.

    One row group is in memory at a time.
    """
    file = _pyarrow().ParquetFile(path)
    wanted = iter(rows)
    row = next(wanted, None)
    first = 0
    for group in range(file.metadata.num_row_groups):
        stop = first + file.metadata.row_group(group).num_rows
        if row is not None and row < stop:
            column = file.read_row_group(group, columns=[image_column]).column(image_column)
            while row is not None and row < stop:
                value = column[row - first].as_py()
                yield value.get("bytes") if isinstance(value, dict) else value
                row = next(wanted, None)
        first = stop
