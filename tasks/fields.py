"""Fields: the readers of darcy, psicov, cosmic and PDEBench, and simulated data for PDE tasks whose files are missing.

A reader takes (data_dir, cache) and returns (x, y) of training, (x, y) of test, the origin of the data and, for some tasks,
the fields of Task that the files determine. Shapes: n samples, C channels, H W L sizes, m residues.
"""

import functools
from pathlib import Path

import numpy as np

from cli import Missing, UserError
from tasks.files import (
    DOWNLOADS,
    check,
    check_shape,
    kept,
    kept_of_file,
    locate,
    of_files,
    read_npy,
    read_text,
    reading,
    unpickle,
    unpickle_entries,
)  # fmt: skip
from tasks.scores import relative_l2, score_of


def check_name(path, names, name):
    """Raises UserError if an array that is needed is not among those of a file."""
    if name not in names:
        raise UserError(f"{path} has the arrays {sorted(names)}; expected {name}.")


def read_mat(path, name, every):
    """Every `every`-th point of an array (n, H, W) in a MATLAB file of any version, as float32 (n, H / every, W / every)."""
    import h5py
    from scipy.io import loadmat, whosmat

    with reading(path, "MATLAB file"):
        if h5py.is_hdf5(path):  # version 7.3, whose axes are reversed
            with h5py.File(path) as file:
                check_name(path, file, name)
                return np.float32(file[name][::every, ::every].T)
        check_name(path, [name for name, _, _ in whosmat(path)], name)
        return np.float32(loadmat(path, variable_names=[name])[name][..., ::every, ::every])


def read_darcy(data_dir, cache):
    """Flow through a porous medium: coefficient a, x and y (n, 3, 85, 85) -> pressure (n, 85, 85), every fifth point of 421.

    The coefficient is normalised pixel by pixel by mean and standard deviation (+ 1e-5) over the training set. Predictions are
    normalised by those of the pressure; loss and metric undo this, so y stays in its own units.
    """
    splits = []
    for name, n in (("smooth1", 1000), ("smooth2", 100)):
        path = locate(data_dir, f"piececonst_r421_N1024_{name}.mat")
        splits.append(kept_of_file(cache, f"darcy-{name}", path, functools.partial(darcy_pairs, path, n), n))
    train, test, changes = darcy_fields(*splits)
    return train, test, "official", changes


def darcy_pairs(path, n):
    """The first n coefficients and their solutions, (n, 85, 85) each. Raises UserError if the two counts differ."""
    a, u = (check_shape(path, read_mat(path, name, 5), (None, 85, 85)) for name in ("coeff", "sol"))
    if len(a) != len(u):
        raise UserError(f"{path} has {len(a)} coefficients (coeff) and {len(u)} solutions (sol); expected equally many.")
    return a[:n], u[:n]


def darcy_fields(train, test):
    """Raw fields (n, 85, 85) -> what `read_darcy` returns, except for the origin."""
    (a, u), (a_test, u_test) = train, test
    mean, std = a.mean(0), a.std(0, ddof=1) + 1e-5  # (85, 85)
    statistics = {"mean": mean, "std": std, "mean_y": u.mean(0), "std_y": u.std(0, ddof=1) + 1e-5}
    x, x_test = (darcy_channels(part, mean, std) for part in (a, a_test))
    return (x, u), (x_test, u_test), {"statistics": statistics, **of_darcy_training(statistics)}


def darcy_channels(a, mean, std):
    """The coefficient, normalised pixel by pixel, and its coordinates: (n, 85, 85) -> (n, 3, 85, 85)"""
    y, x = np.meshgrid(*2 * [np.linspace(0, 1, a.shape[1], dtype=np.float32)], indexing="ij")  # x grows along the columns
    return np.stack([(a - mean) / std, *(np.broadcast_to(grid, a.shape) for grid in (x, y))], axis=1)


def of_darcy_training(statistics):
    """The fields of Task set by the statistics (85, 85) of darcy's training data. New coefficients are (n, 1, 85, 85)."""
    mean, std, mean_y, std_y = (np.float32(statistics[k]) for k in ("mean", "std", "mean_y", "std_y"))
    loss = functools.partial(relative_l2, mean=mean_y, std=std_y)

    def prepare(where, a):
        return darcy_channels(check(where, a, (1, *mean.shape))[:, 0], mean, std)  # (n, 1, 85, 85) -> (n, 3, 85, 85)

    return {"loss": loss, "score": score_of(loss), "prepare": prepare, "restore": lambda out: out * std_y + mean_y}


