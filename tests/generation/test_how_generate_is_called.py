"""`generate` called by the library's trainer, with a streamer in a thread, and in inference mode."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import CompileConfig, Seq2SeqTrainer, TextIteratorStreamer

from hf_earlyexit.families.shipped import default_inputs, load_default
from tests import laws
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair
from tests.training.trainers import collate, make_trainer, rows, tiny
from tests.watching import Scripted


EXITS = {"exit_criterion": "fixed", "exit_layer": 1}


@pytest.mark.parametrize("steps", (0, 1), ids=("as it is", "after a step"))
def test_the_librarys_trainer_evaluates_the_texts_of_the_exits(steps, tmp_path):
    model, seen = tiny(), []
    for name, value in EXITS.items():
        setattr(model.generation_config, name, value)
    options = {"predict_with_generate": True, "generation_max_length": 6, "per_device_eval_batch_size": 7}
    trainer = make_trainer(model, tmp_path, trainer_class=Seq2SeqTrainer, max_steps=steps, **options)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"rows": len(seen[-1])}
    if steps:
        trainer.train()
    assert trainer.evaluate()["eval_rows"] == 7
    batch = {name: tensor for name, tensor in collate(rows()[:7]).items() if name != "labels"}
    texts, full = (model.eval().generate(**batch, max_length=6, early_exit=exits).tolist() for exits in (None, False))
    assert [row[: len(texts[0])] for row in seen[0].tolist()] == texts != full
    predicted = trainer.predict(rows()[:7], max_length=6, early_exit=False).predictions
    assert [row[: len(full[0])] for row in predicted.tolist()] == full


def test_a_streamer_in_a_thread_gives_the_text():
    model, tokenizer = load_default()
    inputs = tokenizer(default_inputs()[:1], return_tensors="pt")
    options = {"max_new_tokens": 12, "exit_criterion": "softmax", "exit_threshold": 0.3, "exit_layers": [2, 4]}
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert (expected.layers_run < model.config.num_decoder_layers).any()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    text = tokenizer.decode(expected.sequences[0], skip_special_tokens=True)
    assert "".join(pieces).strip() == text.strip() and len(pieces) > 2


WAYS = {
    "plain": {},
    "prepared": {},
    "compiled": {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)},
}


@pytest.mark.parametrize("way", WAYS)
def test_inference_mode_changes_nothing(way):
    """Preparing and compiling work inside and outside of inference mode, and the results are usable in both."""
    script = Scripted(lambda row, position: (3, NUM_LAYERS, 3, 3)[position % 4])
    settings = {"exit_criterion": script, "exit_threshold": 0.5, "exit_layers": [3], "eos_token_id": None} | WAYS[way]
    outputs = []
    for inside_first in (False, True):
        model = tiny_pair("untied", 1)[1]
        for inside in (inside_first, not inside_first):
            with torch.inference_mode(inside):
                if way == "prepared" and not model.is_prepared:
                    model.prepare_for_generation()
                outputs.append(laws.generate(model, tiny_inputs(1, 1), 1, max_new_tokens=8, **settings))
    first = outputs[0]
    assert first.layers_run[0].tolist() == [3, NUM_LAYERS, 3, 3] * 2 and first.filled_positions.any()
    for other in outputs[1:]:
        assert torch.equal(other.sequences, first.sequences) and torch.equal(other.layers_run, first.layers_run)
        torch.testing.assert_close(other.logits, first.logits)
