"""Load pretrained models, Swins and ViTs of timm and BERT-like models of transformers, and split off their embedder.

The only file that knows the insides of timm and transformers, which are imported where they are used: they take seconds.
Shapes: B batch, N tokens, D token width, n encoder output tokens, F feature width, H W sizes.
"""

import functools
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from cli import UserError, reason

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
UNUSED = ("head.", "pooler.", "head_dist.", "fc_norm.", "attn_pool.")  # weights after the encoder
# what timm, transformers, torch and safetensors raise for a missing or damaged file, a wrong config.json, no network
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AssertionError, pickle.UnpicklingError,
              SafetensorError)  # fmt: skip
ROBERTA_BASE = dict(model_type="roberta", vocab_size=50265, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                    intermediate_size=3072, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)  # fmt: skip


def watch_attention(encoder, tokens, modules, attention):
    """Run `encoder` on `tokens`; return attention(module, *inputs of the module) of each of `modules`, in order.

    In evaluation mode and without gradients; the mode of the encoder is restored. The fused attention kernels do not return
    the attention matrix: `attention` computes it again.
    """
    found, training = [], encoder.training
    hook = lambda module, args, kwargs: found.append(attention(module, *args, **kwargs))
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            encoder.eval().forward(tokens)  # not encoder(tokens): a compiled encoder would skip the hooks
    finally:
        torch.clear_autocast_cache()  # older torch reuses casts made without gradient in the next pass (pytorch issue 65766)
        encoder.train(training)
        for handle in hooks:
            handle.remove()
    return found


class SwinEncoder(nn.Module):
    """The stages of a Swin and its last LayerNorm: (B, N, D) -> (B, n, F)."""

    def __init__(self, swin):
        super().__init__()
        self.architecture = swin.architecture  # for `rebuild`
        self.grid = swin.patch_embed.grid_size
        # pixels of DensePredictor2d along the side of a token: 32 in full Swins, as in the official code; 16 in tiny-swin, with
        # 4 x 4 tokens: 64 x 64 pixels, as many as simulated fields have at the tiny scale
        self.square = max(16, swin.feature_info[-1]["reduction"])
        self.layers, self.norm = swin.layers, swin.norm

    @property
    def blocks(self):
        return [block for stage in self.layers for block in stage.blocks]

    def forward(self, tokens):
        x = tokens.unflatten(1, self.grid)  # (B, N, D) -> (B, *grid, D)
        return self.norm(self.layers(x)).flatten(1, 2)  # (B, n, F)

    def attentions(self, tokens):
        """Attention of every block in order, mean over the heads: (B, N, D) -> [(A (B, nW, T, T), index (nW, T)), ...]

        A_ij of query i and key j in a window of T tokens; index: the number of each token of the windows in the block's grid.
        Raises UserError if the model computes attention in another way than Swin does, or pads its grid.
        """
        indices = []
        for block in self.blocks:
            (H, W), (h, w) = block.input_resolution, block.window_size
            if not hasattr(block.attn, "relative_position_bias_table") or H % h or W % w:
                raise UserError(
                    "attention scores are not available for this backbone.\n"
                    "Use --scores gate or random, or a ViT or Swin (not V2) whose windows divide its grid."
                )
            shifted = torch.arange(H * W, device=tokens.device).view(H, W).roll([-s for s in block.shift_size], (0, 1))
            windows = shifted.view(H // h, h, W // w, w).transpose(1, 2)  # (H / h, W / w, h, w)
            indices.append(windows.reshape(-1, h * w))  # (nW, T)

        def attention(module, x, mask=None):
            q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B nW, heads, T, d)
            bias = module.relative_position_bias_table[module.relative_position_index.flatten()]  # (T T, heads)
            logits = module.scale * q @ k.mT + bias.T.unflatten(1, (x.shape[1], x.shape[1]))  # (B nW, heads, T, T)
            logits = logits.float().unflatten(0, (len(tokens), -1))  # (B, nW, heads, T, T)
            return (logits if mask is None else logits + mask[:, None]).softmax(-1).mean(2)  # (B, nW, T, T)

        found = watch_attention(self, tokens, [block.attn for block in self.blocks], attention)
        return list(zip(found, indices, strict=True))


