"""Train a tokenizer and a plain T5 from scratch on pairs of texts: a checkpoint without exits, for stock transformers.

The model has the architecture of T5 1.1 with tied embeddings; the tokenizer is a unigram model of the training texts.
This is the first of three stages of an early-exit checkpoint, needed if there is no pretrained model for the texts.
The other two stages are runs of `scripts/train_exits.py`.

    python scripts/pretrain_t5.py --train_file train.jsonl.gz --validation_file validation.jsonl.gz \\
        --prefix "summarize: " --output_dir plain --num_train_epochs 3 --learning_rate 1.5e-3 --bf16

`--resume` continues an interrupted run and reads its tokenizer back from the output folder. All arguments of
`Seq2SeqTrainingArguments` are accepted. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from text_pairs import DataArguments, HelpFormatter, RougeOfDistinctInputs, check_data, read_texts, tokenize
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.decoders import Metaspace
from transformers import (
    Adafactor,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_earlyexit.common.failures import reading, refusals
from hf_earlyexit.common.output_files import refuse_folder_of_model
from hf_earlyexit.common.seen_inputs import TRAINING, SeenInputs
from hf_earlyexit.common.tokenizer import load_tokenizer
from hf_earlyexit.evaluation.metrics import ROUGE_TYPES
from hf_earlyexit.training.text_trainer import TextTrainer


PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
RESTORE, DELETED = "restore: ", 0.15


@dataclass
class ShapeArguments:
    """The shape of the model."""

    vocab_size: int = field(default=8000, metadata={"help": "pieces of the tokenizer"})
    encoder_layers: int = field(default=8, metadata={"help": "layers that read the input"})
    decoder_layers: int = field(default=8, metadata={"help": "layers that write"})
    d_model: int = field(default=256, metadata={"help": "width of the hidden states"})
    d_ff: int = field(default=640, metadata={"help": "inner width of the gated feed-forward layers"})
    num_heads: int = field(default=8, metadata={"help": "attention heads, of d_model / num_heads each"})
    dropout: float = field(default=0.05, metadata={"help": "dropout rate"})


@dataclass
class RunArguments:
    """The run itself."""

    start_from: str | None = field(
        default=None, metadata={"help": "a plain T5 to go on from, with its tokenizer and shape, in place of scratch"}
    )
    denoising_words: int | None = field(
        default=None,
        metadata={"help": "learn to restore stretches of so many words of inputs, too: short ones teach reading soon"},
    )
    scaled_steps: bool = field(
        default=False,
        metadata={"help": "Adafactor with steps in proportion to the weights, as T5; wants rates of 0.01 to 0.02"},
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in --output_dir, if any"})


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer, train the model, evaluate, save; the last line printed is JSON."""
    argv = sys.argv[1:] if argv is None else argv
    kinds = (ShapeArguments, DataArguments, RunArguments, Seq2SeqTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=HelpFormatter)
    shape, data, run, training = parser.parse_args_into_dataclasses(argv)
    with refusals(parser.prog):
        check_shape(shape)
        check_run(run, shape, training)
        check_data(data)
        refuse_folder_of_model("--output_dir", training.output_dir, [run.start_from])
        texts = read_texts(data)
    folder = Path(training.output_dir)
    set_seed(training.seed)
    if run.start_from is not None:
        with refusals(parser.prog), reading(run.start_from, "the model"):
            model = T5ForConditionalGeneration.from_pretrained(run.start_from, dtype=torch.float32)
            tokenizer = load_tokenizer(run.start_from, model.config)
            seen = SeenInputs.of_model(run.start_from, model.config)
    else:
        with training.main_process_first(desc="the tokenizer"):
            tokenizer = known_tokenizer(folder) if run.resume or not training.should_save else None
            if tokenizer is None:
                tokenizer = train_tokenizer((text for pair in texts.train for text in pair), shape.vocab_size)
                tokenizer.save_pretrained(folder)
        model, seen = T5ForConditionalGeneration(config_of(shape, tokenizer)), SeenInputs()
    train_pairs, examples = list(texts.train), texts.validation
    if run.denoising_words is not None:
        train_pairs += list(denoising_pairs(train_pairs, data.prefix, run.denoising_words, training.seed))
    model.generation_config.max_new_tokens = data.max_target_tokens
    training.predict_with_generate = True
    trainer = TextTrainer(
        model,
        training,
        train_dataset=tokenize(tokenizer, train_pairs, data),
        eval_dataset=tokenize(tokenizer, [(one.source, one.references[0]) for one in examples], data),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=RougeOfDistinctInputs(tokenizer, examples),
        optimizers=(scaled_steps(model.parameters(), training) if run.scaled_steps else None, None),
    )
    # T5 accepts `num_items_in_batch` but ignores it. Else Trainer would sum accumulated losses instead of averaging.
    trainer.model_accepts_loss_kwargs = False
    checkpoint = get_last_checkpoint(str(folder)) if run.resume and folder.is_dir() else None
    seen = seen.with_those_of(checkpoint).plus(TRAINING, texts.sources)
    seen.name_in(model.config)
    trainer.add_callback(SavesSeenInputs(seen))
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    metrics |= {"validation_inputs": len(examples), **trainer.evaluate()}
    trainer.save_state()
    if trainer.is_world_process_zero():
        seen.save(folder)  # before the model is saved, so that a push to a Hub includes the file
    trainer.save_model()
    if trainer.is_world_process_zero():
        command = shlex.join(["python", "scripts/pretrain_t5.py", *argv])
        card(trainer, metrics, data, run, command).save(folder / "README.md")
        print(json.dumps({"output_dir": str(folder), "command": command, "metrics": metrics}))


