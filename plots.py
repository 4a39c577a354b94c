"""Plots of a run (curves.png, predictions.png, patches.png), as bytes of a PNG file, and its metrics for --track.

matplotlib is imported where it is used: it takes seconds. Shapes: n samples, K classes, C channels, H W L sizes, N tokens.
"""

import importlib
import io
import json

import numpy as np

from cli import UserError, reason

SHOWN = 3  # samples in a picture
REPLACED = "#d1495b"  # the colour of the source in docs/idea.png


def subplots(rows, columns, width, height):
    """A figure without a window, and its axes (rows, columns)."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name begins no formula
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def png(figure):
    """The figure as bytes; it is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def curves(title, stage1, history, result):
    """Each number of stage 1 over its epochs, then loss, validation metric and the rest over the epochs of training."""
    panels = [("stage 1: ", stage1, k) for row in stage1[:1] for k in row if k not in ("epoch", "seconds")]
    panels += [("", history, k) for k in history[0] if k not in ("epoch", "seconds", "lr")]
    figure, axes = subplots(1, len(panels), 3.4, 2.8)
    for axis, (stage, rows, name) in zip(axes[0], panels, strict=True):
        axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], ".-")
        axis.set(xlabel="epoch", title=stage + name)
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
        if name == "val":
            axis.plot(result["best_epoch"], result["test"], "r*", markersize=10, label=f"test {result['test']:.3f}")
            axis.set_title(f"{result['metric']} on validation")
            axis.legend()
    figure.suptitle(title)
    return png(figure)


def predictions(title, task, x, out, y):
    """The test set: confusion matrix of classes, or the first fields. x (SHOWN, ...); out and y: of all samples."""
    if task.target == "class":
        return confusion(title, out, y, task.names if isinstance(task.names, tuple) else None)
    return fields(title, x, out if task.normalised or not task.restore else task.restore(out), y)  # both in one unit


def displayed(x):
    """A sample (C, H, W) as a picture: its first three channels as colours, or its first one; its range becomes 0 to 1."""
    x = x[:3] if len(x) >= 3 else x[:1]
    return ((x - x.min()) / (np.ptp(x) or 1)).transpose(1, 2, 0)  # (H, W, 3 or 1)


def shares(out, y):
    """The share of each true class that is predicted as each class: out (n, K), y (n,) -> (K, K), rows sum to 1."""
    counts = np.zeros((out.shape[1], out.shape[1]))
    np.add.at(counts, (y, out.argmax(1)), 1)
    return counts / counts.sum(1, keepdims=True).clip(1)


