"""The fine-tuning examples learn from tiny data, and what they print is what the model that they save does."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    pipeline,
)
from transformers.trainer_utils import PredictionOutput

from examples import lora, question_answering, sentence_embeddings, text_classification, token_classification
from examples.common import Training, read_table, run
from examples.question_answering import answer_scores, best_span, find_answers
from examples.token_classification import read_tagged, span_scores, spans
from fine_tuning_support import labelled, save_tiny_model, sentence, tagged, write_conll, write_csv
from modeling_lambdabert import LambdaBertForSequenceClassification
from training_support import WORDS

ROOT = Path(__file__).resolve().parent.parent
MISSING_EVALUATION = "error: train_file=a.csv: give a --validation_file or --test_file to evaluate on.\n"
# most of what a run needs, and quickly: no progress bars, no accelerator
QUICK = ["--use_cpu", "--disable_tqdm=True", "--per_device_train_batch_size=8", "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    return save_tiny_model(text / "tokenizer", tmp_path_factory.mktemp("model"))


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def texts(tmp_path):
    """Flags of a table of texts whose subject is the class, one to train on and one to test."""
    head = ["sentence", "kind"]
    return [
        f"--train_file={write_csv(tmp_path / 'train.csv', head, labelled(64, 0))}",
        f"--test_file={write_csv(tmp_path / 'test.csv', head, labelled(24, 1))}",
        "--text_column=sentence",
        "--label_column=kind",
        "--max_seq_length=32",
        *QUICK,
    ]


def written(folder, split):
    return json.loads((folder / f"{split}_results.json").read_text())


def test_text_classification(model, texts, tmp_path):
    output = tmp_path / "result"
    found = text_classification.main([f"--model={model}", f"--output_dir={output}", "--num_train_epochs=6", *texts])
    assert found["test_accuracy"] > 0.9 and written(output, "test") == found
    assert accuracy(output, labelled(24, 1)) == pytest.approx(found["test_accuracy"])


def accuracy(folder, rows):
    """Of the classifier in a folder, on texts with their labels."""
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    return np.mean([classify(sentence)[0]["label"] == label for sentence, label in rows])


def test_accuracy_and_f1_of_a_class_that_is_never_predicted():
    logits = np.array([[1.0, 0.0]] * 4)
    found = text_classification.accuracy_and_f1(PredictionOutput(logits, np.array([0, 0, 0, 1]), None))
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx(3 / 7)}


def test_results_are_of_all_rows_whatever_training_drops(model, texts, tmp_path):
    flags = [f"--model={model}", *texts, "--max_steps=4", "--per_device_eval_batch_size=16"]
    found = [
        text_classification.main([*flags, f"--output_dir={tmp_path / name}", f"--dataloader_drop_last={name}"])
        for name in ("False", "True")
    ]
    assert found[0]["test_accuracy"] == found[1]["test_accuracy"] != 0
    assert found[0]["test_macro_f1"] == found[1]["test_macro_f1"]


def test_text_classification_takes_a_data_set_with_named_classes(model, tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["person", "animal"])})
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        texts, labels = zip(*labelled(16, 0))
        rows = Dataset.from_dict({"text": texts, "label": labels}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = [f"--dataset_name={tmp_path / 'data'}", f"--output_dir={tmp_path / 'result'}", "--max_steps=1"]
    found = text_classification.main([f"--model={model}", "--max_seq_length=32", *options, *QUICK])
    assert set(found) == {"validation_accuracy", "validation_macro_f1"}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "result").config.id2label[1] == "animal"


def test_splits_without_labels_are_left_out():
    features = Features({"label": ClassLabel(names=["person", "animal"])})
    known, secret = (Dataset.from_dict({"label": labels}, features=features) for labels in ([0, 1], [-1, -1]))
    splits = DatasetDict({"train": known, "validation": known, "test": secret})
    assert list(text_classification.labelled(splits, "label")) == ["train", "validation"]
    splits.pop("validation")
    with pytest.raises(ValueError, match="label_column=label: the test data has no labels"):
        text_classification.labelled(splits, "label")


@pytest.mark.parametrize(
    "labels, shown",
    [([0.5, 1.0], "0.5"), ([0.0, 1.0], "0.0"), (["1", "2.5"], "2.5"), ([1, 2], None), (["1.0", "2"], None)],
)
def test_measurements_are_no_classes(labels, shown):
    rows = Dataset.from_dict({"score": labels})
    splits = DatasetDict({"train": rows, "test": rows})
    if shown is None:
        names = text_classification.with_class_labels(splits, "score")["train"].features["score"].names
        assert names == list(map(str, labels))
        return
    with pytest.raises(ValueError, match=f"^label_column=score of the train data holds {shown}: labels are measurem"):
        text_classification.with_class_labels(splits, "score")


@pytest.mark.parametrize("without", [None, "", " "])
def test_a_missing_label_is_no_class(without):
    known, some = (Dataset.from_dict({"label": labels}) for labels in (["a", "b"], ["a", without, "b"]))
    for split in ("train", "test"):
        splits = DatasetDict({"train": known, "test": known} | {split: some})
        with pytest.raises(ValueError, match=f"1 rows of the {split} data have no label, row 2 the first"):
            text_classification.with_class_labels(splits, "label")


def test_some_missing_labels_are_no_secret_test_data():
    features = Features({"label": ClassLabel(names=["person", "animal"])})
    known, some = (Dataset.from_dict({"label": labels}, features=features) for labels in ([0, 1], [0, 1, -1]))
    with pytest.raises(ValueError, match="label_column=label: 1 rows of the test data have no label"):
        text_classification.labelled(DatasetDict({"train": known, "test": some}), "label")


def test_lora_trains_and_saves_what_is_beside_the_encoder(model, texts, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    output = tmp_path / "result"
    found = lora.main([f"--model={model}", f"--output_dir={output}", "--num_train_epochs=6", "--rank=4", *texts])
    saved = load_file(output / "adapter_model.safetensors")
    assert all(re.search(r"to_(queries|keys|values)\.lora_|pooler|classifier", name) for name in saved)
    assert all(weight.any() for name, weight in saved.items() if "lora_B" in name), "they start at zero"
    config = AutoConfig.from_pretrained(output)
    assert config.id2label == {0: "animal", 1: "person"}
    base = LambdaBertForSequenceClassification.from_pretrained(model, config=config)
    tuned = PeftModel.from_pretrained(base, output).eval()
    encoded, labels = zip(*labelled(24, 1))
    inputs = AutoTokenizer.from_pretrained(model)(list(encoded), padding=True, return_tensors="pt")
    right = tuned(**inputs).logits.argmax(-1).numpy() == [label == "person" for label in labels]
    assert right.mean() == pytest.approx(found["test_accuracy"])


def test_spans_are_those_of_conll():
    assert spans([]) == set() and spans(["O", "O"]) == set()
    assert spans(["B-a", "I-a", "O", "B-a"]) == {("a", 0, 2), ("a", 3, 4)}
    assert spans(["B-a", "B-a", "I-a"]) == {("a", 0, 1), ("a", 1, 3)}
    assert spans(["I-a", "I-b", "I-b", "O"]) == {("a", 0, 1), ("b", 1, 3)}
    assert spans(["O", "I-a", "I-a"]) == {("a", 1, 3)}


def test_span_scores_count_whole_entities():
    correct = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]]
    assert span_scores(correct, correct) == {"precision": 1, "recall": 1, "f1": 1}
    # one of three found, and two that are none: a part of an entity and another kind
    predicted = [["B-a", "O", "O"], ["B-b", "O", "B-b"]]
    assert span_scores(predicted, correct) == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3})
    assert span_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0}


def test_token_classification(model, tmp_path):
    output = tmp_path / "result"
    options = [f"--model={model}", f"--output_dir={output}", "--num_train_epochs=6", "--max_seq_length=40", *QUICK]
    options += [f"--train_file={write_conll(tmp_path / 'train.conll', tagged(64, 0))}"]
    nothing = "\u200d"  # a joiner, which tokenizers drop
    rows = [([nothing, *words], ["O", *tags]) for words, tags in tagged(24, 1)]
    options += [f"--test_file={write_conll(tmp_path / 'test.conll', rows)}"]
    found = token_classification.main(options)
    assert AutoTokenizer.from_pretrained(model).tokenize(nothing) == []
    assert found["test_f1"] > 0.9 and written(output, "test") == found
    tag = pipeline("token-classification", model=str(output), device="cpu", aggregation_strategy="first")
    words, tags = tagged(24, 1)[0]
    assert tag(" ".join(words))[0]["entity_group"] == tags[0].removeprefix("B-")


def test_entities_that_are_cut_off_count_as_missed(model, tmp_path):
    """With three tokens, [CLS] and [SEP] among them, there is one word of each sentence to be seen."""
    rows = [(["night", "fox"], ["O", "B-animal"])] * 8
    file = write_conll(tmp_path / "train.conll", rows)
    options = [f"--model={model}", f"--train_file={file}", f"--test_file={file}", "--max_seq_length=3", *QUICK]
    found = token_classification.main([*options, f"--output_dir={tmp_path / 'result'}", "--max_steps=1"])
    assert found["test_recall"] == 0


def test_token_classification_reads_numbered_tags(model, tmp_path):
    features = Features(
        {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=["O", "B-animal", "I-animal"]))}
    )
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_dict({"tokens": [["the", "fox"]] * 4, "ner_tags": [[1, 2]] * 4}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = [f"--dataset_name={tmp_path / 'data'}", f"--output_dir={tmp_path / 'result'}", "--max_steps=30"]
    found = token_classification.main([f"--model={model}", "--max_seq_length=32", *options, *QUICK])
    assert found["test_f1"] == 1


def test_conll_files_are_read_by_first_and_last_column(tmp_path):
    (tmp_path / "a.conll").write_text(
        "-DOCSTART- -X- O O\n\nEU NNP B-NP B-org\nrejects VBZ B-VP O\n\n\nParis X Y B-loc\n"
    )
    rows = read_tagged(str(tmp_path / "a.conll"), token_classification.TagOptions())
    assert rows["tokens"] == [["EU", "rejects"], ["Paris"]] and rows["ner_tags"] == [["B-org", "O"], ["B-loc"]]


def questions(count, seed, sentences=3):
    """Contexts in which each of several subjects sees something, and the question what one of them sees."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        subjects = rng.sample(WORDS["subject"], sentences)
        objects = rng.sample(WORDS["object"], sentences)
        context = " ".join(f"{subject} sees {seen}." for subject, seen in zip(subjects, objects))
        chosen = rng.randrange(sentences)
        answers = {"text": [objects[chosen]], "answer_start": [context.index(objects[chosen])]}
        rows.append({"question": f"{subjects[chosen]} sees", "context": context, "answers": answers})
    return rows


