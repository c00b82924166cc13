"""Falcon Mamba (Zuo et al., 2024, arXiv 2410.05355): Mamba with norms, without weights, of step size, B and C."""

from transformers.models.falcon_mamba import modeling_falcon_mamba

from layerzoo.hosts.transformers.selective import SelectiveMixer


class FalconMambaMixer(SelectiveMixer, modeling_falcon_mamba.FalconMambaMixer):
    host = modeling_falcon_mamba.FalconMambaMixer
    norms = ("dt_layernorm", "b_layernorm", "c_layernorm")
