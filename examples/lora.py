"""Fine-tunes a LambdaBERT to sort texts into classes with LoRA: small matrices beside the encoder's own are trained.

    python -m examples.lora --train_file banking77/train.csv --test_file banking77/test.csv --label_column category \
        --num_train_epochs 10 --learning_rate 2e-3 --output_dir models/banking77_lora

What differs from examples/text_classification.py is the adapter. The result is a folder of the adapter, the pooler, the
head and a config with the classes:

    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(model, config=config, ignore_mismatched_sizes=True)
    PeftModel.from_pretrained(base, folder)
"""

import sys
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model

from examples.common import Metrics, Training, parse, run
from examples.text_classification import TextOptions, fine_tune, new_classifier, read_texts, with_class_labels

# of a lambda layer; BERT's are query, key and value
PROJECTIONS = ["to_queries", "to_keys", "to_values"]


@dataclass
class LoraOptions(TextOptions):
    rank: int = field(default=8, metadata={"help": "Rank of the matrices beside each projection."})


def main(argv: list[str] | None = None) -> Metrics:
    options, training = parse(argv, LoraOptions, Training)
    splits = with_class_labels(read_texts(options), options.label_column)
    lora = LoraConfig(
        task_type="SEQ_CLS",  # its new head is trained and saved
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=PROJECTIONS,
        modules_to_save=["pooler"],  # new as well, if the model comes from masked language modelling
    )
    classifier = new_classifier(options, splits)
    config = classifier.config
    model = get_peft_model(classifier, lora)
    model.print_trainable_parameters()
    found = fine_tune(model, splits, options, training)
    config.save_pretrained(training.output_dir)  # the classes, which an adapter does not keep
    return found


if __name__ == "__main__":
    sys.exit(run(main))