def confusion(title, out, y, names=None):
    """Confusion matrix; each row sums to 1. out (n, K), y (n,)"""
    K = out.shape[1]
    figure, ((axis,),) = subplots(1, 1, 5.2, 4.4)
    image = axis.imshow(shares(out, y), cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    if names and len(names) == K <= 24:
        axis.set_xticks(range(K), names, rotation=90, fontsize=7)
        axis.set_yticks(range(K), names, fontsize=7)
    else:
        axis.locator_params(integer=True)
    figure.colorbar(image, ax=axis, label="share of the true class")
    return png(figure)


def fields(title, x, out, y):
    """Input, target, prediction and error of the first samples. 2D: x (n, C, H, W), out, y (n, H, W) or (n, c, H, W);
    1D: x (n, C, L), out, y (n, c, L'). Of several channels the first is shown.
    """
    n = min(SHOWN, len(x))
    figure, axes = subplots(n, 4, 2.6, 2.2)
    for row, a, b, c in zip(axes, x, out, y, strict=False):
        b, c = (part.reshape(-1, *part.shape[-(a.ndim - 1) :])[0] for part in (b, c))  # the first channel
        if a.ndim == 3:
            low, high = np.nanmin(c), np.nanmax(c)
            row[0].imshow(a[0], cmap="viridis")
            row[1].imshow(c, vmin=low, vmax=high)
            row[2].imshow(b, vmin=low, vmax=high)
            scale = np.nanmax(np.abs(b - c)) or 1
            row[3].imshow(b - c, vmin=-scale, vmax=scale, cmap="RdBu")
            for axis in row:
                axis.set(xticks=[], yticks=[])
            row[3].set_xlabel(f"at most {scale:.2g}", fontsize=8)
        else:
            for axis, values in zip(row, (a[0], c, b, b - c), strict=True):
                axis.plot(values, linewidth=1)
                axis.grid(alpha=0.3)
                axis.tick_params(labelsize=7)
            row[2].set_ylim(row[1].get_ylim())
    for axis, name in zip(axes[0], ("input", "target", "prediction", "prediction - target"), strict=True):
        axis.set_title(name, fontsize=10)
    figure.suptitle(title)
    return png(figure)


def replaced(title, x, scores, ks):
    """The patches replaced in some epochs, chosen by the scores after training, in the colour of the source.

    x (n, C, H, W) or (n, C, L), scores (n, N); ks: epoch -> k, the lowest-scored places, which the source takes.
    """
    n, N = min(SHOWN, len(x)), scores.shape[1]
    figure, axes = subplots(n, len(ks), 2.4 if x.ndim == 4 else 3.4, 2.4 if x.ndim == 4 else 1.8)
    for row, sample, score in zip(axes, x, scores, strict=False):
        order = score.argsort(kind="stable")
        for axis, k in zip(row, ks.values(), strict=True):
            if x.ndim == 4:
                side, (H, W) = round(N**0.5), sample.shape[1:]
                axis.imshow(displayed(sample), cmap="gray", extent=(0, W, H, 0))
                mask = np.full(N, np.nan)
                mask[order[:k]] = 1
                axis.imshow(mask.reshape(side, side), extent=(0, W, H, 0), cmap="Reds", vmin=0, vmax=1.4, alpha=0.85,
                            interpolation="nearest")  # fmt: skip
                axis.set(xticks=[], yticks=[])
            else:
                step = sample.shape[1] / N
                axis.plot(sample[0], color="0.2", linewidth=1)
                for place in order[:k]:
                    axis.axvspan(place * step, (place + 1) * step, color=REPLACED, alpha=0.5, linewidth=0)
                axis.tick_params(labelsize=7)
    for axis, (epoch, k) in zip(axes[0], ks.items(), strict=True):
        axis.set_title(f"epoch {epoch}: {k} of {N}", fontsize=10)
    figure.suptitle(title)
    return png(figure)


class Tracker:
    """--track: the rows of metrics.jsonl, the run's arguments and its result for TensorBoard or Weights & Biases.

    A row's step is its number in metrics.jsonl. Resuming logs no step twice: TensorBoard's files are rewritten, W&B's run
    continues after its last step.
    """

    def __init__(self, package):
        try:
            module = importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(package, package))
        except ImportError as error:
            raise UserError(f"--track {package}: a package is missing ({error}).\npip install {package}") from error
        self.package, self.module, self.sent = package, module, 0

    def begin(self, folder, arguments):
        """Start or continue a record in the run's folder; `arguments`: args.json."""
        if self.package == "wandb":
            try:
                self.record = self.module.init(dir=folder, name=folder.name, config=arguments, resume="auto")
            except self.module.Error as error:
                raise UserError(f"--track wandb: {reason(error)}\nWithout an account, set WANDB_MODE=offline.") from error
            self.sent = max(0, self.record.step - 1)  # its next step; 0 for a new record
            return
        for file in folder.glob("tensorboard/events.out.tfevents.*"):
            file.unlink()
        self.record = self.module.SummaryWriter(folder / "tensorboard")
        self.record.add_text("args", json.dumps(arguments))

    def log(self, rows):
        """Log the rows of metrics.jsonl that are new."""
        for step in range(self.sent + 1, len(rows) + 1):
            row = rows[step - 1]
            numbers = {f"stage1/{name}" if "stage" in row else name: value for name, value in row.items()}
            if self.package == "wandb":
                self.record.log(numbers, step=step)
            else:
                for name, value in numbers.items():
                    self.record.add_scalar(name, value, step)
                self.record.flush()
        self.sent = max(self.sent, len(rows))

    def end(self, result):
        """Log the result and close the record."""
        if self.package == "wandb":
            self.record.summary.update(result)
            self.record.finish()
        else:
            self.record.add_text("result", json.dumps(result))
            self.record.close()
