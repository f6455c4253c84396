# SPDX-License-Identifier: Apache-2.0
"""Measures published systems' outputs on E2E's official test set, beside a template.

    python benchmarks/e2e_systems.py --e2e FOLDER --systems FOLDER \\
        --out benchmarks/results/e2e_systems.json

--e2e holds testset_w_refs.csv (github.com/tuetschek/e2e-dataset), --systems the outputs
(github.com/tuetschek/e2e-eval, arXiv:1901.07931): tab-separated columns MR and output, a
file per system. `data_to_text.scores` gives a model's outputs the same measures.
"""

import argparse
import json
from pathlib import Path

from dlm_jax.data import files
from dlm_jax.errors import UserError
from dlm_jax.evaluation import data_to_text

COLUMNS = (
    "BLEU",
    "chrF",
    "ROUGE-L",
    "slot error rate",
    "missing",
    "added",
    "wrong",
    "distinct",
    "words",
)


def read_outputs(path: Path, records: list[data_to_text.Record]) -> list[str]:
    """Reads a system's outputs; UserError if its records are not those, in order."""
    rows = [line.split("\t") for line in files.every_line(path) if line][1:]
    unquoted = [[cell.strip().strip('"') for cell in row] for row in rows]
    if [data_to_text.parse_record(row[0]) for row in unquoted] != records:
        raise UserError(f"{path}: its records are not those of testset_w_refs.csv")
    return [row[1] for row in unquoted]


def table(rows: dict[str, dict[str, float]]) -> str:
    """Formats a Markdown table, the highest BLEU first."""
    lines = [f"| system | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["BLEU"]):
        cells = [f"{row[column]:.2f}" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures the systems and the template, prints the table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--e2e", type=Path, required=True)
    parser.add_argument("--systems", type=Path, required=True)
    parser.add_argument("--out", default="benchmarks/results/e2e_systems.json")
    args = parser.parse_args()
    records, references = data_to_text.read_references(args.e2e / "testset_w_refs.csv")
    outputs = {
        path.stem: read_outputs(path, records)
        for path in sorted(args.systems.glob("*.tsv"))
    }
    outputs["template"] = [data_to_text.template(record) for record in records]
    rows = {
        name: data_to_text.scores(texts, records, references)
        for name, texts in outputs.items()
    }
    rounded = {n: {k: round(v, 3) for k, v in r.items()} for n, r in rows.items()}
    result = {"records": len(records), "systems": rounded}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
