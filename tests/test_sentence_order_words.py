"""The linear baseline of sentence order prediction."""

import json
import shutil

import pytest
import torch

from benchmarks import sentence_order_words


def test_swapped_segments_have_the_opposite_score():
    weights = torch.nn.EmbeddingBag(20, 1, mode="sum")
    pairs = {
        "input_ids": [[1, 2, 3, 4, 4], [4, 4, 1, 2, 3], [5, 5]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 1]],
    }
    a, b, c, d = weights.weight[1:5, 0]
    torch.testing.assert_close(
        sentence_order_words.scores(weights, pairs), torch.stack([a + b + c - 2 * d, 2 * d - a - b - c, a - a])
    )


def test_finds_an_order_that_words_tell(text, tmp_path):
    places = ["near the sea", "in the garden", "at night", "behind the house", "on sunday", "for a friend"]
    sellers = ["he", "a sailor", "the old king", "my neighbour"]
    file, output = tmp_path / "text.txt", tmp_path / "words.json"
    file.write_text(
        "".join(f"at first {who} sleeps {place}\nlater {who} paints\n\n" for who in sellers for place in places)
    )
    same = shutil.copy(file, tmp_path / "same.txt")
    options = {"train_file": file, "validation_file": same, "tokenizer_name": text / "tokenizer", "output": output}
    options |= {"epochs": 8, "learning_rate": 0.1, "batch_size": 4, "data_cache_dir": tmp_path}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    sentence_order_words.main(flags)
    result = json.loads(output.read_text())
    assert result["pairs"] == {"train": 24, "validation": 24}
    assert result["validation accuracy by epoch"][-1] == 1


@pytest.mark.parametrize(
    "flags", [["--tokenizer_name", "a"], ["--tokenizer_name", "a", "--output", "b", "--objective", "mlm"]]
)
def test_missing_and_contradicting_options_end_in_one_line(flags):
    with pytest.raises(SystemExit, match="error: .*(output|objective)") as caught:
        sentence_order_words.main(flags)
    assert "\n" not in str(caught.value)
