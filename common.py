"""What the method files share: embedders, predictors, backbones, run keeping. Maths lives here once; loops do not.

    model = predictor(encoder(embedder(x)))

Shapes: B batch, N tokens, D token width, n encoder output tokens, F feature width, K classes, C channels, H W sizes, L time
steps (whatever the axis of a 1D signal is), k of them in a token, c channels of a predicted field; in the distances n and m
samples. `_s` source, `_t` target, `_m` mixed.
"""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
from data import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Embedder and predictor
# ---------------------------------------------------------------------------------------------------------------------


def in_fp32(x):
    """Autocast off: fields rounded to bf16, on their way in or out, are off by 2e-3, which is more than published errors."""
    return torch.autocast(x.device.type, enabled=False)


class Embedder2d(nn.Module):
    """Pictures to tokens: resize, one linear map of each patch, LayerNorm; what a Swin does with its own pictures.

    Starts random as the official codes do: Xavier-uniform with gain sqrt(2), zero bias.

    Args:
        channels: C of the pictures.
        width: D of the tokens.
        size: side the pictures are resized to, bilinear, aspect ratio not kept; smoothed first when they shrink.
        patch: side of a patch; N = (size / patch)^2.
    """

    def __init__(self, channels, width, size, patch=4):
        super().__init__()
        self.size, self.tokens = size, (size // patch) ** 2  # N
        self.project = nn.Conv2d(channels, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.project.weight, gain=2**0.5)
        nn.init.zeros_(self.project.bias)

    def forward(self, x):
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)  # (B, C, size, size)
        with in_fp32(x):
            tokens = self.project(x)  # (B, D, size / patch, size / patch)
        return self.norm(tokens.flatten(2).transpose(1, 2))  # (B, N, D)


