"""The benchmark of conversion: its recipe is complete, its measures are what they are called, and it runs once."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertModel

pytest.importorskip("sentence_transformers")

from benchmarks import conversion
from benchmarks.conversion import STARTS, longer, read_pairs, spearman
from benchmarks.environment import ROOT
from configuration_lambdabert import LambdaBertConfig
from distill_from_bert import ARGUMENT_GROUPS
from lambdabert.training.arguments import parse_arguments
from modeling_lambdabert import LambdaBertModel
from training_support import tiny_bert

RECIPES = sorted((ROOT / "benchmarks" / "recipes" / "conversion").glob("*.json"))


@pytest.fixture
def sts_folder(tmp_path):
    rows = [
        ("The fox sees the river.", "The fox sees the river.", 5),
        ("A sailor sells bread.", "A sailor sells some bread at night.", 4.2),
        ("The cat follows a red boat.", "Her brother paints two stones.", 1),
        ('The old "king forgets.', "An open door.", 0.4),
    ]
    starts = (["main", "news", "2015", str(number)] for number in range(len(rows)))
    lines = ["\t".join([*start, str(score), one, other]) for start, (one, other, score) in zip(starts, rows)]
    (tmp_path / "sts-dev.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_complete(file, tmp_path):
    recipe = conversion.read_recipe(file, conversion.FIELDS, conversion.MODEL_FIELDS)
    for name, model in recipe["models"].items():
        overrides = recipe["distillation"]["config_overrides"] | model.get("config", {})
        options = recipe["distillation"] | model.get("options", {}) | {"config_overrides": overrides}
        options |= {"teacher": "a", "train_file": ["b"], "output_dir": str(tmp_path)}
        (tmp_path / "options.json").write_text(json.dumps(options))
        parse_arguments([str(tmp_path / "options.json")], ARGUMENT_GROUPS)
        LambdaBertConfig(hidden_size=384, **overrides)
        assert model.get("start", "attention") in STARTS, name
        assert model.get("seeds", recipe["seeds"])


def test_pairs_are_read_as_they_stand(sts_folder):
    firsts, seconds, scores = read_pairs(sts_folder)
    assert firsts[3] == 'The old "king forgets.' and seconds[3] == "An open door." and scores == [5, 4.2, 1, 0.4]


def test_spearman_is_that_of_the_order(sentence_teacher):
    """The teacher's own cosines as scores are in its order; their negatives are in the opposite one."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(sentence_teacher), device="cpu")
    texts = ["The fox sees the river.", "A sailor.", "The cat follows a red boat.", "An open door at night."]
    vectors = torch.from_numpy(model.encode(texts))
    scores = (vectors * vectors.roll(1, 0)).sum(1)
    pairs = (texts, [texts[-1], *texts[:-1]], scores.exp().tolist())
    bert = model[0].auto_model
    assert spearman(model, bert, pairs) == pytest.approx(1)
    assert spearman(model, bert, (*pairs[:2], (-scores).tolist())) == pytest.approx(-1)
    assert model[0].auto_model is bert


def test_a_longer_teacher_is_the_same_teacher():
    bert, ids = tiny_bert(), torch.arange(5, 15)[None]
    extended = longer(bert, 90)
    torch.testing.assert_close(extended(ids).last_hidden_state, bert(ids).last_hidden_state)
    assert extended(torch.randint(60, (1, 90))).last_hidden_state.shape == (1, 90, 24)
    assert bert.config.max_position_embeddings == 40


@pytest.mark.parametrize("name", sorted(set(STARTS) - {"attention"}))
def test_starts_replace_what_attention_gave(name):
    bert = tiny_bert(BertModel)
    settings = dict(key_depth=3, intra_depth=2, local_context_size=5)
    model = LambdaBertModel.from_bert(bert, **settings)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    STARTS[name](model, bert)
    changed = {key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])}
    for layer in range(2):
        assert f"encoder.layer.{layer}.attention.self.to_values.weight" in changed
        assert f"encoder.layer.{layer}.attention.output.dense.weight" in changed
    assert all(".attention.self." in key or ".attention.output.dense." in key for key in changed)
    output = model.encoder.layer[0].attention.output.dense.weight
    copied = torch.equal(output, bert.encoder.layer[0].attention.output.dense.weight)
    assert copied == (name == "teacher's output")


