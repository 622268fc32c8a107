"""The tables of the scripts beside it: CSV on stdout, under a comment with the versions of what was compared."""

import csv
import sys
from importlib.metadata import version


def write(rows: list[dict], packages: tuple[str, ...], note: str) -> None:
    """Prints `# <package> <version>; ...; <note>`, then the rows, numbers in six digits."""
    print(f"# {'; '.join(f'{name} {version(name)}' for name in packages)}; {note}")
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
