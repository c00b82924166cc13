"""Layers for language models."""

from layerzoo_language.early_exit import EarlyExitHead, EarlyExitModel, ExitOutput, Generation, Trace

__all__ = ["EarlyExitHead", "EarlyExitModel", "ExitOutput", "Generation", "Trace"]
