"""Distillation: a LambdaBERT learns to compute what a trained BERT computes."""
