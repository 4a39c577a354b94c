"""Tables: any OpenML classification table, as scikit-learn downloads it. Shapes: n rows."""

import contextlib
import functools
import http.client
from pathlib import Path

import numpy as np

from cli import Missing, UserError
from tasks.files import reading
from tasks.scores import cross_entropy

SKLEARN_COPIES = {61: "load_iris", 187: "load_wine", 1510: "load_breast_cancer", 28: "load_digits"}
# iris: two values differ from OpenML's (samples 35 and 38); wine and wdbc: the same tables; optdigits: its test part, 1,797 of
# 5,620 rows


def fetch_table(number, data_dir, fetching=False):
    """Columns (rows, features) float with NaN, {number of a categorical column: how many categories}, labels (rows,).

    From what `fetch_openml` keeps in data_dir/openml. Raises Missing, unless `fetching`, if it has kept nothing there.
    """
    from sklearn.datasets import fetch_openml

    folder = Path(data_dir) / "openml"
    if not fetching and not (folder / f"openml.org/api/v1/json/data/{number}.gz").exists():
        raise Missing(f"no table {number} in {folder}.")
    with contextlib.nullcontext() if fetching else reading(folder, f"table {number} as scikit-learn keeps it"):
        table = fetch_openml(data_id=number, data_home=data_dir, as_frame=False, parser="liac-arff", n_retries=1)
    if table.target is None or table.target.ndim != 1 or not isinstance(table.data, np.ndarray):
        raise UserError(f"OpenML {number} has no single target column, or is sparse: not a classification table.")
    categories = {i: len(table.categories[name]) for i, name in enumerate(table.feature_names) if name in table.categories}
    return table.data.astype(np.float64), categories, table.target.astype(str)


def read_openml(data_dir, cache, number):
    """A classification table as a sequence of columns: x (n, channels, columns), standardised by the training rows.

    With categorical columns: each is one-hot (a missing value is a category of its own), the others follow with their value in
    channel 0, a missing one as 0 before scaling. Without: columns with missing values are left out, and all the others are the
    channels of a single position. A tenth of the rows, drawn by class, is the test set.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    try:
        (values, categories, labels), kind = fetch_table(number, data_dir), "official"
    except Missing:
        if number not in SKLEARN_COPIES:
            raise
        (values, labels), categories = getattr(datasets, SKLEARN_COPIES[number])(return_X_y=True), {}
        kind = "sklearn"
    known = np.array([label not in ("nan", "?", "None", "") for label in labels.astype(str)])
    values, (names, y) = values[known], np.unique(labels[known], return_inverse=True)
    rarest = np.bincount(y).min(initial=len(y))
    if len(names) < 2 or rarest < 2 or len(y) < 10 * len(names):
        raise UserError(
            f"OpenML {number}: {len(y)} rows, {len(names)} classes, the rarest with {rarest}: too few for a test set."
        )
    train, test = train_test_split(np.arange(len(y)), test_size=0.1, random_state=0, stratify=y)
    numeric = [i for i in range(values.shape[1]) if i not in categories]
    if not categories:
        numeric = [i for i in numeric if not np.isnan(values[:, i]).any()]
    numbers = np.nan_to_num(values[:, numeric])  # (n, numeric columns)
    mean, std = numbers[train].mean(0), numbers[train].std(0)
    numbers = (numbers - mean) / np.where(std > 0, std, 1)
    if categories:
        x = np.zeros((len(y), max(categories.values()) + 1, values.shape[1]), np.float32)  # (n, channels, columns)
        for position, (column, count) in enumerate(categories.items()):
            code = np.nan_to_num(values[:, column], nan=count).astype(int)
            x[np.arange(len(y)), code, position] = 1
        x[:, 0, len(categories) :] = numbers
        x = x[:, : max(1, np.flatnonzero(x.any((0, 2))).max() + 1)]  # the last channel only if a value is missing
    else:
        x = numbers.astype(np.float32)[:, :, None]  # (n, channels, 1)
    K = len(names)
    weights = tuple(len(train) / (K * np.bincount(y[train], minlength=K)))  # n / (K n_c): mean 1 over the training rows
    changes = {"shape": x.shape[1:], "output": (len(names),), "loss": functools.partial(cross_entropy, weights=weights)}
    return (x[train], y[train]), (x[test], y[test]), kind, changes


def prepare_table(number, data_dir):
    """Let scikit-learn fetch a table of OpenML into data_dir/openml. Raises UserError if it cannot be had."""
    try:
        values, _, labels = fetch_table(number, data_dir, fetching=True)
        print(f"openml{number}: present, {values.shape[0]:,} rows, {values.shape[1]} columns, {len(set(labels))} classes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        own = SKLEARN_COPIES.get(number)
        rest = f"Without it scikit-learn's own copy is used ({own})." if own else "Try again later."
        print(f"openml{number}: https://www.openml.org/d/{number} cannot be had ({error}).\n{rest}")
        if not own:
            raise UserError(f"openml{number} could not be fetched.") from error
