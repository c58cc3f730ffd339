"""Deployment: a saved LambdaBERT as a program for other runtimes, checked against PyTorch."""

from .export import FORMATS, Export, export_model

__all__ = ["FORMATS", "Export", "export_model"]
