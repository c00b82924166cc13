"""Layers: drop-in `nn.Module`s, one file each, under their family."""

from layerzoo.nn.moe.base_layer import BASELayer
from layerzoo.nn.moe.conv_moe import ConvMoE
from layerzoo.nn.moe.demix import DEMix, DomainPosterior
from layerzoo.nn.moe.factored_moe import FactoredMoE
from layerzoo.nn.moe.moe_lora import MoELoRA
from layerzoo.nn.moe.moefy import MoEfiedFFN, moefy
from layerzoo.nn.moe.multi_gate_moe import MultiGateMoE, TaskUncertainty
from layerzoo.nn.moe.soft_moe import SoftMoE
from layerzoo.nn.moe.sparse_moe import SparseMoE
from layerzoo.nn.moe.switch_ffn import SwitchFFN
from layerzoo.nn.moe.task_moe import TaskMoE
from layerzoo.nn.moe.time_space_moe import TimeSpaceMoE
from layerzoo.nn.ssm.bigs import BiGS
from layerzoo.nn.ssm.dense_mamba import DenseMamba
from layerzoo.nn.ssm.dual_path_mamba import DualPathMamba
from layerzoo.nn.ssm.hgrn import HGRN, hgrn_lower_bounds
from layerzoo.nn.ssm.local_mamba import LocalMamba
from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.nn.ssm.mamba2 import Mamba2
from layerzoo.nn.ssm.mambular import Mambular
from layerzoo.nn.ssm.rglru import RGLRU
from layerzoo.nn.ssm.s4d import S4D
from layerzoo.nn.ssm.ss2d import SS2D
from layerzoo.nn.ssm.u_shape_mamba import UShapeMamba
from layerzoo.nn.ssm.vision_mamba import VisionMamba

__all__ = [
    "HGRN",
    "RGLRU",
    "S4D",
    "SS2D",
    "BASELayer",
    "BiGS",
    "ConvMoE",
    "DEMix",
    "DenseMamba",
    "DomainPosterior",
    "DualPathMamba",
    "FactoredMoE",
    "LocalMamba",
    "Mamba",
    "Mamba2",
    "Mambular",
    "MoELoRA",
    "MoEfiedFFN",
    "MultiGateMoE",
    "SoftMoE",
    "SparseMoE",
    "SwitchFFN",
    "TaskMoE",
    "TaskUncertainty",
    "TimeSpaceMoE",
    "UShapeMamba",
    "VisionMamba",
    "hgrn_lower_bounds",
    "moefy",
]
