"""A trained BERT becomes a LambdaBERT: what is copied is equal, what is not is named, what cannot be is refused."""

import importlib
import json
import logging

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune
from transformers import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

from conversion_lambdabert import POSITION_TABLE, bare, extend_positions
from modeling_lambdabert import LambdaBertForMaskedLM, LambdaBertForSequenceClassification, LambdaBertModel
from training_support import tiny_bert

SETTINGS = {"key_depth": 3, "intra_depth": 2, "local_context_size": 5}
REPLACED = (".attention.self.", ".attention.output.dense.")


def own_bert_class(model_class):
    return next(base for base in model_class.__mro__ if base.__module__ == BertModel.__module__)


def is_replaced(name):
    return any(part in name for part in REPLACED)


class TestCopies:
    @pytest.mark.parametrize("source", ["object", "folder"])
    def test_every_weight_but_attention(self, model_class, source, tmp_path):
        bert = tiny_bert(own_bert_class(model_class))
        bert.save_pretrained(tmp_path)
        model = model_class.from_bert(bert if source == "object" else tmp_path, **SETTINGS)
        assert type(model) is model_class and not model.training
        given, own = bert.state_dict(), model.state_dict()
        assert {name for name in own if not is_replaced(name)} == {name for name in given if not is_replaced(name)}
        for name, weight in given.items():
            if not is_replaced(name):
                assert torch.equal(own[name], weight), name
        report = model.conversion_report
        assert sorted(report.copied + report.computed + report.fresh) == sorted(own)
        assert all(torch.equal(own[name], given[name]) for name in report.copied)
        assert all(is_replaced(name) for name in (*report.computed, *report.fresh, *report.left_out))
        assert not report.fresh_heads
        assert set(given) == {*report.left_out, *report.copied} | {
            name for name in given if ".self.value." in name or ".attention.output.dense." in name
        }

    def test_embeddings_and_feed_forward_compute_the_same(self):
        bert = tiny_bert()
        model = LambdaBertModel.from_bert(bert, **SETTINGS)
        ids, hidden_states = torch.arange(5, 15)[None], torch.randn(1, 10, 24)
        torch.testing.assert_close(model.embeddings(ids), bert.embeddings(ids), rtol=0, atol=0)
        torch.testing.assert_close(model.pooler(hidden_states), bert.pooler(hidden_states), rtol=0, atol=0)
        for own, given in zip(model.encoder.layer, bert.encoder.layer, strict=True):
            outputs = [layer.feed_forward_chunk(hidden_states) for layer in (own, given)]
            torch.testing.assert_close(*outputs, rtol=0, atol=0)

    def test_config_is_carried_over(self):
        labels = {0: "sad", 1: "neither", 2: "glad"}
        fields = dict(
            hidden_act="relu",
            hidden_dropout_prob=0.23,
            classifier_dropout=0.31,
            layer_norm_eps=1e-7,
            pad_token_id=3,
            type_vocab_size=5,
            initializer_range=0.04,
            tie_word_embeddings=False,
            problem_type="multi_label_classification",
        )
        bert = tiny_bert(
            BertForSequenceClassification, **fields, id2label=labels, label2id={v: k for k, v in labels.items()}
        )
        bert.config.output_hidden_states, bert.config.return_dict = True, False  # of a program, not of the model
        config = LambdaBertForSequenceClassification.from_bert(bert, **SETTINGS).config
        assert {name: getattr(config, name) for name in fields} == fields
        assert not config.output_hidden_states and config.return_dict
        assert config.id2label == labels and config.label2id == bert.config.label2id
        assert (config.vocab_size, config.max_position_embeddings) == (60, 40)
        assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
        assert config.num_lambda_queries == bert.config.num_attention_heads
        assert config.model_type == "lambdabert" and config.auto_map

    @pytest.mark.parametrize("tied", [True, False])
    def test_output_embeddings(self, tied):
        bert = tiny_bert(BertForMaskedLM, tie_word_embeddings=tied)
        model = LambdaBertForMaskedLM.from_bert(bert, **SETTINGS)
        head, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
        assert torch.equal(head.weight, bert.cls.predictions.decoder.weight)
        assert (head.weight is table.weight) == tied

    def test_the_bert_is_left_as_it_was_and_shares_nothing(self):
        bert = tiny_bert()
        before = {name: weight.clone() for name, weight in bert.state_dict().items()}
        model = LambdaBertModel.from_bert(bert, **SETTINGS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for name, weight in bert.state_dict().items():
            assert torch.equal(weight, before[name]), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_precision(self, dtype):
        model = LambdaBertModel.from_bert(tiny_bert().to(dtype), **SETTINGS)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert torch.isfinite(model(torch.arange(5, 15)[None])[0]).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_folder_of_half_precision_is_loaded_in_float32(self, dtype, tmp_path):
        bert = tiny_bert().to(dtype)
        bert.save_pretrained(tmp_path)
        model = LambdaBertModel.from_bert(tmp_path, **SETTINGS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert torch.equal(model.pooler.dense.weight, bert.pooler.dense.weight.float())

    def test_every_setting_of_the_lambda_layer(self):
        for settings in (
            dict(num_lambda_queries=1, intra_depth=1),
            dict(num_lambda_queries=24, intra_depth=3),
            dict(num_lambda_queries=2, intra_depth=8),
            *(dict(lambda_norm=norm) for norm in ("layer", "rms", "batch", "none")),
            dict(local_context_size=None),
            dict(content_gain=True),
        ):
            model = LambdaBertModel.from_bert(tiny_bert(), **SETTINGS | settings)
            assert torch.isfinite(model(torch.arange(5, 15)[None])[0]).all()
            assert all(getattr(model.config, name) == value for name, value in settings.items())

    def test_same_seed_same_model(self):
        models = []
        for _ in range(2):
            torch.manual_seed(3)
            models.append(LambdaBertModel.from_bert(tiny_bert(), **SETTINGS).state_dict())
        assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


class TestStartFromAttention:
    """Attention hands on T = Wo Wv times an average; values and output start as its best factors of their rank."""

    def factors(self, bert, intra_depth, queries=4):
        """T in the metric of the norm before, and its approximation, per layer, in float64."""
        bert = bert.double()
        settings = SETTINGS | {"intra_depth": intra_depth, "num_lambda_queries": queries}
        model = LambdaBertModel.from_bert(bert, **settings)
        norm = bert.embeddings.LayerNorm
        for of_bert, own in zip(bert.encoder.layer, model.encoder.layer, strict=True):
            attention, layer, output = of_bert.attention, own.attention.self, own.attention.output.dense
            exact = attention.output.dense.weight @ attention.self.value.weight
            of_queries = output.weight.unflatten(1, (queries, -1))
            values = layer.to_values.weight.unflatten(0, (-1, intra_depth))
            scale = (2 * 2 * queries) ** 0.5
            factors = [of_queries[:, u] @ values[:, u] for u in range(intra_depth)]
            assert all(torch.equal(of_queries[:, h], of_queries[:, h % intra_depth]) for h in range(queries))
            yield exact * norm.weight, scale * sum(factors) * norm.weight
            torch.testing.assert_close(
                output.bias, attention.output.dense(attention.self.value.bias), rtol=1e-12, atol=1e-12
            )
            norm = of_bert.output.LayerNorm

    def test_exact_at_full_rank(self):
        for exact, factors in self.factors(tiny_bert(), intra_depth=4):
            torch.testing.assert_close(factors, exact, rtol=1e-8, atol=1e-8)

    def test_best_of_its_rank(self):
        """Eckart and Young: the squared error is the sum of the squared singular values that are left out."""
        for exact, factors in self.factors(tiny_bert(), intra_depth=2):
            left_out = torch.linalg.svdvals(exact)[12:].square().sum()
            torch.testing.assert_close((exact - factors).square().sum(), left_out, rtol=1e-8, atol=1e-8)

    def test_values_have_unit_variance(self):
        bert = tiny_bert()
        layer = LambdaBertModel.from_bert(bert, **SETTINGS).encoder.layer[0].attention.self
        inputs = torch.randn(4000, 24) * bert.embeddings.LayerNorm.weight + bert.embeddings.LayerNorm.bias
        torch.testing.assert_close(layer.to_values(inputs).var(0), torch.ones(12), rtol=0.2, atol=0)

    @pytest.mark.parametrize("first", [0, 6])
    def test_a_head_that_does_nothing(self, first):
        """Of a value projection with rows of zeros, less is handed on than there are values."""
        bert = tiny_bert()
        with torch.no_grad():
            bert.encoder.layer[0].attention.self.value.weight[first:] = 0
        model = LambdaBertModel.from_bert(bert, **SETTINGS)
        assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())


class TestHeads:
    def test_a_missing_head_is_fresh_and_said_to_be(self, caplog, tmp_path):
        tiny_bert().save_pretrained(tmp_path)
        for source in (tiny_bert(), tmp_path):
            caplog.clear()
            model = LambdaBertForSequenceClassification.from_bert(source, **SETTINGS, num_labels=3)
            assert set(model.conversion_report.fresh_heads) == {"classifier.weight", "classifier.bias"}
            assert "classifier.weight" in caplog.text
            assert model.classifier.weight.shape == (3, 24) and model.config.num_labels == 3
            assert model.classifier.weight.std() < 0.05, "drawn as a new head's, not taken from elsewhere"

    def test_a_missing_pooler_is_fresh(self, tmp_path):
        bert = tiny_bert(BertForMaskedLM)
        bert.save_pretrained(tmp_path)
        for source in (bert, tmp_path):
            report = LambdaBertModel.from_bert(source, **SETTINGS).conversion_report
            assert set(report.fresh_heads) == {"pooler.dense.weight", "pooler.dense.bias"}
            assert set(report.copied) == {
                bare(name) for name in bert.state_dict() if name.startswith("bert.") and not is_replaced(name)
            }

    def test_pretraining_heads_serve_masked_language_modelling(self):
        bert = tiny_bert(BertForPreTraining)
        model = LambdaBertForMaskedLM.from_bert(bert, **SETTINGS)
        assert torch.equal(model.cls.predictions.decoder.weight, bert.cls.predictions.decoder.weight)
        assert not model.conversion_report.fresh_heads
        left_out = {name for name in model.conversion_report.left_out if not is_replaced(name)}
        assert left_out == {
            *(f"bert.pooler.dense.{part}" for part in ("weight", "bias")),
            *(f"cls.seq_relationship.{part}" for part in ("weight", "bias")),
        }

    def test_tied_weights_count_once(self):
        """A decoder that is tied to copied embeddings is no fresh weight, and does not overwrite them."""
        of_bare = LambdaBertForMaskedLM.from_bert(tiny_bert(), **SETTINGS)
        assert "cls.predictions.decoder.weight" in of_bare.conversion_report.copied
        untied = tiny_bert(BertForMaskedLM, tie_word_embeddings=False)
        model = LambdaBertForMaskedLM.from_bert(untied, **SETTINGS, tie_word_embeddings=True)
        words = untied.bert.embeddings.word_embeddings.weight
        assert not torch.equal(words, untied.cls.predictions.decoder.weight)
        assert torch.equal(model.bert.embeddings.word_embeddings.weight, words)
        assert torch.equal(model.cls.predictions.decoder.weight, words)
        assert "cls.predictions.decoder.weight" in model.conversion_report.left_out

    @pytest.mark.parametrize("given", ["id2label", "label2id"])
    def test_names_of_classes(self, given):
        bert = tiny_bert(BertForSequenceClassification, num_labels=2)
        names = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
        model = LambdaBertForSequenceClassification.from_bert(bert, **SETTINGS, **{given: names[given]})
        assert getattr(model.config, given) == names[given]
        assert not {"LABEL_0", "LABEL_1"} & {*model.config.label2id, *model.config.id2label.values()}
        assert torch.equal(model.classifier.weight, bert.classifier.weight)

    def test_names_from_json(self):
        """Keys of a JSON object are strings."""
        bert = tiny_bert(BertForSequenceClassification, num_labels=2)
        names = {"id2label": {"0": "neg", "1": "pos"}}
        config = LambdaBertForSequenceClassification.from_bert(bert, **SETTINGS, **names).config
        assert config.id2label == {0: "neg", 1: "pos"} and config.label2id == {"neg": 0, "pos": 1}

    def test_a_head_with_other_labels_is_refused(self):
        with pytest.raises(ValueError, match=r"classifier.weight .* \[2, 24\].* \[3, 24\].*leave other classes out"):
            LambdaBertForSequenceClassification.from_bert(
                tiny_bert(BertForSequenceClassification), **SETTINGS, num_labels=3
            )


class TestPositions:
    def test_rows_repeat_but_the_first(self):
        table = torch.arange(5.0)[:, None]
        assert extend_positions(table, 13).flatten().tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]
        assert torch.equal(extend_positions(table, 3), table[:3])
        assert extend_positions(table[3:4], 3).flatten().tolist() == [3, 3, 3]

    @pytest.mark.parametrize("scope", [5, None])
    def test_longer_than_the_bert(self, scope):
        bert = tiny_bert()
        settings = SETTINGS | {"local_context_size": scope}
        model = LambdaBertModel.from_bert(bert, **settings, max_position_embeddings=100)
        table, given = (m.embeddings.position_embeddings.weight for m in (model, bert))
        assert torch.equal(table[:40], given) and torch.equal(table[40:79], given[1:])
        assert model.config.max_position_embeddings == 100
        assert torch.isfinite(model(torch.randint(5, 60, (1, 100)))[0]).all()
        with pytest.raises(ValueError, match="101 tokens"):
            model(torch.randint(5, 60, (1, 101)))
        same_start = LambdaBertModel.from_bert(bert, **settings)
        for name in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"):
            assert torch.equal(model.state_dict()[name], same_start.state_dict()[name])
        assert POSITION_TABLE in model.conversion_report.copied

    def test_left_out(self):
        model = LambdaBertModel.from_bert(tiny_bert(), **SETTINGS, position_embedding_type="none")
        assert POSITION_TABLE in model.conversion_report.left_out
        assert POSITION_TABLE in str(model.conversion_report)
        assert torch.isfinite(model(torch.randint(5, 60, (1, 100)))[0]).all()


