"""The maths and the models that the method files share: embedders, predictors, backbones, distances between data sets.

    model = predictor(encoder(embedder(x)))

Shapes: B batch, N tokens, D token width, n encoder output tokens, F feature width, K classes, C channels, H W sizes, L time
steps (whatever the axis of a 1D signal is), k of them in a token, c channels of a predicted field; in the distances n and m
samples. `_s` source, `_t` target, `_m` mixed.
"""

import functools
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from backbones import (
    DEFAULT_BACKBONE,
    SwinEncoder,
    TextEncoder,
    Tokenizer,
    VitEncoder,
    first_position,
    load_model,
    local_path,
    rebuild,
)
from cli import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Embedder and predictor
# ---------------------------------------------------------------------------------------------------------------------


def autocast_off(x):
    """Disable autocast: fields rounded to bf16, as inputs or outputs, have errors of 2e-3, as large as published ones."""
    return torch.autocast(x.device.type, enabled=False)


class Embedder2d(nn.Module):
    """Images to tokens: resize, one linear map of each patch, LayerNorm; what a Swin does with its own images.

    A ViT adds learned positions and has no LayerNorm here. The constructor draws Xavier-uniform weights with gain sqrt(2), as
    the official code does, and positions from normal(0, 0.02), as a ViT's were; the bias is 0. `initialise` may replace them.

    Args:
        channels: C of the images.
        width: D of the tokens.
        size: side the images are resized to, bilinear, aspect ratio not kept; antialiased when they shrink.
        patch: side of a patch; N = (size // patch)^2; pixels left over at the edges are ignored.
        vit: positions instead of the LayerNorm.
    """

    def __init__(self, channels, width, size, patch=4, vit=False):
        super().__init__()
        self.size, self.tokens = size, (size // patch) ** 2  # N
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.Identity() if vit else nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(self.tokens, width)) if vit else None
        nn.init.xavier_uniform_(self.project.weight, gain=2**0.5)
        nn.init.zeros_(self.project.bias)
        if vit:
            nn.init.normal_(self.positions, std=0.02)

    def forward(self, x):
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)  # (B, C, size, size)
        with autocast_off(x):
            tokens = self.project(x)  # (B, D, size / patch, size / patch)
        tokens = self.norm(tokens.flatten(2).transpose(1, 2))  # (B, N, D)
        return tokens if self.positions is None else tokens + self.positions


def stack_number(length, max_tokens):
    """Time steps in one token: the smallest divisor of `length` that leaves at most `max_tokens` tokens.

    A prime length above `max_tokens` has only the divisors 1 and itself and becomes one token: the official code's rule, kept.
    """
    return next(k for k in range(1, length + 1) if length % k == 0 and length // k <= max_tokens)


class Embedder1d(nn.Module):
    """Signals to tokens: one linear map of each `stack` time steps, LayerNorm, then learned positions.

    RoBERTa adds its positions before its LayerNorm; the target embedder of the official code adds them after, and so does this.
    The constructor's values are as in Embedder2d; `initialise` may replace all but the projection's.
    LayerNorm(w x) does not depend on the size of x: a token of one value carries only its sign, until the bias is trained
    (docs/why-orca.md).

    Args:
        channels, length: C and L of the signals.
        width: D of the tokens.
        max_tokens: the most tokens a sample may become; N = L / `stack_number(L, max_tokens)`.
    """

    def __init__(self, channels, length, width, max_tokens=512):
        super().__init__()
        self.stack = stack_number(length, max_tokens)  # k
        self.tokens = length // self.stack  # N
        self.project = nn.Conv1d(channels, width, self.stack, stride=self.stack)
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(self.tokens, width))
        nn.init.xavier_uniform_(self.project.weight, gain=2**0.5)
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x):
        with autocast_off(x):
            tokens = self.project(x)  # (B, C, L) -> (B, D, N)
        return self.norm(tokens.transpose(1, 2)) + self.positions  # (B, N, D)