def stack_number(length, max_tokens):
    """Time steps in one token: the smallest divisor of `length` that leaves at most `max_tokens` tokens.

    A prime length above `max_tokens` has no other divisor than itself and becomes one token: the papers' rule, kept.
    """
    return next(k for k in range(1, length + 1) if length % k == 0 and length // k <= max_tokens)


class Embedder1d(nn.Module):
    """Signals to tokens: one linear map of each `stack` time steps, LayerNorm, then learned positions.

    RoBERTa adds its positions before its LayerNorm; the official codes' target embedder adds them after, and so does this.
    Starts random as they do: Xavier-uniform with gain sqrt(2), zero bias; the positions normal(0, 0.02), as RoBERTa's did.

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
        with in_fp32(x):
            tokens = self.project(x)  # (B, C, L) -> (B, D, N)
        return self.norm(tokens.transpose(1, 2)) + self.positions  # (B, N, D)


def initialise(embedder, source, init):
    """Start the target embedder: the one option that means the same in every method.

    "copy", 2D: projection, bias and LayerNorm of the pretrained embedder; for C != 3 channels its 3 input slices are tiled
    and cut to C, not rescaled (the official codes' way). 1D: LayerNorm and the first N positions of the pretrained
    embedder; the projection stays random, since words have none.
    "random" leaves the constructor's values.
    "truncated" is what ORCA's release gives to its naive fine-tuning only. 2D: normal(0, 0.02) cut at two units. 1D: the
    positions alone are copied (the release's list of layers to draw again lacks Conv1d).
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
    """The target embedder of samples of `shape`, (C, H, W) or (C, L), in front of `source`, started by `initialise`.

    Args:
        max_tokens: of a 1D task; never more than the backbone has positions.
    Raises: UserError for a 1D task with a Swin, or a 2D task with a text model.
    """
    modality = "2d" if len(shape) == 3 else "1d"
    if source.modality != modality:
        fitting = " or ".join(dict.fromkeys(DEFAULT_BACKBONE[modality, scale] for scale in ("tiny", "full")))
        kinds = {"1d": "a text model, for 1D tasks", "2d": "a Swin, for 2D tasks"}
        raise UserError(
            f"--backbone: {source.name} is {kinds[source.modality]}; this one has samples {' x '.join(map(str, shape))}.\n"
            f"Give {fitting}, or leave --backbone out."
        )
    if modality == "2d":
        return initialise(Embedder2d(shape[0], source.token_width, source.size), source, init)
    return initialise(Embedder1d(*shape, source.token_width, min(max_tokens, source.positions)), source, init)


class ClassPredictor(nn.Module):
    """Mean over the tokens, then one linear map: (B, n, F) -> (B, K)."""

    def __init__(self, width, classes):
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features):
        return self.linear(features.mean(1))  # (B, n, F) -> (B, F) -> (B, K)


class DensePredictor2d(nn.Module):
    """Every feature becomes a square of 3-channel pixels, averaged down (or spread) to the field: (B, n, F) -> (B, *out).

    The one trained map is F -> 3 factor^2, a 1 x 1 convolution. The average over channels, 3 -> c, has overlapping windows
    where 3 is no multiple of c, as the official code's has.

    Args:
        width: F.
        out: (H, W), or (c, H, W).
        factor: side of a square, so that the squares cover the pictures the backbone was built for (32 for every full Swin).
    """

    def __init__(self, width, out, factor=32):
        super().__init__()
        self.out, self.factor = tuple(out), factor
        self.linear = nn.Linear(width, 3 * factor**2)

    def forward(self, features):
        side = round(features.shape[1] ** 0.5)
        with in_fp32(features):
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
        pooling: False, a learned linear map F -> c k, as the papers' text has it. True, the released head: averages of
            groups of features, nothing learned.
    """

    def __init__(self, width, out, stack, pooling=False):
        super().__init__()
        self.channels, self.stack = out[0], stack
        self.head = nn.AdaptiveAvgPool1d(out[0] * stack) if pooling else nn.Linear(width, out[0] * stack)

    def forward(self, features):
        with in_fp32(features):
            x = self.head(features.float()).unflatten(2, (self.channels, self.stack))  # (B, N, F) -> (B, N, c, k)
        return x.transpose(1, 2).flatten(2)  # (B, c, N k)


def make_predictor(output, target, source, embedder, pooling=False):
    """The predictor of a task: class scores, or a field.

    Args:
        output: shape of one prediction: (K,); (H, W) or (c, H, W); (c, L_out).
        target: "class", "labels" or "field".
        pooling: the released head of 1D fields, see `DensePredictor1d`.
    Raises: ValueError if a 1D field is no whole number of time steps for every token.
    """
    if target != "field":
        return ClassPredictor(source.feature_width, output[0])
    if source.modality == "2d":
        return DensePredictor2d(source.feature_width, output, source.encoder.reduction)
    if output[1] % embedder.tokens:
        raise ValueError(f"{embedder.tokens} tokens cannot predict {output[1]} time steps: not a whole number each")
    return DensePredictor1d(source.feature_width, output, output[1] // embedder.tokens, pooling)


def set_dropout(encoder, p):
    """Dropout of every layer that has any; stochastic depth, which is none, stays. Returns the encoder."""
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return encoder


def checkpoint_blocks(encoder):
    """Keep only what enters each block of the encoder; what is inside is worked out again in the backward pass.

    A block reads its own parameters again then: not for torch.func.functional_call, which has put them back.
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


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: a pretrained Swin or RoBERTa, cut into its embedder and its encoder. The only place that knows the insides of
# timm and transformers.
# ---------------------------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).parent / "weights"
SHORT_NAMES = {
    "swin_base": "swin_base_patch4_window7_224.ms_in22k",  # the papers' backbones
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in22k",
    "roberta_base": "FacebookAI/roberta-base",
}
DEFAULT_BACKBONE = {
    ("2d", "tiny"): "tiny-swin", ("2d", "full"): "swin_base",
    ("1d", "tiny"): "tiny-roberta", ("1d", "full"): "roberta_base",
}  # fmt: skip
BERT_LIKE = ("bert", "camembert", "roberta", "xlm-roberta")  # transformers' names of the architectures that can be cut
ROBERTA_BASE = dict(model_type="roberta", vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                    intermediate_size=3072, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)  # fmt: skip


class SwinEncoder(nn.Module):
    """The stages of a Swin and its last LayerNorm: (B, N, D) -> (B, n, F)."""

    def __init__(self, swin):
        super().__init__()
        self.grid = swin.patch_embed.grid_size
        self.reduction = swin.feature_info[-1]["reduction"]  # side of the picture / side of the last grid
        self.layers, self.norm = swin.layers, swin.norm

    @property
    def blocks(self):
        return [block for stage in self.layers for block in stage.blocks]

    def forward(self, tokens):
        x = tokens.unflatten(1, self.grid)  # (B, N, D) -> (B, H/4, W/4, D)
        return self.norm(self.layers(x)).flatten(1, 2)  # (B, n, F)


class TextEncoder(nn.Module):
    """The layers of a BERT-like model, which read tokens of any origin: (B, N, D) -> (B, N, F), F = D; nothing is masked."""

    def __init__(self, model):
        super().__init__()
        self.layers = model.encoder

    @property
    def blocks(self):
        return list(self.layers.layer)

    def forward(self, tokens):
        return self.layers(tokens)[0]  # (B, N, D) -> (B, N, F)


class Tokenizer:
    """Words to token ids, with a text model's own vocabulary: list[str] -> list[int], without <s> and </s>.

    `pad` is the id that fills a short sequence. `load` fetches the vocabulary, at first use: only text sources need it.
    """

    def __init__(self, load):
        self.load = load

    @functools.cached_property
    def vocabulary(self):
        return self.load()

    @property
    def pad(self):
        return self.vocabulary.pad_token_id

    def __call__(self, words):
        return self.vocabulary(words, is_split_into_words=True, add_special_tokens=False).input_ids


@dataclass
class Source:
    """A pretrained model in two parts: its own embedder, frozen, and the encoder that is going to be adapted."""

    name: str
    modality: Literal["2d", "1d"]  # a Swin, or a text model
    embedder: nn.Module  # pictures (B, 3, H, W), or token ids (B, N), to tokens (B, N, D)
    encoder: nn.Module
    token_width: int  # D
    feature_width: int  # F
    size: int | None = None  # 2D: side of the pictures it was built for
    positions: int | None = None  # 1D: the most tokens it can read
    tokenizer: Tokenizer | None = None  # 1D: words to token ids


def reason(error):
    """The first line of an exception's message."""
    return (str(error) or type(error).__name__).splitlines()[0][:90]


def build_swin(**architecture):
    """A timm SwinTransformer with random weights; `architecture` are its constructor's arguments."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(**architecture)


def import_timm():
    """timm, or two lines of advice where torch and torchvision do not belong together."""
    try:
        import timm
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        from importlib.metadata import version

        raise UserError(f"torch {version('torch')} and torchvision {version('torchvision')} do not fit together ({error}).\n"
                        "Install both from one index: pip install --force-reinstall torch torchvision") from error  # fmt: skip
    return timm


def import_transformers():
    """transformers, without progress bars, notes on weights that are not used here, or a line for each retry of a download."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    return transformers


def read_file(path):
    """What a file of tools/pretrain.py holds: its architecture, its vocabulary (None for a Swin), its weights in fp32."""
    if not path.exists():
        raise UserError(f"--backbone: there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        weights = {k: v.float() for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}).\nRestore it, or write it again with tools/pretrain.py."
        ) from error
    if "architecture" not in metadata:
        raise UserError(
            f"{path} does not say its architecture.\n"
            "Give a file of tools/pretrain.py, a timm name, a Hugging Face id, or a folder saved by timm or transformers."
        )
    return json.loads(metadata["architecture"]), metadata.get("tokenizer"), weights


def read_swin(path, pretrained=True):
    """A Swin from a file of tools/pretrain.py, which carries its architecture."""
    architecture, _, weights = read_file(path)
    swin = build_swin(**architecture)
    if pretrained:
        swin.load_state_dict(weights)
    return swin


def read_roberta(path, pretrained=True):
    """A RoBERTa and its tokenizer from a file of tools/pretrain.py, which carries its architecture and its vocabulary."""
    transformers = import_transformers()
    architecture, vocabulary, weights = read_file(path)
    model = transformers.RobertaModel(transformers.RobertaConfig(**architecture), add_pooling_layer=False)
    if pretrained:
        model.load_state_dict({k.removeprefix("roberta."): v for k, v in weights.items() if k.startswith("roberta.")})

    def load():
        from tokenizers import Tokenizer as Rules

        return transformers.PreTrainedTokenizerFast(tokenizer_object=Rules.from_str(vocabulary), pad_token="<pad>")

    return model, Tokenizer(load)


def fetch_text_model(name, wanted, pretrained):
    """A BERT-like model and its tokenizer by Hugging Face id, from a folder saved by transformers, or RoBERTa-base unfetched.

    Dropout is 0, as in the official configurations. Raises UserError for another architecture, or if nothing can be had.
    """
    transformers = import_transformers()
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if wanted == SHORT_NAMES["roberta_base"] and not pretrained:
        # no network is needed to measure speed: words are read with the vocabulary that is here, which is smaller
        _, tokenizer = read_roberta(WEIGHTS / "tiny-roberta.safetensors", pretrained=False)
        config = transformers.RobertaConfig(**ROBERTA_BASE | no_dropout)
        return transformers.RobertaModel(config, add_pooling_layer=False), tokenizer
    if wanted.startswith((".", "/", "~")) and not Path(wanted).is_dir():
        raise UserError(f"--backbone: there is no folder {wanted}.")
    try:
        config = transformers.AutoConfig.from_pretrained(wanted, **no_dropout)
        if config.model_type not in BERT_LIKE:
            raise UserError(
                f"--backbone: {name} is a {config.model_type} model, which cannot be cut into embedder and encoder.\n"
                f"Give one of these kinds: {', '.join(BERT_LIKE)}."
            )
        if pretrained:
            model = transformers.AutoModel.from_pretrained(wanted, config=config, dtype=torch.float32)
        else:
            model = transformers.AutoModel.from_config(config)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # no such id, no weights, no network
        raise UserError(
            f"--backbone: the weights of {wanted} cannot be had ({reason(error)}).\n"
            "Give a folder that holds them, tiny-roberta, or random:roberta_base to measure speed only."
        ) from error

    def load():
        try:
            vocabulary = transformers.AutoTokenizer.from_pretrained(wanted, add_prefix_space=True)
            if len(vocabulary) <= len(vocabulary.all_special_ids):  # transformers makes an empty one where there is none
                raise ValueError("it has no words")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--backbone: {wanted} comes without its tokenizer, which a text source needs ({reason(error)}).\n"
                "Save it beside the model: tokenizer.save_pretrained(folder)."
            ) from error
        return vocabulary

    return model, Tokenizer(load)


def first_position(embeddings):
    """The row of the position table that a text's first token takes: 0 for BERT; RoBERTa's rows begin after its padding's."""
    padding = embeddings.position_embeddings.padding_idx
    return 0 if padding is None else padding + 1


def is_text_model(short, path):
    """Does `short` name a text model? Known by its file's architecture, its folder's config.json, or a slash (an id)."""
    if path.suffix == ".safetensors":
        return "model_type" in read_file(path)[0]
    if path.is_dir():
        config = path / "config.json"
        return config.exists() and '"model_type"' in config.read_text()
    return "/" in SHORT_NAMES.get(short, short) and not short.startswith("hf-hub:")


def load_source(name, pretrained=True):
    """The backbone `name` as a Source.

    Args:
        name: for 2D tasks "tiny-swin", "swin_base", "swin_tiny", any timm Swin, a folder saved by timm (config.json,
            model.safetensors). For 1D tasks "tiny-roberta", "roberta_base", a Hugging Face id ("owner/name") of a BERT-like
            model, a folder saved by transformers. For both a .safetensors file of tools/pretrain.py. "random:NAME" is NAME
            with random weights, for measuring speed where no weights can be had.
        pretrained: False builds the same network with random weights.
    Raises: UserError for a name nobody knows, a damaged file, a model that cannot be cut, a hub that does not answer.
    """
    short = name.removeprefix("random:")
    pretrained = pretrained and short == name
    path = Path(short)
    if (WEIGHTS / f"{short}.safetensors").exists():
        path = WEIGHTS / f"{short}.safetensors"
    from_file, wanted = path.suffix == ".safetensors", SHORT_NAMES.get(short, short)
    if is_text_model(short, path):
        model, tokenizer = read_roberta(path, pretrained) if from_file else fetch_text_model(name, wanted, pretrained)
        table = model.embeddings.position_embeddings
        embedder, width = model.embeddings.requires_grad_(False), table.embedding_dim
        positions = table.num_embeddings - first_position(embedder)
        return Source(name, "1d", embedder, TextEncoder(model), width, width, positions=positions, tokenizer=tokenizer)
    swin = read_swin(path, pretrained) if from_file else fetch_swin(short, wanted, pretrained)
    if not hasattr(swin, "layers") or not hasattr(swin, "patch_embed"):
        raise UserError(
            f"--backbone: {name} is a {type(swin).__name__}; only Swin transformers can be cut into embedder and encoder."
        )
    patches, size = swin.patch_embed, swin.patch_embed.img_size[0]
    embedder = Embedder2d(3, swin.embed_dim, size, patches.patch_size[0])
    embedder.project.load_state_dict(patches.proj.state_dict())
    embedder.norm.load_state_dict(patches.norm.state_dict())
    return Source(name, "2d", embedder.requires_grad_(False), SwinEncoder(swin), swin.embed_dim, swin.num_features, size)


def fetch_swin(short, wanted, pretrained):
    """A timm model by name, or from a folder saved by timm. Raises UserError if nobody knows it, or it cannot be had."""
    timm = import_timm()
    folder = Path(short).is_dir()
    if not folder and not timm.is_model(wanted) and not short.startswith("hf-hub:"):
        known = ", ".join(sorted({p.stem for p in WEIGHTS.glob("*.safetensors")}) + list(SHORT_NAMES))
        raise UserError(
            f"--backbone: no model is called {short!r}. Known here: {known}; any timm Swin; owner/name on Hugging Face; a path."
        )
    try:
        return timm.create_model(f"local-dir:{short}" if folder else wanted, pretrained=pretrained)
    except (OSError, ValueError, RuntimeError) as error:  # no such tag, no weights, no network
        raise UserError(
            f"--backbone: the weights of {wanted} cannot be had ({reason(error)}).\n"
            f"Give a folder that holds them, tiny-swin, or random:{short} to measure speed only."
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Distances between data sets
# ---------------------------------------------------------------------------------------------------------------------


def squared_distances(x, x2):
    """|x_i - x'_j|^2 = |x_i|^2 - 2 <x_i, x'_j> + |x'_j|^2, one matrix product. (n, D), (m, D) -> (n, m)

    Both clouds are moved to their common centre first: far from the origin the three terms would cancel in fp32.
    """
    centre = torch.cat([x, x2]).detach().mean(0)
    x, x2 = x - centre, x2 - centre
    return ((x * x).sum(1)[:, None] - 2 * x @ x2.T + (x2 * x2).sum(1)[None]).clamp(min=0)


def exact_cost(cost, a, b):
    """min over plans pi of <pi, cost>: POT's network simplex, in fp64 on the CPU. The gradient is the plan. (n, m) -> scalar"""
    import ot

    pi = ot.emd(*(t.detach().double().cpu().numpy() for t in (a, b, cost)), numItermax=10**9)
    return (torch.from_numpy(pi).to(cost) * cost).sum()


def entropic_cost(cost, a, b, reg, same=False, info=None, tolerance=1e-3, most=5000):
    """Entropic transport costs of a batch of problems (Sinkhorn), in the log domain, until the marginals hold.

        OT_reg = min over plans pi of <pi, cost> + reg KL(pi | a b^T) = max over f, g of <a, f> + <b, g>
        f_i = -reg log sum_j b_j exp((g_j - cost_ij) / reg),   g likewise,   pi_ij = a_i b_j exp((f_i + g_j - cost_ij) / reg)

    reg comes down from the largest cost by quarters. At the last one, each round of two updates in the log domain is
    followed by twenty of the plan's row and column sums, which cost a matrix-vector product each. No gradient goes through
    the iterations: by the envelope theorem d OT_reg = <pi, d cost>.

    Args:
        cost (..., n, m), a (..., n), b (..., m): weights of 0 are padding.
        same: both sides are one; then f = g, and the average of f and its update converges in a few iterations.
        tolerance, most: stop at this L1 distance between the plan's marginal and a (the worst of the batch), or with a
            warning after so many iterations.
        info: a dict; "iterations" and "error" (of the marginal) of the worst problem it was handed to are kept in it.
    Returns: (...), differentiable in cost.
    """
    shape = cost.shape[:-2]
    cost, a, b = cost.reshape(-1, *cost.shape[-2:]), a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])  # P problems
    with torch.no_grad():
        f_all, g_all, errors = torch.zeros_like(a), torch.zeros_like(b), torch.ones_like(a[:, 0])
        c, log_a, log_b, f, g = cost, a.log(), b.log(), f_all, g_all  # of the problems that go on; log 0 = -inf: padding
        todo, high, iterations = torch.arange(len(cost), device=cost.device), float(cost.max()), 0
        while len(todo) and iterations < most:
            at = max(high, reg)
            for _ in range(10 if same and at == reg else 1):
                new_f = -at * ((g[:, None] - c) / at + log_b[:, None]).logsumexp(2)  # (P, n)
                f = (f + new_f) / 2 if same else new_f
                g = f if same else -at * ((f[:, :, None] - c) / at + log_a[:, :, None]).logsumexp(1)  # (P, m)
                iterations += 1
            high /= 4
            if at > reg:
                continue
            pi = ((f[:, :, None] + g[:, None] - c) / reg + log_a[:, :, None] + log_b[:, None]).exp()  # (P, n, m)
            f_all[todo], g_all[todo], errors[todo] = f, g, (pi.sum(2) - a[todo]).abs().sum(1)
            going = errors[todo] > tolerance
            if not going.all():
                todo, c, log_a, log_b, f, g, pi = (t[going] for t in (todo, c, log_a, log_b, f, g, pi))
            if not same:
                v = torch.ones_like(g)
                for _ in range(20):
                    u = (log_a.exp() / (pi @ v[:, :, None])[:, :, 0].clamp(min=1e-30)).clamp(1e-10, 1e10)  # (P, n)
                    v = (log_b.exp() / (u[:, None] @ pi)[:, 0].clamp(min=1e-30)).clamp(1e-10, 1e10)  # (P, m)
                f, g, iterations = f + reg * u.log(), g + reg * v.log(), iterations + 20
        value = (a * f_all).sum(1) + (b * g_all).sum(1)  # (P,)
        pi = ((f_all[:, :, None] + g_all[:, None] - cost) / reg + a.log()[:, :, None] + b.log()[:, None]).exp()
        error = float(errors.max())
    if error > tolerance:
        warnings.warn(
            f"Sinkhorn stopped after {iterations} iterations, its marginal off by {error:.1e}: raise reg", stacklevel=2
        )
    if info is not None:
        info["iterations"], info["error"] = max(iterations, info.get("iterations", 0)), max(error, info.get("error", 0.0))
    slope = (pi * cost).sum((1, 2))
    return (slope + (value - slope).detach()).view(shape)


