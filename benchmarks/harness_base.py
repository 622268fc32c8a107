"""The dense base of the stand-ins on the benchmarks, beside what others have measured: a check of the harness itself.

    python benchmarks/harness_base.py [items a task | all] [csv]

Writes benchmarks/harness_base.csv by default. `public` is what its source prints for SmolLM2-135M-Instruct in bfloat16,
on the full sets; ours is the Q4_1 file of the wheel, read back to float32, on the first items. Empty: no figure found.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from romer.evaluate import benchmarks
from romer.evaluate.harness import Scorer, evaluate, prepare
from romer.models import smollm2
from romer.store import write_atomic

PUBLIC = {  # huggingface.co/lldois/SmolLM2-135M-Reasoning-SLERP-Champion, column `Baseline` (lm-eval, 0-shot)
    ("piqa", "acc_norm"): 0.6692,
    ("arc_easy", "acc"): 0.5412,
    ("arc_challenge", "acc_norm"): 0.2773,
}
SOURCE = "model card of lldois/SmolLM2-135M-Reasoning-SLERP-Champion, baseline, lm-eval 0-shot"


def main(items: str = "200", path: str = str(Path(__file__).with_suffix(".csv"))) -> None:
    scorer = Scorer(*smollm2.load())
    rows = []
    for name in benchmarks.SOURCES:
        start = time.perf_counter()
        prepared = prepare(scorer, benchmarks.load(name), None if items == "all" else int(items))
        for score in evaluate(scorer, [prepared]):
            public = PUBLIC.get((score.task, score.metric))
            rows.append(asdict(score) | {"public": public, "source": SOURCE if public is not None else ""})
        print(f"{name}: {len(prepared.documents)} items in {time.perf_counter() - start:.0f} s", flush=True)
    table = pd.DataFrame(rows)
    write_atomic(path, table.to_csv(index=False))
    print(table[["task", "metric", "value", "stderr", "items", "public"]].to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main(*sys.argv[1:3])
