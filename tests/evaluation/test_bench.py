import json

import pytest
import torch

from cxr.evaluation import bench, bench_kernels
from cxr.networks import PRESETS


@pytest.fixture
def small(monkeypatch):
    """Two calls of each operation are enough to see that the table is right."""
    monkeypatch.setattr(bench_kernels, "DTYPES", (torch.float32,))
    monkeypatch.setattr(bench_kernels, "_cache_bytes", lambda device: 2**16)
    few = bench_kernels.cases(PRESETS["tiny"], 2)
    few = list({case.op: case for case in few}.values())
    monkeypatch.setattr(bench_kernels, "cases", lambda preset, batch: few)


def test_every_operation_of_the_networks_is_measured():
    found = bench_kernels.cases(PRESETS["cxr64"], 32)
    assert {case.op for case in found} == {
        "mod_act", "fir_mod_act", "act_fir", "fir up", "fir down",
    }  # fmt: skip
    assert (
        bench_kernels.Case("fir_mod_act", (32, 48, 65, 65), ("d", "eps", "strength", "b", "r"))
        in found
    )
    assert bench_kernels.Case("act_fir", (32, 48, 64, 64), ("b",)) in found
    assert len(found) == len(set(found))


@pytest.mark.parametrize("case", bench_kernels.cases(PRESETS["tiny"], 2), ids=str)
def test_the_ordinary_code_computes_what_the_operation_does(case):
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    for actual, expected in zip(case.fused(inputs), case.plain(inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_measured_and_written(small, tmp_path):
    found = bench.bench("kernels", "cpu", ("tiny",), 2, seconds=1e-3, backend="aot_eager")
    bench.write(found, tmp_path / "deep" / "bench.json")
    found = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert {"device", "torch", "date", "command", "kernels"} <= found["about"].keys()
    rows = found["kernels"]["rows"]
    assert {row["pass"] for row in rows} == {"forward", "backward"}
    assert all(row["ms"] > 0 and row["vs_eager"] > 0 and row["vs_compiled"] > 0 for row in rows)
    assert len(found["kernels"]["means"]) == 2


def test_bytes_are_those_of_every_tensor_once(small):
    case = bench_kernels.Case("act_fir", (2, 8, 8, 8), ("b",))
    rows = bench_kernels._time_case(case, torch.float32, torch.device("cpu"), 0, "eager", 1.0)
    c, b, y = 2 * 8 * 64 * 4, 8 * 4, 2 * 8 * 16 * 4
    moved = {row["pass"]: round(row["MB"] * 1e6) for row in rows}
    assert moved == {"forward": c + b + y, "backward": y + c + b + c + b}


def test_a_training_step_is_measured_in_each_variant():
    found = bench.bench("step", "cpu", ("tiny",), 16, rounds=1, backend="eager")["step"][0]
    (times,) = found["seconds"]
    for variant in bench.STEPS:
        assert len(times[variant]) == 1
        assert found[variant] == pytest.approx(16 / times[variant][0])


def test_the_parts_of_an_explanation_are_within_its_time():
    found = bench.bench("explain", "cpu", ("tiny",), rounds=1)["explain"][0]
    parts = found.keys() - {"preset", "unit", "total", "at_once", "each_at_once"}
    assert found["at_once"] == 4 and 0 < found["each_at_once"] < found["total"]
    assert {"invert", "lay_over", "heat_maps"} < parts
    assert 0.9 * found["total"] < sum(found[part] for part in parts) <= found["total"]
