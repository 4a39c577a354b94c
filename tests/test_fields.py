"""Fields: darcy, psicov, cosmic and PDEBench from their official files, whole and damaged, and simulated PDE data."""

import math
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch
from official import MULT, SINGLE, dev, full, write_cosmic, write_darcy, write_pde, write_psicov

import cli
import data
from tasks import fields, files, pde

# ---- darcy


@pytest.mark.parametrize("version", [5, 7.3])
def test_darcy_is_every_fifth_point_normalised_by_training_pixels(tmp_path, version):
    raw, raw_test = write_darcy(tmp_path, version)
    loaded = full("darcy", tmp_path)
    x, y = dev(loaded)
    assert x.shape == (12, 3, 85, 85) and y.shape == (12, 85, 85) and len(loaded.test) == 3
    coefficient = raw["coeff"][:, ::5, ::5]
    i, j = 40, 84
    mean, std = coefficient[:, i, j].mean(), math.sqrt(((coefficient[:, i, j] - coefficient[:, i, j].mean()) ** 2).sum() / 11)
    assert np.allclose(x[:, 0, i, j], (coefficient[:, i, j] - mean) / (std + 1e-5), atol=1e-4)
    test = loaded.test.inputs(torch.arange(3))
    assert np.allclose(test[:, 0, i, j], (raw_test["coeff"][:, 200, 420] - mean) / (std + 1e-5), atol=1e-4)
    assert np.allclose(x[0, 1, 3], np.linspace(0, 1, 85)) and np.allclose(x[0, 2, :, 3], np.linspace(0, 1, 85))
    assert np.allclose(y, raw["sol"][:, ::5, ::5], atol=1e-7)
    u = raw["sol"][:, ::5, ::5]
    perfect = (torch.from_numpy((u - u.mean(0)) / (u.std(0, ddof=1) + 1e-5))).float()
    assert loaded.task.loss(perfect, torch.from_numpy(y)) < 1e-3  # the loss undoes the normalisation
    zero = np.zeros_like(y)
    expected = np.mean([np.linalg.norm(u.mean(0) - v) / np.linalg.norm(v) for v in u])
    assert loaded.task.score(zero, y) == pytest.approx(expected, rel=1e-4)
    cached = sorted(p.name for p in (tmp_path / "cache").iterdir())
    full("darcy", tmp_path)
    assert cached == sorted(p.name for p in (tmp_path / "cache").iterdir()) and len(cached) == 4


def test_half_a_mat_file_is_named(tmp_path):
    write_darcy(tmp_path, 5, n=(1, 1))
    path = tmp_path / "piececonst_r421_N1024_smooth1.mat"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(cli.UserError, match="smooth1.mat is not a readable MATLAB file"):
        full("darcy", tmp_path)


# ---- psicov


def test_psicov_pairs_features_of_rows_and_columns(tmp_path):
    raw = write_psicov(tmp_path)
    loaded = full("psicov", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test), loaded.test.chunk) == (3, 3, 1)
    seen = [split.targets(torch.arange(len(split))).numpy() for split in (loaded.train, loaded.val)]
    there = [np.clip(raw[f"deepcov{m}"][1][7, 31], 1, 16) for m in (40, 520, 60)]  # not those of psicov, the test set
    assert sorted(np.concatenate(seen)[:, 12, 36]) == pytest.approx(sorted(there))
    x, y = loaded.test.inputs(torch.tensor([0]))[0].numpy(), loaded.test.targets(torch.tensor([0]))[0].numpy()
    f, d = raw["psicov40"]
    assert x.shape == (57, 512, 512) and y.shape == (512, 512)
    i, j = 7, 31
    for row, column, value in ((i, j, f["ss"][1, j]), (j, i, f["ss"][1, i])):
        assert x[2, row + 5, column + 5] == pytest.approx(value)  # channel 2: the second structure, by column
        assert x[3, column + 5, row + 5] == pytest.approx(value)  # channel 3: the same, by row
    assert x[6 + 2 * 21 + 1, i + 5, j + 5] == pytest.approx(f["pssm"][i, 21])
    assert x[51, i + 5, j + 5] == pytest.approx(f["sa"][i]) and x[52, i + 5, j + 5] == pytest.approx(f["entropy"][j])
    assert [x[c, i + 5, j + 5] for c in (54, 55, 56)] == pytest.approx(
        [f[n][i, j] for n in ("ccmpred", "freecon", "potential")]
    )
    assert (x[:, :5] == 0).all() and (x[:, 45:] == 0).all() and (y[:, :5] == 16).all() and (y[45:] == 16).all()
    assert y[i + 5, j + 5] == pytest.approx(min(max(d[i, j], 1), 16))
    assert y[i + 5, i + 5] == pytest.approx(np.clip((d[i, i - 1] + d[i, i + 1]) / 2, 1, 16))
    assert y[5, 5] == pytest.approx(np.clip(d[0, 1], 1, 16)) and y[44, 44] == pytest.approx(np.clip(d[39, 38], 1, 16))
    long = loaded.test.targets(torch.tensor([1]))[0]
    assert long[511, 100] == pytest.approx(np.clip(raw["psicov520"][1][506, 95], 1, 16))


