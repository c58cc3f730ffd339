"""What the recorded benchmarks share: recipes, folders of finished runs, and the index of all results."""

import json
import re
import shlex
import shutil
from importlib import import_module

import pytest
from matplotlib.figure import Figure

import run_language_modeling
from benchmarks import conversion, correctness, quality
from benchmarks.environment import ROOT, add_environment
from benchmarks.peers import PEERS
from benchmarks.report import COLOURS, Curve, draw_curves, markdown_table, spread
from benchmarks.runs import Fields, RunFolder, digest, read_recipe

BENCHMARKS = ROOT / "benchmarks"
INDEX = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
RECORDED_TEXT = ["enwiki2015/train-00.parquet"]  # of the conversion runs
# runs of recipes that have changed since; the index says what they are
UNCLAIMED = {
    "quality/wikitext2_ablations": {"410d03a88c6aca1a"},
    "quality/wikitext2_6x512": {"a57c5f013f74325f"},
}
FIELDS = Fields(frozenset({"shared"}), frozenset({"test"}))
MODEL_FIELDS = Fields(frozenset({"steps"}), frozenset())
RECIPE = {"shared": {"width": 8}, "seeds": [1], "models": {"small": {"steps": 3}, "large": {"steps": 5}}}


def recorded_keys(name):
    """The keys of all runs that a recipe may ask for."""
    recipe = json.loads((BENCHMARKS / "recipes" / f"{name}.json").read_text())
    keys = set()
    for model, entry in recipe["models"].items():
        settings = {key: value for key, value in entry.items() if key not in ("learning_rates", "seeds")}
        for seed in entry.get("seeds", recipe["seeds"]):
            if name.startswith("conversion"):
                keys.add(conversion.run_key(recipe, settings, seed, RECORDED_TEXT, None))
            for rate in entry.get("learning_rates", ()):
                keys.add(quality.run_key(recipe, settings, rate, seed))
    return keys


@pytest.mark.parametrize(
    "name",
    [
        "quality/wikitext2",
        "quality/wikitext2_ablations",
        "quality/wikitext2_6x256",
        "quality/wikitext2_6x512",
        "quality/wikitext2_content_gain",
    ],
)
def test_recorded_quality_runs_are_found_by_their_recipes(name):
    recorded = {file.stem for file in (BENCHMARKS / "results" / name / "runs").iterdir()}
    assert recorded - recorded_keys(name) == UNCLAIMED.get(name, set())


def test_recorded_conversion_runs_are_found_by_their_recipe():
    recorded = {file.stem for file in (BENCHMARKS / "results" / "conversion" / "minilm" / "runs").iterdir()}
    assert recorded == recorded_keys("conversion/minilm")


def test_first_setting_at_another_rate_has_the_key_that_the_index_names():
    recipe = json.loads((BENCHMARKS / "recipes" / "quality" / "wikitext2_ablations.json").read_text())
    entry = next(iter(recipe["models"].values()))
    settings = {key: value for key, value in entry.items() if key not in ("learning_rates", "seeds")}
    assert {quality.run_key(recipe, settings, 0.004, 1)} == UNCLAIMED["quality/wikitext2_ablations"]


@pytest.mark.parametrize(
    "name,options",
    [
        ("quality/wikitext2", []),
        ("quality/wikitext2_ablations", []),
        ("conversion/minilm", ["--text", *RECORDED_TEXT, "--sts_folder", "nowhere"]),
        ("finetuning/minilm", []),
        ("finetuning/wikipedia_small", []),
    ],
)
def test_recorded_folder_gives_its_summary_and_table_again(name, options, tmp_path, monkeypatch, capsys):
    """Without text, teacher and training: times and runs are those of the folder."""
    module = import_module(f"benchmarks.{name.partition('/')[0]}")
    runs = "fine_tune" if name.startswith("finetuning") else "prepare"
    monkeypatch.setattr(module, runs, lambda *args: pytest.fail("a finished run was run or timed again"))
    folder = BENCHMARKS / "results" / name
    output = shutil.copytree(folder, tmp_path / "output")
    (output / "table.md").unlink()
    module.main([str(BENCHMARKS / "recipes" / f"{name}.json"), *options, "--output", str(output)])
    assert (output / "results.json").read_bytes() == (folder / "results.json").read_bytes()
    assert (output / "table.md").read_text() == (folder / "table.md").read_text()
    assert (folder / "table.md").read_text() in capsys.readouterr().out