def initialise(embedder, source, init):
    """Initialise the target embedder; the same function in every method.

    "copy", 2D: projection, bias and LayerNorm (of a ViT: positions) of the pretrained embedder; for C != 3 channels its 3
    input slices are tiled and cut to C, not rescaled (as in the official code). 1D: LayerNorm and the first N positions of
    the pretrained embedder; the projection stays random, since words have none.
    "random" leaves the constructor's values.
    "truncated" is the start of naive fine-tuning in ORCA's release. 2D: normal(0, 0.02), cut at -2 and 2. 1D: only the
    positions are copied (the release's list of layers to reinitialise lacks Conv1d).
    """
    if isinstance(embedder, Embedder1d):
        if init in ("copy", "truncated"):
            first = first_position(source.embedder)
            with torch.no_grad():
                table = source.embedder.position_embeddings.weight  # (positions, D)
                embedder.positions.copy_(table[first : first + embedder.tokens])  # (N, D)
        if init == "copy":
            embedder.norm.load_state_dict(source.embedder.LayerNorm.state_dict())
    elif init == "copy":
        weight = source.embedder.project.weight  # (D, 3, patch, patch)
        channels = embedder.project.in_channels
        tiled = weight.repeat(1, -(-channels // 3), 1, 1)[:, :channels]  # (D, C, patch, patch)
        embedder.load_state_dict(source.embedder.state_dict() | {"project.weight": tiled})
    elif init == "truncated":
        nn.init.trunc_normal_(embedder.project.weight, std=0.02)
    return embedder


def make_embedder(shape, source, init, max_tokens=512):
    """The target embedder of samples of `shape`, in front of the encoder of `source`.

    Args:
        shape: (C, H, W) or (C, L).
        source: the Source that it is used with.
        init: "copy", "random" or "truncated", see `initialise`.
        max_tokens: 1D: the most tokens of a sample; never more than the backbone has positions.
    Raises: UserError for a 1D task with a model of images, or a 2D task with a text model.
    """
    modality = "2d" if len(shape) == 3 else "1d"
    if source.modality != modality:
        fitting = " or ".join(dict.fromkeys(DEFAULT_BACKBONE[modality, scale] for scale in ("tiny", "full")))
        kinds = {"1d": "a text model, for 1D tasks", "2d": "a Swin or ViT, for 2D tasks"}
        raise UserError(
            f"--backbone: {source.name} is {kinds[source.modality]}; this task has samples of {' x '.join(map(str, shape))}.\n"
            f"Give {fitting}, or leave --backbone out."
        )
    if modality == "2d":
        patch, vit = source.embedder.project.kernel_size[0], source.embedder.positions is not None
        return initialise(Embedder2d(shape[0], source.token_width, source.size, patch, vit), source, init)
    return initialise(Embedder1d(*shape, source.token_width, min(max_tokens, source.positions)), source, init)


class ClassPredictor(nn.Module):
    """Mean over the tokens, then one linear map: (B, n, F) -> (B, K)."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features):
        with autocast_off(features):  # bf16 logits tie: 0.8 % of the predictions would change
            return self.linear(features.to(self.linear.weight.dtype).mean(1))  # (B, n, F) -> (B, F) -> (B, K)


class DensePredictor2d(nn.Module):
    """Maps every feature to a square of 3-channel pixels, then pools (or repeats) them to the field: (B, n, F) -> (B, *out).

    The only trained layer is F -> 3 factor^2, a 1 x 1 convolution. The pooling over channels, 3 -> c, has overlapping windows
    if 3 is not a multiple of c, as in the official code.

    Args:
        width: F.
        out: (H, W), or (c, H, W).
        factor: side of a square: 32 for every full Swin and the patch of a ViT, so that the squares cover the images the
            backbone was built for; 16 for tiny-swin.
    """

    def __init__(self, width, out, factor=32):
        super().__init__()
        self.out, self.factor = tuple(out), factor
        self.linear = nn.Linear(width, 3 * factor**2)

    def forward(self, features):
        side = round(features.shape[1] ** 0.5)
        with autocast_off(features):
            x = self.linear(features.float())  # (B, n, F) -> (B, n, 3 factor^2)
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, 3 factor^2, side, side)
        x = F.pixel_shuffle(x, self.factor)  # (B, 3, side factor, side factor)
        c, H, W = (1, *self.out)[-3:]
        x = F.adaptive_avg_pool1d(x.flatten(2).transpose(1, 2), c).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, c, ..)
        return F.adaptive_avg_pool2d(x, (H, W)).reshape(-1, *self.out)  # (B, c, H, W) -> (B, *out)


class DensePredictor1d(nn.Module):
    """Every feature becomes the c x k values of its own time steps: (B, N, F) -> (B, c, N k).

    Args:
        width: F.
        out: (c, L_out), L_out = N k.
        stack: k.
        pooling: False: a learned linear layer F -> c k, as in ORCA's paper (not verified: O9). True: the released head, which
            averages groups of features and has no parameters.
    """

    def __init__(self, width, out, stack, pooling=False):
        super().__init__()
        self.channels, self.stack = out[0], stack
        self.head = nn.AdaptiveAvgPool1d(out[0] * stack) if pooling else nn.Linear(width, out[0] * stack)

    def forward(self, features):
        with autocast_off(features):
            x = self.head(features.float()).unflatten(2, (self.channels, self.stack))  # (B, N, F) -> (B, N, c, k)
        return x.transpose(1, 2).flatten(2)  # (B, c, N k)


def make_predictor(output, target, source, embedder, pooling=False):
    """The predictor of a task: class scores, or a field.

    Args:
        output: shape of one prediction: (K,); (H, W) or (c, H, W); (c, L_out).
        target: "class", "labels" or "field".
        pooling: the released head of 1D fields, see `DensePredictor1d`.
    Raises: UserError if the length of a 1D field is not a multiple of the number of tokens.
    """
    if target != "field":
        return ClassPredictor(source.feature_width, output[0])
    if source.modality == "2d":
        return DensePredictor2d(source.feature_width, output, source.encoder.square)
    if output[1] % embedder.tokens:
        raise UserError(f"{embedder.tokens} tokens cannot predict {output[1]} time steps, which is not a multiple.\n"
                        "Give the task other `tokens`, or another `output`.")  # fmt: skip
    return DensePredictor1d(source.feature_width, output, output[1] // embedder.tokens, pooling)


def set_dropout(encoder, p):
    """Set the probability of every nn.Dropout; stochastic depth is not changed. Returns the encoder."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return encoder


def attention_rollout(encoder, tokens, alpha=0.5):
    """How much each input token contributes to the mean output token, by following attention backwards. (B, N, D) -> (B, N)

        r = 1/n on the n output tokens;   block after block, from the last:   r <- (1 - alpha) r + alpha A^T r

    Rollout (Abnar and Zuidema 2020) with the residual path as a share 1 - alpha, inside each window of a Swin. At a patch
    merging, a token's share is divided equally among the four that it was made of. Values are non-negative and sum to 1;
    without a gradient. Costs one forward pass, and the attention computed a second time.
    """
    r, attentions = None, encoder.attentions(tokens)
    with autocast_off(tokens):  # differences between scores are small
        for A, index in reversed(attentions):  # A (B, nW, T, T), index (nW, T)
            n = index.numel()
            r = A.new_full((len(A), n), 1 / n) if r is None else r
            if r.shape[1] < n:
                side = round(r.shape[1] ** 0.5)
                r = r.view(-1, side, side).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1) / 4  # (B, n)
            share = r[:, index]  # (B, nW, T)
            share = (1 - alpha) * share + alpha * (share[:, :, None] @ A)[:, :, 0]  # A^T r, (B, nW, T)
            r = torch.empty_like(r).index_copy(1, index.flatten(), share.flatten(1))  # (B, n), in the order of the tokens
    return r


def received_attention(encoder, tokens, block=0):
    """The mean attention that each token receives in one block: (B, N, D) -> (B, N), without a gradient.

    It sums to 1 in each window, so it cannot prefer one window of a Swin to another.
    Raises: ValueError for a block after a patch merging.
    """
    A, index = encoder.attentions(tokens)[block]  # (B, nW, T, T), (nW, T)
    if index.numel() != tokens.shape[1]:
        raise ValueError(f"block {block} has {index.numel()} tokens, not {tokens.shape[1]}")
    return torch.empty_like(A[:, :, 0]).flatten(1).index_copy(1, index.flatten(), A.mean(2).flatten(1))  # (B, N)


def checkpoint_activations(encoder):
    """Activation checkpointing: store only the input of each encoder block and recompute the rest in the backward pass.

    The block then reads its parameters again, so this does not work with torch.func.functional_call (MoNA's stage 1, LoRA).
    """
    for block in encoder.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class Model(nn.Module):
    """predictor(encoder(embedder(x)))"""

    def __init__(self, embedder, encoder, predictor):
        super().__init__()
        self.embedder, self.encoder, self.predictor = embedder, encoder, predictor

    def forward(self, x):
        return self.predictor(self.encoder(self.embedder(x)))


@dataclass
class Source:
    """A pretrained model in two parts: its own embedder, frozen, and the encoder that will be adapted."""

    name: str
    modality: Literal["2d", "1d"]  # a Swin or ViT, or a text model
    embedder: nn.Module  # images (B, 3, H, W), or token ids (B, N), to tokens (B, N, D)
    encoder: nn.Module
    token_width: int  # D
    feature_width: int  # F
    size: int | None = None  # 2D: side of the images it was built for
    positions: int | None = None  # 1D: the most tokens it can read
    tokenizer: Tokenizer | None = None  # 1D: words to token ids

    def tokens(self, shape):
        """N_s, the number of tokens of a source sample of this shape: (C, H, W), or (words,)."""
        return self.embedder.tokens if self.modality == "2d" else shape[0]


def load_source(name, pretrained=True, architecture=None):
    """The backbone `name` as a Source.

    Args:
        name: for 2D tasks "tiny-swin", "swin_base", "swin_tiny", any Swin or ViT of timm (DeiT, MAE, DINOv2, CLIP, SigLIP), a
            folder saved by timm (config.json, model.safetensors). For 1D tasks "tiny-roberta", "roberta_base", a Hugging Face
            id ("owner/name") of a BERT-like model, a folder saved by transformers. For both a .safetensors file of
            tools/pretrain.py. "random:NAME" is NAME with random weights, for measuring speed where no weights are available.
        pretrained: False builds the same network with random weights.
        architecture: `encoder.architecture` of an earlier Source: builds its network with random weights, without its files.
    Raises: UserError for an unknown name, a damaged file, a model that cannot be cut, a hub that does not answer.
    """
    model, tokenizer = load_model(name, pretrained) if architecture is None else rebuild(architecture)
    if tokenizer is not None:
        table = model.embeddings.position_embeddings
        embedder, width = model.embeddings.requires_grad_(False), table.embedding_dim
        positions = table.num_embeddings - first_position(embedder)
        return Source(name, "1d", embedder, TextEncoder(model), width, width, positions=positions, tokenizer=tokenizer)
    patches, size, vit = model.patch_embed, model.patch_embed.img_size[0], hasattr(model, "pos_embed")
    embedder = Embedder2d(3, model.embed_dim, size, patches.patch_size[0], vit).requires_grad_(False)
    embedder.project.load_state_dict(patches.proj.state_dict(), strict=False)  # CLIP has no bias here: 0
    embedder.norm.load_state_dict(patches.norm.state_dict())
    if vit:
        embedder.positions.copy_(model.pos_embed.detach()[0, -embedder.tokens :])  # (N, D), after the class token's
    encoder = VitEncoder(model) if vit else SwinEncoder(model)
    return Source(name, "2d", embedder, encoder, model.embed_dim, model.num_features, size)


def weights_checksums(*names):
    """CRC-32 of the files of weights of these backbones; those of a hub, and None, are left out."""
    paths = [local_path(name) for name in names if name]
    files = [file for path in paths for file in (path, *path.glob("*.safetensors"), *path.glob("*.bin")) if file.is_file()]
    return [zlib.crc32(file.read_bytes()) for file in sorted(files)]


# ---------------------------------------------------------------------------------------------------------------------
# Distances between data sets
# ---------------------------------------------------------------------------------------------------------------------


def squared_distances(x, x2):
    """|x_i - x'_j|^2 = |x_i|^2 - 2 <x_i, x'_j> + |x'_j|^2, one matrix product. (n, D), (m, D) -> (n, m)

    Both sets are first centred at their common mean: far from the origin the three terms would cancel in fp32.
    """
    centre = torch.cat([x, x2]).detach().mean(0)
    x, x2 = x - centre, x2 - centre
    return ((x * x).sum(1)[:, None] - 2 * x @ x2.T + (x2 * x2).sum(1)[None]).clamp(min=0)


def exact_cost(cost, a, b):
    """min over plans pi of <pi, cost>: POT's network simplex, in fp64 on the CPU. The gradient is the plan. (n, m) -> scalar"""
    import ot

    pi = ot.emd(*(t.detach().double().cpu().numpy() for t in (a, b, cost)), numItermax=10**9)
    return (torch.from_numpy(pi).to(cost) * cost).sum()


def entropic_cost(cost, a, b, reg, symmetric=False, info=None, tolerance=1e-3, max_iterations=5000):
    """Entropic transport costs of a batch of problems (Sinkhorn), in the log domain, until the marginal error is small.

        OT_reg = min over plans pi of <pi, cost> + reg KL(pi | a b^T)
               = max over f, g of <a, f> + <b, g> - reg (sum_ij pi_ij - 1), whose last term is 0 at the optimum
        f_i = -reg log sum_j b_j exp((g_j - cost_ij) / reg),   g likewise,   pi_ij = a_i b_j exp((f_i + g_j - cost_ij) / reg)

    The stabilised algorithm with absorption (Schmitzer 2019): reg is annealed from the largest cost, divided by 4 each time. At
    its last value, each round of two updates in the log domain is followed by twenty cheap updates of the plan's scalings u, v
    (matrix-vector products), which are absorbed into f and g. Problems that have converged leave the active set. No gradient
    goes through the iterations: by the envelope theorem d OT_reg = <pi, d cost>.

    Args:
        cost (..., n, m), a (..., n), b (..., m): weights of 0 are padding.
        symmetric: both sides are the same; then f = g, and the average of f and its update converges in a few iterations.
        tolerance, max_iterations: stop at this L1 distance between the plan's marginal and a (the worst of the batch), or,
            with a warning, after so many iterations.
        info: a dict that keeps the most "iterations" and the largest marginal "error" of all calls that it is passed to.
    Returns: (...), differentiable in cost.
    """
    shape = cost.shape[:-2]
    cost, a, b = cost.reshape(-1, *cost.shape[-2:]), a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])  # P problems
    with torch.no_grad():
        f_all, g_all, errors = torch.zeros_like(a), torch.zeros_like(b), torch.ones_like(a[:, 0])
        c, log_a, log_b, f, g = cost, a.log(), b.log(), f_all, g_all  # of the problems that go on; log 0 = -inf: padding
        active, high, iterations = torch.arange(len(cost), device=cost.device), float(cost.max()), 0
        while len(active) and iterations < max_iterations:
            at = max(high, reg)
            for _ in range(10 if symmetric and at == reg else 1):
                new_f = -at * ((g[:, None] - c) / at + log_b[:, None]).logsumexp(2)  # (P, n)
                f = (f + new_f) / 2 if symmetric else new_f
                g = f if symmetric else -at * ((f[:, :, None] - c) / at + log_a[:, :, None]).logsumexp(1)  # (P, m)
                iterations += 1
            high /= 4
            if at > reg:
                continue
            pi = ((f[:, :, None] + g[:, None] - c) / reg + log_a[:, :, None] + log_b[:, None]).exp()  # (P, n, m)
            f_all[active], g_all[active], errors[active] = f, g, (pi.sum(2) - a[active]).abs().sum(1)
            going = errors[active] > tolerance
            if not going.all():
                active, c, log_a, log_b, f, g, pi = (t[going] for t in (active, c, log_a, log_b, f, g, pi))
            if not symmetric:
                v = torch.ones_like(g)
                for _ in range(20):
                    u = (log_a.exp() / (pi @ v[:, :, None])[:, :, 0].clamp(min=1e-30)).clamp(1e-10, 1e10)  # (P, n)
                    v = (log_b.exp() / (u[:, None] @ pi)[:, 0].clamp(min=1e-30)).clamp(1e-10, 1e10)  # (P, m)
                f, g, iterations = f + reg * u.log(), g + reg * v.log(), iterations + 20
        value = (a * f_all).sum(1) + (b * g_all).sum(1)  # <a, f> + <b, g>, (P,)
        pi = ((f_all[:, :, None] + g_all[:, None] - cost) / reg + a.log()[:, :, None] + b.log()[:, None]).exp()
        error = float(errors.max())
    if error > tolerance:
        warnings.warn(
            f"Sinkhorn stopped after {iterations} iterations, its marginal off by {error:.1e}: raise reg", stacklevel=2
        )
    if info is not None:
        info["iterations"], info["error"] = max(iterations, info.get("iterations", 0)), max(error, info.get("error", 0.0))
    slope = (pi * cost).sum((1, 2))  # (P,)
    return (slope + (value - slope).detach()).view(shape)  # the dual's value, with the gradient <pi, d cost>