def test_an_unknown_distance_between_residues_is_no_contact(tmp_path):
    raw = write_psicov(tmp_path, lengths=(40, 60))
    triple = np.empty(3, object)
    triple[:] = [40, "A" * 40, raw["psicov40"][1]]
    triple[2][3, 30] = np.nan
    np.save(tmp_path / "protein/psicov/distance/psicov40-cb.npy", triple, allow_pickle=True)
    y = full("psicov", tmp_path).test.targets(torch.arange(1))[0]
    assert y[5 + 3, 5 + 30] == 16


def test_damaged_proteins_are_named(tmp_path):
    write_psicov(tmp_path, lengths=(30, 31))
    path = tmp_path / "protein/psicov/features/psicov30.pkl"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(cli.UserError, match="psicov30.pkl is not a readable pickle"):
        full("psicov", tmp_path).test.inputs(torch.tensor([0]))
    path.unlink()
    with pytest.raises(cli.Missing, match=r"psicov30.pkl \(1 of the files"):
        full("psicov", tmp_path)


def test_proteins_whose_files_do_not_agree_are_named(tmp_path):
    write_psicov(tmp_path, lengths=(30, 31))
    folder = tmp_path / "protein/psicov"
    path = folder / "features/psicov31.pkl"
    content = pickle.loads(path.read_bytes())
    broken = content | {"potential": np.zeros((1, 31))}
    path.write_bytes(pickle.dumps(broken))
    with pytest.raises(cli.UserError, match=r"psicov31.pkl is not a readable set .*a pair feature \(1, 31\) of 31 residues"):
        full("psicov", tmp_path).test.inputs(torch.tensor([1]))
    content["entropy"][4] = -np.inf
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(cli.UserError, match="psicov, test set: x: sample 1 has -inf"):
        full("psicov", tmp_path).test.inputs(torch.tensor([1]))
    shutil.copy(folder / "distance/psicov31-cb.npy", folder / "distance/psicov30-cb.npy")
    with pytest.raises(cli.UserError, match="psicov30-cb.npy is not a readable distance map .31 residues, 30 in psicov30.pkl"):
        full("psicov", tmp_path).test.targets(torch.tensor([0]))


# ---- cosmic


@pytest.mark.parametrize("planes", [2, 3])
def test_cosmic_takes_galaxy_fields_their_middle_and_the_sky(tmp_path, planes):
    tiles = write_cosmic(tmp_path, planes)
    loaded = full("cosmic", tmp_path)
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (4, 2)
    tile, middle = tiles["test", "10760/2", "2_1"], (slice(64, 192), slice(64, 192))
    x, y = loaded.test.inputs(torch.tensor([1])), loaded.test.targets(torch.tensor([1]))
    assert x.shape == (1, 1, 128, 128) and np.allclose(x[0, 0], tile[0][middle] + 1.05 * 20, atol=1e-3)
    u = torch.full((1, 5), 1 / 3.9)
    assert np.allclose(loaded.test.inputs(torch.tensor([1]), u)[0, 0], tile[0][middle] + 0.1 * 20, atol=1e-3)
    ignored = tile[2][middle] > 0 if planes == 3 else np.zeros((128, 128), bool)
    assert np.array_equal(y[0].isnan(), ignored) and np.array_equal(y[0][~ignored], tile[1][middle][~ignored])


