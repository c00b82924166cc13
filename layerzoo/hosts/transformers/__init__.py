"""Recipes for Hugging Face transformers: which class of ours runs in which of theirs. Importing this imports the host.

`mixer` is what all Mamba mixers have in common, `selective` and `ssd` are the two kinds (Mamba and Mamba-2), and each
family of models has a module of its name, which says what is peculiar to it. `experts` serves the sparse experts of all
families, and gives transformers the name "layerzoo" for them.
"""

from layerzoo.hosts.transformers.mamba import CACHE

__all__ = ["CACHE"]
