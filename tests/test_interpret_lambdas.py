"""The command that looks inside: what it writes, and what it refuses in one line."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import interpret_lambdas
import modeling_lambdabert
from lambdabert.interpretation import (
    attention,
    chance,
    draw_contributions,
    explain_prediction,
    neighbours,
    read_task,
    replace_lambdas,
    save_figure,
    swap_effects,
    token_shares,
    topic_features,
    trace_lambdas,
)
from lambdabert.interpretation.explanations import Attribution
from lambdabert.interpretation.intervals import bootstrap_interval
from lambdabert.interpretation.loading import read_texts

ROOT = Path(__file__).resolve().parent.parent
SENTENCES = [
    "the fox sees a dog",
    "the dog sees a fox and a bird",
    "a bird sings in the tree",
    "the tree is green and the bird is red",
]

KINDS = [
    "Model",
    "ForMaskedLM",
    "ForPreTrainingSOP",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
]


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory):
    """Folders of tiny LambdaBERTs with the text's tokenizer, by kind."""
    folder = tmp_path_factory.mktemp("lambdas")
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    fields = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    fields |= {"vocab_size": len(tokenizer), "num_lambda_queries": 2, "key_depth": 3}
    labels = {0: "red", 1: "green", 2: "blue"}
    for kind in KINDS:
        torch.manual_seed(0)
        config = modeling_lambdabert.LambdaBertModel.config_class(**fields, id2label=labels)
        model = getattr(modeling_lambdabert, "LambdaBert" + kind)(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def interpret(folders, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments, kind="ForMaskedLM"):
        status = interpret_lambdas.main([command, *arguments, "--model", str(folders / kind)])
        return status, *capsys.readouterr()

    return run


def load(folders, kind):
    model = getattr(modeling_lambdabert, "LambdaBert" + kind).from_pretrained(folders / kind).eval()
    return model, AutoTokenizer.from_pretrained(folders / kind)


class TestMap:
    @pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
    def test_page_and_figures(self, interpret, tmp_path, kind):
        status, out, errors = interpret(
            "map", "the fox [MASK] a dog", "--output", "a.html", "a.svg", "a.png", kind=kind
        )
        assert (status, out, errors) == (0, "wrote a.html\nwrote a.svg\nwrote a.png\n", "")
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert ("The prediction" in page) == (kind in ("ForMaskedLM", "ForSequenceClassification"))
        drawing = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "<image" not in drawing  # vectors only
        assert drawing.count("<path") > 100
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    def test_some_layers(self, interpret, tmp_path):
        assert interpret("map", SENTENCES[0], "--layers", "1", "--output", "a.svg")[0] == 0
        text = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "layer 1, content" in text and "layer 0" not in text


class TestExplain:
    @pytest.mark.parametrize("kind", ["ForMaskedLM", "ForPreTrainingSOP"])
    def test_masked_word(self, interpret, folders, tmp_path, kind):
        sentence = "the fox [MASK] a dog"
        status, out, _ = interpret("explain", sentence, "--output", "a.json", "a.html", "a.png", kind=kind)
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert status == 0
        model, tokenizer = load(folders, kind)
        inputs = tokenizer(sentence, return_tensors="pt")
        place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        outputs = model(**inputs)
        logits = (outputs.logits if kind == "ForMaskedLM" else outputs.prediction_logits)[0, place]
        assert found["explanation"]["logit"] == pytest.approx(logits.max().item(), abs=1e-5)
        expected = explain_prediction(model, inputs, place, int(logits.argmax()))
        assert found["explanation"]["tokens"] == pytest.approx(expected.tokens[0].tolist(), abs=1e-5)
        for way in ("explanation", "integrated gradients"):
            way = found[way]
            assert sum(way["tokens"]) + way["bias"] == pytest.approx(way["logit"], abs=1e-2)
        assert found["likeliest"][0]["name"] == tokenizer.convert_ids_to_tokens(int(logits.argmax()))
        assert f"{expected.tokens[0, 1]:.3f}" in out

    def test_class(self, interpret, folders, tmp_path):
        arguments = ("explain", SENTENCES[0], "--target", "blue", "--output", "a.json")
        assert interpret(*arguments, kind="ForSequenceClassification")[0] == 0
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        model, tokenizer = load(folders, "ForSequenceClassification")
        logits = model(**tokenizer(SENTENCES[0], return_tensors="pt")).logits[0]
        assert found["explanation"]["logit"] == pytest.approx(logits[2].item(), abs=1e-5)
        assert {row["name"] for row in found["likeliest"]} == {"red", "green", "blue"}

    def test_label_of_a_token(self, interpret, folders, tmp_path):
        kind = "ForTokenClassification"
        assert interpret("explain", SENTENCES[0], "--place", "2", "--output", "a.json", "a.html", kind=kind)[0] == 0
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        model, tokenizer = load(folders, kind)
        inputs = tokenizer(SENTENCES[0], return_tensors="pt")
        logits = model(**inputs).logits[0, 2]
        label = int(logits.argmax())
        assert found["prediction"].startswith(f"“{['red', 'green', 'blue'][label]}” as the label of fox (2)")
        expected = explain_prediction(model, inputs, 2, label, tokenizer.mask_token_id)
        assert found["explanation"]["logit"] == pytest.approx(logits.max().item(), abs=1e-5)
        assert found["explanation"]["tokens"] == pytest.approx(expected.tokens[0].tolist(), abs=1e-5)

    @pytest.mark.parametrize("end", ["start", "end"])
    def test_answer(self, interpret, folders, tmp_path, end):
        kind, question = "ForQuestionAnswering", ("the fox sees", SENTENCES[1])
        status, out, _ = interpret("explain", *question, "--target", end, "--output", "a.json", "a.svg", kind=kind)
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        model, tokenizer = load(folders, kind)
        inputs = tokenizer(*question, return_tensors="pt")
        logits = model(**inputs)[f"{end}_logits"][0]
        of_text = [i for i, sequence in enumerate(inputs.sequence_ids(0)) if sequence == 1]
        place = max(of_text, key=lambda i: logits[i])
        assert status == 0 and f"({place}) as the {end} of the answer" in out
        assert found["likeliest"][0]["probability"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
        expected = explain_prediction(model, inputs, place, end, tokenizer.mask_token_id)
        assert found["explanation"]["logit"] == pytest.approx(logits[place].item(), abs=1e-5)
        assert found["explanation"]["tokens"] == pytest.approx(expected.tokens[0].tolist(), abs=1e-5)
        assert interpret("explain", *question, "--target", end, "--place", "3", kind=kind)[1].startswith("“")

    def test_json_says_model_versions_and_arguments(self, interpret, folders, tmp_path):
        interpret("explain", "the [MASK] dog", "--output", "a.json")
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert found["model"]["class"] == "LambdaBertForMaskedLM" and found["model"]["key_depth"] == 3
        assert set(found["versions"]) == {"python", "torch", "transformers"}
        assert found["arguments"]["text"] == ["the [MASK] dog"] and found["arguments"]["output"] == ["a.json"]


def test_figures_show_names_as_they_stand(tmp_path):
    """A $ starts no formula."""
    way = Attribution(torch.tensor([[0.5, -0.2]]), torch.zeros(1), torch.zeros(1))
    figure = draw_contributions(["$x^2$", "a$$b"], {"way of $y_1$": way}, "“$10 to $20” as its class")
    save_figure(figure, tmp_path / "a.svg")
    texts = figure.findobj(lambda artist: hasattr(artist, "get_parse_math") and "$" in artist.get_text())
    assert {text.get_text() for text in texts} >= {"$x^2$", "a$$b", "way of $y_1$", "“$10 to $20” as its class"}
    assert not any(text.get_parse_math() for text in texts)


class TestSwap:
    def test_effects_are_those_of_the_intervention(self, folders):
        model, tokenizer = load(folders, "ForMaskedLM")
        first, second = (tokenizer(sentence, return_tensors="pt") for sentence in SENTENCES[:2])
        effects = swap_effects(model, first, second, places=[2])
        assert [effect.layer for effect in effects] == [0, 1, None]
        with torch.no_grad():
            before = model(**first).logits[0].log_softmax(-1)
            with replace_lambdas(model, {1: second}):
                after = model(**first).logits[0].log_softmax(-1)
        divergence = torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean").item()
        assert effects[1].divergence == pytest.approx(divergence, abs=1e-6) and divergence > 0
        assert effects[1].likeliest == [int(after[2].argmax())]
        one, other = (trace_lambdas(model, inputs) for inputs in (first, second))
        for effect, layer, layer_of_other in zip(effects, one.layers, other.layers):
            cosine = torch.cosine_similarity(layer.content.flatten(), layer_of_other.content.flatten(), dim=0).item()
            assert effect.cosine == pytest.approx(cosine, abs=1e-6) and cosine < 0.999
        with replace_lambdas(model, {1: second}):
            swapped = trace_lambdas(model, first).outputs.hidden_states[-1]
        states = one.outputs.hidden_states[-1]
        change = ((swapped - states).norm(dim=-1) / states.norm(dim=-1)).mean().item()
        assert effects[1].hidden_states == pytest.approx(change, rel=1e-4)

    def test_special_tokens_are_no_predictions(self, folders, interpret, tmp_path):
        model, tokenizer = load(folders, "ForMaskedLM")
        text = "the [MASK] dog"
        interpret("swap", text, SENTENCES[1], "--output", "a.json")
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["texts"][0]["effects"][-1]
        first, second = (tokenizer(each, return_tensors="pt") for each in (text, SENTENCES[1]))
        with torch.no_grad():
            before = model(**first).logits[0].log_softmax(-1)
            with replace_lambdas(model, {0: second, 1: second}):
                after = model(**first).logits[0].log_softmax(-1)
        divergence = (before.exp() * (before - after)).sum(-1)
        assert found["divergence"] == pytest.approx(divergence[1:-1].mean().item(), abs=1e-6)
        assert abs(divergence.mean() - divergence[1:-1].mean()) > 1e-5
        assert found["changed"] == (before.argmax(-1) != after.argmax(-1))[1:-1].double().mean().item()

    def test_labels_of_a_text_are_no_tokens(self, folders):
        """As many labels as the text has tokens, and no place among them is left out."""
        _, tokenizer = load(folders, "ForMaskedLM")
        first, second = (tokenizer(sentence, return_tensors="pt") for sentence in SENTENCES[:2])
        labels = {"num_labels": first["input_ids"].shape[1], "problem_type": "multi_label_classification"}
        model = modeling_lambdabert.LambdaBertForSequenceClassification.from_pretrained(folders / "Model", **labels)
        torch.nn.init.normal_(model.classifier.weight)
        *_, effect = swap_effects(model, first, second, predicted=[1, 2])
        with torch.no_grad():
            before = model(**first).logits[0].sigmoid()
            with replace_lambdas(model, {0: second, 1: second}):
                after = model(**first).logits[0].sigmoid()
        divergence = before * (before / after).log() + (1 - before) * ((1 - before) / (1 - after)).log()
        assert effect.divergence == pytest.approx(divergence.mean().item(), rel=1e-3)

    @pytest.mark.parametrize("side", ["right", "left"])
    @pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
    def test_padding_changes_nothing(self, folders, kind, side):
        model, tokenizer = load(folders, kind)
        first, second = (tokenizer(sentence, return_tensors="pt") for sentence in SENTENCES[:2])
        tokenizer.padding_side = side
        padded = tokenizer(SENTENCES[0], return_tensors="pt", padding="max_length", max_length=12)
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for own, other in zip(swap_effects(model, first, second), swap_effects(model, padded, second), strict=True):
            for field in ("hidden_states", "divergence", "changed"):
                assert getattr(other, field) == pytest.approx(getattr(own, field), abs=1e-5)

    @pytest.mark.parametrize(
        "places, message",
        [
            (dict(predicted=[]), "predicted=\\[\\]: there is no prediction"),
            (dict(predicted=[99]), "predicted holds 99, where the text has no token"),
            (dict(places=[-1]), "places holds -1, where the text has no token"),
        ],
    )
    def test_places_without_a_token(self, folders, places, message):
        model, tokenizer = load(folders, "ForMaskedLM")
        inputs = tokenizer(SENTENCES[0], return_tensors="pt")
        with pytest.raises(ValueError, match=message):
            swap_effects(model, inputs, inputs, **places)

    def test_a_class_of_a_text_has_no_place(self, folders):
        model, tokenizer = load(folders, "ForSequenceClassification")
        inputs = tokenizer(SENTENCES[0], return_tensors="pt")
        with pytest.raises(ValueError, match="places: the model predicts once for a text"):
            swap_effects(model, inputs, inputs, places=[1])

    def test_a_text_with_itself_changes_nothing(self, folders):
        model, tokenizer = load(folders, "ForMaskedLM")
        inputs = tokenizer(SENTENCES[0], return_tensors="pt")
        for effect in swap_effects(model, inputs, inputs):
            assert effect.hidden_states == effect.divergence == effect.changed == 0
            assert effect.layer is None or effect.cosine == pytest.approx(1)

    @pytest.mark.parametrize("kind", ["Model", "ForMaskedLM", "ForSequenceClassification"])
    def test_command(self, interpret, tmp_path, kind):
        status, out, _ = interpret("swap", "the [MASK] dog", SENTENCES[1], "--output", "a.json", kind=kind)
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["texts"]
        assert status == 0 and [text["text"] for text in found] == ["the [MASK] dog", SENTENCES[1]]
        assert (found[0]["effects"][0]["divergence"] is None) == (kind == "Model")
        assert [len(text["effects"][0]["likeliest"]) for text in found] == [kind == "ForMaskedLM", 0]
        assert out.count("all") == 2


class TestTopics:
    def test_nearest_are_the_most_alike(self):
        # four directions about a common part, at several lengths
        directions = torch.eye(8)[:2].repeat(2, 1) * torch.tensor([1.0, 1, -1, -1])[:, None]
        lengths = torch.tensor([1.0, 2, 4]).repeat(4)
        rows = 9 + directions.repeat_interleave(3, 0) * lengths[:, None]
        topics = [name for name in "abcd" for _ in range(3)]
        (found,) = neighbours({"row": rows}, topics, count=2)
        assert found.same_topic == 1 and found.interval == (1, 1)
        for text, nearest in enumerate(found.nearest.tolist()):
            assert set(nearest) == {3 * (text // 3) + i for i in range(3)} - {text}
        assert chance(topics) == pytest.approx(2 / 11)
        numbers = torch.tensor([ord(topic) for topic in topics])
        for same in (numbers, numbers.numpy(), [*numbers]):
            assert neighbours({"row": rows}, same)[0].same_topic == 1 and chance(same) == chance(topics)

    def test_intervals_draw_topics(self):
        """Four topics keep to themselves, and of three each text is like one of either other."""
        rows = torch.eye(7).repeat_interleave(3, 0)
        topics = [name for name in "abcd" for _ in range(3)] + [*"xyz"] * 3
        (found,) = neighbours({"row": rows}, topics, count=1)
        right = torch.tensor([1.0, 1, 1, 1, 0, 0, 0])
        assert found.same_topic == pytest.approx(4 / 7)
        assert found.interval == pytest.approx(bootstrap_interval(right))
        assert found.interval != pytest.approx(bootstrap_interval(right.repeat_interleave(3)))

    def test_features_without_neighbours_are_refused(self):
        with pytest.raises(ValueError, match=r"features\['row'\] are the same for all texts"):
            neighbours({"row": torch.ones(4, 2)}, count=1)
        with pytest.raises(ValueError, match=r"features\['row'\] holds numbers that are not finite"):
            neighbours({"row": torch.tensor([[1.0], [2], [torch.nan]])}, count=1)
        with pytest.raises(ValueError, match="topics has 1 entries"):
            chance(["a"])

    def test_features_are_those_of_the_traces(self, folders):
        model, tokenizer = load(folders, "ForMaskedLM")
        batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
        rows = topic_features(model, [batch])
        alone = trace_lambdas(model, tokenizer(SENTENCES[1], return_tensors="pt"))
        torch.testing.assert_close(rows["content lambda 1"][1], alone.layers[1].content[0].flatten())
        torch.testing.assert_close(rows["mean hidden state 1"][1], alone.outputs.hidden_states[2][0].mean(0))
        contents = [layer.content[0].flatten() for layer in alone.layers]
        both = torch.cat([content / content.norm() for content in contents])
        torch.testing.assert_close(rows["content lambda, all layers"][1], both)

    def test_command(self, interpret, tmp_path):
        (tmp_path / "texts.txt").write_text("\ufeff" + "\n\n".join(SENTENCES), encoding="utf-8")
        rows = [f"{'fox' if i < 2 else 'tree'}\t{sentence}" for i, sentence in enumerate(SENTENCES)]
        (tmp_path / "texts.tsv").write_text("topic\ttext\n" + "\n".join(rows) + "\n")
        status, out, _ = interpret("topics", "texts.txt", "--neighbours", "2", "--output", "a.json")
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert status == 0 and found["texts"] == SENTENCES and len(found["rows"]) == 5
        assert [len(row["nearest"][0]) for row in found["rows"]] == [2] * 5 and len(out.splitlines()) == 2 + 4 + 1
        shown = [list(map(int, line.split())) for line in out.splitlines()[2:6]]
        assert shown == [[i, *(row["nearest"][i][0] for row in found["rows"])] for i in range(4)]
        status, out, errors = interpret("topics", "texts.tsv", "--neighbours", "1")
        assert status == 0 and re.search(r"chance +0\.333", out)
        assert "the intervals rest on 2 topics; fewer than 20 are too few" in errors


def write_task(file, rows, header="split\tlabel\ttext\ttarget"):
    file.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n")


def task_rows():
    animals = ["fox", "dog", "bird", "tree"]
    rows = []
    for split, count in (("train", 40), ("dev", 12), ("test", 12)):
        for i in range(count):
            first, second, verb = animals[i % 4], animals[(i + i // 4) % 4], "sees" if i % 2 else "is"
            rows.append((split, str(i % 2), f"the {first} {verb} the {second}", first))
    return [*rows, ("train", "0", "the day is red", "day"), ("train", "1", "the night sees red", "night")]


class TestProbe:
    def test_every_row_in_full_and_at_equal_dimension(self, interpret, tmp_path, monkeypatch):
        monkeypatch.setattr("lambdabert.interpretation.probes.STRENGTHS", (0.01, 1))
        monkeypatch.setattr("lambdabert.interpretation.probes.PORTIONS", (0.25, 1))
        write_task(tmp_path / "verb.tsv", task_rows())
        status, out, errors = interpret("probe", "verb.tsv", "--output", "a.json", "a.svg")
        assert status == 0, errors
        rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["tasks"]["verb"]
        by_name = {row["row"]: row for row in rows}
        expected = {"majority", "length", "bag of words", "mean embedding", "content lambda, all layers"}
        expected |= {f"{name} {i}" for name in ("mean hidden state", "mean value", "content lambda") for i in range(2)}
        expected |= {f"random-key content lambda {i}" for i in range(2)}
        kinds = ("content lambda", "mean hidden state")
        random = {f"random model {j}, {kind} {of}" for j in range(3) for kind in kinds for of in (0, 1)}
        random |= {f"random model {j}, content lambda, all layers" for j in range(3)}
        assert set(by_name) == expected | random
        assert by_name["majority"]["full"]["accuracy"] == 0.5 and by_name["bag of words"]["full"]["accuracy"] == 1
        assert max(row["equal dimension"]["dimension"] for row in rows) == 24  # of the hidden states
        assert by_name["bag of words"]["full"]["control accuracy"] is not None
        assert "4 targets" in errors and by_name["majority"]["full"]["test groups"] == 4
        # nothing is above what the words say
        assert {row["full"]["encoded"] for row in rows} == {False, None}
        assert all(name in out for name in expected)
        assert re.search(r"bits +uniform bits +dim", out)
        codes = by_name["length"]["full"]
        assert f"{codes['codelength']:.3f}  " in out and re.search(rf" +{codes['uniform codelength']:.3f} +1 ", out)


class TestTasks:
    @pytest.mark.parametrize(
        "row, message",
        [
            (("train", " ", "the fox", "fox"), "line 4 has no label; give it one"),
            (("train", "1", "the fox", ""), 'line 4 has no target; write "_" where none is known'),
        ],
    )
    def test_blank_cells_are_no_classes_or_groups(self, tmp_path, row, message):
        write_task(tmp_path / "a.tsv", [("train", "0", "a fox", "fox"), ("train", "1", "a dog", "_"), row])
        with pytest.raises(ValueError, match=f"task=.*a.tsv, {message}"):
            read_task(tmp_path / "a.tsv")

    def test_texts_of_train_in_other_splits_are_told(self, tmp_path, caplog):
        rows = [("test", "a", "the dog"), ("train", "a", "the fox"), ("train", "b", "the dog"), ("dev", "b", "the fox")]
        write_task(tmp_path / "a.tsv", [*rows, ("train", "b", "the dog")], "split\tlabel\ttext")
        read_task(tmp_path / "a.tsv")
        assert "2 texts of dev and test occur in train as well, the first in line 2" in caplog.text
        caplog.clear()
        write_task(tmp_path / "a.tsv", [*rows[1:3], ("test", "b", "a fox"), rows[1]], "split\tlabel\ttext")
        read_task(tmp_path / "a.tsv")
        assert not caplog.text

    def test_a_byte_order_mark_is_no_part_of_a_column(self, tmp_path):
        write_task(tmp_path / "a.tsv", [("train", label, "the fox", "fox") for label in "01"])
        plain = read_task(tmp_path / "a.tsv")
        (tmp_path / "a.tsv").write_text("\ufeff" + (tmp_path / "a.tsv").read_text(encoding="utf-8"), encoding="utf-8")
        assert read_task(tmp_path / "a.tsv") == plain

    def test_blank_lines_are_left_out_and_counted(self, tmp_path):
        lines = ["split\tlabel\ttext", "", "train\t0\tthe fox", "", 'train\t1\tthe "dog']
        (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n\n")
        assert read_task(tmp_path / "a.tsv").texts == ["the fox", 'the "dog']
        for name, row, message in (("b", "train\t1", "has 2 columns"), ("c", "tran\t1\tx", ": split='tran'")):
            (tmp_path / f"{name}.tsv").write_text("\n".join([*lines, row]))
            with pytest.raises(
                ValueError, match=f"{name}.tsv, line 6{message if message[0] == ':' else ' ' + message}"
            ):
                read_task(tmp_path / f"{name}.tsv")
        (tmp_path / "d.tsv").write_text("\n".join([*lines, "train\t1"]))
        with pytest.raises(ValueError, match="^file=.*d.tsv, line 6 has 2 columns, the header 3"):
            read_texts(tmp_path / "d.tsv")

    def test_rare_targets_share_names_by_twos(self, tmp_path):
        targets = ["fox", "dog", "fox", "bird", "tree", "day", "night"]
        write_task(tmp_path / "a.tsv", [("train", str(i % 2), "the fox", name) for i, name in enumerate(targets)])
        groups = read_task(tmp_path / "a.tsv").groups
        assert groups[0] == groups[2] == "fox"
        assert sorted(map(groups.count, set(groups))) == [2, 2, 3]

    def test_where_a_target_is_missing_there_are_no_groups(self, tmp_path):
        write_task(tmp_path / "a.tsv", [("train", "a", "the fox", "fox"), ("train", "b", "the fox", "_")])
        assert read_task(tmp_path / "a.tsv").groups is None
        write_task(tmp_path / "b.tsv", [("train", "a", "x"), ("train", "b", "y")], "split\tlabel\ttext")
        assert read_task(tmp_path / "b.tsv").groups is None


class TestFaithfulness:
    def test_command(self, interpret, tmp_path):
        (tmp_path / "texts.txt").write_text("\n".join([*SENTENCES, "the fox"]))
        status, out, errors = interpret("faithfulness", "texts.txt", "--output", "a.json")
        assert "4 of 5 texts are used" in errors and "the intervals rest on 4 texts; fewer than 20" in errors
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert status == 0 and found["examples"] == 4
        assert set(found["methods"]) == {"explanation", "integrated gradients", "gradient x input", "nearness"}
        assert all(-1 <= row["spearman"] <= 1 for row in found["methods"].values()) and "nearness" in out


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            (("explain", "the fox sees"), r"text holds 0 \[MASK\].*exactly one"),
            (("explain", "the [MASK] [MASK]"), r"text holds 2 \[MASK\]"),
            (("explain", "the [MASK]", "--target", "foxes and dogs"), "target=foxes and dogs is not a single token"),
            (("explain", "one", "two"), "text: 2 given, and explain takes one"),
            (("map", "one", "two", "--output", "b.html"), "text: 2 given, and map takes one"),
            (("map", "--output", "b.html"), "text: 0 given"),
            (("map", "the fox"), "output: map writes a page"),
            (("map", " ", "--output", "b.html"), "text=' ' is empty"),
            (("map", "fox " * 60, "--output", "b.html"), "text='fox.*max_position_embeddings=40; shorten it"),
            (("map", "the fox", "--output", "mine.html"), "output=mine.html exists and is not overwritten"),
            (("map", "the fox", "--output", "b.html", "mine.html"), "output=mine.html exists"),
            (("map", "the fox", "--output", "b.pdf"), "output=b.pdf: map writes .html, .svg, .png"),
            (("map", "the fox", "--output", "no/b.html"), "output=no/b.html: the folder no does not exist"),
            (("map", "the fox", "--output", "b.html", "b.html"), "output=b.html is named twice"),
            (("map", "the fox", "--output", "b.html", "--layers", "0"), "layers has no effect without a figure"),
            (("map", "the fox", "--output", "b.svg", "--layers", "7"), "layer=7: the model has 2 lambda layers"),
            (("swap", "the fox"), "text: 1 given, and swap takes two"),
            (("swap", "the fox", "a", "b"), "text: 3 given"),
            (("topics", "none.txt"), "file=none.txt cannot be read"),
            (("topics", "empty.txt"), "file=empty.txt holds no text"),
            (("topics", "one.txt"), "one.txt: 2 texts, of which none is nearer than another; give 3 or more."),
            (("topics", "shape.tsv"), "file=shape.tsv has the columns"),
            (("topics", "same.txt"), "same.txt: all 3 texts are the same"),
            (("explain", "the \udcff [MASK]"), r"text='the \\udcff \[MASK\]' is not UTF-8"),
            (("topics", "topics.tsv"), "file=topics.tsv, line 4 has no topic; give every text one"),
            (("probe", "none.tsv"), "task=none.tsv cannot be read"),
            (("probe", "shape.tsv"), "task=shape.tsv lacks the column split"),
            (("probe", "ragged.tsv"), "task=ragged.tsv, line 3 has 2 columns, the header 3"),
            (("probe", "split.tsv"), "task=split.tsv, line 2: split='valid' is unknown"),
            (("probe", "one_class.tsv"), "task=one_class.tsv: all labels are 'a'"),
            (("probe", "rare.tsv"), "task=rare.tsv: target='day' is a group with a single member"),
            (("faithfulness", "empty.txt"), "file=empty.txt holds no text"),
            (("draw", "x"), "invalid choice: 'draw'.*--help"),
        ],
    )
    def test_bad_input(self, interpret, tmp_path, arguments, message):
        (tmp_path / "mine.html").write_text("mine")
        (tmp_path / "empty.txt").write_text("\n \n")
        (tmp_path / "one.txt").write_text("the fox\nthe dog\n")
        (tmp_path / "shape.tsv").write_text("a\tb\n1\t2\n")
        (tmp_path / "same.txt").write_text("the fox\nthe fox\nthe fox\n")
        (tmp_path / "topics.tsv").write_text("text\ttopic\n\nthe fox\tx\nthe dog\t \nthe cat\tx\n")
        header = "split\tlabel\ttext"
        write_task(tmp_path / "ragged.tsv", [("train", "a", "b"), ("train", "a")], header)
        write_task(tmp_path / "split.tsv", [("valid", "a", "b")], header)
        write_task(tmp_path / "one_class.tsv", [("train", "a", "b"), ("test", "a", "b")], header)
        write_task(tmp_path / "rare.tsv", task_rows()[:-1])
        before = sorted(tmp_path.iterdir())
        status, out, errors = interpret(*arguments)
        assert status == 1 and len(errors.splitlines()) == 1
        assert re.match("error: .*" + message, errors), errors
        assert sorted(tmp_path.iterdir()) == before and (tmp_path / "mine.html").read_text() == "mine"

    def test_models(self, interpret, folders, teachers, tmp_path, capsys):
        for model, message in (
            (teachers / "plain", "is of type bert and has no lambda layers"),
            (tmp_path / "none", "none"),
        ):
            assert interpret_lambdas.main(["map", "the fox", "--model", str(model), "--output", "b.html"]) == 1
            errors = capsys.readouterr().err
            assert errors.startswith("error: ") and len(errors.splitlines()) == 1 and message in errors
        assert "faithfulness masks tokens" in interpret("faithfulness", self.texts(tmp_path), kind="Model")[2]
        assert "`map` shows any model" in interpret("explain", "the fox", kind="Model")[2]
        arguments = ("explain", "the fox", "--target", "black")
        assert "give one of red, green, blue" in interpret(*arguments, kind="ForSequenceClassification")[2]
        assert not (tmp_path / "b.html").exists()

    @pytest.mark.parametrize(
        "kind, arguments, message",
        [
            ("ForTokenClassification", ("the fox",), r"place is missing.*0 \[CLS\], 1 the, 2 fox, 3 \[SEP\]; give"),
            (
                "ForTokenClassification",
                ("the fox", "--place", "4"),
                r"place=4: the text has the tokens 0 \[CLS\], 1 the",
            ),
            ("ForTokenClassification", ("the fox", "--place", "1", "--target", "black"), "target=black is not a class"),
            ("ForMaskedLM", ("the [MASK]", "--place", "1"), r"place=1 has no effect.*leave it out"),
            ("ForSequenceClassification", ("the fox", "--place", "1"), "place=1 has no effect"),
            ("ForQuestionAnswering", ("the fox",), "text: 1 given, and explain of an answer takes two"),
            (
                "ForQuestionAnswering",
                ("the fox", "a dog", "--target", "middle"),
                "target=middle: an answer has a start",
            ),
            ("ForQuestionAnswering", ("the fox", " "), "text=' ' is empty"),
            ("ForQuestionAnswering", ("the fox", "a dog " * 9), "both texts=.*has 4. tokens.*shorten it"),
        ],
    )
    def test_explained_places(self, interpret, kind, arguments, message):
        status, _, errors = interpret("explain", *arguments, kind=kind)
        assert status == 1 and len(errors.splitlines()) == 1
        assert re.match("error: .*" + message, errors), errors

    @staticmethod
    def texts(folder):
        (folder / "texts.txt").write_text("\n".join(SENTENCES))
        return "texts.txt"

    @pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
    def test_labels_and_values_are_no_classes(self, interpret, folders, tmp_path, problem):
        shutil.copytree(folders / "ForSequenceClassification", tmp_path / "labels")
        config = json.loads((tmp_path / "labels/config.json").read_text())
        (tmp_path / "labels/config.json").write_text(json.dumps({**config, "problem_type": problem}))
        status, _, errors = interpret("explain", "the fox", "--output", "a.json", kind=tmp_path / "labels")
        if problem == "regression":
            assert status == 1 and "predicts numbers, or has a single class" in errors
        else:
            assert status == 0, errors
            model, tokenizer = load(folders, "ForSequenceClassification")
            with torch.inference_mode():
                chances = model(**tokenizer("the fox", return_tensors="pt")).logits[0].sigmoid()
            told = json.loads((tmp_path / "a.json").read_text())
            found = {entry["name"]: entry["probability"] for entry in told["likeliest"]}
            names = [model.config.id2label[i] for i in range(3)]
            assert found == pytest.approx(dict(zip(names, chances.tolist())), rel=1e-4)
        status, _, errors = interpret("swap", "the fox", "a dog", "--output", "b.json", kind=tmp_path / "labels")
        assert status == 0, errors
        effects = json.loads((tmp_path / "b.json").read_text())["texts"][0]["effects"]
        assert all((effect["divergence"] is None) == (problem == "regression") for effect in effects)

    def test_weights_that_are_missing(self, interpret, folders, tmp_path):
        shutil.copytree(folders / "ForMaskedLM", tmp_path / "deeper")
        config = json.loads((tmp_path / "deeper/config.json").read_text())
        (tmp_path / "deeper/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        status, _, errors = interpret("explain", "the [MASK]", kind=tmp_path / "deeper")
        assert status == 1 and re.match("error: .*no weights for bert.encoder.layer.2.*random", errors), errors

    @pytest.mark.parametrize("command", [("map", "the fox", "--output", "a.svg"), ("swap", "the fox", "a dog")])
    def test_a_model_of_choices_is_refused(self, interpret, folders, tmp_path, command):
        encoder, tokenizer = load(folders, "Model")
        modeling_lambdabert.LambdaBertForMultipleChoice(encoder.config).save_pretrained(tmp_path / "choices")
        tokenizer.save_pretrained(tmp_path / "choices")
        status, _, errors = interpret(*command, kind=tmp_path / "choices")
        assert status == 1 and re.match("error: .*is a multiple-choice model", errors.splitlines()[-1]), errors

    def test_a_pooler_may_be_missing_where_nothing_is_read_from_it(self, interpret, folders, tmp_path):
        for kind, prefix in (("ForSequenceClassification", "bert.pooler."), ("Model", "pooler.")):
            shutil.copytree(folders / kind, tmp_path / kind)
            weights = load_file(tmp_path / kind / "model.safetensors")
            kept = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
            assert len(kept) < len(weights)
            save_file(kept, tmp_path / kind / "model.safetensors", {"format": "pt"})
        status, _, errors = interpret("explain", "the fox", kind=tmp_path / "ForSequenceClassification")
        assert status == 1 and "no weights for bert.pooler." in errors
        status, _, errors = interpret("map", "the fox", "--output", "a.svg", kind=tmp_path / "Model")
        assert status == 0, errors

    def test_a_models_own_code_is_not_run(self, interpret, folders, tmp_path, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("code of a folder was loaded")

        assert json.loads((folders / "ForMaskedLM" / "config.json").read_text())["auto_map"]
        monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", refuse)
        monkeypatch.setattr("transformers.models.auto.tokenization_auto.get_class_from_dynamic_module", refuse)
        assert interpret("map", "the fox", "--output", "a.html")[0] == 0

    @pytest.mark.parametrize(
        "arguments, package",
        [(("map", "the fox", "--output", "a.svg"), "matplotlib"), (("probe", "verb.tsv"), "scikit-learn")],
    )
    def test_missing_packages(self, interpret, tmp_path, monkeypatch, arguments, package):
        plain = importlib.util.find_spec
        absent = {"matplotlib", "sklearn"}
        monkeypatch.setattr(interpret_lambdas, "find_spec", lambda name: None if name in absent else plain(name))
        status, _, errors = interpret(*arguments)
        assert status == 1
        assert errors == f"error: {package} is not installed: pip install {package}\n"


class TestDocuments:
    def test_snippets(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
        lines = ["tr\tPRES\tThe fox sees", "tr\tPAST\tThe dog saw", "va\tPAST\tIt trod", "te\tPRES\tIt trots"]
        (tmp_path / "past_present.txt").write_text("\n".join(lines) + "\n")
        names = {}
        page = (ROOT / "docs" / "interpretation.md").read_text(encoding="utf-8")
        for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
            exec(snippet, names)
        assert names["trace"].layers[3].content.shape == (1, 8, 64)
        assert attention(names["trace"], 3, "position").shape == (1, 4, 11, 11, 1)
        assert token_shares(names["trace"], 3).left_out.shape == (1, 11, 8, 64)
        found = names["found"]
        assert (found.tokens.sum() + found.bias).item() == pytest.approx(found.logit.item(), abs=1e-3)
        assert (names["outputs"].lambda_params is None) and Path("page.html").exists()
        task = read_task("tense.tsv")
        assert task.splits == ["train", "train", "dev", "test"] and task.labels == ["PRES", "PAST", "PAST", "PRES"]
        assert task.texts == [line.split("\t")[2] for line in lines]

    def test_outputs(self):
        page = (ROOT / "docs" / "interpretation.md").read_text(encoding="utf-8")
        told = dict(re.findall(r"^\| `(\w+)` \| .* \| (`\..*`) \|$", page, flags=re.MULTILINE))
        assert set(told) == {"map", "explain", "swap", "topics", "probe", "faithfulness"}
        for command, ends in told.items():
            (taken,) = re.findall(r"\w+ writes (.*);", self.refusal(command))
            assert taken == ends.replace("`", "")

    @staticmethod
    def refusal(command):
        needed = {"map": ["text"], "explain": ["text"], "swap": ["a", "b"]}.get(command, ["file.tsv"])
        args = interpret_lambdas.build_parser().parse_args([command, *needed, "--model", "m", "--output", "a.pdf"])
        with pytest.raises(ValueError) as raised:
            interpret_lambdas.check_outputs(args)
        return str(raised.value)

    def test_commands(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
        for file in ("my_texts.txt", "my_sentences.txt"):
            (tmp_path / file).write_text("\n".join(SENTENCES + ["the sky is blue", "a king ruled the land"]))
        text = (ROOT / "docs" / "interpretation.md").read_text() + (ROOT / "README.md").read_text()
        commands = re.findall(r"^    python interpret_lambdas\.py (.*)", re.sub(r"\\\n", " ", text), flags=re.MULTILINE)
        seen = set()
        for command in map(shlex.split, commands):
            args = interpret_lambdas.build_parser().parse_args(command)
            for file in args.output:
                Path(file).unlink(missing_ok=True)
            interpret_lambdas.check_outputs(args)
            seen.add(args.command)
            if args.command != "probe":  # whose tasks are minutes
                assert interpret_lambdas.main(command) == 0, capsys.readouterr().err
        assert seen == {"map", "explain", "swap", "topics", "probe", "faithfulness"}


class TestUsersFiles:
    """What was once read as something else, or lost."""

    def test_tasks_of_one_name(self, interpret, tmp_path):
        for folder in "ab":
            (tmp_path / folder).mkdir()
            write_task(tmp_path / folder / "t.tsv", task_rows())
        status, _, errors = interpret("probe", "a/t.tsv", "b/t.tsv")
        assert status == 1 and "tasks: a/t.tsv and b/t.tsv are all named t" in errors

    def test_tasks_that_cannot_be_probed(self, interpret, tmp_path):
        write_task(tmp_path / "a.tsv", [row for row in task_rows() if row[0] != "dev"])
        status, _, errors = interpret("probe", "a.tsv")
        assert status == 1 and "task=a.tsv has no example of split=dev" in errors
        write_task(tmp_path / "a.tsv", [(*row[:3], "fox") for row in task_rows()])
        status, _, errors = interpret("probe", "a.tsv")
        assert status == 1 and "task=a.tsv: every example has target='fox'" in errors

    def test_a_label_that_train_lacks(self, tmp_path):
        rows = [("train", "a", "the fox", "_"), ("train", "b", "the dog", "_"), ("test", "a ", "a fox", "_")]
        write_task(tmp_path / "a.tsv", rows)
        with pytest.raises(ValueError, match="line 4: label='a ' of test does not occur in train"):
            read_task(tmp_path / "a.tsv")

    @pytest.mark.parametrize("name", ["a.csv", "a.JSONL"])
    def test_tables_are_not_read_as_lines(self, tmp_path, name):
        (tmp_path / name).write_text("text,topic\nthe fox,x\n")
        with pytest.raises(ValueError, match="is a table; give a .tsv"):
            read_texts(tmp_path / name)

    def test_upper_case_and_columns_named_twice(self, tmp_path):
        (tmp_path / "a.TSV").write_text("text\ttopic\nthe fox\tx\n")
        assert read_texts(tmp_path / "a.TSV") == (["the fox"], ["x"])
        (tmp_path / "b.tsv").write_text("text\ttext\nthe fox\tx\n")
        with pytest.raises(ValueError, match="names the column text twice"):
            read_texts(tmp_path / "b.tsv")

    def test_content_lambdas_of_zero_have_no_neighbours(self, folders, interpret, tmp_path):
        model, tokenizer = load(folders, "ForMaskedLM")
        model.config.content_gain = True
        new = modeling_lambdabert.LambdaBertForMaskedLM(model.config)
        new.save_pretrained(folders / "New")
        tokenizer.save_pretrained(folders / "New")
        (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
        status, out, errors = interpret("topics", "texts.txt", kind="New")
        assert status == 0 and "left out, being the same for all texts: content lambda 0" in errors
        assert "content lambda" not in out and "mean hidden state 0" in out

    def test_swap_shows_what_was_predicted_before(self, interpret, folders, tmp_path):
        status, out, _ = interpret("swap", "the [MASK] dog", SENTENCES[1], "--output", "a.json")
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["texts"][0]
        model, tokenizer = load(folders, "ForMaskedLM")
        logits = model(**tokenizer("the [MASK] dog", return_tensors="pt")).logits[0, 2]
        own = tokenizer.convert_ids_to_tokens([int(logits.argmax())])
        assert status == 0 and found["likeliest"] == own
        assert re.search(rf"^own +{re.escape(own[0])}$", out, re.MULTILINE)

    def test_a_pair_is_one_row(self, interpret, folders, tmp_path):
        status, out, errors = interpret(
            "explain", SENTENCES[0], SENTENCES[1], "--output", "a.json", kind="ForSequenceClassification"
        )
        assert status == 0, errors
        model, tokenizer = load(folders, "ForSequenceClassification")
        logits = model(**tokenizer(SENTENCES[0], SENTENCES[1], return_tensors="pt")).logits[0]
        found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert found["likeliest"][0]["probability"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)

    @pytest.mark.parametrize("kind", ["ForQuestionAnswering", "ForPreTrainingSOP"])
    def test_a_page_of_two_texts(self, interpret, folders, tmp_path, kind):
        pair = ("the fox [MASK] a dog", SENTENCES[1])
        status, _, errors = interpret("map", *pair, "--output", "pair.html", kind=kind)
        assert status == 0, errors
        page = (tmp_path / "pair.html").read_text(encoding="utf-8")
        model, tokenizer = load(folders, kind)
        inputs = tokenizer(*pair, return_tensors="pt")
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
        if kind == "ForQuestionAnswering":
            first = inputs["input_ids"][0].tolist().index(tokenizer.sep_token_id) + 1  # of the second text
            place = first + int(model(**inputs).start_logits[0, first:-1].argmax())
            assert f"“{tokens[place]}” ({place}) as the start of the answer" in page
        else:
            place = tokens.index("[MASK]")
            (best,) = tokenizer.convert_ids_to_tokens([int(model(**inputs).prediction_logits[0, place].argmax())])
            assert f"“{best}” as [MASK] ({place})" in page

    @pytest.mark.parametrize("harm", ["cut short", "another size", "missing"])
    def test_a_model_that_cannot_be_loaded(self, folders, interpret, harm):
        folder = folders / "Damaged"
        shutil.rmtree(folder, ignore_errors=True)
        if harm != "missing":
            shutil.copytree(folders / "ForMaskedLM", folder)
        if harm == "cut short":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-50])
        if harm == "another size":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 16}))
        status, _, errors = interpret("swap", *SENTENCES[:2], kind="Damaged")
        assert status == 1 and errors.startswith("error: ") and str(folder) in errors and "Traceback" not in errors
        assert ("weights are damaged or do not fit its config" in errors) == (harm != "missing")