class VitEncoder(nn.Module):
    """The blocks of a ViT and its last LayerNorm: (B, N, D) -> (B, N, F), F = D; in CLIP's, another LayerNorm comes first.

    The P tokens that are not patches (class, distillation, registers; a SigLIP has none) belong to the encoder: it puts them in
    front and drops them from its output. What timm has after the last LayerNorm is not used: pooling, heads, and `fc_norm`,
    which replaces this LayerNorm in models with average pooling.
    """

    def __init__(self, vit):
        super().__init__()
        self.architecture = vit.architecture  # for `rebuild`
        self.square = vit.patch_embed.patch_size[0]  # as in SwinEncoder: the pixels are those of the image
        self.norm_pre, self.blocks, self.norm = vit.norm_pre, vit.blocks, vit.norm
        prefix = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]  # in timm's order
        prefix = [token.detach() for token in prefix if token is not None]
        self.prefix = nn.Parameter(torch.cat(prefix, 1)) if prefix else None  # (1, P, D)
        positions = vit.pos_embed.detach()[:, : -vit.patch_embed.num_patches]  # (1, P, D); (1, 0, D): patches only
        if positions.shape[1] > 0:
            self.prefix.data += positions

    def forward(self, tokens):
        N, x = tokens.shape[1], tokens
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)  # (B, P + N, D)
        return self.norm(self.blocks(self.norm_pre(x)))[:, -N:]  # (B, N, F)

    def attentions(self, tokens):
        """As `SwinEncoder.attentions`, with one window of all patches: (B, N, D) -> [(A (B, 1, N, N), index (1, N)), ...]

        A patch also attends to the P other tokens. That part is left out, and each row is scaled to sum to 1 over the patches.
        What patches exchange through the class token or the registers is therefore not counted.
        """
        N = tokens.shape[1]

        def attention(module, x, *_, **__):
            q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, P + N, d)
            logits = (module.scale * module.q_norm(q) @ module.k_norm(k).mT).float()  # (B, heads, P + N, P + N)
            A = logits.softmax(-1).mean(1, keepdim=True)[:, :, -N:, -N:]  # (B, 1, N, N)
            return A / A.sum(-1, keepdim=True)

        found = watch_attention(self, tokens, [block.attn for block in self.blocks], attention)
        return [(A, torch.arange(N, device=tokens.device)[None]) for A in found]


class TextEncoder(nn.Module):
    """The layers of a BERT-like model, for tokens of any embedder: (B, N, D) -> (B, N, F), F = D; nothing is masked."""

    def __init__(self, model):
        super().__init__()
        self.architecture = json.loads(model.config.to_json_string())  # for `rebuild`
        self.layers = model.encoder

    @property
    def blocks(self):
        return list(self.layers.layer)

    def forward(self, tokens):
        return self.layers(tokens)[0]  # (B, N, D) -> (B, N, F)

    def attentions(self, tokens):
        """As `SwinEncoder.attentions`, with one window of all tokens: (B, N, D) -> [(A (B, 1, N, N), index (1, N)), ...]"""

        def attention(module, x, *_, **__):
            heads = lambda part: part(x).unflatten(2, (module.num_attention_heads, -1)).transpose(1, 2)
            q, k = heads(module.query), heads(module.key)  # (B, heads, N, d)
            logits = (q @ k.mT / q.shape[-1] ** 0.5).float()  # (B, heads, N, N)
            return logits.softmax(-1).mean(1, keepdim=True)  # (B, 1, N, N)

        found = watch_attention(self, tokens, [layer.attention.self for layer in self.blocks], attention)
        return [(A, torch.arange(tokens.shape[1], device=tokens.device)[None]) for A in found]


class Tokenizer:
    """Words to token ids, with a text model's own vocabulary: list[str] -> list[int], without <s> and </s>.

    `pad` is the id that fills a short sequence. `load` reads the vocabulary at first use: only text sources need it.
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

    def in_context(self, before, text, after):
        """The ids of a whole sequence, <s> before text after </s>, and the slice of them that is `text`."""
        begin, end = ([] if i is None else [i] for i in (self.vocabulary.cls_token_id, self.vocabulary.sep_token_id))
        before, text, after = (self(part.split()) for part in (before, text, after))  # one by one, to know the place of `text`
        first = len(begin + before)
        return begin + before + text + after + end, slice(first, first + len(text))


def build_swin(**architecture):
    """A timm SwinTransformer with random weights; `architecture` are its constructor's arguments."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(**architecture)
    swin.architecture = architecture
    return swin