PAD, SIDE, FAR = 5, 512, 16.0  # psicov: margin and side of the maps in residues, largest distance told apart in Angstrom


def read_psicov(data_dir, cache):
    """Distances between the residues of a protein: 57 pair features (57, 512, 512) -> Angstrom (512, 512), read lazily.

    Trained on DeepCov, tested on PSICOV. Distances are clipped to 1..16 A, and are 16 A outside of the protein; the score uses
    true distances up to 8 A only. Proteins of more than 507 residues are truncated.
    """

    def features(path):
        names = ("ss", "pssm", "sa", "entropy", "ccmpred", "freecon", "potential")
        ss, pssm, sa, entropy, *pairs = unpickle_entries(path, *names)
        with reading(path, "set of protein features"):
            each, m = np.concatenate([ss, np.transpose(pssm), [sa], [entropy]]), len(entropy)  # (3 + 22 + 1 + 1, m)
            if wrong := [np.shape(pair) for pair in pairs if np.shape(pair) != (m, m)]:
                raise ValueError(f"a pair feature {wrong[0]} of {m} residues")
            each, n = each[:, : SIDE - PAD], min(m, SIDE - PAD)  # (27, n): the end of a long protein is cut off
            x = np.zeros((57, SIDE, SIDE), np.float32)
            inside = x[:, PAD : PAD + n, PAD : PAD + n]  # (57, n, n), filled in place: copies would take most of the time
            inside[0:54:2], inside[1:54:2] = each[:, None], each[:, :, None]  # the value of residue j in column j, in row j
            for i, pair in enumerate(pairs):
                inside[54 + i] = np.asarray(pair)[: SIDE - PAD, : SIDE - PAD]
            np.copyto(inside, 0, where=np.isnan(inside))  # infinities are refused later
        return x

    residues = functools.cache(lambda path: len(unpickle_entries(path, "entropy")[0]))

    def distances(paths):
        path, of_features = paths
        content, wanted = unpickle(path), residues(of_features)
        with reading(path, "distance map"):
            d = np.asarray(content[2], np.float32)
            m, n = len(d), min(len(d), SIDE - PAD)
            if m != wanted:
                raise ValueError(f"{m} residues, {wanted} in {of_features.name}")
            padded = np.pad(d, ((0, 0), (1, 1)), constant_values=np.nan)  # (m, m + 2)
            i = np.arange(m)
            neighbours = [padded[i, i], padded[i, i + 2]]  # left and right of the diagonal; the first and last have one
            d = d.copy()
            d[i, i] = np.nanmean(neighbours, axis=0)
            y = np.full((SIDE, SIDE), FAR, np.float32)
            y[PAD : PAD + n, PAD : PAD + n] = np.nan_to_num(d, nan=FAR)[:n, :n].clip(1, FAR)
        return y

    splits = []
    for name in ("deepcov", "psicov"):
        path = locate(data_dir, f"{name}.lst")
        proteins, folder = read_text(path).split(), path.parent / name
        x, y = [folder / "features" / f"{p}.pkl" for p in proteins], [folder / "distance" / f"{p}-cb.npy" for p in proteins]
        if missing := [p for p in x + y if not p.exists()]:
            raise Missing(f"no {missing[0]} ({len(missing)} of the files that {path} names).")
        y = list(zip(y, x, strict=True))
        splits.append((of_files(features, x), of_files(distances, y)))
    return *splits, "official"


# proposal_visit of the extragalactic fields taken through the filter f435w
GALAXIES = {
    "10182_pb", "10182_pd", "10190_13", "10190_28", "10260_5", "10260_7", "10342_3", "10407_3", "10584_13", "10760_2",
    "10760_4", "12058_1", "12058_12", "12058_16", "12058_6", "12513_2", "12513_3", "13057_1", "13364_95", "13691_11",
    "13737_2", "13737_3", "13804_6", "14343_1", "14704_1", "9490_a2", "9490_a3",
}  # fmt: skip


