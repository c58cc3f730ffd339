"""The benchmarks of probes: attention statistics of known maps, picks on dev, minimal pairs, topics, channels."""

import argparse
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

import modeling_lambdabert
from benchmarks import attention_features, channels, interpretation, minimal_pairs, probing
from lambdabert.interpretation import probe
from text_support import write_parquet

NOUNS = ["fox", "dog", "bird", "tree"]


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory):
    """Folders of a tiny masked LambdaBERT and of a BERT of its shape, with the text's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    fields = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = modeling_lambdabert.LambdaBertModel.config_class(**fields, num_lambda_queries=2, key_depth=3)
    model = modeling_lambdabert.LambdaBertForMaskedLM(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "lambda")
    BertForMaskedLM(BertConfig(**fields, num_attention_heads=2)).save_pretrained(folder / "bert")
    for name in ("lambda", "bert"):
        tokenizer.save_pretrained(folder / name)
    return folder


class TestAttentionStatistics:
    def statistics(self, attention, mask):
        found = attention_features.attention_statistics(attention, mask)
        names = ["itself", "before", "after", "cls", "sep", "entropy", "of cls", "distance"]
        names += [f"{what} {t}" for t in attention_features.THRESHOLDS for what in ("components", "cycles")]
        assert found.shape[-1] == len(names) == attention_features.STATISTICS
        return dict(zip(names, found[0, 0].tolist()))

    def test_uniform(self):
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
        attention = (mask / 4).expand(1, 1, 6, 6)
        found = self.statistics(attention, mask)
        for name in ("itself", "before", "after", "cls", "sep"):
            assert found[name] == pytest.approx(0.25), name
        assert found["entropy"] == pytest.approx(math.log(4)) == found["of cls"]
        assert found["distance"] == pytest.approx(1.25)  # 20 / 16
        assert (found["components 0.25"], found["cycles 0.25"]) == (1, 3)  # all 6 edges of 4 tokens
        assert (found["components 0.5"], found["cycles 0.5"]) == (4, 0)

    def test_each_token_to_the_one_before(self):
        mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
        attention = torch.zeros(1, 1, 6, 6)
        for place in range(6):
            attention[0, 0, place, max(0, place - 1)] = 1
        found = self.statistics(attention, mask)
        assert found["before"] == 1 and found["after"] == found["sep"] == found["entropy"] == 0
        assert found["itself"] == pytest.approx(1 / 5) and found["cls"] == pytest.approx(2 / 5)
        assert found["distance"] == pytest.approx(4 / 5)
        assert found["components 0.75"] == pytest.approx(1) and found["cycles 0.75"] == pytest.approx(0)

    def test_two_components_and_a_cycle(self):
        attention = torch.zeros(1, 1, 5, 5)
        for first, second in ((0, 1), (1, 2), (2, 0), (3, 4), (4, 3)):
            attention[0, 0, first, second] = 1
        found = self.statistics(attention, torch.ones(1, 5, dtype=torch.long))
        assert found["components 0.5"] == pytest.approx(2) and found["cycles 0.5"] == pytest.approx(1)

    def test_padding_changes_nothing(self, folders):
        bert = BertModel.from_pretrained(folders / "bert", attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(folders / "bert")
        texts = ["the fox sees a dog", "a bird sings in the tree"]
        together = attention_features.bert_rows(bert, [tokenizer(texts, return_tensors="pt", padding=True)])
        apart = attention_features.bert_rows(bert, [tokenizer(text, return_tensors="pt") for text in texts])
        assert set(together) == set(apart) and len(together) == 4 * 5
        for name, rows in together.items():
            torch.testing.assert_close(rows, apart[name], rtol=1e-4, atol=1e-5)
        assert together["attention, all layers"].shape == (2, 2 * 2 * attention_features.STATISTICS)


@pytest.fixture
def task_file(tmp_path):
    """A task in which the noun decides, with a target that stands alone."""
    lines = ["split\tlabel\ttext\ttarget"]
    for split, count in (("train", 48), ("dev", 16), ("test", 16)):
        for i in range(count):
            noun = NOUNS[i % 4]
            lines.append(f"{split}\t{i % 2}\tthe {noun} sees {'a' * (i % 3)} {NOUNS[(i // 4) % 4]}\t{noun}")
    lines.append("train\t0\tthe day is red\tday")
    (tmp_path / "nouns.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "nouns.tsv"


class TestProbing:
    def test_a_sample_has_no_target_alone(self, task_file):
        task = probing.sample_task(task_file, {"train": 49, "dev": 8, "test": 8}, seed=0)
        assert len(task.texts) == 48 + 8 + 8 and set(task.groups) == set(NOUNS)

    def test_a_layer_is_picked_on_dev(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(120) % 2
        splits = ["train"] * 60 + ["dev"] * 30 + ["test"] * 30
        noise = torch.randn(120, 2, generator=generator)
        until_dev, only_test = noise.clone(), noise.clone()
        until_dev[:90, 0] += 6 * labels[:90]
        only_test[:60, 0] += 6 * labels[:60]
        only_test[90:, 0] += 6 * labels[90:]
        found = {
            "content lambda 0": probe(only_test, labels, splits=splits),
            "content lambda 1": probe(until_dev, labels, splits=splits),
        }
        assert found["content lambda 0"].accuracy > found["content lambda 1"].accuracy
        assert probing.picks(found) == {"content lambda": "content lambda 1"}

    def test_command(self, folders, task_file, monkeypatch, capsys):
        monkeypatch.setattr("lambdabert.interpretation.probes.STRENGTHS", (1.0,))
        monkeypatch.setattr("lambdabert.interpretation.probes.PORTIONS", (0.25, 1))
        output = task_file.parent / "found.json"
        arguments = [str(task_file), "--model", str(folders / "lambda"), "--bert", str(folders / "bert")]
        assert probing.main([*arguments, "--output", str(output)]) == 0
        found = json.loads(output.read_text(encoding="utf-8"))["tasks"]["nouns"]
        assert set(found["families"]) == set(probing.FAMILIES)
        for family in ("content lambda", "mean hidden state", "attention", "BERT's mean hidden state"):
            assert len(found["families"][family]["random models"]) == 3 and not found["families"][family]["encoded"]
        assert found["families"]["mean value"]["encoded"] is None
        words = found["rows"]["bag of words"]["equal dimension"]["accuracy"]
        gap = found["differences"]["content lambda - bag of words"]["difference"]
        assert gap == pytest.approx(found["families"]["content lambda"]["accuracy"] - words)
        assert output.with_suffix(".png").exists() and "content lambda" in capsys.readouterr().out
        before = output.read_bytes()
        assert probing.main([*arguments, "--output", str(output)]) == 0 and capsys.readouterr().out == ""
        with pytest.raises(SystemExit, match=r"error: output=.*found.json has the arguments .*name another file"):
            probing.main([*arguments, "--seed", "1", "--output", str(output)])
        assert json.loads(output.read_bytes())["tasks"] == json.loads(before)["tasks"]


class TestMinimalPairs:
    @pytest.mark.parametrize("name", ["lambda", "bert"])
    def test_pseudo_log_likelihood_masks_each_token(self, name, folders):
        model, tokenizer = minimal_pairs.load(str(folders / name))
        sentences = ["the fox sees a dog", "a bird"]
        found = minimal_pairs.pseudo_log_likelihoods(model, tokenizer, sentences, {})
        for sentence, likelihood in zip(sentences, found.tolist()):
            ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
            expected = 0.0
            for place in range(1, ids.shape[1] - 1):
                masked = ids.clone()
                masked[0, place] = tokenizer.mask_token_id
                with torch.no_grad():
                    expected += model(input_ids=masked).logits[0, place].log_softmax(-1)[ids[0, place]].item()
            assert likelihood == pytest.approx(expected, rel=1e-4)

    def test_swapped_lambdas_are_of_another_paradigm(self):
        pairs = [{"paradigm": name} for name in "aabcab"]
        others = minimal_pairs.shifts(pairs)
        assert all(pairs[i]["paradigm"] != pairs[j]["paradigm"] for i, j in enumerate(others))

    def test_a_pair_is_right_where_the_good_sentence_is_likelier_under_the_same_lambdas(self, folders, monkeypatch):
        model, tokenizer = minimal_pairs.load(str(folders / "lambda"))
        pairs = [{"paradigm": str(i % 2), "good": f"the {noun} sees", "bad": noun} for i, noun in enumerate(NOUNS[:3])]
        replaced = []

        def likelihoods(model, tokenizer, sentences, contents):
            replaced.append(contents)
            return torch.tensor([float(sentence.endswith("sees")) for sentence in sentences])

        monkeypatch.setattr(minimal_pairs, "pseudo_log_likelihoods", likelihoods)
        monkeypatch.setattr(minimal_pairs, "PAIRS_AT_ONCE", 2)
        right = minimal_pairs.judge(model, tokenizer, pairs)
        assert {condition: found.tolist() for condition, found in right.items()} == dict.fromkeys(
            ("intact", "mean", "swapped", "zero"), [1, 1, 1]
        )
        assert replaced[0] == {}
        for contents in replaced:
            for content in contents.values():
                good, bad = content.chunk(2)
                torch.testing.assert_close(good, bad, rtol=0, atol=0)
        first, second, *_ = replaced[2][0]  # swapped
        assert not torch.equal(first, second)

    def test_summary_of_known_judgements(self):
        right = {"intact": torch.tensor([1.0, 1, 1, 0, 0]), "zero": torch.tensor([0.0, 1, 0, 0, 1])}
        found = minimal_pairs.summarise(right, torch.tensor([True, True, True, True, False]), None)
        assert found["pairs"] == 4 and (found["intact"]["accuracy"], found["zero"]["accuracy"]) == (0.75, 0.25)
        low, high = found["zero"]["its interval"]
        assert found["zero"]["intact - it"] == 0.5 and 0 <= low <= 0.5 <= high <= 1

    @pytest.mark.parametrize(
        "name, conditions", [("lambda", {"intact", "mean", "swapped", "zero"}), ("bert", {"intact"})]
    )
    def test_command(self, name, conditions, folders, tmp_path):
        rows = [("term", "paradigm", "good", "bad")]
        for i in range(4):
            rows += [(f"t{i % 2}", f"p{i}", f"the {noun} sees", f"the sees {noun}") for noun in NOUNS]
        (tmp_path / "pairs.tsv").write_text("\n".join("\t".join(row) for row in rows), encoding="utf-8")
        arguments = [str(tmp_path / "pairs.tsv"), "--model", str(folders / name), "--per_paradigm", "3"]
        assert minimal_pairs.main([*arguments, "--output", str(tmp_path / "a.json")]) == 0
        record = json.loads((tmp_path / "a.json").read_text())
        found, right = record["phenomena"], record["right"]
        assert {name: one["pairs"] for name, one in found.items()} == {"all": 12, "t0": 6, "t1": 6}
        assert found["all"].keys() == {"pairs"} | conditions
        assert right.keys() == conditions
        for condition, paradigms in right.items():
            assert [len(digits) for digits in paradigms.values()] == [3] * 4
            assert found["all"][condition]["accuracy"] == pytest.approx("".join(paradigms.values()).count("1") / 12)
        model, tokenizer = minimal_pairs.load(str(folders / name))
        expected = dict.fromkeys((f"p{i}" for i in range(4)), "")
        for pair in minimal_pairs.draw_pairs(tmp_path / "pairs.tsv", 3, 0):
            good, bad = (
                minimal_pairs.pseudo_log_likelihoods(model, tokenizer, [pair[which]], {}) for which in ("good", "bad")
            )
            expected[pair["paradigm"]] += str(int(good > bad))
        assert right["intact"] == expected and {"0", "1"} == set("".join(expected.values()))
        with pytest.raises(SystemExit, match="per_paradigm=5: p0 has 4 pairs; lower it"):
            minimal_pairs.main([*arguments[:-1], "5", "--output", str(tmp_path / "b.json")])
        with (tmp_path / "pairs.tsv").open("a", encoding="utf-8") as file:
            file.write("\nt0\tp0\t\tthe sees fox")
        with pytest.raises(SystemExit, match="has a pair without a good or without a bad sentence"):
            minimal_pairs.main([*arguments, "--output", str(tmp_path / "b.json")])


def test_the_lambda_of_another_stretch_is_of_the_same_article(folders, tmp_path, monkeypatch):
    """Stretches of an article that are one text under one mask have one content lambda."""
    articles = [f"{word} " * 10 * interpretation.TOKENS for word in ("the", "sees", "boat")]
    file = write_parquet(tmp_path / "articles.parquet", text=articles)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda shape, generator: rand(shape[-1], generator=generator).expand(shape))
    args = argparse.Namespace(model=str(folders / "lambda"), texts=file, articles=3, seed=0)
    loss = interpretation.measure_topics(args)["loss of masked tokens, nats"]
    for where in ("layer 0", "layer 1", "all layers"):
        assert loss[f"same article, {where}"]["rise"] == pytest.approx(0, abs=1e-6)
        assert abs(loss[f"another article, {where}"]["rise"]) > 1e-4


class TestChannels:
    def test_part_of_the_embeddings_within_offsets(self):
        positions = channels.Positions()
        positions.embeddings, positions.maps, positions.tokens = torch.ones(7, 3, 1), torch.zeros(2, 7), 1
        found = positions.summary()["part of E's square within offsets"]
        assert found == pytest.approx({"0": 1 / 7, "1": 3 / 7, "2": 5 / 7, "4": 1, "8": 1})
        positions.embeddings = torch.zeros(7, 3, 1)
        positions.embeddings[3] = 2
        assert positions.summary()["part of E's square within offsets"] == dict.fromkeys(found, 1)

    def test_a_channel_is_spread_over_the_tokens_that_it_weighs(self):
        keys = torch.tensor([[0.25, 0, 0.5], [0.25, 1, 0.5], [0.25, 0, 0], [0.25, 0, 0], [0, 0, 0]])
        mask, ids = torch.tensor([[True] * 4 + [False]]), torch.arange(5)[None]
        found = channels.Channels(["a", "b"], 5, 3)
        found.add(SimpleNamespace(keys=keys[None, :, :, None]), mask, ids, [["a", "a", "b", "b", "b"]])
        torch.testing.assert_close(torch.cat(found.spread), torch.tensor([[1, 0.25, 0.5]]))
        torch.testing.assert_close(found.by_kind / found.of_kind[:, None], torch.tensor([[1.0, 2, 2], [1, 0, 0]]))

    def test_command(self, folders, tmp_path):
        words = [("the", "DET"), ("fox", "NOUN"), ("sees", "VERB"), ("a", "DET"), ("dog", "NOUN")]
        lines = ["\t".join([str(i + 1), word, word, kind, *"_" * 6]) for i, (word, kind) in enumerate(words)]
        (tmp_path / "some.conllu").write_text("\n".join(["# text = x", *lines, "", ""]) * 12, encoding="utf-8")
        arguments = [str(tmp_path / "some.conllu"), "--model", str(folders / "lambda")]
        assert channels.main([*arguments, "--output", str(tmp_path / "a.json")]) == 0
        found = json.loads((tmp_path / "a.json").read_text())
        assert found["sentences"] == 12 and found["tokens"]["DET"] == 24 and found["tokens"]["[CLS]"] == 12
        for layer in found["layers"]:
            weights = torch.tensor([layer["weight by kind"][kind] for kind in found["tokens"]])
            counts = torch.tensor(list(found["tokens"].values())).float()
            # a channel is a distribution: its mean weight is that of a uniform one
            torch.testing.assert_close((weights * counts[:, None]).sum(0) / counts.sum(), torch.ones(3))
        assert (tmp_path / "a_keys.png").exists() and (tmp_path / "a_positions.png").exists()

    def test_repetition_lambdas_are_not_taken_for_positions(self, folders, tmp_path):
        shutil.copytree(folders / "lambda", tmp_path / "model")
        fields = {"repetition_context_size": 3, "mask_token_id": 4}
        modeling_lambdabert.LambdaBertForMaskedLM.from_pretrained(tmp_path / "model", **fields).save_pretrained(
            tmp_path / "model"
        )
        lines = ["\t".join([str(i), "fox", "fox", "NOUN", *"_" * 6]) for i in range(1, 6)]
        (tmp_path / "some.conllu").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
        arguments = [str(tmp_path / "some.conllu"), "--model", str(tmp_path / "model")]
        with pytest.raises(SystemExit, match="repetition lambdas would count as position; name one without"):
            channels.main([*arguments, "--output", str(tmp_path / "a.json")])
