"""Runs a pipeline of transformers on a model that export_model.py wrote: onnxruntime computes, PyTorch does not.

python -m examples.onnx_pipeline fill-mask models/mine_onnx "The capital of France is [MASK]."
"""

import sys

import onnxruntime
import torch
from transformers import AutoTokenizer, PreTrainedModel, pipeline
from transformers.modeling_outputs import ModelOutput

from configuration_lambdabert import LambdaBertConfig


class OnnxModel(PreTrainedModel):
    config_class = LambdaBertConfig
    device = torch.device("cpu")

    def __init__(self, folder: str):
        super().__init__(LambdaBertConfig.from_pretrained(folder))
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def forward(self, input_ids, attention_mask, token_type_ids):
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        outputs = self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        renamed = {"prediction_logits": "logits"}  # a pretraining model's
        names = (renamed.get(output.name, output.name) for output in self.session.get_outputs())
        return ModelOutput((name, torch.from_numpy(output)) for name, output in zip(names, outputs))


if len(sys.argv) != 4:
    sys.exit("error: give a task of pipelines, the folder and a text, as in fill-mask models/mine_onnx 'A [MASK].'")
task, folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
# examples.token_classification trains the label of the first piece of a word, and no other
options = {"aggregation_strategy": "first"} if task in ("token-classification", "ner") else {}
answer_to = pipeline(task, model=OnnxModel(folder), tokenizer=tokenizer, device="cpu", **options)  # type: ignore[call-overload]
for answer in answer_to(text):
    print(answer)
