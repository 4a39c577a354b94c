"""Pretrained models: a Swin of timm or a BERT-like text model of transformers, found, read, and cut before its encoder.

The only file that knows the insides of timm and transformers, which are imported where they are used: they take seconds.
Shapes: B batch, N tokens, D token width, n encoder output tokens, F feature width, H W sizes.
"""

import functools
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from cli import UserError

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


def load_model(name, pretrained=True):
    """The model `name` of `common.load_source`: (a timm Swin, None), or (a BERT-like model, its Tokenizer)."""
    short = name.removeprefix("random:")
    pretrained = pretrained and short == name
    path = Path(short)
    if (WEIGHTS / f"{short}.safetensors").exists():
        path = WEIGHTS / f"{short}.safetensors"
    from_file, wanted = path.suffix == ".safetensors", SHORT_NAMES.get(short, short)
    if is_text_model(short, path):
        return read_roberta(path, pretrained) if from_file else fetch_text_model(name, wanted, pretrained)
    swin = read_swin(path, pretrained) if from_file else fetch_swin(short, wanted, pretrained)
    if not hasattr(swin, "layers") or not hasattr(swin, "patch_embed"):
        raise UserError(
            f"--backbone: {name} is a {type(swin).__name__}; only Swin transformers can be cut into embedder and encoder."
        )
    return swin, None