def test_the_clock_stands_still_while_pairs_are_scored(monkeypatch):
    now = [0]

    def scored(*args):
        now[0] += 100
        return 0.5

    monkeypatch.setattr(conversion, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(conversion, "spearman", scored)
    trainer = SimpleNamespace(clock=0)
    curve = conversion.StsCurve(SimpleNamespace(sentence_transformer=None, model=None), trainer, None, 2)
    for step in (1, 2, 3, 4, 5):
        now[0] += 5
        curve.on_step_end(None, SimpleNamespace(global_step=step, max_steps=5), None)
    assert [(point["step"], point["seconds"]) for point in curve.points] == [(2, 10), (4, 20), (5, 25)]


def kind_of(model):
    """What `spearman` is given: the teacher, or the student with both of its parts or one of them."""
    if not isinstance(model, LambdaBertModel):
        return "teacher"
    if not any(layer.attention.self.relative_embeddings.any() for layer in model.encoder.layer):
        return "content only"
    with torch.no_grad():
        contents = model(torch.arange(5, 15)[None], output_lambda_params=True).lambda_params
    return "whole" if any(content.any() for content in contents) else "position only"


def test_tiny_benchmark_runs_once(text, sentence_teacher, sts_folder, tmp_path, monkeypatch, capsys):
    recipe = {
        "distillation": {
            "config_overrides": {"key_depth": 8, "intra_depth": 2, "local_context_size": 5},
            "max_seq_length": 24,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-3,
            "max_steps": 7,
            "logging_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
            "data_cache_dir": str(tmp_path / "cache"),
        },
        "sts_steps": 3,
        "seeds": [1, 2],
        "models": {"LambdaBERT": {}, "global, fresh": {"config": {"local_context_size": None}, "start": "fresh"}},
    }
    file, output = tmp_path / "recipe.json", tmp_path / "output"
    file.write_text(json.dumps(recipe))
    options = ["--text", str(text / "train.txt"), "--sts_folder", str(sts_folder), "--teacher", str(sentence_teacher)]
    options += ["--output", str(output), "--lengths", "8", "64", "--repeats", "2"]
    monkeypatch.setattr(conversion, "require_passing_tests", lambda *tests: None)
    scored = []

    def recorded(sentence_transformer, model, pairs):
        scored.append((kind_of(model), spearman(sentence_transformer, model, pairs)))
        return scored[-1][1]

    monkeypatch.setattr(conversion, "spearman", recorded)
    conversion.main([str(file), *options])
    results = json.loads((output / "results.json").read_text())
    assert len(list((output / "runs").iterdir())) == 4
    for name, runs in results["runs"].items():
        assert [run["seed"] for run in runs] == [1, 2]
        for run in runs:
            assert [point["step"] for point in run["curve"]] == [0, 3, 6, 7]
            of_run, scored[:7] = scored[:7], []
            parts = {kind: score for kind, score in of_run if kind != "whole"}
            assert parts == {kind: run[kind] for kind in ("content only", "position only", "teacher")}
            curve = [point["spearman"] for point in run["curve"]]
            assert [score for kind, score in of_run if kind == "whole"] == curve
            assert run["lambda"]["local_context_size"] == (None if name.startswith("global") else 5)
    assert [row["length"] for row in results["speed"]] == [8, 64]
    assert all(row["seconds"]["teacher"] > 0 and row["seconds"]["student"] > 0 for row in results["speed"])
    assert (output / "curves.png").stat().st_size > 10_000

    monkeypatch.setattr(conversion, "prepare", lambda *args: pytest.fail("a finished run was run or timed again"))
    conversion.main([str(file), *options])
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    "model,option,message",
    [
        ({"start": "nowhere"}, {}, "model 'one': start='nowhere' is unknown"),
        ({"options": {"sentence_weight": 1}}, {}, "unknown options: sentence_weight"),
        ({}, {"--sts_folder": "nowhere"}, "sts_folder=nowhere: .* cannot be read as STS pairs"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(model, option, message, sts_folder, tmp_path, monkeypatch):
    recipe = {"distillation": {"use_cpu": True}, "sts_steps": 1, "seeds": [1], "models": {"one": model}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(conversion, "prepare", lambda *args: pytest.fail("something was prepared"))
    options = {"--text": "a", "--teacher": "b", "--sts_folder": str(sts_folder), "--output": str(tmp_path / "output")}
    flags = [part for item in (options | option).items() for part in item]
    with pytest.raises(SystemExit, match=f"error: .*{message}") as caught:
        conversion.main([str(tmp_path / "recipe.json"), *flags])
    assert "\n" not in str(caught.value) and not (tmp_path / "output").exists()


def test_another_teacher_has_runs_of_its_own():
    recipe = {"distillation": {}, "sts_steps": 1}
    keys = {conversion.run_key(recipe, {}, 1, ["a"], teacher) for teacher in (None, "one", "other")}
    assert len(keys) == 3
