"""Loading a teacher."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambdabert.distillation.loading import load_bert_and_tokenizer, load_sentence_transformer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teachers_compute_in_float32_whatever_they_are_stored_in(teachers, sentence_teacher, tmp_path, caplog, dtype):
    for folder in (teachers / "classifier", sentence_teacher):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        weights = load_file(copy / "model.safetensors")
        save_file({name: weight.to(dtype) for name, weight in weights.items()}, copy / "model.safetensors")
        fields = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(fields | {"dtype": str(dtype).removeprefix("torch.")}))
    bert, _ = load_bert_and_tokenizer(str(tmp_path / "classifier"))
    sentences = load_sentence_transformer(str(tmp_path / "sentences"))
    for model in (bert, sentences):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