@pytest.mark.parametrize("length,stride", [(40, 8), (20, 6)])
def test_stretches_hold_every_answer_and_give_it_back(model, length, stride):
    """Logits that point at the labels give all answers, whether a context is one stretch or several."""
    rows = Dataset.from_list(questions(12, 0))
    options = question_answering.AnswerOptions(max_seq_length=length, stride=stride)
    encoded = question_answering.encode(rows[:], AutoTokenizer.from_pretrained(model), options)
    assert (len(encoded["row"]) > 12) == (length == 20)
    stretches = Dataset.from_dict(dict(encoded))
    logits = {}
    for end in ("start", "end"):
        logits[end] = np.zeros((len(stretches), length), dtype=np.float32)
        logits[end][np.arange(len(stretches)), stretches[f"{end}_positions"]] = 20
    answers = find_answers(rows, stretches, logits["start"], logits["end"])
    assert answers == [answer["text"][0] for answer in rows["answers"]]


def test_blanks_around_an_answer_are_not_part_of_it():
    offsets = [(-1, -1), (0, 3), (4, 8), (9, 12)]  # [CLS], and "the year ago"
    for answer, start in (("year", 4), (" year", 3), ("year ", 4), (" year ", 3)):
        answers = {"text": [answer], "answer_start": [start]}
        assert question_answering.answer_tokens(offsets, answers) == (2, 2)


