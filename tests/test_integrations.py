"""LambdaBERT inside the tools around transformers: pipelines, LoRA, sentence-transformers."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import BertTokenizer, pipeline

from modeling_lambdabert import (
    LambdaBertForMaskedLM,
    LambdaBertForSequenceClassification,
    LambdaBertForTokenClassification,
    LambdaBertModel,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture
def save_model(make_config, tmp_path):
    """Saves a tiny model of a class, with its tokenizer, and returns the folder."""

    def save(model_class, **overrides):
        torch.manual_seed(0)
        model_class(make_config(vocab_size=len(TOKENS), **overrides)).save_pretrained(tmp_path / "model")
        vocabulary = {token: index for index, token in enumerate(TOKENS)}
        BertTokenizer(vocab=vocabulary, model_max_length=40).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


class TestPipelines:
    def test_fill_mask(self, save_model):
        pipe = pipeline("fill-mask", model=str(save_model(LambdaBertForMaskedLM)))
        predictions = pipe("the cat [MASK] on a mat", top_k=3)
        assert len(predictions) == 3
        assert all(prediction["token_str"] in TOKENS for prediction in predictions)
        scores = [prediction["score"] for prediction in predictions]
        assert scores == sorted(scores, reverse=True) and 0 < sum(scores) <= 1

    def test_feature_extraction(self, save_model):
        pipe = pipeline("feature-extraction", model=str(save_model(LambdaBertModel)))
        assert torch.tensor(pipe("the cat sat")).shape == (1, 5, 20)

    def test_text_classification_does_not_depend_on_the_batch(self, save_model):
        pipe = pipeline("text-classification", model=str(save_model(LambdaBertForSequenceClassification)))
        texts = ["the cat sat", "a dog ran far away on the mat", "dog"]
        alone = [pipe(text)[0] for text in texts]
        together = pipe(texts, batch_size=3)
        for one, other in zip(alone, together):
            assert one["label"] == other["label"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)

    def test_token_classification(self, save_model):
        pipe = pipeline("token-classification", model=str(save_model(LambdaBertForTokenClassification)))
        assert [entity["word"] for entity in pipe("the cat sat")] == ["the", "cat", "sat"]


class TestLoRA:
    def test_projections_take_adapters(self, make_config, make_inputs, make_labels):
        peft = pytest.importorskip("peft")
        config = make_config()
        torch.manual_seed(0)
        base = LambdaBertForSequenceClassification(config)
        lora = peft.LoraConfig(r=4, target_modules=["to_queries", "to_keys", "to_values"])
        model = peft.get_peft_model(base, lora).train()
        inputs = make_inputs(type(base), config)
        before = model(**inputs).logits
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        model(**inputs, **make_labels(type(base), config)).loss.backward()
        optimizer.step()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert len(trained) == config.num_hidden_layers * 3 * 2
        assert all("lora_" in name for name in trained)
        model.eval()
        with torch.no_grad():
            for name in trained:
                model.get_parameter(name).normal_()
        adapted = model(**inputs).logits
        assert not torch.allclose(adapted, before, atol=1e-4)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-4, atol=1e-5)

    def test_adapters_save_and_load(self, save_model, make_inputs, tmp_path):
        peft = pytest.importorskip("peft")
        folder = save_model(LambdaBertForMaskedLM)
        model = peft.get_peft_model(
            LambdaBertForMaskedLM.from_pretrained(folder), peft.LoraConfig(target_modules=["to_values"])
        ).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(LambdaBertForMaskedLM.from_pretrained(folder), tmp_path / "adapter")
        inputs = make_inputs(LambdaBertForMaskedLM, loaded.config)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize("others", [[], ["pooler"]], ids=["as in the README", "pooler trained"])
    def test_a_fresh_classifier_predicts_the_same_after_loading(self, save_model, make_inputs, tmp_path, others):
        """From an MLM checkpoint, in which neither classifier nor pooler is, loaded again under another seed."""
        peft = pytest.importorskip("peft")
        folder = save_model(LambdaBertForMaskedLM)
        lora = peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=["to_queries", "to_keys", "to_values"], modules_to_save=[*others]
        )
        torch.manual_seed(1)
        model = peft.get_peft_model(LambdaBertForSequenceClassification.from_pretrained(folder), lora).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(tmp_path / "adapter")
        torch.manual_seed(2)
        base = LambdaBertForSequenceClassification.from_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        inputs = make_inputs(LambdaBertForSequenceClassification, base.config)
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


SENTENCE_TRANSFORMER = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

folder, saved = sys.argv[1:]
remote = {"trust_remote_code": True}
transformer = Transformer(folder, model_kwargs=remote, config_kwargs=remote, processor_kwargs=remote)
model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
texts = ["the cat sat on a mat", "dog", "a dog ran far away"]
embeddings = model.encode(texts)
assert embeddings.shape == (3, 20), embeddings.shape
alone = model.encode(texts[1:2])
assert abs(alone[0] - embeddings[1]).max() < 1e-5

loss_function = losses.CosineSimilarityLoss(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
pairs = [model.preprocess(texts[:2]), model.preprocess(texts[1:])]
losses_seen = []
for _ in range(2):
    loss = loss_function(pairs, torch.tensor([0.0, 0.0]))
    losses_seen.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses_seen[1] < losses_seen[0], losses_seen

embeddings = model.encode(texts)
model.save(saved)
loaded = SentenceTransformer(saved, trust_remote_code=True, device="cpu")
assert abs(loaded.encode(texts) - embeddings).max() < 1e-6
"""


def test_sentence_transformers(save_model, tmp_path):
    """Encode, train, save and load again, in a process that cannot import this repository."""
    pytest.importorskip("sentence_transformers")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SENTENCE_TRANSFORMER, str(save_model(LambdaBertModel)), str(tmp_path / "sentence")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