def read_cosmic(data_dir, cache):
    """Hits of cosmic rays in Hubble pictures: x (n, 1, 129, 128) raw counts, y (n, 128, 128) 1, 0, or NaN: ignored pixels.

    The middle 128 x 128 of each tile; row 128 holds the exposure's sky level, which `add_sky` uses.
    """
    splits = []
    for name in ("train", "test"):
        root, x, y = locate(data_dir, f"npy_{name}"), [], []
        if (archive := Path(data_dir) / DOWNLOADS[f"cosmic_{name}"].file).exists():  # it is removed once all of it is unpacked
            again = f"Repeat `python data.py --prepare cosmic --data-dir {data_dir}`, or remove the archive."
            raise UserError(f"{root} may be incomplete: {archive} is still there.\n{again}")
        for sky_file in sorted(root.glob("f435w/**/sky.npy")):
            folder = sky_file.parent
            if not {folder.name, f"{folder.parent.name}_{folder.name}"} & GALAXIES:
                continue
            sky = read_npy(sky_file, (None,))
            for path in sorted(folder.glob("[0-9]*_*.npy")):
                with reading(path, "tile"):
                    tile = np.load(path, mmap_mode="r")[:, 64:192, 64:192]  # (2 or 3, 128, 128)
                    number = int(path.name.split("_")[0])
                    if not 0 < number <= len(sky):
                        raise ValueError(f"exposure {number} of {len(sky)}")
                    level = sky[number - 1]
                    x.append(np.pad(np.float32(tile[:1]), ((0, 0), (0, 1), (0, 0)), constant_values=level))  # (1, 129, 128)
                    if np.isnan(tile[1]).any():
                        raise ValueError("NaN in its mask")
                    counts = tile[2] == 0 if len(tile) > 2 else True
                    y.append(np.float32(np.where(counts, tile[1] > 0, np.nan)))  # (128, 128)
                check_shape(path, x[-1], (1, 129, 128))
        if not x:
            raise Missing(f"no tiles of the 27 galaxy fields in {root / 'f435w'}.")
        splits.append((np.stack(x), np.stack(y)))
    return *splits, "official"


def add_sky(x, u):
    """Counts + s t, s the exposure's sky level in the last row, t uniform in [-0.9, 3]; without draws its mean, 1.05.

    x (B, 1, 129, 128) -> (B, 1, 128, 128)
    """
    t = -0.9 + 3.9 * (0.5 if u is None else u[:, :1, None, None])
    return x[:, :, :-1] + t * x[:, :, -1:]


ADVECTION, BURGERS = "1D_Advection_Sols_beta0.4.hdf5", "1D_Burgers_Sols_Nu1.0.hdf5"
GRIDS = {  # PDEBench file -> time between two snapshots (None: no time), axes of space, ends of the domain
    ADVECTION: (0.01, "x", (0, 1)),
    BURGERS: (0.01, "x", (0, 1)),
    "ReacDiff_Nu0.5_Rho1.0.hdf5": (0.01, "x", (0, 1)),
    "1D_diff-sorp_NA_NA.h5": (5, "x", (0, 1)),
    "1D_CFD_Rand_Eta0.1_Zeta0.1_periodic_Train.hdf5": (0.01, "x", (-1, 1)),
    "2D_DarcyFlow_beta0.1_Train.hdf5": (None, "xy", (0, 1)),
    "2D_rdb_NA_NA.h5": (0.01, "xy", (-2.5, 2.5)),
    "2D_diff-react_NA_NA.h5": (0.05, "xy", (-1, 1)),
}
CURRENT = "PDEBench's current file is at https://doi.org/10.18419/darus-2986."


