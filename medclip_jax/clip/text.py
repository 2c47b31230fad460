"""The text encoders with learnable context, fused: they run in every training step.

Parameters are transformers' Flax tree (text_model, text_projection). What comes after the last
end-of-text token is cut off where it cannot change the result: CLIP's encoder is causal, BERT's
masks it. SigLIP's reads the padding, and its last position is the feature.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medclip_jax.clip import layers
from medclip_jax.errors import CheckpointError
from medclip_jax.prompts.tokenize import Prompts


class Embeddings(nn.Module):
    """Token embeddings, with context vectors where a slot says so, and positions."""

    vocabulary: int
    positions: int
    width: int

    def setup(self):
        start = nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(self.vocabulary, self.width, embedding_init=start)
        self.position_embedding = nn.Embed(self.positions, self.width, embedding_init=start)

    def __call__(self, context, ids, slots):
        x = fill(self.token_embedding(ids), context, slots)
        return x + self.position_embedding(jnp.arange(ids.shape[1])[None])


class TextModel(nn.Module):
    """transformers' text_model."""

    embedding: tuple  # fields of Embeddings
    blocks: tuple  # fields of layers.Encoder
    eps: float

    def setup(self):
        self.embeddings = Embeddings(*self.embedding)
        self.encoder = layers.Encoder(*self.blocks)
        self.final_layer_norm = layers.LayerNorm(self.eps)


class Sizes(nn.Module):
    """What every text encoder has."""

    width: int
    heads: int
    hidden: int
    depth: int
    vocabulary: int
    positions: int
    joint: int


class TextEncoder(Sizes):
    """Prompt embeddings in the joint space, not normalised."""

    activation: str = "quick_gelu"  # of layers.ACTIVATIONS
    eps: float = 1e-5
    full_length: bool = False  # SigLIP's: every position is read, the last one is the feature

    def setup(self):
        kinds = self.heads, self.hidden, self.activation, self.eps
        embedding = self.vocabulary, self.positions, self.width
        self.text_model = TextModel(embedding, (self.depth, self.width, *kinds), self.eps)
        self.text_projection = layers.Dense(self.joint, use_bias=self.full_length)

    def __call__(
        self,
        context: Float[Array, "c k d"],
        ids: Int[Array, "c t"],
        slots: Int[Array, "c t"],
        eos: Int[Array, " c"],
        causal: bool = True,
    ) -> Float[Array, "c j"]:
        x = self.text_model.embeddings(context, ids, slots)
        t = x.shape[1]
        if self.full_length:
            causal, eos = False, jnp.full_like(eos, t - 1)
        mask = jnp.tril(jnp.ones((t, t), bool))[None, None] if causal else None
        x = self.text_model.encoder.lean(x, mask, eos)[:, 0]
        return self.text_projection(self.text_model.final_layer_norm(x))


class BertModel(nn.Module):
    """BERT under our names; its token types are in the positions."""

    embedding: tuple  # fields of Embeddings
    blocks: tuple  # fields of layers.Encoder
    eps: float
    pooling: str

    def setup(self):
        self.embeddings = Embeddings(*self.embedding)
        self.embedding_norm = layers.LayerNorm(self.eps)
        self.encoder = layers.Encoder(*self.blocks)
        if self.pooling == "cls_pooler":
            self.pooler = layers.Dense(self.embedding[2])


class Bert(Sizes):
    """open_clip's text encoder of BERT's kind, not normalised; what it takes is as TextEncoder."""

    middle: int = 0  # width between the two layers of the projection; 0: one, -1: none
    pooling: str = "cls_last_hidden_state_pooler"  # | cls_pooler | mean_pooler
    eps: float = 1e-12

    full_length: ClassVar[bool] = False

    def setup(self):
        kinds = self.heads, self.hidden, "gelu", self.eps, "float32", (), True
        embedding = self.vocabulary, self.positions, self.width
        blocks = (self.depth, self.width, *kinds)
        self.text_model = BertModel(embedding, blocks, self.eps, self.pooling)
        sizes = {0: (self.joint,), -1: ()}.get(self.middle, (self.middle, self.joint))
        self.text_projection = [layers.Dense(n, use_bias=False) for n in sizes]

    def __call__(self, context, ids, slots, eos, causal: bool = True) -> Float[Array, "c j"]:
        model = self.text_model
        x = model.embedding_norm(model.embeddings(context, ids, slots))
        real = jnp.arange(x.shape[1])[None] <= eos[:, None]
        x = model.encoder.lean(x, real[:, None, None] if causal else None, None)
        if self.pooling == "mean_pooler":
            x = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
        else:
            x = x[:, 0]
        if self.pooling == "cls_pooler":
            x = jnp.tanh(model.pooler(x))
        for i, layer in enumerate(self.text_projection):
            x = layer(jax.nn.gelu(x, False) if i else x)
        return x


