"""Fields: coordinates, names and counts in a file match the task; otherwise a note is printed or the file is refused."""

import h5py
import numpy as np
import pytest
from scipy.io import savemat

import cli
import data
from tasks import fields, pde

RNG = np.random.default_rng(0)
CELLS = (np.arange(1024) + 0.5) / 1024


def open_file(**arrays):
    """An HDF5 file in memory."""
    h5 = h5py.File.in_memory()
    for name, array in arrays.items():
        h5[name] = array
    return h5


def coordinates(file):
    """The coordinates of an official file: cell centres; times, in files of one array a field one more than snapshots."""
    step, axes, (low, high) = fields.GRIDS[file]
    mult = file.endswith(".h5")
    names = "0000/grid/{}" if mult else "{}-coordinate"
    space = low + (high - low) * (CELLS if axes == "x" else (np.arange(128) + 0.5) / 128)
    found = {names.format(axis): np.float32(space) for axis in axes}
    if step is not None:
        found[names.format("t")] = np.float32(np.arange(101 if mult else 202) * step)
    return found


def check(tmp_path, file, snapshots=(0, 100), **changes):
    fields.check_grid(tmp_path / file, open_file(**(coordinates(file) | changes)), snapshots)


@pytest.mark.parametrize("file", fields.GRIDS)
def test_right_coordinates_are_read_without_a_word(tmp_path, capsys, file):
    check(tmp_path, file)
    assert capsys.readouterr().out == ""


def test_every_pde_task_has_a_grid_that_is_the_one_it_is_simulated_on():
    files = {name: data.TASKS[name].read.keywords["file"] for name in pde.SETS if name != "darcy"}
    assert set(files.values()) == set(fields.GRIDS)
    for name, file in files.items():
        step, axes, _ = fields.GRIDS[file]
        assert len(axes) == pde.SETS[name].space and (step is None) == (name == "darcy2d")


def test_nodes_that_include_the_ends_are_right_too(tmp_path, capsys):
    check(tmp_path, fields.ADVECTION, **{"x-coordinate": np.linspace(0, 1, 1024)})
    assert capsys.readouterr().out == ""


TIMES = {
    "half the step": np.arange(402) * 0.005,
    "twice the step": np.arange(202) * 0.02,
    "shorter": np.arange(80) * 0.01,
    "empty": np.zeros(0),
    "later": 1 + np.arange(202) * 0.01,
    "not a number": np.full(202, np.nan),
}


@pytest.mark.parametrize("kind", TIMES)
def test_another_time_is_refused(tmp_path, kind):
    with pytest.raises(cli.UserError, match=r"snapshot (0|100) is at t = \S+ \(t-coordinate\); expected [01]\.\n") as error:
        check(tmp_path, fields.ADVECTION, **{"t-coordinate": TIMES[kind]})
    assert fields.ADVECTION in str(error.value)


def test_more_times_than_are_needed_are_right(tmp_path, capsys):
    check(tmp_path, fields.ADVECTION, **{"t-coordinate": np.arange(1000) * 0.01})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", fields.GRIDS)
@pytest.mark.parametrize("kind", ["shifted", "twice as wide", "empty"])
def test_another_domain_is_refused(tmp_path, file, kind):
    _, axes, (low, high) = fields.GRIDS[file]
    size = high - low
    space = {"shifted": low + 2 * size + size * CELLS, "twice as wide": low + 2 * size * CELLS, "empty": np.zeros(0)}[kind]
    name = next(name for name in coordinates(file) if name.endswith(axes[-1]) or name.startswith(axes[-1]))
    with pytest.raises(cli.UserError, match=f"the {axes[-1]}-coordinate goes from .*; expected"):
        check(tmp_path, file, **{name: space})


def test_the_earlier_domain_of_burgers_is_named_and_that_of_another_file_refused(tmp_path, capsys):
    check(tmp_path, fields.BURGERS, **{"x-coordinate": 2 * CELLS - 1})
    assert "EARLIER RELEASE" in (said := capsys.readouterr().out) and "before\n" in said and "October 2023" in said
    with pytest.raises(cli.UserError, match=r"x-coordinate goes from -0.999023 to 0.999023; expected \(0, 1\)"):
        check(tmp_path, fields.ADVECTION, **{"x-coordinate": 2 * CELLS - 1})


def test_missing_coordinates_are_named_and_the_others_checked(tmp_path, capsys):
    path = tmp_path / fields.ADVECTION
    fields.check_grid(path, open_file(tensor=np.zeros(3)), [0, 200])
    assert "has no t-coordinate and x-coordinate: its grid is not checked" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="snapshot 200 is at t = 4"):
        fields.check_grid(path, open_file(**{"t-coordinate": np.arange(202) * 0.02}), [0, 200])
    assert "has no x-coordinate" in capsys.readouterr().out