def test_damaged_tiles_are_named(tmp_path):
    write_cosmic(tmp_path)
    path = tmp_path / "npy_train/f435w/10760/2/1_0.npy"
    np.save(path, np.zeros((3, 100, 100)))
    with pytest.raises(cli.UserError, match=r"1_0.npy holds \(1, 37, 36\)"):
        full("cosmic", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(cli.UserError, match="1_0.npy is not a readable tile"):
        full("cosmic", tmp_path)
    tile = np.zeros((3, 256, 256))
    tile[1, 128, 128] = np.nan
    np.save(path, tile)
    with pytest.raises(cli.UserError, match="1_0.npy is not a readable tile .NaN in its mask"):
        full("cosmic", tmp_path)


def test_tiles_beside_their_archive_may_be_incomplete(tmp_path):
    write_cosmic(tmp_path)
    archive = tmp_path / files.DOWNLOADS["cosmic_train"].file
    archive.parent.mkdir(exist_ok=True)
    archive.touch()
    with pytest.raises(cli.UserError, match="train.tar is still there.\nRepeat `python data.py --prepare cosmic"):
        full("cosmic", tmp_path)


# ---- PDEBench


@pytest.mark.parametrize("task", SINGLE)
def test_pde_single_files_give_the_first_snapshot_and_the_right_later_one(tmp_path, task):
    write_pde(task, tmp_path)
    loaded = full(task, tmp_path)
    arrays, (_, points), last, kept = SINGLE[task]
    assert (len(loaded.train) + len(loaded.val), len(loaded.test)) == (18, 2)
    x, y = dev(loaded)
    assert x.shape == y.shape == (18, 1, kept)
    samples = np.arange(2, 20)  # the first tenth is the test set
    each = np.concatenate([0.25 * i + np.arange(0, points, points * len(arrays) // kept) / 8192 for i in range(len(arrays))])
    x_raw, y_raw = (1000.0 * samples[:, None] + time + each for time in (0, last))
    test_raw = 1000.0 * np.arange(2)[:, None] + last + each
    if task == "navier_stokes1d":  # targets, too, by the statistics of the training inputs
        mean, std = x_raw.mean(0), x_raw.std(0, ddof=1) + 1e-5
        x_raw, y_raw, test_raw = ((v - mean) / std for v in (x_raw, y_raw, test_raw))
    assert np.allclose(x[:, 0], x_raw, rtol=1e-5, atol=1e-4) and np.allclose(y[:, 0], y_raw, rtol=1e-5, atol=1e-4)
    assert np.allclose(loaded.test.y[:, 0], test_raw, rtol=1e-5, atol=1e-4)


def test_another_snapshot_or_grid_of_a_file_that_was_read_before_is_read_anew(tmp_path):
    write_pde("burgers1d", tmp_path)
    name = next(tmp_path.glob("*.hdf5")).name
    first, cache = [("tensor", 0)], tmp_path / "cache"
    read = lambda time, every: fields.read_pde(tmp_path, cache, name, first, [("tensor", time)], every=every)
    (x, y), (_, later), (coarse, _) = (read(time, every)[0] for time, every in ((10, 1), (11, 1), (10, 2)))
    assert np.allclose(later - y, 1) and coarse.shape[-1] == x.shape[-1] // 2


@pytest.mark.parametrize("task", MULT)
def test_pde_mult_files_have_one_target_time_in_training_and_test(tmp_path, task):
    write_pde(task, tmp_path)
    loaded = full(task, tmp_path)
    space, channel = MULT[task]
    x, y = dev(loaded)
    assert x.shape == (18, 1, *space[:-1]) and y.shape == ((18, *space[:-1]) if len(space) == 3 else (18, 1, *space[:-1]))
    assert (x.reshape(18, -1)[:, 5] == 1000 * np.arange(18)).all()  # the last tenth is the test set
    assert (y.reshape(18, -1)[:, 5] == 1000 * np.arange(18) + 100 + 0.5 * channel).all()
    assert (loaded.test.y.flatten(1)[:, 0].numpy() == 1000 * np.array([18, 19]) + 100 + 0.5 * channel).all()


@pytest.mark.parametrize("task", ["diffusion_reaction1d", *MULT])
def test_as_released_the_test_set_of_an_official_file_has_another_target_time(tmp_path, task):
    write_pde(task, tmp_path)
    ours, released = full(task, tmp_path), full(task, tmp_path, as_released=True)
    late = 99 - (29 if task == "diffusion_reaction1d" else 100)  # snapshots, each worth 1 in these files
    assert torch.allclose(released.test.y, ours.test.y + late) and torch.equal(released.test.x, ours.test.x)
    assert torch.equal(released.train.y, ours.train.y) and torch.equal(released.val.y, ours.val.y)


def test_darcy2d_predicts_the_solution_from_the_coefficient(tmp_path):
    path = write_pde("darcy2d", tmp_path)
    x, y = dev(full("darcy2d", tmp_path))
    with h5py.File(path) as file:
        assert np.array_equal(x[:, 0], file["nu"][2:, ::2, ::2]) and np.array_equal(y, file["tensor"][2:, 0, ::2, ::2])


def test_damaged_pde_files_are_named(tmp_path):
    path = write_pde("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.zeros((20, 20, 1024), np.float32)
    with pytest.raises(cli.UserError, match="tensor has 20 snapshots; expected more than 29"):
        full("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["u"] = np.zeros(3)
    with pytest.raises(cli.UserError, match=r"has the arrays \['u'\]; expected tensor"):
        full("diffusion_reaction1d", tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(cli.UserError, match="is not a readable HDF5 file"):
        full("diffusion_reaction1d", tmp_path)
    with h5py.File(path, "w") as file:
        file["tensor"] = np.zeros((20, 101, 512), np.float32)
    with pytest.raises(cli.UserError, match=r"x holds \(\d+, 1, 512\); expected \(\d+, 1, 1024\)"):
        full("diffusion_reaction1d", tmp_path)


# ---- simulated


@pytest.fixture
def few(monkeypatch):
    """Full scale with few samples."""
    for name, of in pde.SETS.items():
        monkeypatch.setitem(pde.SETS, name, data.replace(of, samples=(3, 1) if name == "darcy" else (12, 4)))


@pytest.mark.matrix
@pytest.mark.parametrize("name", pde.SETS)
def test_full_scale_simulates_the_benchmarks_shapes(name, few, tmp_path, capsys):
    loaded = data.load(name, tmp_path / "none", tmp_path / "cache", "full")
    task = data.TASKS[name]
    assert (loaded.task.shape, loaded.task.output, loaded.train.kind) == (task.shape, task.output, "simulated")
    assert len(loaded.train) + len(loaded.val) == (3 if name == "darcy" else 12) and len(loaded.test) == (
        1 if name == "darcy" else 4
    )
    assert "SIMULATED: no " in (said := capsys.readouterr().out) and "simulated data" in said
    x, y = next(loaded.train.batches(1, 2, 0, 0))
    assert x.shape == (2, *task.shape) and y.shape == (2, *task.output) and x.dtype == y.dtype == torch.float32
    if name == "navier_stokes1d":
        both = torch.cat([split.inputs(torch.arange(len(split))) for split in (loaded.train, loaded.val)])
        assert both.mean(0).abs().max() < 1e-3 and both.std(0).max() < 1.01  # normalised as the official files are


def test_the_tiny_scale_has_a_coarser_grid_and_as_many_samples_as_are_asked_for(tmp_path, capsys):
    loaded = data.load("burgers1d", tmp_path, tmp_path, "tiny")
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (900, 100, 200) and loaded.task.shape == (1, 256)
    few = data.load("burgers1d", tmp_path, tmp_path, "tiny", n_train=40)
    assert (len(few.train), len(few.test)) == (40, 45)
    for name, shape in {"darcy": (3, 85, 85), "advection1d": (1, 256), "darcy2d": (1, 64, 64)}.items():
        assert data.load(name, tmp_path, tmp_path, "tiny", n_train=9).task.shape == shape


def test_simulated_data_are_kept_and_another_version_or_option_is_solved_anew(tmp_path, monkeypatch, capsys):
    load = lambda **options: data.load("diffusion_reaction1d", tmp_path, tmp_path / "cache", "tiny", 20, **options)
    first = load()
    assert "solving diffusion_reaction1d: 23 samples on 256 cells for train, once" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 4
    solve = pde.simulate
    monkeypatch.setattr(pde, "simulate", None)
    again = load()
    assert torch.equal(first.train.x, again.train.x) and torch.equal(first.test.y, again.test.y)
    with pytest.raises(TypeError):
        load(as_released=True)
    monkeypatch.setattr(pde, "VERSION", pde.VERSION + 1)
    with pytest.raises(TypeError):
        load()
    monkeypatch.setattr(pde, "simulate", solve)
    released = load(as_released=True)
    assert torch.equal(first.train.y, released.train.y) and torch.equal(first.test.x, released.test.x)
    grown = 1 / (1 + (1 / first.test.y - 1) * math.exp(-0.7))  # almost uniform by 0.29: the logistic law
    assert torch.allclose(released.test.y, grown, atol=5e-3) and not torch.allclose(released.test.y, first.test.y, atol=5e-2)


def test_a_run_killed_while_it_simulates_leaves_nothing_behind(tmp_path, monkeypatch):
    solve = pde.simulate

    def killed(*args):
        yield next(solve(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(pde, "simulate", killed)
    with pytest.raises(KeyboardInterrupt):
        data.load("burgers1d", tmp_path, tmp_path / "cache", "tiny", 20)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(pde, "simulate", solve)
    assert len(data.load("burgers1d", tmp_path, tmp_path / "cache", "tiny", 20).train) == 20
