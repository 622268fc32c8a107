"""Tokens that queue at experts: our cost model beside IBM's 3D-CiM-LLM-Inference-Simulator, as one table.

    git clone https://github.com/IBM/3D-CiM-LLM-Inference-Simulator /tmp/3d-cim
    git -C /tmp/3d-cim checkout 0bef55f689c9be2b6e707b1d4822b2d0ce032598
    python benchmarks/peers/contention.py /tmp/3d-cim

It writes benchmarks/peers/contention.csv and prints it. The peer needs torch, numpy, matplotlib and tqdm, all of which
come with this package; it is imported from the checkout. Both sides compute one MoE layer with every matrix on a tile
of its own; the experts of each token are set by hand. What they count differs:

IBM    norm, router, experts (two projections, GELU between them) and their sum, scheduled operation by operation
ours   `generic3d` with free elementwise operations: time of the experts' block alone (three projections), energy with
       the router's

Times are from start to end of all tokens, energies those of the MVMs of all tokens.
"""

import contextlib
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from table import write

from romer.cli import conf_folder
from romer.hardware import ChipSheet, Deployment, ModelShape, Trace, estimate
from romer.store import write_atomic

WIDTH, EXPERTS, TOP_K = 512, 8, 2  # a tile of 512 × 512 holds every matrix; the peer's k with experts set by hand
CASES = (  # the experts of each token
    [(0, 1)],
    [(0, 1)] * 4,
    [(0, 1), (0, 2), (0, 3), (0, 4)],
    [(0, 1)] * 8,
    [(0, 1), (2, 3), (4, 5), (6, 7)],
)
FREE = 1e12  # elementwise operations a ns: no time that shows in six digits


class Layer(torch.nn.Module):
    """A norm and an MoE layer of the peer's, for several tokens of a sequence, traced with the experts of `case`."""

    def __init__(self, norm: torch.nn.Module, moe: torch.nn.Module, case: list[tuple[int, int]]):
        super().__init__()
        self.norm, self.moe, self.case = norm, moe, case

    def forward(self, x):  # [T, WIDTH]
        outputs = []
        for token, experts in enumerate(self.case):
            info = {"token_id": token, "seq_len": len(self.case), "size": WIDTH}
            self.moe.density = torch.zeros(EXPERTS, EXPERTS)  # of pairs of experts; it draws one pair a token
            self.moe.density[experts] = 1.0
            outputs.append(self.moe(self.norm(x[token], op_info=info), op_info=info))
        return outputs


def ibm(case: list[tuple[int, int]]) -> tuple[float, float]:
    """(ns, nJ of MVMs) of the peer's schedule of a layer with its default times and energies."""
    from threedsim.accelerator import Accelerator, AcceleratorConfig
    from threedsim.inference import schedule_execution, trace_model
    from threedsim.modules import LayerNorm, Linear, MoELayer
    from threedsim.modules.base import assign_acc, fill_name_fields, make_traceable

    moe = MoELayer(WIDTH, WIDTH, EXPERTS, TOP_K, activation="gelu")
    model = Layer(LayerNorm(WIDTH, device="meta"), moe, case)
    matrices = [module for module in model.modules() if isinstance(module, Linear)]
    config = AcceleratorConfig(tiles=len(matrices), tiers=1, tier_shape=(WIDTH, WIDTH))
    accelerator = Accelerator(config, device="meta")
    assign_acc(model, accelerator)
    for tile, matrix in enumerate(matrices):
        used = matrix.in_features * matrix.out_features / WIDTH**2
        matrix.set_mapping([[(tile, 0, used, matrix.in_features, matrix.out_features)]])
    fill_name_fields(model)
    make_traceable(model, True)
    ns, _, _, _, _, energies, _ = schedule_execution(trace_model(model).graph, accelerator)
    return float(ns), float(energies["tier_linear"])


def ours(case: list[tuple[int, int]]) -> tuple[float, float]:
    """(ns of the experts' block, nJ of MVMs) of our model, all tokens in one batch."""
    shape = ModelShape("layer", WIDTH, 1, 1, 1, WIDTH, EXPERTS, TOP_K, WIDTH, 1)
    sheet = ChipSheet.load(yaml.safe_load((conf_folder() / "hardware" / "generic3d.yaml").read_text()))
    sheet = replace(sheet, digital_unit_ops_per_ns=FREE)
    trace = Trace(np.array(case, np.uint8)[:, None], EXPERTS, len(case))
    deployment = Deployment(analog=frozenset({"router", "routed expert"}))  # what the peer's layer has
    found = estimate(shape, trace, sheet, deployment, batch=len(case))
    return 1e9 * found.experts_s, 1e9 * found.mvm_j


def row(case: list[tuple[int, int]]) -> dict:
    """Both on the same routing."""
    ibm_ns, ibm_nj = ibm(case)
    ours_ns, ours_nj = ours(case)
    return {
        "tokens": len(case),
        "experts": " ".join(f"{i}+{j}" for i, j in case),
        "ibm_ns": ibm_ns,
        "ibm_energy_nj": ibm_nj,
        "ours_ns": ours_ns,
        "ours_energy_nj": ours_nj,
    }


def main(checkout: str) -> None:
    describe = ["git", "-C", checkout, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    sys.path.insert(0, str(Path(checkout) / "src"))
    try:
        commit.check_returncode()
        with contextlib.redirect_stdout(sys.stderr):  # it says on stdout what it is doing
            rows = [row(case) for case in CASES]
    except (subprocess.CalledProcessError, ImportError) as error:
        sys.exit(f"{error}: expected a checkout of IBM/3D-CiM-LLM-Inference-Simulator")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        write(rows, ("torch",), f"3D-CiM-LLM-Inference-Simulator {commit.stdout.strip()}; energies of MVMs")
    write_atomic(Path(__file__).with_suffix(".csv"), text.getvalue())
    print(text.getvalue(), end="")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/peers/contention.py CHECKOUT")
    main(sys.argv[1])