class SavesSeenInputs(TrainerCallback):
    """Saves the list of seen training inputs, which the config names, with every checkpoint."""

    def __init__(self, seen: SeenInputs):
        self.seen = seen

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.seen.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def check_shape(shape: ShapeArguments) -> None:
    """Refuse a model that cannot be built."""
    for name, value in vars(shape).items():
        if name != "dropout" and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}.")
    if not 0 <= shape.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {shape.dropout}.")
    if shape.encoder_layers < shape.decoder_layers:
        raise ValueError(
            f"--encoder_layers {shape.encoder_layers} must be at least --decoder_layers {shape.decoder_layers}: the "
            "cache of stock T5 has as many layers as the encoder."
        )
    if shape.d_model % shape.num_heads:
        raise ValueError(f"--num_heads {shape.num_heads} must divide --d_model {shape.d_model}.")


def check_run(run: RunArguments, shape: ShapeArguments, training: Seq2SeqTrainingArguments) -> None:
    """Refuse empty spans, two optimizers, and shape arguments together with `--start_from`."""
    if run.scaled_steps and training.optim != Seq2SeqTrainingArguments.optim:
        raise ValueError(
            f"--optim {training.optim.value} does not go with --scaled_steps, which is one: leave it out."
        )
    if run.denoising_words is not None and run.denoising_words < 1:
        raise ValueError(f"--denoising_words must be positive, got {run.denoising_words}.")
    start_from = run.start_from
    if start_from is None:
        return
    if Path(start_from).exists() and not (Path(start_from) / "config.json").is_file():
        raise ValueError(f"--start_from {start_from!r} is no checkpoint: it has no config.json.")
    defaults = vars(ShapeArguments())
    if changed := [name for name, value in vars(shape).items() if value != defaults[name]]:
        raise ValueError(f"--{changed[0]} does not go with --start_from, whose checkpoint has a shape of its own.")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a unigram tokenizer (Kudo, arXiv 1804.10959) with T5's special tokens; it appends T5's end token."""
    tokenizer = Tokenizer(models.Unigram())
    one_space = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), one_space])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END, UNKNOWN], unk_token=UNKNOWN, show_progress=True
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def known_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer saved by an earlier start of this run, or by its first process; None if there is none yet."""
    return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None