def test_best_span_lies_in_the_context_and_is_in_order():
    offsets = np.array([[-1, -1], [-1, -1], [0, 3], [4, 8], [9, 12], [-1, -1]])
    starts, ends = np.array([9.0, 8, 1, 2, 3, 0]), np.array([9.0, 8, 5, 1, 0, 0])
    _, first, last = best_span(starts, ends, offsets)
    assert (first, last) == (0, 3)  # 1 + 5; the pair 3 + 5 would end before it starts


@pytest.mark.parametrize("apart, allowed", [(29, True), (30, False)])
def test_best_span_has_thirty_tokens_at_most(apart, allowed):
    offsets = np.stack([np.arange(40), np.arange(1, 41)], axis=1)
    starts, ends = np.zeros((2, 40))
    starts[3] = ends[3 + apart] = 9.0
    assert (best_span(starts, ends, offsets)[1:] == (3, 4 + apart)) == allowed


def test_stretches_compare_by_probability():
    """One that has no answer may have large logits all the same."""
    rows = Dataset.from_list([{"context": "a red boat"}])
    offsets = [[[-1, -1], [0, 1], [2, 5]], [[-1, -1], [2, 5], [6, 10]]]
    stretches = Dataset.from_list([{"row": 0, "offsets": some} for some in offsets])
    logits = np.array([[30.0, 5, 0], [0, 0, 3]])
    assert find_answers(rows, stretches, logits, logits) == ["boat"]