def check_grid(path, h5, snapshots):
    """Compare the coordinates in a PDEBench file with GRIDS: the times of these `snapshots`, and the ends of the domain.

    A note is printed for a file without coordinates (copies of the official files often lack them) and for the earlier release
    of Burgers, which ORCA used; both are accepted. Raises UserError if coordinates contradict the task.
    """
    step, axes, ends = GRIDS[path.name]
    sample = next(iter(h5), "")  # the first, in a file of one group a sample
    names = {axis: [f"{axis}-coordinate", f"{sample}/grid/{axis}"] for axis in "t" * (step is not None) + axes}
    have = {axis: np.ravel(h5[name]) for axis, both in names.items() for name in both if name in h5}
    if missing := sorted(names.keys() - have.keys()):
        print(f"{path} has no {' and '.join(f'{axis}-coordinate' for axis in missing)}: its grid is not checked.")
    if "t" in have:
        t = have.pop("t")  # files with one array per field have one time more than snapshots
        for i in snapshots:
            time = t[i] if i < len(t) else np.nan
            if not abs(time - i * step) < step / 10:
                raise UserError(f"{path}: snapshot {i} is at t = {time:g} (t-coordinate); expected {i * step:g}.\n{CURRENT}")
    for axis, x in have.items():
        if path.name == BURGERS and spans(x, -1, 1):
            print(
                f"EARLIER RELEASE: the x-coordinate of {path} goes from -1 to 1, as in PDEBench's files from before\n"
                f"                 October 2023, where the flux is doubled. ORCA used such a file. {CURRENT}"
            )
        elif not spans(x, *ends):
            low, high = (x[0], x[-1]) if len(x) else (np.nan, np.nan)
            raise UserError(f"{path}: the {axis}-coordinate goes from {low:g} to {high:g}; expected {ends}.\n{CURRENT}")


def spans(x, low, high):
    """Whether the cell centres or nodes x (L,) cover [low, high]: the outermost are at most one cell away from the ends."""
    return len(x) > 0 and max(abs(x[0] - low), abs(x[-1] - high)) <= 1.01 * (high - low) / len(x)


def check_speed(path, x, y):
    """Print if the waves of an advection file, x (n, L) at t = 0 and y (n, L) at t = 2, have another speed than 0.4.

    Until t = 2 they travel 0.8 of the periodic domain, by which x is compared with y; in the release from before August 2023,
    which ORCA used, the speed is twice as high, and they travel 0.6 (and once around).
    """
    points = x.shape[1]
    x, y = (np.fft.rfft(u[:500] - u[:500].mean(1, keepdims=True)) for u in (x, y))  # (n, L / 2 + 1)
    match = np.fft.irfft(x.conj() * y, points).mean(0)  # (L,) covariance of x, moved by so many points, and y
    expected, earlier = (match[round(share * points) % points] >= 0.9 * match.max() for share in (0.8, 0.6))
    if not expected:
        travel = f"the waves of {path} travel {match.argmax() / points:.2f} of the domain until t = 2, not 0.80"
        if earlier:
            print(
                f"EARLIER RELEASE: {travel}: twice the speed, as in\n"
                f"                 PDEBench's files from before August 2023. ORCA used such a file. {CURRENT}"
            )
        else:
            print(f"ANOTHER SPEED: {travel} as at the speed of 0.4.\n               {CURRENT}")


def read_pde(data_dir, cache, file, x, y, y_test=None, every=1, normalise=False):
    """The first and one later snapshot of a PDEBench file, and nothing else of it: x (n, 1, ...), y (n, 1, L) or (n, H, W).

    Args:
        x, y: fields as (name of the array, number of the snapshot), several are laid end to end. With "data", which lies in
            one group a sample: ("data", snapshot, channel). Arrays without time: snapshot None.
        y_test: the targets of the test set if they are others, as in the official code.
        every: 4 keeps each fourth point of space.
        normalise: by mean and standard deviation (+ 1e-5) of the training inputs at each point, inputs and targets alike.
    Layouts: one array a field (samples, time, space): the first tenth is the test set. One group a sample, (time, space,
    channels): the last tenth.
    """
    import h5py

    path = locate(data_dir, file)

    def snapshot(h5, array, time, channel=None):
        if channel is None:
            check_name(path, h5, array)
            source, rows = h5[array], range(0, len(h5[array]), 256)
            if time is not None and source.shape[1] <= time:
                raise UserError(f"{path}: {array} has {source.shape[1]} snapshots; expected more than {time}.")
            field = np.concatenate([source[i : i + 256] if time is None else source[i : i + 256, time] for i in rows])
        else:
            field = np.stack([h5[group][array][time, ..., channel] for group in sorted(h5)])
        space = (slice(None, None, every),) * (field.ndim - 1)
        return np.float32(field[:, *space])

    def parts(n):
        tenth = n // 10
        return (slice(-tenth, None), slice(-tenth)) if len(x[0]) == 3 else (slice(tenth), slice(tenth, None))

    def make():
        with reading(path, "HDF5 file"), h5py.File(path) as h5:
            both = [np.concatenate([snapshot(h5, *f) for f in fields], axis=-1) for fields in (x, y)]
            if y_test:
                test, _ = parts(len(both[1]))
                both[1][test] = np.concatenate([snapshot(h5, *f) for f in y_test], axis=-1)[test]
            if len(both[0]) != len(both[1]):
                raise UserError(f"{path} has {len(both[0])} inputs and {len(both[1])} targets; expected equally many.")
            return both

    with reading(path, "HDF5 file"), h5py.File(path) as h5:
        check_grid(path, h5, sorted({time for _, time, *_ in (*x, *y, *(y_test or []))} - {None}))

    x_all, y_all = kept_of_file(cache, Path(file).stem + "-released" * bool(y_test), path, make, x, y, y_test, every)
    if len(x_all) < 10:
        raise UserError(f"{path} has {len(x_all)} samples; ten are needed for a training and a test set.")
    if file == ADVECTION:
        check_speed(path, x_all, y_all)
    test, train = parts(len(x_all))
    train, test, changes = pde_fields((x_all[train], y_all[train]), (x_all[test], y_all[test]), normalise)
    return train, test, "official", changes


