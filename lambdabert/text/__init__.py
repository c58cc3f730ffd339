"""Text for training: where it comes from, its documents, and the masked examples that are made of them."""