class OtddTerms:
    """What in `otdd` depends on one side only, so that a source which stays the same is worked out once.

    Its samples x (n, D) and their mass a (n,); the class of each (n,), numbered from 0; the members (K, m) and weights (K, m)
    of each class, padded; and, as far as `inner` and `reg` ask for them, the means and covariance factors of the classes, their
    distances W^2 (K, K) from each other, and the transport cost of the side to itself.
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
        self.mass = torch.full_like(x[:, 0], 1 / len(x)).detach() if mass is None else (mass / mass.sum()).to(x)
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
                self.own = class_costs(d, self, self, every, every, same=True)  # (K,): OT_reg of each class to itself
            cost = d / 2
            if inner != "none" and K > 1:
                i, j = torch.triu_indices(K, K, 1, device=device)
                w = torch.zeros(K, K, device=device, dtype=x.dtype).index_put((i, j), label_distances(d, self, self, i, j))
                cost = cost + (w + w.T)[self.index][:, self.index] / 2  # (n, n)
            self.self_cost = entropic_cost(cost, self.mass, self.mass, reg, same=True, info=info)


def class_costs(d, left, right, i, j, same=False):
    """Transport costs from class i_p of the left side to class j_p of the right one, for all pairs p. d (n, m) -> (pairs,)"""
    reg, info = left.reg, left.info if same else right.info
    if reg > 0:
        blocks = d[left.members[i][:, :, None], right.members[j][:, None, :]]  # (pairs, m_left, m_right)
        return entropic_cost(blocks, left.weights[i], right.weights[j], reg, same, info)
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
        slope = (vectors * torch.where(kept, 0.5 / roots, 0)[:, None]) @ vectors.mT
    trace = (slope * G).sum((-2, -1))
    trace = (trace + (roots.sum(-1) - trace).detach()).to(L)
    means = (left.mean[i] - right.mean[j]).square().sum(-1)
    return means + root_s.square().sum((-2, -1)) + L.square().sum((-2, -1)) - 2 * trace


def otdd(x_s, y_s, x_t, y_t, inner="exact", reg=0.0, mass_t=None, terms_s=None, info=None):
    """Optimal transport distance between two labelled data sets (Alvarez-Melis and Fusi 2020), as ORCA uses it.

        OTDD = min over plans pi of sum_ij pi_ij C_ij,     C_ij = 1/2 |x_i - x_j|^2 + 1/2 W^2(y_i, y_j)

    W^2(y, y') is the transport cost between the samples of the two classes for |x - x'|^2 (both halves, and none in W^2, are
    the official constants). reg = 0: linear programmes. reg > 0: OT_reg(s, t) - 1/2 OT_reg(s, s) - 1/2 OT_reg(t, t), for the
    data sets and for the classes alike. The gradient is that of the value, label distances included.

    Args:
        x_s (n, D), x_t (m, D): features, any float. y_s (n,), y_t (m,): integers; only which are equal matters.
        inner: "exact"; "gaussian": W^2 between the normal distributions of the classes; "none": W^2 = 0.
        reg: entropic strength, in units of the cost; ORCA's is 0.1. 0 needs POT, runs on the CPU, and grows faster with n m.
        mass_t (m,): weights of the target samples, equal within a class. Default: all equal.
        terms_s: OtddTerms(x_s, y_s, inner, reg), worked out before.
        info: a dict that gets the "iterations" and the marginal "error" of the worst problem, if reg > 0.
    Returns: a scalar, differentiable in x_s and x_t; 0 if both sets are one. A class of one sample is a point mass.
    Raises: ValueError for empty sets, NaN, shapes or types that do not fit.
    """
    if x_s.shape[-1] != x_t.shape[-1]:
        raise ValueError(f"the source has width {x_s.shape[-1]}, the target {x_t.shape[-1]}")
    s = terms_s or OtddTerms(x_s, y_s, inner, reg, info=info)
    if len(s.x) != len(x_s) or (s.inner, s.reg) != (inner, reg):
        raise ValueError(f"terms_s are those of {len(s.x)} samples, inner = {s.inner!r}, reg = {s.reg}")
    t = OtddTerms(x_t, y_t, inner, reg, mass_t, info)
    d = squared_distances(s.x, t.x)  # (n, m)
    cost = d / 2
    if inner != "none":
        i, j = torch.cartesian_prod(*(torch.arange(len(side.members), device=d.device) for side in (s, t))).T
        w = label_distances(d, s, t, i, j).view(len(s.members), len(t.members))  # (K_s, K_t)
        cost = cost + w[s.index][:, t.index] / 2
    if reg == 0:
        return exact_cost(cost, s.mass, t.mass)
    return entropic_cost(cost, s.mass, t.mass, reg, info=info) - (s.self_cost + t.self_cost) / 2


def class_labels(split, k=10, seed=0):
    """The class of every sample of a data.Split; where there are no classes, the cluster of its target by k-means.

    Fields and multi-label targets are flattened, as in the official code; unknown values (NaN) count as 0. More than 10,000
    samples, or targets read from files, go through mini-batch k-means, a chunk at a time.

    Returns: (n,) int64 on the split's device.
    """
    if split.target == "class":
        return split.y
    from sklearn.cluster import KMeans, MiniBatchKMeans

    chunks = torch.arange(len(split), device=split.device).split(1000)
    flat = lambda index: split.targets(index).flatten(1).nan_to_num().float().cpu().numpy()  # (1000, everything)
    if len(split) <= 10_000 and not split.lazy:
        kmeans = KMeans(min(k, len(split)), n_init=3, random_state=seed).fit(np.concatenate([flat(index) for index in chunks]))
    else:
        kmeans = MiniBatchKMeans(min(k, len(split)), random_state=seed)
        for index in chunks:
            kmeans.partial_fit(flat(index))
    return torch.from_numpy(np.concatenate([kmeans.predict(flat(index)) for index in chunks])).long().to(split.device)


def mmd(x, x2):
    """Squared maximum mean discrepancy, biased estimator, as in ORCA's code. (n, D), (m, D) -> scalar

        mean(K_xx) + mean(K_x'x') - 2 mean(K_xx'),   K = sum_i exp(-|x - x'|^2 / (c_i b)),   c = 1/4, 1/2, 1, 2, 4

    The bandwidth b is the mean squared distance between different samples of the union, held constant.
    """
    n, m = len(x), len(x2)
    both = torch.cat([x, x2])
    d = squared_distances(both, both)  # (n + m, n + m)
    bandwidth = (d.detach().sum() / ((n + m) ** 2 - (n + m))).clamp(min=1e-30)
    K = sum(torch.exp(-d / (c * bandwidth)) for c in (0.25, 0.5, 1, 2, 4))
    return K[:n, :n].mean() + K[n:, n:].mean() - 2 * K[:n, n:].mean()


def l2(x, x2):
    """Mean Euclidean distance of samples paired by position. (..., n, D), (..., n, D) -> scalar"""
    return (x - x2).norm(dim=-1).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(module, args):
    """The recipe's optimizer on the parameters that train: one learning rate, weight decay on all, as the official codes."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    Adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return Adam(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)


def make_schedule(optimizer, args, steps):
    """Linear warm-up, then linear to 0 at decay_epochs; advanced once per optimizer step, `steps` of them in an epoch.

        factor(t) = min((t + 1) / W, (T - t) / (T - W)),   W = warmup_epochs steps,  T = decay_epochs steps

    The official WarmupLR counts micro-batches and spends its first one at rate 0.
    """
    W, T = args.warmup_epochs * steps, args.decay_epochs * steps
    factor = lambda t: max(0.0, min((t + 1) / max(W, 1), (T - t) / max(T - W, 1)))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: each has its share of the samples, every one works out the same loss on all of them
# ---------------------------------------------------------------------------------------------------------------------


def processes():
    """This process's number and how many there are: (rank, G), (0, 1) without torchrun."""
    there_are = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there_are else (0, 1)


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes, on each. So is its derivative, which can be derived again."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient)


def share(x):
    """The rows of x (n, ...) that this process works on: every G-th, as `data.Split.batches` deals them out."""
    rank, world = processes()
    return x[rank::world]


def gather(x, n=None):
    """What `share` dealt out, together in order, with a gradient: (n / G, ...) -> (n, ...). n: where G does not divide it.

    A loss on the gathered rows is the loss on all samples, the same in every process. Backward, each process gets G times its
    own rows' part of the gradient, and `average` makes the whole gradient of what all of them share, as for
    DistributedDataParallel.
    """
    rank, world = processes()
    if world == 1:
        return x
    rows = x.new_zeros(n or len(x) * world, *x.shape[1:])
    rows[rank::world] = x
    return SumOverProcesses.apply(rows)  # the others' rows are 0 here: the sum is exact


def average(tensors):
    """The means of tensors over the processes, with a gradient."""
    world = processes()[1]
    return list(tensors) if world == 1 else [SumOverProcesses.apply(x) / world for x in tensors]


# ---------------------------------------------------------------------------------------------------------------------
# Run keeping: processes, device, seeds, folder, checkpoints
# ---------------------------------------------------------------------------------------------------------------------

LOG_EVERY = 20  # steps between two looks at the loss: each look waits for the device


def write(path, content):
    """Write bytes under a temporary name, then rename: a killed run never leaves half a file."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    part.replace(path)


def seed_everything(*numbers):
    """Seed torch from (seed, epoch, process). Each epoch draws from its own seed, so a resumed run repeats it exactly."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def mean_loss(losses, split, step, epoch, args):
    """Mean of the last LOG_EVERY losses up to `step`: the one place in the loop where the host waits for the device.

    Raises UserError when one is not finite, naming the step and the training samples of its batch.
    """
    first = step // LOG_EVERY * LOG_EVERY
    recent = losses[first : step + 1].tolist()
    for i, loss in enumerate(recent):
        if loss - loss != 0:  # inf or nan
            order, _ = split.plan(len(losses), args.batch_size, args.seed, epoch)
            samples = order[first + i].tolist()
            raise UserError(
                f"the loss is {loss} at step {first + i} of epoch {epoch + 1}, on training samples {samples[:8]}...\n"
                "Start again in another --out-dir with a lower --lr or --clip 1: a resumed run would meet it again."
            )
    return sum(recent) / len(recent)


class Run:
    """One run: its processes and device, its options filled in, and its folder.

    `torchrun` sets RANK and WORLD_SIZE; without them the same lines describe a single process.
    """

    def __init__(self, args, method):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            torch.distributed.init_process_group("nccl" if cuda else "gloo")
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # one voice
        scale = ("full" if cuda else "tiny") if args.scale == "auto" else args.scale
        modality = data.find_task(args.task).modality
        args = replace(args, scale=scale, backbone=args.backbone or DEFAULT_BACKBONE[modality, scale])
        self.args, self.method = data.complete(args, method, scale), getattr(args, "mode", method)
        if self.args.batch_size % self.world:
            raise UserError(f"--batch-size {self.args.batch_size} cannot be shared by {self.world} processes.")
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.precision = "bf16 autocast" if bf16 else "fp32"
        self.history, self.best, self.best_epoch, self.seconds = [], float("inf"), -1, 0.0
        self.stage1 = []  # a row for each epoch of a method's first stage
        seed_everything(self.args.seed)

    def open(self, *splits):
        """Make the run's folder; False if the run there is finished. `splits` it trains on: toy runs say so in their name.

        Raises UserError if the folder holds another run, or this one without --resume.
        """
        args, kinds = self.args, [split.kind for split in splits]
        identity = asdict(args) | {"data": kinds, "samples": [len(split) for split in splits]}
        self.kind = "toy" if "toy" in kinds else kinds[0]
        toy = "-toy" if self.kind == "toy" else ""
        backbone = Path(args.backbone).name.replace(":", "_").removesuffix(".safetensors")
        self.folder = Path(args.out_dir) / f"{args.task}-{self.method}-{backbone}-s{args.seed}{toy}"
        self.result_file, self.last, self.best_file = (self.folder / n for n in ("result.json", "last.pt", "best.safetensors"))
        self.stage1_file = self.folder / "stage1.safetensors"
        if any(file.exists() for file in (self.stage1_file, self.last, self.result_file)):
            if not args.resume:
                state = "a finished run: see result.json" if self.result_file.exists() else "a run already: go on with --resume"
                raise UserError(f"{self.folder} holds {state}.\nOr choose another --out-dir, or remove the folder.")
            before = json.loads((self.folder / "args.json").read_text())
            free = ("resume", "out_dir", "data_dir")  # what may change without changing the result
            other = [
                f"{k} was {before.get(k)!r}, now {v!r}"
                for k, v in identity.items()
                if k not in free and before.get(k) != json.loads(json.dumps(v))
            ]
            if other:
                raise UserError(
                    f"{self.folder} holds another run: {'; '.join(other[:4])}.\n"
                    "Repeat its options, or choose another --out-dir."
                )
        if self.result_file.exists():
            print(f"{self.result_file.read_text()}\nfinished before: {self.result_file}")
            return False
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "args.json", json.dumps(identity, indent=1).encode())
        if self.world > 1:
            torch.distributed.barrier()  # nobody writes what a slower process would take for an earlier run
            if not (self.folder / "args.json").exists():
                raise UserError(f"{args.out_dir} is another folder here than on the first node: give one that all nodes share.")
        processes = f", {self.world} processes" * (self.world > 1)
        print(f"run     {self.folder}  ({args.scale} scale, {self.device.type}, {self.precision}{processes})")
        return True

    @contextlib.contextmanager
    def first(self):
        """The first process goes ahead (it fills caches), the others follow."""
        if self.rank > 0:
            torch.distributed.barrier()
        yield
        if self.rank == 0 and self.world > 1:
            torch.distributed.barrier()

    def autocast(self):
        """bf16 for the encoder's matrix products on CUDA; what reads and writes fields, losses and distances stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32")

    def distribute(self, module):
        """On the device, and gradients averaged over the processes if there are several.

        Parameters may go unused (PaRe's gate once k is 0), which DistributedDataParallel has to be told. Buffers are constants
        (window indices): they need not be sent before every step.
        """
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"model   {trained / 1e6:.2f}M of {sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters train")
        module = module.to(self.device)
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def keep_stage1(self, rows, **modules):
        """A method's first stage is over: keep its weights and its rows of numbers, one row an epoch, in one file."""
        self.stage1 = rows
        if self.rank == 0:
            weights = {f"{name}.{k}": v.contiguous() for name, m in modules.items() for k, v in m.state_dict().items()}
            write(self.stage1_file, to_safetensors(weights, {"rows": json.dumps(rows)}))
            self.write_history()

    def restore_stage1(self, **modules):
        """Load what `keep_stage1` kept; False if there is nothing yet."""
        if not self.stage1_file.exists():
            return False
        try:
            with safe_open(self.stage1_file, "pt") as file:
                self.stage1 = json.loads(file.metadata()["rows"])
            weights = load_file(self.stage1_file)
            for name, module in modules.items():
                module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{self.stage1_file} is no first stage of this run ({reason(error)}).\nRemove the folder to start over."
            ) from error
        print(f"resumed after stage 1, {len(self.stage1)} epochs")
        return True

    def accumulating(self, module, step_follows):
        """Gradients travel between processes only on the micro-batch that an optimizer step follows."""
        return contextlib.nullcontext() if self.world == 1 or step_follows else module.no_sync()

    @torch.compiler.set_stance("force_eager")  # its last batch is smaller: not worth compiling again
    @torch.no_grad()
    def evaluate(self, model, split, task):
        """The task's metric of `model` on a whole split, each process its share, computed once on all samples."""
        model.eval()
        out, y = [], []
        chunk = min(split.chunk, max(1, 4 * self.args.batch_size // self.world))  # no more memory than a training step needs
        for index in torch.arange(len(split), device=self.device)[self.rank :: self.world].split(chunk):
            with self.autocast():
                out.append(model(split.inputs(index)).float().cpu())
            y.append(split.targets(index).cpu())
        out, y = torch.cat(out).numpy(), torch.cat(y).numpy()
        if self.world > 1:
            shares = [None] * self.world
            torch.distributed.all_gather_object(shares, (out, y))
            out, y = (np.concatenate(parts) for parts in zip(*shares, strict=True))
        return task.score(out, y)

    def resume(self, net, optimizer, schedule):
        """Load the last finished epoch if there is one; the number of the epoch to go on with."""
        if not self.last.exists():
            return 0
        try:
            state = torch.load(io.BytesIO(self.last.read_bytes()), map_location=self.device, weights_only=True)
            if state["run"] != self.folder.name:
                raise ValueError(f"it belongs to {state['run']}")
            getattr(net, "module", net).load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{self.last} is no checkpoint of this run ({reason(error)}).\nRemove the folder to start over."
            ) from error
        self.history, self.best, self.best_epoch, self.seconds = (
            state[k] for k in ("history", "best", "best_epoch", "seconds")
        )
        print(f"resumed after epoch {len(self.history)}")
        return len(self.history)

    def end_epoch(self, net, model, optimizer, schedule, row):
        """Print and keep one line of metrics.jsonl; keep the best model by `val` and everything that is needed to go on.

        Raises UserError, and keeps nothing, when `val` is not finite.
        """
        epoch = len(self.history)
        if not math.isfinite(row["val"]):
            raise UserError(
                f"the error on validation is {row['val']} after epoch {epoch + 1}.\n"
                "Start again in another --out-dir with a lower --lr or --clip 1: a resumed run would meet it again."
            )
        self.history.append({"epoch": epoch + 1, **row})
        self.seconds += row["seconds"]
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.history[-1].items()), flush=True
        )
        improved = row["val"] < self.best  # every metric is an error
        if improved:
            self.best, self.best_epoch = row["val"], epoch + 1
        if self.rank > 0:
            return
        if improved:
            write(self.best_file, to_safetensors({k: v.contiguous() for k, v in model.state_dict().items()}))
        state = {
            "run": self.folder.name,
            "net": getattr(net, "module", net).state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": self.history,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(self.last, buffer.getvalue())
        self.write_history()

    def write_history(self):
        rows = [{"stage": 1, **row} for row in self.stage1] + self.history
        write(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def finish(self, model, loaded, source=None):
        """Test the last and the best checkpoint; write result.json and curves.png. Returns the result."""
        args, task = self.args, loaded.task
        test = test_last = self.evaluate(model, loaded.test, task)
        if self.best_epoch < len(self.history):
            if self.world > 1:
                torch.distributed.barrier()  # the best checkpoint is on disk
            model.load_state_dict(load_file(self.best_file, device=str(self.device)))
            test = self.evaluate(model, loaded.test, task)
        seen = len(self.history) * (len(loaded.train) // args.batch_size or 1) * args.batch_size
        root = Path(__file__).parent
        git = shutil.which("git")
        head = [git, "-C", root, "rev-parse", "--short", "HEAD"]
        commit = git and subprocess.run(head, capture_output=True, text=True).stdout.strip()
        result = {
            "task": args.task, "method": self.method, "scale": args.scale, "backbone": args.backbone, "source": source,
            "data": self.kind, "seed": args.seed, "metric": task.metric, "direction": task.direction,
            "test": test, "test_last": test_last,
            "val": self.best, "best_epoch": self.best_epoch, "epochs": args.epochs, "n_train": len(loaded.train),
            "seconds": round(self.seconds + sum(row["seconds"] for row in self.stage1), 1),
            "samples_per_second": round(seen / self.seconds, 1),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "precision": self.precision, "torch": torch.__version__, "commit": commit or None,
        }  # fmt: skip
        if self.rank == 0:
            self.write_history()  # a run killed after its last checkpoint lacks a line
            self.plot(result)
            write(self.result_file, json.dumps(result, indent=1).encode())
        print(f"test {task.metric} {test:.4f} (epoch {self.best_epoch}, chosen on validation), {test_last:.4f} (last epoch)")
        print(self.result_file)
        if self.world > 1:
            torch.distributed.destroy_process_group()
        return result

    def plot(self, result):
        """curves.png: every number of stage 1 over its epochs, then loss, validation metric and the rest over the epochs."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        panels = [("stage 1: ", self.stage1, k) for row in self.stage1[:1] for k in row if k not in ("epoch", "seconds")]
        panels += [("", self.history, k) for k in self.history[0] if k not in ("epoch", "seconds", "lr")]
        figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), layout="constrained", squeeze=False)
        for axis, (stage, rows, name) in zip(axes[0], panels, strict=True):
            axis.plot([row["epoch"] for row in rows], [row[name] for row in rows], ".-")
            axis.set(xlabel="epoch", title=stage + name)
            axis.locator_params(axis="x", integer=True)
            axis.grid(alpha=0.3)
            if name == "val":
                axis.plot(self.best_epoch, result["test"], "r*", markersize=10, label=f"test {result['test']:.3f}")
                axis.set_title(f"{result['metric']} on validation")
                axis.legend()
        figure.suptitle(f"{self.folder.name}  ({self.kind} data)")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110)
        plt.close(figure)
        write(self.folder / "curves.png", buffer.getvalue())

    def mean(self, losses):
        """Mean over the steps of all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(losses)
        return losses.mean().item() / self.world

    def compile(self, encoder):
        """torch.compile the encoder, which does nearly all the work, in place: its parameters keep their names."""
        if not any(map(shutil.which, ("g++", "clang++", "cl"))):
            raise UserError(
                "--compile needs a C++ compiler (g++ or clang++), and none was found.\nInstall one, or leave --compile out."
            )
        encoder.compile(dynamic=False)  # batches have one size: PaRe's 2 B, and B once k is 0

    def progress(self, items, total, label):
        """A bar over the steps, on the first process, where somebody watches."""
        from tqdm import tqdm

        return tqdm(items, label, total, leave=False, disable=None if self.rank == 0 else True)


def now():
    return time.perf_counter()
