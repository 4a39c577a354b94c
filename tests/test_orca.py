"""ORCA's first stage, and ORCA end to end."""

import pytest
import torch
from helpers import SHORT, here, result, rows, weights
from safetensors.torch import load_file

import common
import contrast
import data
import mona
import orca
import recraft
from run import embed_all


def small_alignment(tmp_path, **options):
    torch.manual_seed(0)
    source = common.load_source("tiny-swin")
    args = data.complete(orca.Args(scale="tiny", backbone="tiny-swin", embedder_epochs=6, **options), "orca", "tiny")
    train = data.load("spherical", tmp_path, tmp_path, "tiny", 200).train
    source_set = data.load_proxy("cifar10", tmp_path, "tiny", 100)
    embedder = common.initialise(common.Embedder2d(3, source.token_width, source.size), source, "copy")
    with torch.no_grad():
        u_s = embed_all(source.embedder, source_set, torch.arange(100))
    return embedder, u_s, source_set.y, train, train.y, args


@pytest.mark.parametrize("objective", ["otdd", "otdd-gaussian", "mmd", "l2", "as_released"])
def test_alignment_brings_the_embedder_closer_by_every_objective(tmp_path, objective):
    options = dict(as_released=True) if objective == "as_released" else dict(objective=objective)
    history = orca.align(*small_alignment(tmp_path, **options))
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["distance"] < 0.9 * history[0]["distance"]


def test_a_group_of_classes_is_a_problem_and_the_whole_is_their_weighted_mean(tmp_path):
    embedder, u_s, y_s, train, y_t, args = small_alignment(tmp_path, max_samples=1000, classes_per_problem=100)
    with torch.no_grad():
        u_t = embed_all(embedder, train, torch.arange(len(train)))
    assert orca.align(embedder, u_s, y_s, train, y_t, args)[0]["distance"] == pytest.approx(
        common.otdd(u_s, y_s, u_t, y_t).item(), rel=1e-4
    )
    embedder, *rest, args = small_alignment(tmp_path, max_samples=1000, classes_per_problem=1)
    parts = [(y_t == c).float().mean() * common.otdd(u_s, y_s, u_t[y_t == c], y_t[y_t == c]) for c in y_t.unique()]
    assert orca.align(embedder, *rest, args)[0]["distance"] == pytest.approx(sum(parts).item(), rel=1e-4)


def test_stage_1_trains_the_embedder_only_and_is_kept(script, tmp_path):
    options = [*SHORT[:-1], 1, "--embedder-epochs", 3]
    said = script("orca.py", *options, out=tmp_path)
    folder = tmp_path / "spherical-orca-tiny-swin-s0-toy"
    lines = rows(folder)
    assert "stage 1 distance " in said and [row.get("stage") for row in lines] == [1, 1, 1, None]
    assert lines[2]["distance"] < lines[0]["distance"] and result(folder)["source"] == "cifar10"
    kept, source = load_file(folder / "stage1.safetensors"), common.load_source("tiny-swin")
    assert kept.keys() == {f"embedder.{k}" for k in source.embedder.state_dict()}
    assert not torch.equal(kept["embedder.project.weight"], source.embedder.project.weight)
    # a run killed between the stages goes on with stage 2 and ends with the same weights
    before, stage1 = weights(folder), (folder / "stage1.safetensors").read_bytes()
    for name in ("last.pt", "result.json", "best.safetensors", "metrics.jsonl"):
        (folder / name).unlink()
    assert "holds a run already" in script("orca.py", *options, out=tmp_path, code=2)
    assert "resumed after stage 1, with its 3 rows" in script("orca.py", *options, "--resume", out=tmp_path)
    assert rows(folder) == lines and all(torch.equal(v, before[k]) for k, v in weights(folder).items())
    assert (folder / "stage1.safetensors").read_bytes() == stage1
    (folder / "stage1.safetensors").write_bytes(stage1[:1000])
    (folder / "result.json").unlink()
    assert "stage1.safetensors is empty or cut short" in script("orca.py", *options, "--resume", out=tmp_path, code=2)


class Seen(Exception):
    """What a spy was called with."""


@pytest.mark.parametrize("method", [orca, recraft, contrast, mona])
def test_the_rate_of_a_first_stage_is_that_of_one_batch(tmp_path, monkeypatch, method):
    """Ten times the rate of stage 2 without its factor for accumulation, with its weight decay; MoNA: once."""

    def stop(module, args):
        raise Seen(args.lr, args.weight_decay)

    monkeypatch.setattr(method, "make_optimizer", stop)
    monkeypatch.setattr(data, "of_one_batch", lambda args, name: (3e-4, {method.__name__: 0.7}[name]))
    with pytest.raises(Seen) as seen:
        here(method.__name__, *SHORT, out=tmp_path)
    assert seen.value.args == (pytest.approx(3e-4 if method is mona else 3e-3), 0.7)


def test_options_of_the_distance_reach_it(tmp_path, monkeypatch):
    def stop(u_s, y_s, *options):
        raise Seen(len(u_s), *options)

    monkeypatch.setattr(orca, "make_distance", stop)
    monkeypatch.setattr(common, "OtddTerms", stop)
    few = [*SHORT, "--reg", 0.3, "--source-samples", 50]
    with pytest.raises(Seen) as seen:
        here("orca", *few, "--objective", "otdd-gaussian", out=tmp_path)
    assert seen.value.args == (50, "otdd-gaussian", "gaussian", 0.3)
    with pytest.raises(Seen) as seen:
        here("recraft", *few, out=tmp_path)
    assert seen.value.args == (50, "none", 0.3)