class TestRefusals:
    @pytest.mark.parametrize(
        "fields, named",
        [
            (dict(is_decoder=True), "is_decoder=True"),
            (dict(is_decoder=True, add_cross_attention=True), "is_decoder=True"),
            (dict(position_embedding_type="relative_key"), "position_embedding_type='relative_key'"),
            (dict(position_embedding_type="relative_key_query"), "position_embedding_type"),
        ],
    )
    def test_other_kinds_of_bert(self, fields, named, tmp_path):
        bert = tiny_bert(**fields)
        bert.save_pretrained(tmp_path)
        for source in (bert, tmp_path):
            with pytest.raises(ValueError, match=named):
                LambdaBertModel.from_bert(source, **SETTINGS)

    def test_cross_attention_without_a_decoder(self, tmp_path):
        """No such BERT can be built, but a config can say so."""
        tiny_bert().save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text()) | {"add_cross_attention": True}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="add_cross_attention=True: LambdaBERT is an encoder"):
            LambdaBertModel.from_bert(tmp_path, **SETTINGS)

    @pytest.mark.parametrize("name", ["RobertaModel", "DistilBertModel", "BertGenerationEncoder"])
    def test_other_architectures(self, name, tmp_path):
        model_class = getattr(transformers, name)
        fields = dict(hidden_size=24, num_attention_heads=4, num_hidden_layers=1, intermediate_size=28, vocab_size=60)
        if name == "DistilBertModel":
            fields = dict(dim=24, n_heads=4, n_layers=1, hidden_dim=28, vocab_size=60)
        other = model_class(model_class.config_class(**fields))
        other.save_pretrained(tmp_path)
        for source in (other, tmp_path):
            with pytest.raises(ValueError, match=f"model_type='{other.config.model_type}'"):
                LambdaBertModel.from_bert(source, **SETTINGS)

    def test_a_lambdabert_and_what_is_no_model(self, make_config, tmp_path):
        with pytest.raises(ValueError, match="lambdabert"):
            LambdaBertModel.from_bert(LambdaBertModel(make_config()))
        with pytest.raises(ValueError, match="Linear is not a BERT"):
            LambdaBertModel.from_bert(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="model_type=None"):
            LambdaBertModel.from_bert(tmp_path)
        with pytest.raises(OSError):
            LambdaBertModel.from_bert("nobody/has-such-a-model")

    @pytest.mark.parametrize(
        "field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "type_vocab_size"]
    )
    def test_settings_that_contradict_the_weights(self, field):
        with pytest.raises(ValueError, match=f"{field}=12 contradicts"):
            LambdaBertModel.from_bert(tiny_bert(), **SETTINGS, **{field: 12})

    def test_settings_that_do_not_exist_or_cannot_work(self):
        with pytest.raises(ValueError, match="no field lambda_depth"):
            LambdaBertModel.from_bert(tiny_bert(), lambda_depth=3)
        with pytest.raises(ValueError, match="num_lambda_queries=5"):
            LambdaBertModel.from_bert(tiny_bert(), num_lambda_queries=5)
        with pytest.raises(ValueError, match="num_attention_heads has no effect"):
            LambdaBertModel.from_bert(tiny_bert(), num_attention_heads=2)
        for name, value in {"dtype": torch.bfloat16, "architectures": ["BertModel"], "model_type": "bert"}.items():
            with pytest.raises(ValueError, match=f"{name} has no effect"):
                LambdaBertModel.from_bert(tiny_bert(), **{name: value})

    def test_an_encoder_that_is_not_as_its_config_says(self):
        """Its weights have other names or numbers, and would be left out in silence."""
        adapted, pruned, shorter, longer = (tiny_bert() for _ in range(4))
        get_peft_model(adapted, LoraConfig(target_modules=["query", "value", "dense"]))
        prune.l1_unstructured(pruned.encoder.layer[0].intermediate.dense, "weight", 0.1)
        shorter.encoder.layer = shorter.encoder.layer[:1]
        longer.encoder.layer.append(longer.encoder.layer[0])
        for bert in (adapted, pruned, shorter, longer):
            with pytest.raises(ValueError, match="unlike a BERT of its config"):
                LambdaBertModel.from_bert(bert, **SETTINGS)
        prune.remove(pruned.encoder.layer[0].intermediate.dense, "weight")
        assert not LambdaBertModel.from_bert(pruned, **SETTINGS).conversion_report.fresh_heads


