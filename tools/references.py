"""Reference models on the same splits as the methods, to put their errors into perspective; run by tools/reproduce.py.

boosting, logistic    scikit-learn models on the raw values: tasks with classes
convnet               a small convolutional network from scratch: images with classes
mean, input           predict the mean of the training targets, or the input: fields
fourier               a small Fourier neural operator: fields
"""

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import cli
import data
from run import make_optimizer, make_schedule, seed_everything
from tasks import scores


class Fourier(nn.Module):
    """A small Fourier neural operator (Li et al. 2021) in one or two dimensions: v <- v + gelu(W v + F^-1 R F v), three times.

    R is a complex matrix for each of the lowest frequencies. Since these are few, the transform F is a matrix product with
    their waves, axis by axis. The coordinates are additional input channels.
    """

    def __init__(self, task, width=16, modes=12, layers=3):
        super().__init__()
        self.space, self.output, self.layers = task.shape[1:], task.output, layers
        frequencies = [torch.arange(-modes, modes), torch.arange(modes)][-len(self.space) :]
        R = torch.randn(layers, width, width, *map(len, frequencies), 2) / width
        self.R = nn.Parameter(R)
        self.waves = [
            torch.exp(-2j * torch.pi * torch.arange(n)[:, None] * k / n) for n, k in zip(self.space, frequencies, strict=True)
        ]
        conv = nn.Conv1d if len(self.space) == 1 else nn.Conv2d
        self.W = nn.ModuleList(conv(width, width, 1) for _ in range(layers))
        self.lift, self.project = conv(task.shape[0] + len(self.space), width, 1), conv(width, 1, 1)

    def forward(self, x):
        places = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in self.space), indexing="ij"))
        v = self.lift(torch.cat([x, places.expand(len(x), *places.shape)], 1))  # (B, width, *space)
        for R, W in zip(torch.view_as_complex(self.R), self.W, strict=True):
            f = v.to(R.dtype)
            for axis, wave in enumerate(self.waves, 2):
                f = (f.movedim(axis, -1) @ wave / len(wave)).movedim(-1, axis)
            f = torch.einsum("bi...,io...->bo...", f, R)  # (B, width, modes), 2D: (B, width, 2 modes, modes)
            for axis, wave in enumerate(self.waves, 2):
                f = (f.movedim(axis, -1) @ wave.conj().T).movedim(-1, axis)
            v = v + F.gelu(W(v) + f.real)
        return self.project(v).reshape(-1, *self.output)  # (B, 1, *space) -> (B, *output)


def fourier(loaded, seed, *_, epochs=10, batch_size=10):
    """A Fourier neural operator trained on the task's loss by AdamW, learning rate 2e-3, linear decay to 0.

    Takes about a minute on one core. Returns: predictions for the test set (n, *output).
    """
    torch.manual_seed(seed)
    net, train, test = Fourier(loaded.task), loaded.train, loaded.test
    steps = len(train) // batch_size
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * steps)
    for epoch in range(epochs):
        for x, y in train.batches(steps, batch_size, seed, epoch):
            loaded.task.loss(net(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return torch.cat([net(test.inputs(part)) for part in torch.arange(len(test)).split(batch_size)])


def convnet(loaded, seed, options=()):
    """Five convolutions with batch norm, from scratch; optimizer, rate, schedule, clipping and steps are those of the methods.

    Takes about as long as naive fine-tuning of tiny-swin. Returns: logits for the test set (n, K).
    """
    seed_everything("initial weights", seed)
    args = tyro.cli(cli.Args, args=["--task", loaded.task.name, "--scale", "tiny", *options])
    args = data.complete(args, "finetune", args.scale)
    train, test, layers, width = loaded.train, loaded.test, [], loaded.train.shape[0]
    for out, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(width, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        width = out
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, train.classes)
    net = nn.Sequential(*layers, *head)  # (B, C, H, W) -> (B, K)
    optimizer, steps = make_optimizer(net, args), train.batches_in_epoch(args)
    schedule = make_schedule(optimizer, args, steps)
    for epoch in range(args.epochs):
        for step, (x, y) in enumerate(train.batches(steps, args.batch_size, seed, epoch)):
            window = min(args.accumulate, steps - step // args.accumulate * args.accumulate)
            (loaded.task.loss(net(x), y) / window).backward()
            if (step + 1) % args.accumulate and step + 1 < steps:
                continue
            if args.clip > 0:
                nn.utils.clip_grad_norm_(net.parameters(), args.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        return torch.cat([net(test.inputs(part)) for part in torch.arange(len(test)).split(256)])


def mean(loaded, *_):
    """The mean of the training targets for every test sample."""
    zero_is_mean = loaded.task.name == "darcy"  # its score adds the mean
    return (loaded.train.y.mean(0) * (not zero_is_mean)).expand_as(loaded.test.y)


def same(loaded, *_):
    """The first channel of the input. Darcy: the normalised coefficient in place of the normalised pressure."""
    return loaded.test.inputs(slice(None))[:, 0].reshape(loaded.test.y.shape)


def classifier(model, loaded):
    """Fit a scikit-learn classifier on the flattened inputs. Returns: log probabilities for the test set (n, K)."""
    x, x_test = (part.inputs(slice(None)).flatten(1).numpy() for part in (loaded.train, loaded.test))
    model.fit(x, loaded.train.y.numpy())
    p = np.zeros((len(x_test), loaded.train.classes))
    p[:, model.classes_] = model.predict_proba(x_test)  # one column per class of the training set
    return torch.from_numpy(np.log(p + 1e-12))  # the metrics expect logits


def boosting(loaded, seed, *_):
    return classifier(HistGradientBoostingClassifier(random_state=seed), loaded)


def logistic(loaded, seed, *_):
    return classifier(make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)), loaded)


# name: (kind of target, modality or any, (loaded, seed, options of the methods) -> predictions for the test set)
REFERENCES = {
    "boosting": ("class", "", boosting), "logistic": ("class", "", logistic), "convnet": ("class", "2d", convnet),
    "mean": ("field", "", mean), "input": ("field", "", same), "fourier": ("field", "", fourier),
}  # fmt: skip


def refer(name, loaded, seed, options=()):
    """Test error of a reference by the task's metric; None if it does not fit the task. Only convnet has options."""
    target, modality, predict = REFERENCES[name]
    if loaded.task.target != target or modality not in ("", loaded.task.modality) or loaded.test.lazy:
        return None
    if loaded.task.loss is scores.mask_loss:
        return None  # the methods predict logits of a mask
    return float(loaded.task.score(predict(loaded, seed, options).numpy(), loaded.test.y.numpy()))
