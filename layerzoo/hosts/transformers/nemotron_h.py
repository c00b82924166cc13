"""Nemotron-H (NVIDIA, 2025, arXiv 2504.03624): Mamba-2 mixers between attention and MLP layers."""

from transformers.models.nemotron_h import modeling_nemotron_h

from layerzoo.hosts.transformers.ssd import SSDMixer


class NemotronHMamba2Mixer(SSDMixer, modeling_nemotron_h.NemotronHMamba2Mixer):
    host = modeling_nemotron_h.NemotronHMamba2Mixer
