"""The losses of distillation against their definitions, and the Trainer that adds them up."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from distill_from_bert import DistillationDataArguments
from lambdabert.distillation.losses import ITEM_OF_LOSS, count_items, divergence, loss_sums, squared_errors
from lambdabert.distillation.stages import attention_outputs, steps_of_first_stage, two_schedules
from lambdabert.distillation.teacher import LossWeights, Teacher
from lambdabert.distillation.trainer import DistillationTrainer
from lambdabert.text.masks import masking_collator
from lambdabert.training.arguments import RunArguments
from lambdabert.training.batches import SimilarLengths
from lambdabert.training.checkpoints import CheckpointError
from modeling_lambdabert import (
    LambdaBertForMaskedLM,
    LambdaBertForPreTrainingNSP,
    LambdaBertForSequenceClassification,
    LambdaBertForTokenClassification,
    LambdaBertModel,
)
from training_support import tiny_bert

SETTINGS = {"key_depth": 3, "intra_depth": 2, "local_context_size": 5}
CLASSES = {
    BertModel: LambdaBertModel,
    BertForMaskedLM: LambdaBertForMaskedLM,
    BertForPreTraining: LambdaBertForPreTrainingNSP,
    BertForSequenceClassification: LambdaBertForSequenceClassification,
    BertForTokenClassification: LambdaBertForTokenClassification,
}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
LENGTHS = [9, 3, 14, 6, 11, 4, 8, 12]
STAGE = ("attention_steps", "attention_learning_rate")


class MeanPooling(torch.nn.Module):
    def forward(self, features):
        mask = features["attention_mask"][..., None].to(features["token_embeddings"])
        mean = (features["token_embeddings"] * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": mean}


@pytest.fixture(params=CLASSES, ids=lambda bert_class: bert_class.__name__)
def pair(request):
    """A teacher and its student, with every loss that the teacher offers at a weight of its own."""
    bert = tiny_bert(request.param)
    torch.manual_seed(1)
    student = CLASSES[request.param].from_bert(bert, **SETTINGS)
    teacher = Teacher(bert, (MeanPooling(),) if request.param is BertModel else ())
    weights = {name: 0.5 + i for i, name in enumerate(teacher.offers)}
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return teacher, student, LossWeights(**weights)


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)}, model_max_length=40)


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    def make(teacher, student, weights, **arguments):
        generator = torch.Generator().manual_seed(0)
        examples = Dataset.from_dict(
            {
                "input_ids": [
                    [2, *torch.randint(5, 60, (length - 2,), generator=generator).tolist(), 3] for length in LENGTHS
                ]
            }
        )
        collators = []
        for _ in range(2):
            data_args = DistillationDataArguments(mlm_probability=0.4)
            collators.append(masking_collator(tokenizer, data_args, seed=0, training=True))
            collators[-1].mlm = "masked_tokens" in weights.used
        stage = {name: arguments.pop(name) for name in STAGE if name in arguments}
        arguments = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.0, **arguments}
        return DistillationTrainer(
            model=student,
            args=RunArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                label_names=["labels"],
                **arguments,
            ),
            train_dataset=examples,
            eval_dataset=examples,
            processing_class=tokenizer,
            data_collator=collators[0],
            eval_collator=collators[1],
            teacher=teacher,
            weights=weights,
            **stage,
        )

    return make


def gradients(trainer, batches):
    """The gradients of one step over the batches."""
    items = trainer.items_of_step(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, dict(batch), items) for batch in batches)
    return loss, {
        name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None
    }


def test_offers(pair):
    teacher, _, _ = pair
    special = {
        BertModel: "sentences",
        BertForMaskedLM: "masked_tokens",
        BertForPreTraining: "masked_tokens",
        BertForSequenceClassification: "classes",
        BertForTokenClassification: "classes",
    }
    assert teacher.offers == ("layers", "last_layer", special[type(teacher.model)])
    assert teacher.default_weights.used == {"layers": 1, special[type(teacher.model)]: 1}
    assert set(ITEM_OF_LOSS) == {"attention", *LossWeights.__dataclass_fields__}


class TestDivergence:
    def test_definition(self):
        logits, target = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
        p, q = target.softmax(-1), logits.softmax(-1)
        torch.testing.assert_close(
            divergence(logits, target).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6
        )

    def test_zero_for_the_same(self):
        logits = torch.randn(3, 4)
        for problem_type in (None, "single_label_classification", "multi_label_classification", "regression"):
            torch.testing.assert_close(divergence(logits, logits, problem_type), torch.zeros(3), rtol=0, atol=1e-6)

    def test_labels_of_their_own(self):
        logits, target = torch.tensor([[0.3, -2.0]]), torch.tensor([[1.0, 0.5]])
        expected = 0.0
        for x, y in zip(logits[0].tolist(), target[0].tolist(), strict=True):
            p, q = 1 / (1 + math.exp(-y)), 1 / (1 + math.exp(-x))
            expected += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert divergence(logits, target, "multi_label_classification").item() == pytest.approx(expected, rel=1e-5)

    def test_regression(self):
        assert divergence(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "regression").item() == 4


def test_losses_against_a_plain_loop(pair, make_trainer):
    teacher, student, weights = pair
    trainer = make_trainer(teacher, student, weights)
    batch = next(iter(trainer.get_eval_dataloader()))
    metrics = trainer.evaluate()
    layers, last, special, tokens, masked = 0.0, 0.0, 0.0, 0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True):
        with torch.no_grad():
            own, given = (m(ids[mask][None], output_hidden_states=True) for m in (student.eval(), teacher.model))
        pairs = list(zip(own.hidden_states[1:], given.hidden_states[1:], strict=True))
        errors = []
        for layer, (x, y) in zip(teacher.model.base_model.encoder.layer, pairs, strict=True):
            errors.append(((x - y) ** 2).mean(-1).sum() / (layer.output.LayerNorm.weight**2).mean())
        layers += sum(errors) / len(errors)
        last += errors[-1]
        tokens += int(mask.sum())
        places = labels[mask] != -100
        masked += int(places.sum())
        if "sentences" in weights.used:
            special += 1 - torch.cosine_similarity(*(states[0].mean(0) for states in pairs[-1]), dim=0)
        elif "masked_tokens" in weights.used:
            logits = [o.get("logits", o.get("prediction_logits"))[0, places] for o in (own, given)]
            special += divergence(*logits).sum()
        else:
            special += divergence(own.logits, given.logits).mean()
    count = masked if "masked_tokens" in weights.used else len(LENGTHS)
    expected = {"layers": layers / tokens, "last_layer": last / tokens, list(weights.used)[-1]: special / count}
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(value), rel=1e-4), name
    total = sum(weight * float(expected[name]) for name, weight in weights.used.items())
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-4)
    assert metrics["eval_tokens"] == tokens and metrics["eval_examples"] == len(LENGTHS)


def test_the_teacher_itself_has_no_loss(pair):
    teacher, _, weights = pair
    ids = torch.randint(5, 60, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        outputs = teacher.model(ids, output_hidden_states=True)
        if "masked_tokens" in weights.used:
            outputs["logits"] = outputs["logits"] if "logits" in outputs else outputs["prediction_logits"]
    for name, sums in loss_sums(teacher, outputs, outputs, inputs, weights.used).items():
        torch.testing.assert_close(sums, torch.zeros(2), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("before, after", [(0, 6), (4, 3)])
def test_padding_changes_no_loss(pair, make_trainer, before, after):
    """Of any amount, anywhere; the positions stay those of the tokens."""
    teacher, student, weights = pair
    if before and isinstance(teacher.model, BertForSequenceClassification):
        pytest.skip("BERT's pooler takes the first place of a row, padding or not")
    trainer = make_trainer(teacher, student.eval(), weights)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (3, 9), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)

    def losses(before, after):
        def pad(values, filler):
            return torch.nn.functional.pad(values, (before, after), value=filler)

        inputs = {
            "input_ids": pad(ids, 0),
            "attention_mask": pad(torch.ones_like(ids), 0),
            "position_ids": pad(torch.arange(9).expand(3, -1), 0),
            "labels": pad(labels, -100),
        }
        with torch.no_grad():
            return trainer.examples_losses(student, inputs), count_items(inputs)

    (plain, items), (padded, padded_items) = losses(0, 0), losses(before, after)
    assert (plain.sum(0) > 0).all()
    torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(items, padded_items)


class TestGradientAccumulation:
    def test_eight_by_one_equals_two_by_four(self, pair, make_trainer):
        trainer = make_trainer(*pair)
        examples = [trainer.train_dataset[i] for i in range(8)]
        trainer.data_collator.set_epoch(0)
        results = {}
        for size in (8, 4, 1):
            batches = [trainer.data_collator(examples[i : i + size]) for i in range(0, 8, size)]
            results[size] = gradients(trainer, batches)
        for size in (4, 1):
            torch.testing.assert_close(results[size][0], results[8][0], rtol=1e-4, atol=1e-6)
            assert results[size][1].keys() == results[8][1].keys()
            for name, gradient in results[8][1].items():
                torch.testing.assert_close(results[size][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)

    def test_the_teacher_gets_no_gradients(self, pair, make_trainer):
        trainer = make_trainer(*pair)
        before = {name: weight.clone() for name, weight in pair[0].model.state_dict().items()}
        gradients(trainer, [trainer.data_collator([trainer.train_dataset[i] for i in range(4)])])
        assert all(weight.grad is None for weight in pair[0].model.parameters())
        assert all(torch.equal(weight, before[name]) for name, weight in pair[0].model.state_dict().items())
        assert not pair[0].model.training


def test_each_example_has_its_own_losses(pair, make_trainer):
    """In a batch as alone."""
    trainer = make_trainer(*pair)
    student = pair[1].eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(LENGTHS))]
    with torch.no_grad():
        alone = torch.cat([trainer.examples_losses(student, row) for row in rows])
        torch.testing.assert_close(trainer.examples_losses(student, batch), alone, rtol=1e-4, atol=1e-5)


def test_logs_hold_the_mean_of_each_loss(pair, make_trainer):
    trainer = make_trainer(*pair, logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.train()
    logged = next(record for record in trainer.state.log_history if "layers" in record)
    total = sum(weight * logged[name] for name, weight in pair[2].used.items())
    assert logged["loss"] == pytest.approx(total, rel=1e-3)


class TestFirstStage:
    """Lambda layers that learn by themselves what attention gives."""

    @pytest.fixture
    def trainer(self, pair, make_trainer):
        """In its first step of two, which is one of the first stage."""
        trainer = make_trainer(*pair, attention_steps=1, max_steps=2)
        trainer.state.max_steps = 2
        return trainer

    def test_loss_against_a_plain_loop(self, pair, trainer):
        teacher, student, _ = pair
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        loss, _ = gradients(trainer, [batch])
        expected, tokens = 0.0, 0
        student.train()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            with torch.no_grad():
                states = teacher.model(ids[mask][None], output_hidden_states=True).hidden_states
                for layer, own, x in zip(teacher.layers, student.base_model.encoder.layer, states):
                    errors = (layer.attention(x)[0] - own.attention(x)).square().mean()
                    expected += errors * mask.sum() / layer.attention.output.LayerNorm.weight.square().mean()
            tokens += mask.sum()
        assert loss.item() == pytest.approx(expected.item() / tokens.item() / len(teacher.layers), rel=1e-4)

    def test_layers_learn_by_themselves(self, pair, trainer):
        """The gradient of one is what it is whatever the others hold, and nothing else has one."""
        student = pair[1]
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        _, before = gradients(trainer, [batch])
        assert before and all(".attention." in name for name in before)
        first, last = student.base_model.encoder.layer[0], student.base_model.encoder.layer[-1]
        with torch.no_grad():
            for weight in (*first.parameters(), *student.base_model.embeddings.parameters()):
                weight.mul_(1.5)
        _, after = gradients(trainer, [batch])
        prefix = next(name for name, module in student.named_modules() if module is last)
        for name in before:
            assert name.startswith(prefix) == torch.equal(before[name], after[name]), name

    def test_accumulation_and_checkpointing_change_no_gradient(self, pair, trainer):
        examples = [trainer.train_dataset[i] for i in range(8)]
        _, expected = gradients(trainer, [trainer.data_collator(examples)])
        batches = [trainer.data_collator(examples[i : i + 2]) for i in range(0, 8, 2)]
        _, accumulated = gradients(trainer, batches)
        pair[1].gradient_checkpointing_enable()
        _, checkpointed = gradients(trainer, [trainer.data_collator(examples)])
        for gradient in (accumulated, checkpointed):
            assert gradient.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(gradient[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)

    def test_two_stages(self, pair, make_trainer):
        """Each with its peak, warm-up and decay; the first one leaves what is copied as it is."""
        teacher, student, weights = pair
        rates, copied = [], {}

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
                rates.append(optimizer.param_groups[0]["lr"])
                if state.global_step == 10:
                    copied.update({name: weight.clone() for name, weight in student.named_parameters()})

        start = {name: weight.clone() for name, weight in student.named_parameters()}
        stages = dict(attention_steps=0.5, attention_learning_rate=4e-3, learning_rate=1e-3, warmup_steps=2)
        trainer = make_trainer(teacher, student, weights, max_steps=20, logging_steps=10, **stages)
        trainer.add_callback(Watch())
        trainer.train()
        decay = [(10 - step) / 8 for step in range(2, 10)]
        torch.testing.assert_close(rates[:10], [4e-3 * x for x in (0, 0.5, *decay)])
        torch.testing.assert_close(rates[10:], [1e-3 * x for x in (0, 0.5, *decay)])
        for name in start:
            assert torch.equal(start[name], copied[name]) == (".attention." not in name), name
        first, second = [record for record in trainer.state.log_history if "loss" in record]
        assert first["attention"] == pytest.approx(first["loss"], rel=1e-3) and "layers" not in first
        assert set(weights.used) < set(second) and "attention" not in second

    def test_second_stage_starts_with_a_new_optimizer(self, make_trainer):
        """Both stages in one run are two runs, the second of which takes up the weights of the first."""
        weights = []
        teacher = Teacher(tiny_bert(hidden_dropout_prob=0.0), (MeanPooling(),))
        for runs in ([(5, 10)], [(5, 5), (0, 5)]):
            torch.manual_seed(1)
            student = LambdaBertModel.from_bert(teacher.model, **SETTINGS)
            for attention_steps, steps in runs:
                stages = dict(attention_steps=attention_steps, attention_learning_rate=1e-2, max_steps=steps)
                make_trainer(teacher, student, LossWeights(layers=1, sentences=1), learning_rate=1e-2, **stages).train()
            weights.append(student.state_dict())
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4, msg=name)

    def test_learns(self, make_trainer):
        """Every block comes nearer to attention, and so do the states of the model that they make up."""
        bert = tiny_bert()
        torch.manual_seed(1)
        student = LambdaBertModel.from_bert(bert, **SETTINGS)
        stage = dict(attention_steps=150, attention_learning_rate=1e-2, max_steps=150, learning_rate=1e-2)
        trainer = make_trainer(Teacher(bert), student, LossWeights(layers=1), logging_steps=50, **stage)
        start = trainer.evaluate()["eval_layers"]
        trainer.train()
        assert trainer.evaluate()["eval_layers"] < start / 2
        losses = [record["attention"] for record in trainer.state.log_history if "attention" in record]
        assert losses[-1] < losses[0] / 2


class TestNotFinite:
    @pytest.mark.parametrize("stage", ["attention_losses", "examples_losses"])
    def test_loss_stops_training(self, make_trainer, monkeypatch, stage):
        teacher = Teacher(tiny_bert())
        student = LambdaBertModel.from_bert(teacher.model, **SETTINGS)
        trainer = make_trainer(
            teacher, student, LossWeights(layers=1), max_steps=4, attention_steps=2, learning_rate=1e-3
        )
        losses = getattr(trainer, stage)
        monkeypatch.setattr(trainer, stage, lambda *args: losses(*args) * math.inf)
        step = {"attention_losses": 1, "examples_losses": 3}[stage]
        with pytest.raises(CheckpointError, match=f"loss of step {step} is not a finite number"):
            trainer.train()

    def test_gradients_that_a_scaler_would_skip_do_not(self, make_trainer, monkeypatch):
        teacher = Teacher(tiny_bert())
        student = LambdaBertModel.from_bert(teacher.model, **SETTINGS)
        trainer = make_trainer(teacher, student, LossWeights(layers=1), max_steps=2, max_grad_norm=0)
        student.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient * math.inf)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: None)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_weight_is_never_written(self, make_trainer, tmp_path):
        teacher = Teacher(tiny_bert())
        student = LambdaBertModel.from_bert(teacher.model, **SETTINGS)
        trainer = make_trainer(teacher, student, LossWeights(layers=1))
        trainer.save_model(tmp_path / "good")
        student.encoder.layer[1].output.dense.bias.data[3] = math.nan
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
            trainer.save_model(tmp_path / "bad")
        assert (tmp_path / "good" / "model.safetensors").exists() and not (tmp_path / "bad").exists()


class TestSimilarLengths:
    def test_every_example_once_in_batches_of_similar_length(self):
        lengths = torch.randint(3, 100, (1003,), generator=torch.Generator().manual_seed(0))
        sampler = SimilarLengths(lengths, 8, seed=4)
        order = list(sampler)
        assert sorted(order) == list(range(1003)) and len(sampler) == 1003
        batches = lengths[torch.tensor(order[:1000])].view(-1, 8)
        spread = (batches.amax(1) - batches.amin(1)).float().mean()
        assert spread < 0.1 * (lengths.max() - lengths.min())
        longest = batches.amax(1).float()
        halves = longest[: len(longest) // 2].mean(), longest[len(longest) // 2 :].mean()
        assert abs(halves[0] - halves[1]) < 15, "batches of all lengths come all the time"
        assert longest.diff().abs().mean() > 15, "the next batch may be of any length"

    def test_other_examples_come_together_in_another_epoch(self):
        sampler = SimilarLengths(torch.arange(2000), 8, seed=0)
        epochs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            epochs.append({frozenset(batch) for batch in torch.tensor(list(sampler)).view(-1, 8).tolist()})
        assert len(epochs[0] & epochs[1]) < 25, "of 250 batches"

    def test_seed_and_epoch_decide_the_order(self):
        lengths = torch.arange(64) % 9
        orders = []
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):  # neither is the other
            sampler = SimilarLengths(lengths, 4, seed)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert orders[0] == orders[1]
        assert orders[0] not in orders[2:] and orders[2] != orders[3]


def divergence_of_labels(given, wanted):
    """Each of them a choice of its own."""
    given, wanted = torch.distributions.Bernoulli(logits=given), torch.distributions.Bernoulli(logits=wanted)
    return torch.distributions.kl_divergence(wanted, given).sum(1)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"num_labels": 1}, lambda given, wanted: (given - wanted).square().sum(1)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, divergence_of_labels),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, divergence_of_labels),
    ],
    ids=["regression", "several labels", "one of several labels"],
)
def test_the_loss_of_classes_is_that_of_the_teachers_problem(fields, expected):
    bert = tiny_bert(BertForSequenceClassification, **fields).eval()
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        targets = bert(ids, output_hidden_states=True)
    outputs = copy.copy(targets)
    outputs["logits"] = targets.logits + 2  # as likely a choice among all, but not each by itself
    found = loss_sums(Teacher(bert), outputs, targets, inputs, {"classes"})["classes"]
    torch.testing.assert_close(found, expected(outputs.logits, targets.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_half_precision_are_those_of_its_numbers_in_float32(dtype):
    teacher = Teacher(tiny_bert(), (MeanPooling(),))
    own, given = torch.randn(2, 3, 4, 7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.ones(4, 7, dtype=torch.long)
    inputs = {"attention_mask": mask, "labels": mask}
    found, expected = (
        loss_sums(
            teacher,
            SimpleNamespace(hidden_states=own.to(precision)),
            SimpleNamespace(hidden_states=given.to(precision)),
            inputs,
            {"layers", "last_layer", "sentences"},
        )
        for precision in (dtype, torch.float32)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(divergence(own, given), divergence(own.float(), given.float()), rtol=1e-6, atol=1e-6)


def test_many_tokens_of_half_precision_are_added_up_in_float32():
    """bfloat16 has no 257."""
    own, tokens = torch.ones(1, 257, 4, dtype=torch.bfloat16), torch.ones(1, 257, dtype=torch.bool)
    assert squared_errors(own, 0 * own, tokens, torch.nn.LayerNorm(4)).item() == 257


def test_teacher_and_what_follows_it_are_fixed():
    teacher = Teacher(tiny_bert().train(), (torch.nn.Dropout(0.5), torch.nn.Linear(2, 2)))
    for module in (teacher.model, *teacher.sentence_modules):
        assert not module.training and not any(weight.requires_grad for weight in module.parameters())


class TestStages:
    def test_a_share_of_steps_is_rounded_up(self):
        assert [steps_of_first_stage(share, 5) for share in (0, 0.1, 0.5, 1, 3, 9)] == [0, 1, 3, 1, 3, 5]

    def test_a_share_of_warm_up_is_of_each_stage(self, tmp_path):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=20, warmup_steps=0.2, use_cpu=True)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        rate = two_schedules(args, optimizer, (5, 15), 4.0).lr_lambdas[0]
        rates = [rate(step) for step in range(20)]
        assert rates.index(max(rates[:5])) == 1 and rates[5:].index(max(rates[5:])) == 3

    @pytest.mark.parametrize(
        "course, lowest",
        [
            (dict(lr_scheduler_type="constant"), 1),
            (dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.9}), 0.9),
        ],
        ids=["constant", "with keywords"],
    )
    def test_each_stage_has_its_whole_course(self, tmp_path, course, lowest):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=20, use_cpu=True, **course)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        rate = two_schedules(args, optimizer, (5, 15), 4.0).lr_lambdas[0]
        for peak, steps in ((4, range(5)), (1, range(5, 20))):
            rates = [rate(step) for step in steps]
            assert rates[0] == max(rates) == peak and min(rates) >= lowest * peak

    @pytest.mark.parametrize("steps", [(5, 0), (0, 5)])
    def test_a_stage_may_have_no_steps(self, tmp_path, steps):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=5, lr_scheduler_type="polynomial", use_cpu=True)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        rate = two_schedules(args, optimizer, steps, 1.0).lr_lambdas[0]
        rates = [rate(step) for step in range(6)]  # the Trainer asks for that of the step after the last
        assert rates[:5] == sorted(rates[:5], reverse=True) and rates[0] == 1 > rates[4] and math.isfinite(rates[5])

    def test_attention_is_watched_no_longer_than_asked(self):
        bert, ids = tiny_bert(), torch.arange(5, 15)[None]
        with attention_outputs(bert) as outputs:
            bert(ids)
        bert(ids)
        assert len(outputs) == bert.config.num_hidden_layers


def test_batch_that_was_found_to_fit_decides_the_order(make_trainer, monkeypatch):
    """As it does in a run that begins with it, such as one that is resumed."""
    seen, training_step = [], DistillationTrainer.training_step

    def small_memory(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen[-1].append(inputs["attention_mask"].sum(1).tolist())
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(DistillationTrainer, "training_step", small_memory)
    for batch, found in ((2, False), (8, True)):
        seen.append([])
        bert = tiny_bert()
        student = LambdaBertModel.from_bert(bert, **SETTINGS)
        given = {"per_device_train_batch_size": batch, "auto_find_batch_size": found, "max_steps": 4}
        make_trainer(Teacher(bert), student, LossWeights(layers=1), **given).train()
    assert seen[0] == seen[1] and len(seen[0]) == 4


def test_data_seed_decides_the_order(make_trainer):
    bert = tiny_bert()
    student = LambdaBertModel.from_bert(bert, **SETTINGS)
    trainer = make_trainer(Teacher(bert), student, LossWeights(layers=1), data_seed=5)
    assert trainer._get_train_sampler().seed == 5


def test_a_loss_counts_for_the_processes_that_average_it(make_trainer, monkeypatch):
    bert = tiny_bert()
    student = LambdaBertModel.from_bert(bert, **SETTINGS).eval()
    trainer = make_trainer(Teacher(bert), student, LossWeights(layers=1))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    items = trainer.items_of_step([batch], torch.device("cpu"))
    one = trainer.compute_loss(student, batch, num_items_in_batch=items)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    torch.testing.assert_close(trainer.compute_loss(student, batch, num_items_in_batch=items), 2 * one)


def test_learns(make_trainer):
    """A student comes much nearer to its teacher than it starts."""
    bert = tiny_bert()
    torch.manual_seed(1)
    student = LambdaBertModel.from_bert(bert, **SETTINGS)
    trainer = make_trainer(
        Teacher(bert, (MeanPooling(),)),
        student,
        LossWeights(layers=1, sentences=1),
        max_steps=150,
        learning_rate=1e-2,
        logging_steps=1000,
    )
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    for loss in ("eval_layers", "eval_sentences"):
        assert end[loss] < start[loss] / 3, (loss, start[loss], end[loss])