def check_weights(name, missing, mismatched, unexpected):
    """Refuse weights that leave a part of the embedder or the encoder random, or that have more layers than the network.

    Heads and poolers may be missing, and weights outside the layers may be left over: they are not used here.

    Args:
        name: of the backbone, for the message.
        missing, mismatched, unexpected: names of weights that the file lacks, has in another shape, or has in excess.
    Raises: UserError that names one of the weights.
    """
    wrong = {
        "is missing": [key for key in missing if not key.startswith(UNUSED)],
        "has another shape than its architecture says": mismatched,
        "has no place in its architecture": [key for key in unexpected if re.search(r"\b(layers?|blocks)\.\d", key)],
    }
    for what, keys in wrong.items():
        if keys:
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(
                f"--backbone: the weights of {name} do not fit: {min(keys)} {what}{more}.\n"
                "Save it again with timm (save_for_hf) or transformers (save_pretrained), under its original names."
            )


def compare_weights(name, model, weights):
    """`check_weights` of a dict of tensors that `model` is about to load."""
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    mismatched = [key for key in shapes.keys() & weights.keys() if weights[key].shape != shapes[key]]
    unexpected = weights.keys() - shapes.keys() - dict(model.named_buffers()).keys()
    check_weights(name, shapes.keys() - weights.keys(), mismatched, unexpected)


def check_image_model(name, model):
    """Raise UserError unless `model` is a Swin or ViT of timm that can be cut: square RGB images, square patches."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Attention, VisionTransformer

    vit, patches = isinstance(model, VisionTransformer), getattr(model, "patch_embed", None)
    if not vit and (patches is None or not hasattr(model, "layers")):
        raise UserError(
            f"--backbone: {name} is a {type(model).__name__}; "
            "only Swin transformers and ViTs can be cut into embedder and encoder."
        )
    plain = lambda: type(patches) is PatchEmbed and isinstance(patches.norm, nn.Identity) and model.pos_embed is not None
    if vit and not (plain() and all(type(getattr(block, "attn", None)) is Attention for block in model.blocks)):
        raise UserError(
            f"--backbone: {name} is no plain ViT (one linear map of each patch, positions, one attention in a block).\n"
            "Give one that is, such as vit_base_patch16_224."
        )
    if patches.proj.in_channels != 3 or len(set(patches.img_size)) > 1 or len(set(patches.patch_size)) > 1:
        image, patch = (" x ".join(map(str, n)) for n in ((patches.proj.in_channels, *patches.img_size), patches.patch_size))
        raise UserError(
            f"--backbone: {name} reads images of {image} in patches of {patch}.\n"
            "Give a model for square images of 3 channels, as the source has; the task may have any number of channels."
        )


def import_timm():
    """Import timm. Raises UserError if the installed torch and torchvision do not match."""
    try:
        import timm
    except RuntimeError as error:  # "operator torchvision::nms does not exist"
        from importlib.metadata import version

        raise UserError(
            f"torch {version('torch')} and torchvision {version('torchvision')} do not match ({error}).\n"
            "Install both from the same index: pip install --force-reinstall torch torchvision"
        ) from error
    return timm


def import_transformers():
    """Import transformers, without its progress bars, notes on unused weights, and messages about retried downloads."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    return transformers


