"""Jamba (Lieber et al., 2024, arXiv 2403.19887): Mamba with norms of step size, B and C."""

from transformers.models.jamba import modeling_jamba

from layerzoo.hosts.transformers.selective import SelectiveMixer


class JambaMambaMixer(SelectiveMixer, modeling_jamba.JambaMambaMixer):
    host = modeling_jamba.JambaMambaMixer
    norms = ("dt_layernorm", "b_layernorm", "c_layernorm")