def test_report_reads_well(caplog):
    with caplog.at_level(logging.WARNING):
        model = LambdaBertModel.from_bert(tiny_bert(), **SETTINGS)
    report = model.conversion_report
    for said in (f"copied {len(report.copied)}", f"left out {len(report.left_out)}", "LambdaBertModel from BertModel"):
        assert said in caplog.text
    lambdas = {
        f"encoder.layer.{i}.attention.self.{name}"
        for i in range(2)
        for name in dict(model.encoder.layer[i].attention.self.named_parameters())
    }
    assert lambdas <= {*report.fresh, *report.computed}


def test_report_names_heads_where_they_belong():
    model = LambdaBertForSequenceClassification.from_bert(tiny_bert(BertForPreTraining), **SETTINGS)
    fresh, left_out = str(model.conversion_report).splitlines()[2:]
    assert fresh.startswith("fresh") and "classifier.weight" in fresh and "cls." not in fresh
    assert (
        left_out.startswith("left out") and "cls.seq_relationship.weight" in left_out and "classifier" not in left_out
    )


LOADED_ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
folder, bert, saved = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.arange(5, 15)[None]).logits, saved)
again = type(model).from_bert(bert, key_depth=3, intra_depth=2, local_context_size=5)
assert torch.equal(again.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
"""


def test_saved_folder_serves_a_new_process_and_converts_there(tmp_path):
    run_elsewhere = importlib.import_module("test_modeling_common").run_elsewhere
    bert = tiny_bert(BertForSequenceClassification)
    bert.save_pretrained(tmp_path / "bert")
    model = LambdaBertForSequenceClassification.from_bert(bert, **SETTINGS)
    model.save_pretrained(tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path / "bert", tmp_path / "logits.pt")
    done = run_elsewhere(LOADED_ELSEWHERE, *arguments, folder=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(torch.arange(5, 15)[None]).logits)


@pytest.mark.parametrize("model_class", [LambdaBertModel, LambdaBertForMaskedLM])
def test_a_folder_that_lacks_weights_of_the_encoder_is_refused(model_class, tmp_path):
    bert = tiny_bert(own_bert_class(model_class))
    bert.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (lost,) = (name for name in weights if name.endswith("encoder.layer.0.output.dense.bias"))
    weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for {lost}.*give another"):
        model_class.from_bert(tmp_path, **SETTINGS)
