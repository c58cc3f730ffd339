"""The README's snippets and commands, setup.sh and the installed package do what they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizer

import distill_from_bert
import modeling_lambdabert
from lambdabert.training import arguments
from run_language_modeling import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_python_runs_and_its_shapes_hold(monkeypatch):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "attention", "really", "all", "you", "need", "?"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    of_hub = {"google-bert/bert-base-uncased": tokenizer}
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda name, **kwargs: of_hub.get(name) or load(name, **kwargs)
    )
    monkeypatch.chdir(ROOT)
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(snippet, names)
    out = names["out"]
    assert out.last_hidden_state.shape == (1, 9, 768)
    assert out.pooler_output.shape == (1, 768)
    assert [tuple(params.shape) for params in out.lambda_params] == [(1, 8, 96)] * 12
    assert out[0] is out.last_hidden_state and out[1] is out.pooler_output and out[2] is out.lambda_params
    assert [tuple(params.shape) for params in names["content_lambdas"]] == [(1, 8, 64)] * 4


def test_readme_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\\n|\n(?=configs/)", " ", README)
    commands = re.findall(r"python run_language_modeling\.py +(-.*|configs/\w+\.json)", text)
    assert len(commands) >= 3
    for command in commands:
        _, data_arguments, training_arguments = parse_arguments(shlex.split(command.rstrip("`.")))
        assert training_arguments.eval_strategy == "steps" and training_arguments.eval_steps == 100
        assert data_arguments.objective == "sop"


def test_commands_of_conversion_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = README + (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")
    commands = re.findall(r"python distill_from_bert\.py +(.+)", re.sub(r"\\\n", " ", text))
    assert len(commands) >= 3
    for command in commands:
        teacher_arguments, _, training_arguments = arguments.parse_arguments(
            shlex.split(command.partition("`")[0]), distill_from_bert.ARGUMENT_GROUPS
        )
        assert teacher_arguments.teacher.endswith("all-MiniLM-L6-v2") and training_arguments.do_train


def test_readme_names_every_model_class_and_existing_paths():
    for name in modeling_lambdabert.__all__:
        if name != "LambdaBertPreTrainedModel":
            assert f"| `{name}` |" in README
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    table = README[README.index("## Where things live") :]
    for path in re.findall(r"`([\w/]+(?:\.\w+)?/?)`", table):
        assert (ROOT / path).exists(), path


def test_lines_of_documents_are_no_longer_than_those_of_code():
    """Tables, pictures and commands aside, which cannot be broken."""
    folders = ("", "docs/", "lambdabert/*/", "checkpoints/*/", "benchmarks/", "benchmarks/results/*/*/")
    pages = [page for folder in folders for page in ROOT.glob(f"{folder}*.md")]
    lines = [(page.name, line) for page in pages for line in page.read_text(encoding="utf-8").split("\n")]
    assert [each for each in lines if len(each[1]) > 120 and not each[1].startswith(("|", "![", "    "))] == []


def test_setup_script_refuses_unknown_arguments_and_names_them():
    done = subprocess.run([ROOT / "setup.sh", "everything"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "everything" in done.stderr and "demo" in done.stderr


def test_setup_script_says_which_install_failed(tmp_path):
    for name in ("setup.sh", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "setup.sh").chmod(0o755)
    (tmp_path / "requirements.txt").write_text("no-such-package-anywhere==1\n")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PYTHON": sys.executable}
    done = subprocess.run([tmp_path / "setup.sh"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode != 0
    assert "pip could not install 'torch==2.13.0'" in done.stderr, "the first that it installs"
    assert not list((tmp_path / "env").glob("installed-*"))


def test_setup_script_leaves_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "setup.sh").write_bytes((ROOT / "setup.sh").read_bytes())
    (tmp_path / "setup.sh").chmod(0o755)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.txt").touch()
    done = subprocess.run([tmp_path / "setup.sh"], capture_output=True, text=True)
    assert done.returncode != 0 and "./env is no Python environment" in done.stderr
    assert (tmp_path / "env" / "mine.txt").exists()


def test_the_demo_ends_with_a_page_however_often(tmp_path):
    for name in ("setup.sh", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "setup.sh").chmod(0o755)
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    (tmp_path / "models").mkdir()
    python = tmp_path / "env" / "bin" / "python"
    # stands for training and the command, which refuses a page that exists
    python.write_text(
        "#!/usr/bin/env bash\n"
        'echo "$*" >>commands\n'
        'if [ "$1" = interpret_lambdas.py ]; then [ ! -e "${!#}" ] && touch "${!#}"; fi\n'
    )
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run([tmp_path / "setup.sh", "demo"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith("Open models/demo.html in a browser")
        assert (tmp_path / "models" / "demo.html").exists()
    *_, training, page = (tmp_path / "commands").read_text().splitlines()
    assert training == "run_language_modeling.py configs/demo.json"
    assert page.startswith("interpret_lambdas.py map This method [MASK] called") and "--model models/demo " in page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `pip install .` installs into."""
    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed") / "site"
    for file in ROOT.iterdir():
        if file.name in ("lambdabert", "benchmarks", "docs", "examples", "tests"):
            shutil.copytree(file, source / file.name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        elif file.is_file():
            shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, cwd=source)
    return site


def run_installed(site, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": site}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=site.parent, env=environment)


def files_of(folder):
    return {file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"}


def test_installed_are_the_model_the_commands_and_the_package(site):
    modules = {path.name for path in site.iterdir() if path.suffix == ".py" or path.is_dir()}
    modules -= {"bin", "__pycache__", *(path.name for path in site.glob("*.dist-info"))}
    assert modules == {"lambdabert", *(file.name for file in ROOT.glob("*.py"))}
    assert files_of(site / "lambdabert") == files_of(ROOT / "lambdabert")


def test_installed_package_is_importable_from_anywhere(site):
    program = (
        "import configuration_lambdabert, lambda_layer, modeling_lambdabert\n"
        "import distill_from_bert, export_model, interpret_lambdas, run_language_modeling\n"
        "from importlib.resources import files\n"
        "assert files('lambdabert.interpretation').joinpath('page.html').is_file()\n"
        "from lambdabert import LambdaBertConfig, LambdaBertModel, LambdaLayer\n"
        "import lambdabert, modeling_lambdabert, run_language_modeling, sys\n"
        "print(lambdabert.__file__, modeling_lambdabert.__file__, run_language_modeling.__file__)\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'it may choose a back end'"
    )
    done = run_installed(site, "-c", program)
    assert done.returncode == 0, done.stderr
    places = ("lambdabert/__init__.py", "modeling_lambdabert.py", "run_language_modeling.py")
    assert done.stdout.split() == [str(site / place) for place in places]


@pytest.mark.parametrize(
    "script,option",
    [
        ("lambdabert-pretrain", "--learning_rate"),
        ("lambdabert-distill", "--learning_rate"),
        ("lambdabert-interpret", "faithfulness"),
        ("lambdabert-export", "--quantize"),
    ],
)
def test_console_scripts(site, script, option):
    done = run_installed(site, site / "bin" / script, "--help")
    assert done.returncode == 0 and option in done.stdout, done.stderr
