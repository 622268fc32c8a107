"""The ledger of claims as Markdown and as one static HTML page without scripts or anything from outside.

markdown(claims, about), page(claims, about)         # about: a line on the models and the text of the run
"""

import math
from collections.abc import Sequence
from html import escape

from romer.report.claim import BASES, VERDICTS, Claim, counts
from romer.report.evidence import ALPHA, EXACT_TOLERANCE

TITLE = "Which claims of the ROMER paper hold"
SECTIONS = {
    "published": "Decided by the paper's own tables and text",
    "computed": "Decided by evaluating the equations",
    "measured": "Decided by running models",
}
HEADINGS = ("claim", "where", "what decides", "paper", "found [95 % interval]", "draws", "verdict", "why")
RULES = (
    "Claims are in our words. A claim about several cases holds where all of them support it, holds in part where some"
    " do and no more contradict it, does not hold where more contradict than support it, and cannot be decided where no"
    " case says anything. A measured case counts as better or worse only where the 95 % bootstrap interval of the"
    f" difference excludes zero and the paired t-test, Holm-corrected within the claim, gives p < {ALPHA}; where"
    f" nothing is drawn at random, a change of loss by more than {EXACT_TOLERANCE} nats counts. ln is the natural"
    " logarithm of a ratio of perplexities; negative is better. Draws: realisations of the noise. The paper's number is"
    " what its text states or its tables give for the same quantity. Intervals are over draws alone: they say nothing"
    " of another text, and of two or three draws they are hardly more than the range. Several claims can rest on one"
    " finding."
)
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1b1b1b; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #ddd; padding: .4rem .5rem; text-align: left; vertical-align: top; }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.verdict { white-space: nowrap; font-weight: 600; }
.holds { color: #1a6b2f; } .holds-in-part { color: #8a5a00; } .does-not-hold { color: #a3161a; }
.cannot-be-decided-here { color: #555; }
"""


def number(value: float) -> str:
    """Four significant digits, nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.4g}"


def found(claim: Claim) -> str:
    """The found number with its interval."""
    text = number(claim.found)
    return text if math.isnan(claim.low) else f"{text} [{number(claim.low)}, {number(claim.high)}]"


def cells(claim: Claim) -> list[str]:
    """A line of the table, as HEADINGS says."""
    draws = str(claim.realisations) if claim.realisations else ""
    shown = [claim.claim, claim.where, claim.quantity, number(claim.published), found(claim), draws]
    return [*shown, claim.verdict, claim.reason]


def _tally(claims: Sequence[Claim]) -> list[list[str]]:
    """Verdicts by basis, with sums."""
    lines = []
    for basis in BASES:
        given = counts(c for c in claims if c.basis == basis)
        lines.append([SECTIONS[basis], *map(str, given.values()), str(sum(given.values()))])
    given = counts(claims)
    return [*lines, ["All", *map(str, given.values()), str(len(claims))]]


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def markdown(claims: Sequence[Claim], about: str = "") -> str:
    """The ledger as Markdown: rules, counts, one table a basis."""
    parts = [f"# {TITLE}", RULES, about, _table(["", *VERDICTS, "claims"], _tally(claims))]
    for basis in BASES:
        lines = [[f"`{c.id}`: {claim}", *rest] for c in claims if c.basis == basis for claim, *rest in [cells(c)]]
        if lines:
            parts += [f"## {SECTIONS[basis]}", _table(HEADINGS, lines)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _row(claim: Claim) -> str:
    text, where, quantity, published, measured, draws, verdict, reason = map(escape, cells(claim))
    kind = claim.verdict.replace(" ", "-")
    return (
        f'<tr id="{claim.id}"><td>{text}</td><td>{where}</td><td>{quantity}</td><td class="number">{published}</td>'
        f'<td class="number">{measured}</td><td class="number">{draws}</td><td class="verdict {kind}">{verdict}</td>'
        f"<td>{reason}</td></tr>"
    )


def _html_table(headings: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in headings)
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def page(claims: Sequence[Claim], about: str = "") -> str:
    """The ledger as one HTML page."""
    totals = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in _tally(claims)]
    parts = [f"<h1>{TITLE}</h1>", f"<p>{escape(RULES)}</p>", f"<p>{escape(about)}</p>" if about else ""]
    parts.append(_html_table(["", *VERDICTS, "claims"], totals))
    for basis in BASES:
        if rows := [_row(c) for c in claims if c.basis == basis]:
            parts += [f"<h2>{SECTIONS[basis]}</h2>", _html_table(HEADINGS, rows)]
    return (
        '<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )
