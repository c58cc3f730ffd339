"""What the pretraining command says to a mistake."""

import errno
import json
import logging
from contextlib import contextmanager

import pytest
import transformers

import lambdabert.training.run
import run_language_modeling
from lambdabert.training.arguments import RunArguments
from training_support import sources, write_recipe


@contextmanager
def caplog_at_debug():
    """The records that the commands log, of any level; their `log_level` ends with it."""
    records, verbosity = [], transformers.logging.get_verbosity()
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("lambdabert").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("lambdabert").removeHandler(handler)
        logging.getLogger("lambdabert").setLevel(logging.INFO)
        transformers.logging.set_verbosity(verbosity)


class TestMistakes:
    """Each ends in one line that names what to change, before anything is written."""

    @pytest.fixture
    def prepared(self, monkeypatch):
        """The texts that were read: reading one ends the command."""
        read = []

        def load(*args, **kwargs):
            read.append(args)
            raise AssertionError("text was read")

        monkeypatch.setattr(lambdabert.training.run, "load_corpus", load)
        return read

    def complaint(self, capfd, tmp_path, arguments):
        output_dir = tmp_path / "run"
        assert run_language_modeling.main([*arguments, "--output_dir", str(output_dir)]) == 1
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        assert not output_dir.exists()
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, printed
        return lines[0]

    def test_hub_out_of_reach(self, capfd, tmp_path):
        flags = "--do_train --do_eval --eval_steps=100 --sop".split()
        line = self.complaint(capfd, tmp_path, flags)
        assert all(way_out in line for way_out in ("hub", "--train_file", "--tokenizer_name", "configs/demo.json"))

    @pytest.mark.parametrize(
        "flags, named",
        [
            ("--do_trian", "--do_trian"),
            ("--do_train false --do_eval false", "--do_train"),
            ("--do_eval", "--model_name_or_path"),
            ("--max_steps many", "many"),
            ("--learning_rate fast", "learning_rate"),
            ("--objective clm", "clm"),
            ("--eval_strategy often", "often"),
            # values that cannot work
            ("--learning_rate inf", "learning_rate=inf"),
            ("--learning_rate nan", "learning_rate=nan"),
            ("--learning_rate -1", "learning_rate=-1.0"),
            ("--weight_decay nan", "weight_decay=nan"),
            ("--max_grad_norm nan", "max_grad_norm=nan"),
            ("--mlm_probability nan", "mlm_probability=nan"),
            ("--adam_beta1 1", "adam_beta1=1.0"),
            ("--adam_beta2 -0.1", "adam_beta2=-0.1"),
            ("--adam_epsilon 0", "adam_epsilon=0"),
            ("--warmup_steps -1", "warmup_steps=-1"),
            ("--gradient_accumulation_steps -2", "gradient_accumulation_steps=-2"),
            ("--per_device_train_batch_size 0", "per_device_train_batch_size=0"),
            ("--per_device_eval_batch_size 0", "per_device_eval_batch_size=0"),
            ("--num_train_epochs -1 --max_steps -1", "num_train_epochs=-1"),
            ("--max_steps 0", "max_steps=0"),
            ("--max_steps -5", "max_steps=-5"),
            ("--eval_steps 0", "eval_steps=0"),
            ("--save_steps 0", "save_steps=0"),
            ("--logging_steps 0", "logging_steps=0"),
            ("--logging_steps 2.5", "logging_steps"),
            ("--save_total_limit 0", "save_total_limit=0"),
            ("--seed -1", "seed=-1"),
            ("--dataloader_num_workers -1", "dataloader_num_workers=-1"),
            ("--train_tokenizer --vocab_size 3", "vocab_size=3"),
            ("--lr_scheduler_kwargs nonsense", "lr_scheduler_kwargs"),
            ("--accelerator_config nowhere.json", "accelerator_config"),
            # what the Trainer and its parts refuse
            ("--report_to nobody", "report_to=nobody"),
            ("--report_to flyte", "report_to=flyte"),
            ("--bf16_full_eval --fp16_full_eval", "fp16"),
            ("--optim galore_adamw --optim_target_modules all-linear", "galore_torch"),
            ("--optim lomo", "lomo"),
            ("--optim sgd --optim_args momentum", "Trainer"),
            ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":1}', "cycles"),
            ("--torch_compile_backend turbo", "torch_compile_backend=turbo"),
            ("--torch_compile_mode fastest", "torch_compile_mode=fastest"),
            ('--activation_checkpointing --activation_checkpointing_kwargs {"deep":1}', "deep"),
            ('--accelerator_config {"quick":1}', "quick"),
            ("--dataloader_num_workers 1 --dataloader_multiprocessing_context teleport", "teleport"),
            ('--deepspeed {"train_batch_size":1}', "deepspeed"),
            ("--fsdp full_shard", "fsdp"),
            ("--push_to_hub", "push_to_hub"),
            ("--load_best_model_at_end --save_steps 6 --eval_steps 6 --metric_for_best_model beauty", "beauty"),
            # what has no effect
            ("--label_smoothing_factor 0.1", "label_smoothing_factor=0.1"),
            ("--do_predict", "do_predict"),
            ("--resume_from_checkpoint here", "resume_from_checkpoint"),
            ("--use_liger_kernel", "use_liger_kernel"),
            ("--save_only_model", "save_only_model"),
            ("--vocab_size 100", "vocab_size=100"),
            ("--lowercase", "lowercase"),
            ("--do_train --do_eval false --eval_steps 7", "eval_steps=7"),
            ("--do_train --max_eval_samples 7", "max_eval_samples=7"),
            ("--do_train --eval_mlm_probability 0.2", "eval_mlm_probability=0.2"),
            ("--do_train false --mlm_probability 0.2", "mlm_probability=0.2"),
            ("--eval_strategy epoch --eval_steps 7", "eval_steps=7"),
            ("--max_steps 3 --num_train_epochs 2", "num_train_epochs=2"),
            ("--lr_scheduler_type constant --warmup_steps 3", "warmup_steps=3"),
            ("--max_steps 1 --warmup_steps 3", "warmup_steps=3"),
            ("--optim sgd --adam_beta1 0.8", "adam_beta1=0.8"),
            ("--run_name mine", "run_name=mine"),
            ("--do_train --save_strategy best", "save_strategy=best has no effect"),
            ("--ddp_backend gloo", "ddp_backend=gloo"),
            ("--deepspeed {}", "deepspeed is an empty object"),
            ("--hub_model_id mine", "hub_model_id=mine"),
            ("--dataloader_prefetch_factor 2", "dataloader_prefetch_factor=2"),
            # sentence, config, tokenizer
            ("--masked_sentence nothing", "masked_sentence='nothing'"),
            ("--masked_sentence [MASK][MASK]", "2 times"),
            ("--masked_sentence " + "fox." * 200 + "[MASK]", "shorten it"),
            ("--masked_sentence=", "masked_sentence is empty"),
            ("--config_overrides hidden_size", "field=value"),
            ("--config_overrides hidden_size=8,hidden_size=16", "hidden_size"),
            ("--config_overrides hidden_sizes=3", "hidden_sizes"),
            ("--config_overrides hidden_size=30", "num_lambda_queries"),
            ("--config_overrides hidden_size=big", "hidden_size"),
            ("--config_overrides layer_norm_eps=NaN", "nan"),
            ("--config_overrides vocab_size=100", "vocab_size=100"),
            ("--config_overrides type_vocab_size=1", "type_vocab_size=1"),
            ("--config_overrides pad_token_id=7", "pad_token_id=7"),
            ("--config_overrides mask_token_id=7", "mask_token_id=7"),
            ("--config_overrides repetition_context_size=4", "repetition_context_size=4"),
            ("--config_overrides num_hidden_layers=1000000000", "GiB"),
            ("--config_overrides intermediate_size=1000000000", "intermediate_size=1000000000"),
            ("--config_overrides hidden_size=8000000000000000000", "tensor"),
            ("--per_device_train_batch_size 1000000000", "per_device_train_batch_size"),
            ("--max_seq_length 600 --config_overrides position_embedding_type=absolute", "max_position_embeddings"),
            ("--max_seq_length 4", "max_seq_length"),
            ("--pad_to_multiple_of 1000000000", "pad_to_multiple_of=1000000000"),
            (
                "--pad_to_multiple_of 1000 --config_overrides position_embedding_type=absolute",
                "pad_to_multiple_of=1000",
            ),
            ("--config_name nowhere", "nowhere"),
            ("--model_name_or_path nowhere", "nowhere"),
            ("--train_tokenizer", "tokenizer_name"),
            ("--tokenizer_name nowhere", "nowhere"),
            ("--streaming --max_steps -1", "--max_steps"),
            ("--do_train false --do_eval --streaming", "streaming=True has no effect: it needs --do_train"),
            ("--do_train false --do_eval --dupe_factor 2", "dupe_factor=2 has no effect: it needs --do_train"),
            ("--do_train false --do_eval --push_to_hub", "push_to_hub=True has no effect: it needs --do_train"),
            ("--streaming --data_seed 2", "data_seed=2 has no effect"),
            ("--train_sampling_strategy sequential --data_seed 2", "data_seed=2 has no effect: it needs an order"),
            (
                "--do_train false --do_eval --validation_file v.txt --corpus python-docs",
                "corpus=python-docs has no effect: it needs --do_train, since validation_file",
            ),
            (
                '--accelerator_config {"split_batches":true}',
                'accelerator_config={"split_batches":true} cannot be used',
            ),
        ],
    )
    def test_options(self, capfd, tmp_path, text, prepared, flags, named):
        values = {**sources(text), "use_cpu": True, "disable_tqdm": True}
        if "masked_sentence" in flags and "fox" in flags:
            values["config_overrides"] = {"max_position_embeddings": 128, "position_embedding_type": "absolute"}
        if "train_tokenizer" in flags and "vocab_size" in flags:
            del values["tokenizer_name"]
        if "--do_train" in flags.split():
            del values["validation_file"]
        recipe = tmp_path / "r.json"
        recipe.write_text(json.dumps(values))
        assert named in self.complaint(capfd, tmp_path, [str(recipe), *flags.split()])
        assert not prepared

    def test_several_gpus_for_one_process(self, capfd, tmp_path, text, prepared, monkeypatch):
        monkeypatch.setattr(RunArguments, "n_gpu", 2)
        recipe = write_recipe(tmp_path / "r.json", **sources(text))
        line = self.complaint(capfd, tmp_path, [recipe])
        assert "torchrun --nproc_per_node 2" in line and not prepared

    @pytest.mark.parametrize(
        "content, named",
        [
            ('{"do_train": true, "lerning_rate": 1}', "lerning_rate"),
            ("{", "JSON"),
            ("[1]", "object"),
            (None, "r.json"),
            ('{"max_steps": 3, "max_steps": 4}', "max_steps"),
            ('{"max_steps": "3"}', 'max_steps is "3", but it takes a whole number'),
            ('{"max_steps": 3.5}', "whole number"),
            ('{"max_steps": null}', "max_steps is null"),
            ('{"learning_rate": true}', "learning_rate is true, but it takes a number"),
            ('{"learning_rate": NaN}', "learning_rate=nan"),
            ('{"do_train": 1}', "do_train is 1, but it takes true or false"),
            ('{"train_file": [["a"]]}', "a list of strings"),
            ('{"train_file": {"a": 1}}', "a list of strings"),
            ('{"output_dir": 5}', "output_dir is 5, but it takes a string"),
            ('{"config_overrides": [1]}', "an object"),
            ('{"config_overrides": {"layer_norm_eps": Infinity}}', "inf"),
            ('{"config_overrides": {"hidden_size": {"a": 1}}}', "hidden_size"),
            ('{"lr_scheduler_type": "steep"}', "steep"),
            ('{"eval_strategy": "often"}', "often"),
            ('{"objective": "clm"}', "clm"),
            ('{"debug": ["everything"]}', "everything"),
            ("[" * 100_000, "JSON"),
        ],
    )
    def test_recipe(self, capfd, tmp_path, text, prepared, content, named):
        recipe = tmp_path / "r.json"
        if content is not None:
            recipe.write_text(content)
        flags = ["--tokenizer_name", str(text / "tokenizer"), "--validation_file", str(text / "valid.txt")]
        assert named in self.complaint(capfd, tmp_path, [str(recipe), *flags])
        assert not prepared

    @pytest.mark.parametrize(
        "name, content, named",
        [
            ("vocab.txt", bytes(range(256)), "not a text file"),
            ("vocab.txt", b"", "[PAD]"),
            ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nfox\n", "[MASK]"),
            ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox\nfox\n", "'fox' twice"),
            ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n\n[SEP]\n[MASK]\nfox\n", "line 4 of"),
            ("tokenizer.json", b"{}", "tokenizer.json"),
            ("folder/tokenizer.json", b'{"model": ', "no tokenizer that can be read"),
            ("folder/tokenizer.json", b'{"model": 5}', "no tokenizer that can be read"),
            ("folder/tokenizer_config.json", b"[]", "no tokenizer that can be read"),
        ],
    )
    def test_broken_tokenizer(self, capfd, tmp_path, text, prepared, name, content, named):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        source = file if file.parent == tmp_path else file.parent
        line = self.complaint(
            capfd, tmp_path, ["--train_file", str(text / "train.txt"), "--tokenizer_name", str(source)]
        )
        assert named in line and f"tokenizer_name={source}" in line
        assert not prepared

    @pytest.mark.parametrize(
        "content", ['{"hidden_size": ', "[1]", '{"hidden_size": "wide"}', '{"model_type": "bert"}']
    )
    def test_broken_config(self, capfd, tmp_path, text, prepared, content):
        (tmp_path / "config.json").write_text(content)
        sources = ["--train_file", str(text / "train.txt"), "--tokenizer_name", str(text / "tokenizer")]
        line = self.complaint(capfd, tmp_path, [*sources, "--config_name", str(tmp_path / "config.json")])
        assert str(tmp_path) in line or "hidden_size" in line
        assert "drop" not in line, "what was not given cannot be dropped"
        assert not prepared

    def test_mistake_of_the_program_names_its_type(self, capfd, tmp_path, text, monkeypatch):
        def broken(*args, **kwargs):
            raise KeyError("words")

        monkeypatch.setattr(lambdabert.training.run, "load_corpus", broken)
        recipe = write_recipe(tmp_path / "r.json", **sources(text))
        assert "KeyError: 'words'" in self.complaint(capfd, tmp_path, [recipe])
        recipe = write_recipe(tmp_path / "r.json", log_level="debug", **sources(text))
        with caplog_at_debug() as said:
            assert run_language_modeling.main([recipe, "--output_dir", str(tmp_path / "run")]) == 1
        assert any(record.exc_info and record.exc_info[0] is KeyError for record in said)

    def test_output_folder_that_cannot_be(self, capfd, tmp_path, text, prepared):
        (tmp_path / "file").touch()
        recipe = write_recipe(tmp_path / "r.json", output_dir=str(tmp_path / "file" / "run"), **sources(text))
        assert run_language_modeling.main([recipe]) == 1
        assert f"{tmp_path / 'file'} is not a folder" in capfd.readouterr().err
        assert not prepared

    def test_weights_of_no_use(self, capfd, tmp_path, text):
        """Finite, and so large that no loss is."""
        recipe = write_recipe(
            tmp_path / "r.json",
            output_dir=str(tmp_path / "run"),
            **sources(text, learning_rate=1e30, warmup_steps=0, max_steps=1, eval_steps=None),
        )
        assert run_language_modeling.main([recipe]) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "evaluation's loss after step 1 is not a finite number" in lines[0]

    def test_full_disk_at_the_end(self, capfd, tmp_path, text, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")

        monkeypatch.setattr(lambdabert.training.run, "write_json", full)
        recipe = write_recipe(tmp_path / "r.json", output_dir=str(tmp_path / "run"), max_steps=1, **sources(text))
        assert run_language_modeling.main([recipe]) == 1
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "No space left" in lines[0]

    @pytest.mark.parametrize(
        "content, named",
        [
            (b"", "train.txt"),
            (b"\n\n \n", "train.txt"),
            (b"One document. Of two sentences.\n", "another document"),
            ("Caf\xe9 au lait.\n".encode("latin-1") * 9, "UTF-8"),
            (bytes(range(256)) * 20, "train.txt"),
            (None, "train.txt"),
        ],
        ids=["empty", "blank", "one document", "latin-1", "binary", "missing"],
    )
    def test_text(self, capfd, tmp_path, text, content, named):
        file = tmp_path / "train.txt"
        if content is not None:
            file.write_bytes(content)
        recipe = write_recipe(tmp_path / "r.json", **sources(text, train_file=[str(file)], objective="nsp"))
        assert named in self.complaint(capfd, tmp_path, [recipe])

    def test_a_batch_that_is_never_full(self, capfd, tmp_path, text):
        recipe = write_recipe(tmp_path / "r.json", **sources(text, max_train_samples=5, dataloader_drop_last=True))
        complaint = self.complaint(capfd, tmp_path, [recipe, "--per_device_train_batch_size", "8"])
        assert "dataloader_drop_last" in complaint and "5 examples, fewer than 8" in complaint

    def test_tokenizer_without_mask(self, capfd, tmp_path, text):
        tokenizer = run_language_modeling.load_tokenizer(text / "tokenizer")
        tokenizer.mask_token = None
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        recipe = write_recipe(tmp_path / "r.json", **sources(text, tokenizer_name=str(tmp_path / "tokenizer")))
        assert "mask_token" in self.complaint(capfd, tmp_path, [recipe])

    def test_checkpoint_of_another_shape(self, capfd, tmp_path, text, pretrained):
        recipe = write_recipe(tmp_path / "r.json", **sources(text, tokenizer_name=None))
        source = ["--model_name_or_path", str(pretrained[0])]
        line = self.complaint(capfd, tmp_path, [recipe, *source, "--config_overrides", "intermediate_size=80"])
        assert "config_overrides" in line

    def test_tokenizer_of_another_model(self, capfd, tmp_path, text, pretrained):
        recipe = write_recipe(tmp_path / "r.json", config_overrides=None, **sources(text))
        line = self.complaint(capfd, tmp_path, [recipe, "--model_name_or_path", str(pretrained[0])])
        assert "vocabulary" in line

    def test_broken_weights(self, capfd, tmp_path, text, pretrained):
        source = tmp_path / "source"
        source.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (source / name).write_bytes((pretrained[0] / name).read_bytes())
        (source / "model.safetensors").write_bytes((pretrained[0] / "model.safetensors").read_bytes()[:5000])
        recipe = write_recipe(tmp_path / "r.json", config_overrides=None, **sources(text, tokenizer_name=None))
        line = self.complaint(capfd, tmp_path, [recipe, "--model_name_or_path", str(source)])
        assert str(source) in line