def pde_fields(train, test, normalise=False):
    """Raw fields (n, L) or (n, H, W) -> x (n, 1, ...), y (n, 1, L) or (n, H, W) of training and test set; the changes."""
    changes = {}
    if normalise:
        mean, std = train[0].mean(0), train[0].std(0, ddof=1) + 1e-5
        train, test = (tuple((part - mean) / std for part in split) for split in (train, test))
        statistics = {"mean": mean, "std": std}
        changes = {"statistics": statistics, **of_normalised_training(statistics)}
    train, test = ((x[:, None], y[:, None] if y.ndim == 2 else y) for x, y in (train, test))
    return train, test, changes


def of_normalised_training(statistics):
    """The fields of Task set by the statistics (L,) of a normalised 1D task's training inputs. New fields are (n, 1, L)."""
    mean, std = (np.float32(statistics[k]) for k in ("mean", "std"))

    def prepare(where, x):
        return (check(where, x, (1, *mean.shape)) - mean) / std  # (n, 1, L)

    return {"prepare": prepare, "restore": lambda out: out * std + mean}


TRAIN, TEST, TOKENS = 1000, 200, 64  # simulated at the tiny scale: samples for training and test, tokens of 1D fields, at most


def simulate(name, finish, cache, scale, n_train, as_released, device, tokens=512):
    """Training and test set of a PDE task, solved by pde.py and kept under `cache` as two float32 arrays each.

    Full scale: as many solutions as the official files have. Tiny: a coarser grid (the task's shape changes), at most 1000 for
    training and validation and 200 for test; if n_train asks for fewer, only as many are solved, and no more for test.

    Args:
        name: of pde.SETS.
        finish: raw fields -> prepared ones and the fields of Task that they determine; the same as for the official files.
        tokens: 1D: the task's; the tiny scale cuts its shorter sequences into fewer.
    Returns: as a task's `read`. A run that is killed meanwhile loses the set that it was solving.
    """
    from tqdm import tqdm

    from tasks import pde

    of = pde.SETS[name]
    counts, n, every = dict(zip(("train", "test"), of.samples, strict=True)), of.n, of.every
    if scale == "tiny":
        n, every = of.tiny, 1
        train = min(TRAIN, counts["train"], n_train + n_train // 9 + 1 if n_train else TRAIN)
        counts = {"train": train, "test": min(TEST, counts["test"], train)}

    def make(split):
        pieces, bar = [], tqdm(total=counts[split], desc=f"{name}, {split}", unit="solution", leave=False)
        for piece in pde.simulate(name, counts[split], n, every, split == "test", as_released, device):
            pieces.append(piece)
            bar.update(len(piece[0]))
        bar.close()
        return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]

    splits = []
    for split, count in counts.items():
        key = f"{name}-{split}-{count}-of-{n}-cells{'-released' * as_released}-v{pde.VERSION}"
        what = f"solving {name}: {count:,} samples on {n} cells for {split}"
        splits.append(kept(cache, key, what, functools.partial(make, split)))
    train, test, changes = finish(*splits)
    changes |= {"shape": train[0].shape[1:], "output": train[1].shape[1:]}
    if scale == "tiny":
        changes["tokens"] = min(tokens, TOKENS)
    return train, test, "simulated", changes
