"""Tokens per second of a model, clean and under noise with ROMER's routing, in interleaved pairs; cost of programming.

    python benchmarks/throughput.py results/standin/standin/olmoe/checkpoint [pairs]

Noise is drawn when the arrays are programmed, never in a forward pass, so the ratio should be near one.
"""

import statistics
import sys
import time

import torch

import romer

TOKENS, WINDOW, BATCH = 2048, 512, 2


def seconds(model, ids) -> float:
    start = time.perf_counter()
    romer.perplexity(model, ids, WINDOW, BATCH)
    return time.perf_counter() - start


def main(path: str, pairs: int = 5) -> None:
    model, tokenizer = romer.load_model(path)
    ids = torch.randint(len(tokenizer), (TOKENS,), generator=torch.Generator().manual_seed(0))
    plan = romer.ReplacementPlan.fit(romer.profile(model, ids, WINDOW, BATCH).magnitude, n_replace=4)
    calibration = romer.RouterCalibration("iqr", strength=0.2)
    clean, noisy, programming = [], [], []
    for realisation in range(pairs):
        clean.append(seconds(model, ids))
        start = time.perf_counter()
        with romer.program(model, romer.NoiseModel(0.1), realisation), romer.apply(model, plan, calibration):
            programming.append(time.perf_counter() - start)
            noisy.append(seconds(model, ids))
    ratios = [c / n for c, n in zip(clean, noisy, strict=True)]
    print(f"threads {torch.get_num_threads()}, {pairs} interleaved pairs of {TOKENS} tokens (medians)")
    print(f"clean           {TOKENS / statistics.median(clean):8.0f} tokens/s")
    print(f"noisy + ROMER   {TOKENS / statistics.median(noisy):8.0f} tokens/s")
    print(f"noisy / clean   {statistics.median(ratios):8.3f}  [{min(ratios):.3f}, {max(ratios):.3f}]")
    print(f"programming     {statistics.median(programming):8.2f} s a realisation")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
