"""The tasks of the memory benchmark: their answers are what they say, and lie beyond position lambdas."""

import pytest
import torch

from benchmarks import memory
from benchmarks.lambda_variants import running_variant


def texts(task, batch=200):
    return memory.TASKS[task](torch.Generator().manual_seed(1), batch)


@pytest.mark.parametrize("task", memory.TASKS)
def test_answers_are_what_the_text_says(task):
    ids, answers = texts(task)
    assert ids.shape == (200, memory.LENGTH) and (ids[:, 0] == memory.ASK).all()
    assert 0 <= answers.min() and answers.max() < memory.ANSWERS and ids.max() < memory.VOCABULARY
    for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
        text = row[memory.FIRST :]
        if task.startswith("recall"):
            assert text.count(row[1]) == 1
            assert text[text.index(row[1]) + 1] == memory.VALUES.start + answer
            assert sum(token in memory.KEYS for token in text) == int(task.split()[1])
        elif task == "count":
            assert row.count(memory.MARK) == answer
        elif task == "majority":
            counts = [text.count(memory.FILLERS.start + kind) for kind in range(4)]
            assert counts[answer] == max(counts)
        elif task == "order":
            assert text.index(memory.MARK + answer) < text.index(memory.MARK + 1 - answer)


@pytest.mark.parametrize("task", memory.TASKS)
def test_answers_are_spread(task):
    _, answers = texts(task, 2000)
    shares = answers.bincount() / 2000
    assert shares.max() < 1.35 / (answers.max() + 1)


def test_topics_are_told_by_their_tokens():
    """A naive Bayes of token counts, fitted on other texts, tells nearly all topics."""
    ids, topics = texts("topic", 4000)
    counts = torch.nn.functional.one_hot(ids, memory.VOCABULARY).sum(1).double()
    fitted = torch.stack([counts[:3000][topics[:3000] == topic].sum(0) + 1 for topic in range(memory.ANSWERS)])
    scores = counts[3000:] @ (fitted / fitted.sum(1, keepdim=True)).log().T
    assert (scores.argmax(1) == topics[3000:]).double().mean() > 0.9


def test_position_lambdas_cannot_see_what_decides_the_answer():
    model, (ids, _) = memory.new_model("K=32, position only", 1).eval(), texts("count", 4)
    changed = ids.clone()
    changed[:, memory.FIRST :] = memory.MARK
    with torch.no_grad():
        assert not torch.equal(memory.answer_logits(model, ids), memory.answer_logits(model, changed))
        with running_variant("position only"):
            torch.testing.assert_close(
                memory.answer_logits(model, ids), memory.answer_logits(model, changed), rtol=0, atol=1e-6
            )


def test_command_runs_each_model_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "STEPS", 2)
    monkeypatch.setattr(memory, "TEST", 8)
    monkeypatch.setattr(memory, "TASKS", {"count": memory.count})
    monkeypatch.setattr(memory, "MODELS", {name: memory.MODELS[name] for name in ("K=32, position only", "BERT")})
    output = tmp_path / "memory.json"
    memory.main(["--seeds", "1", "2", "--output", str(output)])
    assert capsys.readouterr().out.count("count, BERT, ") == 3  # two rates, and the other seed at the better one
    written = output.read_text()
    monkeypatch.setattr(memory, "train", lambda *run: pytest.fail("a finished run was run again"))
    memory.main(["--seeds", "1", "2", "--output", str(output)])
    assert output.with_suffix(".png").stat().st_size > 5_000 and '"best"' in written


def test_the_better_rate_is_run_with_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "train", lambda name, task, rate, seed: rate + seed)
    record = {"accuracy": {}, "best": {}}
    memory.run(record, tmp_path / "memory.json", "BERT", "count", (1, 2), {})
    assert record["best"] == {"count": {"BERT": [max(memory.RATES) + 1, max(memory.RATES) + 2]}}


def test_a_part_of_the_runs(tmp_path, monkeypatch, capsys):
    """Another call adds to them, and the table has a place for what is missing."""
    monkeypatch.setattr(memory, "STEPS", 2)
    monkeypatch.setattr(memory, "TEST", 8)
    options = ["--seeds", "1", "--output", str(tmp_path / "memory.json")]

    def rows():
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        return {name: [bool(accuracy) for accuracy in accuracies] for name, *accuracies in cells}

    memory.main(["--tasks", "count", "--models", "BERT", *options])
    assert rows() == {"BERT": [True]}
    memory.main(["--tasks", "order", "--models", "K=8, content gain, repetitions", *options])
    assert rows() == {"K=8, content gain, repetitions": [False, True], "BERT": [True, False]}