def test_index_lists_every_recipe_and_result():
    for file in (BENCHMARKS / "recipes").rglob("*.json"):
        assert f"| `{file.relative_to(BENCHMARKS)}` |" in INDEX
    listed = re.findall(r"^\| `(results/[^`]+)` \|", INDEX, flags=re.MULTILINE)
    assert all((BENCHMARKS / path).exists() for path in listed)
    files = [file.relative_to(BENCHMARKS).as_posix() for file in (BENCHMARKS / "results").rglob("*.json")]
    assert [file for file in files if not any(file == path or file.startswith(path) for path in listed)] == []
    for target in re.findall(r"\]\(([^)]+)\)", INDEX):
        assert (BENCHMARKS / target.partition("#")[0]).exists(), target


def parse_peer_command(argv):
    """Those of the pretraining command after the name of an encoder."""
    assert argv[0] in PEERS
    run_language_modeling.parse_arguments(argv[1:])


def test_commands_of_index_and_documents_parse(monkeypatch):
    monkeypatch.chdir(ROOT)  # some name a file of configs/
    parsers = {"pretrain_peer": parse_peer_command}
    pages = [BENCHMARKS / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(re.sub(r"\\\n", " ", page.read_text(encoding="utf-8")) for page in pages)
    commands = re.findall(r"python -m benchmarks\.(\w+) ?([^`#\n]*)", text)
    assert {name for name, _ in commands} == set(re.findall(r"^\| `python -m benchmarks\.(\w+)` \|", INDEX, re.M))
    for name, options in commands:
        if options.strip():
            parse = parsers.get(name) or import_module(f"benchmarks.{name}").parse_command
            parse(shlex.split(options))


def test_tests_that_come_first_exist():
    for files, expression in (correctness.LAYER_TESTS, correctness.TEXT_TESTS):
        sources = [
            file for name in files for file in ((ROOT / name).glob("*.py") if (ROOT / name).is_dir() else [ROOT / name])
        ]
        text = "".join(f"{file}\n{file.read_text(encoding='utf-8')}" for file in sources)
        assert all(word in text for word in expression.removeprefix("not ").split(" or "))


def test_nothing_is_measured_unless_its_tests_pass(tmp_path):
    (tmp_path / "test_wrong.py").write_text("def test_sum():\n    assert 1 + 1 == 3\n")
    with pytest.raises(SystemExit, match="Nothing was measured"):
        correctness.require_passing_tests((str(tmp_path / "test_wrong.py"),), "sum")
    with pytest.raises(SystemExit, match="Nothing was measured"):
        correctness.require_passing_tests((str(tmp_path / "test_wrong.py"),), "product")


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"models": {"small": {"steps": 3, "rate": 1}}},
            "model 'small' has unknown fields: rate; known are seeds, steps",
        ),
        ({"models": {"small": {}}}, "model 'small' lacks steps"),
        ({"models": {}}, "models should map at least one name"),
        ({"models": {"small": 3}}, "model 'small' should be a JSON object, not 3"),
        ({"seeds": []}, "model 'small' has no seeds"),
        ({"tests": 1}, "has unknown fields: tests"),
    ],
)
def test_faulty_recipe_is_refused(change, message, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | change))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(tmp_path / "recipe.json", FIELDS, MODEL_FIELDS)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_file_that_is_not_a_recipe_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match="recipe.json"):
        read_recipe(tmp_path / "recipe.json", FIELDS, MODEL_FIELDS)


@pytest.mark.parametrize(
    "change,difference",
    [
        ({"shared": {"width": 9}}, "shared differs"),
        ({"test": "a"}, "test differs"),
        ({"models": {"small": {"steps": 3}}}, "model 'large' this one lacks"),
        ({"models": {"small": {"steps": 4}, "large": {"steps": 5}}}, "model 'small' has other settings"),
    ],
)
def test_folder_of_another_recipe_is_refused(change, difference, tmp_path):
    RunFolder(tmp_path, RECIPE).write_summary({"recipe": RECIPE, "runs": {}}, "")
    with pytest.raises(ValueError, match=f"output=.* another recipe, whose {difference}; name another folder"):
        RunFolder(tmp_path, RECIPE | change)