def test_answer_scores_are_those_of_squad():
    found = answer_scores(["The red boat!", "a boat", "night"], [["red boat"], ["a red boat", "ship"], ["day"]])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("more", [[], ["--train_sampling_strategy=group_by_length"]], ids=str)
def test_question_answering(model, tmp_path, more):
    output = tmp_path / "result"
    options = [f"--train_file={write_lines(tmp_path / 'train.jsonl', questions(64, 0, 1))}"]
    options += [f"--validation_file={write_lines(tmp_path / 'valid.jsonl', questions(16, 1, 1))}"]
    options += ["--max_seq_length=32", "--stride=8", "--num_train_epochs=6", f"--output_dir={output}"]
    found = question_answering.main([f"--model={model}", *options, *more, *QUICK])
    assert found["validation_exact_match"] > 0.8 and written(output, "validation") == found


def pairs(count, seed):
    """Sentences of the same subject with a high score, of different ones with a low one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = rng.sample(WORDS["subject"], 2)
        rows += [(sentence(rng, first), sentence(rng, first), 5), (sentence(rng, first), sentence(rng, second), 0)]
    return rows


def test_sentence_embeddings(model, tmp_path):
    from sentence_transformers import SentenceTransformer

    output, head = tmp_path / "result", ["sentence1", "sentence2", "score"]
    options = [f"--train_file={write_csv(tmp_path / 'train.csv', head, pairs(48, 0))}"]
    options += [f"--validation_file={write_csv(tmp_path / 'valid.csv', head, pairs(24, 1))}"]
    options += ["--least_score=4", "--max_seq_length=32", "--num_train_epochs=4", f"--output_dir={output}"]
    found = sentence_embeddings.main([f"--model={model}", *options, *QUICK])
    assert found["validation_spearman"] > found["validation_spearman_before"] + 0.1
    encode = SentenceTransformer(str(output), device="cpu").encode
    first, second, scores = zip(*pairs(24, 1))
    cosines = (encode(first, normalize_embeddings=True) * encode(second, normalize_embeddings=True)).sum(1)
    ranks = [np.unique(values, return_inverse=True)[1] for values in (cosines, scores)]
    assert np.corrcoef(np.argsort(np.argsort(cosines)), ranks[1])[0, 1] == pytest.approx(
        found["validation_spearman"], abs=1e-3
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (["--test_file=nowhere.csv"], r"test_file=nowhere\.csv: no such file"),
        (["--text_column=words"], "text_column=words: the t.* data has no such column; it has sentence, kind"),
        (["--max_seq_length=41"], "max_seq_length=41: .* takes 40 tokens at most"),
        (["--max_seq_length=2"], "max_seq_length=2 leaves no token"),
        (["--eval_do_concat_batches=False"], "eval_do_concat_batches=False: the results"),
        (["--prediction_loss_only=True"], "prediction_loss_only=True: the results"),
        (["--dataset_name=x"], "either --train_file or --dataset_name"),
        (["--dataset_config=en"], "dataset_config=en has no effect without --dataset_name"),
        (["--do_eval"], "do_eval=True: the model is trained"),
        (["--output_dir=."], "output_dir=. holds something already"),
        (["--resume_from_checkpoint=there"], "resume_from_checkpoint=there has no effect"),
        (["--eval_strategy=epoch"], "eval_strategy=epoch: the result is evaluated at the end"),
        (["--eval_steps=5"], r"eval_steps=5(\.0)?: the result is evaluated once"),
        (["--eval_on_start"], "eval_on_start=True: the result is evaluated once"),
        (["--do_predict"], "do_predict=True: the result is evaluated once"),
        (["--metric_for_best_model=f1"], "metric_for_best_model=f1: the result is evaluated once"),
        (["--label_names=kind"], r"label_names=\['kind'\]: the result is evaluated once"),
        (["--remove_unused_columns=False"], "remove_unused_columns=False: examples keep columns"),
        (["--label_column=sentence"], "text_column and label_column are both sentence; name two"),
        (["--learning_rate=fast"], "learning.rate: invalid float value: 'fast'"),
        (["--model=nowhere/at-all"], "model=nowhere/at-all is not the folder or hub name of a model"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(change, message, model, texts, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        text_classification.main([f"--model={model}", *texts, f"--output_dir={tmp_path / 'result'}", *change])
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize("name", ["validation_file", "test_file"])
def test_files_beside_a_data_set_are_not_passed_over(model, name, tmp_path):
    options = [f"--model={model}", "--dataset_name=x", f"--{name}=a.csv", f"--output_dir={tmp_path / 'result'}"]
    with pytest.raises(ValueError, match=f"{name}=a.csv has no effect: dataset_name has splits of its own"):
        text_classification.main(options)


@pytest.mark.parametrize("example", [question_answering, sentence_embeddings])
def test_labels_that_are_not_there_are_not_smoothed(example, model, tmp_path):
    options = ["--train_file=a.csv", "--test_file=b.csv", "--label_smoothing_factor=0.1", "--max_seq_length=32"]
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 has no effect"):
        example.main([f"--model={model}", *options, f"--output_dir={tmp_path / 'result'}"])


def test_a_half_precision_model_is_trained_in_float32(model, texts, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model, half)
    AutoModelForMaskedLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(half)
    text_classification.main([f"--model={half}", *texts, "--max_steps=1", f"--output_dir={tmp_path / 'out'}", *QUICK])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_tags_in_a_file_of_another_kind(tmp_path):
    options = token_classification.TagOptions(train_file="a", validation_file="b")
    with pytest.raises(ValueError, match=r"a.iob2: the name should end in .conll, .txt, .csv, .json"):
        token_classification.read_tagged("a.iob2", options)


def test_classes_and_tags_that_training_lacks_are_refused(model, texts, tmp_path):
    write_csv(tmp_path / "test.csv", ["sentence", "kind"], [("the river", "thing")])
    with pytest.raises(ValueError, match="kind='thing' of the test data does not occur in the training data"):
        text_classification.main([f"--model={model}", *texts, f"--output_dir={tmp_path / 'result'}"])
    file = write_conll(tmp_path / "train.conll", tagged(4, 0))
    for tag, message in (("B-thing", "ner_tags='B-thing' of the test data"), ("thing", "'thing' .* is not a BIO tag")):
        other = write_conll(tmp_path / "test.conll", [(["fox"], [tag])])
        options = [f"--model={model}", f"--train_file={file}", f"--test_file={other}", "--max_seq_length=32", *QUICK]
        with pytest.raises(ValueError, match=message):
            token_classification.main([*options, f"--output_dir={tmp_path / 'result'}"])


def test_questions_without_their_answer_are_refused(model, tmp_path):
    rows = questions(2, 0)
    options = [f"--model={model}", f"--output_dir={tmp_path / 'result'}", "--max_seq_length=32", *QUICK]
    for answers, message in (
        ({"text": [], "answer_start": []}, "has a question without an answer"),
        ({"text": [""], "answer_start": [0]}, "has a question without an answer"),
        ({"text": [" "], "answer_start": [3]}, "has a question without an answer"),
        ({"text": ["a red boat"], "answer_start": [1]}, "answer_start=1 is not where 'a red boat' stands"),
    ):
        file = write_lines(tmp_path / "train.jsonl", [rows[0], rows[1] | {"answers": answers}])
        with pytest.raises(ValueError, match=message):
            question_answering.main([*options, f"--train_file={file}", f"--validation_file={file}"])


def test_squads_own_nested_file_is_named(model, tmp_path):
    (row,) = questions(1, 0)
    answers = [{"text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}]
    paragraph = {"context": row["context"], "qas": [{"id": "1", "question": row["question"], "answers": answers}]}
    file = tmp_path / "train-v1.1.json"
    file.write_text(json.dumps({"data": [{"title": "Fox", "paragraphs": [paragraph]}], "version": "1.1"}))
    flags = [f"--model={model}", f"--train_file={file}", f"--validation_file={file}", "--max_seq_length=32", *QUICK]
    with pytest.raises(ValueError, match=r"v1.1.json has no column question, but data.*dataset_name rajpurkar/squad"):
        question_answering.main([*flags, f"--output_dir={tmp_path / 'result'}"])


def test_answers_of_another_shape_and_long_questions_are_refused(model, tmp_path):
    rows = questions(2, 0)
    options = [f"--model={model}", f"--output_dir={tmp_path / 'result'}", *QUICK]

    def refuses(rows, message, *more):
        file = write_lines(tmp_path / "train.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            question_answering.main([*options, *more, f"--train_file={file}", f"--validation_file={file}"])

    refuses(
        [row | {"answers": "a boat"} for row in rows],
        "answers='a boat' of the train data: it takes",
        "--max_seq_length=32",
    )
    right = rows[0]["answers"]
    for change, message in (
        ({"answers": right | {"answer_start": [None]}}, "text and answer_start are lists"),
        ({"answers": right | {"answer_start": []}}, "text and answer_start are lists"),
        ({"context": None}, "a row without a question or a context"),
        ({"question": " "}, "a row without a question or a context"),
    ):
        refuses([rows[1], rows[0] | change], message, "--max_seq_length=32")
    scalar = [row | {"answers": {name: values[0] for name, values in row["answers"].items()}} for row in rows]
    refuses(scalar, "text and answer_start are lists", "--max_seq_length=32")
    refuses(rows, "stride=-1: give 0 or more", "--max_seq_length=32", "--stride=-1")
    rows[1]["question"] = "the fox sees " * 8
    refuses(rows, "max_seq_length=32: a question has 24 tokens, .* stride=6", "--max_seq_length=32", "--stride=6")


def test_columns_that_are_not_used_do_not_matter(model, tmp_path):
    """Nor that one file has them and another does not."""
    rows = [("the fox sees", "animal"), ("a sailor", "person")] * 4
    train = write_csv(tmp_path / "train.csv", ["sentence", "kind", "id"], [(*row, "1") for row in rows])
    tested = [*rows, ("the fox sees", "person")]
    test = write_csv(tmp_path / "test.csv", ["source", "sentence", "kind"], [("web", *row) for row in tested])
    columns = ["--text_column=sentence", "--label_column=kind", "--max_seq_length=32", *QUICK]
    files = [f"--train_file={train}", f"--test_file={test}"]
    found = text_classification.main([f"--model={model}", *files, *columns, f"--output_dir={tmp_path / 'result'}"])
    assert found["test_accuracy"] == pytest.approx(accuracy(tmp_path / "result", tested))


def test_texts_tags_and_scores_that_are_missing_are_refused(model, texts, tmp_path):
    result = f"--output_dir={tmp_path / 'result'}"
    rows = [{"sentence": "the fox", "kind": "animal"}, {"sentence": None, "kind": "person"}]
    files = [f"--{split}_file={write_lines(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "test")]
    with pytest.raises(ValueError, match="text_column=sentence: 1 rows of the train data have no text, row 2"):
        text_classification.main([f"--model={model}", *texts, *files, result])
    table = write_csv(tmp_path / "missing.csv", ["sentence", "kind"], [("the fox", "animal"), ("", "person")])
    with pytest.raises(ValueError, match="text_column=sentence: 1 rows of the test data have no text, row 2"):
        text_classification.main([f"--model={model}", *texts, f"--test_file={table}", result])
    table = write_csv(tmp_path / "tags.csv", ["tokens", "ner_tags"], [("the fox", "O O")])
    with pytest.raises(ValueError, match="row 1 of the train data: tokens and ner_tags take lists"):
        files = [f"--train_file={table}", f"--test_file={table}", "--max_seq_length=32"]
        token_classification.main([f"--model={model}", *files, *QUICK, result])
    rows = [{"sentence": "the fox", "kind": ["animal"]}]
    files = [f"--{split}_file={write_lines(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "test")]
    with pytest.raises(ValueError, match="label_column=kind holds several labels in a row"):
        text_classification.main([f"--model={model}", *texts, *files, result])
    rows = [{"tokens": [1, 2], "ner_tags": ["O", "O"]}]
    files = [f"--{split}_file={write_lines(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "test")]
    with pytest.raises(ValueError, match="row 1 of the train data: tokens and ner_tags take lists of words"):
        token_classification.main([f"--model={model}", *files, "--max_seq_length=32", *QUICK, result])
    for tags in (["O"], ["O", "O", "O"], ["O", None], None):
        rows = [{"tokens": ["the", "fox"], "ner_tags": ["O", "O"]}, {"tokens": ["the", "fox"], "ner_tags": tags}]
        files = [f"--{split}_file={write_lines(tmp_path / f'{split}.jsonl', rows)}" for split in ("train", "test")]
        with pytest.raises(ValueError, match="ner_tags: row 2 of the train data has . tags for 2 words"):
            token_classification.main([f"--model={model}", *files, "--max_seq_length=32", *QUICK, result])
    assert not (tmp_path / "result").exists()


def test_scores_are_numbers_however_they_are_written():
    assert sentence_embeddings.scores(Dataset.from_dict({"score": ["10.0", "2"]}), "test", "score") == [10.0, 2.0]
    for wrong in ("n/a", "", None, "nan"):
        rows = Dataset.from_dict({"score": ["1", wrong]})
        with pytest.raises(ValueError, match=f"^score_column=score: {wrong!r} in row 2 of the test data"):
            sentence_embeddings.scores(rows, "test", "score")


def test_pairs_without_a_text_and_scores_that_are_all_the_same_are_refused(model, tmp_path):
    right = {"sentence1": "the fox", "sentence2": "a fox", "score": 1.0}
    train = write_lines(tmp_path / "train.jsonl", [right, right])
    for rows, message in (
        ([right, right | {"sentence2": " ", "score": 0.0}], "second_column=sentence2: 1 rows of the test data have no"),
        ([right, right], "score_column=score: all pairs of the test data have the same score"),
    ):
        files = [f"--train_file={train}", f"--test_file={write_lines(tmp_path / 'test.jsonl', rows)}"]
        with pytest.raises(ValueError, match=message):
            options = ["--max_seq_length=32", *QUICK, f"--output_dir={tmp_path / 'result'}"]
            sentence_embeddings.main([f"--model={model}", *files, *options])


def test_a_mark_of_byte_order_is_no_word(tmp_path):
    (tmp_path / "a.conll").write_text("\ufeff-DOCSTART- O\n\nfox B-animal\n", encoding="utf-8")
    options = token_classification.TagOptions(train_file="a", validation_file="b")
    assert token_classification.read_tagged(str(tmp_path / "a.conll"), options)["tokens"] == [["fox"]]


def test_numbers_as_classes_keep_their_order():
    rows = Dataset.from_dict({"label": [10, 2, 0, 11, 1]})
    splits = text_classification.with_class_labels(DatasetDict(train=rows, test=rows), "label")
    assert splits["train"].features["label"].names == ["0", "1", "2", "10", "11"]
    assert splits["test"]["label"] == [3, 2, 0, 4, 1]


@pytest.mark.parametrize("example", [text_classification, token_classification, question_answering, lora])
def test_every_example_tells_a_mistake_in_one_line(example, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["example", "--train_file=a.csv", f"--output_dir={tmp_path / 'result'}"])
    assert run(example.main) == 1
    assert capsys.readouterr().err == MISSING_EVALUATION


OPTIONS = {
    text_classification: (text_classification.TextOptions, Training),
    token_classification: (token_classification.TagOptions, Training),
    question_answering: (question_answering.AnswerOptions, Training),
    sentence_embeddings: (sentence_embeddings.PairOptions, sentence_embeddings.SentenceTraining),
    lora: (lora.LoraOptions, Training),
}


def test_commands_of_documents_and_examples_parse():
    pages = [ROOT / "README.md", ROOT / "docs" / "finetuning.md", *(Path(example.__file__) for example in OPTIONS)]
    for example, groups in OPTIONS.items():
        name = example.__name__.removeprefix("examples.")
        texts = [re.sub(r"\\\n", " ", page.read_text(encoding="utf-8")) for page in pages]
        commands = [command for text in texts for command in re.findall(rf"python -m examples\.{name} (.*)", text)]
        assert commands, name
        for command in commands:
            options, training = HfArgumentParser(groups).parse_args_into_dataclasses(shlex.split(command))
            assert (options.train_file or options.dataset_name) and training.output_dir.startswith("models/")


def test_an_example_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "examples.sentence_embeddings", "--train_file=a.csv"]
    done = subprocess.run([*command, f"--output_dir={tmp_path}/x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == MISSING_EVALUATION


def test_one_class_is_refused_and_other_classes_get_a_new_head(model, tmp_path):
    def table(name, labels):
        rows = [f"the fox sees a dog,{label}" for label in labels]
        (tmp_path / name).write_text("text,label\n" + "\n".join(rows * 4) + "\n")
        return str(tmp_path / name)

    options = ["--learning_rate", "1e-3", "--max_steps", "1", "--use_cpu", "--max_seq_length", "16"]

    def run(labels, start, output):
        file = table(f"{len(labels)}.csv", labels)
        files = ["--train_file", file, "--test_file", file, "--output_dir", str(tmp_path / output)]
        return text_classification.main(["--model", str(start), *files, *options])

    with pytest.raises(ValueError, match="the training data has the one class"):
        run(["good"], model, "one")
    run(["good", "bad"], model, "two")
    run(["good", "bad", "other"], tmp_path / "two", "three")
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    assert list(config["id2label"].values()) == ["bad", "good", "other"]


def test_a_table_is_read_as_it_stands(tmp_path):
    """ "01" and "1" are two labels, and 007 is no 7."""
    labels = ["01", "1", "10", "02", "NA", "true", "1e3", "1e3"]
    rows = [("007" if i else "8", label) for i, label in enumerate(labels)]
    file = write_csv(tmp_path / "table.csv", ["text", "label"], rows)
    (tmp_path / "marked.csv").write_text("\ufeff" + Path(file).read_text())
    for name in (file, str(tmp_path / "marked.csv")):
        table = read_table(name)
        assert list(zip(table["text"], table["label"])) == rows
    splits = text_classification.with_class_labels(DatasetDict(train=table, test=table.select([7])), "label")
    assert splits["train"].features["label"].names == ["01", "1", "02", "10", "1e3", "NA", "true"]
    assert splits["test"]["label"] == [4]


def test_a_column_of_row_numbers_without_a_name_is_left_out(model, texts, tmp_path):
    """As pandas writes it."""
    rows = [(i, *row) for i, row in enumerate(labelled(24, 1))]
    write_csv(tmp_path / "test.csv", ["", "sentence", "kind"], rows)
    flags = [f"--model={model}", *texts, f"--output_dir={tmp_path / 'result'}", "--max_steps=1"]
    found = text_classification.main(flags)
    assert found["test_accuracy"] == pytest.approx(accuracy(tmp_path / "result", labelled(24, 1)))


def test_files_without_rows_and_of_another_encoding_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"bare\.csv has no rows"):
        read_table(write_csv(tmp_path / "bare.csv", ["text", "label"], []))
    (tmp_path / "latin.conll").write_bytes("café B-place\n".encode("latin-1"))
    options = token_classification.TagOptions(train_file="a", validation_file="b")
    with pytest.raises(ValueError, match=r"latin\.conll cannot be read as UTF-8"):
        token_classification.read_tagged(str(tmp_path / "latin.conll"), options)


@pytest.mark.parametrize("value,kind", [(["the fox"], "List"), ({"en": "the fox"}, "dict")])
def test_a_column_that_holds_no_texts_is_told(value, kind, model, tmp_path):
    file = write_lines(tmp_path / "nested.jsonl", [{"text": value, "label": label} for label in ("a", "b")])
    flags = [f"--model={model}", f"--train_file={file}", f"--test_file={file}", f"--output_dir={tmp_path / 'result'}"]
    with pytest.raises(ValueError, match=f"text_column=text of the train data holds values of type {kind}, not texts"):
        text_classification.main([*flags, "--max_seq_length=32", *QUICK])


def test_a_model_of_another_problem_becomes_a_classifier(model, texts, tmp_path):
    regression = LambdaBertForSequenceClassification.from_pretrained(model, num_labels=1, problem_type="regression")
    regression.save_pretrained(tmp_path / "regression")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "regression")
    flags = [f"--model={tmp_path / 'regression'}", f"--output_dir={tmp_path / 'result'}", "--max_steps=1"]
    text_classification.main([*flags, *texts])
    config = AutoConfig.from_pretrained(tmp_path / "result")
    assert (config.problem_type, config.num_labels) == ("single_label_classification", 2)


def test_a_data_set_that_cannot_be_read_is_told_in_one_line(model, tmp_path):
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data" / "train.csv", ["text", "label"], [("the fox", "animal")])
    write_csv(tmp_path / "data" / "train2.csv", ["words"], [("the fox",)])
    flags = [f"--model={model}", f"--dataset_name={tmp_path / 'data'}", f"--output_dir={tmp_path / 'result'}", *QUICK]
    with pytest.raises(ValueError, match="data cannot be loaded"):
        text_classification.main([*flags, "--max_seq_length=32"])
