"""Mamba (Gu and Dao, 2023, arXiv 2312.00752)."""

import inspect

from transformers.models.mamba import modeling_mamba

from layerzoo.hosts.transformers.selective import SelectiveMixer

# What the installed version calls a Mamba model's cache, as an argument and in the output: since 5.24 `cache`.
CACHE = "cache" if "cache" in inspect.signature(modeling_mamba.MambaForCausalLM.forward).parameters else "cache_params"


class MambaMixer(SelectiveMixer, modeling_mamba.MambaMixer):
    host = modeling_mamba.MambaMixer
