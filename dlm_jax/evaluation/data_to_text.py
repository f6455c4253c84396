# SPDX-License-Identifier: Apache-2.0
"""Data to text: E2E's records and references, slot errors, and the built-in grammar's.

A record is {field: value}, in the naming of E2E's official test set (arXiv:1706.09254),
whichever notation it was read from. The slot error rate is (missing + added + wrong) /
slots of the records, by the patterns of `slot_patterns`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dlm_jax.data import files, grammar, pairs
from dlm_jax.errors import UserError, choices, choose
from dlm_jax.evaluation import references as measured
from dlm_jax.evaluation import slot_patterns
from dlm_jax.evaluation.references import References

Record = dict[str, str]
FIELDS = (
    "name",
    "eatType",
    "food",
    "priceRange",
    "customer rating",
    "area",
    "familyFriendly",
    "near",
)
NAMES = {field.lower().replace(" ", ""): field for field in FIELDS}
TOKENIZED = {  # of src1_*.txt
    "eatType": "Type",
    "priceRange": "price",
    "familyFriendly": "family friendly",
}
OFFICIAL = r"([^,\[\]]+)\[([^\[\]]*)\]"
NAMES |= {"type": "eatType", "price": "priceRange", "rating": "customer rating"}


class SlotErrors(NamedTuple):
    """Numbers of slots that a text omits, adds or states with another value."""

    missing: int
    added: int
    wrong: int


# ---- reading -------------------------------------------------------------------------


def parse_record(line: str) -> Record:
    """Reads `name[Aromi], eatType[pub]` or `name : Aromi | Type : pub`.

    Returns {field: value} with the official names of the fields (`FIELDS`) and values
    as `detokenize` leaves them. Raises UserError for a line that is no record, and for
    a field that is unknown or stands there twice.
    """
    pairs = [part.partition(":")[::2] for part in line.split("|")]
    if re.fullmatch(rf"(?:{OFFICIAL}(?:, *|$))+", line.strip()):
        pairs = re.findall(OFFICIAL, line)
    record: Record = {}
    for name, value in pairs:
        field = NAMES.get(re.sub(r"\s", "", name).lower())
        if not value.strip():
            raise UserError(
                f"{line.strip()!r} is no record: give `name[Aromi], eatType[pub]` or "
                "`name : Aromi | Type : pub`"
            )
        if field is None or field in record:
            problem = "stands there twice" if field else "is unknown"
            raise UserError(
                f"{line.strip()!r}: the field {name.strip()!r} {problem}: give each of "
                f"{', '.join(FIELDS)} at most once"
            )
        record[field] = detokenize(value)
    return record


def to_source(record: Mapping[str, str]) -> str:
    """Returns a record in the notation and the tokens of src1_*.txt, as models read it."""
    spaced = {
        TOKENIZED.get(field, field): re.sub(
            r"(?<=\d)-(?=\d)", " - ", value.replace("£", "£ ")
        )
        for field, value in record.items()
    }
    return pairs.linearize(spaced)


def read_references(path: str | Path) -> tuple[list[Record], list[list[str]]]:
    """Reads records and their references, in the order in which records first occur.

    path: E2E's official csv (columns `mr` and `ref`), or lines `record||text`, whose
    texts are detokenized. Raises UserError for other files.
    """
    path = Path(path)
    if path.suffix != ".csv":
        rows = [line.partition("||")[::2] for _, line in files.lines(path)]
        return grouped((mr, detokenize(text)) for mr, text in rows)
    rows = list(files.csv_records(path, ConfigDict({"delimiter": ","})))
    if not rows or not {"mr", "ref"} <= rows[0][1].keys():
        raise UserError(
            f"{path} has no columns mr and ref: give E2E's testset_w_refs.csv"
        )
    return grouped(
        (files.cell(row, "mr", where), files.cell(row, "ref", where))
        for where, row in rows
    )


def grouped(pairs: Iterable[tuple[str, str]]) -> tuple[list[Record], list[list[str]]]:
    """Groups (record's line, text) by record, in order of first occurrence.

    Raises UserError as `parse_record`, and for a record without text.
    """
    groups: dict[frozenset, tuple[Record, list[str]]] = {}
    for line, text in pairs:
        record = parse_record(line)
        if not text:
            raise UserError(f"{line!r} has no text: give a reference in every line")
        groups.setdefault(frozenset(record.items()), (record, []))[1].append(text)
    return [record for record, _ in groups.values()], [x for _, x in groups.values()]


def detokenize(text: str) -> str:
    """Returns ordinary text of E2E's tokens, such as `£ 30` and `family - friendly`."""
    text = " ".join(text.split())
    text = re.sub(r"£ (?=\d)", "£", text)
    text = re.sub(r"(?<=\w) - (?=[\w£])", "-", text)
    text = re.sub(r" (n't|'(?:s|re|ll|ve|d|m))\b", r"\1", text)
    text = re.sub(r"(?<!\w)' ([^']+) '(?!\w)", r"'\1'", text)
    return re.sub(r" ([.,;:?!])", r"\1", text)


# ---- slots ---------------------------------------------------------------------------


def slot_errors(record: Mapping[str, str], text: str) -> SlotErrors:
    """Compares a record with what a text states (`slot_patterns.stated`).

    A field of the record is missing if the text states nothing of it, and wrong if only
    other values. Added: values beside the right one, and of fields that the record
    lacks. "restaurant" is no value beside another, nor where the record has no type. A
    number where the record has a word ("low", "cheap") is wrong: it is invented. Which
    venue is near which is not checked. Raises UserError for a record that is not E2E's.
    """
    _refuse_unknown(record)
    names = {record[field] for field in ("name", "near") if field in record}
    said = slot_patterns.stated(text, names)
    venues = said.pop("venue")
    missing, added = len(names - venues), len(venues - names)
    wrong = min(missing, added)
    missing, added = missing - wrong, added - wrong
    for field, values in said.items():
        value = record.get(field)
        if field == "eatType" and (value is None or len(values) > 1):
            values = values - ({"restaurant"} - {value})
        right = {said for said in values if slot_patterns.expresses(said, value)}
        if right or value is None:
            added += len(values - right)
        else:
            wrong, missing = wrong + bool(values), missing + (not values)
    return SlotErrors(missing, added, wrong)


def _refuse_unknown(record: Mapping[str, str]) -> None:
    unknown = [field for field in record if field not in FIELDS]
    if unknown or not record:
        if not record:
            raise UserError(f"an empty record: give fields of {', '.join(FIELDS)}")
        raise UserError(
            f"the field {unknown[0]!r} is unknown: {choices(unknown[0], FIELDS)}"
        )
    for field, known in slot_patterns.VALUES.items():
        if field in record and record[field] not in known:
            choose(field, dict.fromkeys(known), record[field])


def scores(
    outputs: Sequence[str], records: Sequence[Record], references: References
) -> dict[str, float]:
    """Computes `references.measures` and slot errors of one output per record.

    Slot error rate, missing, added and wrong are percentages of the records' slots.
    Outputs are measured as they are: detokenize those of a model of E2E's tokens.
    Raises UserError unless there are as many outputs as records.
    """
    row = measured.measures(outputs, references)
    pairs = zip(records, outputs, strict=True)
    errors = np.array([slot_errors(record, text) for record, text in pairs])
    shares = 100 * errors.sum(0) / sum(map(len, records))
    kinds = dict(zip(SlotErrors._fields, map(float, shares), strict=True))
    return row | {"slot error rate": float(shares.sum())} | kinds


# ---- the template --------------------------------------------------------------------

RATINGS = {"low": "a low", "average": "an average", "high": "a high"}


def template(record: Mapping[str, str]) -> str:
    """Writes a record out in up to three fixed sentences: the baseline without a model."""
    _refuse_unknown(record)
    kind = record.get("eatType", "place")
    noun = " ".join(filter(None, [record.get("food"), kind]))
    family = record.get("familyFriendly")
    noun = f"family friendly {noun}" if family == "yes" else noun
    article = "an" if noun[0] in "AEIOU" else "a"
    where = {
        "riverside": " in the riverside area",
        "city centre": " in the city centre",
    }
    near = f" near {record['near']}" if "near" in record else ""
    name = record.get("name", "It")
    text = f"{name} is {article} {noun}{where.get(record.get('area', ''), '')}{near}."
    price, rating = record.get("priceRange"), record.get("customer rating")
    parts = [
        f"a price range of {price}" if price and "£" in price else "",
        f"a {price} price range" if price and "£" not in price else "",
        f"a customer rating of {rating}" if rating and rating not in RATINGS else "",
        f"{RATINGS[rating]} customer rating" if rating in RATINGS else "",
    ]
    if any(parts):
        text += f" It has {' and '.join(filter(None, parts))}."
    return f"{text} It is not family friendly." if family == "no" else text


# ---- the built-in grammar ------------------------------------------------------------


def grammar_scores(
    wanted: Sequence[Mapping[str, str]], outputs: Sequence[str]
) -> dict[str, float]:
    """Compares outputs with the fields wanted of them, exactly, by the grammar.

    wanted: {field: words} as of `grammar.fields`. Returns percentages: "valid", the
    outputs in the language; "exact", those that state the wanted fields, with their
    values, and no others; "exact of valid" (nan if none is valid); and "distinct".
    Raises UserError for an unknown field or another number of outputs than of fields.
    """
    known = [field.lower() for field in grammar.FIELDS]
    unknown = sorted({field for fields in wanted for field in fields} - set(known))
    if unknown or len(wanted) != len(outputs) or not wanted:
        what = f"the field {unknown[0]!r} is unknown" if unknown else ""
        what = what or f"{len(outputs)} outputs for {len(wanted)} records"
        raise UserError(f"{what}: give one output per record of {', '.join(known)}")
    valid = [grammar.accepts(text) for text in outputs]
    exact = [
        ok and grammar.fields(text) == dict(fields)
        for fields, text, ok in zip(wanted, outputs, valid, strict=True)
    ]
    return {
        "valid": 100 * float(np.mean(valid)),
        "exact": 100 * float(np.mean(exact)),
        "exact of valid": 100 * sum(exact) / sum(valid) if any(valid) else float("nan"),
        "distinct": 100 * measured.distinct(outputs),
    }