def fill(
    tokens: Float[Array, "c t d"], context: Float[Array, "c k d"], slots: Int[Array, "c t"]
) -> Float[Array, "c t d"]:
    """Embeddings with context vectors where a slot says so."""
    where = jax.nn.one_hot(slots, context.shape[1], dtype=context.dtype)  # no slot: zeros
    filled = jnp.einsum("ctk,ckd->ctd", where, context, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((slots >= 0)[..., None], filled, tokens)


def encode_text(
    text: Mapping[str, Any],
    context: Float[Array, "c k d"],
    prompts: Prompts,
    encoder: nn.Module,
    causal: bool = True,
) -> Float[Array, "c j"]:
    """Prompt embeddings in the joint space, not normalised; context fills the slots (equation 4).

    encoder: TextEncoder, Bert or transformers' own, of the parameters `text`.
    causal: False is MediCLIP's unmasked encoder, which also sees the padding.
    """
    end = length(prompts.eos, encoder, causal)
    ids, slots = (jnp.asarray(x)[:, :end] for x in (prompts.ids, prompts.slots))
    features: Any = encoder.apply(
        {"params": text}, context, ids, slots, jnp.asarray(prompts.eos), causal
    )
    return features


def length(eos: Int[np.ndarray, "*c"], encoder: Any, causal: bool) -> int | None:
    """Positions that the encoder must read; None for all of them."""
    return int(np.max(eos)) + 1 if causal and not encoder.full_length else None


def bert_of_params(params: Mapping, heads: int, pooling: str, eps: float) -> Bert:
    """The encoder that a checkpoint's parameters (names.py) make up."""
    plain = of_params(
        {**params, "text_projection": {"kernel": np.zeros((1, 1))}}, heads, "gelu", eps
    )
    kernels = [
        params[f"text_projection_{i}"]["kernel"] for i in (0, 1) if f"text_projection_{i}" in params
    ]
    joint = kernels[-1].shape[1] if kernels else plain.width
    middle = (-1, 0, kernels[0].shape[1] if kernels else 0)[len(kernels)]
    sizes: Any = (getattr(plain, x) for x in ("width", "heads", "hidden", "depth", "vocabulary"))
    bert: Any = Bert
    return bert(*sizes, plain.positions, joint, middle, pooling, eps)


def of_params(params: Mapping, heads: int, activation: str, eps: float) -> TextEncoder:
    """The encoder that a checkpoint's parameters (transformers' Flax tree) make up."""
    model = params["text_model"]
    tokens = model["embeddings"]["token_embedding"]["embedding"]
    blocks = model["encoder"]["layers"]
    return TextEncoder(
        width=tokens.shape[1],
        heads=heads,
        hidden=blocks["0"]["mlp"]["fc1"]["bias"].shape[0],
        depth=len(blocks),
        vocabulary=tokens.shape[0],
        positions=model["embeddings"]["position_embedding"]["embedding"].shape[0],
        joint=params["text_projection"]["kernel"].shape[-1],
        activation=activation,
        eps=eps,
        full_length="bias" in params["text_projection"],
    )


def load_tokenizer(folder: Path, kind: str) -> Any:
    """The tokenizer, with the texts changed as its text encoder was trained on them."""
    import transformers
    from tokenizers import Regex, normalizers

    try:
        if kind == "clip":
            of_clip = transformers.CLIPTokenizerFast
            return of_clip.from_pretrained(folder, local_files_only=True)
        if kind == "bert":
            of_bert = transformers.BertTokenizerFast
            tokenizer = of_bert.from_pretrained(folder, local_files_only=True)
            tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
        else:
            end = {"siglip": "</s>", "gemma": "<eos>"}[kind]
            pad = {"siglip": "</s>", "gemma": "<pad>"}[kind]
            file = str(folder / "tokenizer.json")
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_file=file, eos_token=end, pad_token=pad
            )
            # SigLIP reads small letters without punctuation, SigLIP 2 small letters
            steps = [normalizers.Lowercase()]
            if kind == "siglip":
                steps += [
                    normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
                    normalizers.Replace(Regex(r"\s+"), " "),
                    normalizers.Strip(),
                ]
            backend = tokenizer.backend_tokenizer
            own = [backend.normalizer] if backend.normalizer is not None else []
            backend.normalizer = normalizers.Sequence([*steps, *own])
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception on damaged files
        message = f"{folder}: the tokenizer cannot be read ({error}); copy its files again"
        raise CheckpointError(message) from None
