# SPDX-License-Identifier: Apache-2.0
"""Loads TensorFlow Datasets (TFDS) without TensorFlow."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from dlm_jax.data.files import cell, hold_out
from dlm_jax.data.normalization import nfc
from dlm_jax.errors import UserError

CONNECT_SECONDS = 5.0  # without a network, TFDS itself retries for minutes
ARCHIVES = (".zip", ".gz", ".tgz", ".tar", ".bz2")  # TFDS unpacks these with TensorFlow


def load_tfds(cfg: Any, split: str) -> list[str]:
    """Loads the texts of a data set, which is prepared if need be. Raises UserError.

    cfg.path: its TFDS name, such as "e2e_cleaned" or "name/config:1.0.0".
    """
    return load_records(cfg, split, _cell, ("column",))


def load_records(
    cfg: Any,
    split: str,
    read: Callable[[dict, Any, str], Any],
    options: tuple[str, ...],
) -> list:
    """Returns read(record, cfg, place) of each record, if not empty.

    options: of cfg, which name the columns that it reads. Raises UserError.
    """
    found = list(records(cfg, split, read, options))
    return found if cfg.tfds_valid else hold_out(found, cfg, split)


def stream(cfg: Any, split: str) -> Iterator[str]:
    """Yields the texts of the TFDS split that holds `split`. Raises UserError."""
    return records(cfg, split, _cell, ("column",))


def split_name(cfg: Any, split: str) -> str:
    """Returns the name of the TFDS split that holds `split`, "train" or "valid"."""
    return cfg.tfds_valid if split == "valid" and cfg.tfds_valid else cfg.tfds_train


def _cell(record: dict, cfg: Any, where: str) -> str:
    return cell(record, cfg.column, where)


def records(
    cfg: Any,
    split: str,
    read: Callable[[dict, Any, str], Any],
    options: tuple[str, ...],
) -> Iterator[Any]:
    """Yields what `load_records` returns, of both splits if validation is held out."""
    part = split_name(cfg, split)
    try:
        builder = _prepared(cfg)
        names = list(map(nfc, builder.info.features or {}))
        for option in options:
            if nfc(cfg[option]) not in names:
                raise UserError(
                    f"TFDS {cfg.path} has no column {cfg[option]!r}: "
                    f"set config.data.{option} to one of {', '.join(names)}"
                )
        found = builder.as_data_source(split=part)
        named = ({nfc(name): r[name] for name in r} for r in found)
        numbered = enumerate(named, 1)
        rows = (read(r, cfg, f"TFDS {cfg.path} record {i}") for i, r in numbered)
        yield from filter(None, rows)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_tfds_failure(error, cfg, part)) from error


def _prepared(cfg: Any) -> Any:
    """Returns a data set's builder; downloads and prepares its files if missing."""
    import tensorflow_datasets as tfds

    data_dir = cfg.tfds_dir or None
    builder = tfds.builder(cfg.path, data_dir=data_dir)
    if not builder.is_prepared():
        builder = tfds.builder(cfg.path, data_dir=data_dir, file_format="array_record")
        _check_preparable(builder, cfg)
        builder.download_and_prepare()
    return builder


def _check_preparable(builder: Any, cfg: Any) -> None:
    """Raises early where TFDS would fail after a download or minutes of retries."""
    import requests

    urls = list(builder.url_infos or {})
    if any(url.endswith(ARCHIVES) for url in urls) and not find_spec("tensorflow"):
        raise ModuleNotFoundError("needed to unpack archives", name="tensorflow")
    for url in urls[:1]:
        try:
            requests.head(url, timeout=CONNECT_SECONDS)
        except requests.RequestException as error:
            raise UserError(
                f"TFDS {cfg.path} is not prepared in {builder.data_path} and {url} "
                "cannot be reached: prepare it on a machine with a network and set "
                "config.data.tfds_dir to its folder"
            ) from error


def _tfds_failure(error: Exception, cfg: Any, split: str) -> str:
    """Returns a one-line message for an error that TFDS raised."""
    name = f"TFDS {cfg.path}"
    causes = list(_causes(error))
    missing = [e.name for e in causes if isinstance(e, ImportError) and e.name]
    if missing:
        return (
            f"{name} needs the package {missing[0]}: install it, or prepare the data "
            "set as array_record elsewhere and set config.data.tfds_dir to its folder"
        )
    if any(type(e).__name__ == "DatasetNotFoundError" for e in causes):
        return (
            f"{name} is neither a known data set nor prepared in "
            f"config.data.tfds_dir={cfg.tfds_dir!r}: correct config.data.path"
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return (
        f"{name} split {split!r} cannot be read ({reason}): check config.data.path, "
        "tfds_train and tfds_valid, and that tfds_dir holds array_record files"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
