"""Models that the benchmark compares, on one set of weights, and the timed calls on them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hf_earlyexit import (
    ClassifierConfig,
    EarlyExitConfig,
    EarlyExitT5Config,
    EarlyExitT5ForConditionalGeneration,
    ExitPoint,
)
from hf_earlyexit.common.extras import require


BATCH, PERIOD = 8, 4
AFTER_2 = {"early_exit": True, "exit_criterion": "fixed", "exit_layer": 2}
SPECIAL = ("<pad>", "</s>", "<unk>")

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Script:
    """Criterion: a row exits after layer 1 if `leaves(row, position)`, else it runs every layer."""

    leaves: Callable[[int, int], bool]

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        asked = zip(point.rows, point.positions, strict=True)
        return torch.tensor([float(point.layer == 1 and self.leaves(row, position)) for row, position in asked])


@dataclass(frozen=True)
class Bar:
    """A call's time divided by a weighted sum of other calls' times; `limit` is its maximum, None: only shown."""

    name: str
    call: str
    against: dict[str, float]
    limit: float | None = None


@dataclass
class Case:
    """Calls that are timed in turn, the bars that compare them, and the work by layer of calls with exits."""

    name: str
    calls: Calls = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    work: dict[str, dict[str, list[int]]] = field(default_factory=dict)


class Bench:
    """The models, on one set of weights, and the calls on them."""

    def __init__(self, config: EarlyExitT5Config, new_tokens: int, depths: Collection[int] = (1, 2)):
        self.layers, self.vocab_size = config.num_decoder_layers, config.vocab_size
        self.length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        self.ours = EarlyExitT5ForConditionalGeneration(config).eval()
        with torch.no_grad():  # Initial embeddings are so large that every generated token would be the start token.
            self.ours.shared.weight.mul_(0.02)
        self.stock = {depth: self.stock_model(depth) for depth in {*depths, self.layers} if depths}

    def stock_model(self, depth: int) -> T5ForConditionalGeneration:
        """Transformers' own model on the tensors of ours, with the first `depth` layers of the decoder."""
        values = self.ours.config.to_dict() | {"num_decoder_layers": depth}
        config = T5Config(
            **{name: value for name, value in values.items() if name not in ("model_type", "early_exit")}
        )
        return self._on_our_weights(T5ForConditionalGeneration, config)

    def own_model(self, depth: int) -> EarlyExitT5ForConditionalGeneration:
        """Ours on the same tensors, with the first `depth` layers of the decoder."""
        values = self.ours.config.to_dict() | {"num_decoder_layers": depth, "early_exit": {}}
        return self._on_our_weights(EarlyExitT5ForConditionalGeneration, EarlyExitT5Config(**values))

    def alias(self) -> EarlyExitT5ForConditionalGeneration:
        """A shallow copy of ours, which can be prepared separately."""
        return copy.copy(self.ours)

    def _on_our_weights(self, cls: type, config: T5Config) -> Any:
        with torch.device("meta"):
            model = cls(config)
        weights = self.ours.state_dict()
        weights = {name: weights[name] for name in model.state_dict() if name in weights}
        model.load_state_dict(weights, assign=True, strict=cls is T5ForConditionalGeneration)
        model.tie_weights()
        return model.eval()

    def source(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), self.vocab_size, (rows, length))

    @torch.no_grad()
    def encode(self, rows: int, length: int) -> torch.Tensor:
        return self.ours.encoder(self.source(rows, length)).last_hidden_state

    def decode(self, model: T5ForConditionalGeneration, states: torch.Tensor, **settings) -> Any:
        # A new wrapper for each call, since `generate` may change its arguments.
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        return self.generate(model, encoder_outputs=BaseModelOutput(states), attention_mask=mask, **settings)

    def generate(self, model: T5ForConditionalGeneration, **settings) -> Any:
        return model.generate(**self.length, do_sample=False, **settings)

    def add_stock(self, case: Case, depth: int, states: torch.Tensor) -> None:
        case.calls[f"stock {depth} x {len(states)}"] = lambda: self.decode(self.stock[depth], states)

    def add_exits(self, case: Case, name: str, states: torch.Tensor, rows: list[int], **settings) -> None:
        """Add a call with exits, after an untimed run has confirmed that `rows` rows run each layer per step."""
        output = self.decode(self.ours, states, return_dict_in_generate=True, **settings)
        work = {kind: output[kind].tolist() for kind in ("layer_rows", "filled_positions", "head_rows")}
        if work["layer_rows"] != [count * self.length["max_new_tokens"] for count in rows]:
            raise RuntimeError(f"{name!r} did not do the work that was meant: {work}.")
        case.calls[name], case.work[name] = lambda: self.decode(self.ours, states, **settings), work


class OwnBench(Bench):
    """Ours prepared; in place of stock, our own loop without exits on decoders cut to the stock depths."""

    def __init__(self, *args):
        super().__init__(*args)
        self.stock = {depth: self.own_model(depth).prepare_for_generation() for depth in self.stock}
        for model in self.stock.values():
            model.generation_config.early_exit = False
        self.ours.prepare_for_generation()


def early_exit_config(
    layers: int,
    d_model: int,
    num_heads: int,
    d_kv: int,
    d_ff: int,
    vocab_size: int,
    exit_layers: Sequence[int] | None = None,
) -> EarlyExitT5Config:
    """Config of a gated T5 with equally deep encoder and decoder, and exit classifiers marked as trained."""
    sizes = {"d_model": d_model, "num_heads": num_heads, "d_kv": d_kv, "d_ff": d_ff}
    depths = {"num_layers": layers, "num_decoder_layers": layers}
    kind = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    early_exit = EarlyExitConfig(exit_layers, classifier=ClassifierConfig(trained=True)).to_dict()
    return EarlyExitT5Config(**sizes, **depths, **kind, vocab_size=vocab_size, early_exit=early_exit)


def import_ctranslate2() -> Any:
    """CTranslate2, or a `SystemExit` that names what to install or to pass."""
    try:
        return require("ctranslate2", "bench")
    except ImportError as error:
        raise SystemExit(f"{error}, or pass `--no-ctranslate2`.") from None


def pieces(vocab_size: int) -> list[str]:
    return [*SPECIAL, *(f"t{number}" for number in range(len(SPECIAL), vocab_size))]


def translator_of(model: T5ForConditionalGeneration, compute_type: str = "float32") -> Any:
    """The model in CTranslate2, loaded into memory. The converter needs a tokenizer for the vocabulary."""
    words = {piece: number for number, piece in enumerate(pieces(model.config.vocab_size))}
    backend = Tokenizer(WordLevel(words, unk_token=SPECIAL[-1]))
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    ctranslate2, threads = import_ctranslate2(), {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/stock")
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(f"{folder}/stock")
        ctranslate2.converters.TransformersConverter(f"{folder}/stock").convert(f"{folder}/converted")
        return ctranslate2.Translator(f"{folder}/converted", compute_type=compute_type, **threads)
