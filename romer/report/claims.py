"""The ledger of the ROMER paper's claims (arXiv:2605.11800): each with what decides it, and whether it holds.

    claims = ledger(records, routing, hardware)          # any of them may be None
    write(claims, "results/claims", about="four stand-ins, held-out Wikipedia leads")
    counts(claims)                                       # {"holds": 12, "holds in part": 9, ...}
    print(summary(claims))                               # for the README

What a claim is, and the rules of its verdict, are in `claim` and `evidence`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from romer.errors import InputError
from romer.report.claim import BASES, VERDICTS, Claim, counts
from romer.report.claims_computed import computed
from romer.report.claims_hardware import hardware as costs
from romer.report.claims_measured import measured
from romer.report.claims_page import markdown, page
from romer.report.claims_referee import referee
from romer.report.claims_routing import routing as routed
from romer.report.claims_table1 import table1
from romer.report.claims_table2 import table2
from romer.report.claims_table4 import table4
from romer.report.evidence import Evidence
from romer.store import write_atomic

__all__ = ["Claim", "counts", "ledger", "summary", "write"]


def ledger(
    records: pd.DataFrame | None = None, routing: pd.DataFrame | None = None, hardware: pd.DataFrame | None = None
) -> list[Claim]:
    """All claims: those the published tables decide, those the equations decide, those measurements decide.

    records: long-format rows with the columns of `romer.report.tables.RECORD`, every task together; routing: per MoE
    layer and realisation what the profile stage writes, with chip, model and temperature_c; hardware: one row per model
    and method with the columns of `claims_hardware.COLUMNS`. What is None or incomplete leaves its claims undecided.
    Raises InputError for columns that are missing and for rows that contradict each other.
    """
    evidence = Evidence(records)
    found = [c for printed in (table1, table2, table4) for c in printed.claims()] + computed.claims()
    found += measured.claims(evidence) + referee.claims(evidence)
    found += routed.claims(evidence, routing) + costs.claims(hardware)
    ids = [c.id for c in found]
    if twice := {i for i in ids if ids.count(i) > 1}:
        raise InputError(f"claims: id {sorted(twice)[0]} is used twice, expected each once")
    return found


def summary(claims: Sequence[Claim]) -> str:
    """One sentence with the verdict counts, in all and for each basis."""
    plural = dict(zip(VERDICTS, ("hold", "hold in part", "do not hold", "cannot be decided here"), strict=True))
    parts = ", ".join(f"{n} {plural[verdict]}" for verdict, n in counts(claims).items())
    words = {"published": "the printed tables alone", "computed": "the equations", "measured": "measurements"}
    split = []
    for basis in BASES:
        given = counts(c for c in claims if c.basis == basis)
        split.append(f"by {words[basis]} " + ", ".join(f"{n} {plural[v]}" for v, n in given.items() if n))
    return f"Of {len(claims)} claims: {parts} ({'; '.join(split)})."


def write(claims: Sequence[Claim], folder: str | Path, about: str = "") -> list[Path]:
    """Writes claims.csv (full precision), claims.md and claims.html, each atomically; returns their paths.

    about: a line for the page on the models and the text of the run.
    """
    texts = {
        "csv": pd.DataFrame([asdict(c) for c in claims]).to_csv(index=False, lineterminator="\n"),
        "md": markdown(claims, about),
        "html": page(claims, about),
    }
    for kind, text in texts.items():
        write_atomic(Path(folder) / f"claims.{kind}", text)
    return [Path(folder) / f"claims.{kind}" for kind in texts]
