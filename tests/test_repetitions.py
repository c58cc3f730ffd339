"""Models with a repetition lambda: what it tells of a text, layouts, and which tokens count as the same."""

import pytest
import torch

import modeling_lambdabert
from lambda_layer import LambdaLayer
from modeling_lambdabert import LambdaBertModel
from packing_lambdabert import Packing, Padded
from repetitions_lambdabert import Repetitions

MASK = 4


@pytest.fixture
def make_model(make_config):
    """Builds a float64 model whose every weight is random; its 2 position lambdas see 4 tokens to each side."""

    def build(name="LambdaBertModel", **fields):
        torch.manual_seed(0)
        config = make_config(repetition_context_size=3, mask_token_id=MASK, **{"content_gain": True} | fields)
        model = getattr(modeling_lambdabert, name)(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for module in model.modules():
                if getattr(module, "content_gain", None) is not None:
                    module.content_gain.zero_()  # nothing else is seen from afar
        return model

    return build


def repetitive_ids(batch=4, length=17, kinds=6):
    ids = 5 + torch.randint(0, kinds, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, ::5] = MASK
    return ids


def hidden(model, ids, mask=None, **keywords):
    return model(ids, mask, **keywords).last_hidden_state


class TestRepetitions:
    def test_half_precision_is_summed_in_float32(self):
        given = torch.tensor([[[256.0], [1.0]]], dtype=torch.bfloat16)  # which has no 257
        assert torch.equal(Repetitions(torch.tensor([[7, 7]]), None).mean_of_others(given), given.flip(1))

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 9, 40])
    def test_mean_of_others_is_that_of_a_loop(self, length, masked):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(-2, 6, (3, length), generator=generator)
        mask = torch.rand(3, length, generator=generator) < 0.7 if masked else None
        given = torch.randn(3, length, 2, 4, dtype=torch.float64, generator=generator)
        expected = torch.zeros_like(given)
        for b in range(3):
            for n in range(length):
                others = [m for m in range(length) if m != n and ids[b, m] == ids[b, n] >= 0]
                others = [m for m in others if mask is None or mask[b, m]]
                if others:
                    expected[b, n] = sum(given[b, m] for m in others) / len(others)
        found = Repetitions(ids, mask).mean_of_others(given)
        real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(found[real], expected[real], rtol=1e-12, atol=1e-12)

    def test_rows_are_apart(self):
        given = torch.randn(2, 3, 1)
        ids = torch.tensor([[7, 8, 9], [7, 7, 9]])
        expected = torch.zeros(2, 3, 1)
        expected[1, :2] = given[1, :2].flip(0)
        torch.testing.assert_close(Repetitions(ids, None).mean_of_others(given), expected)


class TestWhatItTells:
    def test_a_text_far_away_reaches_the_tokens_that_occur_there(self, make_model):
        """Around place 2, a word stands that occurs again at place 30; its neighbour there is changed."""
        model = make_model()
        ids = torch.arange(10, 44)[None]
        ids[0, 30] = ids[0, 2]
        changed = ids.clone()
        changed[0, 31] = 50
        same = torch.isclose(hidden(model, ids), hidden(model, changed), rtol=0, atol=1e-12).all(-1)[0]
        assert not same[2]
        assert same[8:26].all(), "no word there occurs twice, and all is out of reach of what was changed"

    def test_where_no_token_occurs_twice_it_is_a_model_without(self, make_model, make_config):
        model = make_model()
        plain = LambdaBertModel(make_config(content_gain=True)).double().eval()
        weights = {name: w for name, w in model.state_dict().items() if not name.endswith("repetition_embeddings")}
        plain.load_state_dict(weights)
        ids = torch.arange(5, 35)[None]
        torch.testing.assert_close(hidden(model, ids), hidden(plain, ids), rtol=0, atol=1e-12)
        ids[0, 20] = 7
        assert (hidden(model, ids) - hidden(plain, ids)).abs().max() > 1e-3

    def test_hidden_tokens_are_not_the_same(self, make_model):
        model = make_model()
        ids = torch.arange(6, 36)[None]
        ids[0, [3, 25]] = MASK
        changed = ids.clone()
        changed[0, 26] = 50
        before, after = hidden(model, ids), hidden(model, changed)
        torch.testing.assert_close(after[0, 3], before[0, 3], rtol=0, atol=1e-12)
        model.config.mask_token_id = None
        before, after = hidden(model, ids), hidden(model, changed)
        assert (after[0, 3] - before[0, 3]).abs().max() > 1e-3