class OtddTerms:
    """The terms of `otdd` that depend on one data set only, so that those of a fixed source are computed once.

    Always: samples `x` (n, D), their `mass` (n,), their class `index` (n,) numbered from 0, and the `members` (K, m) and
    `weights` (K, m) of each class, padded. For inner = "gaussian", `mean` (K, D) and covariance `factor` of each class. For
    reg > 0, `self_cost`, the transport cost of the set to itself; with inner = "exact" also `own` (K,), that of each class.
    """

    def __init__(self, x, y, inner, reg, mass=None, info=None):
        if inner not in ("exact", "gaussian", "none"):
            raise ValueError(f"inner = {inner!r}; choose exact, gaussian or none")
        if not (x.ndim == 2 and len(x) > 0 and y.shape == (len(x),) and x.is_floating_point() and not y.is_floating_point()):
            raise ValueError(
                f"x {tuple(x.shape)} {x.dtype}, y {tuple(y.shape)} {y.dtype}: expected (n, D) float and (n,) int, n > 0"
            )
        if not torch.isfinite(x).all():
            raise ValueError("x holds NaN or infinity")
        if reg < 0:
            raise ValueError(f"reg = {reg} is negative")
        x = x if x.dtype == torch.float64 else x.float()
        self.x, self.inner, self.reg, self.info = x, inner, reg, info
        self.mass = torch.full_like(x[:, 0], 1 / len(x)) if mass is None else (mass / mass.sum()).to(x)
        _, self.index, counts = y.unique(return_inverse=True, return_counts=True)
        K, m, device = len(counts), int(counts.max()), y.device
        order = self.index.argsort()  # class after class
        own_class = self.index[order]
        place = torch.arange(len(y), device=device) - (counts.cumsum(0) - counts)[own_class]  # number within its class
        self.members = torch.zeros(K, m, dtype=torch.long, device=device)
        self.members[own_class, place] = order  # (K, m)
        self.weights = ((torch.arange(m, device=device) < counts[:, None]) / counts[:, None]).to(x)  # (K, m)
        if inner == "gaussian":
            self.mean = (x[self.members] * self.weights[..., None]).sum(1)  # (K, D)
            scale = (self.weights > 0) / (counts[:, None] - 1).clamp(min=1).sqrt()
            self.factor = (x[self.members] - self.mean[:, None]) * scale[..., None].to(x)  # (K, m, D): cov = factor^T factor
            if m > x.shape[1]:  # D rows are enough; turned by a constant Q, they have the same covariance and derivative
                self.factor = torch.linalg.qr(self.factor.detach())[0].mT @ self.factor  # (K, D, D)
        if reg > 0:  # what debiasing needs
            d = squared_distances(x, x)
            if inner == "exact":
                every = torch.arange(K, device=device)
                self.own = class_costs(d, self, self, every, every, symmetric=True)  # (K,): OT_reg of each class to itself
            cost = d / 2
            if inner != "none" and K > 1:
                i, j = torch.triu_indices(K, K, 1, device=device)
                w = torch.zeros(K, K, device=device, dtype=x.dtype).index_put((i, j), label_distances(d, self, self, i, j))
                cost = cost + (w + w.T)[self.index][:, self.index] / 2  # (n, n)
            self.self_cost = entropic_cost(cost, self.mass, self.mass, reg, symmetric=True, info=info)


