"""Losses and metrics. Shapes: B samples of a batch, n of a whole split, K classes or labels, H W sizes."""

import numpy as np

from cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Losses: of a batch, in fp32, the mean over its samples (some official code sums: darcy)
# ---------------------------------------------------------------------------------------------------------------------


CONSTANTS = {}  # (id of values, device) -> values, tensor


def constant(values, device):
    """`values` as an fp32 tensor on the device, sent there once: a copy in every step would make the host wait each time."""
    import torch

    key = id(values), str(device)
    if key not in CONSTANTS:  # values are kept, so that nothing else gets their id
        CONSTANTS[key] = values, torch.as_tensor(values, dtype=torch.float32, device=device)
    return CONSTANTS[key][1]


def cross_entropy(out, y, weights=None):
    """Mean of - w_y log softmax(out)_y, w = 1 without `weights` (K,). out (B, K), y (B,) -> scalar

    Divided by B, not by the sum of the batch's weights as in the official code: so the mean over micro-batches is the loss of
    the whole batch. Weights should have mean 1 over the training set.
    """
    import torch

    if weights is None:
        return torch.nn.functional.cross_entropy(out.float(), y)
    each = torch.nn.functional.cross_entropy(out.float(), y, reduction="none")  # (B,)
    return (constant(weights, out.device)[y] * each).mean()


def presence(out, y, positive=1.0):
    """Binary cross-entropy, - positive y log p - (1 - y) log (1 - p), mean over all. out (B, K), y (B, K or more) -> scalar"""
    import torch

    weight = constant(positive, out.device)
    return torch.nn.functional.binary_cross_entropy_with_logits(out.float(), y[:, : out.shape[1]], pos_weight=weight)


def mask_loss(out, y):
    """Binary cross-entropy, mean over all pixels; ignored pixels (y NaN) add 0. out (B, H, W), y (B, any, any) -> scalar

    The denominator is constant, as in the official code, so that the loss does not depend on how a batch is cut. A mask of
    another size is resized to that of the prediction (nearest pixel).
    """
    import torch

    y = torch.nn.functional.interpolate(y[:, None], out.shape[-2:])[:, 0]  # (B, H, W)
    counts = ~y.isnan()
    each = torch.nn.functional.binary_cross_entropy_with_logits(out.float(), y.nan_to_num(), reduction="none")
    return (each * counts).mean()


def root(x):
    """Square root; at 0, where its gradient is infinite, with gradient 0: of samples that are predicted exactly."""
    return x.clamp(min=1e-30).sqrt()


def rmse(out, y):
    """sqrt(mean (out - y)^2) of each sample, then the mean. out, y (B, ...) -> scalar"""
    return root((out.float() - y).flatten(1).square().mean(1)).mean()


def nrmse(out, y):
    """sqrt(mean (out - y)^2) / sqrt(mean y^2) of each sample, then the mean. out, y (B, ...) -> scalar"""
    error, size = (v.flatten(1).square().mean(1) for v in (out.float() - y, y))
    return (root(error) / size.sqrt()).mean()  # not finite if a target is 0 everywhere, which training reports


def relative_l2(out, y, mean=0.0, std=1.0):
    """|std out + mean - y|_2 / |y|_2 of each sample, then the mean. out, y (B, H, W), mean, std (H, W) -> scalar"""
    mean, std = (constant(v, out.device) for v in (mean, std))
    return nrmse(out.float() * std + mean, y)  # the same quotient: both norms divided by sqrt(H W)


def squared(out, y):
    """mean (out - y)^2. out, y (B, ...) -> scalar"""
    return (out.float() - y).square().mean()


def sigmoid(out):
    """Probabilities of logits, of any shape, fp32."""
    from scipy.special import expit

    return expit(out.astype(np.float64)).astype(np.float32)