def read_file(path):
    """A file of tools/pretrain.py: its architecture, its vocabulary (None for a Swin), its weights in fp32.

    Raises UserError if it is missing, damaged, or from elsewhere.
    """
    if not path.is_file():
        raise UserError(f"--backbone: there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        weights = {k: v.float() for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}).\nCopy it again, or write it again with tools/pretrain.py."
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
    check_image_model(path, swin)
    if pretrained:
        compare_weights(path, swin, weights)
        swin.load_state_dict(weights, strict=False)
    return swin


def read_roberta(path, pretrained=True):
    """A RoBERTa and its tokenizer from a file of tools/pretrain.py, which carries its architecture and its vocabulary."""
    transformers = import_transformers()
    architecture, vocabulary, weights = read_file(path)
    model = transformers.RobertaModel(transformers.RobertaConfig(**architecture), add_pooling_layer=False)
    if pretrained:
        weights = {k.removeprefix("roberta."): v for k, v in weights.items() if k.startswith("roberta.")}
        compare_weights(path, model, weights)
        model.load_state_dict(weights, strict=False)

    def load():
        from tokenizers import Tokenizer as Rules

        return transformers.PreTrainedTokenizerFast(tokenizer_object=Rules.from_str(vocabulary), pad_token="<pad>")

    return model, Tokenizer(load)


def fetch_text_model(name, wanted, pretrained):
    """A BERT-like model and its tokenizer by Hugging Face id, or from a folder saved by transformers.

    Dropout is 0, as in the official configurations. A random RoBERTa-base needs no network. Raises UserError for another
    architecture, a decoder, weights that do not fit, or if nothing can be loaded.
    """
    transformers = import_transformers()
    from huggingface_hub.errors import StrictDataclassError  # a value of a wrong type in config.json

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if wanted == SHORT_NAMES["roberta_base"] and not pretrained:
        # for measuring speed: words are read with the vocabulary of tiny-roberta, which is smaller
        _, tokenizer = read_roberta(WEIGHTS / "tiny-roberta.safetensors", pretrained=False)
        config = transformers.RobertaConfig(**ROBERTA_BASE | no_dropout)
        return transformers.RobertaModel(config, add_pooling_layer=False), tokenizer
    if wanted.startswith((".", "/")) and not Path(wanted).is_dir():
        raise UserError(f"--backbone: there is no folder {wanted}.")
    try:
        config = transformers.AutoConfig.from_pretrained(wanted, **no_dropout)
        if config.model_type not in BERT_LIKE:
            raise UserError(
                f"--backbone: {name} is a {config.model_type} model, which cannot be split into embedder and encoder.\n"
                f"Give a model of transformers of the types {', '.join(BERT_LIKE)}, or a ViT or a Swin of timm (or its folder)."
            )
        if config.is_decoder:
            raise UserError(
                f"--backbone: {name} is a decoder, whose tokens attend to earlier ones only; an encoder is needed.\n"
                'Give an encoder, or set "is_decoder": false in its config.json to use these weights without the mask.'
            )
        if pretrained:  # transformers draws missing weights at random and reports them here only
            model, info = transformers.AutoModel.from_pretrained(
                wanted, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
            mismatched = [key for key, *_ in info["mismatched_keys"]]
            check_weights(name, info["missing_keys"], mismatched, info["unexpected_keys"])
        else:
            model = transformers.AutoModel.from_config(config)
    except (*UNREADABLE, StrictDataclassError) as error:
        raise UserError(
            f"--backbone: {wanted} cannot be loaded ({reason(error)}).\n"
            "Give a folder that holds its weights, tiny-roberta, or random:roberta_base to measure speed only."
        ) from error

    def load():
        try:
            vocabulary = transformers.AutoTokenizer.from_pretrained(wanted, add_prefix_space=True)
            if len(vocabulary) <= len(vocabulary.all_special_ids):  # transformers makes an empty one where there is none
                raise ValueError("it has no words")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--backbone: {wanted} comes without its tokenizer, which a text source needs ({reason(error)}).\n"
                "Save it in the same folder: tokenizer.save_pretrained(folder)."
            ) from error
        return vocabulary

    return model, Tokenizer(load)


def first_position(embeddings):
    """Row of the first token in the position table: 0 for BERT, that after the padding's for RoBERTa."""
    padding = embeddings.position_embeddings.padding_idx
    return 0 if padding is None else padding + 1


def is_text_model(short, path):
    """Whether `short` is a text model, by the architecture in its file, the config.json in its folder, or a slash (a Hub id).

    Raises UserError for a folder without a readable config.json, and for a file of another format.
    """
    if path.suffix == ".safetensors":
        return "model_type" in read_file(path)[0]
    if path.is_dir():
        try:
            return "model_type" in dict(json.loads((path / "config.json").read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"--backbone: {path} has no readable config.json ({reason(error)}).\n"
                "Give a folder saved by timm (save_for_hf) or transformers (save_pretrained)."
            ) from error
    if path.is_file() or path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise UserError(
            f"--backbone: {path} does not say its architecture; the only files that do are those of tools/pretrain.py.\n"
            "Load it into its model, then save a folder with timm (save_for_hf) or transformers (save_pretrained)."
        )
    return "/" in SHORT_NAMES.get(short, short) and not short.startswith("hf-hub:")


def convert(weights, model):
    """Rename weights of an older timm, or of the official code, to the names of the installed timm, by timm's own filter.

    Positions of a ViT for images of another size are resampled.
    """
    try:
        weights = sys.modules[type(model).__module__].checkpoint_filter_fn(weights, model)
    except AttributeError:  # a name that the model does not have: `compare_weights` will tell
        return weights
    return {re.sub(r"\bgamma_([12])$", r"ls\1.gamma", key): value for key, value in weights.items()}  # LayerScale of DeiT III


def fetch_image_model(short, wanted, pretrained):
    """A timm model by name, or from a folder saved by timm.

    Raises UserError for an unknown name, weights that do not fit, or if nothing can be loaded.
    """
    timm = import_timm()
    folder = Path(short).is_dir()
    if not folder and not timm.is_model(wanted) and not short.startswith("hf-hub:"):
        known = ", ".join(sorted({p.stem for p in WEIGHTS.glob("*.safetensors")}) + list(SHORT_NAMES))
        raise UserError(
            f"--backbone: no model is called {short!r}. Known here: {known}; "
            "any Swin or ViT of timm; owner/name on Hugging Face; a path."
        )
    try:
        model = timm.create_model(f"local-dir:{short}" if folder else wanted)
        check_image_model(short, model)
        named, more = wanted, {}
        if folder:
            config = json.loads((Path(short) / "config.json").read_bytes())
            named, more = config["architecture"], config.get("model_args") or {}
        elif short.startswith("hf-hub:"):
            _, named, more = timm.models.load_model_config_from_hf(short.removeprefix("hf-hub:"))
        model.architecture = {"timm": named, **more}
        if pretrained:
            # where names or classes differ, timm leaves weights random without an error: check what it is about to load
            check = model.register_load_state_dict_pre_hook(lambda model, weights, *_: compare_weights(short, model, weights))
            timm.models.load_pretrained(model, num_classes=model.num_classes, filter_fn=convert, strict=False)
            check.remove()
    except UNREADABLE as error:
        raise UserError(
            f"--backbone: {wanted} cannot be loaded ({reason(error)}).\n"
            f"Give a folder that holds its weights, tiny-swin, or random:{short} to measure speed only."
        ) from error
    return model


def local_path(name):
    """Where the weights of a backbone are if they are local: the file of one of this project, or the name as a path."""
    shipped = WEIGHTS / f"{name}.safetensors"
    return shipped if shipped.exists() else Path(name).expanduser()


def load_model(name, pretrained=True):
    """The model `name` of `common.load_source`: (a Swin or ViT of timm, None), or (a BERT-like model, its Tokenizer)."""
    short = os.path.expanduser(name.removeprefix("random:"))
    pretrained = pretrained and not name.startswith("random:")
    path = local_path(short)
    from_file, wanted = path.suffix == ".safetensors", SHORT_NAMES.get(short, short)
    if is_text_model(short, path):
        return read_roberta(path, pretrained) if from_file else fetch_text_model(name, wanted, pretrained)
    return read_swin(path, pretrained) if from_file else fetch_image_model(short, wanted, pretrained), None


def rebuild(architecture):
    """The network that an encoder's `architecture` describes, with random weights; needs neither its file nor a hub.

    Args:
        architecture: of an encoder: a name of timm and more arguments ("timm"), the configuration of a text model
            ("model_type"), or the arguments of `build_swin`.
    Returns: as `load_model`; a text model comes without its vocabulary.
    """
    if "model_type" in architecture:
        transformers = import_transformers()
        config = transformers.AutoConfig.for_model(**architecture)
        return transformers.AutoModel.from_config(config, dtype=torch.float32), Tokenizer(None)
    if "timm" in architecture:
        more = {name: value for name, value in architecture.items() if name != "timm"}
        model = import_timm().create_model(architecture["timm"], **more)
        model.architecture = architecture
        return model, None
    return build_swin(**architecture), None
