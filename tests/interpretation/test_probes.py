"""Probes on labels that features hold, do not hold, or cannot hold; features against the traces."""

import builtins
import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lambdabert.interpretation import difference, feature_rows, is_encoded, probe, probes, trace_lambdas
from lambdabert.interpretation.features import _random_keys
from lambdabert.interpretation.intervals import bootstrap_interval
from lambdabert.interpretation.tasks import summary


@pytest.fixture
def separable():
    """Features whose first column is the label, and noise."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    features = generator.normal(size=(200, 6))
    features[:, 0] += 4 * labels
    return features, np.array(["no", "yes"])[labels]


class TestProbe:
    def test_reads_what_is_there(self, separable):
        features, labels = separable
        found = probe(features, labels)
        low, high = found.interval
        assert found.accuracy > 0.9 and low <= found.accuracy <= high and len(found.accuracies) == 3
        assert math.isclose(found.uniform_codelength, 120) and found.codelength < 60
        assert found.majority < 0.7 and found.dimension == 6
        assert found.control_accuracy is None and found.selectivity is None

    def test_reads_nothing_from_noise(self, separable):
        features, labels = separable
        found = probe(features[:, 1:], labels)
        assert abs(found.accuracy - 0.5) < 0.12
        assert found.codelength > 0.9 * found.uniform_codelength

    def test_the_order_of_examples_does_not_matter_to_the_codelength(self, separable):
        features, labels = separable
        order = labels.argsort()
        assert probe(features[order], labels[order]).codelength < 60

    def test_each_draw_is_standardised_by_its_own_train(self, separable, monkeypatch):
        seen, prepare = [], probes._prepare

        def watched(table, train, *rest):
            seen.append(frozenset(np.arange(200)[train]))
            return prepare(table, train, *rest)

        monkeypatch.setattr(probes, "_prepare", watched)
        probe(*separable)
        assert len(set(seen)) == 3

    def test_control_labels_are_as_frequent_as_those_of_the_task(self):
        labels = (np.arange(1000) % 10 == 0).astype(int)
        assert probe(np.zeros((1000, 1)), labels, groups=np.arange(1000) // 5).control_accuracy > 0.8

    def test_the_control_task_is_tested_on_other_examples(self, monkeypatch):
        monkeypatch.setattr(probes, "STRENGTHS", (1.0,))
        found = probe(np.eye(400), np.arange(400) % 2, groups=np.arange(400) // 4)  # can be learnt by heart alone
        assert found.control_accuracy < 0.7

    def test_intervals_draw_groups(self):
        generator = np.random.default_rng(0)
        groups = np.repeat(np.arange(40), 5)
        labels = np.repeat(generator.integers(0, 2, 40), 5)
        found = probe(np.eye(40)[groups], labels, groups=groups)
        expected = bootstrap_interval(found.correct, found.clusters)
        assert found.interval == expected != bootstrap_interval(found.correct)
        nothing = dataclasses.replace(found, correct=torch.zeros_like(found.correct))
        assert difference(found, nothing)[1] == expected

    def test_an_empty_feature_gives_the_majority(self):
        labels = np.array([0, 1, 1] * 50)
        found = probe(np.zeros((150, 1)), labels)
        assert found.accuracy == found.majority > 0.5

    def test_chosen_splits(self, separable):
        features, labels = separable
        splits = np.array(["train"] * 120 + ["dev"] * 30 + ["test"] * 50)
        features[splits == "test", 0] *= -1  # only a probe that sees no test example is wrong there
        found = probe(features, labels, splits=splits)
        assert found.correct.numel() == 3 * 50 and found.clusters.unique().tolist() == list(range(150, 200))
        assert found.accuracy < 0.6

    def test_strength_is_chosen_on_dev(self):
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 2, 90)
        features = generator.normal(size=(90, 300))  # train can be learnt by heart
        features[:, 0] += 1.5 * labels
        splits = np.array(["train"] * 30 + ["dev"] * 30 + ["test"] * 30)
        chosen = probe(features, labels, splits=splits).strength
        flipped = np.where(splits == "dev", 1 - labels, labels)
        assert probe(features, flipped, splits=splits).strength != chosen

    def test_each_drawn_split_chooses_its_own_strength(self, separable, monkeypatch):
        """That of another may have been chosen on its test examples."""
        noise, labels = separable[0][:, 1:], separable[1]
        strengths = (1e-4, 1.0, 1e-2)
        left = iter(strengths)
        monkeypatch.setattr(probes, "_best_strength", lambda *_: (next(left), 0.0))
        found = probe(noise, labels)
        expected = []
        for seed, strength in enumerate(strengths):
            train, _, test = probes._parts(np.arange(200), None, np.unique(labels, return_inverse=True)[1], seed)
            plain = make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=10000))
            expected.append(plain.fit(noise[train], labels[train]).predict(noise[test]) == labels[test])
        assert found.correct.tolist() == np.concatenate(expected).tolist() and found.strength == 1e-4

    def test_the_same_words_in_all_texts_tell_nothing(self):
        labels = np.arange(60) % 2
        counts = np.tile([1, 0, 2, 1], (60, 1))
        for dimension in (None, 2):
            found = probe(counts, labels, splits=np.repeat(["train", "dev", "test"], 20), dimension=dimension)
            assert found.accuracy == 0.5 and found.dimension == 1

    def test_groups_stay_together(self):
        generator = np.random.default_rng(0)
        groups = np.repeat(np.arange(40), 5)
        labels = np.repeat(generator.integers(0, 2, 40), 5)
        names = np.eye(40)[groups]  # tells the group and nothing else
        found = probe(names, labels, groups=groups)
        assert abs(found.accuracy - 0.5) < 0.25  # members in train would give all away
        assert found.control_accuracy > 0.95 and found.selectivity < -0.4

    @pytest.mark.parametrize("vocabulary", [2000, 30])
    @pytest.mark.parametrize("dimension", [None, 5])
    def test_counts_of_words_keep_their_proportions(self, monkeypatch, dimension, vocabulary):
        """Also where a small vocabulary leaves few zeros."""
        monkeypatch.setattr("lambdabert.interpretation.probes.KEPT", 1)
        monkeypatch.setattr("lambdabert.interpretation.probes.STRENGTHS", (0.1,))
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 2, 200)
        counts = np.zeros((200, vocabulary), dtype=int)
        counts[np.arange(200)[:, None], generator.integers(2, vocabulary, (200, 12))] = 1  # words that tell nothing
        counts[np.arange(200), labels] = generator.integers(0, 3, 200)  # two that tell all, where there are any
        splits = np.repeat(["train", "dev", "test"], [100, 40, 60])
        scaled = counts / np.sqrt(counts[:100].var(axis=0)[counts[:100].any(axis=0)].mean())
        components = [PCA(dimension, svd_solver="full")] if dimension else []
        plain = make_pipeline(*components, LogisticRegression(C=0.1, tol=1e-8, max_iter=10000))
        plain.fit(scaled[:100], labels[:100])
        found = probe(counts, labels, splits=splits, dimension=dimension)
        assert torch.equal(
            found.correct, torch.from_numpy(plain.predict(scaled[140:]) == labels[140:]).double().repeat(3)
        )
        assert found.accuracy > 0.75 and found.dimension == (dimension or vocabulary)

    def test_no_more_dimensions_than_examples(self):
        table = np.random.default_rng(0).normal(size=(40, 300))
        found = probe(table, np.arange(40) % 2, splits=np.repeat(["train", "dev", "test"], [20, 10, 10]), dimension=256)
        assert found.dimension == 19, "of 20 examples about their mean"

    @pytest.mark.parametrize("features", [300, 20])
    def test_is_a_plain_regression_on_standardised_features(self, monkeypatch, features):
        monkeypatch.setattr("lambdabert.interpretation.probes.KEPT", 1)  # every seed has all of train
        monkeypatch.setattr("lambdabert.interpretation.probes.STRENGTHS", (0.003,))
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 3, 160)
        table = generator.normal(size=(160, features)) * np.linspace(0.1, 3, features)
        table[:, :3] += np.eye(3)[labels]
        splits = np.repeat(["train", "dev", "test"], [80, 30, 50])
        plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, tol=1e-8, max_iter=10000))
        plain.fit(table[:80], labels[:80])
        found = probe(table, labels, splits=splits)
        expected = torch.from_numpy(plain.predict(table[110:]) == labels[110:]).double()
        assert torch.equal(found.correct, expected.repeat(3)) and 0.4 < found.accuracy < 1
        of_dev = plain.predict_proba(table[80:110])[np.arange(30), labels[80:110]]
        assert found.dev_bits == pytest.approx(-np.log2(0.999 * of_dev + 0.001 / 3).sum(), rel=1e-3)

    def test_fewer_dimensions_are_principal_components(self, monkeypatch):
        monkeypatch.setattr("lambdabert.interpretation.probes.KEPT", 1)
        monkeypatch.setattr("lambdabert.interpretation.probes.STRENGTHS", (0.003,))
        generator = np.random.default_rng(0)
        labels = generator.integers(0, 2, 160)
        table = generator.normal(size=(160, 6)) @ generator.normal(size=(6, 120)) + labels[:, None] * 0.3
        table += generator.normal(size=(160, 120))
        splits = np.repeat(["train", "dev", "test"], [80, 30, 50])
        plain = make_pipeline(StandardScaler(), PCA(5, svd_solver="full"), LogisticRegression(C=0.003, tol=1e-8))
        expected = plain.fit(table[:80], labels[:80]).predict(table[110:]) == labels[110:]
        found = probe(table, labels, splits=splits, dimension=5)
        assert torch.equal(found.correct, torch.from_numpy(expected).double().repeat(3)) and found.dimension == 5

    def test_codelength_without_a_feature_is_that_of_the_labels_seen_before(self):
        labels = (np.arange(300) % 5 == 0).astype(int)
        splits = np.repeat(["train", "dev", "test"], [200, 50, 50])
        found = probe(np.zeros((300, 1)), labels, splits=splits)
        order = labels[np.random.default_rng(0).permutation(200)[:180]]  # of the first seed
        ends = sorted({math.ceil(portion * 180) for portion in probes.PORTIONS})
        bits = float(ends[0])
        for known, end in zip(ends, ends[1:]):
            part = order[:known].mean()
            uniform = part in (0, 1)
            rare = 0.5 if uniform else 0.999 * part + 0.0005
            ones = order[known:end].sum()
            bits -= ones * math.log2(rare) + (end - known - ones) * math.log2(1 - rare)
        assert found.codelength == pytest.approx(bits, rel=1e-3) and found.uniform_codelength == 180

    def test_fewer_dimensions(self, separable):
        features, labels = separable
        found = probe(features, labels, dimension=2)
        assert found.dimension == 2 and probe(features, labels, dimension=20).dimension == 6

    def test_differences(self, separable):
        features, labels = separable
        full, noise, none = (probe(f, labels) for f in (features, features[:, 1:], np.zeros((200, 1))))
        mean, (low, high) = difference(full, noise)
        assert math.isclose(mean, full.accuracy - noise.accuracy, abs_tol=1e-9) and 0.2 < low <= mean <= high
        assert is_encoded(full, noise, [none, none]) and not is_encoded(full, full, [none])
        assert not is_encoded(noise, none, [full])

    def test_intervals_of_a_few_groups_show_nothing(self, separable):
        features, labels = separable
        words = np.arange(200) % 25
        splits = np.where(np.arange(200) < 100, "train", np.where(np.arange(200) < 120, "dev", "test"))

        def encoded(groups):
            full, noise, none = (
                probe(f, labels, groups, splits) for f in (features, features[:, 1:], np.zeros((200, 1)))
            )
            assert difference(full, noise)[1][0] > 0
            return full.test_groups, is_encoded(full, noise, [none])

        assert encoded(words) == (25, True) and encoded(words % 3) == (3, False)


def test_word_order_is_beyond_the_first_content_lambda(make_model):
    model = make_model(position_embedding_type="none", hidden_size=40, num_lambda_queries=2, lambda_norm="none")
    generator = torch.Generator().manual_seed(1)
    low, high = (torch.randint(start, start + 2, (120, 3), generator=generator) for start in (5, 30))
    is_reversed = torch.arange(240) % 2
    rising = torch.cat([low, high], 1)
    ids = torch.stack([rising, rising.flip(1)], 1).flatten(0, 1)
    batches = [{"input_ids": some} for some in ids.split(60)]
    rows = feature_rows(model, batches)
    pairs = torch.arange(240) // 2
    for name in ("content lambda 0", "bag of words", "mean value 0", "random-key content lambda 0", "length"):
        assert probe(rows[name], is_reversed, groups=pairs).accuracy == pytest.approx(0.5, abs=0.03), name
    assert probe(rows["content lambda 1"], is_reversed, groups=pairs).accuracy > 0.6


class TestFeatures:
    def test_padding_is_in_no_row(self, make_model, holey):
        model = make_model(position_embedding_type="none").float()
        inputs = holey(model)
        together = feature_rows(model, [inputs])
        for row, length in ((0, 9), (2, 6)):  # the one between has a hole, which keeps its width
            one = {name: value[row : row + 1, :length] for name, value in inputs.items()}
            for name, features in feature_rows(model, [one]).items():
                torch.testing.assert_close(together[name][row : row + 1], features, rtol=1e-4, atol=1e-5, msg=name)

    def test_rows_are_those_of_the_traces(self, make_model, holey):
        model = make_model().float()
        inputs = holey(model)
        rows = feature_rows(model, [inputs, inputs])
        trace = trace_lambdas(model, inputs)
        assert all(len(features) == 6 and features.isfinite().all() for features in rows.values())
        assert rows["length"][:3, 0].tolist() == [9, 7, 6]
        contents = [layer.content.flatten(1) for layer in trace.layers]
        torch.testing.assert_close(rows["content lambda, all layers"][3:], torch.cat(contents, 1))
        for i, layer in enumerate(trace.layers):
            torch.testing.assert_close(rows[f"content lambda {i}"][:3], contents[i])
            kept = trace.token_mask[1]
            torch.testing.assert_close(rows[f"mean value {i}"][1], layer.values[1, kept].mean(0).flatten())
            hidden = trace.outputs.hidden_states[i + 1][1, kept].mean(0)
            torch.testing.assert_close(rows[f"mean hidden state {i}"][1], hidden)
            assert not torch.allclose(rows[f"random-key content lambda {i}"][:3], contents[i])
        ids = inputs["input_ids"][1, kept].tolist()
        assert rows["bag of words"][1].nonzero()[:, 0].tolist() == sorted(set(ids))
        assert rows["bag of words"][1].sum() == 7

    @pytest.mark.parametrize("positions", ["absolute", "none"])
    def test_mean_embedding_knows_no_positions(self, make_model, holey, positions):
        model = make_model(position_embedding_type=positions).float()
        inputs = holey(model)
        found = feature_rows(model, [inputs])["mean embedding"]
        with torch.no_grad():
            if positions == "absolute":
                model.base_model.embeddings.position_embeddings.weight.zero_()
            embedded = model.base_model.embeddings(inputs["input_ids"], inputs.get("token_type_ids"))
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(found, torch.stack([row[kept].mean(0) for row, kept in zip(embedded, mask)]))

    @pytest.mark.parametrize("gain, has_repetition", [(False, False), (True, False), (True, True)])
    def test_random_models_differ(self, make_model, holey, repetition, gain, has_repetition):
        model = make_model(content_gain=gain, **(repetition if has_repetition else {}))
        state = torch.get_rng_state()
        rows = feature_rows(model, [holey(model)])
        assert torch.equal(torch.get_rng_state(), state)
        names = [f"random model {number}, content lambda, all layers" for number in range(3)]
        assert len({rows[name].sum().item() for name in names}) == 3

    def test_random_models_have_the_config_and_content_lambdas_without_the_gain(self, make_model, holey):
        model = make_model(content_gain=True)
        inputs = holey(model)
        rows = feature_rows(model, [inputs])
        mask, traces = inputs["attention_mask"].bool(), {}
        for gain in (True, False):
            config = model.config.__class__(**{**model.config.to_dict(), "content_gain": gain})
            torch.manual_seed(1)
            traces[gain] = trace_lambdas(type(model.base_model)(config).double().eval(), inputs)
        for i in range(2):
            states = traces[True].outputs.hidden_states[i + 1]
            expected = torch.stack([row[kept].mean(0) for row, kept in zip(states, mask)]).float()
            torch.testing.assert_close(rows[f"random model 1, mean hidden state {i}"], expected)
            expected = traces[False].layers[i].content.flatten(1).float()
            torch.testing.assert_close(rows[f"random model 1, content lambda {i}"], expected)
            assert expected.any() and not traces[True].layers[i].content.any()

    def test_random_keys_are_as_large_as_the_learned_ones(self, make_model):
        model = make_model(hidden_size=96, key_depth=16)
        layers = [block.attention.self for block in model.bert.encoder.layer]
        with torch.no_grad():
            layers[1].to_keys.weight.mul_(3)
        found, again, other = (_random_keys(layers, seed) for seed in (0, 0, 1))
        for layer, keys in zip(layers, found, strict=True):
            assert keys.std().item() == pytest.approx(layer.to_keys.weight.std().item(), rel=0.05)
            assert keys.shape == layer.to_keys.weight.shape
        assert torch.corrcoef(torch.stack([keys.flatten() for keys in found]))[0, 1].abs() < 0.2
        assert all(map(torch.equal, found, again)) and not any(map(torch.equal, found, other))

    def test_random_keys_are_read_under_the_gain(self, make_model, holey):
        model = make_model(content_gain=True)
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.self.content_gain.copy_(torch.tensor([2.0, 0.0, 1.0]))
        contents = feature_rows(model, [holey(model)])["random-key content lambda 0"].unflatten(1, (3, -1))
        assert [bool(row.any()) for row in contents.unbind(1)] == [True, False, True]

    def test_no_text(self, make_model):
        with pytest.raises(ValueError, match=r"batches=\[\]"):
            feature_rows(make_model(), [])


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"labels": ["a"] * 200}, r"labels=\['a'\]: there is one class"),
            ({"labels": [0, 1]}, "labels has 2 entries for 200 examples"),
            ({"groups": [*range(199), 0]}, "groups=1 has a single member, and so do 197 others.*in common"),
            ({"groups": ["x"] * 200}, "groups='x' is the only group"),
            ({"groups": [0, 1] * 100}, "groups: 2 are too few"),
            ({"splits": ["train"] * 199 + ["valid"]}, "splits='valid' is unknown; give one of train, dev, test"),
            ({"splits": ["train"] * 199 + ["test"]}, "splits: no example is in 'dev'"),
            ({"dimension": 0}, "dimension=0"),
            ({"features": np.full((200, 2), np.nan)}, "features has shape .*not finite"),
            ({"labels": [0.0, 1.0, float("nan"), 1.0] * 50}, "labels holds NaN"),
            ({"labels": ["a", float("nan")] * 100}, "labels has entries of types float, str; give classes of one type"),
            ({"labels": [number / 7 for number in range(200)]}, "labels: no two of the 200 examples have the same"),
        ],
    )
    def test_data(self, separable, arguments, message):
        features, labels = separable
        with pytest.raises(ValueError, match=message):
            probe(**({"features": features, "labels": labels} | arguments))

    def test_features_of_a_model_in_bfloat16_that_is_trained(self, separable):
        features, labels = separable
        rounded = torch.as_tensor(features).bfloat16().requires_grad_()
        assert probe(rounded, labels).accuracies == probe(rounded.detach().float().numpy(), labels).accuracies

    def test_scikit_learn_is_missing(self, separable, monkeypatch):
        def absent(name, *rest, **keywords):
            if name.startswith("sklearn"):
                raise ImportError(name)
            return plain(name, *rest, **keywords)

        plain = builtins.__import__
        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ValueError, match="^scikit-learn is not installed.*pip install scikit-learn$"):
            probe(*separable)

    def test_other_examples(self, separable):
        features, labels = separable
        first = probe(features, labels)
        with pytest.raises(ValueError, match="different examples"):
            difference(first, probe(features[:150], labels[:150]))


def test_encoded_is_above_every_comparison_by_more_than_its_interval(separable):
    features, labels = separable
    full, none = probe(features, labels), probe(np.zeros((200, 1)), labels)
    nearly = dataclasses.replace(full, correct=full.correct.clone())
    nearly.correct[full.correct.nonzero()[0]] = 0
    assert difference(full, nearly)[0] > 0 and not is_encoded(full, nearly, [])
    assert is_encoded(full, none, [none]) and not is_encoded(full, none, [none, full])
    rows = {"bag of words": none, "row": full, "random model 0, row": none}
    assert summary("row", rows)["encoded"] is True
    assert summary("row", rows | {"random model 1, row": full})["encoded"] is False
