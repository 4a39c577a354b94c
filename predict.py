"""Apply a finished run to new samples: the model of its best epoch, and the preparation of its task.

    python predict.py runs/satellite-naive-tiny-roberta-s0 x.npy -o predictions.npy

x.npy holds new samples (n, ...) in the shape that `python data.py` lists and with the values of the official files, before
anything is normalised. PDEs simulated at the tiny scale have fewer points; an error message names the expected shape.

    cifar100, spherical     images in uint8
    darcy, navier_stokes1d  (n, 1, 85, 85) coefficients, (n, 1, 3072) density, pressure and velocity
    cosmic                  (n, 1, 129, 128), the sky level in the last row
    fsd50k                  (n, 2, 22050): a second of sound, and zeros in place of the noise that training mixes in
    ecg                     pieces of records that have mean 0 and standard deviation 1
    openml<ID>              (n, F), the table without its label and the columns that the run left out; categories are numbers
                            from 0 in the order of the file; NaN is a missing value

predictions.npy gets, in float32: probabilities of the classes (n, K), of each label (n, K), or of each pixel of a mask
(n, H, W), without the weights that the losses of tables, fsd50k and deepsea give to what is rare; other fields in the units of
the files. The classes of openml<ID> are in the order of their names as text: "10" before "2". The run's folder is all that is
needed: no data, no backbone.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import cli
import data
from run import autocast, choose_device, load, write


@dataclass(frozen=True)
class Args:
    run: Annotated[str, tyro.conf.Positional]
    """the folder of a finished run, of any method"""
    inputs: Annotated[str, tyro.conf.Positional]
    """an .npy file with the samples"""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """the .npy file that gets the predictions"""
    batch_size: int = 32
    """samples at a time"""


def prepare(task, x, where):
    """New samples as `task.read` returns those of the files, checked. Raises UserError that begins with `where`."""
    x = data.numbers(where, x)
    if len(x) == 0:
        raise cli.UserError(f"{where} holds {x.shape}: no samples.")
    if task.pixels and x.dtype != np.uint8:
        raise cli.UserError(f"{where} holds values of type {x.dtype}; expected images of type uint8, as in training.")
    x = x if task.pixels or x.dtype != np.uint8 else np.float32(x)  # numbers, no image
    return data.check(where, task.prepare(where, x) if task.prepare else x, task.stored or task.shape, "input")


@torch.no_grad()
def predict(model, task, x, where="x", batch_size=32):
    """The predictions of a model for new samples x (n, ...), see above: (n, *task.output) float32.

    Args:
        model, task: of `run.load`.
        where: what the message of an error begins with.
    Raises: UserError for samples of another shape or type, values or predictions that are not finite.
    """
    x, out = prepare(task, x, where), []
    device, precision = choose_device()
    samples = data.Lazy(len(x), lambda rows, u: x[rows])  # a batch at a time goes to the device
    split = data.Split(samples, np.zeros(len(x)), None, "official", task, device)
    for index in torch.arange(len(x)).split(min(split.chunk, batch_size)):
        inputs = split.inputs(index)
        with autocast(device, precision):
            out.append(model(inputs).float().cpu())
    out = torch.cat(out).numpy()  # (n, *output)
    finite = np.isfinite(out).reshape(len(out), -1).all(1)  # (n,)
    if not finite.all():
        raise cli.UserError(f"{where}: the prediction of sample {finite.argmin()} is not finite: the inputs are too large.")
    if task.target == "field":
        return task.restore(out) if task.restore else out
    # a loss with weights w learns w_k p_k / sum_j w_j p_j of classes, w p / (w p + 1 - p) of labels
    options = getattr(task.loss, "keywords", {})
    out = out - np.log(options.get("weights", options.get("positive", 1.0)))  # (n, K): logits of p
    return data.scores.softmax(out) if task.target == "class" else data.scores.sigmoid(out)


def main(args):
    out = Path(args.out).resolve()  # of a link: the file that it leads to
    if out == Path(args.inputs).resolve() or (out.exists() and not out.is_file()):  # a folder, a device, a pipe
        raise cli.UserError(f"-o {args.out} is the input file, or something else than a file.\nGive the name of another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    model, task = load(args.run)
    predictions = predict(model, task, data.read_npy(Path(args.inputs)), args.inputs, args.batch_size)
    content = io.BytesIO()
    np.save(content, predictions)
    write(out, content.getvalue())
    print(f"{args.out}: {data.by_x(predictions.shape)}, {'fields' if task.target == 'field' else 'probabilities'}")


if __name__ == "__main__":
    cli.guarded(main, cli.command_line(Args, __doc__))
