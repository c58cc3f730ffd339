"""LambdaBERT: BERT with lambda layers in place of self-attention."""