def softmax(out):
    """Probabilities of classes: (n, K) -> (n, K) fp32"""
    from scipy.special import softmax

    return softmax(out.astype(np.float64), axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: errors, lower is better, of numpy arrays of all samples at once (the official code averages chunks of about 1000)
# ---------------------------------------------------------------------------------------------------------------------


def zero_one(out, y):
    """Share of wrong predictions. out (n, K), y (n,)"""
    from sklearn.metrics import zero_one_loss

    return float(zero_one_loss(y, out.argmax(1)))


def macro_f1_error(out, y):
    """1 - mean over the classes that occur, in y or among the predictions, of 2 TP / (2 TP + FP + FN). out (n, K), y (n,)"""
    from sklearn.metrics import f1_score

    return 1 - float(f1_score(y, out.argmax(1), average="macro", zero_division=0))


def auroc_error(out, y):
    """1 - area under the ROC curve of softmax(out); more than two classes: the mean over pairs. out (n, K), y (n,)

    0.5 if there is only one class in y.
    """
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score

    if len(np.unique(y)) < 2:
        return 0.5
    out = out.astype(np.float64)
    if out.shape[1] == 2:  # the same order as softmax, which rounds to 1 where logits differ by more than 36
        return 1 - float(roc_auc_score(y, out[:, 1] - out[:, 0]))
    return 1 - float(roc_auc_score(y, softmax(out, axis=1), multi_class="ovo", labels=np.arange(out.shape[1])))


def label_auroc_error(out, y):
    """1 - mean area under the ROC curve, over the labels neither always nor never present; 0.5 without any. out, y (n, K)"""
    from sklearn.metrics import roc_auc_score

    both = [k for k in range(y.shape[1]) if 0 < y[:, k].sum() < len(y)]
    return 1 - float(np.mean([roc_auc_score(y[:, k], out[:, k]) for k in both])) if both else 0.5


def clip_map_error(out, y):
    """1 - mean over the labels that occur of the average precision. out (n, K) logits, y (n, K) 0 or 1.

    A further column of y is the number of the clip that a chunk is cut from: logits are averaged over its chunks first.
    """
    from sklearn.metrics import average_precision_score

    K = out.shape[1]
    if y.shape[1] > K:
        _, first, clip = np.unique(y[:, K], return_index=True, return_inverse=True)
        total = np.zeros((len(first), K))
        np.add.at(total, clip, out)
        out, y = total / np.bincount(clip)[:, None], y[first, :K]  # (clips, K)
    some = [k for k in range(K) if y[:, k].any()]
    return 1 - float(np.mean([average_precision_score(y[:, k], out[:, k]) for k in some])) if some else 1.0


def balanced_error(out, y):
    """1 - (TP / (TP + FN) + TN / (TN + FP)) / 2 over the pixels that count. out (n, H, W) logits, y 0, 1 or NaN.

    The benchmark calls it 1 - AUROC: it takes the area under the curve of predictions that are already cut at logit 0.
    """
    hit = out > 0
    true_positive, true_negative = (part.mean() if part.size else 1.0 for part in (hit[y == 1], ~hit[y == 0]))
    return 1 - float(true_positive + true_negative) / 2


def protein_mae(out, y):
    """MAE_8 in Angstrom: mean |y - P| over pairs at least 24 residues apart with y at most 8 A, then over proteins.

    P = (out + out^T) / 2, at least 0.01; upper triangle; proteins without such a pair are left out. out, y (n, 512, 512)
    """
    far = np.triu(np.ones(y.shape[1:], bool), k=24)
    errors = []
    for p, d in zip(out, y, strict=True):
        close = far & (d <= 8)
        if close.any():
            errors.append(np.abs(d - ((p + p.T) / 2).clip(0.01))[close].mean())
    if not errors:
        raise UserError("no two residues 24 or more apart are within 8 Angstrom in any protein: there is nothing to score.")
    return float(np.mean(errors))


def score_of(loss):
    """The metric that is the same formula as a loss, on numpy arrays."""

    def score(out, y):
        import torch

        return float(loss(torch.from_numpy(out), torch.from_numpy(y)))

    return score