class TestLayouts:
    @pytest.mark.parametrize("scope", [5, None])
    @pytest.mark.parametrize("kind", ["tail", "left", "holes"])
    def test_padding_has_no_effect(self, make_model, kind, scope):
        """Packed, padded, alone in its batch, and with any token at padding: the same to rounding."""
        model, ids = make_model(local_context_size=scope, position_embedding_type="none"), repetitive_ids()
        mask = torch.ones_like(ids)
        if kind == "tail":
            mask[1, 9:] = mask[2, 4:] = 0
        elif kind == "left":
            mask[1, :9] = mask[2, :4] = 0
        else:
            mask[1, 3:9] = mask[2, 1::2] = 0
        packed = hidden(model, ids, mask)
        other = ids.where(mask.bool(), 7)
        for found in (hidden(model, ids, mask, output_hidden_states=True), hidden(model, other, mask)):
            real = mask.bool()
            torch.testing.assert_close(found[real], packed[real], rtol=0, atol=1e-12)
        for row in range(4):
            alone = hidden(model, ids[row : row + 1], mask[row : row + 1])
            torch.testing.assert_close(alone[0], packed[row], rtol=0, atol=1e-12)
        if kind != "holes":
            real = mask[1].bool()
            cut = hidden(model, ids[1:2, real])
            torch.testing.assert_close(cut[0], packed[1, real], rtol=0, atol=1e-12)

    def test_graphs(self, make_model):
        model, ids = make_model(), repetitive_ids()
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        expected = hidden(model, ids, mask)[mask.bool()]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(hidden(compiled, ids, mask)[mask.bool()], expected, rtol=0, atol=1e-12)
        exported = torch.export.export(model, (ids, mask)).module()
        torch.testing.assert_close(hidden(exported, ids, mask)[mask.bool()], expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("scope", [5, None])
    def test_meta_device(self, make_config, scope):
        with torch.device("meta"):
            model = LambdaBertModel(make_config(local_context_size=scope, repetition_context_size=3))
            ids = torch.zeros(2, 7, dtype=torch.long)
            output = hidden(model, ids, torch.ones_like(ids))
        assert output.is_meta and output.shape == (2, 7, 20)

    def test_checkpointed_activations(self, make_model):
        model, ids = make_model("LambdaBertForMaskedLM").train(), repetitive_ids()

        def gradients():
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        expected = gradients()
        assert expected["bert.encoder.layer.0.attention.self.repetition_embeddings"].any()
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(gradients(), expected, rtol=0, atol=1e-12)

    def test_choices_are_rows_of_their_own(self, make_model):
        model = make_model("LambdaBertForMultipleChoice")
        ids = repetitive_ids(6, 17)
        together = model(ids.view(3, 2, 17)).logits
        apart = torch.cat([model(ids[i : i + 1][None]).logits for i in range(6)]).view(3, 2)
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


class TestLayer:
    """The layer without a model around it."""

    @pytest.mark.parametrize("scope", [5, None])
    @pytest.mark.parametrize("lambda_norm", ["batch", "layer"])
    def test_the_mask_is_that_of_the_layout(self, make_config, lambda_norm, scope):
        """In the statistics of a batch norm too."""
        fields = dict(repetition_context_size=3, lambda_norm=lambda_norm, local_context_size=scope)
        layer = LambdaLayer(make_config(**fields)).double().train()
        torch.nn.init.normal_(layer.repetition_embeddings)
        ids, mask = repetitive_ids(), torch.ones(4, 17, dtype=torch.bool)
        mask[1, 9:] = mask[2, :4] = False
        torch.manual_seed(0)
        states = torch.randn(4, 17, layer.to_keys.in_features, dtype=torch.float64)
        packing = Packing(mask, ids)
        packed = packing.unpack(layer(packing.pack(states), layout=packing)[0])
        for given in (None, mask):
            padded = layer(states, given, Padded(mask, ids))[0]
            torch.testing.assert_close(padded[mask], packed[mask], rtol=0, atol=1e-12)

    def test_a_layout_of_other_tokens(self, make_config):
        """Rows as given, of which a packing would read the first as all."""
        layer, ids = LambdaLayer(make_config(repetition_context_size=3)), repetitive_ids()
        mask = torch.ones(4, 17, dtype=torch.bool)
        mask[1, 9:] = False
        states = torch.randn(4, 17, layer.to_keys.in_features)
        for packing in (Packing(mask, ids), Padded(mask[:1], ids[:1])):
            with pytest.raises(ValueError, match=r"hidden_states is \[4, 17, 20\], but layout is of \[1, "):
                layer(states, layout=packing)

    def test_a_mask_that_the_layout_lacks(self, make_config):
        layer, ids = LambdaLayer(make_config(repetition_context_size=3)), repetitive_ids()
        states = torch.randn(4, 17, layer.to_keys.in_features)
        with pytest.raises(ValueError, match="attention_mask: layout has none"):
            layer(states, torch.ones_like(ids), Padded(None, ids))

    def test_a_mask_beside_its_layout(self, make_config):
        layer, ids = LambdaLayer(make_config(repetition_context_size=3)).double(), repetitive_ids()
        mask = torch.ones(4, 17, dtype=torch.bool)
        mask[1, 9:] = False
        packing = Packing(mask, ids)
        states = packing.pack(torch.randn(4, 17, layer.to_keys.in_features, dtype=torch.float64))
        torch.testing.assert_close(layer(states, mask, packing), layer(states, None, packing), rtol=0, atol=0)


def test_embeddings_do_not_tell_which_tokens_are_the_same(make_model):
    model = make_model()
    with pytest.raises(
        ValueError, match="repetition_context_size=3 needs .* inputs_embeds do not tell: give input_ids"
    ):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["LambdaBertForMaskedLM", "LambdaBertForPreTrainingNSP", "LambdaBertForPreTrainingSOP"]
)
def test_models_of_masked_words_must_know_the_mask(make_config, name):
    with pytest.raises(ValueError, match="repetition_context_size=3 with mask_token_id=None"):
        getattr(modeling_lambdabert, name)(make_config(repetition_context_size=3))
