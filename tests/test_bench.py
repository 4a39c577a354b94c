"""tools/bench.py: what it compares with is what it says, and every step runs."""

import pytest
import torch

import common
import pare
from tools import bench


def test_the_operator_that_the_bench_compares_with_makes_the_same_hard_choice():
    scores = torch.rand(3, 40)
    for k in (1, 7, 39):
        assert torch.equal(bench.n_softmaxes(scores, k).round(), bench.OPERATORS["threshold (ours)"](scores, k))


@pytest.mark.matrix
def test_every_rung_of_the_bench_takes_a_step_and_two_passes_equal_the_stacked_one():
    device, ends, counts = torch.device("cpu"), [], []
    for method, ladder in (("pare", bench.LADDER), ("mona", ("finite difference",)), ("finetune", ())):
        splits = bench.make_splits(method, device, 64)
        batch = [part for split in splits for part in next(split.batches(1, 4, 0, 0))]
        for have in ((), tuple(rung for rung in ladder if rung not in ("bf16", "compile"))):
            _, _, step = bench.build(method, "tiny", have, device, pare.replace_patches)
            with bench.Operations() as counter:
                ends.append([step(*batch).item() for _ in range(2)])
            counts.append(counter.total)
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)  # PaRe: one sample after the other, and all at once
    assert ends[2] == pytest.approx(ends[3], rel=1e-4)  # MoNA: exact, and finite difference
    assert counts[0] == pytest.approx(counts[1], rel=0.01)  # the same arithmetic, stacked or not
    assert 2.9 < counts[3] / counts[4] < 3.5 and 1.9 < counts[0] / counts[4] < 2.1  # in steps of fine-tuning
    loaded = next(iter(bench.loader(splits[0], 4, 1, 0, device)))
    assert loaded[0].shape == batch[0].shape and loaded[0].dtype == batch[0].dtype


def test_a_profile_has_ten_operations_and_most_of_the_time(capsys):
    bench.profile(bench.Args("profile", methods=("finetune",), batch_size=4), steps=1)
    shares = [float(line.split("|")[-2].strip(" %")) for line in capsys.readouterr().out.splitlines() if line.endswith("% |")]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100


@pytest.mark.parametrize("way", ["fine-tuning step", "finite-difference"])
def test_the_bench_runs_the_steps_it_compares(way):
    seconds, megabytes = bench.one_meta_step(way, "tiny-swin", 2)
    assert seconds > 0 and megabytes >= 0


def test_the_official_way_restated_is_near_our_value():
    x_s, y_s, x_t, y_t = bench.clouds(200, 16, "cpu", 40)
    ours = common.otdd(x_s, y_s, x_t, y_t, reg=0.1).item()
    assert bench.plain_otdd(x_s, y_s, x_t, y_t).item() == pytest.approx(ours, rel=0.02)