# ---- the speed of a wave


def waves(released):
    x, y = zip(*pde.simulate("advection1d", 40, 256, released=released), strict=True)
    return np.concatenate(x), np.concatenate(y)  # (40, 256) each


def test_the_speed_of_the_waves_is_told_from_the_snapshots(tmp_path, capsys):
    fields.check_speed("f", *waves(released=False))
    assert capsys.readouterr().out == ""
    fields.check_speed("f", *waves(released=True))
    assert "EARLIER RELEASE: the waves of f travel 0.60" in (said := capsys.readouterr().out) and "August 2023" in said
    x, _ = waves(released=False)
    fields.check_speed("f", x, np.roll(x, 51, 1))
    assert "ANOTHER SPEED: the waves of f travel 0.20" in capsys.readouterr().out


def write_advection(path, released=False):
    x, y = waves(released)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as h5:
        tensor = h5.create_dataset("tensor", (40, 201, 1024), "f4", chunks=(40, 1, 1024))
        tensor[:, 0], tensor[:, 200] = x.repeat(4, 1), y.repeat(4, 1)
        for name, array in coordinates(fields.ADVECTION).items():
            h5[name] = array


def test_pdebenchs_own_folders_are_found_and_an_earlier_release_is_named_every_time(tmp_path, capsys):
    path = tmp_path / "data/1D/Advection/Train" / fields.ADVECTION
    for released, write in ((False, True), (True, True), (True, False)):  # the third time from the kept arrays
        if write:
            write_advection(path, released)
        loaded = data.load("advection1d", tmp_path / "data", tmp_path / "cache", "full")
        assert loaded.train.kind == "official"
        said = capsys.readouterr().out
        assert ("EARLIER RELEASE" in said) == released and "grid" not in said


# ---- pairs and names


def write_darcy(path, version=5, **arrays):
    if version == 5:
        return savemat(path, arrays)
    with h5py.File(path, "w") as h5:
        for name, array in arrays.items():
            h5[name] = array.T


@pytest.mark.parametrize("version", [5, 7.3])
def test_darcy_files_without_as_many_solutions_as_coefficients_are_refused(tmp_path, version):
    path = tmp_path / "darcy.mat"
    a, u = RNG.random((2, 6, 421, 421), np.float32)
    write_darcy(path, version, coeff=a, sol=u)
    pairs = fields.darcy_pairs(path, 4)
    assert np.array_equal(pairs[0], a[:4, ::5, ::5]) and np.array_equal(pairs[1], u[:4, ::5, ::5])
    for have in (5, 4):  # 4: the first four pairs cannot be trusted either
        write_darcy(path, version, coeff=a, sol=u[-have:])
        with pytest.raises(cli.UserError, match=rf"darcy.mat has 6 coefficients \(coeff\) and {have} solutions"):
            fields.darcy_pairs(path, 4)
    write_darcy(path, version, coeff=a, sol=u[:, ::2])
    with pytest.raises(cli.UserError, match=r"darcy.mat.* holds \(6, 43, 85\); expected"):
        fields.darcy_pairs(path, 4)
    write_darcy(path, version, a=a[:1], u=u[:1])
    with pytest.raises(cli.UserError, match=r"darcy.mat has the arrays \['a', 'u'\]; expected coeff"):
        fields.darcy_pairs(path, 4)
    write_darcy(path, version, coeff=a[0], sol=u[0])
    with pytest.raises(cli.UserError, match=r"darcy.mat.* holds \(85, 85\); expected"):
        fields.darcy_pairs(path, 4)


def test_a_darcy_file_with_a_value_that_is_no_number_is_refused(tmp_path):
    for part in ("smooth1", "smooth2"):
        a, u = RNG.random((2, 4, 421, 421), np.float32)
        u[1, 100, 100] = np.nan if part == "smooth2" else 1
        write_darcy(tmp_path / f"piececonst_r421_N1024_{part}.mat", coeff=a, sol=u)
    with pytest.raises(cli.UserError, match=r"darcy.*sample 1 has nan"):
        data.load("darcy", tmp_path, tmp_path / "cache", "full")


def test_pde_files_without_as_many_targets_as_inputs_are_refused(tmp_path):
    with h5py.File(tmp_path / "2D_DarcyFlow_beta0.1_Train.hdf5", "w") as h5:
        h5["nu"], h5["tensor"] = np.zeros((20, 128, 128), np.float32), np.zeros((19, 1, 128, 128), np.float32)
    with pytest.raises(cli.UserError, match="has 20 inputs and 19 targets"):
        data.load("darcy2d", tmp_path, tmp_path / "cache", "full")