def denoising_pairs(
    pairs: Iterable[tuple[str, str]], prefix: str, length: int, seed: int
) -> Iterator[tuple[str, str]]:
    """Training pairs that restore spans of inputs from which words were deleted.

    This is BART's token deletion (arXiv 1910.13461), applied to words. Summary targets have only a few tokens and
    teach little about reading. The fewer words a span has, the sooner a model learns to find and copy one.

    Args:
        pairs: Inputs, with `prefix`, and targets.
        prefix: Removed from the inputs.
        length: Words of a span.
        seed: Of the deletions.
    """
    random = Random(seed)
    for source, _ in pairs:
        words = source.removeprefix(prefix).split(" ")
        for start in range(0, len(words), length):
            stretch = words[start : start + length]
            if kept := [word for word in stretch if random.random() >= DELETED]:
                yield f"{RESTORE}{' '.join(kept)}", " ".join(stretch)


def scaled_steps(weights: Iterable[torch.nn.Parameter], training: Seq2SeqTrainingArguments) -> Adafactor:
    """The optimizer of T5's pretraining (arXiv 1910.10683, section 3.1.2): Adafactor with scaled steps.

    A step is proportional to the root mean square of its weight matrix (arXiv 1804.04235, section 8), so embeddings,
    whose initial scale is 1, change at the same relative rate as small matrices. `--optim adafactor` of Trainer does
    not scale steps.
    """
    rates = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    return Adafactor(weights, scale_parameter=True, relative_step=False, warmup_init=False, **rates)


def config_of(shape: ShapeArguments, tokenizer: PreTrainedTokenizerFast) -> T5Config:
    """T5 1.1's configuration, with tied embeddings because the vocabulary is small."""
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=shape.d_model,
        d_kv=shape.d_model // shape.num_heads,
        d_ff=shape.d_ff,
        num_layers=shape.encoder_layers,
        num_decoder_layers=shape.decoder_layers,
        num_heads=shape.num_heads,
        dropout_rate=shape.dropout,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        scale_decoder_outputs=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def card(
    trainer: TextTrainer, metrics: dict[str, float], data: DataArguments, run: RunArguments, command: str
) -> ModelCard:
    """The model card: architecture, scores, and training."""
    config, args = trainer.model.config, trainer.args
    name = Path(args.output_dir).name
    front = ModelCardData(library_name="transformers", pipeline_tag="text2text-generation")
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    start = "from scratch" if run.start_from is None else f"further than {Path(run.start_from).name}"
    denoising = f", and on restoring stretches of {run.denoising_words} words from which some were deleted"
    also = denoising if run.denoising_words is not None else ""
    optimizer = "Adafactor, scaled steps" if run.scaled_steps else args.optim.value
    rouge = " / ".join(f"{100 * metrics[f'eval_{kind}']:.1f}" for kind in ROUGE_TYPES)
    text = f"""---
{front.to_yaml()}
---

# {name}

A plain T5 without exits, trained {start} on pairs of texts{also}: {config.num_layers} encoder and
{config.num_decoder_layers} decoder
layers, width {config.d_model}, {config.vocab_size} pieces, {parameters / 1e6:.1f} M parameters. Inputs start with
{data.prefix!r}, are cut to {data.max_source_tokens} tokens, targets to {data.max_target_tokens}.

| on {metrics["validation_inputs"]} validation inputs | |
| --- | --- |
| cross-entropy, nats per token | {metrics["eval_loss"]:.3f} |
| ROUGE-1 / 2 / L, greedy | {rouge} |

Trained for {trainer.state.global_step} steps, {trainer.state.epoch:.2f} epochs, batches of
{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} rows, learning rate
{args.learning_rate:g} ({args.lr_scheduler_type.value}, {optimizer}); transformers {transformers.__version__}, torch
{torch.__version__}.

```bash
{command}
```
"""
    return ModelCard(text)


if __name__ == "__main__":
    main()