def class_costs(d, left, right, i, j, symmetric=False):
    """Transport costs from class i_p of the left side to class j_p of the right one, for all pairs p. d (n, m) -> (pairs,)"""
    reg, info = left.reg, left.info if symmetric else right.info
    if reg > 0:
        blocks = d[left.members[i][:, :, None], right.members[j][:, None, :]]  # (pairs, m_left, m_right)
        return entropic_cost(blocks, left.weights[i], right.weights[j], reg, symmetric, info)
    mine = lambda side, c: side.members[c][side.weights[c] > 0]
    pairs = [(mine(left, a), mine(right, b)) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    uniform = lambda rows: torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    return torch.stack([exact_cost(d[rows][:, columns], uniform(rows), uniform(columns)) for rows, columns in pairs])


def label_distances(d, left, right, i, j):
    """W^2 between class i_p of the left side and class j_p of the right one, for all pairs p: (pairs,)

    exact:     transport cost for |x - x'|^2; with reg > 0 its debiased version
    gaussian:  |mu - mu'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), Bures-Wasserstein
    """
    if left.inner == "exact":
        w = class_costs(d, left, right, i, j)
        return w - (left.own[i] + right.own[j]) / 2 if left.reg > 0 else w
    # with S' = L^T L, (S^1/2 S' S^1/2) has the eigenvalues of G = L S L^T; d tr(G^1/2) = <G^-1/2, dG> / 2
    root_s, L = left.factor[i], right.factor[j]  # (pairs, r, D), (pairs, r', D)
    half = (L @ root_s.mT).double()  # (pairs, r', r)
    G = half @ half.mT  # (pairs, r', r')
    with torch.no_grad():
        values, vectors = torch.linalg.eigh(G)
        kept = values > 1e-12 * values[:, -1:]  # centred rows are dependent: some eigenvalues are 0
        roots = torch.where(kept, values, 0).sqrt()  # (pairs, r')
        slope = (vectors * torch.where(kept, 0.5 / roots, 0)[:, None]) @ vectors.mT  # G^-1/2 / 2, (pairs, r', r')
    trace = (slope * G).sum((-2, -1))
    trace = (trace + (roots.sum(-1) - trace).detach()).to(L)
    means = (left.mean[i] - right.mean[j]).square().sum(-1)
    return means + root_s.square().sum((-2, -1)) + L.square().sum((-2, -1)) - 2 * trace


def otdd(x_s, y_s, x_t, y_t, inner="exact", reg=0.0, mass_t=None, terms_s=None, info=None):
    """Optimal transport distance between two labelled data sets (Alvarez-Melis and Fusi 2020), as ORCA uses it.

        OTDD = min over plans pi of sum_ij pi_ij C_ij,     C_ij = 1/2 |x_i - x_j|^2 + 1/2 W^2(y_i, y_j)

    W^2(y, y') is the transport cost between the samples of the two classes for |x - x'|^2 (the factors 1/2 in C_ij, and none in
    W^2, are those of the official code). reg = 0: linear programs. reg > 0: OT_reg(s, t) - 1/2 OT_reg(s, s) - 1/2 OT_reg(t, t),
    for the data sets and for the classes alike. The gradient is that of the value, label distances included.

    Args:
        x_s (n, D), x_t (m, D): features, any float. y_s (n,), y_t (m,): integers; only which are equal matters.
        inner: "exact"; "gaussian": W^2 between the normal distributions of the classes; "none": W^2 = 0.
        reg: entropic strength, in units of the cost; ORCA's is 0.1. 0 needs POT and runs on the CPU; its time grows faster than
            n m.
        mass_t (m,): weights of the target samples, equal within a class. Default: all equal.
        terms_s: OtddTerms(x_s, y_s, inner, reg), computed before.
        info: a dict that gets the "iterations" and the marginal "error" of the worst problem, if reg > 0.
    Returns: a scalar, differentiable in x_s and x_t; 0 if both sets are the same. A class of one sample is a point mass.
    Raises: ValueError for empty sets, NaN, shapes or types that do not fit.
    """
    if x_s.shape[-1] != x_t.shape[-1]:
        raise ValueError(f"the source has width {x_s.shape[-1]}, the target {x_t.shape[-1]}")
    s = terms_s or OtddTerms(x_s, y_s, inner, reg, info=info)
    if len(s.x) != len(x_s) or (s.inner, s.reg) != (inner, reg):
        raise ValueError(f"terms_s are those of {len(s.x)} samples, inner = {s.inner!r}, reg = {s.reg}")
    t = OtddTerms(x_t, y_t, inner, reg, mass_t, info)
    d = squared_distances(s.x, t.x)  # (n, m)
    cost = d / 2  # 1/2 |x_i - x_j|^2, (n, m)
    if inner != "none":
        i, j = torch.cartesian_prod(*(torch.arange(len(side.members), device=d.device) for side in (s, t))).T
        w = label_distances(d, s, t, i, j).view(len(s.members), len(t.members))  # (K_s, K_t)
        cost = cost + w[s.index][:, t.index] / 2  # + 1/2 W^2(y_i, y_j), (n, m)
    if reg == 0:
        return exact_cost(cost, s.mass, t.mass)
    return entropic_cost(cost, s.mass, t.mass, reg, info=info) - (s.self_cost + t.self_cost) / 2


def mmd(x, x2):
    """Squared maximum mean discrepancy, biased estimator, as in ORCA's code. (n, D), (m, D) -> scalar

        mean(K_xx) + mean(K_x'x') - 2 mean(K_xx'),   K = sum_i exp(-|x - x'|^2 / (c_i b)),   c = 1/4, 1/2, 1, 2, 4

    The bandwidth b is the mean squared distance between different samples of the union, held constant.
    """
    n, m = len(x), len(x2)
    both = torch.cat([x, x2])
    d = squared_distances(both, both)  # (n + m, n + m)
    bandwidth = (d.detach().sum() / ((n + m) ** 2 - (n + m))).clamp(min=1e-30)
    K = sum(torch.exp(-d / (c * bandwidth)) for c in (0.25, 0.5, 1, 2, 4))  # (n + m, n + m)
    return K[:n, :n].mean() + K[n:, n:].mean() - 2 * K[:n, n:].mean()


def l2(x, x2):
    """Mean Euclidean distance of samples paired by position. (..., n, D), (..., n, D) -> scalar"""
    return (x - x2).norm(dim=-1).mean()
