"""Measurements of LambdaBERT, each a command: `python -m benchmarks.speed`, from the repository root.

README.md lists the commands, their recipes and every recorded result. What several of them share:

    environment        the machine and the versions that a number was taken with
    correctness        nothing is timed or trained unless the tests of that code pass
    runs               recipes, and folders of finished runs that are not run again
    report             tables, JSON records and curves
    encoders           the models whose speed is compared
    calls              one timed call of such a model, and its peak memory
    attention_features what a probe is given of a BERT's attention weights
    masked_text        masked language models on masked text of given lengths
    peers              other encoders, to be trained beside LambdaBERT
    lambda_variants    changes of a model that are not settings of the library
"""