def test_recipe_may_grow_and_a_part_of_it_keeps_what_is_recorded(tmp_path):
    RunFolder(tmp_path, RECIPE).write_summary({"recipe": RECIPE, "runs": {"large": []}}, "")
    grown = RECIPE | {"seeds": [1, 2], "models": RECIPE["models"] | {"third": {"steps": 1, "seeds": [4]}}}
    folder = RunFolder(tmp_path, grown)
    assert folder.selected(["third"]) == ["large", "third"]
    assert folder.selected(None) == ["small", "large", "third"]
    assert folder.settings("third") == {"steps": 1}
    with pytest.raises(ValueError, match="models=fourth: not in the recipe, which has small, large, third"):
        folder.selected(["fourth"])


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="not a summary of a recipe"):
        RunFolder(tmp_path, RECIPE)


def test_finished_run_is_not_run_again_unless_it_lacks_something(tmp_path):
    folder, trained = RunFolder(tmp_path, RECIPE), []

    def train(work):
        trained.append(work)
        return {"test": len(trained)}

    for _ in range(2):
        assert folder.run("key", "title", train) == {"test": 1}
    assert folder.run("key", "title", train, complete=lambda run: run["test"] > 1) == {"test": 2}
    assert trained == [tmp_path / "work" / "key"] * 2
    assert json.loads((tmp_path / "runs" / "key.json").read_text()) == {"test": 2}


def test_digest_depends_on_every_value():
    assert len({digest({"a": 1}, 2), digest({"a": 2}, 2), digest({"a": 1}, 3), digest({"a": 1}, 2, 2)}) == 4
    assert digest({"a": 1}, 2) == digest({"a": 1}, 2)


def test_a_record_that_grows_keeps_the_environments_of_its_first_numbers():
    record = {"environment": {"commit": "a"}, "rows": {}}
    for commit in "bbc":
        add_environment(record, {"commit": commit})
    assert record == {"environments": [{"commit": "a"}, {"commit": "b"}, {"commit": "c"}], "rows": {}}


def test_tables_show_the_spread_of_several_seeds():
    assert spread([1.0]) == "1.000" and spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert markdown_table(["a", "b"], [[1, ""], ["x", 2]]) == "| a | b |\n|---|---|\n| 1 |  |\n| x | 2 |\n"


@pytest.mark.parametrize("name", ["quality", "conversion"])
def test_user_mistakes_end_in_one_line(name, tmp_path, capsys):
    module = import_module(f"benchmarks.{name}")
    options = ["--text", "a", "--sts_folder", "b"] if name == "conversion" else []
    with pytest.raises(SystemExit) as caught:
        module.main([str(tmp_path / "missing.json"), *options, "--output", str(tmp_path / "output")])
    assert re.fullmatch(r"error: .*missing\.json cannot be read as JSON: .*", str(caught.value))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("several_calls", [False, True])
def test_encoders_have_their_colours_and_no_two_curves_the_same(several_calls):
    panel = Figure().subplots()
    names = [
        "BERT",
        "ModernBERT, 4e-3",
        "LambdaBERT with repetitions",
        "LambdaBERT, K = 8",
        "LambdaBERT, K = 32",
        "other",
    ]
    curves = {name: Curve([[0, 1]], [[1.0, 2.0], [2.0, 3.0]]) for name in names}
    for together in [{name: curve} for name, curve in curves.items()] if several_calls else [curves]:
        draw_curves([panel], together, ["steps"])
    drawn = {line.get_label(): line.get_color() for line in panel.get_lines()}
    assert list(drawn) == names and len(set(drawn.values())) == len(names)
    for name, encoder in zip(names, ("BERT", "ModernBERT", "LambdaBERT with repetitions", "LambdaBERT")):
        assert drawn[name] == COLOURS[encoder]
